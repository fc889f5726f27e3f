"""The figures of the chapter *Decorrelation*. The cells compute what they show; here it is only plotted."""

from collections.abc import Mapping, Sequence

import numpy as np
from torch import Tensor

from sslbook.notebook import plots, style
from sslbook.notebook.schematic import Diagram

FIGURES = (
    "decorrelation.schematic",
    "decorrelation.toy",
    "decorrelation.balance",
    "decorrelation.floor",
    "decorrelation.slices",
    "decorrelation.curves",
    "decorrelation.neighbors",
    "decorrelation.matrix",
    "decorrelation.spectra",
    "decorrelation.width",
    "decorrelation.photographs",
)


def schematic() -> Diagram:
    """Both views, one network, three losses on the projections of a batch."""
    diagram = Diagram(
        alt="An image becomes two views. One backbone f and one projector g turn each view into a projection. The "
        "invariance term compares the two projections of an image. The variance and covariance terms look at the "
        "dimensions over the batch, one view at a time. Only f is kept.",
        caption="VICReg. Both views go through the same backbone and projector. Invariance compares the views of each "
        "image; variance and covariance are computed over the batch, for each view by itself. No image is compared with "
        "another, and the gradient flows through both views.",
        name="decorrelation.schematic",
    )
    image = diagram.image(0, 0.7)
    ends = []
    for row, number in ((0, 1), (1.4, 2)):
        view = diagram.view(1, row, f"view {number}")
        f = diagram.network(2, row, "backbone", "f", kept=True)
        g = diagram.network(3, row, "projector", "g", thrown=True, widens=True)
        z = diagram.vector(4, row, "z" if row == 0 else "z'", thrown=True)
        each = diagram.loss(5.4, row, "variance,\ncovariance")
        diagram.arrow(image, view, "augment" if row == 0 else "")
        for start, end in ((view, f), (f, g), (g, z), (z, each)):
            diagram.arrow(start, end)
        ends.append(z)
    both = diagram.loss(5.4, 0.7, "invariance")
    for z in ends:
        diagram.arrow(z, both)
    return diagram


def toy(z: Tensor, color: Tensor, share: Tensor, nu: float, correlation: float) -> style.Figure:
    """The two dimensions of 200 images, and how much of each input a dimension encodes, (2, inputs)."""
    alt = f"With covariance weight {nu:g} the two dimensions have a correlation of {correlation:.2f}."
    fig, axes = style.figure(alt, 1, 2, width=6.6, height=3.0, caption=None, least=480)
    axes[0].scatter(z[:, 0], z[:, 1], s=14, c=color, cmap=style.MAP, linewidths=0)
    axes[0].set(xlim=(-3.6, 3.6), ylim=(-3.6, 3.6), aspect="equal", xlabel="dimension 1", ylabel="dimension 2")
    axes[0].set_title(f"correlation {correlation:.2f}", fontsize=10)
    image = axes[1].imshow(share, vmin=0, vmax=1, aspect="auto")
    axes[1].set(xlabel="input", ylabel="dimension", xticks=range(share.shape[1]), yticks=(0, 1))
    axes[1].set_xticklabels([str(k + 1) for k in range(share.shape[1])])
    axes[1].set_yticklabels(["1", "2"])
    axes[1].set_title("squared correlation with each input", fontsize=10)
    fig.colorbar(image, ax=axes[1], shrink=0.8)
    return fig


def balance(sigma: Tensor, parts: Mapping[str, Tensor], best: float, rho: float) -> style.Figure:
    """Loss of one dimension over its standard deviation, in its parts."""
    alt = f"If two views have a correlation of {rho:g}, the loss is lowest at a standard deviation of {best:.2f}."
    fig, ax = style.figure(alt, width=5.6, height=3.0, caption=None)
    for (name, values), color, dashes in zip(parts.items(), (style.GREEN, style.ORANGE, style.BLUE), ("--", ":", "-")):
        ax.plot(sigma, values, dashes, color=color, label=name)
    ax.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0))
    ax.axvline(best, color=style.GRAY, lw=1)
    ax.set(xlabel="standard deviation σ", ylabel="loss of one dimension", xlim=(0, 1.5), ylim=(0, 40))
    ax.set_title(f"correlation of the views {rho:g}: best σ = {best:.2f}", fontsize=11)
    return fig


