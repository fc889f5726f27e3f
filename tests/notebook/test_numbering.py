import re
from pathlib import Path

import pytest

from sslbook.errors import UserError
from sslbook.notebook import numbering

ROOT = Path(__file__).parents[2]


@pytest.fixture
def book(tmp_path):
    for name, text in (
        ("first", 'FIGURES = ("first.a", "first.b")\n'),
        ("second", 'import nowhere\nFIGURES: tuple[str, ...] = (\n    "second.a",\n)\n'),
    ):
        (tmp_path / "chapters" / name).mkdir(parents=True)
        (tmp_path / "chapters" / name / "figures.py").write_text(text)
    (tmp_path / "chapters" / "__init__.py").write_text('CHAPTERS = ("first", "second")\n')
    return tmp_path


def test_number_is_chapter_and_position_and_nothing_is_run(book):
    assert [numbering.number(name, book) for name in ("first.a", "first.b", "second.a")] == ["1.1", "1.2", "2.1"]
    assert numbering.chapter_of("second.a", book) == "second"


def test_chapters_are_in_the_order_of_the_table_of_contents():
    toc = re.findall(r"^\s*- file: book/chapters/(\w+)/chapter$", (ROOT / "_toc.yml").read_text(), re.M)
    assert list(numbering.chapters()) == toc


@pytest.mark.parametrize(
    ("text", "name", "message"),
    [
        ('FIGURES = ("first.a",)', "first.c", r"no chapter lists the figure 'first.c' .*; did you mean first.a\?"),
        (None, "xyz", "no chapter lists the figure 'xyz' in FIGURES of its figures.py; there is no list for first$"),
        ("FIGURES = tuple(names)", "xyz", "there is no list for first$"),
    ],
)
def test_a_missing_name_or_list_gives_one_line(book, text, name, message):
    path = book / "chapters" / "first" / "figures.py"
    path.unlink() if text is None else path.write_text(text)
    with pytest.raises(UserError, match=message) as failure:
        numbering.number(name, book)
    assert "\n" not in str(failure.value)


def test_a_list_of_one_chapter_says_what_is_wrong_with_it(book):
    path = book / "chapters" / "first" / "figures.py"
    path.write_text("FIGURES = tuple(names)")
    with pytest.raises(UserError, match=r"chapters/first/figures.py: FIGURES must be a plain tuple of names"):
        numbering.figures("first", book)
    path.write_text("figures = ()")
    with pytest.raises(UserError, match=r"chapters/first/figures.py has no FIGURES"):
        numbering.figures("first", book)
    path.unlink()
    with pytest.raises(UserError, match=r"chapters/first/figures.py is missing"):
        numbering.figures("first", book)


def test_an_anchor_is_a_word():
    assert numbering.anchor("learning_without_labels.two_views") == "fig-learning-without-labels-two-views"
