"""The figures of the chapter *MoCo*. The cells compute what they show; here it is only plotted."""

from collections.abc import Mapping, Sequence

import numpy as np
from torch import Tensor

from sslbook.notebook import plots, style
from sslbook.notebook.schematic import Diagram

FIGURES = (
    "moco.schematic",
    "moco.ages",
    "moco.shuffle",
    "moco.leak",
    "moco.curves",
    "moco.lag",
    "moco.agreement",
    "moco.neighbors",
    "moco.gradients",
    "moco.photographs",
)


def schematic() -> Diagram:
    """Query and key encoder, the queue beside the keys."""
    diagram = Diagram(
        alt="An image becomes two views. The query encoder, f and g, turns view 1 into a query q. The key encoder, an EMA "
        "of it, turns view 2 into a key k. The loss compares q with k and with the keys of earlier batches in a queue. No "
        "gradient flows into the keys. Only f is kept.",
        caption="MoCo. A query must find its key among the keys of earlier batches, which wait in a queue. The gradient "
        "stops before all keys; the key encoder follows as an EMA. After the loss the new keys enter the queue and the "
        "oldest leave it.",
        name="moco.schematic",
    )
    image = diagram.image(0, 0.7)
    view_1, view_2 = diagram.view(1, 0, "view 1"), diagram.view(1, 1.4, "view 2")
    f, g = diagram.network(2, 0, "backbone", "f", kept=True), diagram.network(3, 0, "projector", "g", thrown=True)
    q = diagram.vector(3.9, 0, "query q")
    f_k, g_k = diagram.ema_network(2, 1.4, "", "f"), diagram.ema_network(3, 1.4, "", "g")
    k = diagram.vector(3.9, 1.4, "key k")
    rows = [diagram.vector(4.9 + 0.3 * i, 2.2, "" if i else "queue of keys") for i in range(4)]
    loss = diagram.loss(6.2, 0.7, "InfoNCE")
    diagram.arrow(image, view_1, "augment")
    diagram.arrow(image, view_2)
    for start, end in ((view_1, f), (f, g), (g, q), (q, loss), (view_2, f_k), (f_k, g_k), (g_k, k), (k, rows[0])):
        diagram.arrow(start, end)
    diagram.arrow(k, loss, stop=True)
    diagram.arrow(rows[-1], loss, stop=True)
    diagram.ema(f, f_k, "")
    diagram.ema(g, g_k, "")
    return diagram


def ages(keys: Tensor, query: Tensor, momentum: float, spread: float) -> style.Figure:
    """Keys of one image by age, (ages, 2) on the unit circle, and the query of the same image, (2,)."""
    alt = f"With momentum {momentum:g} the keys of one image lie within {spread:.0f} degrees."
    fig, ax = style.figure(alt, width=4.0, height=3.6, caption=None)
    turn = np.linspace(0, 2 * np.pi, 200)
    ax.plot(np.cos(turn), np.sin(turn), color=style.GRAY, lw=0.8)
    ax.scatter(keys[:, 0], keys[:, 1], c=np.arange(len(keys)), cmap="viridis", s=40, zorder=3)
    ax.plot(*query, "x", color=style.ORANGE, ms=11, mew=3, zorder=4)
    ax.text(0, 0.3, "keys: dark is new,\nlight is old", color=style.TEXT, ha="center", va="center")
    ax.text(0, -0.15, "× query now", color=style.ORANGE, ha="center", va="center")
    ax.set(xlim=(-1.2, 1.2), ylim=(-1.2, 1.2), aspect="equal", xticks=[], yticks=[])
    ax.set_title(f"m = {momentum:g}: the keys span {spread:.0f}°")
    ax.axis("off")
    return fig