def floor(
    sizes: Sequence[int], found: Mapping[int, Sequence[float]], formula: Mapping[int, Sequence[float]]
) -> style.Figure:
    """The covariance loss of independent random numbers over the batch size, for several widths."""
    shown = ", ".join(f"{values[0]:.1f} at width {d}" for d, values in found.items())
    caption = (
        "The covariance loss of independent random numbers is not zero. It falls with the batch size and grows with the "
        f"width; with {sizes[0]} images it is {shown}. Dots: mean of ten batches; lines: the formula."
    )
    fig, ax = style.figure(f"With {sizes[0]} images: {shown}.", caption=caption, name="decorrelation.floor")
    for (d, values), color, mark in zip(found.items(), style.COLORS, "os^D"):
        ax.plot(sizes, formula[d], "-", color=color, lw=1.2)
        ax.plot(sizes, values, mark, color=color, ms=5)
        ax.annotate(f"d = {d}", (sizes[-1], formula[d][-1]), xytext=(7, -3), textcoords="offset points", color=color)
    ax.set(xlabel="images in the batch N", ylabel="covariance loss of noise", xscale="log", yscale="log")
    ax.set_xlim(sizes[0] * 0.85, sizes[-1] * 2.4)
    ax.set_xticks(sizes[::2], [str(n) for n in sizes[::2]])
    ax.minorticks_off()
    return fig


def slices(sizes: Sequence[int], found: Sequence[float], true: float, d: int) -> style.Figure:
    """Cosine of two views after whitening, over the images whitened together."""
    double = min(range(len(sizes)), key=lambda i: abs(sizes[i] - 2 * d))
    caption = (
        f"Two views of independent features in {d} dimensions whose true cosine is {true:.2f} (dotted line). After "
        f"whitening {sizes[0]} images together it is {found[0]:.2f}, with {sizes[double]} images {found[double]:.2f}: few "
        "images give each view a whitening matrix of its own."
    )
    alt = f"The cosine rises from {found[0]:.2f} with {sizes[0]} images to {found[-1]:.2f} with {sizes[-1]}."
    fig, ax = style.figure(alt, caption=caption, name="decorrelation.slices")
    ax.axhline(true, color=style.GRAY, ls=":")
    ax.plot(sizes, found, "o-", color=style.BLUE)
    ax.axvline(2 * d, color=style.GRAY, lw=0.8)
    ax.annotate("N = 2d", (2 * d, 0.05), xytext=(5, 0), textcoords="offset points", color=style.TEXT)
    ax.set(xlabel="images in a slice N", ylabel="cosine of the two views", xscale="log", ylim=(0, 1.02))
    shown = [n for n in sizes if n in (sizes[0], 2 * d, 128, 1024)]
    ax.set_xticks(shown, [str(n) for n in shown])
    ax.minorticks_off()
    return fig


def curves(log: Mapping[str, Sequence[float]], weights: Mapping[str, float]) -> style.Figure:
    """The weighted terms of a run, and the two sides of its balance."""
    ends = {name: weight * float(np.mean(log[name][-10:])) for name, weight in weights.items()}
    std = 1 - float(np.mean(log["variance"][-10:]))
    left = 2 * weights["invariance"] * np.array(log["invariance"])
    left = left + 4 * weights["covariance"] * np.array(log["covariance"])
    right = weights["variance"] * (1 - np.array(log["variance"]))
    words = ", ".join(f"{name} {end:.1f}" for name, end in ends.items())
    sides = f"{left[-10:].mean():.1f} and {right[-10:].mean():.1f}"
    caption = (
        f"Left: the three weighted terms; at the end: {words}. The mean standard deviation ends at {std:.2f}. Right: the "
        f"two sides of the balance end at {sides}. Means over ten steps."
    )
    alt = f"At the end the weighted terms are {words}; the two sides of the balance are {sides}."
    fig, axes = style.figure(alt, 1, 2, width=7.2, height=2.9, caption=caption, name="decorrelation.curves", least=520)
    for (name, weight), color, dashes in zip(weights.items(), style.COLORS, ("-", "--", ":")):
        axes[0].plot(weight * style.smooth(log[name]), dashes, color=color, label=name)
    axes[0].set(xlabel="step", ylabel="weighted term", ylim=(0, 26))
    axes[0].legend()
    axes[1].plot(style.smooth(left), color=style.BLUE, label="2 λ s + 4 ν c")
    axes[1].plot(style.smooth(right), "--", color=style.ORANGE, label="μ times mean std")
    axes[1].set(xlabel="step", ylabel="what shrinks, what grows", ylim=(0, 26))
    axes[1].legend()
    return fig


