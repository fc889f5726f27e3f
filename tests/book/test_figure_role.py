"""The role `{fig}` in a small book of two chapters, built by Sphinx as the site is."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def build(folder: Path, *options: str) -> subprocess.CompletedProcess:
    (folder / "conf.py").write_text(
        f"import sys; sys.path.insert(0, {str(ROOT / 'book' / '_extensions')!r})\n"
        "extensions = ['myst_parser', 'figures']\nroot_doc = 'book/intro'\nhtml_theme = 'basic'\n"
    )
    command = [sys.executable, "-m", "sphinx", "-q", "-b", "html", *options, str(folder), str(folder / "out")]
    return subprocess.run(command, capture_output=True, text=True)


@pytest.fixture
def book(tmp_path: Path) -> Path:
    chapters = tmp_path / "book" / "chapters"
    for name, figures in (("first", ("first.a",)), ("second", ("second.a", "second.two_words"))):
        (chapters / name).mkdir(parents=True)
        (chapters / name / "figures.py").write_text(f"FIGURES = {figures!r}\n")
        (chapters / name / "chapter.md").write_text(f"# {name}\n\nSee {{fig}}`second.two_words`.\n")
    (chapters / "__init__.py").write_text('CHAPTERS = ("first", "second")\n')
    (tmp_path / "book" / "intro.md").write_text(
        "# A book\n\n{fig}`first.a` is the first.\n\n```{toctree}\nchapters/first/chapter\nchapters/second/chapter\n```\n"
    )
    return tmp_path


@pytest.mark.slow
def test_a_figure_is_linked_by_its_number_from_every_page(book: Path) -> None:
    run = build(book, "-W")
    assert run.returncode == 0, run.stderr
    pages = {name: (book / "out" / "book" / f"{name}.html").read_text() for name in ("intro", "chapters/first/chapter")}
    assert 'href="chapters/first/chapter.html#fig-first-a">Figure 1.1</a>' in pages["intro"]
    assert 'href="../second/chapter.html#fig-second-two-words">Figure 2.2</a>' in pages["chapters/first/chapter"]
    own = (book / "out" / "book" / "chapters" / "second" / "chapter.html").read_text()
    assert 'href="#fig-second-two-words">Figure 2.2</a>' in own


@pytest.mark.slow
def test_a_name_that_no_chapter_lists_is_a_warning(book: Path) -> None:
    (book / "book" / "intro.md").write_text("# A book\n\nSee {fig}`second.b`.\n")
    run = build(book)
    assert "no chapter lists the figure 'second.b' in FIGURES of its figures.py; did you mean second.a?" in run.stderr
