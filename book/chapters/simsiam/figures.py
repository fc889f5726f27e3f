"""The figures of the chapter *SimSiam*. The cells compute what they show; here it is only plotted."""

import itertools
from collections.abc import Mapping, Sequence

import numpy as np
from torch import Tensor

from sslbook.notebook import plots, style
from sslbook.notebook.schematic import Diagram

Rows = Mapping[str, Mapping[str, Sequence[float]]]

FIGURES = (
    "simsiam.schematic",
    "simsiam.alternation",
    "simsiam.thermometer",
    "simsiam.curves",
    "simsiam.neighbors",
    "simsiam.collapse",
    "simsiam.sabotage",
    "simsiam.steps",
    "simsiam.photographs",
)


def schematic() -> Diagram:
    """Both views through the same network; the predictor on one side, the stop-gradient on the other."""
    diagram = Diagram(
        alt="An image becomes two views. The same backbone f and projector g map both to projections z. The predictor q "
        "turns z of view 1 into p. The loss is minus the cosine of p and of z of view 2, and no gradient flows into that "
        "z. Only f is kept.",
        caption="SimSiam. One network sees both views. The predictor sits on one side, the gradient is stopped on the "
        "other, and there is nothing else: no negatives, no queue, no second network. Only one of the two directions is "
        "shown.",
        name="simsiam.schematic",
    )
    image = diagram.image(0, 0.7)
    ends = []
    for row in (0, 1.4):
        first = row == 0
        nodes = [
            diagram.view(1, row, "view 1" if first else "view 2"),
            diagram.network(2, row, "backbone" if first else "the same", "f", kept=True),
            diagram.network(3, row, "projector" if first else "the same", "g", thrown=True),
            diagram.vector(3.8, row, "z"),
        ]
        diagram.arrow(image, nodes[0], "augment" if first else "")
        for start, end in itertools.pairwise(nodes):
            diagram.arrow(start, end)
        ends.append(nodes[-1])
    q = diagram.network(4.6, 0, "predictor", "q", thrown=True)
    p = diagram.vector(5.4, 0, "p")
    loss = diagram.loss(6.4, 0.7, "minus\ncosine")
    diagram.arrow(ends[0], q)
    diagram.arrow(q, p)
    diagram.arrow(p, loss)
    diagram.arrow(ends[1], loss, stop=True)
    return diagram


