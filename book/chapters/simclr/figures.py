"""The figures of the chapter *SimCLR*. The cells compute what they show; here it is only plotted."""

import math
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from sslbook.notebook import plots, style
from sslbook.notebook.schematic import Diagram

FIGURES = (
    "simclr.crops",
    "simclr.schematic",
    "simclr.circle",
    "simclr.effective",
    "simclr.bound",
    "simclr.curves",
    "simclr.neighbors",
    "simclr.factors",
    "simclr.spectrum",
    "simclr.within",
    "simclr.texture",
    "simclr.photographs",
)


def schematic() -> Diagram:
    """From one image to the loss: what is trained, kept and thrown away."""
    diagram = Diagram(
        alt="An image becomes two views. One backbone f maps both to features h, one projector g maps these to "
        "projections z. The loss compares the projections of all images of the batch. Only f is kept.",
        caption="SimCLR. Both views go through the same backbone and the same projector, and the gradient flows back "
        "through both. Each projection must find the other one of its image among all of the batch. Afterwards the "
        "projector is thrown away, and h is the representation.",
        name="simclr.schematic",
    )
    image = diagram.image(0, 0.6)
    for row, number in ((0, 1), (1.2, 2)):
        view = diagram.view(1, row, f"view {number}")
        backbone = diagram.network(2, row, "backbone", "f", kept=True)
        h = diagram.vector(3, row, f"h, view {number}", kept=True)
        projector = diagram.network(4, row, "projector", "g", thrown=True)
        z = diagram.vector(5, row, f"z, view {number}", thrown=True)
        if row == 0:
            loss = diagram.loss(6.1, 0.6, "NT-Xent")
        diagram.arrow(image, view, "augment" if row == 0 else "")
        for start, end in ((view, backbone), (backbone, h), (h, projector), (projector, z), (z, loss)):
            diagram.arrow(start, end)
    return diagram


def pairs(a: Tensor, b: Tensor, found: float, cue: str, what: str) -> style.Figure:
    """Five pairs of views side by side, and how many positives a cue finds."""
    shown = torch.stack([a[:5], b[:5]], 1).flatten(0, 1)
    alt = f"Five pairs of views, {what}. The {cue} finds {found:.0f} % of the positives among 256."
    fig = plots.grid(shown, columns=10, inch=0.6, pairs=True, alt=alt, caption=None)
    fig.set_figheight(fig.get_figheight() + 0.35)  # room for the title, or the images shrink
    fig.suptitle(f"the {cue} finds {found:.0f} % of the positives", fontsize=11)
    return fig


def num_clusters(theta: Tensor) -> int:
    """Clusters of points on the circle, separated by arcs of more than a degree."""
    ordered = (theta % (2 * math.pi)).sort().values
    arcs = torch.diff(torch.cat([ordered, ordered[:1] + 2 * math.pi]))
    return int((arcs > math.radians(1)).sum())


def circle(theta: Tensor, label: Tensor, tau: float) -> style.Figure:
    count = num_clusters(theta)
    alt = f"At temperature {tau:.3g} thirty points in five colors form {count} clusters on the circle."
    fig, ax = style.figure(width=3.4, height=3.4, alt=alt, caption=None)
    for c in range(5):
        x, y = theta[label == c].cos(), theta[label == c].sin()
        ax.scatter(x, y, s=70, alpha=0.6, marker="os^Dv"[c], color=style.COLORS[c], linewidths=0)
    ax.set(xlim=(-1.25, 1.25), ylim=(-1.25, 1.25), aspect="equal", xticks=[], yticks=[])
    ax.set_title(f"30 points in {count} clusters")
    ax.axis("off")
    return fig


def effective(weight: Tensor, count: float, tau: float) -> style.Figure:
    """The sorted weights of the negatives of one anchor."""
    alt = (
        f"At temperature {tau:.3g} the hardest negative has {weight[0]:.1%} of the repulsion; "
        f"the effective number is {count:.0f} of {len(weight)}."
    )
    fig, ax = style.figure(height=2.6, alt=alt, caption=None)
    ax.fill_between(range(1, len(weight) + 1), weight, step="mid", color=style.ORANGE, alpha=0.7)
    ax.set(xscale="log", xlabel="negative, from the most similar", yscale="log", ylabel="fraction of the repulsion")
    ax.set(ylim=(1e-6, 1.5), xlim=(1, len(weight)))
    ax.set_title(f"effective number of negatives: {count:.0f} of {len(weight)}")
    return fig