def neighbors(queries: Tensor, images: Tensor, same: Tensor, share: float, what: str, name: str) -> style.Figure:
    """Test images and their nearest training images, whose frames show whether the class is the same."""
    caption = (
        f"Test {what} (left) and their nearest training images. Of all neighbors of all test images {share:.0%} have the "
        "query's class; solid frames mark those, dotted frames the others."
    )
    alt = f"{len(queries)} test images with {images.shape[1]} nearest training images each."
    return plots.neighbors(queries, images, same, inch=0.6, alt=alt, caption=caption, name=name)


def matrix(found: Mapping[str, Tensor], shown: int = 48) -> style.Figure:
    """Absolute correlations of the first dimensions of z, before and after training."""

    def rest(c: Tensor) -> float:
        return ((c.square().sum() - len(c)) / (len(c) * (len(c) - 1))).item()

    words = ", ".join(f"{name} {rest(c):.3f}" for name, c in found.items())
    caption = (
        f"Absolute correlations of the first {shown} of {len(next(iter(found.values())))} dimensions of z over held-out "
        f"images. Mean square off the diagonal, all dimensions: {words}."
    )
    alt = f"The mean squared correlation off the diagonal is: {words}."
    fig, axes = style.figure(
        alt, 1, len(found), width=6.8, height=2.5, caption=caption, name="decorrelation.matrix", least=480
    )
    for ax, (name, c) in zip(axes, found.items()):
        image = ax.imshow(c[:shown, :shown].abs(), vmin=0, vmax=1)
        ax.set_title(name, fontsize=10)
        ax.set(xticks=[], yticks=[])
    fig.colorbar(image, ax=list(axes), shrink=0.9)
    return fig


def spectra(values: Sequence[float], reference: Sequence[float], name: str, against: str) -> style.Figure:
    """Eigenvalues of the covariance of z, beside those of a reference run."""
    values, reference = (np.maximum(np.array(v), 1e-12) for v in (values, reference))
    share = values / values.sum()
    rank = float(np.exp(-(share * np.log(share)).sum()))
    alt = (
        f"{name}: the eigenvalues begin at {values[0]:.2g} and sum to {values.sum():.2g}; {rank:.0f} directions count."
    )
    fig, ax = style.figure(alt, width=5.6, height=3.2, caption=None)
    ax.plot(range(1, len(reference) + 1), reference, ":", color=style.GRAY)
    ax.plot(range(1, len(values) + 1), values, color=style.BLUE)
    ax.set(xlabel="eigenvalue, by size", ylabel="variance of z along it", yscale="log", ylim=(1e-9, 1e3), xlim=(0, 80))
    ax.set_title(f"{name}\ntotal variance {values.sum():.3g} (dotted: {against})", fontsize=10)
    return fig


def width(times: Sequence[int], found: Mapping[str, Sequence[Sequence[float]]]) -> style.Figure:
    """Linear accuracy over the projector's width, (methods, widths, seeds)."""
    words = ", ".join(f"{name} {np.mean(v[0]):.0f} to {np.mean(v[-1]):.0f} %" for name, v in found.items())
    caption = (
        f"Linear accuracy with a projector of {times[0]} to {times[-1]} times the width of h (means; dots are seeds): "
        f"{words}."
    )
    fig, ax = style.figure(f"From the narrowest to the widest: {words}.", caption=caption, name="decorrelation.width")
    for (name, values), color, mark, dashes in zip(found.items(), style.COLORS, "os^", ("-", "--", ":")):
        means = [float(np.mean(seeds)) for seeds in values]
        ax.plot(times, means, dashes, color=color)
        for x, seeds in zip(times, values):
            ax.plot([x] * len(seeds), seeds, mark, color=color, ms=4, alpha=0.7)
        ax.annotate(name, (times[-1], means[-1]), xytext=(8, -3), textcoords="offset points", color=color)
    ax.set(xlabel="projector width, relative to h", ylabel="linear accuracy (%)", xscale="log")
    ax.set_xticks(times, [f"{x}x" for x in times])
    ax.set_xlim(times[0] * 0.85, times[-1] * 3.2)
    ax.minorticks_off()
    return fig
