"""Figures with a number, a caption and alt text, that read in light and dark mode, at phone width, without color.

A figure is an image of twice the page's resolution with a transparent background, under a layer of text. Plain text is
no part of the image: the page sets it in its own color, so that its contrast is the page's, on white and on black
alike (no single gray reaches 4.5 against both). Text in one of the colors below is mixed with the page's color until it
does. The colors are Okabe and Ito's, moved to where each has a contrast of at least 3 against both pages.

>>> fig, ax = figure(alt="The loss falls from 5.5 to 3.1 in 300 steps.", caption="The loss falls.", name="simclr.loss")
>>> _ = ax.plot(loss)
>>> fig  # the last expression of a cell: shown with its number, its caption and its alt text
"""

import base64
import html
import io
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib as mpl
import matplotlib.figure
import numpy as np
from jaxtyping import Float
from matplotlib.backends.backend_agg import FigureCanvasAgg, RendererAgg
from matplotlib.colors import to_hex
from matplotlib.text import Text

from sslbook.notebook import numbering

GRAY = "#7c7c7c"  # lines: contrast 4.2 against white and 4.5 against the dark page
BLUE, ORANGE, GREEN, PINK, AMBER, VIOLET = COLORS = ("#1a7fc4", "#d55e00", "#009e73", "#c8709f", "#a67c00", "#8469c9")
TEXT = "#575757"  # in a saved file, on white; in a page, text of this color or of GRAY takes the page's
MIXED = 0.72  # how much of its color a colored text keeps; the rest is the page's text color
MAP = "viridis"  # for ordered values: monotone in lightness, also in gray
FONT = "system-ui,-apple-system,'Segoe UI',Roboto,'Helvetica Neue',Arial,sans-serif"

RC: dict[str, Any] = {
    "axes.prop_cycle": mpl.cycler(color=COLORS),  # pyrefly: ignore
    "axes.edgecolor": GRAY,
    "axes.labelcolor": TEXT,
    "axes.titlecolor": TEXT,
    "axes.facecolor": "none",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 11,
    "axes.labelsize": 11,
    "figure.facecolor": "none",
    "font.size": 11,
    "grid.color": GRAY,
    "grid.alpha": 0.3,
    "hatch.color": GRAY,
    "image.cmap": MAP,
    "image.interpolation": "nearest",
    "legend.frameon": False,
    "legend.labelcolor": TEXT,
    "lines.linewidth": 2.0,
    "text.color": TEXT,
    "xtick.color": GRAY,
    "xtick.labelcolor": TEXT,
    "ytick.color": GRAY,
    "ytick.labelcolor": TEXT,
}

DPI = 192  # pixels per inch of the stored image; shown at 96, so two pixels to one of the page's


class Figure(matplotlib.figure.Figure):
    """A matplotlib figure that shows itself as an image with alt text, a number and a caption.

    Made without pyplot: nothing is left open, nothing is shown twice.

    Args:
        alt: what the image shows, for a reader who does not see it: the finding, not the axes.
        caption: the finding in one or two sentences; None or empty for a frame of a slider or a file.
        name: the figure's name in the chapter's list, such as "simclr.circle"; without one it has no number.
        least: the width in the page's pixels below which the figure scrolls and shrinks no more.
    """

    def __init__(
        self,
        *args: Any,
        alt: str,
        caption: str | None = None,
        name: str | None = None,
        least: float = 0.0,
        **kwargs: Any,
    ):
        super().__init__(*args, **kwargs)
        FigureCanvasAgg(self)
        self.alt, self.caption, self.name, self.least = alt, caption, name, least
        self.label = numbering.number(name) if name else ""

    def html(self) -> str:
        """The figure as it stands in a page: image and text, and below them number and caption."""
        return with_caption(layers(self, self.alt, least=self.least), self.caption, self.name, self.label)

    def _ipython_display_(self) -> None:  # stops IPython from adding a second image, without alt text
        from IPython.display import display

        display({"text/html": self.html(), "text/plain": plain(self.alt, self.caption, self.label)}, raw=True)


def smooth(values: Sequence[float], over: int = 10) -> Float[np.ndarray, "steps"]:
    """Means over so many neighboring values, fewer where there are not as many."""
    over = min(over, len(values))
    return np.convolve(values, np.ones(over) / over, mode="valid")


