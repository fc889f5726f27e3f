"""Figures of the chapter *Learning without labels*."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from sslbook import default_device
from sslbook.data.datasets.shapes import NUISANCES, Shapes
from sslbook.data.executors import apply_batch
from sslbook.data.loader import Data
from sslbook.data.views import View
from sslbook.evaluation import extract_features, knn
from sslbook.notebook import plots, style
from sslbook.notebook.photographs import Photographs
from sslbook.notebook.schematic import Diagram

FIGURES = (
    "first.shapes",
    "first.schematic",
    "first.knobs",
    "first.vote",
    "first.units",
    "first.coverage",
    "first.optimism",
    "first.views",
    "first.loss",
    "first.labels",
    "first.neighbors",
    "first.projections",
    "first.collapse",
    "first.leak",
    "first.photographs",
    "first.photographs_pixels",
)

BESIDE: Any = {"xytext": (8, 0), "textcoords": "offset points"}  # of a label: to the right of its point


def knobs(knob: str, level: float) -> style.Figure:
    """The ten shapes with one nuisance at a level and every other off."""
    off = {name: 0.0 for name in NUISANCES}
    shown, factors = Shapes(num_train=60, num_test=1, size=24, **{**off, knob: level}).render("train")
    first = [int((factors["shape"] == c).nonzero()[0]) for c in range(10)]
    alt = f"The ten shapes with {knob} at {level:g} and every other nuisance off."
    return plots.grid(shown[first], columns=5, inch=0.7, alt=alt, caption=None)


def vote(
    angle: Tensor, posterior: Tensor, share: Tensor, sample: Tensor, side: Tensor, accuracy: float, best: float
) -> style.Figure:
    """The fraction of the vote over the circle, beside the true probability of the orange class."""
    alt = f"The vote is correct with probability {accuracy:.1%}; the best possible rule with {best:.1%}."
    fig, ax = style.figure(alt=alt, caption=None, width=4.4, height=2.4)
    ax.plot(angle, posterior, color=style.GRAY)
    ax.plot(angle, share, color=style.ORANGE)
    ax.plot(sample[side == 1], [1.06] * int((side == 1).sum()), "|", color=style.ORANGE)
    ax.plot(sample[side == 0], [-0.06] * int((side == 0).sum()), "|", color=style.BLUE)
    ax.set(xlabel="angle of the feature (radians)", ylabel="fraction of the vote")
    ax.set_title(f"accuracy {accuracy:.1%}, best possible {best:.1%}")
    return fig


def units(scale: float, path: Tensor, loss: Callable[[Tensor], Tensor], above: float) -> style.Figure:
    """Contours of a logistic loss and a path of gradient descent, in the coordinates of the unscaled features."""
    alt = f"With the second feature multiplied by {scale:g}, 60 steps end {above:.3f} above the lowest loss."
    fig, ax = style.figure(alt=alt, caption=None, width=4.2, height=2.6)
    a, b = torch.meshgrid(torch.linspace(-0.5, 3, 60), torch.linspace(-0.5, 3, 60), indexing="ij")
    ax.contour(a, b, loss(torch.stack([a, b / scale], -1)), levels=9, linewidths=0.7)
    ax.plot(path[:, 0], path[:, 1] * scale, "o-", ms=3, lw=1, color=style.ORANGE)
    ax.set(xlabel="weight of the first feature", ylabel="weight of the second × scale")
    ax.set_title(f"after 60 steps {above:.3f} above the minimum")
    return fig


def coverage(accuracy: Tensor, usual: Mapping[int, Tensor], wilson: Mapping[int, Tensor], **named: str) -> style.Figure:
    """How often two intervals hold the true accuracy; each mapping is from the number of test images to fractions."""
    parts = ". ".join(
        f"With {m} test images the usual interval covers the true value in as little as {100 * usual[m].min():.0f} % "
        f"of cases, Wilson's in at least {100 * wilson[m].min():.0f} %"
        for m in usual
    )
    fig, axes = style.figure(alt=parts + ".", rows=1, columns=len(usual), width=6.4, height=2.5, sharey=True, **named)
    for ax, m in zip(axes, usual):
        ax.plot(100 * accuracy, 100 * usual[m], color=style.ORANGE, lw=1)
        ax.plot(100 * accuracy, 100 * wilson[m], color=style.BLUE, lw=1)
        ax.axhline(95, color=style.GRAY, lw=1, ls=":")
        ax.set(xlabel="true accuracy (%)", ylim=(40, 101), title=f"{m} test images")
    axes[0].set(ylabel="covers it (%)")
    axes[0].annotate("usual", (4, 62), color=style.ORANGE)
    axes[-1].annotate("Wilson", (30, 88), color=style.BLUE)
    return fig


def optimism(counts: Sequence[int], points: Mapping[int, Sequence[float]], **named: str) -> style.Figure:
    """By how much the best of several equal settings looks too good; `points` is from test images to values."""
    alt = "; ".join(f"with {m:,} test images the best of {counts[-1]} looks {v[-1]:.1f} points better than it is"
                    for m, v in points.items())  # fmt: skip
    fig, ax = style.figure(alt=alt[0].upper() + alt[1:] + ".", height=2.6, **named)
    for (m, values), color in zip(points.items(), style.COLORS):
        ax.plot(counts, values, "o-", ms=4, color=color)
        ax.annotate(f"{m:,} images", (counts[-1], values[-1]), color=color, va="center", **BESIDE)
    ax.set(xscale="log", xlabel="settings tried (all equally good)", ylabel="optimism (points)", xlim=(0.9, 700))
    return fig


def views(images: Tensor, strength: float, crop: float) -> style.Figure:
    """Three images, each followed by views of it."""
    jitter = (strength, strength, strength, strength / 2)
    plain = {"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)}
    view = View(size=16, crop=(crop, 1.0), color_jitter=jitter, **plain)
    rows = [apply_batch(view, images[:3], 0, epoch, torch.arange(3), 0) for epoch in range(5)]
    shown = torch.stack([images[:3].float() / 255, *rows], 1).flatten(0, 1)
    alt = f"Three images, each followed by five views: crops of at least {crop:.0%} of the area, jitter {strength:g}."
    return plots.grid(shown, columns=6, inch=0.7, alt=alt, caption=None)


def loss(values: Tensor, **named: str) -> style.Figure:
    alt = f"The loss goes from {values[0]:.2f} to {values[-1]:.2f} in {len(values)} steps."
    fig, ax = style.figure(alt=alt, height=2.4, **named)
    ax.plot(values)
    ax.set(xlabel="step", ylabel="pretext loss (mean of 10)")
    return fig


def labels(rows: Mapping[str, Mapping[str, Sequence[float]]], **named: str) -> style.Figure:
    """Accuracy over the number of labels, with the standard deviation over seeds."""
    counts = sorted(next(iter(rows.values())), key=int)
    x = np.array([int(c) for c in counts])
    lines = {name: np.array([row[c] for c in counts]).reshape(len(counts), -1) for name, row in rows.items()}
    alt = ". ".join(
        f"{name}: {v[0].mean():.0f} % with 1 label, {v[-1].mean():.0f} with 100" for name, v in lines.items()
    )
    fig, ax = style.figure(alt=alt + ".", height=3.0, **named)
    for (name, values), color in zip(lines.items(), (style.ORANGE, style.BLUE, style.GREEN)):
        mean, std = values.mean(1), values.std(1)
        ax.plot(x, mean, "o-", color=color, ms=4)
        ax.fill_between(x, mean - std, mean + std, color=color, alpha=0.2, lw=0)
        ax.annotate(name, (x[-1], mean[-1]), color=color, va="center", **BESIDE)
    ax.set(xscale="log", xlabel="labels per class", ylabel="linear accuracy (%)", xlim=(0.9, 900))
    return fig


def projections(dims: Sequence[int], found: Sequence[Sequence[float]], pixels: float, **named: str) -> style.Figure:
    """kNN accuracy after random projections; `found` holds several samples for each number of dimensions."""
    values = np.array(found)
    alt = (
        f"Random projections approach the {pixels:.0f} % of the pixels: {values[0].mean():.0f} % in {dims[0]} "
        f"dimensions, between {values[-1].min():.0f} and {values[-1].max():.0f} % in {dims[-1]}."
    )
    fig, ax = style.figure(alt=alt, height=2.6, **named)
    for one in values.T:
        ax.plot(dims, one, "o", ms=3, color=style.BLUE, alpha=0.6)
    ax.plot(dims, values.mean(1), color=style.BLUE)
    ax.axhline(pixels, color=style.GRAY, ls=":")
    ax.annotate("pixels", (dims[0], pixels), color=style.GRAY, xytext=(0, 4), textcoords="offset points")
    ax.set(ylim=(0, 1.25 * pixels))
    ax.set(xscale="log", xlabel="dimensions of the projection", ylabel="kNN accuracy (%)")
    return fig


def collapse(history: Mapping[int, Mapping[str, Any]], step: int) -> style.Figure:
    """The singular values of the features after some steps."""
    now = history[step]
    alt = (
        f"After {step} steps the largest singular value is {now['values'][0]:.2g}, the effective rank "
        f"{now['rank']:.0f}, the kNN accuracy {now['kNN']:.0f} %."
    )
    fig, ax = style.figure(alt=alt, caption=None, height=2.6)
    ax.semilogy(range(1, len(now["values"]) + 1), now["values"].clamp(min=1e-6))
    ax.set(xlabel="singular value number", ylabel="size", ylim=(1e-6, 1e3))
    ax.set_title(f"loss {now['loss']:.2g}, kNN {now['kNN']:.0f} %, linear {now['linear']:.0f} %")
    return fig


def leak(parts: Sequence[float], curves: Mapping[int, Sequence[float]], **named: str) -> style.Figure:
    """kNN accuracy when a fraction of the queries is in the bank too."""
    alt = "; ".join(
        f"k = {k}: {v[0]:.0f} % without a leak, {v[-1]:.0f} % with all queries leaked" for k, v in curves.items()
    )
    fig, ax = style.figure(alt=alt[0].upper() + alt[1:] + ".", height=2.6, **named)
    for (k, values), color in zip(curves.items(), (style.ORANGE, style.BLUE)):
        ax.plot([100 * part for part in parts], values, "o-", ms=4, color=color)
        ax.annotate(f"k = {k}", (100 * parts[-1], values[-1]), color=color, va="center", **BESIDE)
    ax.set(xlabel="queries that are in the bank (%)", ylabel="kNN accuracy (%)", xlim=(-3, 120))
    return fig


def nearest(f: nn.Module, found: Photographs | None) -> tuple[Tensor, Tensor, Tensor] | None:
    """By the features of `f`: each test photograph's five neighbors, which share its class, and whether the vote is right."""
    if found is None:
        return None
    data = Data.from_images(found.train, found.train_labels, found.test, found.test_labels, found.classes)
    look, device = View.center(32), default_device()
    train_x, train_y = extract_features(f, data, "train", look, device=device, progress=False)
    test_x, test_y = extract_features(f, data, "test", look, device=device, progress=False)
    index = knn.neighbors(train_x, test_x, 5)[1]
    return index, train_y[index] == test_y[:, None], knn.predict(train_x, train_y, test_x) == test_y


