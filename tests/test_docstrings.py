"""Public functions that raise say so."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "sslbook"


def raises(node: ast.AST) -> bool:
    """Whether a node raises something of its own, or by a helper of `sslbook.errors`."""
    if isinstance(node, ast.Call):
        return isinstance(node.func, ast.Name) and node.func.id in ("explained", "require_known")
    return isinstance(node, ast.Raise) and node.exc is not None and "NotImpl" not in ast.unparse(node)


def silent(tree: ast.Module) -> Iterator[str]:
    """Public functions that raise something of their own and whose docstring, or their class's, does not speak of errors."""

    def walk(node: ast.Module | ast.ClassDef) -> Iterator[str]:
        for child in node.body:
            if isinstance(child, ast.ClassDef) and not child.name.startswith("_"):
                yield from walk(child)
            elif isinstance(child, ast.FunctionDef) and (not child.name.startswith("_") or child.name == "__init__"):
                about = ast.get_docstring(child) or ""
                if isinstance(node, ast.ClassDef):
                    if child.name == "__init__":
                        about += ast.get_docstring(node) or ""
                    if child.name in ("__init__", "run") and "Protocol" in ast.unparse(node).partition(":")[0]:
                        about += "Raises"  # as the base class says of all
                raised = [n for n in ast.walk(child) if raises(n)]
                if raised and not any(
                    word in about for word in ("Raises", "Error", "refuse", "Unreadable", "in one line")
                ):
                    yield child.name

    yield from walk(tree)


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_who_raises_says_so(path: Path) -> None:
    assert not list(silent(ast.parse(path.read_text(encoding="utf-8"))))


def test_a_silent_function_is_found() -> None:
    body = "def f():\n    {}raise ValueError('no')\n"
    assert list(silent(ast.parse(body.format("")))) == ["f"]
    assert not list(silent(ast.parse(body.format('"""What. ValueError if not."""\n    '))))
