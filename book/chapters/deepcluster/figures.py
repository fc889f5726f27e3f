"""The figures of the chapter *DeepCluster*. The cells compute what they show; here it is only plotted."""

import math
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from sslbook.notebook import plots, style
from sslbook.notebook.schematic import Diagram

FIGURES = (
    "deepcluster.schematic",
    "deepcluster.kmeans",
    "deepcluster.curves",
    "deepcluster.members",
    "deepcluster.continuity",
    "deepcluster.thermometer",
    "deepcluster.photographs",
)
MARKS = "os^Dv"


def schematic() -> Diagram:
    """Above, once an epoch: all images to clusters; below, every step: a view predicts its image's cluster."""
    diagram = Diagram(
        alt="Above: all images pass through the backbone f, their features are whitened, and k-means gives each image a "
        "cluster number y. Below: a view of an image passes through the same backbone and a classifier W. The loss "
        "compares its output with y, through which no gradient flows. Only f is kept; W is new after each clustering.",
        caption="DeepCluster. Once an epoch (above) k-means on the features of all images gives each image a cluster. In "
        "every step (below) the classifier must predict from a view the cluster of its image. The backbone is the same "
        "in both. No gradient flows through the clustering, and afterwards the classifier starts anew.",
        name="deepcluster.schematic",
    )
    images, view = diagram.image(0, 0, "all images"), diagram.view(1, 1.5, "view")
    image = diagram.image(0, 1.5, "image")
    f, f_2 = diagram.network(2, 0, "backbone", "f", kept=True), diagram.network(2, 1.5, "", "f", kept=True)
    u = diagram.vector(3.2, 0, "u")
    y = diagram.vector(5.0, 0, "labels y")
    w = diagram.network(3.4, 1.5, "classifier", "W", thrown=True)
    p = diagram.vector(4.5, 1.5, "p")
    loss = diagram.loss(6.2, 0.75, "cross-entropy")
    diagram.arrow(images, f)
    diagram.arrow(f, u, "whiten")
    diagram.arrow(u, y, "k-means")
    diagram.arrow(y, loss, stop=True)
    diagram.arrow(image, view, "augment")
    for start, end in ((view, f_2), (f_2, w), (w, p), (p, loss)):
        diagram.arrow(start, end)
    return diagram


def kmeans(x: Tensor, path: Sequence[tuple[Tensor, Tensor, float]], half: int) -> style.Figure:
    """Points by cluster and centroids after some half steps, and the objective so far."""
    c, y, value = path[half]
    alt = f"After {half} half steps the objective is {value:.2f}; it began at {path[0][2]:.2f}."
    fig, axes = style.figure(alt, 1, 2, width=6.8, height=3.0, caption=None, least=480)
    axes[0].scatter(x[:, 0], x[:, 1], s=10, linewidths=0, color=[style.COLORS[j % len(style.COLORS)] for j in y])
    axes[0].scatter(c[:, 0], c[:, 1], s=70, marker="X", color=style.GRAY, edgecolors="white", linewidths=0.8)
    axes[0].set(xticks=[], yticks=[], aspect="equal")
    axes[0].set_title("color: cluster, cross: centroid", fontsize=9.5)
    axes[1].plot([point[2] for point in path[:21]], "o-", ms=3, color=style.GRAY)
    axes[1].plot(half, value, "o", ms=8, color=style.BLUE)
    axes[1].set(xlabel="half step", ylabel="objective J", ylim=(0, None))
    axes[1].set_title(f"J = {value:.2f}", fontsize=9.5)
    return fig


def curves(
    loss: Sequence[float], clusters: Mapping[str, Sequence[float]], every: int, K: int, images: int
) -> style.Figure:
    """The loss with a reset every `every` steps, and the NMI of each clustering to the last one and to the classes."""
    last, classes = clusters["NMI to last"], clusters["NMI to classes"]
    unrelated = min(1.0, (K - 1) * 9 / (2 * images) / math.sqrt(math.log(K) * math.log(10)))
    caption = (
        f"Left: the loss returns to {math.log(K):.1f} (dotted) with every new clustering. Right: the NMI to the last "
        f"clustering ends at {last[-1]:.2f}, the NMI to the ten shapes goes from {classes[0]:.2f} to {classes[-1]:.2f}; "
        f"unrelated clusters would have {unrelated:.2f} (dotted)."
    )
    alt = f"The loss is a saw. The NMI to the classes goes from {classes[0]:.2f} to {classes[-1]:.2f}."
    fig, axes = style.figure(alt, 1, 2, width=7.0, height=2.7, caption=caption, name="deepcluster.curves", least=480)
    axes[0].plot(loss, lw=0.8)
    axes[0].axhline(math.log(K), color=style.GRAY, ls=":")
    axes[0].set(xlabel="step", ylabel="loss")
    steps = [every * i for i in range(len(classes))]
    axes[1].plot(steps[1:], last, "o-", ms=3.5, label="to the last clustering")
    axes[1].plot(steps, classes, "s-", ms=3.5, color=style.GREEN, label="to the classes")
    axes[1].axhline(unrelated, color=style.GRAY, ls=":")
    axes[1].set(xlabel="step", ylabel="NMI", ylim=(0, 1))
    axes[1].legend(fontsize=7.5)
    return fig


