"""The figures of the chapter *ODC*. The cells compute what they show; here it is only plotted."""

import math
from collections.abc import Mapping, Sequence

import numpy as np
from torch import Tensor

from sslbook.book.chapters.deepcluster import figures as deepcluster
from sslbook.notebook import style
from sslbook.notebook.schematic import Diagram

FIGURES = (
    "odc.schematic",
    "odc.saw",
    "odc.memories",
    "odc.run",
    "odc.clock",
    "odc.drift",
    "odc.members",
    "odc.sizes",
    "odc.photographs",
)
MARKS = "os^Dv"
Curves = Mapping[str, Mapping[str, Sequence[float]]]


def schematic() -> Diagram:
    """Above: the two memories; below: a view of an image, which predicts its label and updates its row."""
    diagram = Diagram(
        alt="A view of image i passes through the backbone f and a neck g to a feature z. A classifier W predicts from z "
        "the label y of the image, which is read from the samples memory; the loss compares the two, and no gradient "
        "flows into the memory. Then z is mixed into the stored feature r of the image in the samples memory. The nearest "
        "centroid in the centroids memory gives the new label. Centroids are means of stored features. Only f is kept.",
        caption="ODC. The loss (below) compares a prediction with the label that the samples memory holds for the image. "
        "After that the memory's feature of this image moves toward z, and its label becomes the number of the nearest "
        "centroid. Centroids are means of stored features. No gradient enters the memories, and only f is kept.",
        name="odc.schematic",
    )
    image, view = diagram.image(0, 1.5, "image i"), diagram.view(1, 1.5, "view")
    f = diagram.network(2, 1.5, "backbone", "f", kept=True)
    g = diagram.network(3.1, 1.5, "neck", "g", thrown=True)
    z = diagram.vector(4.1, 1.5, "z")
    w = diagram.network(5.1, 1.5, "classifier", "W", thrown=True)
    loss = diagram.loss(6.6, 0.8, "cross-entropy")
    samples = diagram.vector(4.1, 0, "samples r, y")
    centroids = diagram.vector(2.2, 0, "centroids c")
    diagram.arrow(image, view, "augment")
    for start, end in ((view, f), (f, g), (g, z), (z, w), (w, loss)):
        diagram.arrow(start, end)
    diagram.arrow(z, samples, "momentum m", stop=True)
    diagram.arrow(samples, centroids, "means")
    diagram.arrow(samples, loss, "y", stop=True)
    return diagram


def saw(runs: Curves, settings: Mapping[str, int]) -> style.Figure:
    """The losses of ODC and DeepCluster, seed 0, ten steps a point."""
    K = settings["clusters"]
    ends = {name: runs[f"{name}, 0"]["loss"][-1] for name in ("DeepCluster", "ODC")}
    caption = (
        f"Seed 0, means over ten steps, for {settings['epochs']} epochs. DeepCluster's loss returns to log {K} (dotted) "
        f"with every clustering, and ends at {ends['DeepCluster']:.1f}. ODC's has no teeth, and ends at {ends['ODC']:.1f}."
    )
    alt = f"DeepCluster's loss is a saw that ends at {ends['DeepCluster']:.1f}; ODC's falls smoothly to {ends['ODC']:.1f}."
    fig, ax = style.figure(alt, width=6.4, height=2.9, caption=caption, name="odc.saw")
    for name, color in (("DeepCluster", style.ORANGE), ("ODC", style.BLUE)):
        loss = runs[f"{name}, 0"]["loss"]
        ax.plot([10 * i + 5 for i in range(len(loss))], loss, lw=1.2, color=color, label=name)
    ax.axhline(math.log(K), color=style.GRAY, ls=":")
    ax.set(xlabel="step", ylabel="loss")
    ax.legend(fontsize=8)
    return fig