def shuffle(similar: Mapping[str, Tensor]) -> style.Figure:
    """Cosines of the group statistics of queries and keys, `name` to (images, images)."""
    caption = (
        "Cosines of the statistics behind which queries (rows) and keys (columns) of 32 images in groups of 8 were "
        "normalized. Without shuffling a query and its key share their statistics: the diagonal lies in bright blocks. "
        "Shuffled, the pattern no longer says which key is the positive."
    )
    alt = "Without shuffling bright blocks along the diagonal; with shuffling the pattern has nothing to do with it."
    fig, axes = style.figure(
        alt, 1, len(similar), width=6.2, height=3.0, caption=caption, name="moco.shuffle", least=420
    )
    for ax, (name, values) in zip(axes, similar.items()):
        ax.imshow(values, vmin=-1, vmax=1)
        ax.set(title=name, xlabel="key", ylabel="query", xticks=[0, 31], yticks=[0, 31])
    return fig


def leak(table: Mapping[str, Mapping[str, Sequence[float]]], sizes: Sequence[int]) -> style.Figure:
    """Positives found and kNN of the toy over the size of the groups, with and without shuffling."""
    caption = (
        "The toy after training, means over three seeds. Without shuffling (squares, dashed) small groups let the query "
        "find more positives, and kNN is none the better for it. With shuffling (dots) the size of the groups does not "
        "matter."
    )
    found = [np.mean(table[f"groups of {sizes[0]}, {how}"]["accuracy"]) for how in ("own groups", "shuffled")]
    alt = f"In groups of {sizes[0]}: {found[0]:.0f} % of the positives are found unshuffled and {found[1]:.0f} % shuffled."
    fig, axes = style.figure(alt, 1, 2, width=6.8, height=2.8, caption=caption, name="moco.leak", least=420)
    for ax, (column, label) in zip(axes, (("accuracy", "positives found (%)"), ("kNN", "kNN of the class (%)"))):
        for how, color, mark in (("own groups", style.ORANGE, "s--"), ("shuffled", style.BLUE, "o-")):
            mean = [np.mean(table[f"groups of {n}, {how}"][column]) for n in sizes]
            ax.plot(sizes, mean, mark, color=color, label=how)
        ax.set(xscale="log", xlabel="images in a group", ylabel=label, ylim=(0, None), xticks=sizes)
        ax.set_xticklabels(sizes)
        ax.minorticks_off()
    axes[0].legend()
    return fig


def curves(log: Mapping[str, Sequence[float]], start: float) -> style.Figure:
    """Loss and contrastive accuracy of a run."""
    loss, accuracy = style.smooth(log["loss"]), style.smooth(log["contrastive_accuracy"])
    caption = (
        f"The loss goes to {loss[-1]:.2f}; equal logits give {start:.2f} (dotted). At the end {accuracy[-1]:.0f} % of the "
        "queries find their key among all candidates. Means over ten steps."
    )
    alt = f"The loss ends at {loss[-1]:.2f}, the contrastive accuracy at {accuracy[-1]:.0f} %."
    fig, axes = style.figure(columns=2, width=7.0, height=2.6, alt=alt, caption=caption, name="moco.curves")
    axes[0].plot(loss)
    axes[0].axhline(start, color=style.GRAY, ls=":")
    axes[0].set(xlabel="step", ylabel="loss")
    axes[1].plot(accuracy, color=style.GREEN)
    axes[1].set(xlabel="step", ylabel="contrastive accuracy (%)", ylim=(0, None))
    return fig