def figure(
    alt: str,
    rows: int = 1,
    columns: int = 1,
    width: float = 5.2,
    height: float = 3.0,
    *,
    caption: str | None,
    name: str | None = None,
    least: float = 0.0,
    **subplots: Any,
):
    """`(figure, axes)` in the book's style; `axes` is one axes or an array of them, as from `plt.subplots`.

    The default width, shrunk to a phone's 340 pixels, leaves letters of ten.

    Args:
        alt: what the image shows, for a reader who does not see it: the finding, not the axes.
        rows: of axes.
        columns: of axes.
        width: in inches, of 96 of the page's pixels each.
        height: in inches.
        caption: the finding in one or two sentences, with `code` in backticks; None where something else shows it, such
            as a frame of a slider.
        name: the figure's name in `FIGURES` of the chapter's `figures.py`, which gives it its number.
        least: the width in the page's pixels below which the figure scrolls and shrinks no more.
        subplots: passed on to `matplotlib.figure.Figure.subplots`.

    Raises:
        UserError: no chapter lists this name.
    """
    with mpl.rc_context(RC):
        more = {"alt": alt, "caption": caption, "name": name, "least": least}
        fig = Figure(figsize=(width, height), dpi=DPI, layout="constrained", **more)
        axes = fig.subplots(rows, columns, **subplots)
        for ax in fig.axes:
            ax.locator_params(nbins=6)  # few enough ticks that their labels do not touch on a small figure
        return fig, axes


# -- HTML --------------------------------------------------------------------------------------------------------------


def prose(text: str) -> str:
    """`text` escaped for a page, with what stands in backticks as code."""
    return re.sub(r"`([^`]+)`", r"<code>\1</code>", html.escape(text))


def with_caption(content: str, caption: str | None, name: str | None = None, number: str = "") -> str:
    """`content` (HTML) as a numbered figure over its caption; without a caption, `content` itself."""
    if not caption:
        return content
    label = f'<span class="caption-number"><strong>Figure {number}.</strong> </span>' if number else ""
    mark = f' id="{numbering.anchor(name)}"' if name else ""
    style = "text-align:left;font-size:.95em;line-height:1.45;max-width:44em;margin:.5em 0 0"
    return (
        f'<figure{mark} class="sslbook-figure" style="margin:1em 0">{content}'
        f'<figcaption style="{style}">{label}<span class="caption-text">{prose(caption)}</span></figcaption></figure>'
    )


def plain(alt: str, caption: str | None, number: str) -> str:
    """A figure in words, for where there is only text."""
    return "\n".join(filter(None, [f"Figure {number}. {caption}" if number else caption, alt]))


def layers(fig: matplotlib.figure.Figure, alt: str, dpi: float = DPI, least: float = 0.0) -> str:
    """The figure as HTML: its image, and over it the text in the page's color. `least` as in `figure`."""
    data, texts = encode(fig, dpi)
    width, height = fig.get_figwidth() * 96, fig.get_figheight() * 96
    inner = f"position:relative;width:{round(width)}px;" + (
        f"min-width:{round(min(least, width))}px" if least else "max-width:100%"
    )
    shown = (
        f'<img class="dark-light" src="{data}" alt="{html.escape(alt)}" '
        'style="display:block;width:100%;height:auto;margin:0;background:transparent;border-radius:0">'
    )
    over = (
        f'<svg viewBox="0 0 {width:.0f} {height:.0f}" aria-hidden="true" fill="currentColor" font-family="{FONT}" '
        'style="position:absolute;left:0;top:0;width:100%;height:100%;overflow:visible;pointer-events:none">'
        f"{texts}</svg>"
    )
    box = f'<div style="{inner}">{shown}{over if texts else ""}</div>'
    return f'<div style="overflow-x:auto;max-width:100%">{box}</div>' if least else box


@dataclass
class _Word:
    """A piece of text and where it begins: pixels from the upper left corner, and degrees against the clock."""

    text: str
    at: tuple[float, float]
    width: float
    size: float
    angle: float
    align: str
    color: str
    alpha: float
    weight: str
    path: str = ""  # of a formula, in units of the page's pixels

    def svg(self) -> str:
        shade = "" if self.color in (GRAY, TEXT) else f' style="fill:{mixed(self.color)}" fill="{self.color}"'
        faint = f' opacity="{self.alpha:.2g}"' if self.alpha < 1 else ""
        x, y = self.at
        turned = f" rotate({-self.angle:.4g})" if self.angle else ""
        if self.path:
            return f'<path transform="translate({x:.1f} {y:.1f}){turned}" d="{self.path}"{shade}{faint}/>'
        anchor = {"left": 0.0, "right": 1.0}.get(self.align, 0.5)
        along = anchor * self.width  # the page's font is as a rule narrower: keep the side that was aligned
        x += along * math.cos(math.radians(self.angle))
        y -= along * math.sin(math.radians(self.angle))
        place = f'transform="translate({x:.1f} {y:.1f}){turned}"' if self.angle else f'x="{x:.1f}" y="{y:.1f}"'
        side = {0.0: "", 1.0: ' text-anchor="end"', 0.5: ' text-anchor="middle"'}[anchor]
        bold = ' font-weight="bold"' if self.weight == "bold" else ""
        kept = f"{self.size:.3g}"
        return f'<text {place} font-size="{kept}"{side}{bold}{shade}{faint}>{html.escape(self.text)}</text>'


