"""Imports point one way, and a method imports no other."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "sslbook"

# A module may import from its own layer and from those below it.
LAYERS = [
    {"errors", "chance", "schedules", "distributed", "optim", "checkpoint", "nn", "data"},
    {"methods"},
    {"evaluation", "hooks", "report", "notebook"},
    {"train", "evaluate", "extract", "configuration"},
    {"tools", "compare", "__init__", "__main__"},
]


def layer(module: str) -> int:
    return next(i for i, names in enumerate(LAYERS) if module in names)


def imports(path: Path) -> set[str]:
    """The modules of the package that a file imports, at its top or inside a function, as dotted paths.

    Imports that only a type checker sees are left out.
    """
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING"):
            node.body = []
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {name.name for name in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found |= {f"{node.module}.{name.name}" for name in node.names}
    return {name.removeprefix("sslbook.") for name in found if name.startswith("sslbook.")}


FILES = sorted(PACKAGE.rglob("*.py"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_one_way(path: Path) -> None:
    relative = path.relative_to(PACKAGE)
    own = relative.parts[0].removesuffix(".py")
    for name in imports(path):
        other = name.split(".")[0]
        if not (PACKAGE / other).is_dir() and not (PACKAGE / f"{other}.py").is_file():
            continue  # a name that sslbook/__init__.py defines
        assert layer(other) <= layer(own), f"{relative} must not import sslbook.{name}"
        if own == "methods" and other == "methods":
            assert name.split(".")[1] == "base" or relative.name == "__init__.py", f"{relative} imports sslbook.{name}"


def test_every_module_has_a_layer() -> None:
    for path in PACKAGE.iterdir():
        if path.suffix == ".py" or (path / "__init__.py").exists():
            layer(path.stem)