def memories(u: Tensor, rows: Tensor, label: Tensor, group: Tensor, c: Tensor) -> style.Figure:
    """Images by label, stored features inside the circle, centroids; the title has the two fractions."""
    right = 100 * (label == group).double().mean().item()
    fresh = 100 * ((u @ c.T).argmax(1) == group).double().mean().item()
    alt = f"{right:.0f} % of the labels are right; {fresh:.0f} % of the present features are nearest to their centroid."
    fig, ax = style.figure(alt, width=4.2, height=3.6, caption=None)
    colors = [style.COLORS[j % len(style.COLORS)] for j in range(len(c))]
    ax.scatter(1.1 * u[:, 0], 1.1 * u[:, 1], s=14, linewidths=0, color=[colors[j] for j in label])
    ax.scatter(
        0.85 * rows[:, 0], 0.85 * rows[:, 1], s=9, facecolors="none", edgecolors=[colors[j] for j in label], lw=0.7
    )
    ax.scatter(0.65 * c[:, 0], 0.65 * c[:, 1], s=70, marker="X", color=colors, edgecolors=style.GRAY, linewidths=0.6)
    ax.set(xticks=[], yticks=[], aspect="equal", xlim=(-1.3, 1.3), ylim=(-1.3, 1.3))
    ax.set_title(
        f"labels right {right:.0f} %, present features nearest\nto their own centroid {fresh:.0f} %", fontsize=9
    )
    return fig


def run(loss: Sequence[float], curves: Mapping[str, Sequence[float]], K: int, per_epoch: int) -> style.Figure:
    """The loss with its floor, labels that change in an epoch, and NMI to the classes."""
    changed = [100 - value for value in curves["same number"]]
    classes = curves["NMI to classes"]
    floors = [floor(value / 100, K) for value in changed]
    caption = (
        f"Left: the loss, and the floor that the changed labels leave to a classifier that knows the last ones (squares). "
        f"Right: in the last epoch {changed[-1]:.0f} % of the labels change. The NMI to the ten shapes goes from "
        f"{classes[0]:.2f} to {classes[-1]:.2f}."
    )
    alt = (
        f"{changed[-1]:.0f} % of the labels change in the last epoch; the NMI to the classes ends at {classes[-1]:.2f}."
    )
    fig, axes = style.figure(alt, 1, 2, width=7.0, height=2.8, caption=caption, name="odc.run", least=480)
    epochs = [i + 1 for i in range(len(changed))]
    smooth = style.smooth(loss, 20)
    axes[0].plot(np.linspace(0, len(loss) / per_epoch, len(smooth)), smooth, lw=1.0, label="loss")
    axes[0].plot(epochs, floors, "s", ms=3.5, color=style.GREEN, label="floor")
    axes[0].axhline(math.log(K), color=style.GRAY, ls=":")
    axes[0].set(xlabel="epoch", ylabel="nats", ylim=(0, None))
    axes[0].legend(fontsize=7.5)
    axes[1].plot(epochs, changed, "o-", ms=3.5, label="labels changed")
    axes[1].plot(
        range(len(classes)), [100 * v for v in classes], "s-", ms=3.5, color=style.GREEN, label="NMI to classes"
    )
    axes[1].set(xlabel="epoch", ylabel="%", ylim=(0, 100))
    axes[1].legend(fontsize=7.5)
    return fig


def floor(rho: float, K: int) -> float:
    """The loss of the best classifier that knows the last labels, of which a fraction `rho` changed at random."""
    rho = min(max(rho, 1e-9), 1 - 1 / K)
    return -rho * math.log(rho) - (1 - rho) * math.log(1 - rho) + rho * math.log(K - 1)


def _mean(runs: Curves, name: str, what: str) -> np.ndarray:
    """Mean over seeds of one quantity's curve."""
    return np.mean([curves[what] for key, curves in runs.items() if key.rsplit(",", 1)[0] == name], axis=0)


