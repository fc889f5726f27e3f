"""The front page's list of chapters and their map, made from the cards that the chapters themselves open with.

`{front-schematic}` shows what self-supervised learning does. `{chapter-cards}` shows each chapter of `_toc.yml`, under its
part of the book, with its question, times, prerequisites and buttons. `{chapter-map}` shows which chapter needs which, once
lying for a wide window and once standing for a phone.
"""

import html
import json
import re
import textwrap
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from docutils import nodes
from docutils.parsers.rst import Directive

from sslbook.notebook import portable
from sslbook.notebook.schematic import Diagram

CARD = re.compile(r":::\{admonition\} This chapter\n(.*?)\n:::", re.S)
LINK = re.compile(r"\{doc\}`(?:[^`<]*<)?([^`<>]+?)>?`")


class CardError(Exception):
    """A chapter's card lacks what the front page shows."""


@dataclass
class Chapter:
    """A chapter as its own card describes it.

    Args:
        page: its page, `book/chapters/NAME/chapter`.
        part: the part of the book that it stands in.
        number: its place in the book, from 1.
        title: its heading.
        question: what it answers.
        read: minutes of reading.
        run: minutes of running.
        before: the prerequisites, Markdown with references relative to the chapter.
        needs: pages of the chapters that it needs.
        helped_by: pages of chapters that help and are not needed.
    """

    page: str
    part: str
    number: int
    title: str
    question: str
    read: int
    run: int
    before: str
    needs: list[str] = field(default_factory=list)
    helped_by: list[str] = field(default_factory=list)

    @property
    def name(self) -> str:
        return self.page.split("/")[-2]


def _paragraph(card: str, label: str, page: str) -> str:
    """The text behind a bold label, to the end of its paragraph or the next bold label."""
    found = re.search(rf"\*\*{label}[.:]?\*\*[.:]?\s+(.*?)(?=\n\n|\Z)", card, re.S | re.I)
    if not found:
        raise CardError(f"{page}: its card has no **{label}**")
    return " ".join(found[1].split())


def _minutes(card: str, label: str, page: str) -> int:
    found = re.search(rf"\*\*{label}[.:]?\*\*[.:]?\s+(?:(?:in|about|for|under|some)\s+)*(\d+)\s+min", card, re.I)
    if not found:
        raise CardError(f"{page}: its card has no **{label}** followed by a number of minutes")
    return int(found[1])


def _absolute(page: str, target: str) -> str:
    """`target` as a page of `page` would name it, from the root of the site."""
    parts = target.lstrip("/").split("/") if target.startswith("/") else [*page.split("/")[:-1], *target.split("/")]
    path: list[str] = []
    for part in parts:
        if part == "..":
            path.pop()
        else:
            path.append(part)
    return "/".join(path)


def chapter(root: Path, page: str, part: str, number: int) -> Chapter:
    """What the notebook of `page` says about itself; CardError where its card is incomplete."""
    cells = json.loads((root / f"{page}.ipynb").read_text(encoding="utf-8"))["cells"]
    text = "\n\n".join("".join(c["source"]) for c in cells[:4] if c["cell_type"] == "markdown")
    title, card = re.search(r"^# (.+)$", text, re.M), CARD.search(text)
    if not title or not card:
        raise CardError(f"{page}: begins with no heading and card (:::{{admonition}} This chapter)")
    before = _paragraph(card[1], "Before this", page)
    needs, helped_by = [], []
    for sentence in re.split(r"(?<=\.)\s+(?=[A-Z{])", before):
        into = helped_by if re.search(r"\bhelps?\b|\buseful\b", sentence) else needs
        pages = [_absolute(page, target) for target in LINK.findall(sentence)]
        into.extend(p for p in pages if p.startswith("book/chapters/") and p not in needs)
    return Chapter(
        page,
        part,
        number,
        title[1].strip(),
        _paragraph(card[1], "Question", page),
        _minutes(card[1], "Read", page),
        _minutes(card[1], "Run", page),
        before,
        needs,
        helped_by,
    )


def chapters(root: Path) -> list[Chapter]:
    """All chapters, in the order of `_toc.yml`."""
    parts = yaml.safe_load((root / "_toc.yml").read_text(encoding="utf-8"))["parts"]
    pages = [(entry["file"], part["caption"]) for part in parts for entry in part["chapters"]]
    pages = [(page, part) for page, part in pages if page.startswith("book/chapters/")]
    return [chapter(root, page, part, i) for i, (page, part) in enumerate(pages, start=1)]


# -- schematic ---------------------------------------------------------------------------------------------------------


