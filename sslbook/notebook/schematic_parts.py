"""Parts of schematics: nodes, strokes, words and the legend, as SVG in the page's own colors."""

import html
from dataclasses import dataclass, field

from sslbook.notebook import style

COLUMN, ROW = 112.0, 108.0  # distance of two nodes, in the page's pixels
SIZE, LEAST = 13.5, 10.5  # of the letters, and how small they may shrink
MARGIN = 10.0
LETTER = 0.6  # width of a letter on average, in its size; generous
KEPT, THROWN, EMA, STOP, LOSS = style.GREEN, style.ORANGE, style.VIOLET, style.ORANGE, style.BLUE
Box = tuple[float, float, float, float]  # left, top, right, bottom
SIDES = ("right", "left", "top", "bottom")


@dataclass(eq=False)
class Node:
    """A thing in a diagram, with its center and its size in the page's pixels.

    Args:
        kind: a word of the vocabulary, as the legend names it.
        x: of the center.
        y: of the center.
        width: without its label.
        height: without its label.
        label: below it; lines are parted by a line break.
        kept: whether it is what training is for.
        thrown: whether it is thrown away after training.
    """

    kind: str
    x: float
    y: float
    width: float
    height: float
    label: str = ""
    kept: bool = False
    thrown: bool = False
    parts: list[str] = field(default_factory=list, repr=False)

    def port(self, side: str, gap: float = 5.0) -> tuple[float, float]:
        """Where an arrow touches this side; below, it leaves room for the label."""
        room = gap + (text_height(self) if side == "bottom" else 0.0)
        return {
            "right": (self.x + self.width / 2 + gap, self.y),
            "left": (self.x - self.width / 2 - gap, self.y),
            "top": (self.x, self.y - self.height / 2 - gap),
            "bottom": (self.x, self.y + self.height / 2 + room),
        }[side]


INK = 'stroke="currentColor" stroke-width="1.4"'


def stroke(color: str, width: float) -> str:
    """Attributes of a line of this color, mixed with the page's until it stands out, and width."""
    if color == "currentColor":
        return f'stroke="currentColor" stroke-width="{width}"'
    return f'stroke="{color}" style="stroke:{style.mixed(color)}" stroke-width="{width}"'


def word(
    text: str,
    x: float,
    y: float,
    *,
    size: float = SIZE,
    color: str = "",
    bold: bool = False,
    italic: bool = False,
    anchor: str = "middle",
) -> str:
    """One line of text, its baseline's middle (or start, or end) at `x`, `y`."""
    more = f' fill="{color}" style="fill:{style.mixed(color)}"' if color else ""
    more += ' font-weight="600"' if bold else ""
    more += ' font-style="italic" font-family="Georgia,\'Times New Roman\',serif"' if italic else ""
    more += f' font-size="{size}"' if size != SIZE else ""
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"{more}>{html.escape(text)}</text>'


def text_box(text: str, x: float, y: float) -> Box:
    """The room that a centered line of text takes."""
    half = LETTER * SIZE * len(text) / 2
    return x - half, y - SIZE, x + half, y + 4


def text_height(node: Node) -> float:
    """The height of a node's label and mark."""
    lines = len(node.label.split("\n")) if node.label else 0
    marked = node.kept or node.thrown
    return 16.0 * (lines + marked) + (6.0 if lines or marked else 0.0) + (4.0 if marked else 0.0)


def scene(node: Node, peak: tuple[float, float], sun: tuple[float, float], size: float) -> list[str]:
    """A frame with a hill and a sun; the peak and the sun's center and size are fractions of the side."""
    x, y, w, h = node.x - node.width / 2, node.y - node.height / 2, node.width, node.height
    hill = f"M{x + 1:.1f} {y + h - 1:.1f}L{x + w * peak[0]:.1f} {y + h * peak[1]:.1f}L{x + w - 1:.1f} {y + h - 1:.1f}Z"
    place = f'cx="{x + w * sun[0]:.1f}" cy="{y + h * sun[1]:.1f}" r="{w * size:.1f}"'
    frame = f'x="{x:.1f}" y="{y:.1f}" width="{w}" height="{h}" rx="3"'
    return [
        f'<rect {frame} fill="currentColor" fill-opacity=".07" {INK}/>',
        f'<path d="{hill}" fill="currentColor" fill-opacity=".4" stroke-linejoin="round"/>',
        f'<circle {place} fill="currentColor" fill-opacity=".55"/>',
    ]


def step(side: str, length: float) -> tuple[float, float]:
    """A step of this length outwards from a side."""
    return {"right": (length, 0.0), "left": (-length, 0.0), "top": (0.0, -length), "bottom": (0.0, length)}[side]


def middle(points: tuple[tuple[float, float], ...]) -> tuple[tuple[float, float], tuple[float, float]]:
    """The middle of a cubic curve, and the unit vector along it there."""
    (x0, y0), (x1, y1), (x2, y2), (x3, y3) = points
    middle = (x0 + 3 * x1 + 3 * x2 + x3) / 8, (y0 + 3 * y1 + 3 * y2 + y3) / 8
    along = x3 + x2 - x1 - x0, y3 + y2 - y1 - y0
    length = max(1e-9, (along[0] ** 2 + along[1] ** 2) ** 0.5)
    return middle, (along[0] / length, along[1] / length)


def legend(keys: list[str], left: float, right: float, top: float) -> tuple[list[str], float, float]:
    """Marks and their names in a line that wraps; also the lower and the right end."""
    parts, x, y, end = [], left, top, right
    for key in keys:
        wide = 34 + LETTER * SIZE * len(key)
        if x > left and x + wide > right:
            x, y = left, y + 22
        middle = y + 6
        if key == "stop-gradient":
            parts.append(f'<path d="M{x:.1f} {middle:.1f}h26" fill="none" {stroke("currentColor", 1.6)}/>')
            for shift in (10, 16):
                parts.append(f'<path d="M{x + shift:.1f} {middle - 7:.1f}v14" fill="none" {stroke(STOP, 2.6)}/>')
        elif key == "EMA of the weights":
            dots = f'stroke-dasharray="1 5" stroke-linecap="round" {stroke(EMA, 2.4)}'
            parts.append(f'<path d="M{x:.1f} {middle:.1f}h26" fill="none" {dots}/>')
        else:
            shape = f'd="M{x + 3:.1f} {middle - 8:.1f}l20 3v10l-20 3z"'
            ema = f'{stroke(EMA, 2)} stroke-dasharray="2 3"'
            parts.append(f'<path {shape} fill="none" {ema if key == "EMA network" else INK}/>')
            if key == "frozen network":
                lines = "".join(f"M{x + 3 + i:.1f} {middle - 7:.1f}v14" for i in (5, 10, 15))
                parts.append(f'<path d="{lines}" {INK} stroke-opacity=".35"/>')
        parts.append(word(key, x + 33, middle + 4.5, anchor="start"))
        x += wide + 22
        end = max(end, x - 22 + MARGIN)
    return parts, y + 22, end