def bound(sizes: Sequence[int], row: Sequence[float], information: float) -> style.Figure:
    """The bound on mutual information over the number of candidates."""
    last = math.log(sizes[-1])
    alt = (
        f"True information {information:g} nats; with K = {sizes[-1]} the bound reaches {row[-1]:.2f}, "
        f"its ceiling is {last:.2f}."
    )
    fig, ax = style.figure(alt=alt, caption=None)
    shift = {"textcoords": "offset points"}
    ax.axhline(information, color=style.GREEN)
    ax.annotate("true information", (2, information), xytext=(0, 5), color=style.GREEN, **shift)
    ax.plot(sizes, np.log(sizes), "--", color=style.GRAY)
    ax.annotate("ceiling log K", (100, math.log(100)), xytext=(-4, 6), ha="right", **shift)
    ax.plot(sizes, row, "o-", color=style.BLUE)
    ax.annotate("bound", (sizes[-1], row[-1]), xytext=(-10, -16), color=style.BLUE, ha="right", **shift)
    ax.set(xscale="log", xlabel="candidates K", ylabel="nats", ylim=(0, 13))
    ax.set_title(f"bound at K = {sizes[-1]}: {row[-1]:.2f} of {information:g} nats")
    return fig


def curves(log: Mapping[str, Sequence[float]], start: float) -> style.Figure:
    """Loss and contrastive accuracy of a run; `start` is the loss of equal features."""
    steps, loss = len(log["loss"]), log["loss"]
    end, found = np.mean(loss[-10:]), np.mean(log["contrastive_accuracy"][-10:])
    caption = (
        f"In {steps} steps the loss falls from {loss[0]:.1f} to {end:.1f}, and the positive becomes the most similar "
        f"of 511 candidates in {found:.0f} % of cases. Means over ten steps."
    )
    alt = f"The loss falls from {loss[0]:.1f} to {end:.1f}; the contrastive accuracy rises to {found:.0f} %."
    fig, axes = style.figure(columns=2, width=7.0, height=2.6, alt=alt, caption=caption, name="simclr.curves")
    axes[0].plot(style.smooth(loss))
    axes[0].axhline(start, color=style.GRAY, linestyle=":")
    axes[0].annotate("2 log(2N - 1)", (steps / 2, start), xytext=(0, 5), ha="center", textcoords="offset points")
    axes[0].set(xlabel="step", ylabel="loss (sum of both views)")
    axes[1].plot(style.smooth(log["contrastive_accuracy"]), color=style.GREEN)
    axes[1].set(xlabel="step", ylabel="contrastive accuracy (%)", ylim=(0, None))
    return fig


def neighbors(queries: Tensor, images: Tensor, same: Tensor) -> style.Figure:
    """Test images and their nearest training images, whose frames show whether the shape is the same."""
    share = same.float().mean()
    caption = (
        f"Test images (left) and their eight nearest training images. {share:.0%} of these neighbors have the query's "
        "shape (solid frames), the others another one (dotted)."
    )
    alt = f"{len(queries)} test images with eight nearest training images each; {share:.0%} show the same shape."
    return plots.neighbors(queries, images, same, inch=0.6, alt=alt, caption=caption, name="simclr.neighbors")


def factor_bars(known: Mapping[str, Mapping[str, Sequence[float]]], chosen: Sequence[str]) -> style.Figure:
    """Linear probes of known factors from pixels, h and z."""
    mean = {name: {c: float(np.mean(known[name][c])) for c in ("pixels", "h", "z")} for name in chosen}
    caption = (
        "Linear probes of known factors. Nearly all of them are predicted better from h, the backbone's output, than "
        "from z, on which the loss acts. Only y is predicted as well from z."
    )
    alt = "Linear probes: " + "; ".join(f"{n}: h {m['h']:.0f}, z {m['z']:.0f}" for n, m in mean.items())
    fig, ax = style.figure(width=6.8, height=3.2, alt=alt, caption=caption, name="simclr.factors")
    for i, (column, hatch) in enumerate(zip(("pixels", "h", "z"), ("", "//", ".."))):
        at = np.arange(len(chosen)) + 0.27 * (i - 1)
        values = [max(mean[name][column], 0) for name in chosen]
        ax.bar(at, values, 0.25, label=column, color=style.COLORS[i], hatch=hatch)
    ax.set(xticks=range(len(chosen)), xticklabels=[n.replace("_", "\n") for n in chosen], ylim=(0, 104))
    ax.set_ylabel("accuracy, or 100 R² (%)")
    ax.tick_params(axis="x", labelsize=9)
    ax.legend(ncols=3, loc="lower center", bbox_to_anchor=(0.5, 1.0))
    return fig


