"""Solutions that leave the reader's own functions alone, by looking at the syntax of cells."""

import ast
import re
from collections.abc import Iterable


def tree(source: str) -> ast.Module:
    """A cell's syntax; lines that only IPython knows are left out."""
    plain = [("pass" if re.match(r"\s*[%!]", line) else line) for line in source.split("\n")]
    return ast.parse("\n".join(plain))


def bound(source: str) -> set[str]:
    """The names that a cell binds at its top level."""
    names: set[str] = set()
    for node in tree(source).body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            names.add(node.name)
        else:
            names |= {n.id for n in ast.walk(node) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}
    return names


def stubs(source: str) -> set[str]:
    """The names that a cell leaves for the reader to write: functions that return `...`, and `name = ...`."""
    names: set[str] = set()
    for node in tree(source).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and any(map(_unwritten, ast.walk(node))):
            names.add(node.name)
        elif isinstance(node, ast.Assign) and _is_ellipsis(node.value):
            names |= {target.id for target in node.targets if isinstance(target, ast.Name)}
    return names


def rename(source: str, names: Iterable[str]) -> str:
    """`source` with `NAME_solution` for every one of `names` that it binds, wherever it says NAME."""
    mine = bound(source) & set(names)
    if not mine:
        return source
    lines = source.split("\n")
    places = []
    for node in ast.walk(tree(source)):
        if isinstance(node, ast.Name) and node.id in mine:
            places.append((node.lineno, len(lines[node.lineno - 1].encode()[: node.col_offset].decode()), node.id))
        elif isinstance(node, ast.FunctionDef | ast.ClassDef) and node.name in mine:
            line = lines[node.lineno - 1]
            places.append((node.lineno, line.index(node.name, line.index(" ", node.col_offset)), node.name))
    for row, column, name in sorted(places, reverse=True):
        line = lines[row - 1]
        lines[row - 1] = f"{line[:column]}{name}_solution{line[column + len(name) :]}"
    return "\n".join(lines)


def _unwritten(node: ast.AST) -> bool:
    if isinstance(node, ast.Return | ast.Expr) and node.value is not None:
        return _is_ellipsis(node.value)
    return isinstance(node, ast.Raise) and "NotImplementedError" in ast.unparse(node)


def _is_ellipsis(node: ast.expr) -> bool:
    return isinstance(node, ast.Constant) and node.value is ...
