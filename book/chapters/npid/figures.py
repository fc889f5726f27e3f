"""The figures of the chapter *Instance discrimination*. The cells compute what they show; here it is only plotted."""

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from sslbook.notebook import plots, style
from sslbook.notebook.schematic import Diagram

FIGURES = (
    "npid.schematic",
    "npid.views",
    "npid.visits",
    "npid.offset",
    "npid.curves",
    "npid.limit",
    "npid.age",
    "npid.neighbors",
    "npid.partition",
    "npid.photographs",
)
MARKS = "os^Dv*"


def schematic() -> Diagram:
    """A view is compared with the stored features of all images; afterwards its own row is renewed."""
    diagram = Diagram(
        alt="A view of image i passes through the backbone f and the projector g and becomes a feature v of length one. "
        "The loss compares v with the rows of a memory bank, one for every image; row i must be the nearest. No "
        "gradient flows into the rows. Afterwards v is mixed into row i. Only f is kept.",
        caption="NPID. Every image is a class, and the class is represented by a stored feature of the image: its row in "
        "the memory bank. The feature v of a view must be nearer to its own row than to the rows of other images. No "
        "gradient flows into the bank; after the loss, v is mixed into the own row.",
        name="npid.schematic",
    )
    image, view = diagram.image(0, 0, "image i"), diagram.view(1, 0, "view")
    f, g = diagram.network(2, 0, "backbone", "f", kept=True), diagram.network(3, 0, "projector", "g", thrown=True)
    v = diagram.vector(3.9, 0, "v")
    rows = [diagram.vector(3.4 + 0.25 * k, 1.5, "memory bank, a row per image" if k == 2 else "") for k in range(5)]
    loss = diagram.loss(5.8, 0.75, "softmax\nor NCE")
    diagram.arrow(image, view, "augment")
    for start, end in ((view, f), (f, g), (g, v), (v, loss)):
        diagram.arrow(start, end)
    diagram.arrow(rows[-1], loss, stop=True)
    diagram.arrow(v, rows[2], "into row i", stop=True, out="bottom", into="top")
    return diagram


def views(
    x: Tensor, group: Tensor, sigma: float, probability: Tensor, loss: float, floor: float, name: str | None = None
) -> style.Figure:
    """The images with the width of their views, and the probability of class j for views of image i."""
    off = ~torch.eye(len(x), dtype=torch.bool)
    same = (group[:, None] == group) & off
    part = ((probability * same).sum() / (probability * off).sum()).item()
    alt = (
        f"Width {sigma:g}: loss {loss:.2f}, floor {floor:.2f}; {part:.0%} of the wrong probability is in the own group."
    )
    fig, axes = style.figure(alt, 1, 2, width=6.8, height=3.3, caption=None, name=name, least=480)
    for k in range(int(group.max()) + 1):
        points = x[group == k]
        axes[0].scatter(points[:, 0], points[:, 1], s=12, color=style.COLORS[k % 6], marker=MARKS[k % 6], zorder=3)
    turn = np.linspace(0, 2 * np.pi, 60)
    for a, b in x.tolist():
        axes[0].plot(a + sigma * np.cos(turn), b + sigma * np.sin(turn), color=style.GRAY, lw=0.5, alpha=0.5)
    axes[0].set(xticks=[], yticks=[], aspect="equal", xlim=(-4, 4), ylim=(-4, 4))
    axes[0].set_title(f"views of width σ = {sigma:g}", fontsize=9.5)
    axes[1].imshow(probability.sqrt(), vmin=0, vmax=1)
    axes[1].set(xticks=[], yticks=[], xlabel="class j", ylabel="image i")
    axes[1].set_title(f"loss {loss:.2f}, floor {floor:.2f}; wrong, own group: {part:.0%}", fontsize=9.5)
    return fig


def visits(path: Sequence[tuple[bool, float]]) -> style.Figure:
    """One weight's product with its image's feature over the steps, with the visits marked."""
    values = [value for _, value in path]
    seen = [step for step, (visit, _) in enumerate(path) if visit]
    caption = (
        f"The logit of one class for its own image, over {len(path)} steps. It rises at the {len(seen)} visits of the "
        f"image (dots) and falls between them, since all other features share a direction with its own."
    )
    fig, ax = style.figure(
        f"The logit rises at {len(seen)} visits and falls between.", height=2.5, caption=caption, name="npid.visits"
    )
    ax.plot(values, lw=1.2)
    ax.plot(seen, [values[s] for s in seen], "o", color=style.ORANGE, ms=6)
    ax.set(xlabel="step", ylabel="own logit")
    return fig