def spectra(found: Mapping[str, Tensor], rank: Mapping[str, float]) -> style.Figure:
    """Singular values as fractions of their sum, from the largest."""
    words = ", ".join(f"{name} {value:.0f} of {len(found[name])}" for name, value in rank.items())
    caption = (
        f"Singular values of the centered features: z varies along fewer directions than h. Effective ranks: {words}."
    )
    fig, ax = style.figure(alt=f"Effective rank: {words}.", caption=caption, name="simclr.spectrum")
    for (name, q), dashes in zip(found.items(), (":", "-", "--")):
        ax.plot(range(1, len(q) + 1), q, dashes, label=f"{name}: effective rank {rank[name]:.0f} of {len(q)}")
    ax.set(xlabel="direction", ylabel="fraction of the sum", yscale="log", ylim=(1e-5, 1))
    ax.legend()
    return fig


def within_class(temperatures: Sequence[float], curve: Sequence[float], base: float) -> style.Figure:
    """The fraction of the repulsion that acts within the anchor's class."""
    caption = (
        f"At a low temperature {curve[0]:.0f} % of the repulsion acts within the anchor's own class, which has "
        f"{base:.0f} % of the negatives."
    )
    alt = f"{curve[0]:.0f} % of the repulsion is within the class at {temperatures[0]:g}, {base:.0f} % at a high one."
    fig, ax = style.figure(height=2.6, alt=alt, caption=caption, name="simclr.within")
    ax.plot(temperatures, curve, color=style.ORANGE)
    ax.axhline(base, color=style.GRAY, linestyle=":")
    ax.annotate("fraction of the negatives", (temperatures[0], base), xytext=(0, 4), textcoords="offset points")
    ax.set(xscale="log", ylim=(0, None), xlabel="temperature of the weights", ylabel="repulsion within the class (%)")
    return fig


def photographs(
    queries: Tensor, images: Tensor, found: Mapping[str, Tensor], same: Mapping[str, Tensor], shares: str
) -> style.Figure:
    """For each query one row of nearest training images for every representation in `found`, name to (n, k)."""
    k, names = next(iter(found.values())).shape[1], list(found)
    rows = len(queries) * len(names)
    inch = 0.7
    caption = (
        "Test photographs (left) and their nearest training photographs, by pixels, by the network before training "
        f"and after. Same class: {shares}. Solid frames mark the query's class, dotted ones another."
    )
    alt = f"Nearest training photographs of {len(queries)} test photographs; of the query's class are {shares}."
    size = {"width": (k + 2.9) * inch, "height": rows * inch, "squeeze": False, "least": (k + 2.9) * 66}
    ratios = {"width_ratios": [1, 1.7, *[1] * k]}
    fig, axes = style.figure(alt, rows, k + 2, caption=caption, name="simclr.photographs", **size, **ratios)
    for row in range(rows):
        query, name = row // len(names), names[row % len(names)]
        for ax in axes[row, :2]:
            ax.set_axis_off()
        if row % len(names) == 0:
            axes[row, 0].imshow(queries[query].permute(1, 2, 0))
        label = {"ha": "right", "va": "center", "fontsize": 9, "color": style.TEXT}
        axes[row, 1].text(0.95, 0.5, name.replace(" ", "\n"), transform=axes[row, 1].transAxes, **label)
        for column, at in enumerate(found[name][query].tolist()):
            ax = axes[row, column + 2]
            ax.imshow(images[at].permute(1, 2, 0))
            ax.set(xticks=[], yticks=[])
            color, line = (style.GREEN, "-") if same[name][query, column] else (style.ORANGE, ":")
            for spine in ax.spines.values():
                spine.set(visible=True, color=color, linestyle=line, linewidth=2)
    fig.get_layout_engine().set(w_pad=0.03, h_pad=0.03, wspace=0.02, hspace=0.02)
    return fig
