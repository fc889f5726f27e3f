"""Schematics of methods in one vocabulary of symbols: what becomes of an image on its way to the loss.

A diagram is a grid of nodes (columns to the right, rows downwards, fractions allowed) and arrows between them. It
shows itself as SVG in the page's own text color, so it reads in light and in dark; on a phone it scrolls rather than
shrink its letters below ten pixels.

>>> d = Diagram(alt="An image becomes two views ...", caption="Only the backbone is kept.", name="simclr.schematic")
>>> x = d.image(0, 0.5, "image")
>>> v = d.view(1, 0, "view")
>>> f = d.network(2, 0, "backbone", "f", kept=True)
>>> d.arrow(x, v, "augment")
>>> d.arrow(v, f)
>>> d
"""

import html

from sslbook.errors import UserError
from sslbook.notebook import numbering, style
from sslbook.notebook.schematic_parts import (
    COLUMN,
    EMA,
    INK,
    KEPT,
    LEAST,
    LETTER,
    LOSS,
    MARGIN,
    ROW,
    SIDES,
    SIZE,
    STOP,
    THROWN,
    Box,
    Node,
    legend,
    middle,
    scene,
    step,
    stroke,
    text_box,
    word,
)


class Diagram:
    """A schematic; its methods add nodes and arrows.

    Args:
        alt: what the diagram says, for a reader who does not see it.
        caption: one or two sentences; None for none.
        name: its name in `FIGURES` of the chapter's `figures.py`, such as "simclr.schematic".
        legend: whether a line below explains the marks that are used.
        title: two or three words above it, for diagrams that stand beside others.

    Raises:
        UserError: no alt text, or no chapter lists the name.
    """

    def __init__(self, *, alt: str, caption: str | None, name: str | None = None, legend: bool = True, title: str = ""):
        if not alt.strip():
            raise UserError("a schematic needs alt text: pass alt=...")
        self.alt, self.caption, self.name, self.legend, self.title = alt, caption, name, legend, title
        self.label = numbering.number(name) if name else ""
        self.nodes: list[Node] = []
        self.lines: list[str] = []
        self.marks: dict[str, None] = {}  # the lines that need an explanation, in order of use
        self.boxes: list[Box] = []  # of all text: left, top, right, bottom

    # -- nodes ---------------------------------------------------------------------------------------------------------

    def image(self, column: float, row: float, label: str = "image", **marks: bool) -> Node:
        """An image: a frame with a hill and a sun."""
        node = self._node("image", column, row, 52, 52, label, marks)
        node.parts += scene(node, (0.42, 0.45), (0.75, 0.25), 0.09)
        return node

    def view(self, column: float, row: float, label: str = "view", **marks: bool) -> Node:
        """A view: a smaller part of the image, in which its things are larger."""
        node = self._node("view", column, row, 42, 42, label, marks)
        node.parts += scene(node, (0.62, 0.3), (0.24, 0.3), 0.13)
        return node

    def patches(
        self, column: float, row: float, label: str = "patches", visible: str = "1010 0001 0100 0010", **marks: bool
    ) -> Node:
        """An image as a grid of patches: filled where `visible` has a 1 and crossed out where it is masked.

        Raises:
            UserError: rows of different lengths, or other characters than 0 and 1.
        """
        rows = visible.split()
        if not rows or len({len(r) for r in rows}) != 1 or set("".join(rows)) - {"0", "1"}:
            raise UserError(f"visible must be rows of 0 and 1 of one length, such as '10 01', not {visible!r}")
        side = 52 / max(len(rows), len(rows[0]))
        node = self._node("patches", column, row, side * len(rows[0]), side * len(rows), label, marks)
        left, top = node.x - node.width / 2, node.y - node.height / 2
        for i, line in enumerate(rows):
            for j, seen in enumerate(line):
                x, y = left + j * side, top + i * side
                fill = 'fill="currentColor" fill-opacity=".55"' if seen == "1" else 'fill="none"'
                node.parts.append(
                    f'<rect x="{x:.1f}" y="{y:.1f}" width="{side:.1f}" height="{side:.1f}" {fill} {INK}/>'
                )
                if seen == "0":
                    d = f"M{x + 3:.1f} {y + side - 3:.1f}L{x + side - 3:.1f} {y + 3:.1f}"
                    node.parts.append(f'<path d="{d}" {INK} stroke-opacity=".5"/>')
        return node

    def network(
        self, column: float, row: float, label: str = "", symbol: str = "", *, widens: bool = False, **marks: bool
    ) -> Node:
        """A network that is trained: narrow where its output is small, or `widens` for a decoder; `symbol` stands in it."""
        return self._trapezoid("network", column, row, label, symbol, widens, marks)

    def frozen(
        self, column: float, row: float, label: str = "", symbol: str = "", *, widens: bool = False, **marks: bool
    ) -> Node:
        """A network whose weights never change: hatched."""
        return self._trapezoid("frozen network", column, row, label, symbol, widens, marks)

    def ema_network(
        self, column: float, row: float, label: str = "", symbol: str = "", *, widens: bool = False, **marks: bool
    ) -> Node:
        """A network whose weights are an exponential moving average of another's: a dotted outline."""
        return self._trapezoid("EMA network", column, row, label, symbol, widens, marks)

    def vector(self, column: float, row: float, label: str = "", **marks: bool) -> Node:
        """A vector: a column of cells."""
        node = self._node("vector", column, row, 14, 56, label, marks)
        for i, depth in enumerate((0.6, 0.15, 0.4, 0.05)):
            y = node.y - 28 + 14 * i
            node.parts.append(
                f'<rect x="{node.x - 7:.1f}" y="{y:.1f}" width="14" height="14" fill="currentColor" '
                f'fill-opacity="{depth}" {INK}/>'
            )
        return node

    def loss(self, column: float, row: float, label: str = "loss", **marks: bool) -> Node:
        """The loss: a rounded box with its name inside."""
        lines = label.split("\n")
        width = max(44.0, LETTER * SIZE * max(map(len, lines)) + 16)
        node = self._node("loss", column, row, width, 18 + 17 * len(lines), "", marks)
        node.parts.append(
            f'<rect x="{node.x - width / 2:.1f}" y="{node.y - node.height / 2:.1f}" width="{width:.1f}" '
            f'height="{node.height:.1f}" rx="12" fill="none" {stroke(LOSS, 2)}/>'
        )
        node.parts += self._words(lines, node.x, node.y - 8.5 * len(lines) + 13)
        return node

    def text(self, column: float, row: float, label: str) -> Node:
        """Words at a place of their own."""
        lines = label.split("\n")
        wide = LETTER * SIZE * max(map(len, lines))
        node = self._node("text", column, row, wide, 16.0 * len(lines), "", {})
        node.parts += self._words(lines, node.x, node.y - 8.0 * len(lines) + 12.5)
        return node

    # -- arrows --------------------------------------------------------------------------------------------------------

    def arrow(
        self, start: Node, end: Node, label: str = "", *, stop: bool = False, out: str = "", into: str = ""
    ) -> None:
        """What `start` gives becomes what `end` takes. With `stop`, no gradient flows back: two bars across the arrow.

        Args:
            start: where it begins.
            end: where it ends.
            label: beside its middle.
            stop: whether the gradient stops here.
            out: the side on which it leaves: right, left, top or bottom; without it, the nearer.
            into: the side on which it arrives.
        """
        if stop:
            self.marks["stop-gradient"] = None
        self._arrow(start, end, label, out, into, "currentColor", stop=stop)

    def ema(self, start: Node, end: Node, label: str = "EMA", *, out: str = "", into: str = "") -> None:
        """The weights of `end` follow those of `start` as an exponential moving average: a dotted arrow."""
        self.marks["EMA of the weights"] = None
        self._arrow(start, end, label, out, into, EMA, dash="1 5", thick=2.4)

    # -- output --------------------------------------------------------------------------------------------------------

    def svg(self) -> str:
        """The diagram as an SVG element; UserError if it is empty."""
        if not self.nodes:
            raise UserError("the schematic is empty: add image(...), network(...), loss(...)")
        body = [part for node in self.nodes for part in node.parts] + self.lines
        boxes = self.boxes + [
            (n.x - n.width / 2, n.y - n.height / 2, n.x + n.width / 2, n.y + n.height / 2) for n in self.nodes
        ]
        for node in self.nodes:
            body += self._caption_of(node, boxes)
        left, top = min(b[0] for b in boxes) - MARGIN, min(b[1] for b in boxes) - MARGIN
        right, bottom = max(b[2] for b in boxes) + MARGIN, max(b[3] for b in boxes) + MARGIN
        if self.title:
            top -= 22
            body.append(word(self.title, (left + right) / 2, top + 16, bold=True))
        if self.legend and (keys := self._keys()):
            more, bottom, right = legend(keys, left + MARGIN, right, bottom + 14)
            body += more
        width, height = right - left, bottom - top
        shown = f"width:{width:.0f}px;min-width:{width * LEAST / SIZE:.0f}px;max-width:100%"
        return (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="{left:.1f} {top:.1f} {width:.1f} {height:.1f}" role="img" '
            f'aria-label="{html.escape(self.alt)}" font-family="{style.FONT}" font-size="{SIZE}" fill="currentColor" '
            f'style="display:block;height:auto;{shown}"><title>{html.escape(self.title or "Schematic")}</title>'
            f"<desc>{html.escape(self.alt)}</desc>{''.join(body)}</svg>"
        )

    def _repr_html_(self) -> str:
        scrolls = f'<div style="overflow-x:auto;max-width:100%">{self.svg()}</div>'
        return style.with_caption(scrolls, self.caption, self.name, self.label)

    def __repr__(self) -> str:
        return style.plain(self.alt, self.caption, self.label)

    # -- parts ---------------------------------------------------------------------------------------------------------

    def _node(
        self, kind: str, column: float, row: float, width: float, height: float, label: str, marks: dict[str, bool]
    ) -> Node:
        if unknown := set(marks) - {"kept", "thrown"}:
            raise UserError(f"{kind} has no option {sorted(unknown)[0]!r}; it has kept, thrown")
        node = Node(kind, column * COLUMN, row * ROW, width, height, label, **marks)
        self.nodes.append(node)
        return node

    def _trapezoid(
        self, kind: str, column: float, row: float, label: str, symbol: str, widens: bool, marks: dict[str, bool]
    ) -> Node:
        node = self._node(kind, column, row, 52, 60, label, marks)
        left, right = node.x - 26, node.x + 26
        tall, low = (18, 30) if widens else (30, 18)
        y = node.y
        d = f"M{left:.1f} {y - tall:.1f}L{right:.1f} {y - low:.1f}V{y + low:.1f}L{left:.1f} {y + tall:.1f}Z"
        outline = {
            "network": f'fill="currentColor" fill-opacity=".09" {INK}',
            "frozen network": f'fill="none" {INK}',
            "EMA network": f'fill="none" {stroke(EMA, 2)} stroke-dasharray="2 3"',
        }[kind]
        node.parts.append(f'<path d="{d}" stroke-linejoin="round" {outline}/>')
        if kind == "frozen network":
            for i in range(1, 6):
                x = left + 52 * i / 6
                half = tall + (low - tall) * i / 6
                node.parts.append(f'<path d="M{x:.1f} {y - half:.1f}V{y + half:.1f}" {INK} stroke-opacity=".35"/>')
        if symbol:
            node.parts.append(word(symbol, node.x, y + 5.5, size=17, italic=True))
        return node

    def _caption_of(self, node: Node, boxes: list[Box]) -> list[str]:
        """Label and mark of a node, below it."""
        lines = node.label.split("\n") if node.label else []
        y = node.y + node.height / 2 + 16 + (6 if node.kept or node.thrown else 0)
        words = self._words(lines, node.x, y, boxes)
        y += 16 * len(lines)
        for on, text, color in ((node.kept, "✓ kept", KEPT), (node.thrown, "✗ thrown away", THROWN)):
            if on:
                words.append(word(text, node.x, y, color=color, size=12.5))
                boxes.append(text_box(text, node.x, y))
                around = f'x="{node.x - node.width / 2 - 5:.1f}" y="{node.y - node.height / 2 - 5:.1f}" '
                around += f'width="{node.width + 10:.1f}" height="{node.height + 10:.1f}"'
                dash = "" if node.kept else ' stroke-dasharray="7 4"'
                words.append(f'<rect {around} rx="5" fill="none" {stroke(color, 2)}{dash}/>')
        return words

    def _words(self, lines: list[str], x: float, y: float, boxes: list[Box] | None = None) -> list[str]:
        for i, line in enumerate(lines):
            (self.boxes if boxes is None else boxes).append(text_box(line, x, y + 16 * i))
        return [word(line, x, y + 16 * i) for i, line in enumerate(lines)]

    def _arrow(
        self,
        start: Node,
        end: Node,
        label: str,
        out: str,
        into: str,
        color: str,
        dash: str = "",
        stop: bool = False,
        thick: float = 1.6,
    ) -> None:
        if wrong := {out, into} - {"", *SIDES}:
            raise UserError(f"an arrow has no side {sorted(wrong)[0]!r}: right, left, top or bottom")
        across = abs(end.x - start.x) > 1
        forward = end.x > start.x if across else end.y > start.y
        sides = ("right", "left") if across else ("bottom", "top")
        out, into = out or sides[not forward], into or sides[forward]
        (x1, y1), (x2, y2) = (
            start.port(out, 9.0 if start.kept or start.thrown else 5.0),
            end.port(into, 9.0 if end.kept or end.thrown else 5.0),
        )
        reach = 0.5 * max(abs(x2 - x1), abs(y2 - y1))
        (ax, ay), (bx, by) = (step(side, reach) for side in (out, into))
        points = (x1, y1), (x1 + ax, y1 + ay), (x2 + bx, y2 + by), (x2, y2)
        straight = (abs(y1 - y2) < 1 and ax * (x2 - x1) > 0) or (abs(x1 - x2) < 1 and ay * (y2 - y1) > 0)
        curve = "L" if straight else f"C{points[1][0]:.1f} {points[1][1]:.1f} {points[2][0]:.1f} {points[2][1]:.1f} "
        ink = stroke(color, thick)
        dashed = f' stroke-dasharray="{dash}" stroke-linecap="round"' if dash else ""
        self.lines.append(f'<path d="M{x1:.1f} {y1:.1f}{curve}{x2:.1f} {y2:.1f}" fill="none" {ink}{dashed}/>')
        dx, dy = step(into, 8.0)
        side = (dy * 0.5, -dx * 0.5)
        tip = f"M{x2 + dx + side[0]:.1f} {y2 + dy + side[1]:.1f}L{x2:.1f} {y2:.1f}"
        tip += f"L{x2 + dx - side[0]:.1f} {y2 + dy - side[1]:.1f}"
        self.lines.append(f'<path d="{tip}" fill="none" stroke-linejoin="round" {ink}/>')
        (mx, my), (tx, ty) = middle(points)
        if stop:
            for offset in (-3.0, 3.0):
                cx, cy = mx + tx * offset, my + ty * offset
                bar = f"M{cx - ty * 9:.1f} {cy + tx * 9:.1f}L{cx + ty * 9:.1f} {cy - tx * 9:.1f}"
                self.lines.append(f'<path d="{bar}" fill="none" {stroke(STOP, 2.6)}/>')
        if label:
            self._label(label, mx, my, tx, ty, 14.0 if stop else 7.0)

    def _label(self, label: str, x: float, y: float, tx: float, ty: float, away: float) -> None:
        """Beside the middle of an arrow: above a level one, right of an upright one, left of one that bends."""
        lines = label.split("\n")
        if abs(tx) > 0.8:
            self.lines += self._words(lines, x, y - away - 16 * (len(lines) - 1))
            return
        upright = abs(tx) < 0.2
        middle = y + 5 if upright else y - 8 if ty < 0 else y + 18
        for i, line in enumerate(lines):
            at = middle + 16 * (i - (len(lines) - 1) / 2)
            start, wide = x + away + 3 if upright else x - away, LETTER * SIZE * len(line)
            self.lines.append(word(line, start, at, anchor="start" if upright else "end"))
            left = start if upright else start - wide
            self.boxes.append((left, at - SIZE, left + wide, at + 4))

    def _keys(self) -> list[str]:
        kinds = {node.kind: None for node in self.nodes if node.kind in ("frozen network", "EMA network")}
        return [*kinds, *self.marks]
