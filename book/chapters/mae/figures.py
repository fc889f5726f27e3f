"""Figures of the chapter on MAE: the plotting code that a reader need not read, and the chapter's schematic."""

import matplotlib.figure
import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from sslbook.notebook import plots, style
from sslbook.notebook.schematic import Diagram

FIGURES = (
    "mae.images",
    "mae.filling",
    "mae.easier",
    "mae.schematic",
    "mae.line",
    "mae.edge",
    "mae.two_losses",
    "mae.cost",
    "mae.normalized",
    "mae.curve",
    "mae.reconstructions",
    "mae.spectrum",
    "mae.neighbors",
    "mae.photographs",
)

Image = matplotlib.figure.Figure


def rows_of_images(rows: dict[str, Tensor], *, alt: str, caption: str | None = None, name: str | None = None) -> Image:
    """Rows of images, each named by the title of its first image."""
    count = len(next(iter(rows.values())))
    titles = [title if i == 0 else "" for title in rows for i in range(count)]
    images = torch.cat([row.clamp(0, 1) for row in rows.values()])
    return plots.grid(images, titles, columns=count, alt=alt, caption=caption, name=name)


def line(
    rho: float, sequence: np.ndarray, guesses: dict[str, np.ndarray], visible: np.ndarray, curves: dict[str, list]
) -> Image:
    """A sequence with its predictions, and the error of each prediction over the mask ratio."""
    at = curves["ratios"].index(rho)
    found = ", ".join(f"{name} {curves[name][at]:.0%}" for name in guesses)
    fig, (top, ax) = style.figure(
        rows=2, height=4.6, alt=f"{rho:.0%} masked: the error relative to the variance is {found}.", caption=None
    )
    where = np.arange(len(sequence))
    top.plot(where, sequence, color=style.GRAY, lw=1, ls=":")
    looks = dict(zip(guesses, ((style.ORANGE, "--"), (style.BLUE, "-"))))
    for name, guess in guesses.items():
        color, dash = looks[name]
        top.plot(where, guess, color=color, ls=dash)
        ax.plot(curves["ratios"], curves[name], color=color, ls=dash)
        ax.plot(rho, curves[name][at], "o", color=color)
        ax.annotate(f" {name}", (curves["ratios"][-1], curves[name][-1]), color=color, va="center")
    top.plot(visible, sequence[visible], "o", color=style.GREEN, ms=4)
    top.set(ylim=(-4, 4), ylabel="value", xlabel="position (dots: visible; dotted: truth)")
    ax.set(xlabel="mask ratio ρ", ylabel="error / variance", xlim=(0, 1.1), ylim=(0, 1))
    return fig


def edge(strips: Float[Tensor, "positions pixels"], learned: Float[Tensor, "pixels"]) -> Image:
    """A masked edge: some of its possible positions, and what minimizes the squared error."""
    fig, ax = style.figure(
        height=2.2,
        alt="Sharp edges at several positions, and the mean of all sixteen, a ramp, which gradient descent finds.",
        caption="The best prediction of an edge that may lie anywhere is a ramp, the mean of all sharp edges (dotted).",
        name="mae.edge",
    )
    ax.plot(strips.T[:, [0, 8, 15]], color=style.GRAY, lw=1, ls=":")
    ax.plot(learned, color=style.BLUE)
    ax.annotate("what is learned", (12.6, 0.25), color=style.BLUE)
    ax.set(xlabel="pixel", ylabel="brightness")
    return fig


def two_losses(all_patches: Float[Tensor, "l l"], masked_patches: Float[Tensor, "l l"]) -> Image:
    """The best matrices of rank one for both losses, side by side."""
    fig, axes = style.figure(
        columns=2,
        height=2.7,
        alt="Loss on all patches: the matrix is zero but for the last diagonal entry. Loss on masked patches: it is "
        "zero in the last row and column and positive elsewhere.",
        caption="The best matrix of rank one. With the loss on all patches it copies the lone patch, number 8. With the "
        "loss on masked patches it ignores that patch and keeps what the other seven share.",
        name="mae.two_losses",
    )
    titles = ("loss on all patches", "loss on masked patches")
    for ax, weights, title in zip(axes, (all_patches, masked_patches), titles):
        top = float(weights.abs().max())
        ax.imshow(weights.abs().numpy(), vmin=0, vmax=top)
        ax.set_title(title)
        ticks = range(0, len(weights), 7)
        ax.set(xlabel="visible patch", ylabel="predicted patch", xticks=ticks, yticks=ticks)
        ax.set(xticklabels=[t + 1 for t in ticks], yticklabels=[t + 1 for t in ticks])
    return fig


