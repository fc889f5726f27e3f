"""The figures of the chapter *BYOL*. The cells compute what they show; here it is only plotted."""

from collections.abc import Mapping, Sequence

import numpy as np
from torch import Tensor

from sslbook.notebook import plots, style
from sslbook.notebook.schematic import Diagram

LOW = 0.2  # a feature_std below which features lie close together

FIGURES = (
    "byol.schematic",
    "byol.movie",
    "byol.phase",
    "byol.modes",
    "byol.curves",
    "byol.neighbors",
    "byol.eigenspace",
    "byol.alignment",
    "byol.collapse",
    "byol.photographs",
)


def schematic() -> Diagram:
    """Online and target network, the predictor on one side, the stop-gradient on the other."""
    diagram = Diagram(
        alt="An image becomes two views. The online network, f, g and the predictor q, turns view 1 into a prediction p. "
        "The target network, an EMA of f and g, turns view 2 into z'. The loss compares p with z', and no gradient flows "
        "into the target network. Only f is kept.",
        caption="BYOL. The online network predicts the target network's projection of the other view. The gradient "
        "stops before the target network, whose weights follow those of the online network as an EMA. Only one of the "
        "two directions is shown: the views also change roles.",
        name="byol.schematic",
    )
    image = diagram.image(0, 0.7)
    view_1, view_2 = diagram.view(1, 0, "view 1"), diagram.view(1, 1.4, "view 2")
    f = diagram.network(2, 0, "backbone", "f", kept=True)
    g = diagram.network(3, 0, "projector", "g", thrown=True)
    z = diagram.vector(3.8, 0, "z")
    q = diagram.network(4.6, 0, "predictor", "q", thrown=True)
    p = diagram.vector(5.4, 0, "p")
    f_t = diagram.ema_network(2, 1.4, "", "f")
    g_t = diagram.ema_network(3, 1.4, "", "g")
    z_t = diagram.vector(3.8, 1.4, "z'")
    loss = diagram.loss(6.2, 0.7, "squared\ndistance")
    diagram.arrow(image, view_1, "augment")
    diagram.arrow(image, view_2)
    for start, end in ((view_1, f), (f, g), (g, z), (z, q), (q, p), (p, loss), (view_2, f_t), (f_t, g_t), (g_t, z_t)):
        diagram.arrow(start, end)
    diagram.arrow(z_t, loss, stop=True)
    diagram.ema(f, f_t, "")
    diagram.ema(g, g_t, "")
    return diagram


def movie(features: Mapping[str, Tensor], stds: Mapping[str, float], step: int) -> style.Figure:
    """Normalized features of the same images by the three variants, `name` to (n, 2)."""
    words = ", ".join(f"{name} {std:.2f}" for name, std in stds.items())
    alt = f"After {step} steps the normalized features have a feature_std of: {words}."
    fig, axes = style.figure(alt, 1, len(features), width=6.6, height=2.6, caption=None, least=480)
    turn = np.linspace(0, 2 * np.pi, 200)
    for ax, (name, z), color in zip(axes, features.items(), (style.BLUE, style.ORANGE, style.VIOLET)):
        ax.plot(np.cos(turn), np.sin(turn), color=style.GRAY, lw=0.8)
        ax.scatter(z[:, 0], z[:, 1], s=16, alpha=0.5, color=color, linewidths=0)
        ax.set(xlim=(-1.2, 1.2), ylim=(-1.2, 1.2), aspect="equal", xticks=[], yticks=[])
        ax.set_title(f"{name}\nfeature_std {stds[name]:.2f}", fontsize=9.5)
        ax.axis("off")
    return fig


def phase(paths: Tensor, low: float, high: float, decay: float) -> style.Figure:
    """Paths of (v, w), (starts, steps, 2); `low` and `high` are the fixed points of v, NaN where there are none."""
    ends = paths[:, -1].norm(dim=1) > 0.1
    share = 100 * (~ends).float().mean().item()
    alt = f"With weight decay {decay:g}, {share:.0f} % of the starting points end at zero."
    fig, ax = style.figure(width=4.2, height=3.8, alt=alt, caption=None)
    for path, lives in zip(paths, ends):
        color, dashes = (style.BLUE, "-") if lives else (style.ORANGE, "--")
        ax.plot(path[:, 0], path[:, 1], dashes, color=color, lw=1, alpha=0.8)
        ax.plot(path[-1, 0], path[-1, 1], "o" if lives else "s", color=color, ms=5)
    if low == low:
        ax.plot(low, low, "x", color=style.GRAY, ms=8)
        ax.annotate("threshold", (low, low), xytext=(6, -12), textcoords="offset points", color=style.TEXT)
    ax.set(xlabel="predictor v", ylabel="network w", xlim=(0, 1.3), ylim=(0, 1.3), aspect="equal")
    ax.set_title(f"{share:.0f} % of the starts collapse")
    return fig


def modes(signal: Tensor, found: Tensor, formula: Tensor, decay: float) -> style.Figure:
    """Eigenvalues of the trained predictor over the signal variance of their coordinate, beside the formula."""
    kept = int((formula > 0).sum())
    alt = f"With weight decay {decay:g}, {kept} of {len(signal)} modes survive."
    fig, ax = style.figure(width=5.0, height=3.0, alt=alt, caption=None)
    ax.plot(signal, formula, "x", color=style.GRAY, ms=9, label="formula")
    ax.plot(signal, found, "o", color=style.BLUE, ms=5, label="trained")
    ax.set(xlabel="variance over images λ", ylabel="eigenvalue v", xlim=(0, 1.05), ylim=(-0.03, 0.85))
    ax.set_title(f"{kept} of {len(signal)} modes survive")
    ax.legend(loc="lower right")
    return fig