def offset(cosine: Tensor, probability: Tensor, push: float, pull: float, c: float) -> style.Figure:
    """The probability of being the right row, of every row of the bank, and the total push and pull."""
    alt = f"Constant {c:g} times the sum: push {push:.2f}, pull {pull:.2f}."
    fig, axes = style.figure(
        alt, 1, 2, width=6.8, height=2.9, caption=None, least=480, gridspec_kw={"width_ratios": [2, 1]}
    )
    axes[0].scatter(cosine[1:], probability[1:], s=6, color=style.ORANGE, linewidths=0)
    axes[0].plot(cosine[0], probability[0], "s", color=style.BLUE, ms=8)
    axes[0].annotate(
        "own row", (cosine[0], probability[0]), xytext=(0, 8), textcoords="offset points", ha="center", color=style.BLUE
    )
    axes[0].set(xlabel="cosine of row and feature", ylabel="D", ylim=(-0.03, 1.15))
    bars = axes[1].bar(["push", "pull"], [push, pull], color=[style.ORANGE, style.BLUE])
    bars[0].set_hatch("//")
    axes[1].set(yscale="log", ylim=(1e-3, 100), ylabel="weight, all rows")
    axes[1].set_title(f"c = {c:g}: {push:.2g} and {pull:.2g}", fontsize=9.5)
    return fig


def curves(log: Mapping[str, Sequence[float]], per_epoch: int, n: int) -> style.Figure:
    """Loss, accuracy and cosine to the own row over the epochs."""
    over = [np.arange(len(style.smooth(log["loss"], per_epoch))) / per_epoch + 1]
    loss, accuracy, own = (style.smooth(log[key], per_epoch) for key in ("loss", "accuracy", "own row"))
    caption = (
        f"Means over an epoch. Left: the loss goes from {loss.max():.1f} to {loss[-1]:.1f}; equal probabilities give "
        f"log {n} = {np.log(n):.1f} (dotted). At the end the own row is the nearest for {accuracy[-1]:.0f} % of the "
        f"views, of {n}. Right: the cosine of a feature and its own row, which is an epoch old, ends at {own[-1]:.2f}."
    )
    fig, axes = style.figure(
        f"The loss ends at {loss[-1]:.1f}, the accuracy at {accuracy[-1]:.0f} %, the cosine at {own[-1]:.2f}.",
        1,
        2,
        width=7.0,
        height=2.6,
        caption=caption,
        name="npid.curves",
        least=480,
    )
    axes[0].plot(over[0], loss)
    axes[0].axhline(np.log(n), color=style.GRAY, ls=":")
    axes[0].set(xlabel="epoch", ylabel="loss")
    axes[1].plot(over[0], own, color=style.GREEN)
    axes[1].set(xlabel="epoch", ylabel="cosine to the own row", ylim=(0, 1))
    return fig


def limit(rows: Mapping[str, Mapping[str, Sequence[float]]], steps: int, batch: int, random: float) -> style.Figure:
    """Linear probe and cosine to the own class over the number of images, weights and memory."""
    sizes = [int(name.split(", ")[1]) for name in rows if name.startswith("memory")]
    visits = [steps * batch / n for n in sizes]

    def mean(kind: str, column: str) -> np.ndarray:
        return np.array([np.mean(rows[f"{kind}, {n}"][column]) for n in sizes])

    ends = {kind: mean(kind, "linear") for kind in ("memory", "weights", "slow weights")}
    caption = (
        f"{steps} steps each. From {sizes[0]} images ({visits[0]:.0f} visits of each) to {sizes[-1]} "
        f"({visits[-1]:.0f} visits) the linear probe goes from {ends['memory'][0]:.0f} to {ends['memory'][-1]:.0f} % "
        f"with a memory bank, from {ends['weights'][0]:.0f} to {ends['weights'][-1]:.0f} % with a weight per image, and "
        f"from {ends['slow weights'][0]:.0f} to {ends['slow weights'][-1]:.0f} % with weights that learn slowly; "
        f"random weights of the network: {random:.0f} % (dotted). Right: the cosine of a feature to the vector of its "
        "class. Means over seeds."
    )
    alt = f"At {sizes[-1]} images: memory {ends['memory'][-1]:.0f} %, weights {ends['weights'][-1]:.0f} %."
    fig, axes = style.figure(alt, 1, 2, width=7.0, height=2.8, caption=caption, name="npid.limit", least=480)
    labels = {"memory": "memory bank", "weights": "a weight per image", "slow weights": "slow weights"}
    for (kind, label), mark in zip(labels.items(), ("o-", "s--", "^:")):
        axes[0].plot(sizes, ends[kind], mark, ms=5, label=label)
        axes[1].plot(sizes, mean(kind, "own row"), mark, ms=5)
    axes[0].axhline(random, color=style.GRAY, ls=":")
    axes[0].set(xscale="log", xlabel="images", ylabel="linear probe (%)", ylim=(0, None))
    axes[1].set(xscale="log", xlabel="images", ylabel="cosine to own class", ylim=(0, 1))
    for ax in axes:
        ax.set_xticks(sizes, [str(n) for n in sizes], minor=False)
        ax.minorticks_off()
    axes[0].legend(fontsize=8)
    return fig