def alternation(panels: Mapping[str, tuple[Tensor, Tensor]], number: int) -> style.Figure:
    """Features of the views, (images, views, 2), and the targets, (images, 2), of four procedures after a round."""
    measured = {}
    for name, (z, _) in panels.items():
        share = np.linalg.svd(z.flatten(0, 1).numpy(), compute_uv=False)
        share /= share.sum()
        measured[name] = z.square().sum(2).mean().sqrt().item(), float(np.exp(-(share * np.log(share)).sum()))
    words = ", ".join(f"{name} {size:.2f} and {rank:.2f}" for name, (size, rank) in measured.items())
    alt = f"Length and effective rank of the features after round {number}: {words}."
    fig, axes = style.figure(alt, 1, len(panels), width=7.2, height=2.5, caption=None, least=560)
    for ax, (name, (z, eta)) in zip(axes, panels.items()):
        for i, views in enumerate(z):
            color = style.COLORS[i % 6]
            ax.scatter(*views.T, s=7, alpha=0.45, color=color, marker="o^"[i // 6], linewidths=0)
            ax.plot(*eta[i], "x", color=color, ms=6, mew=1.8)
        ax.set(xlim=(-3.2, 3.2), ylim=(-3.2, 3.2), aspect="equal", xticks=[], yticks=[])
        size, rank = measured[name]
        ax.set_title(f"{name}\nlength {size:.2f}, rank {rank:.2f}", fontsize=9)
    return fig


def thermometer(clouds: Mapping[str, tuple[Tensor, float, float]], push: float) -> style.Figure:
    """Normalized features in the plane; for each cloud its feature_std and the formula's bound."""
    words = ", ".join(f"{name} {std:.2f}" for name, (_, std, _) in clouds.items())
    alt = f"At strength {push:g} the feature_std is: {words}."
    fig, axes = style.figure(alt, 1, len(clouds), width=6.0, height=2.9, caption=None, least=440)
    turn = np.linspace(0, 2 * np.pi, 200)
    for ax, (name, (z, std, bound)), color in zip(axes, clouds.items(), (style.BLUE, style.ORANGE)):
        ax.plot(np.cos(turn), np.sin(turn), color=style.GRAY, lw=0.8)
        ax.scatter(*z.T, s=16, alpha=0.4, color=color, linewidths=0)
        ax.set(xlim=(-1.2, 1.2), ylim=(-1.2, 1.2), aspect="equal", xticks=[], yticks=[])
        ax.axis("off")
        ax.set_title(f"{name}\nfeature_std {std:.2f}, formula {bound:.2f}", fontsize=9.5)
    return fig


def curves(log: Mapping[str, Sequence[float]]) -> style.Figure:
    """Loss and feature_std of a run."""
    loss = style.smooth(log["loss"])
    low, end = loss.min(), loss[-1]
    caption = (
        f"The loss falls to {low:.2f} and ends at {end:.2f}; -1 would be the minimum. feature_std ends at "
        f"{log['feature_std'][-1]:.2f}. Means over ten steps."
    )
    alt = f"The loss ends at {end:.2f}, feature_std at {log['feature_std'][-1]:.2f}."
    fig, axes = style.figure(columns=2, width=7.0, height=2.6, alt=alt, caption=caption, name="simsiam.curves")
    axes[0].plot(loss)
    axes[0].axhline(-1, color=style.GRAY, ls=":")
    axes[0].set(xlabel="step", ylabel="loss", ylim=(-1.05, 0.05))
    axes[1].plot(style.smooth(log["feature_std"]), color=style.GREEN)
    axes[1].set(xlabel="step", ylabel="feature_std of z", ylim=(0, 1.05))
    return fig


def neighbors(queries: Tensor, images: Tensor, same: Tensor, share: float, what: str, name: str) -> style.Figure:
    """Test images and their nearest training images, whose frames show whether the class is the same."""
    caption = (
        f"Test {what} (left) and their nearest training images. Of all neighbors of all test images {share:.0%} have the "
        "query's class; solid frames mark those, dotted frames the others."
    )
    alt = f"{len(queries)} test images with {images.shape[1]} nearest training images each."
    return plots.neighbors(queries, images, same, inch=0.6, alt=alt, caption=caption, name=name)


def collapse(runs: Mapping[str, Mapping[str, Sequence[float]]]) -> style.Figure:
    """Loss, feature_std and effective rank of z over the steps of three runs."""
    words = "; ".join(
        f"{name}: {run['loss'][-1]:.2f}, {run['feature_std'][-1]:.2f} and {run['rank of z'][-1]:.1f}"
        for name, run in runs.items()
    )
    caption = (
        "Loss, `feature_std` and effective rank of z over the steps. The loss prefers the broken runs, and `feature_std` "
        f"sees one of the two. At the end: {words}."
    )
    alt = f"Loss, feature_std and rank of z at the end. {words}."
    fig, axes = style.figure(alt, 1, 3, width=7.4, height=3.2, caption=caption, name="simsiam.collapse", least=560)
    for (name, run), color, dashes in zip(runs.items(), (style.BLUE, style.ORANGE, style.VIOLET), ("-", "--", "-.")):
        for ax, key in zip(axes, ("loss", "feature_std")):
            ax.plot(style.smooth(run[key]), dashes, color=color)
        axes[2].plot(run["at"], run["rank of z"], dashes, color=color, label=name)
    axes[0].set(xlabel="step", ylabel="loss", ylim=(-1.03, 0.05))
    axes[1].set(xlabel="step", ylabel="feature_std of z", ylim=(-0.03, 1.05))
    axes[2].set(xlabel="step", ylabel="effective rank of z", yscale="log", ylim=(0.9, None))
    handles, labels = axes[2].get_legend_handles_labels()
    fig.legend(handles, labels, loc="outside lower center", ncols=1, frameon=False)
    return fig


def sabotage(table: Rows, names: Sequence[str], base: float) -> style.Figure:
    """Linear accuracy of every variant over its loss and over the first component's share of z's variance."""
    line, loss, share = ([np.mean(table[name][key]) for name in names] for key in ("linear", "loss", "first share"))
    fit = [float(np.corrcoef(values, line)[0, 1]) for values in (loss, share)]
    worst = int(np.argmax(loss))
    rest = float(np.corrcoef(np.delete(loss, worst), np.delete(line, worst))[0, 1])
    caption = (
        "Linear accuracy of every run over its loss (left) and over the share of z's variance in its first principal "
        f"component (right); numbers as in the list, means over seeds. Correlations {fit[0]:.2f} (without run {worst + 1} "
        f"{rest:.2f}) and {fit[1]:.2f}. The dotted line is the accuracy with random weights."
    )
    alt = f"The accuracy has a correlation of {fit[0]:.2f} with the loss and of {fit[1]:.2f} with the first share."
    fig, axes = style.figure(
        alt, 1, 2, width=7.2, height=3.6, caption=caption, name="simsiam.sabotage", least=520, sharey=True
    )
    for ax, values, label in zip(axes, (loss, share), ("loss", "first component's share of z (%)")):
        ax.axhline(base, color=style.GRAY, ls=":")
        ax.plot(values, line, "o", color=style.BLUE, ms=5)
        for i, (x, y) in enumerate(zip(values, line)):
            side = (5, 3) if i % 2 else (-5, 3)
            ax.annotate(
                str(i + 1),
                (x, y),
                xytext=side,
                textcoords="offset points",
                ha="left" if i % 2 else "right",
                color=style.TEXT,
                fontsize=9,
            )
        ax.set(xlabel=label)
        ax.margins(0.08)
    axes[0].set_ylabel("linear accuracy (%)")
    return fig


def steps(table: Rows, kept: Mapping[str, int], ema: Sequence[str]) -> style.Figure:
    """Linear accuracy by how many steps the targets stay, one point a seed; runs with an EMA beside them."""
    means = {name: float(np.mean(table[name]["linear"])) for name in (*kept, *ema)}
    words = ", ".join(f"{name} {mean:.1f}" for name, mean in means.items())
    caption = (
        f"Linear accuracy on held-out images, one point a seed, by how long the targets stay. Means in %: {words}."
    )
    fig, ax = style.figure(
        width=6.6, height=3.2, alt=f"Mean accuracies: {words}.", caption=caption, name="simsiam.steps", least=480
    )
    for i, name in enumerate((*kept, *ema)):
        color, mark = (style.BLUE, "o") if name in kept else (style.ORANGE, "s")
        values = table[name]["linear"]
        ax.plot([i] * len(values), values, mark, color=color, ms=5, alpha=0.7)
        ax.plot([i - 0.25, i + 0.25], [means[name]] * 2, color=color, lw=2)
    ax.set_xticks(range(len(means)), [name.replace(", ", ",\n") for name in means], fontsize=9)
    ax.set(ylabel="linear accuracy (%)")
    return fig