def curves(log: Mapping[str, Sequence[float]]) -> style.Figure:
    """Loss and feature_std of a run."""
    loss = style.smooth(log["loss"])
    low, end = loss.min(), loss[-1]
    caption = (
        f"The loss first falls to {low:.2f} and ends at {end:.2f}; its lowest point is no sign of the best features. "
        f"feature_std is {log['feature_std'][-1]:.2f} at the end: no collapse. Means over ten steps."
    )
    alt = f"The loss falls to {low:.2f} and ends at {end:.2f}; feature_std ends at {log['feature_std'][-1]:.2f}."
    fig, axes = style.figure(columns=2, width=7.0, height=2.6, alt=alt, caption=caption, name="byol.curves")
    axes[0].plot(loss)
    axes[0].set(xlabel="step", ylabel="loss (sum of both views)", ylim=(0, None))
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


def eigenspace(row: Mapping[str, Sequence[float]], step: int) -> style.Figure:
    """What the linear predictor does to each eigenvector of the correlation, at one step of the run."""
    values, cosine = np.array(row["eigenvalues"]), np.array(row["alignment"])
    root, along = np.sqrt(values / values[0]), np.array(row["predictor"])
    along = along / max(np.abs(along).max(), 1e-9)
    aligned = int((cosine > 0.9).sum())
    alt = f"After {step} steps {aligned} of {len(values)} eigenvectors have a cosine above 0.9 with their image."
    fig, axes = style.figure(alt, 1, 2, width=6.6, height=2.8, caption=None, least=480)
    axes[0].axhline(0, color=style.GRAY, lw=0.8)
    axes[0].plot(range(1, len(values) + 1), cosine, "o", ms=4, color=style.BLUE)
    axes[0].set(xlabel="eigenvector j", ylabel="cosine of u and Vu", ylim=(-1.05, 1.05))
    axes[0].set_title(f"{aligned} of {len(values)} aligned", fontsize=10)
    axes[1].plot([0, 1], [0, 1], "--", color=style.GRAY)
    axes[1].annotate("v = √c", (0.5, 0.62), color=style.TEXT, ha="right")
    axes[1].plot(root, along, "o", ms=4, color=style.ORANGE)
    axes[1].set(xlabel="√c, relative", ylabel="v, relative", xlim=(-0.03, 1.05), ylim=(-0.4, 1.08))
    return fig


def alignment(
    steps: Sequence[int], by_vector: Sequence[Sequence[Sequence[float]]], shares: Sequence[float]
) -> style.Figure:
    """The alignment of the leading eigenvectors over the run, (vectors, seeds, steps), and their shares of the trace."""
    ends = [float(np.mean([seed[-1] for seed in seeds])) for seeds in by_vector]
    words = ", ".join(f"{end:.2f} ({100 * share:.1f} %)" for end, share in zip(ends, shares))
    caption = (
        "The cosine of the leading eigenvectors with their images over the run, one line a seed. At the end it is, with "
        f"the eigenvector's share of the variance of z, {words}."
    )
    alt = f"At the end the cosines of the {len(ends)} leading eigenvectors are {words}."
    fig, ax = style.figure(alt=alt, caption=caption, name="byol.alignment")
    for j, (seeds, color, mark) in enumerate(zip(by_vector, style.COLORS, "os^Dv")):
        for values in seeds:
            ax.plot(steps, values, mark + "-", ms=4, color=color, lw=1.2)
        ax.annotate(f"{j + 1}", (steps[-1], ends[j]), xytext=(7, -4), textcoords="offset points", color=color)
    ax.axhline(0, color=style.GRAY, lw=0.8)
    ax.set(xlabel="step", ylabel="cosine of u and Vu", ylim=(-0.4, 1.08))
    return fig


def collapse(table: Mapping[str, Mapping[str, Sequence[float]]], base: float) -> style.Figure:
    """feature_std and linear accuracy of every variant; `base` is the accuracy with random weights."""
    names = [name for name in table if "feature_std" in table[name]]
    std, line = ([np.mean(table[name][column]) for name in names] for column in ("feature_std", "linear"))
    flat = ", ".join(str(i + 1) for i, s in enumerate(std) if s < LOW)
    caption = (
        f"Linear accuracy over feature_std at the end of every run, means over seeds; numbers as in the list above. "
        f"Below a feature_std of {LOW} are the runs {flat}. The dotted line is the accuracy with random weights."
    )
    fig, ax = style.figure(
        width=6.4,
        height=3.8,
        alt=f"Below a feature_std of {LOW} are the runs {flat}.",
        caption=caption,
        name="byol.collapse",
    )
    ax.axhline(base, color=style.GRAY, ls=":")
    for i, (s, a) in enumerate(zip(std, line)):
        color, mark = (style.ORANGE, "s") if s < LOW else (style.BLUE, "o")
        ax.plot(s, a, mark, color=color, ms=7)
        ax.annotate(str(i + 1), (s, a), xytext=(5, 4), textcoords="offset points", color=style.TEXT, fontsize=10)
    ax.set(xlabel="feature_std of z", ylabel="linear accuracy (%)", xlim=(-0.03, 1.05))
    return fig