def lag(rows: Sequence[Mapping[str, float]], momentum: float) -> style.Figure:
    """How far the key encoder lies behind in a run, and the formulas."""
    last = rows[-1]
    caption = (
        f"Distance of the key encoder's weights from the query encoder's, m = {momentum:g}. It stays below the bound from "
        "all step lengths and above what uncorrelated steps would give. At the end: "
        f"{last['lag']:.1f}, bound {last['bound']:.1f}, uncorrelated {last['random walk']:.1f}."
    )
    alt = f"The lag ends at {last['lag']:.1f}, between {last['random walk']:.1f} and {last['bound']:.1f}."
    fig, ax = style.figure(alt, width=5.4, height=3.0, caption=caption, name="moco.lag")
    steps = [row["step"] for row in rows]
    for name, label, color, dashes in (
        ("bound", "bound", style.GRAY, "--"),
        ("lag", "measured", style.BLUE, "-"),
        ("random walk", "uncorrelated steps", style.ORANGE, ":"),
    ):
        ax.plot(steps, [row[name] for row in rows], dashes, color=color, label=label)
    ax.set(xlabel="step", ylabel="distance of the weights", ylim=(0, None))
    ax.legend(loc="upper left", bbox_to_anchor=(0.0, 1.12))
    return fig


def agreement(
    ages_: Sequence[int], same: Mapping[str, Sequence[float]], other: Mapping[str, Sequence[float]]
) -> style.Figure:
    """Cosine of a stored key with the same key encoded now, over its age, by variant."""
    words = ", ".join(f"{name} {values[-1]:.2f}" for name, values in same.items())
    caption = (
        "Cosine of a stored key with the same image encoded again, in the middle of the run, over the key's age in steps "
        f"(solid), and with other images encoded again (dotted). At the oldest age: {words}."
    )
    fig, ax = style.figure(
        f"Cosines at the oldest age: {words}.", width=5.6, height=3.2, caption=caption, name="moco.agreement"
    )
    for (name, values), color, mark in zip(same.items(), style.COLORS, "os^D"):
        ax.plot(ages_, values, mark + "-", color=color, ms=5, label=name)
        ax.plot(ages_, other[name], ":", color=color, lw=1.4)
    ax.set(xlabel="age of the key (steps)", ylabel="cosine", ylim=(None, 1.03))
    ax.legend(loc="center", bbox_to_anchor=(0.5, 0.42), ncols=3, fontsize=9.5)
    return fig


def neighbors(queries: Tensor, images: Tensor, same: Tensor, share: float, what: str, name: str) -> style.Figure:
    """Test images and their nearest training images, whose frames show whether the class is the same."""
    caption = (
        f"Test {what} (left) and their nearest training images. Of all neighbors of all test images {share:.0%} have the "
        "query's class; solid frames mark those, dotted frames the others."
    )
    alt = f"{len(queries)} test {what} with {images.shape[1]} nearest training images each."
    return plots.neighbors(queries, images, same, inch=0.6, alt=alt, caption=caption, name=name)


def gradients(curves_: Mapping[str, Mapping[str, Sequence[float]]], rates: Sequence[str]) -> style.Figure:
    """Gradient length of the patch embedding and of the last block at every step, one panel a learning rate."""
    parts = (("patch embedding", style.ORANGE, "-"), ("last block", style.BLUE, "--"))
    rows = {rate: curves_[f"learned, learning rate {rate}"] for rate in rates}
    ratio = {rate: max(r["patch embedding"][10:]) / np.median(r["patch embedding"][10:]) for rate, r in rows.items()}
    words = ", ".join(f"{value:.1f} at {rate}" for rate, value in ratio.items())
    caption = (
        "Length of the gradient of the first and of the last layers, seed 0, patch embedding learned. The largest "
        f"gradient of the patch embedding after step 10 is so many times the median: {words}."
    )
    fig, axes = style.figure(
        f"Largest over median gradient of the patch embedding: {words}.",
        1,
        len(rates),
        width=7.2,
        height=2.7,
        caption=caption,
        name="moco.gradients",
        least=480,
        sharey=True,
    )
    for ax, rate in zip(axes, rates):
        for part, color, dashes in parts:
            ax.plot(rows[rate][part], dashes, color=color, lw=1.3, label=part)
        ax.set(yscale="log", xlabel="step", title=f"learning rate {rate}")
    axes[0].set(ylabel="length of the gradient")
    axes[0].legend(fontsize=9)
    return fig
