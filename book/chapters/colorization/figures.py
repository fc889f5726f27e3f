"""The figures of the chapter *Colorization and inpainting*. The cells compute what they show; here it is only plotted."""

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from sslbook.methods.colorization import lab_to_rgb
from sslbook.notebook import style
from sslbook.notebook.schematic import Diagram

FIGURES = (
    "colorization.schematic",
    "colorization.toy",
    "colorization.colorings",
    "colorization.palette",
    "colorization.annealed",
    "colorization.adversarial",
    "colorization.curves",
    "colorization.colored",
    "colorization.plane",
    "colorization.photographs",
    "colorization.inpainted",
)


def schematic() -> Diagram:
    """Above: from the lightness to a distribution over colors; below: from what is visible to what is masked."""
    diagram = Diagram(
        alt="Above: an image is split into its lightness and its colors ab. The lightness passes through the backbone f "
        "and a decoder g, which gives each position a distribution over bins of color. The loss compares it with the "
        "colors, softly encoded and weighted by their rarity. Below: an image with a masked square passes through the "
        "same kind of backbone and a decoder; the squared error compares what is reconstructed with what was masked, and "
        "a discriminator D may score it. Only the backbones are kept.",
        caption="Two tasks of one form: remove a part of the image and predict it from the rest. Colorization (above) "
        "removes the color of every pixel. The context encoder (below) removes all channels of a region.",
        name="colorization.schematic",
    )
    image, lightness = diagram.image(0, 0.45, "image"), diagram.view(1.15, 0, "lightness L")
    f, g = diagram.network(2.3, 0, "backbone", "f", kept=True), diagram.network(3.4, 0, "decoder", "g", thrown=True)
    q = diagram.vector(4.4, 0, "q over bins")
    loss = diagram.loss(5.9, 0.45, "weighted\ncross-entropy")
    z = diagram.vector(4.4, 1.15, "z, soft bins")
    diagram.arrow(image, lightness)
    for start, end in ((lightness, f), (f, g), (g, q), (q, loss), (z, loss)):
        diagram.arrow(start, end)
    diagram.arrow(image, z, "colors ab", out="bottom", into="left")
    other = diagram.image(0, 2.75, "image")
    masked = diagram.patches(1.15, 2.35, "visible part", "1111 1001 1001 1111")
    f_2 = diagram.network(2.3, 2.35, "", "f", kept=True)
    g_2 = diagram.network(3.4, 2.35, "", "g", widens=True, thrown=True)
    filled = diagram.view(4.4, 2.35, "filling")
    error = diagram.loss(5.9, 2.0, "squared error\nto masked part")
    fooled = diagram.loss(5.9, 2.9, "discriminator")
    diagram.arrow(other, masked)
    for start, end in ((masked, f_2), (f_2, g_2), (g_2, filled), (filled, error), (filled, fooled)):
        diagram.arrow(start, end)
    return diagram


def swatch(ax, ab: Sequence[float] | Tensor, title: str, lightness: float = 55.0) -> None:
    """A square of one color, with its name above."""
    color = lab_to_rgb(torch.tensor([lightness, float(ab[0]), float(ab[1])])).clamp(0, 1).tolist()
    ax.imshow(np.full((1, 1, 3), color))
    ax.set_title(title, fontsize=8.5)
    ax.set(xticks=[], yticks=[])
    for spine in ax.spines.values():
        spine.set_visible(False)


def toy(share: float, answers: Mapping[str, Tensor], red: Tensor, green: Tensor) -> style.Figure:
    """The two true colors, and the best answer of each loss where `share` of the balls are red."""
    chroma = {name: ab.norm().item() for name, ab in answers.items()}
    alt = f"With {share:.0%} red balls: " + ", ".join(f"{name} has chroma {c:.0f}" for name, c in chroma.items()) + "."
    fig, axes = style.figure(alt, 1, 2 + len(answers), width=6.6, height=1.6, caption=None, least=480)
    swatch(axes[0], red, f"true: {share:.0%}")
    swatch(axes[1], green, f"true: {1 - share:.0%}")
    for ax, (name, ab) in zip(axes[2:], answers.items()):
        swatch(ax, ab, name)
        ax.set_xlabel(f"chroma {chroma[name]:.0f}", fontsize=8.5)
    return fig


