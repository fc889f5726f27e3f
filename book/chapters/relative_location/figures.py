"""The figures of the chapter *Relative location and jigsaw*. The cells compute what they show; here it is only plotted."""

from collections.abc import Callable, Mapping, Sequence

import numpy as np
from torch import Tensor

from sslbook.notebook import plots, style
from sslbook.notebook.schematic import Diagram

FIGURES = (
    "relative_location.lens",
    "relative_location.schematic",
    "relative_location.toy",
    "relative_location.gap",
    "relative_location.distances",
    "relative_location.ambiguity",
    "relative_location.positions",
    "relative_location.neighbors",
    "relative_location.noise",
    "relative_location.classes",
    "relative_location.photographs",
)


def lens(images: Mapping[float, Tensor], accuracy: Mapping[float, float]) -> Callable[[float], style.Figure]:
    """Frames over the lens: noise seen through it, and how well a position is read off its color fringes."""
    strengths = list(accuracy)

    def plot(kappa: float) -> style.Figure:
        alt = f"Red scaled by {kappa:.2%}: the cell of a patch is found with {accuracy[kappa]:.0f} % accuracy."
        fig, (left, right) = style.figure(alt, 1, 2, width=6.4, height=2.8, caption=None, least=460)
        left.imshow(images[kappa].permute(1, 2, 0), interpolation="nearest")
        left.set_axis_off()
        left.set_title(f"red scaled by {kappa:.2%}", fontsize=10)
        right.plot([100 * k for k in strengths], list(accuracy.values()), "o-", color=style.BLUE, ms=4)
        right.plot([100 * kappa], [accuracy[kappa]], "o", color=style.ORANGE, ms=9)
        right.axhline(12.5, color=style.GRAY, ls=":")
        right.set(xlabel="scaling of red, %", ylabel="location accuracy, %", xscale="log", ylim=(0, 102))
        return fig

    return plot


def schematic() -> Diagram:
    """Nine patches, one backbone; two of them for relative location, all nine in shuffled order for jigsaw."""
    d = Diagram(
        name="relative_location.schematic",
        alt="An image is cut into nine patches with gaps between them. One backbone f encodes each patch by itself. Relative "
        "location gives a head the features of the center and of one neighbor, and classifies one of 8 positions. Jigsaw "
        "gives a head all nine in shuffled order and classifies one of K permutations. Only f is kept.",
        caption="Both methods cut nine patches and encode each by itself with one backbone. Above, relative location: the head "
        "sees two of them and predicts one of 8 positions. Below, jigsaw: the head sees all nine in a shuffled order and "
        "predicts which of K orders it is. Only the backbone is kept.",
    )
    image = d.image(0, 0.75)
    for row, shown, words, head, loss in (
        (0, "000 010 001", "center and\none neighbor", "head", "which of\n8 positions"),
        (1.5, "111 111 111", "all nine,\nshuffled", "head", "which of\nK orders"),
    ):
        patches = d.patches(1.35, row, words, shown)
        f = d.network(2.7, row, "each patch\nalone", "f", kept=True)
        h = d.vector(3.6, row, "features")
        g = d.network(4.5, row, head, "g", thrown=True)
        end = d.loss(5.7, row, loss)
        d.arrow(image, patches)
        for start, stop in ((patches, f), (f, h), (h, g), (g, end)):
            d.arrow(start, stop)
    return d


def toy(
    scenes: Mapping[float, tuple[Tensor, Tensor]], accuracy: Mapping[str, Mapping[float, float]]
) -> Callable[[float], style.Figure]:
    """Frames over how often a letter is correct: a scene of each kind, and the best accuracies."""

    def plot(rho: float) -> style.Figure:
        alt = f"Letters correct with probability {rho:g}. Best accuracy: " + ", ".join(
            f"{name} {values[rho]:.0%}" for name, values in accuracy.items()
        )
        fig, axes = style.figure(alt, 1, 3, width=7.4, height=2.7, caption=None, least=560, width_ratios=(1, 1, 1.7))
        for ax, scene, title in zip(axes, scenes[rho], ("fixed layout", "unknown shift")):
            ax.imshow(scene, cmap=style.MAP, vmin=0, vmax=24)
            for i, row in enumerate(scene.tolist()):
                for j, part in enumerate(row):
                    ax.text(j, i, chr(65 + part), ha="center", va="center", color="white" if part < 14 else "black")
            ax.set_axis_off()
            ax.set_title(title, fontsize=10)
        marks = zip(accuracy.items(), style.COLORS, ("-", "--", ":"))
        for (name, values), color, dashes in marks:
            axes[2].plot(list(values), [100 * v for v in values.values()], dashes, color=color, label=name)
            axes[2].plot([rho], [100 * values[rho]], "o", color=color)
        axes[2].legend(loc="upper left", fontsize=8)
        axes[2].set(xlabel="probability that a letter is correct", ylabel="best accuracy, %", ylim=(0, 112))
        return fig

    return plot