def clock(runs: Curves, images: int) -> style.Figure:
    """kNN against passes over the images, and against the work."""
    names = list(dict.fromkeys(key.rsplit(",", 1)[0] for key in runs))
    ends = ", ".join(f"{name} {_mean(runs, name, 'kNN')[-1]:.0f} %" for name in names)
    caption = (
        f"kNN on test images, means over seeds; at the end {ends}. Left: by epochs. Right: by work, in forward passes of "
        "one image over the number of images; a training pass counts three."
    )
    fig, axes = style.figure(
        f"At the end: {ends}.", 1, 2, width=7.0, height=3.0, caption=caption, name="odc.clock", least=480, sharey=True
    )
    for name, color, mark in zip(names, style.COLORS, MARKS):
        kNN = _mean(runs, name, "kNN")
        axes[0].plot(_mean(runs, name, "epoch"), kNN, mark + "-", ms=4, color=color, label=name)
        axes[1].plot(_mean(runs, name, "passes") / images, kNN, mark + "-", ms=4, color=color)
    axes[0].set(xlabel="epoch", ylabel="kNN (%)")
    axes[1].set(xlabel="work (forward passes over the data)")
    axes[0].legend(fontsize=7.5)
    return fig


def drift(runs: Curves, every: int) -> style.Figure:
    """Labels that are the same as an epoch (DeepCluster: a clustering) ago, and NMI between the two; means over seeds."""
    same = {name: _mean(runs, name, "same number") for name in ("ODC", "DeepCluster")}
    last = {name: _mean(runs, name, "NMI to last") for name in same}
    ends = "; ".join(f"{name}: {same[name][-1]:.0f} % and {last[name][-1]:.2f}" for name in same)
    caption = (
        f"Left: images that keep the number of their cluster; right: NMI to the last clusters. ODC from epoch to epoch, "
        f"DeepCluster from clustering to clustering, every {every} epochs. Means over seeds, at the end {ends}."
    )
    fig, axes = style.figure(
        f"At the end, same number and NMI: {ends}.",
        1,
        2,
        width=7.0,
        height=2.9,
        caption=caption,
        name="odc.drift",
        least=480,
    )
    for name, color, mark in zip(same, (style.BLUE, style.ORANGE), MARKS):
        epochs = np.arange(1, len(same[name]) + 1) * (every if name == "DeepCluster" else 1)
        axes[0].plot(epochs, same[name], mark + "-", ms=3.5, color=color, label=name)
        axes[1].plot(epochs, last[name], mark + "-", ms=3.5, color=color)
    axes[0].set(xlabel="epoch", ylabel="same number (%)", ylim=(0, 100))
    axes[1].set(xlabel="epoch", ylabel="NMI to the last", ylim=(0, 1.03))
    axes[0].legend(fontsize=8)
    return fig


def members(images: Tensor, assignment: Tensor, classes: Tensor, name: str = "odc.members") -> style.Figure:
    """Six clusters of different purity, eight images each."""
    return deepcluster.members(images, assignment, classes, name)


def sizes(runs: Curves, names: Sequence[str]) -> style.Figure:
    """The perplexity of the sizes and the largest cluster over the epochs, means over seeds."""
    ends = ", ".join(
        f"{_mean(runs, n, 'clusters')[-1]:.0f} clusters, the largest {_mean(runs, n, 'largest')[-1]:.0f} % ({n})"
        for n in names
    )
    caption = f"Perplexity of the clusters' sizes (left) and the largest cluster (right), means over seeds. At the end {ends}."
    fig, axes = style.figure(
        f"At the end: {ends}.", 1, 2, width=7.0, height=3.1, caption=caption, name="odc.sizes", least=480
    )
    for name, color, mark in zip(names, style.COLORS, MARKS):
        axes[0].plot(_mean(runs, name, "perplexity"), mark + "-", ms=4, color=color, label=name)
        axes[1].plot(_mean(runs, name, "largest"), mark + "-", ms=4, color=color)
    axes[0].set(xlabel="epoch", ylabel="perplexity of the sizes", ylim=(0, None))
    axes[1].set(xlabel="epoch", ylabel="largest cluster (%)", ylim=(0, None))
    axes[0].legend(fontsize=7.5)
    return fig


def photographs(images: Tensor, assignment: Tensor, classes: Tensor) -> style.Figure:
    """`members` for photographs."""
    return deepcluster.members(images, assignment, classes, "odc.photographs")
