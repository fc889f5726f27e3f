"""FAITHFULNESS.md says what the methods' docstrings say, and every docstring names its source and what differs."""

import importlib.util
from pathlib import Path

import pytest

from sslbook.methods import METHODS

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def faithfulness():
    spec = importlib.util.spec_from_file_location("faithfulness", ROOT / "book" / "reference" / "faithfulness.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_page_is_up_to_date(faithfulness) -> None:
    assert faithfulness.PAGE.read_text(encoding="utf-8") == faithfulness.page(), "python book/reference/faithfulness.py"


@pytest.mark.parametrize("name", METHODS)
def test_every_method_names_its_source_and_what_differs(faithfulness, name: str) -> None:
    text = faithfulness.docstring(name)
    assert "https://arxiv.org/abs/" in faithfulness.source(text)
    lists = faithfulness.departures(text)
    assert lists
    assert all(items for _, items in lists)


@pytest.mark.parametrize("name", METHODS)
def test_the_authors_code_has_a_version(faithfulness, name: str) -> None:
    sentences = [faithfulness.linked(sentence) for sentence, _ in faithfulness.departures(faithfulness.docstring(name))]
    if any("code" in sentence for sentence in sentences):
        assert any("https://github.com/" in sentence for sentence in sentences)


def test_lists_are_read_to_their_end(faithfulness) -> None:
    text = "Title.\n\nA paper (arXiv:1234.5678). What differs:\n\n- one thing,\n  continued;\n- another\n\nEnd.\n"
    assert faithfulness.departures(text) == [("What differs", ["one thing, continued", "another"])]
    assert faithfulness.source(text) == "A paper ([arXiv:1234.5678](https://arxiv.org/abs/1234.5678))"