def schematic() -> Diagram:
    """What self-supervised learning does, in two steps."""
    d = Diagram(
        alt="Pre-training: two views of an image without a label go through the same backbone f and a head; the loss asks "
        "that the outputs agree. The head is thrown away and f is kept. Use: the frozen f turns new images into features, "
        "from which a simple classifier predicts with few labels.",
        caption="Above: a task computed from the images alone trains a network. Here it is to give two views of one image "
        "similar outputs; other chapters rotate the image or mask a part of it. Below: the head and the task are thrown "
        "away, and the network turns new images into features from which a simple classifier learns with few labels.",
        legend=False,
    )
    image = d.image(0, 0.42, "image,\nno label")
    views = [d.view(0.8, row, label) for row, label in ((0, ""), (0.84, "two views"))]
    backbones = [d.network(1.6, 0, "", "f"), d.network(1.6, 0.84, "backbone", "f", kept=True)]
    heads = [d.network(2.45, 0, "", "g"), d.network(2.45, 0.84, "head", "g", thrown=True)]
    loss = d.loss(3.25, 0.42, "agree?")
    for view, backbone, head in zip(views, backbones, heads):
        d.arrow(image, view)
        d.arrow(view, backbone)
        d.arrow(backbone, head)
        d.arrow(head, loss)
    new = d.image(0, 2.05, "new image")
    frozen = d.frozen(1.6, 2.05, "frozen", "f")
    features = d.vector(2.35, 2.05, "features")
    label = d.text(3.4, 2.05, "label")
    d.arrow(new, frozen)
    d.arrow(backbones[1], frozen, out="bottom", into="top")
    d.arrow(frozen, features)
    d.arrow(features, label, "simple\nclassifier")
    return d


class FrontSchematic(Directive):
    """The schematic as SVG in the colors of the page."""

    def run(self) -> list[nodes.Node]:
        shown = f'<div class="front-schematic">{schematic()._repr_html_()}</div>'
        return [nodes.raw("", shown, format="html")]


# -- cards -------------------------------------------------------------------------------------------------------------


def launch(page: str, root: str) -> list[tuple[str, str]]:
    """Buttons that open a page's portable notebook: `(what it says, address)`; `root` leads to the site's top."""
    notebook = f"{root}notebooks/{portable.name_of(page)}.ipynb"
    return [("Colab", portable.colab(page)), ("Kaggle", portable.kaggle(page)), ("Download", notebook)]


def _rebased(text: str, page: str) -> str:
    """Markdown of a chapter, with its references to pages as the front page would write them."""

    def target(found: re.Match) -> str:
        return found[0].replace(found[1], "/" + _absolute(page, found[1]))

    return LINK.sub(target, text)


class ChapterCards(Directive):
    """A card for each chapter, under the name of its part."""

    def run(self) -> list[nodes.Node]:
        env = self.state.document.settings.env
        grid = nodes.container(classes=["chapter-cards"])
        part = ""
        for one in chapters(Path(env.srcdir)):
            if one.part != part:
                part = one.part
                grid += nodes.paragraph("", part, classes=["chapter-part"])
            env.note_dependency(str(Path(env.srcdir) / f"{one.page}.ipynb"))
            card = nodes.container(classes=["chapter-card"])
            buttons = launch(one.page, "../" * env.docname.count("/"))
            links = "".join(
                f'<a href="{url}" aria-label="{name}: {html.escape(one.title)}">{name}</a>' for name, url in buttons
            )
            for classes, text in {
                "chapter-number": str(one.number),
                "chapter-title": f"{{doc}}`{one.title} </{one.page}>`",
                "chapter-question": one.question,
                "chapter-times": f"{one.read} min to read, {one.run} min to run",
                "chapter-before": f"**Before this:** {_rebased(one.before, one.page)}",
            }.items():
                shown = nodes.container(classes=[classes])
                self.state.nested_parse([text], self.content_offset, shown)
                card += shown
            card += nodes.raw("", f'<p class="chapter-launch">{links}</p>', format="html")
            grid += card
        return [grid]


# -- map ---------------------------------------------------------------------------------------------------------------


def _arrows(all_: list[Chapter]) -> dict[str, list[str]]:
    """What each chapter needs or is helped by, without what it needs through another of these."""
    by_page = {one.page: one for one in all_}

    def before(page: str) -> set[str]:
        direct = [p for p in by_page[page].needs if p in by_page]
        return set(direct).union(*map(before, direct))

    parents = {one.page: [p for p in one.needs + one.helped_by if p in by_page] for one in all_}
    return {page: [p for p in found if not any(p in before(q) for q in found)] for page, found in parents.items()}


