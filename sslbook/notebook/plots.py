"""Plots: grids of images, nearest neighbors, maps of features. Each returns a figure with its alt text."""

from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor

from sslbook.data.views import IMAGENET_MEAN, IMAGENET_STD
from sslbook.notebook import style


def denormalize(
    images: Float[Tensor, "*n c h w"],
    mean: Sequence[float] = IMAGENET_MEAN,
    std: Sequence[float] = IMAGENET_STD,
) -> Float[Tensor, "*n c h w"]:
    """Undo `(x - mean) / std` per channel, clipped to [0, 1]."""
    scale, shift = (torch.tensor(v, device=images.device)[:, None, None] for v in (std, mean))
    return (images * scale + shift).clamp(0, 1)


def grid(
    images: Shaped[Tensor, "n c h w"],
    titles: Sequence[str] | None = None,
    *,
    alt: str,
    columns: int = 8,
    inch: float = 0.75,
) -> style.Figure:
    """Images (uint8, or floats in [0, 1]) in rows of `columns`, each with its title above it, (n, c, h, w)."""
    columns = min(columns, len(images))
    rows = -(-len(images) // columns)
    above = 0.25 if titles else 0.0
    fig, axes = style.figure(alt, rows, columns, width=columns * inch, height=rows * (inch + above), squeeze=False)
    for i, ax in enumerate(axes.flat):
        ax.set_axis_off()
        if i < len(images):
            _show_image(ax, images[i])
            if titles:
                ax.set_title(titles[i], fontsize=8, pad=2)
    fig.get_layout_engine().set(w_pad=0.02, h_pad=0.02, wspace=0, hspace=0)  # pyrefly: ignore
    return fig


def neighbors(
    queries: Shaped[Tensor, "n c h w"],
    found: Shaped[Tensor, "n k c h w"],
    same: Bool[Tensor, "n k"] | None = None,
    *,
    alt: str,
    inch: float = 0.75,
) -> style.Figure:
    """One row per query: the query, a gap, its nearest neighbors.

    Where `same` is given, a neighbor of the query's class has a solid green frame and another a dashed orange one.
    """
    n, k = found.shape[:2]
    fig, axes = style.figure(
        alt, n, k + 2, width=(k + 1.4) * inch, height=n * inch, squeeze=False, width_ratios=[1, 0.3, *[1] * k]
    )
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
    title: str = "",
    width: float = 6.4,
    height: float = 5.2,
) -> style.Figure:
    """A map of points, colored by class; each class is labeled near its median point, without labels overlapping."""
    fig, ax = style.figure(alt, width=width, height=height)
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
            common = {"fontsize": 9, "color": "black", "ha": "center", "va": "center", "bbox": box, "arrowprops": line}
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