def age(found: Mapping[str, Mapping[str, Sequence[float]]], per_epoch: int) -> style.Figure:
    """Cosine of a stored feature with the same view encoded again, by age; one line an epoch of the run."""
    last = list(found)[-1]
    first = next(iter(found))
    end = {name: values["same view"][-1] for name, values in found.items()}
    caption = (
        f"Cosine of a feature and the same view encoded by the network of now, over the feature's age; one line for the "
        f"time of the run. Two epochs old: {end[first]:.2f} after {first}, {end[last]:.2f} after {last}. Dotted: two "
        f"views of one image, and (dash-dotted) two images, both encoded now, after {last}."
    )
    alt = f"Two epochs old: {end[first]:.2f} after {first}, {end[last]:.2f} after {last}."
    fig, ax = style.figure(alt, width=5.8, height=3.2, caption=caption, name="npid.age")
    for (name, values), mark in zip(found.items(), MARKS):
        ages = np.arange(1, len(values["same view"]) + 1) / per_epoch
        ax.plot(ages, values["same view"], mark + "-", ms=3.5, markevery=4, lw=1.5, label=f"after {name}")
    ax.axhline(found[last]["two views"][0], color=style.GRAY, ls=":")
    ax.axhline(found[last]["other image"][0], color=style.GRAY, ls="-.")
    ax.set(xlabel="age (epochs)", ylabel="cosine", ylim=(min(0, found[last]["other image"][0]) - 0.02, 1.02))
    ax.legend(fontsize=7.5, loc="lower left")
    return fig


def neighbors(queries: Tensor, found: Tensor, same: Tensor, purity: float, what: str, name: str) -> style.Figure:
    """Test images with their nearest training images."""
    return plots.neighbors(
        queries,
        found,
        same,
        alt=f"{len(queries)} test {what} with {found.shape[1]} nearest training {what} each.",
        caption=f"Test {what} (left) and their nearest training {what}. Of all neighbors of all test {what}, "
        f"{100 * purity:.0f} % have the query's class; solid frames mark those, dotted frames the others.",
        name=name,
        inch=0.62,
    )


def partition(runs: Mapping[str, Mapping[str, Sequence[float]]], every: int) -> style.Figure:
    """log Z/n over the steps, and the constant (dotted) that NCE uses."""
    names = list(runs)
    ends = "; ".join(
        f"{name} {runs[name]['log Z/n'][-1]:.1f}"
        + (f" with the constant at {runs[name]['log constant/n'][-1]:.1f}" if "log constant/n" in runs[name] else "")
        for name in names
    )
    start = runs[names[0]]["log Z/n"]
    caption = (
        f"The true sum, log Z/n, over the steps (solid) and the constant that NCE used (dotted), seed 0. With the full "
        f"softmax it starts at {start[0]:.1f} and is {max(start):.1f} at its highest. At the end: {ends}."
    )
    fig, ax = style.figure(f"At the end: {ends}.", width=6.6, height=3.4, caption=caption, name="npid.partition")
    for name, color, mark in zip(names, style.COLORS, MARKS):
        steps = every * np.arange(len(runs[name]["log Z/n"]))
        ax.plot(steps, runs[name]["log Z/n"], mark + "-", color=color, ms=3.5, markevery=10, lw=1.5, label=name)
        if "log constant/n" in runs[name]:
            ax.plot(steps, runs[name]["log constant/n"], ":", color=color, lw=1.5)
    ax.set(xlabel="step", ylabel="log Z / n")
    ax.legend(fontsize=7.5)
    return fig
