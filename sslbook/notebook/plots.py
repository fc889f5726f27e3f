"""Plots: grids of images, nearest neighbors, maps of features. Each returns a figure with its alt text."""

from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Bool, Float, Int, Shaped
from matplotlib.axes import Axes
from matplotlib.patches import ConnectionPatch
from torch import Tensor

from sslbook.data.views import IMAGENET_MEAN, IMAGENET_STD
from sslbook.errors import UserError
from sslbook.notebook import style


def denormalize(
    images: Float[Tensor, "*n c h w"],
    mean: Sequence[float] = IMAGENET_MEAN,
    std: Sequence[float] = IMAGENET_STD,
) -> Float[Tensor, "*n c h w"]:
    """Undo `(x - mean) / std` per channel, clipped to [0, 1]."""
    scale, shift = (torch.tensor(v, device=images.device)[:, None, None] for v in (std, mean))
    return (images * scale + shift).clamp(0, 1)


SMALLEST = 64  # pixels of the page: no image of a grid is shown smaller, on a phone the grid scrolls


def grid(
    images: Shaped[Tensor, "n c h w"],
    titles: Sequence[str] | None = None,
    *,
    alt: str,
    caption: str | None,
    name: str | None = None,
    columns: int = 8,
    inch: float = 0.75,
    pairs: bool = False,
) -> style.Figure:
    """Images (uint8, or floats in [0, 1]) in rows of `columns`, each with its title above it, (n, c, h, w).

    Args:
        images: in reading order.
        titles: one for each image.
        alt: what the grid shows.
        caption: the finding; None where something else shows the figure.
        name: the figure's name in the chapter's list.
        columns: images in a row.
        inch: side of an image; at least 64 of the page's pixels are taken.
        pairs: images 0 and 1, 2 and 3, ... belong together: a bracket joins them, and a gap parts them from the next.

    Raises:
        UserError: pairs in an odd number of columns or of images, or no chapter lists the name.
    """
    columns, inch = min(columns, len(images)), max(inch, (SMALLEST + 4) / 96)
    if pairs and (columns % 2 or len(images) % 2):
        raise UserError(
            f"pairs of {len(images)} images in {columns} columns are torn apart: give an even number of both"
        )
    rows = -(-len(images) // columns)
    widths = [1.0] * columns
    if pairs:
        widths = ([1.0, 1.0, GAP] * (columns // 2))[:-1]
    above, below = 0.25 if titles else 0.0, 0.12 if pairs else 0.0
    width, height = sum(widths) * inch, rows * (inch + above + below)
    shape = {
        "width": width,
        "height": height,
        "squeeze": False,
        "width_ratios": widths,
        "least": sum(widths) * (SMALLEST + 4),
    }
    fig, axes = style.figure(alt, rows, len(widths), caption=caption, name=name, **shape)
    shown = [ax for row in axes for ax, wide in zip(row, widths) if wide == 1.0]
    for ax in axes.flat:
        ax.set_axis_off()
    for i, image in enumerate(images):
        _show_image(shown[i], image)
        if titles:
            shown[i].set_title(titles[i], fontsize=8, pad=2)
    if pairs:
        for left, right in zip(shown[: len(images) : 2], shown[1 : len(images) : 2]):
            _bracket(fig, left, right)
    space = {"w_pad": 0.02, "h_pad": 0.02 + below / 2, "wspace": 0, "hspace": 0}
    fig.get_layout_engine().set(**space)  # pyrefly: ignore
    return fig


GAP = 0.25  # between two pairs, in images


def _bracket(fig: style.Figure, left: Axes, right: Axes) -> None:
    """A bracket under two neighboring images."""
    low, high = -0.09, -0.02
    for a, b, start, end in (
        (left, right, (0.04, low), (0.96, low)),
        (left, left, (0.04, low), (0.04, high)),
        (right, right, (0.96, low), (0.96, high)),
    ):
        line = ConnectionPatch(
            start, end, "axes fraction", "axes fraction", axesA=a, axesB=b, color=style.GRAY, linewidth=1.5
        )
        line.set_in_layout(False)
        fig.add_artist(line)


def neighbors(
    queries: Shaped[Tensor, "n c h w"],
    found: Shaped[Tensor, "n k c h w"],
    same: Bool[Tensor, "n k"] | None = None,
    *,
    alt: str,
    caption: str | None,
    name: str | None = None,
    inch: float = 0.75,
) -> style.Figure:
    """One row per query: the query, a gap, its nearest neighbors.

    Where `same` is given, a neighbor of the query's class has a solid green frame and another a dotted orange one.
    `alt`, `caption`, `name` and `inch` as for `grid`.
    """
    n, k = found.shape[:2]
    inch = max(inch, (SMALLEST + 8) / 96)
    width = (k + 1.4) * inch
    shape = {"width": width, "height": n * inch, "squeeze": False, "width_ratios": [1, 0.3, *[1] * k]}
    fig, axes = style.figure(alt, n, k + 2, caption=caption, name=name, least=(k + 1.4) * (SMALLEST + 8), **shape)
    for row in range(n):
        for ax in axes[row, :2]:
            ax.set_axis_off()
        _show_image(axes[row, 0], queries[row])
        for column in range(k):
            ax = axes[row, column + 2]
            _show_image(ax, found[row, column])
            ax.set(xticks=[], yticks=[])
            for spine in ax.spines.values():
                spine.set_visible(same is not None)
                if same is not None:
                    color, line = (style.GREEN, "-") if same[row, column] else (style.ORANGE, ":")
                    spine.set(color=color, linestyle=line, linewidth=2)
    fig.get_layout_engine().set(w_pad=0.03, h_pad=0.03, wspace=0.02, hspace=0.02)  # pyrefly: ignore
    return fig


def scatter(
    points: Float[Tensor, "n 2"],
    labels: Int[Tensor, "n"],
    names: Sequence[str] = (),
    *,
    alt: str,
    caption: str | None,
    name: str | None = None,
    title: str = "",
    width: float = 6.4,
    height: float = 5.2,
) -> style.Figure:
    """A map of points, colored by class; each class is labeled near its median point, without labels overlapping.

    `alt`, `caption` and `name` as for `grid`.
    """
    fig, ax = style.figure(alt, width=width, height=height, caption=caption, name=name)
    ax.set(xticks=[], yticks=[])
    ax.set_title(title, fontsize=10)
    xy, which, texts = points.cpu().numpy(), labels.cpu().numpy(), []
    for i, label in enumerate(np.unique(which)):
        part = xy[which == label]
        color, mark = style.COLORS[i % len(style.COLORS)], "o^sDvP*X"[i // len(style.COLORS) % 8]
        ax.scatter(part[:, 0], part[:, 1], s=12, alpha=0.6, linewidths=0, color=color, marker=mark)
        if len(names):
            middle = np.median(part, axis=0)
            nearest = part[np.linalg.norm(part - middle, axis=1).argmin()]  # a median may fall between two clusters
            box = {"boxstyle": "round,pad=0.15", "facecolor": "white", "edgecolor": color, "alpha": 0.85}
            line = {"arrowstyle": "-", "color": color}
            common = {
                "fontsize": 9,
                "color": "#000000",
                "ha": "center",
                "va": "center",
                "bbox": box,
                "arrowprops": line,
            }
            texts.append(ax.annotate(names[label], nearest, (0, 0), textcoords="offset pixels", **common))
    for spine in ax.spines.values():
        spine.set_visible(False)
    _separate(fig, texts)
    return fig


def _separate(fig: style.Figure, texts: list) -> None:
    """Move labels that overlap up and down until none do; a line goes on leading each to its point."""
    fig.canvas.draw()
    boxes = [text.get_bbox_patch().get_window_extent() for text in texts]
    centers = np.array([[(b.x0 + b.x1) / 2, (b.y0 + b.y1) / 2] for b in boxes]).reshape(-1, 2)
    start, rank = centers.copy(), np.arange(len(boxes))
    widths, heights = (np.array([getattr(b, side) + 4 for b in boxes]) for side in ("width", "height"))
    for _ in range(500):
        apart = centers[:, None] - centers[None]
        overlap = (heights[:, None] + heights[None]) / 2 - np.abs(apart[..., 1])
        near = (np.abs(apart[..., 0]) < (widths[:, None] + widths[None]) / 2) & (overlap > 0)
        np.fill_diagonal(near, False)
        if not near.any():
            break
        above = np.where(apart[..., 1] != 0, np.sign(apart[..., 1]), np.sign(rank[:, None] - rank[None]))
        centers[:, 1] += (near * above * (overlap / 2 + 1)).sum(1).clip(-20, 20)
    for text, offset in zip(texts, centers - start):
        text.set_position(tuple(offset))


def _show_image(ax, image: Shaped[Tensor, "c h w"]) -> None:
    image = image.detach().cpu()
    image = image.float() / 255 if image.dtype == torch.uint8 else image.float().clamp(0, 1)
    array = image.permute(1, 2, 0).numpy()
    if array.shape[2] == 1:
        ax.imshow(array[..., 0], cmap="gray", vmin=0, vmax=1)
    else:
        ax.imshow(array)