def gap(
    pairs: Mapping[int, Tensor], fixed: Mapping[int, float], jittered: Mapping[int, float]
) -> Callable[[int], style.Figure]:
    """Frames over the gap: a center and its neighbor to the right, and the accuracy of the best classifier."""

    def plot(gap: int) -> style.Figure:
        alt = f"At a mean gap of {gap} pixels the best accuracy is {100 * fixed[gap]:.0f} % without jitter and "
        alt += f"{100 * jittered[gap]:.0f} % with it."
        fig, (left, right) = style.figure(
            alt, 1, 2, width=6.6, height=2.7, caption=None, least=480, width_ratios=(1.2, 1.4)
        )
        left.imshow(pairs[gap], cmap="gray", vmin=-2.5, vmax=2.5)
        left.set_axis_off()
        left.set_title(f"gap of {gap} pixels", fontsize=10)
        for found, color, mark, name in (
            (fixed, style.BLUE, "o-", "without jitter"),
            (jittered, style.ORANGE, "s--", "with jitter"),
        ):
            right.plot(list(found), [100 * v for v in found.values()], mark, color=color, ms=4, label=name)
        right.axvline(gap, color=style.GRAY, lw=0.8)
        right.axhline(12.5, color=style.GRAY, ls=":")
        right.legend(fontsize=8)
        right.set(xlabel="mean gap, pixels", ylabel="best accuracy, %", ylim=(0, 100))
        return fig

    return plot


def distances(counts: Mapping[str, Sequence[float]]) -> style.Figure:
    """How many other permutations stand at each Hamming distance, on average, for several sets of one size."""
    nearest = {name: next(d for d, n in enumerate(row) if n > 0) for name, row in counts.items()}
    words = "; ".join(f"{name}: {d}" for name, d in nearest.items())
    fig, axes = style.figure(
        f"The nearest two permutations differ in so many positions: {words}.",
        1,
        len(counts),
        width=7.4,
        height=2.5,
        name="relative_location.distances",
        caption="Hamming distances in four sets of equal size: the number of other permutations at each distance, on average, "
        "on a logarithmic axis. The averages of the first three hardly differ. The nearest two differ in so many of nine "
        f"positions: {words}.",
        least=560,
        sharey=True,
    )
    for ax, (name, row), color in zip(axes, counts.items(), (style.GRAY, style.ORANGE, style.BLUE, style.GREEN)):
        ax.bar(range(2, 10), row[2:], color=color)
        ax.set_title(name, fontsize=9)
        ax.set(xlabel="distance", yscale="log", xticks=(2, 4, 6, 8))
        ax.minorticks_off()
    axes[0].set(ylabel="other permutations")
    return fig


def ambiguity(q: Sequence[float], found: Mapping[str, Sequence[float]]) -> style.Figure:
    """Best jigsaw accuracy over the probability that a patch is recognized."""
    middle = len(q) // 2
    words = "; ".join(f"{name}: {values[middle]:.0f} %" for name, values in found.items())
    fig, ax = style.figure(
        f"With {q[middle]:.0%} of the patches recognized: {words}.",
        width=6.2,
        name="relative_location.ambiguity",
        caption="The best possible jigsaw accuracy if every patch is recognized with probability q and the others look alike. "
        f"At q = {q[middle]:g}: {words}. A hundred near permutations are harder to distinguish than a thousand far ones.",
    )
    for (name, values), color, dashes in zip(found.items(), style.COLORS, ("-", "--", ":", "-.")):
        ax.plot(q, values, dashes, color=color, label=name)
    ax.legend(fontsize=8, loc="lower right")
    ax.set(xlabel="probability that a patch is recognized, q", ylabel="best accuracy, %", ylim=(0, 102))
    return fig