def mixed(color: str) -> str:
    """CSS for a text of this color: on either page it stands out by at least 4.5, and keeps its hue."""
    return f"color-mix(in srgb,{color} {MIXED:.0%},currentColor)"


class _Renderer(RendererAgg):
    """Renders a figure without the text that a page sets itself, and remembers that text."""

    def __init__(self, width: float, height: float, dpi: float):
        super().__init__(width, height, dpi)
        self.words: list[_Word] = []

    def draw_text(self, gc, x, y, s, prop, angle, ismath=False, mtext=None):
        color = to_hex(gc.get_rgb())
        if color not in (GRAY, TEXT, *COLORS):  # on a background of its own, such as a label's box
            return super().draw_text(gc, x, y, s, prop, angle, ismath, mtext)
        scale = 96 / self.dpi
        width, _, _ = self.get_text_width_height_descent(s, prop, ismath)
        size = prop.get_size_in_points() * 96 / 72
        path = _formula(s, prop, size) if ismath else ""
        self.words.append(
            _Word(
                text=s,
                at=(x * scale, y * scale),
                width=width * scale,
                size=size,
                angle=angle,
                align=mtext.get_ha() if mtext is not None and not angle else "center",
                color=color,
                alpha=gc.get_alpha() if gc.get_alpha() is not None else 1.0,
                weight="bold" if prop.get_weight() in ("bold", "heavy", "semibold", 700, 800) else "normal",
                path=path,
            )
        )
        return None


def _formula(text: str, prop: Any, size: float) -> str:
    """The outline of a formula (`$10^{-2}$`) in the page's pixels, baseline at the origin, as SVG path data."""
    from matplotlib.path import Path
    from matplotlib.textpath import text_to_path

    vertices, codes = text_to_path.get_text_path(prop, text, ismath=True)
    path, parts = Path(vertices, codes), []
    scale = size / text_to_path.FONT_SCALE
    for points, code in path.iter_segments(simplify=False, curves=True):
        letter = {Path.MOVETO: "M", Path.LINETO: "L", Path.CURVE3: "Q", Path.CURVE4: "C", Path.CLOSEPOLY: "Z"}[code]
        xy = [] if letter == "Z" else [f"{(v if i % 2 == 0 else -v) * scale:.1f}" for i, v in enumerate(points)]
        parts.append(letter + " ".join(xy))
    return "".join(parts)


def encode(fig: matplotlib.figure.Figure, dpi: float = DPI) -> tuple[str, str]:
    """The figure as `(image, text)`: a `data:` URL without the text that a page sets, and that text as SVG elements.

    The image is WebP, lossless or not, whichever is smaller. Text without a color of its own is the page's; write
    "#000000" for one that is black on an image.
    """
    from PIL import Image

    fig.set_dpi(dpi)
    canvas = fig.canvas if isinstance(fig.canvas, FigureCanvasAgg) else FigureCanvasAgg(fig)
    width, height = canvas.get_width_height(physical=True)
    renderer = _Renderer(width, height, dpi)
    for text in fig.findobj(Text):
        if str(text.get_color()) == "black" and text.get_bbox_patch() is None:  # matplotlib's default: nobody chose it
            text.set_color(TEXT)
    with mpl.rc_context(RC):
        fig.draw(renderer)
    image = Image.frombytes("RGBA", (int(width), int(height)), bytes(renderer.buffer_rgba()))
    coded = []
    for options in ({"lossless": True}, {"quality": 75}):
        file = io.BytesIO()
        image.save(file, "WEBP", **options)
        coded.append(file.getvalue())
    url = "data:image/webp;base64," + base64.b64encode(min(coded, key=len)).decode()
    return url, "".join(word.svg() for word in renderer.words)
