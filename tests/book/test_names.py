"""The book's modules use no name that is defined nowhere: long runs would meet it only after minutes."""

import builtins
import dis
import importlib.util
import types
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
LEFT_OUT = {"_build", "_extensions", "library_examples"}  # the examples do their work when imported
MODULES = sorted(path for path in (ROOT / "book").rglob("*.py") if not LEFT_OUT & set(path.parts))


def parts(code: types.CodeType) -> Iterator[types.CodeType]:
    """A module's code, and that of everything defined in it."""
    yield code
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from parts(constant)


def undefined(source: str, known: set[str]) -> set[str]:
    """Names that are read and are neither among `known` nor assigned at the top of the module."""
    found = [step for code in parts(compile(source, "module", "exec")) for step in dis.get_instructions(code)]
    read = {step.argval for step in found if step.opname in ("LOAD_GLOBAL", "LOAD_NAME")}
    assigned = {step.argval for step in found if step.opname == "STORE_NAME"}
    return read - assigned - known - set(dir(builtins)) - {"__annotations__"}


def test_a_missing_name_is_found():
    source = "import math\n\ndef f(x):\n    return [math.sqrt(y) + lost(y) for y in x]\n"
    assert undefined(source, {"math", "f"}) == {"lost"}


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT / "book")))
def test_every_name_is_defined(path: Path):
    spec = importlib.util.spec_from_file_location("looked_at", path)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert undefined(path.read_text(encoding="utf-8"), set(vars(module))) == set()
