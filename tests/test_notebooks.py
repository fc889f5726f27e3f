"""Every chapter runs from top to bottom in the smoke profile (nbval), and is committed whole, run and readable."""

import html.parser
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import nbformat
import pytest

from sslbook.notebook import numbering

ROOT = Path(__file__).parents[1]
CHAPTERS = sorted((ROOT / "book" / "chapters").glob("*/chapter.ipynb"))
LINES, COLUMNS, SIZE = 25, 88, 1_500_000
SECONDS_A_CELL = 600  # only against a cell that hangs

each_chapter = pytest.mark.parametrize("chapter", CHAPTERS, ids=lambda path: path.parent.name)


def cells(chapter: Path, kind: str = "code") -> list[tuple[int, Any]]:
    found = [(i, cell) for i, cell in enumerate(nbformat.read(chapter, as_version=4).cells) if cell.cell_type == kind]
    return [(i, cell) for i, cell in found if cell.source.strip()]


def test_all_chapters_are_in_the_table_of_contents():
    toc = (ROOT / "_toc.yml").read_text()
    listed = set(re.findall(r"^\s*- file: (book/\S+)$", toc, re.M))
    assert CHAPTERS
    assert [c for c in CHAPTERS if str(c.relative_to(ROOT).with_suffix("")) not in listed] == []


@each_chapter
def test_a_chapter_needs_only_earlier_ones(chapter: Path):
    order = numbering.chapters(ROOT / "book")
    card = next(cell.source for _, cell in cells(chapter, "markdown") if "{admonition} This chapter" in cell.source)
    needed = re.findall(r"\.\./(\w+)/chapter", card.partition("**Before this")[2].partition("\n\n")[0])
    assert set(needed) <= set(order[: order.index(chapter.parent.name)])


@each_chapter
@pytest.mark.slow
def test_every_cell_runs(chapter: Path, tmp_path: Path):
    # A process of its own: this one's import hook (shape checking) must not reach what a reader would run.
    environment = os.environ | {"SSLBOOK_PROFILE": "smoke", "IPYTHONDIR": str(tmp_path), "PYTHONPATH": str(ROOT)}
    options = ["--nbval-lax", "--nbval-current-env", f"--nbval-cell-timeout={SECONDS_A_CELL}"]
    quiet = ["-q", "-rf", "--no-header", "-p", "no:cacheprovider", "-o", "addopts=", f"--rootdir={ROOT}"]
    command = [sys.executable, "-m", "pytest", *options, *quiet, str(chapter)]
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    told = re.sub(r"\x1b\[[0-9;]*m", "", run.stdout + run.stderr)
    failed = re.findall(r"^FAILED .*::(Cell \d+)", told, re.M)
    first = told[max(told.find("= FAILURES ="), 0) :][:4000]  # what follows from the first failure says little
    assert run.returncode == 0, f"{chapter.parent.name}: {', '.join(failed)} failed\n{first}"


@each_chapter
def test_outputs_come_from_one_run_in_order(chapter: Path):
    counts = [cell.execution_count for _, cell in cells(chapter)]
    assert counts == list(range(1, len(counts) + 1))
    wrong = [
        i
        for i, cell in cells(chapter)
        if "raises-exception" not in cell.metadata.get("tags", [])
        and any(o.output_type == "error" for o in cell.outputs)
    ]
    assert wrong == [], f"cells {wrong} hold an error"


@each_chapter
def test_cells_are_short_and_narrow(chapter: Path):
    long = [i for i, cell in cells(chapter) if cell.source.count("\n") >= LINES]
    wide = [(i, line) for i, cell in cells(chapter) for line in cell.source.split("\n") if len(line) > COLUMNS]
    assert long == [], f"cells {long} have more than {LINES} lines"
    assert wide == [], f"lines wider than {COLUMNS}"


class Images(html.parser.HTMLParser):
    """Collects the attributes of every `<img>`."""

    def __init__(self):
        super().__init__()
        self.found: list[dict[str, str | None]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag == "img":
            self.found.append(dict(attrs))


@each_chapter
def test_every_image_has_alt_text(chapter: Path):
    for i, cell in cells(chapter):
        for output in cell.outputs:
            data = output.get("data", {})
            bare = [kind for kind in data if kind.startswith("image/")]
            assert bare == [], f"cell {i} shows {bare} without alt text: draw with style.figure(alt=...)"
            page = Images()
            page.feed("".join(data.get("text/html", "")))
            assert all((image.get("alt") or "").strip() for image in page.found), f"cell {i}: an image without alt text"
    for i, cell in cells(chapter, "markdown"):
        assert not re.search(r"!\[\s*\]\(", cell.source), f"cell {i}: an image without alt text"
        page = Images()
        page.feed(cell.source)
        assert all((image.get("alt") or "").strip() for image in page.found), f"cell {i}: an image without alt text"


@each_chapter
def test_the_file_is_small_and_names_no_machine(chapter: Path):
    assert chapter.stat().st_size < SIZE
    text = "\n".join(
        cell.source + "".join(str(o.get("text", "")) + str(o.get("data", {}).get("text/plain", "")) for o in outputs)
        for kind in ("code", "markdown")
        for _, cell in cells(chapter, kind)
        for outputs in [cell.get("outputs", [])]
    )
    places = [str(Path.home()) + "/", str(ROOT) + "/", "/tmp/", "site-packages/"]
    assert [place for place in places if len(place) > 2 and place in text] == []
    assert not re.search(r" at 0x[0-9a-f]{6,}", text), "an object's address: end the cell in `_ = ...`"


@each_chapter
def test_the_chapter_has_one_title(chapter: Path):
    text = "\n\n".join(cell.source for _, cell in cells(chapter, "markdown"))
    prose = re.sub(r"^```.*?^```", "", text, flags=re.M | re.S)
    assert len(re.findall(r"^# ", prose, re.M)) == 1


PAGES = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "FAITHFULNESS.md")]
PAGES += [path for path in sorted((ROOT / "book").rglob("*.md")) if "_build" not in path.parts]


def swallowed(text: str) -> list[str]:
    """Lines that MyST takes for a comment, since they begin with a percent sign; listings of code may hold them."""
    return re.findall(r"^ {0,3}%.*$", re.sub(r"^(`{3,})[a-z]*\n.*?^\1`*$", "", text, flags=re.M | re.S), re.M)


def test_comments_and_text():
    assert swallowed("about 48\n% of all\n\n```sh\n%pip install\n```\n  % indented, and 3 % not") == [
        "% of all",
        "  % indented, and 3 % not",
    ]


@each_chapter
def test_no_line_of_a_chapter_is_swallowed(chapter: Path):
    assert [(i, line) for i, cell in cells(chapter, "markdown") for line in swallowed(cell.source)] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_line_of_a_page_is_swallowed(page: Path):
    assert swallowed(page.read_text(encoding="utf-8")) == []


@each_chapter
def test_figures_are_those_of_the_list_in_its_order(chapter: Path):
    name = chapter.parent.name
    html = "".join("".join(o.get("data", {}).get("text/html", "")) for _, cell in cells(chapter) for o in cell.outputs)
    found = re.findall(r'<figure id="(fig-[\w-]+)"', html)
    assert found == [numbering.anchor(figure) for figure in numbering.figures(name)]
    numbers = re.findall(r"<strong>Figure ([\d.]+)\.</strong>", html)
    assert numbers == [numbering.number(figure) for figure in numbering.figures(name)]
    assert html.count("<figcaption") == len(found), "a figure has a caption but no name"
