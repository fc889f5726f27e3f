"""Imports point one way: every name of the package has a level of its own, and imports only from lower levels."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "sslbook"

# From the bottom; a circle between two names fails, since one of them stands above the other.
LEVELS = [
    *(
        "errors",
        "types",
        "rng",
        "schedules",
        "distributed",
        "files",
        "checkpoint",
        "results",
        "data",
        "nn",
        "optim",
        "weights",
        "methods",
    ),
    *("notebook", "engine", "evaluation", "report", "loggers", "cli"),
    *("train", "evaluate", "extract", "compare", "tools", "__init__", "__main__"),
]
# A variant may import the method that its paper builds on; every method may import the base class.
PARENTS = {"mff": {"mae"}, "pixmim": {"mae"}, "ibot": {"dino"}, "interclr": {"moco", "odc"}, "densecl": {"moco"}}


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


def exists(name: str) -> bool:
    return (PACKAGE / name).is_dir() or (PACKAGE / f"{name}.py").is_file()


def module_of(name: str) -> str:
    """The file, relative to the package and without suffix, that a dotted path of an import names."""
    parts = name.split(".")
    while parts and not (PACKAGE.joinpath(*parts).is_dir() or PACKAGE.joinpath(*parts).with_suffix(".py").is_file()):
        parts.pop()
    return "/".join(parts)


FILES = sorted(PACKAGE.rglob("*.py"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_one_way(path: Path) -> None:
    relative = path.relative_to(PACKAGE)
    own = relative.parts[0].removesuffix(".py")
    for name in imports(path):
        other = name.split(".")[0]
        if other != own and exists(other):  # else it is a name that sslbook/__init__.py defines
            assert LEVELS.index(other) < LEVELS.index(own), f"{relative} must not import sslbook.{name}"
        if own == other == "methods" and relative.name != "__init__.py":
            allowed = {"base"} | PARENTS.get(relative.stem, set())
            assert name.split(".")[1] in allowed, f"{relative} imports sslbook.{name}"


def test_every_name_has_a_level_of_its_own() -> None:
    names = {path.stem for path in PACKAGE.iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()}
    assert names <= set(LEVELS)
    assert len(LEVELS) == len(set(LEVELS))


def test_no_circles_between_files() -> None:
    graph = {}
    for path in FILES:
        own = str(path.relative_to(PACKAGE).with_suffix(""))
        graph[own] = {module_of(name) for name in imports(path)} - {own, "", own.removesuffix("/__init__")}
    done: set[str] = set()

    def visit(file: str, above: tuple[str, ...]) -> None:
        assert file not in above, f"circle: {' -> '.join([*above[above.index(file) :], file])}"
        if file not in done:
            for other in sorted(graph.get(file, ())):
                visit(other, (*above, file))
            done.add(file)

    for file in graph:
        visit(file, ())
