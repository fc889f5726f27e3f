"""The figures of the chapter *SwAV*. The cells compute what they show; here it is only plotted."""

import itertools
from collections.abc import Mapping, Sequence

import numpy as np
from torch import Tensor

from sslbook.notebook import plots, style
from sslbook.notebook.schematic import Diagram

FIGURES = (
    "swav.schematic",
    "swav.epsilon",
    "swav.steps",
    "swav.movie",
    "swav.rate",
    "swav.modes",
    "swav.curves",
    "swav.neighbors",
    "swav.prototypes",
    "swav.sabotage",
)


def schematic() -> Diagram:
    """Both views to scores; the codes of one view are the targets of the other."""
    diagram = Diagram(
        alt="An image becomes two views. The same backbone f and projector g map both to projections z. Scores s are "
        "the cosines of z and the prototypes. Sinkhorn turns the scores of view 2, for the whole batch, into codes q, "
        "and no gradient flows back through it. The softmax of the scores of view 1 predicts these codes. Only f is kept.",
        caption="SwAV. Prototypes turn each projection into scores. Sinkhorn makes the scores of one view into codes, "
        "such that all prototypes are equally full in the batch. The other view predicts them. Only one of the two "
        "directions is shown.",
        name="swav.schematic",
    )
    image = diagram.image(0, 0.7)
    rows = {}
    for row, number in ((0, 1), (1.4, 2)):
        nodes = [
            diagram.view(1, row, f"view {number}"),
            diagram.network(2, row, "backbone" if row == 0 else "", "f", kept=True),
            diagram.network(3, row, "projector" if row == 0 else "", "g", thrown=True),
            diagram.vector(3.8, row, "z"),
            diagram.network(4.6, row, "prototypes" if row == 0 else "", "C", widens=True, thrown=True),
            diagram.vector(5.4, row, "s"),
        ]
        diagram.arrow(image, nodes[0], "augment" if row == 0 else "")
        for start, end in itertools.pairwise(nodes):
            diagram.arrow(start, end)
        rows[number] = nodes[-1]
    p = diagram.vector(6.8, 0, "p")
    q = diagram.vector(6.8, 1.4, "q")
    loss = diagram.loss(7.9, 0.7, "cross-\nentropy")
    diagram.arrow(rows[1], p, "softmax")
    diagram.arrow(rows[2], q, "Sinkhorn", stop=True)
    diagram.arrow(p, loss)
    diagram.arrow(q, loss)
    return diagram


def codes(z: Tensor, prototypes: Tensor, q: Tensor, epsilon: float, naive: bool) -> style.Figure:
    """Points on a circle in the color of their largest share, as large as it is; and all codes."""
    share, owner = q.max(1)
    words = "" if naive else "; the direct computation gives NaN"
    alt = f"With epsilon {epsilon:g} the mean largest share of a code is {share.mean():.2f}{words}."
    fig, axes = style.figure(alt, 1, 2, width=6.6, height=3.0, caption=None, least=480)
    circle(axes[0], z, prototypes, owner, 20 + 60 * share)
    axes[0].set_title(f"mean largest share {share.mean():.2f}", fontsize=10)
    axes[1].imshow(q.T, vmin=0, vmax=1, aspect="auto")
    axes[1].set(xlabel="image", ylabel="prototype", yticks=range(len(prototypes)))
    axes[1].set_yticklabels([str(k + 1) for k in range(len(prototypes))])
    axes[1].set_title("codes: dark 0, bright 1" if naive else "directly: exp(s/ε) overflows, NaN", fontsize=10)
    return fig


def half_step(Q: Tensor, dual: float, what: str, iteration: int) -> style.Figure:
    """The plan after a half step: how full each prototype is, and the sums of all rows."""
    rows, columns = len(Q) * Q.sum(1), Q.shape[1] * Q.sum(0)
    alt = (
        f"After the {what} of iteration {iteration} the prototypes hold {columns.min():.2f} to {columns.max():.2f} and "
        f"the images give {rows.min():.2f} to {rows.max():.2f} of what they should. The dual is {dual:.4f}."
    )
    fig, axes = style.figure(alt, 1, 2, width=6.6, height=2.8, caption=None, least=480)
    fullness(axes[0], columns)
    axes[0].set_title(f"iteration {iteration}, {what}", fontsize=10)
    axes[1].plot(range(1, len(rows) + 1), rows, "o", ms=4, color=style.BLUE)
    axes[1].axhline(1, color=style.GRAY, ls=":")
    axes[1].set(xlabel="image", ylabel="sum of its row (1 is right)", yscale="log", ylim=(0.05, 10))
    axes[1].set_title(f"dual {dual:.4f}", fontsize=10)
    return fig


