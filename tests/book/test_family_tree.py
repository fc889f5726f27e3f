"""The family tree on the page of methods: complete, in order of time, drawn from its source, readable."""

import importlib.util
import re
from pathlib import Path
from xml.etree import ElementTree

import pytest

from sslbook.methods import METHODS
from tests.notebook.color import PAGES, contrast, mix

ROOT = Path(__file__).parents[2]
SVG = "{http://www.w3.org/2000/svg}"


@pytest.fixture(scope="module")
def tree():
    spec = importlib.util.spec_from_file_location("family_tree", ROOT / "book" / "reference" / "family_tree.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_method_is_there_and_what_is_outside_is_marked(tree):
    assert {name for name, method in tree.TREE.items() if not method.outside} == set(METHODS)


def test_nobody_took_from_a_later_method(tree):
    for name, method in tree.TREE.items():
        for parent, what in method.took.items():
            assert tree.TREE[parent].year <= method.year, (name, parent)
            assert tree.TREE[parent].row < method.row, (name, parent)
            assert what.strip(), (name, parent)


def test_only_the_first_of_their_line_took_nothing(tree):
    roots = {name for name, method in tree.TREE.items() if not method.took}
    assert roots == {"exemplar", "relative_location", "colorization", "context_encoder", "deepcluster", "dvae"} | {
        name for name, method in tree.TREE.items() if method.outside
    }


def test_years_go_down_and_no_box_covers_another(tree):
    boxes = [(name, *tree.place(method), method.year) for name, method in tree.TREE.items()]
    for i, (a, x, y, year) in enumerate(boxes):
        for b, x2, y2, year2 in boxes[:i]:
            assert abs(x - x2) >= tree.WIDE + 2 or abs(y - y2) >= tree.HIGH + 2, (a, b)
            assert year == year2 or (year < year2) == (y < y2), (a, b)


def test_file_and_page_are_those_of_the_script(tree):
    assert tree.SVG.read_text(encoding="utf-8") == tree.svg(), "python book/reference/family_tree.py"
    assert tree.block() in tree.PAGE.read_text(encoding="utf-8"), "python book/reference/family_tree.py"


def test_the_list_holds_every_line_of_the_tree(tree):
    lines = sum(len(method.took) for method in tree.TREE.values())
    assert tree.listed().count(": ") == lines
    assert tree.svg().count('<path class="of-') == lines


def test_a_chapter_is_linked_where_there_is_one(tree):
    links = re.findall(r'<a href="../chapters/(\w+)/chapter.html"', tree.svg())
    assert set(links) == {name for name in METHODS if (ROOT / "book" / "chapters" / name / "chapter.ipynb").is_file()}


@pytest.mark.parametrize("page", PAGES)
def test_every_color_stands_out_on_every_page(tree, page):
    ground, ink = PAGES[page]
    mixed = set(re.findall(r"color-mix\(in srgb,(#\w{6}) (\d+)%,currentColor\)", tree.svg()))
    assert len(mixed) == len(tree.FAMILIES)
    for color, kept in mixed:
        assert contrast(mix(color, ink, int(kept) / 100), ground) >= 4.5


def test_words_fit_their_boxes(tree):
    root = ElementTree.fromstring(tree.svg())
    for group in root.iter(f"{SVG}g"):
        for text in group.iter(f"{SVG}text"):
            assert len(text.text) * 0.58 * tree.SIZE <= tree.WIDE + 6, text.text
