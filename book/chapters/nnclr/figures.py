"""The figures of the chapter *NNCLR*. The cells compute what they show; here it is only plotted."""

from collections.abc import Mapping, Sequence

import numpy as np
from torch import Tensor

from sslbook.notebook import plots, style
from sslbook.notebook.schematic import Diagram

FIGURES = (
    "nnclr.schematic",
    "nnclr.graph",
    "nnclr.bootstrap",
    "nnclr.curves",
    "nnclr.agreement",
    "nnclr.neighbors",
    "nnclr.purity",
    "nnclr.photographs",
)
MARKS = "os^Dv"


def schematic() -> Diagram:
    """Two views, the support set on one side, the predictor on the other."""
    diagram = Diagram(
        alt="An image becomes two views. The backbone f and the projector g turn each into a projection. View 1's "
        "projection z is replaced by its nearest neighbor n in a support set of past projections. The predictor q turns "
        "view 2's projection into a prediction p. The loss compares n with p, and no gradient flows into n. Only f is "
        "kept.",
        caption="NNCLR. The positive of a view is the nearest neighbor of the other view among past projections: another "
        "image. The gradient stops before the support set. After the loss the new projections enter it and the oldest "
        "leave it. Only one of the two directions is shown: the views also change roles.",
        name="nnclr.schematic",
    )
    image = diagram.image(0, 0.7)
    view_1, view_2 = diagram.view(1, 0, "view 1"), diagram.view(1, 1.4, "view 2")
    f, g = diagram.network(2, 0, "backbone", "f", kept=True), diagram.network(3, 0, "projector", "g", thrown=True)
    z = diagram.vector(3.8, 0, "z")
    rows = [diagram.vector(4.6 + 0.25 * i, 0, "" if i else "support set") for i in range(3)]
    f_2, g_2 = diagram.network(2, 1.4, "", "f", kept=True), diagram.network(3, 1.4, "", "g", thrown=True)
    q = diagram.network(4.3, 1.4, "predictor", "q", thrown=True)
    p = diagram.vector(5.3, 1.4, "p")
    loss = diagram.loss(6.8, 0.7, "InfoNCE")
    diagram.arrow(image, view_1, "augment")
    diagram.arrow(image, view_2)
    for start, end in ((view_1, f), (f, g), (g, z), (view_2, f_2), (f_2, g_2), (g_2, q), (q, p), (p, loss)):
        diagram.arrow(start, end)
    diagram.arrow(z, rows[0], "search")
    diagram.arrow(rows[-1], loss, "nearest n", stop=True)
    return diagram


def graph(
    features: Tensor, classes: Tensor, nuisance: Tensor, curve: Mapping[float, float], at: float, threshold: float
) -> style.Figure:
    """Two features of every image by class (color) and nuisance (mark), and how well they tell the class over p."""
    found = curve[at]
    alt = f"With {at:.0%} of the neighbors right, the features explain {found:.0%} of the class; threshold {threshold:.0%}."
    fig, axes = style.figure(alt, 1, 2, width=6.8, height=3.1, caption=None, least=480)
    for k in range(int(classes.max()) + 1):
        for j in range(int(nuisance.max()) + 1):
            part = features[(classes == k) & (nuisance == j)]
            axes[0].scatter(
                part[:, 0], part[:, 1], s=18, alpha=0.7, linewidths=0, color=style.COLORS[k], marker=MARKS[j]
            )
    axes[0].set(xticks=[], yticks=[], xlabel="feature 1", ylabel="feature 2")
    axes[0].set_title("color: class, mark: nuisance", fontsize=9.5)
    axes[1].plot(list(curve), [100 * value for value in curve.values()], color=style.GRAY)
    axes[1].plot(at, 100 * found, "o", color=style.BLUE, ms=8)
    axes[1].axvline(threshold, color=style.ORANGE, ls="--")
    axes[1].annotate("π*", (threshold, 92), xytext=(4, 0), textcoords="offset points", color=style.ORANGE)
    axes[1].set(xlabel="purity π", ylabel="class explained (%)", ylim=(-3, 103), xlim=(0, 1))
    axes[1].set_title(f"π = {at:g}: {found:.0%}", fontsize=9.5)
    return fig


def bootstrap(paths: Mapping[float, Sequence[tuple[float, float]]], alpha: float) -> style.Figure:
    """Agreement of the neighbors in class and in nuisance over the rounds, for several starts."""
    up = [start for start, path in paths.items() if path[-1][0] > path[0][0]]
    alt = f"With augmentation of strength {alpha:g}, {len(up)} of {len(paths)} starts end with purer neighbors than they began."
    fig, axes = style.figure(alt, 1, 2, width=6.8, height=2.9, caption=None, least=480)
    for start, path in paths.items():
        color, dashes = (style.BLUE, "o-") if start in up else (style.ORANGE, "s--")
        for ax, which in zip(axes, (0, 1)):
            ax.plot([100 * point[which] for point in path], dashes, color=color, ms=3.5, lw=1.3)
    for ax, what in zip(axes, ("class", "nuisance")):
        ax.set(xlabel="round", ylabel=f"agreement in {what} (%)", ylim=(-12, 100))
    axes[0].set_title(f"α = {alpha:g}: {len(up)} of {len(paths)} starts improve", fontsize=9.5)
    return fig