def photographs(
    found: Photographs | None, near: tuple[Tensor, ...] | None, shown: Tensor | None, by: str, finding: str, name: str
) -> style.Figure | None:
    """Some test photographs and their five nearest training photographs; None without data."""
    if found is None or near is None or shown is None:
        return None
    index, same = near[0][shown], near[1][shown]
    every = f"of all {len(found.test):,} test images {100 * near[1].float().mean():.0f} %"
    alt = f"Four photographs and their five nearest neighbors by {by}; {int(same.sum())} share the query's class."
    caption = (
        f"Nearest neighbors by {by}. {finding} A solid green frame has the query's class: {int(same.sum())} of "
        f"{same.numel()} here, {every}."
    )
    return plots.neighbors(found.test[shown], found.train[index], same, alt=alt, caption=caption, name=name)


def schematic() -> Diagram:
    """Pre-training above, evaluation below."""
    d = Diagram(
        alt="Pre-training: an image becomes two views, a backbone and a head turn them into vectors, and a loss compares "
        "the two. Afterwards the head is thrown away and the backbone kept. Evaluation: the frozen backbone turns images "
        "into features, on which a vote of neighbors or a linear probe predicts labels.",
        caption="Two steps. Pre-training (top) uses no labels. Evaluation (bottom) freezes the backbone, and only the "
        "simple classifier on top of it sees labels.",
        name="first.schematic",
    )
    image = d.image(0, 0.5, "image")
    views = [d.view(1, row, f"view {row + 1}") for row in (0, 1)]
    backbone = d.network(2.2, 0.5, "backbone", "f", kept=True)
    head = d.network(3.4, 0.5, "head", thrown=True)
    loss = d.loss(4.6, 0.5, "pretext\nloss")
    for view in views:
        d.arrow(image, view)
        d.arrow(view, backbone)
    d.arrow(backbone, head)
    d.arrow(head, loss)
    new = d.image(0, 2.2, "image, label")
    frozen = d.frozen(2.2, 2.2, "the same backbone", "f")
    h = d.vector(3.4, 2.2, "features h")
    simple = d.loss(4.8, 2.2, "kNN vote or\nlinear probe")
    d.arrow(new, frozen)
    d.arrow(frozen, h)
    d.arrow(h, simple)
    return d