def circle(ax, z: Tensor, prototypes: Tensor, owner: Tensor, size: Tensor) -> None:
    turn = np.linspace(0, 2 * np.pi, 200)
    ax.plot(np.cos(turn), np.sin(turn), color=style.GRAY, lw=0.6)
    for k, c in enumerate(prototypes):
        color, mine = style.COLORS[k % 6], owner == k
        ax.scatter(*z[mine].T, s=size[mine], alpha=0.5, color=color, marker="os^Dv"[k % 5], linewidths=0)
        ax.annotate("", 0.82 * c, xytext=(0, 0), arrowprops={"arrowstyle": "->", "color": color, "lw": 2})
        ax.annotate(str(k + 1), 0.62 * c + 0.1 * c.flip(0), color=color, ha="center", va="center", fontsize=11)
    ax.set(xlim=(-1.25, 1.25), ylim=(-1.25, 1.25), aspect="equal", xticks=[], yticks=[])
    ax.axis("off")


def fullness(ax, filled: Tensor) -> None:
    names = [str(k + 1) for k in range(len(filled))]
    ax.bar(names, filled, color=[style.COLORS[k % 6] for k in range(len(filled))], alpha=0.7)
    ax.axhline(1, color=style.GRAY, ls=":")
    ax.set(xlabel="prototype", ylabel="mass it holds (1 is right)", ylim=(0, 2.2))


def movie(features: Mapping[str, Tensor], numbers: Mapping[str, float], step: int) -> style.Figure:
    """Normalized features of the same images by the variants, and how many prototypes each uses."""
    words = ", ".join(f"{name} {number:.1f}" for name, number in numbers.items())
    alt = f"After {step} steps the number of prototypes in use is: {words}."
    fig, axes = style.figure(alt, 1, len(features), width=6.6, height=2.6, caption=None, least=480)
    turn = np.linspace(0, 2 * np.pi, 200)
    for ax, (name, z), color in zip(axes, features.items(), (style.BLUE, style.ORANGE, style.VIOLET)):
        ax.plot(np.cos(turn), np.sin(turn), color=style.GRAY, lw=0.8)
        ax.scatter(z[:, 0], z[:, 1], s=16, alpha=0.5, color=color, linewidths=0)
        ax.set(xlim=(-1.2, 1.2), ylim=(-1.2, 1.2), aspect="equal", xticks=[], yticks=[])
        ax.set_title(f"{name}\n{numbers[name]:.1f} of 8 prototypes", fontsize=9.5)
        ax.axis("off")
    return fig


def rate(errors: Mapping[float, Sequence[float]], rates: Mapping[float, float]) -> style.Figure:
    """The error of the column sums over the iterations, and lines of the slope that the formula gives."""
    words = ", ".join(f"{values[2]:.0%} at ε = {epsilon:g}" for epsilon, values in errors.items())
    caption = (
        "The largest relative error of the column sums after each iteration (markers), and the slope that the second "
        f"singular value gives (dotted). After three iterations it is {words}."
    )
    fig, ax = style.figure(
        width=5.6, height=3.2, alt=f"After three iterations: {words}.", caption=caption, name="swav.rate"
    )
    for (epsilon, values), color, mark in zip(errors.items(), style.COLORS, "os^Dv"):
        steps = np.arange(1, len(values) + 1)
        ax.plot(steps, values, mark, ms=4, color=color)
        at = len(values) // 2
        ax.plot(steps, values[at] * rates[epsilon] ** (steps - steps[at]), ":", color=color, lw=1.4)
        last = max(i for i, value in enumerate(values) if value > 1e-7)  # on the axis
        ax.annotate(
            f"ε = {epsilon:g}",
            (steps[last], values[last]),
            xytext=(6, 0),
            textcoords="offset points",
            color=color,
        )
    ax.axvline(3, color=style.GRAY, lw=0.8)
    ax.set(
        xlabel="iteration", ylabel="largest error of a column", yscale="log", ylim=(1e-8, 10), xlim=(0, len(values) + 5)
    )
    return fig