def members(images: Tensor, assignment: Tensor, classes: Tensor, name: str = "deepcluster.members") -> style.Figure:
    """Six clusters of different purity, eight images each."""
    sizes = assignment[assignment >= 0].bincount()
    large = (sizes >= min(8, int(sizes.max()))).nonzero()[:, 0]
    purity = torch.stack([classes[assignment == j].bincount().max() / sizes[j] for j in large])
    order = purity.argsort(descending=True)
    chosen = order[torch.linspace(0, len(order) - 1, 6).long()]
    mean = (purity * sizes[large]).sum().item() / sizes[large].sum().item()
    caption = (
        f"Six of {int((sizes > 0).sum())} clusters, from the purest to the least pure, with eight of their images. On "
        f"average {mean:.0%} of a cluster's images show its most frequent class."
    )
    fig, axes = style.figure(
        f"Images of six clusters; the mean purity is {mean:.0%}.",
        6,
        8,
        width=5.2,
        height=4.0,
        caption=caption,
        name=name,
    )
    for row, j in zip(axes, chosen):
        inside = (assignment == large[j]).nonzero()[:8, 0]
        for ax in row:
            ax.axis("off")
        for ax, i in zip(row, inside):
            plots._show_image(ax, images[i])
        row[0].set_title(f"{purity[j]:.0%}", fontsize=8, loc="left")
    return fig


def continuity(runs: Mapping[str, Mapping[str, Sequence[float]]], every: int) -> style.Figure:
    """Images that keep their number, and that keep their cluster by the best matching, over the clusterings."""
    seeds = [curves for name, curves in runs.items() if name.split(",")[1].strip().isdigit()]
    same, matched = (np.mean([s[name] for s in seeds], axis=0) for name in ("same number", "matched"))
    caption = (
        f"From one clustering to the next {same[-1]:.1f} % of the images keep their number, and {matched[-1]:.0f} % keep "
        f"their cluster under the best one-to-one matching, at the end of training; {matched[0]:.0f} % at its beginning. "
        "Means over seeds."
    )
    alt = f"Same number {same[-1]:.1f} %, matched {matched[-1]:.0f} %."
    fig, ax = style.figure(alt, width=5.6, height=2.9, caption=caption, name="deepcluster.continuity")
    epochs = [every * (i + 1) for i in range(len(same))]
    ax.plot(epochs, matched, "o-", ms=4, label="same cluster, best matching")
    ax.plot(epochs, same, "s-", ms=4, color=style.ORANGE, label="same number")
    ax.set(xlabel="epoch of the clustering", ylabel="images (%)", ylim=(0, 100))
    ax.legend(fontsize=8)
    return fig


def thermometer(runs: Mapping[str, Mapping[str, Sequence[float]]], names: Sequence[str]) -> style.Figure:
    """NMI to the last clustering and to the classes over the clusterings, one color a variant; means over seeds."""

    def mean(name: str, what: str) -> np.ndarray:
        return np.mean([curves[what] for key, curves in runs.items() if key.rsplit(",", 1)[0] == name], axis=0)

    ends = ", ".join(f"{mean(n, 'NMI to last')[-1]:.2f} and {mean(n, 'NMI to classes')[-1]:.2f} ({n})" for n in names)
    caption = f"NMI to the last clustering (left) and to the classes (right), means over seeds. At the end: {ends}."
    fig, axes = style.figure(
        f"At the end: {ends}.", 1, 2, width=7.0, height=3.1, caption=caption, name="deepcluster.thermometer", least=480
    )
    for name, color, mark in zip(names, style.COLORS, MARKS):
        last = mean(name, "NMI to last")
        axes[0].plot(range(1, len(last) + 1), last, mark + "-", ms=4, color=color, label=name)
        axes[1].plot(mean(name, "NMI to classes"), mark + "-", ms=4, color=color)
    axes[0].set(xlabel="clustering", ylabel="NMI to the last", ylim=(0, 1.03))
    axes[1].set(xlabel="clustering", ylabel="NMI to the classes", ylim=(0, 1.03))
    axes[0].legend(fontsize=7.5)
    return fig


def photographs(images: Tensor, assignment: Tensor, classes: Tensor) -> style.Figure:
    """`members` for photographs."""
    return members(images, assignment, classes, "deepcluster.photographs")
