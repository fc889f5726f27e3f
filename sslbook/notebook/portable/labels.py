"""The numbers and titles of the book's pages, counted as the site counts them."""

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from sslbook.errors import UserError, require_known
from sslbook.notebook.portable import blocks

COUNTED = ("exercise", "exercise-start")
PROOFS = ("theorem", "proposition", "lemma", "corollary", "definition", "algorithm", "remark", "example", "conjecture")


@dataclass(frozen=True)
class Page:
    """A page of the table of contents.

    Args:
        name: path from the root of the checkout, without suffix.
        path: the file.
        chapter: its number, None for pages without one.
        depth: how many levels of headings carry numbers.
        title: its first heading.
    """

    name: str
    path: Path
    chapter: int | None
    depth: int
    title: str

    def markdown(self) -> list[str]:
        """The page's Markdown: one string a cell, or one for the whole file."""
        text = self.path.read_text(encoding="utf-8")
        if self.path.suffix == ".md":
            return [strip_front_matter(text)]
        import json

        cells = json.loads(text)["cells"]
        return ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown"]


@dataclass(frozen=True)
class Label:
    """What a label stands for: its kind ("equation", "exercise", "section", "proposition", ...), number, title, page."""

    kind: str
    number: str
    title: str
    page: str


def strip_front_matter(text: str) -> str:
    return re.sub(r"\A---\n.*?\n---\n", "", text, flags=re.S)


class Labels:
    """Everything in the book that a reference can point to.

    Args:
        root: the folder with `_toc.yml`.

    Raises:
        UserError: there is no table of contents.
    """

    def __init__(self, root: Path) -> None:
        if not (root / "_toc.yml").is_file():
            raise UserError(f"{root} has no _toc.yml: portable notebooks are written from a checkout of the book")
        self.root = root
        self.pages = {page.name: page for page in _pages(root)}
        self.known: dict[str, Label] = {}
        self.terms: dict[str, tuple[str, str]] = {}  # in lower case -> the term as the glossary has it, and its page
        self._counts: Counter[tuple[str, int | None]] = Counter()
        for page in self.pages.values():
            self._read(page)

    def __getitem__(self, label: str) -> Label:
        require_known(label, self.known, f"there is no label {label!r} in the book")
        return self.known[label]

    def _read(self, page: Page) -> None:
        sections = Counter[int]()
        waiting: list[str] = []
        for block in _walk("\n\n".join(page.markdown())):
            if isinstance(block, blocks.Target):
                waiting.append(block.label)
            elif isinstance(block, blocks.Formula) and block.label:
                self._count("equation", block.label, "", page)
            elif isinstance(block, blocks.Directive):
                self._directive(block, page)
            elif isinstance(block, blocks.Text):
                for level, title in blocks.headings(block.text):
                    number = section_number(page, sections, level)
                    for label in waiting:
                        self.known[label] = Label("section", number, title, page.name)
                    waiting = []

    def _directive(self, block: blocks.Directive, page: Page) -> None:
        kind = block.name.removeprefix("prf:")
        if block.name == "glossary":
            for line in block.body.split("\n"):
                if line.strip() and not line.startswith(" "):
                    self.terms[line.strip().lower()] = (line.strip(), page.name)
        elif "nonumber" in block.options:
            return
        elif block.name in COUNTED:
            title = block.argument.strip()
            self._count("exercise", block.label, title, page)
        elif block.name.startswith("prf:") and kind in PROOFS:
            self._count(kind, block.label, block.argument, page)
        elif block.name == "math" and block.label:
            self._count("equation", block.label, "", page)

    def _count(self, kind: str, label: str | None, title: str, page: Page) -> None:
        self._counts[kind, page.chapter] += 1
        count = self._counts[kind, page.chapter]
        number = f"{page.chapter}.{count}" if page.chapter else str(count)
        if label:
            self.known[label] = Label(kind, number, title, page.name)


def section_number(page: Page, counts: Counter[int], level: int) -> str:
    """The number of the next heading of `level`, "" where headings carry none; `counts` is kept by the caller."""
    counts[level] += 1
    for deeper in [key for key in counts if key > level]:
        del counts[deeper]
    if page.chapter is None or level > page.depth:
        return ""
    return ".".join([str(page.chapter), *(str(counts[k]) for k in range(2, level + 1))])


def _walk(source: str) -> Iterator[blocks.Block]:
    for block in blocks.blocks(source):
        yield block
        if isinstance(block, blocks.Directive) and block.name not in ("code-cell", "glossary", "math"):
            yield from _walk(block.body)


def _pages(root: Path) -> Iterator[Page]:
    toc = yaml.safe_load((root / "_toc.yml").read_text(encoding="utf-8"))
    yield _page(root, toc["root"], None, 0)
    chapter = 0
    for part in toc.get("parts", [{"chapters": toc.get("chapters", [])}]):
        numbered = part.get("numbered", False)
        for entry in part["chapters"]:
            chapter += bool(numbered)
            depth = 99 if numbered is True else int(numbered)
            for name in _files(entry):
                yield _page(root, name, chapter if numbered else None, depth)


def _files(entry: dict[str, Any]) -> list[str]:
    files = [entry["file"]] if "file" in entry else []
    return files + [name for inner in entry.get("sections", []) for name in _files(inner)]


def _page(root: Path, name: str, chapter: int | None, depth: int) -> Page:
    path = next((p for p in (root / f"{name}.ipynb", root / f"{name}.md") if p.is_file()), None)
    if path is None:
        raise UserError(f"_toc.yml lists {name}, and there is neither {name}.ipynb nor {name}.md")
    page = Page(name, path, chapter, depth, "")
    text = [block.text for block in blocks.blocks("\n\n".join(page.markdown())) if isinstance(block, blocks.Text)]
    title = next((title for part in text for level, title in blocks.headings(part) if level == 1), name)
    return Page(name, path, chapter, depth, title)