def curves(log: Mapping[str, Sequence[float]], start: float, chance: float) -> style.Figure:
    """Loss of a run, and the fraction of its neighbors that show the right class."""
    loss, purity = style.smooth(log["loss"]), style.smooth(log["purity"])
    caption = (
        f"The loss goes from {loss[0]:.2f} to {loss[-1]:.2f}; equal logits give {start:.2f} (dotted). The neighbors that "
        f"show the class of their anchor go from {purity[0]:.0f} % to {purity[-1]:.0f} %, guessing is {chance:.0f} % "
        "(dotted). Means over ten steps."
    )
    alt = f"The loss ends at {loss[-1]:.2f}; the purity goes from {purity[0]:.0f} % to {purity[-1]:.0f} %."
    fig, axes = style.figure(columns=2, width=7.0, height=2.6, alt=alt, caption=caption, name="nnclr.curves")
    axes[0].plot(loss)
    axes[0].axhline(start, color=style.GRAY, ls=":")
    axes[0].set(xlabel="step", ylabel="loss")
    axes[1].plot(purity, color=style.GREEN)
    axes[1].axhline(chance, color=style.GRAY, ls=":")
    axes[1].set(xlabel="step", ylabel="right class (%)", ylim=(0, None))
    return fig


def neighbors(queries: Tensor, images: Tensor, same: Tensor, share: float, what: str, name: str) -> style.Figure:
    """Images and their nearest other images, whose frames show whether the class is the same."""
    caption = (
        f"{what[0].upper()}{what[1:]} (left) and their nearest training images. Of all neighbors of all of them {share:.0%} "
        "have the same class; solid frames mark those, dotted frames the others."
    )
    alt = f"{len(queries)} images with {images.shape[1]} nearest training images each; {share:.0%} of all neighbors are right."
    return plots.neighbors(queries, images, same, inch=0.6, alt=alt, caption=caption, name=name)


def agreement(runs: Mapping[str, Mapping[str, Sequence[float]]], factors: Sequence[str], every: int) -> style.Figure:
    """How much neighbors agree with their anchors in each factor over the steps, one panel a run."""
    ends = {run: curves[factors[0]][-1] for run, curves in runs.items()}
    words = ", ".join(f"{value:.2f} ({run})" for run, value in ends.items())
    caption = (
        "How much the nearest row of the support set agrees with its anchor in each factor, 0 for random pairs and 1 for "
        f"equal ones; means over seeds. In the {factors[0]} it ends at {words}. On the right neighbors are only measured."
    )
    fig, axes = style.figure(
        f"Agreement in the {factors[0]} ends at {words}.",
        1,
        len(runs),
        width=7.0,
        height=3.0,
        caption=caption,
        name="nnclr.agreement",
        least=480,
        sharey=True,
    )
    for ax, (run, curves) in zip(axes, runs.items()):
        for factor, color, mark in zip(factors, style.COLORS, MARKS):
            steps = [every * (i + 0.5) for i in range(len(curves[factor]))]
            ax.plot(steps, curves[factor], mark + "-", ms=3.5, lw=1.3, color=color, label=factor)
        ax.axhline(0, color=style.GRAY, lw=0.8)
        ax.set(xlabel="step")
        ax.set_title(run, fontsize=9.5)
    axes[0].set_ylabel("agreement")
    axes[0].legend(fontsize=7.5, ncol=2, loc="center right", bbox_to_anchor=(1.0, 0.58))
    return fig


def purity(curves: Mapping[str, Sequence[Sequence[float]]], every: int, chance: float) -> style.Figure:
    """The purity over the steps of several runs, `name` to one curve a seed."""
    ends = {name: float(np.mean([seed[-1] for seed in seeds])) for name, seeds in curves.items()}
    words = ", ".join(f"{end:.0f} % ({name})" for name, end in ends.items())
    caption = (
        f"Neighbors of the right class over the steps, means over seeds; guessing is {chance:.0f} % (dotted). At the end: "
        + words
        + "."
    )
    fig, ax = style.figure(f"The purity ends at {words}.", width=6.4, height=3.4, caption=caption, name="nnclr.purity")
    for (name, seeds), color, mark in zip(curves.items(), style.COLORS, MARKS):
        mean = np.mean(np.array(seeds), axis=0)
        ax.plot([every * (i + 0.5) for i in range(len(mean))], mean, mark + "-", ms=4, color=color, label=name)
    ax.axhline(chance, color=style.GRAY, ls=":")
    ax.set(xlabel="step", ylabel="neighbors of the right class (%)", ylim=(0, None))
    ax.legend(fontsize=8)
    return fig
