"""The cells of a page: those of a notebook, or Markdown cut at its code."""

import re
from collections.abc import Sequence
from typing import Any

from sslbook.notebook.portable import blocks
from sslbook.notebook.portable.labels import Page, strip_front_matter
from sslbook.notebook.portable.solutions import stubs

FENCES_RUN = "book/background/"  # pages whose fences of Python stand alone and run


def has_code(page: Page) -> bool:
    """Whether a page is a notebook, or Markdown with cells."""
    return page.path.suffix == ".ipynb" or any(cell["cell_type"] == "code" for cell in cells_of(page))


def cells_of(page: Page) -> list[dict[str, Any]]:
    """The cells of a notebook, or of Markdown cut at its code cells."""
    text = page.path.read_text(encoding="utf-8")
    if page.path.suffix == ".ipynb":
        import nbformat

        return list(nbformat.reads(text, as_version=4).cells)
    cells: list[dict[str, Any]] = []
    written: list[str] = []
    lines = strip_front_matter(text).split("\n")
    at = 0
    while at < len(lines):
        fence = blocks.FENCE.match(lines[at])
        end = _closing(lines, at, fence[2]) if fence else at
        if fence and _runs(fence[3].strip(), page):
            cells.append(_cell("markdown", "\n".join(written)))
            (block,) = blocks.blocks("\n".join(lines[at : end + 1]).replace(fence[3], "{code-cell}" + fence[3], 1))
            assert isinstance(block, blocks.Directive)
            cells.append(_cell("code", block.body, re.findall(r"[\w-]+", block.options.get("tags", ""))))
            written = []
        else:
            written += lines[at : end + 1]
        at = end + 1
    return [*cells, _cell("markdown", "\n".join(written))]


def _runs(info: str, page: Page) -> bool:
    return info.startswith("{code-cell}") or (info == "python" and page.name.startswith(FENCES_RUN))


def _cell(kind: str, source: str, tags: Sequence[str] = ()) -> dict[str, Any]:
    return {"cell_type": kind, "metadata": {"tags": list(tags)}, "source": source}


def _closing(lines: list[str], at: int, marks: str) -> int:
    pattern = re.compile(rf"^ *{re.escape(marks[0])}{{{len(marks)},}}\s*$")
    return next((i for i in range(at + 1, len(lines)) if pattern.match(lines[i])), len(lines) - 1)


def installs(cell: dict[str, Any]) -> bool:
    """Whether a cell is the one by which a chapter's source installs the package."""
    return "remove-cell" in cell["metadata"].get("tags", []) and "pip install" in cell["source"]


def unwritten(cells: list[dict[str, Any]]) -> set[str]:
    """What all cells outside solutions leave to the reader."""
    names: set[str] = set()
    inside = False
    for cell in cells:
        if cell["cell_type"] == "markdown":
            for block in blocks.blocks(cell["source"]):
                if isinstance(block, blocks.Directive) and block.name in ("solution-start", "solution-end"):
                    inside = block.name == "solution-start"
        elif cell["cell_type"] == "code" and not inside and not installs(cell):
            names |= stubs(cell["source"])
    return names