def positions(accuracy: Tensor, confusion: Tensor) -> style.Figure:
    """Location accuracy at each of the eight positions, and what is predicted for whom."""
    names = ("above left", "above", "above right", "left", "right", "below left", "below", "below right")
    best, worst = int(accuracy.argmax()), int(accuracy.argmin())
    alt = f"Most accurate {names[best]} ({accuracy[best]:.0f} %), least {names[worst]} ({accuracy[worst]:.0f} %)."
    fig, (left, right) = style.figure(
        alt,
        1,
        2,
        width=7.0,
        height=3.0,
        name="relative_location.positions",
        caption=f"Left, location accuracy at each position around the center, in %; {alt[0].lower() + alt[1:]} Right, the "
        "fraction of each prediction (columns) for each true position (rows), in reading order.",
        least=520,
    )
    board = np.full(9, np.nan)
    board[[0, 1, 2, 3, 5, 6, 7, 8]] = accuracy
    left.imshow(board.reshape(3, 3), cmap=style.MAP, vmin=0, vmax=100)
    for k, value in enumerate(board):
        text = "center" if np.isnan(value) else f"{value:.0f}"
        left.text(
            k % 3,
            k // 3,
            text,
            ha="center",
            va="center",
            color="black" if value > 55 else style.GRAY if np.isnan(value) else "white",
        )
    left.set(xticks=[], yticks=[])
    image = right.imshow(confusion, cmap=style.MAP, vmin=0)
    right.set(xlabel="predicted", ylabel="true", xticks=range(8), yticks=range(8))
    right.set_xticklabels(range(1, 9))
    right.set_yticklabels(range(1, 9))
    fig.colorbar(image, ax=right, shrink=0.8)
    return fig


def neighbors(queries: Tensor, found: Tensor, same: Tensor, share: float, what: str, name: str) -> style.Figure:
    """Test images with their nearest training images."""
    return plots.neighbors(
        queries,
        found,
        same,
        name=name,
        alt=f"{len(queries)} test {what} with {found.shape[1]} nearest training images each.",
        caption=f"Test {what} (left) and their nearest training images. Of all neighbors of all test images {share:.0%} have "
        "the query's class; solid frames mark those, dotted frames the others.",
    )


def noise(found: Mapping[str, Sequence[float]]) -> style.Figure:
    """Location accuracy of a trained network on images without objects."""
    rows = list(found)
    means = [float(np.mean(found[row])) for row in rows]
    high, low = int(np.argmax(means)), int(np.argmin(means))
    alt = f"From {means[high]:.0f} % ({rows[high]}) down to {means[low]:.0f} % ({rows[low]})."
    fig, ax = style.figure(
        alt,
        width=6.6,
        height=4.0,
        name="relative_location.noise",
        caption="Relative location trained on images without objects: the accuracy is all shortcut. Bars are means over seeds, "
        f"dots are seeds, the dotted line is the chance level of 12.5 %. {alt}",
    )
    for at, (row, mean) in enumerate(zip(rows, means)):
        ax.barh(at, mean, color=style.BLUE if "lens" in row else style.ORANGE, alpha=0.6)
        ax.plot(found[row], [at] * len(found[row]), "o", color=style.TEXT, ms=3)
    ax.axvline(12.5, color=style.GRAY, ls=":")
    ax.set_yticks(range(len(rows)), rows, fontsize=8)
    ax.invert_yaxis()
    ax.set(xlabel="location accuracy, %", xlim=(0, 102))
    return fig


def classes(counts: Sequence[int], found: Mapping[str, Mapping[str, Sequence[float]]]) -> style.Figure:
    """Jigsaw accuracy and linear accuracy of the features over the number of permutations."""
    rows = [found[f"{count} permutations"] for count in counts]
    task, linear = ([float(np.mean(row[column])) for row in rows] for column in ("task", "linear"))
    alt = f"From {counts[0]} to {counts[-1]} permutations the jigsaw accuracy goes from {task[0]:.0f} to {task[-1]:.0f} %, the "
    alt += f"linear accuracy of shape from {linear[0]:.0f} to {linear[-1]:.0f} %."
    fig, ax = style.figure(
        alt,
        width=5.8,
        name="relative_location.classes",
        caption=f"Jigsaw at equal steps and batches (means; dots are seeds). {alt}",
    )
    for column, means, name, color, mark in (
        ("task", task, "jigsaw accuracy", style.ORANGE, "s--"),
        ("linear", linear, "linear accuracy", style.BLUE, "o-"),
    ):
        ax.plot(counts, means, mark, color=color)
        for count, row in zip(counts, rows):
            ax.plot([count] * len(row[column]), row[column], mark[0], color=color, ms=4, alpha=0.6)
        ax.annotate(name, (counts[-1], means[-1]), xytext=(8, -3), textcoords="offset points", color=color)
    ax.set(xlabel="number of permutations", ylabel="accuracy, %", xscale="log", ylim=(0, 102))
    ax.set_xlim(counts[0] * 0.8, counts[-1] * 6)
    ax.set_xticks(counts, [str(count) for count in counts])
    ax.minorticks_off()
    return fig