def cost(rho: float, parts: dict[str, float], whole: float) -> Image:
    """The cost of a forward pass by its parts, as a fraction of one that encodes every token."""
    share = sum(parts.values()) / whole
    fig, ax = style.figure(
        height=2.2,
        alt=f"With {rho:.0%} masked a step costs {share:.0%} of one with mask tokens in the encoder: "
        f"{1 / share:.1f} times less.",
        caption=None,
    )
    left = 0.0
    for i, (name, value) in enumerate(parts.items()):
        color = (style.BLUE, style.VIOLET, style.ORANGE)[i]
        ax.barh([0], [value / whole], left=left, color=color, edgecolor="white")
        ax.annotate(name, ((0.02, 0.4, 0.86)[i], 0.62), color=color)
        left += value / whole
    ax.annotate(f"{1 / share:.1f} times less", (left + 0.01, 0), va="center", color=style.GRAY)
    ax.set(xlim=(0, 1.25), ylim=(-0.6, 0.9), yticks=[], xlabel="cost / cost with all tokens encoded")
    return fig


def curve(losses: list[float], bars: dict[str, float]) -> Image:
    """The loss over the steps, and the losses of the rules as lines."""
    smoothed = torch.tensor(losses).unfold(0, min(20, len(losses)), 1).mean(1)
    fig, ax = style.figure(
        alt=f"The loss goes from {losses[0]:.2f} to {smoothed[-1]:.2f}; harmonic filling has "
        f"{bars['harmonic filling']:.2f}.",
        caption=f"The loss of the live run (a mean of 20 steps) ends at {smoothed[-1]:.2f}. Without any training, the "
        f"mean image has {bars['mean image']:.2f} and harmonic filling {bars['harmonic filling']:.2f} (dashed).",
        name="mae.curve",
    )
    ax.plot(smoothed, color=style.BLUE)
    for (name, loss), color, at in zip(bars.items(), (style.ORANGE, style.GREEN), (0.3, 0.65)):
        ax.axhline(loss, color=color, ls="--")
        ax.annotate(name, (at, loss), xycoords=("axes fraction", "data"), color=color, va="bottom")
    ax.set(xlabel="step", ylabel="loss", ylim=(0, 2.5 * max(bars.values())))
    return fig


def spectrum(share: Float[Tensor, "components"]) -> Image:
    """The fraction of the features' variance that each principal component holds."""
    first = share.cumsum(0)[4]
    fig, ax = style.figure(
        height=2.4,
        alt=f"Fraction of variance by principal component: the first five of {len(share)} hold {first:.0%}.",
        caption=f"The first five of {len(share)} components hold {first:.0%} of the variance of the features.",
        name="mae.spectrum",
    )
    held = share[share > 1e-9]  # a LayerNorm fixes one direction, which has no variance
    ax.plot(range(1, len(held) + 1), held, color=style.BLUE, marker="o", ms=3)
    ax.set(xlabel="principal component of the features", ylabel="fraction of variance", yscale="log")
    return fig


def explained(column: Float[Tensor, "images"], factor: Tensor) -> float:
    """Fraction of the variance of a principal component that a factor explains (R²)."""
    if factor.is_floating_point():
        return torch.corrcoef(torch.stack([column, factor]))[0, 1].item() ** 2
    inside = sum((column[factor == g] - column[factor == g].mean()).square().sum() for g in factor.unique())
    return 1 - (inside / column.square().sum()).item()


def schematic() -> Diagram:
    """From the image to the loss: what is masked, what is kept, what is thrown away."""
    d = Diagram(
        alt="An image is cut into patches and most are masked. The encoder gets the visible patches only. Its outputs and "
        "one mask token for each masked patch go into a small decoder, which predicts the pixels of the masked patches. "
        "The loss compares these with the image. The encoder is kept and the decoder thrown away.",
        caption="MAE. The encoder sees the visible patches only. The decoder also gets a mask token for every masked "
        "patch, and the loss is taken over the masked patches. After training the decoder is thrown away.",
        name="mae.schematic",
    )
    image = d.image(0, 0.6, "image")
    patches = d.patches(1, 0.6, "patches,\nmost masked", "0100 0010 1000 0001")
    encoder = d.network(2.1, 0.6, "encoder", "f", kept=True)
    encoded = d.vector(3.1, 0.6, "encoded\npatches")
    tokens = d.vector(3.1, -0.5, "mask tokens")
    decoder = d.network(4.1, 0.6, "decoder", widens=True, thrown=True)
    predicted = d.patches(5.2, 0.6, "predicted\npatches", "1011 1101 0111 1110")
    loss = d.loss(5.2, 1.9, "squared error,\nmasked patches")
    target = d.patches(2.1, 1.9, "the masked patches\nof the image", "1011 1101 0111 1110")
    d.arrow(image, patches)
    d.arrow(patches, encoder, "visible")
    d.arrow(encoder, encoded)
    d.arrow(encoded, decoder)
    d.arrow(tokens, decoder, out="right", into="top")
    d.arrow(decoder, predicted)
    d.arrow(predicted, loss)
    d.arrow(target, loss)
    d.arrow(image, target, out="bottom", into="left")
    return d