def places(all_: list[Chapter]) -> dict[str, tuple[int, int]]:
    """`(depth, lane)` of each chapter: one deeper than what it needs or is helped by, in the first lane that is free.

    An arrow runs in the lane of its end, so that lane is kept free from the arrow's start on.
    """
    where: dict[str, tuple[int, int]] = {}
    taken: set[tuple[int, int]] = set()
    arrows = _arrows(all_)
    for one in all_:
        parents = arrows[one.page]
        depths = [where[p][0] for p in parents] or [-1]
        depth, since = max(depths) + 1, min(depths) + 1
        lane = next((where[p][1] for p in parents if where[p][0] == depth - 1), 0)
        while any((d, lane) in taken for d in range(since, depth + 1)):
            lane += 1
        taken.update((d, lane) for d in range(since, depth + 1))
        where[one.page] = (depth, lane)
    return where


def drawing(all_: list[Chapter], address: Callable[[str], str], standing: bool) -> str:
    """The map as SVG; lying, from left to right, or standing, one chapter below the other and indented by its depth."""
    where = places(all_)
    width, height, along, across = (262, 44, 18, 10) if standing else (178, 74, 40, 22)

    def corner(page: str) -> tuple[float, float]:
        depth, lane = where[page]
        if standing:
            return 2 + depth * along, 2 + [one.page for one in all_].index(page) * (height + across)
        return 2 + depth * (width + along), 2 + lane * (height + across)

    def line(start: str, end: str, helps: bool) -> str:
        (ax, ay), (bx, by) = corner(start), corner(end)
        x1, y1 = bx - 5, by + height / 2
        if standing:
            curve = f"M{ax + 9:g} {ay + height:g}V{y1:g}H{x1:g}"
        else:
            x0, y0 = ax + width, ay + height / 2
            curve = (
                f"M{x0:g} {y0:g}C{x0 + along / 2:g} {y0:g} {x0 + along / 2:g} {y1:g} {x0 + along - 5:g} {y1:g}H{x1:g}"
            )
        tip = f"M{x1 - 3:g} {y1 - 4:g}l7 4l-7 4z"
        return f'<path class="edge{" helps" if helps else ""}" d="{curve}"/><path class="tip" d="{tip}"/>'

    def box(one: Chapter) -> str:
        x, y = corner(one.page)
        short = one.title.partition(": ")[0]  # the question behind the name stands on the card
        rows = textwrap.wrap(short, 28 if standing else 17)[:3]
        top = y + height / 2 - 9 * (len(rows) - 1) + 5
        text = "".join(
            f'<tspan x="{x + 36:g}" y="{top + 18 * i:g}">{html.escape(r)}</tspan>' for i, r in enumerate(rows)
        )
        return (
            f'<a href="{address(one.page)}" aria-label="Chapter {one.number}: {html.escape(one.title)}">'
            f'<rect x="{x:g}" y="{y:g}" width="{width}" height="{height}" rx="6"/>'
            f'<text class="number" x="{x + 18:g}" y="{y + height / 2 + 6:g}">{one.number}</text><text>{text}</text></a>'
        )

    size = [max(corner(o.page)[i] for o in all_) + (width, height)[i] + 2 for i in (0, 1)]
    arrows = _arrows(all_)
    edges = [line(p, o.page, p not in o.needs) for o in all_ for p in arrows[o.page]]
    return (
        f'<svg class="chapter-map {"standing" if standing else "lying"}" viewBox="0 0 {size[0]:g} {size[1]:g}" '
        f'width="{size[0]:g}" role="group" aria-label="Which chapter needs which">'
        f"{''.join(edges)}{''.join(map(box, all_))}</svg>"
    )


class chapter_map(nodes.General, nodes.Element):
    """Stands for the map until the addresses of the pages are known."""


class ChapterMap(Directive):
    """The map of the chapters."""

    def run(self) -> list[nodes.Node]:
        return [chapter_map()]


def _draw(app: Any, doctree: nodes.document, page: str) -> None:
    for node in list(doctree.findall(chapter_map)):
        if app.builder.format != "html":
            node.parent.remove(node)
            continue
        all_ = chapters(Path(app.srcdir))
        svg = "".join(
            drawing(all_, lambda p: app.builder.get_relative_uri(page, p), standing) for standing in (False, True)
        )
        node.replace_self(nodes.raw("", f'<div class="chapter-maps">{svg}</div>', format="html"))


def _outdated(app: Any, env: Any, *_: Any) -> Iterator[str]:
    yield app.config.root_doc


def setup(app: Any) -> dict[str, Any]:
    app.add_node(chapter_map)
    app.add_directive("front-schematic", FrontSchematic)
    app.add_directive("chapter-cards", ChapterCards)
    app.add_directive("chapter-map", ChapterMap)
    app.connect("doctree-resolved", _draw)
    app.connect("env-get-outdated", _outdated)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
