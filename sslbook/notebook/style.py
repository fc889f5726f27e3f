"""Figures that read in light and dark mode, at phone width, by color-blind readers, and that carry their alt text.

The background is transparent and everything that is not data is one mid-gray, chosen so that its contrast is the same
against the site's white and its dark page. The colors are Okabe and Ito's, moved to where each has a
contrast of at least 3 against both pages.

>>> fig, ax = figure(alt="The loss falls from 5.5 to 3.1 in 300 steps.")
>>> _ = ax.plot(loss)
>>> fig  # the last expression of a cell: shown as an image with that alt text
"""

import base64
import html
import io
from typing import Any

import matplotlib as mpl
import matplotlib.figure
from matplotlib.backends.backend_agg import FigureCanvasAgg

GRAY = "#7c7c7c"  # contrast 4.2 against white and against the dark page
BLUE, ORANGE, GREEN, PINK, AMBER, VIOLET = COLORS = ("#1a7fc4", "#d55e00", "#009e73", "#c8709f", "#a67c00", "#8469c9")
MAP = "viridis"  # for ordered values: monotone in lightness, also in gray

RC: dict[str, Any] = {
    "axes.prop_cycle": mpl.cycler(color=COLORS),  # pyrefly: ignore
    "axes.edgecolor": GRAY,
    "axes.labelcolor": GRAY,
    "axes.titlecolor": GRAY,
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
    "legend.labelcolor": GRAY,
    "lines.linewidth": 2.0,
    "text.color": GRAY,
    "xtick.color": GRAY,
    "ytick.color": GRAY,
}

DPI = 144  # pixels per inch of the stored image; shown at 96, so 1.5 pixels to one of the page's


class Figure(matplotlib.figure.Figure):
    """A matplotlib figure that shows itself as an HTML image with alt text.

    Made without pyplot: nothing is left open, nothing is shown twice.

    Args:
        alt: what the image shows, for a reader who does not see it: the finding, not the axes.
    """

    def __init__(self, *args: Any, alt: str, **kwargs: Any):
        super().__init__(*args, **kwargs)
        FigureCanvasAgg(self)
        self.alt = alt

    def html(self) -> str:
        data, width = encode(self), round(self.get_figwidth() * 96)
        return (
            f'<img class="dark-light" src="{data}" alt="{html.escape(self.alt)}" '
            f'style="width:{width}px;max-width:100%;height:auto;background:transparent">'
        )

    def _ipython_display_(self) -> None:  # stops IPython from adding a second image, without alt text
        from IPython.display import display

        display({"text/html": self.html(), "text/plain": self.alt}, raw=True)


def figure(alt: str, rows: int = 1, columns: int = 1, width: float = 5.2, height: float = 3.0, **subplots: Any):
    """`(figure, axes)` in the book's style; `axes` is one axes or an array of them, as from `plt.subplots`.

    The default width, shrunk to a phone's 340 pixels, leaves letters of ten.
    """
    with mpl.rc_context(RC):
        fig = Figure(figsize=(width, height), dpi=DPI, layout="constrained", alt=alt)
        axes = fig.subplots(rows, columns, **subplots)
        for ax in fig.axes:
            ax.locator_params(nbins=6)  # few enough ticks that their labels do not touch on a small figure
        return fig, axes


def encode(fig: matplotlib.figure.Figure, dpi: float = DPI) -> str:
    """The figure as a `data:` URL: WebP, lossless or not, whichever is smaller."""
    from PIL import Image

    fig.set_dpi(dpi)
    canvas = fig.canvas if isinstance(fig.canvas, FigureCanvasAgg) else FigureCanvasAgg(fig)
    with mpl.rc_context(RC):
        canvas.draw()
    width, height = canvas.get_width_height()
    image = Image.frombytes("RGBA", (width, height), bytes(canvas.buffer_rgba()))
    coded = []
    for options in ({"lossless": True}, {"quality": 85}):
        file = io.BytesIO()
        image.save(file, "WEBP", **options)
        coded.append(file.getvalue())
    return "data:image/webp;base64," + base64.b64encode(min(coded, key=len)).decode()