def modes(shared: Tensor, growth: Tensor, epsilon: float, tau: float) -> style.Figure:
    """By how much each input direction has grown, over the correlation of the two views in it."""
    grown = int((growth > 1).sum())
    alt = f"With epsilon {epsilon:g} the threshold is {epsilon / tau:.2f}; {grown} of {len(shared)} directions grow."
    fig, ax = style.figure(width=5.0, height=3.0, alt=alt, caption=None)
    color = [style.BLUE if g > 1 else style.ORANGE for g in growth]
    for x, y, c in zip(shared, growth, color):
        ax.plot(x, y, "o" if c == style.BLUE else "s", color=c, ms=7)
    ax.axhline(1, color=style.GRAY, ls=":")
    ax.axvline(epsilon / tau, color=style.GRAY)
    right = epsilon / tau > 0.75
    ax.annotate(
        "ε/τ",
        (epsilon / tau, 40),
        xytext=(-5 if right else 5, 0),
        textcoords="offset points",
        ha="right" if right else "left",
        color=style.TEXT,
    )
    ax.set(xlabel="correlation of the two views ρ", ylabel="growth", yscale="log", xlim=(0, 1.3), ylim=(0.1, 200))
    ax.set_title(f"{grown} of {len(shared)} directions grow")
    return fig


def curves(log: Mapping[str, Sequence[float]], prototypes: int) -> style.Figure:
    """Loss and prototype perplexity of a run."""
    loss, used = style.smooth(log["loss"]), style.smooth(log["prototype_perplexity"])
    caption = (
        f"The loss starts near log {prototypes} = {np.log(prototypes):.2f} (dotted) and ends at {loss[-1]:.2f}. "
        f"The predictions use {used[-1]:.0f} of {prototypes} prototypes at the end. Means over ten steps."
    )
    alt = f"The loss ends at {loss[-1]:.2f}; {used[-1]:.0f} prototypes are in use at the end."
    fig, axes = style.figure(columns=2, width=7.0, height=2.6, alt=alt, caption=caption, name="swav.curves")
    axes[0].plot(loss)
    axes[0].axhline(np.log(prototypes), color=style.GRAY, ls=":")
    axes[0].set(xlabel="step", ylabel="loss")
    axes[1].plot(used, color=style.GREEN)
    axes[1].axhline(prototypes, color=style.GRAY, ls=":")
    axes[1].set(xlabel="step", ylabel="prototype_perplexity", ylim=(0, 1.1 * prototypes))
    return fig


def neighbors(queries: Tensor, images: Tensor, same: Tensor, share: float, what: str, name: str) -> style.Figure:
    """Test images and their nearest training images, whose frames show whether the class is the same."""
    caption = (
        f"Test {what} (left) and their nearest training images. Of all neighbors of all test images {share:.0%} have the "
        "query's class; solid frames mark those, dotted frames the others."
    )
    alt = f"{len(queries)} test images with {images.shape[1]} nearest training images each."
    return plots.neighbors(queries, images, same, inch=0.6, alt=alt, caption=caption, name=name)


def prototypes(images: Tensor, columns: int, purity: float, chance: float) -> style.Figure:
    """The images that are nearest to some prototypes, one prototype a row."""
    caption = (
        "Each row shows the images with the highest score for one prototype. The largest class of a prototype has, on "
        f"average, {purity:.0%} of its images; with random clusters of the same sizes it would be {chance:.0%}."
    )
    alt = f"{len(images) // columns} prototypes with {columns} images each."
    return plots.grid(images, columns=columns, inch=0.6, alt=alt, caption=caption, name="swav.prototypes")


def sabotage(table: Mapping[str, Mapping[str, Sequence[float]]], base: float, prototypes: int) -> style.Figure:
    """Linear accuracy over the loss of every variant; `base` is the accuracy with random weights."""
    names = [name for name in table if "loss" in table[name]]
    loss, line = ([np.mean(table[name][column]) for name in names] for column in ("loss", "linear"))
    lowest = names[int(np.argmin(loss))]
    caption = (
        "Linear accuracy over the loss at the end of every run, means over seeds; numbers as in the list above. The "
        f"lowest loss is that of “{lowest}”. The horizontal line is the accuracy with random weights, the vertical one "
        f"the loss log {prototypes} of a collapse with uniform codes."
    )
    alt = f"The lowest loss is that of {lowest}, with a linear accuracy of {line[int(np.argmin(loss))]:.0f} %."
    fig, ax = style.figure(width=6.4, height=3.8, alt=alt, caption=caption, name="swav.sabotage")
    ax.axhline(base, color=style.GRAY, ls=":")
    ax.axvline(np.log(prototypes), color=style.GRAY, ls=":")
    for i, (x, y) in enumerate(zip(loss, line)):
        ax.plot(x, y, "o", color=style.BLUE if y > base + 5 else style.ORANGE, ms=7)
        ax.annotate(str(i + 1), (x, y), xytext=(5, 4), textcoords="offset points", color=style.TEXT, fontsize=10)
    ax.set(xlabel="loss", ylabel="linear accuracy (%)")
    return fig