def _images(axes, images: Tensor) -> None:
    for ax, image in zip(axes, images):
        shown = image.movedim(0, 2).cpu().numpy()
        ax.imshow(shown if shown.dtype == np.uint8 else shown.clip(0, 1))
        ax.set(xticks=[], yticks=[])
        for spine in ax.spines.values():
            spine.set_visible(False)


def rows(images: Mapping[str, Tensor], caption: str, alt: str, name: str, cell: float = 0.62) -> style.Figure:
    """One row of images for each name, (n, 3, h, w) each, the name at the left."""
    count = len(next(iter(images.values())))
    width, height = 1.25 + cell * count, 0.1 + cell * len(images)
    fig, axes = style.figure(
        alt, len(images), count, width=width, height=height, caption=caption, name=name, least=min(480, 96 * width)
    )
    for line, (row, shown) in zip(axes, images.items()):
        _images(line, shown)
        line[0].set_ylabel(row, rotation=0, ha="right", va="center", fontsize=9)
    return fig


def palette(bins: Tensor, ab: Tensor, share: Tensor, near: Tensor) -> style.Figure:
    """The bins in their own colors, and one color with the shares of its five nearest bins."""
    caption = (
        f"The {len(bins)} bins of width 10 that hold a color of sRGB (the lightness is 60, or as near as the color "
        "allows). On the right one color (cross) and what its five nearest bins get of it."
    )
    alt = f"{len(bins)} squares in the ab plane, gray in the middle and colorful outside; five of them share one color."
    fig, axes = style.figure(
        alt,
        1,
        2,
        width=6.4,
        height=3.0,
        caption=caption,
        name="colorization.palette",
        least=480,
        width_ratios=(1.15, 1),
    )
    colors = lab_to_rgb(torch.cat([torch.full((len(bins), 1), 60.0), bins], 1)).clamp(0, 1).tolist()
    axes[0].scatter(bins[:, 0], bins[:, 1], c=colors, s=34, marker="s", linewidths=0)
    axes[0].set(xlabel="a (green to red)", ylabel="b (blue to yellow)", aspect="equal")
    axes[1].scatter(bins[:, 0], bins[:, 1], s=14, color=style.GRAY, linewidths=0)
    axes[1].scatter(bins[near, 0], bins[near, 1], s=1100 * share, color=style.BLUE, alpha=0.5, linewidths=0)
    for j, value in zip(near, share):
        axes[1].annotate(f"{value:.0%}", bins[j].tolist(), fontsize=9, ha="center", va="center")
    axes[1].plot(*ab.tolist(), "x", color=style.ORANGE, ms=9, mew=2.5)
    a, b = ab.tolist()
    axes[1].set(xlim=(a - 17, a + 17), ylim=(b - 17, b + 17), xlabel="a", ylabel="b", aspect="equal")
    return fig


def annealed(T: float, probabilities: Tensor, sharpened: Tensor, bins: Tensor, found: Tensor) -> style.Figure:
    """A distribution over three colors, as it is sharpened, and the color that it gives."""
    alt = f"At temperature {T:g} the color has chroma {found.norm():.0f}."
    fig, axes = style.figure(alt, 1, 3, width=6.6, height=2.1, caption=None, least=480, width_ratios=(1.5, 1.5, 1))
    names = ("red", "green", "blue")
    for ax, values, title in ((axes[0], probabilities, "predicted"), (axes[1], sharpened, f"at T = {T:g}")):
        ax.bar(range(3), values, color=[style.ORANGE, style.GREEN, style.BLUE])
        ax.set(ylim=(0, 1), xticks=range(3))
        ax.set_xticklabels(names, fontsize=8.5)
        ax.set_title(title, fontsize=9.5)
    swatch(axes[2], found, "color")
    axes[2].set_xlabel(f"chroma {found.norm():.0f}", fontsize=9)
    return fig


