"""The tables of results in the book and in the README are those of `book/results`."""

import importlib.util
from pathlib import Path

import pytest

from sslbook.errors import UserError

SCRIPT = Path(__file__).parents[1] / "book" / "reference" / "results_tables.py"


@pytest.fixture(scope="module")
def tables():
    spec = importlib.util.spec_from_file_location("results_tables", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_pages_are_up_to_date(tables) -> None:
    for page, text in tables.pages().items():
        assert page.read_text(encoding="utf-8") == text, f"{page.name}: python book/reference/results_tables.py"


def test_rejects_a_page_without_markers(tables, tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("no markers")
    with pytest.raises(UserError, match="needs one"):
        tables.insert(page, "a table")


def test_a_missing_value_is_left_blank(tables) -> None:
    values = {"SimCLR": {"kNN": [1.0, 3.0], "memory (MB)": 874}, "pixels": {"kNN": 31.0}}
    assert tables.table(values).splitlines() == [
        "| | kNN (%) | memory (MB) |",
        "|---|---:|---:|",
        "| SimCLR | 2.0 ± 1.4 | 874 |",
        "| pixels | 31.0 |  |",
    ]