def adversarial(w: float, g: Tensor, density: Tensor, objective: Tensor) -> style.Figure:
    """The density of the true fillings, and what the encoder minimizes over its one answer u."""
    best = g[objective.argmin()].item()
    alt = f"With weight {w:g} the best answer is {best:.2f}; the true values lie at -1 and 1."
    fig, axes = style.figure(alt, 1, 2, width=6.6, height=2.5, caption=None, least=480)
    axes[0].plot(g, density, color=style.GRAY)
    axes[0].axvline(best, color=style.ORANGE, ls="--")
    axes[0].set(xlabel="value of a masked pixel", ylabel="density", ylim=(0, None))
    axes[0].set_title(f"the answer: {best:.2f}", fontsize=9.5)
    axes[1].plot(g, objective - objective.min(), color=style.BLUE)
    axes[1].plot(best, 0, "o", color=style.ORANGE)
    axes[1].set(xlabel="answer u", ylabel="objective less its minimum", ylim=(-0.1, 2.5))
    return fig


def curves(losses: Mapping[str, Sequence[float]]) -> style.Figure:
    """Loss over steps, each divided by its value at the start of the plateau that is no color at all."""
    ends = ", ".join(f"{name} {style.smooth(values)[-1]:.2f}" for name, values in losses.items())
    caption = f"Loss during training, averaged over ten steps, in parts of its value at the start. At the end: {ends}."
    fig, ax = style.figure(ends, width=5.4, height=2.7, caption=caption, name="colorization.curves")
    for (name, values), color in zip(losses.items(), style.COLORS):
        smoothed = style.smooth(values)
        ax.plot(smoothed, color=color)
        ax.annotate(name, (len(smoothed) - 1, smoothed[-1]), xytext=(4, 0), textcoords="offset points", fontsize=8.5,
                    color=color, va="center")  # fmt: skip
    ax.set(xlabel="step", ylabel="loss, start = 1", ylim=(0, None))
    ax.set_xlim(0, 1.45 * len(smoothed))
    return fig


def plane(bins: Tensor, predicted: Mapping[str, Tensor], points: Mapping[str, Tensor], true: Tensor) -> style.Figure:
    """What three networks predict for the color of one pixel: distributions over bins, and a single point each."""
    tops = ", ".join(f"{q.max():.0%} ({name})" for name, q in predicted.items())
    caption = (
        "Predictions for the color of the same pixel of the same gray image. The area of a disc is the probability of its "
        f"bin, the cross is the mean, the ring the true color. Largest probabilities: {tops}."
    )
    fig, axes = style.figure(
        f"Largest probabilities: {tops}.",
        1,
        len(predicted),
        width=6.8,
        height=2.6,
        caption=caption,
        name="colorization.plane",
        least=480,
    )
    colors = lab_to_rgb(torch.cat([torch.full((len(bins), 1), 60.0), bins], 1)).clamp(0, 1).tolist()
    for ax, (name, q) in zip(axes, predicted.items()):
        ax.scatter(bins[:, 0], bins[:, 1], s=2, color=style.GRAY, linewidths=0, alpha=0.5)
        ax.scatter(bins[:, 0], bins[:, 1], s=900 * q, c=colors, linewidths=0)
        ax.plot(*points[name].tolist(), "x", color=style.ORANGE, ms=8, mew=2)
        ax.plot(*true.tolist(), "o", mfc="none", color=style.GRAY, ms=11, mew=1.5)
        ax.set(xlim=(-60, 60), ylim=(-60, 60), aspect="equal", xlabel="a", xticks=(-50, 0, 50), yticks=(-50, 0, 50))
        ax.set_title(name, fontsize=9.5)
    axes[0].set_ylabel("b")
    return fig
