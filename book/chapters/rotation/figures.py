"""The figures of the chapter *Rotation prediction*: what is plotted, from what the chapter has computed."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from sslbook.data.datasets.shapes import Shapes
from sslbook.notebook import plots, style
from sslbook.notebook.schematic import Diagram

FIGURES = (
    "rotation.ways",
    "rotation.light",
    "rotation.schematic",
    "rotation.arcs",
    "rotation.sharpness",
    "rotation.loss",
    "rotation.by_shape",
    "rotation.neighbors",
    "rotation.stages",
    "rotation.pixels",
    "rotation.broken",
    "rotation.patience",
    "rotation.misjudged",
    "rotation.photo_neighbors",
)
WHOLE, ONE_EACH = "as it should be", "one rotation each"
STAR = Shapes.class_names.index("star")


def _beside(image: Tensor, text: str, xs: Sequence[float], ys: Sequence[float], at: tuple[float, float]) -> Any:
    """An image, and right of it a curve with one point of it marked; the axes of the curve are returned as well."""
    fig, (left, right) = style.figure(text, 1, 2, width=5.2, height=2.4, caption=None, width_ratios=[1, 1.6])
    left.imshow(image.permute(1, 2, 0).clamp(0, 1))
    left.set_axis_off()
    right.plot(xs, ys, color=style.GRAY, linewidth=1)
    right.plot(*at, "o", color=style.ORANGE, markersize=9)
    return fig, right


def light(image: Tensor, accuracy_of: Mapping[float, float]) -> Callable[[float], style.Figure]:
    """Frames over the slope: `image` (uint8) lit from above, and the accuracy of pixels at that slope."""
    up = torch.linspace(1, -1, image.shape[-1])[:, None]

    def plot(slope: float) -> style.Figure:
        text = (
            f"With a brightness slope of {slope:.0%} a linear classifier on pixels has a "
            f"rotation accuracy of {accuracy_of[slope]:.0f} %."
        )
        lit = image.float() / 255 * (1 + slope * up)
        fig, ax = _beside(lit, text, list(accuracy_of), list(accuracy_of.values()), (slope, accuracy_of[slope]))
        ax.axhline(25, color=style.GRAY, linestyle=":")
        ax.set(xlabel="slope of the light", ylabel="rotation accuracy, %", ylim=(0, 102))
        return fig

    return plot


def any_angle(rotated: Mapping[float, Tensor], kept: Mapping[float, float]) -> Callable[[float], style.Figure]:
    """Frames over the angle: an image rotated by it, and how much of its sharpness is left."""

    def plot(degrees: float) -> style.Figure:
        text = f"Rotated by {degrees} degrees, {kept[degrees]:.0%} of the sharpness is left."
        fig, ax = _beside(rotated[degrees], text, list(kept), list(kept.values()), (degrees, kept[degrees]))
        ax.set(xlabel="rotated by, degrees", ylabel="sharpness left", ylim=(0, 1.1))
        ax.set_xticks([0, 45, 90])
        return fig

    return plot


def arcs(best_accuracy: Callable[[float], float], floor: Callable[[float], float]) -> Callable[[float], style.Figure]:
    """Frames over the tilt: the four classes on the circle of angles, and the cost of their overlap."""

    def plot(w: float) -> style.Figure:
        text = f"tilt up to {w:.0f}°\nbest accuracy {best_accuracy(w):.0%}\nsmallest loss {floor(w):.2f}"
        fig, ax = style.figure(text.replace("\n", ", "), width=5.2, height=2.6, caption=None)
        ax.text(-4.2, 0, text, va="center", linespacing=1.8, color=style.GRAY)
        for k, color in enumerate((style.BLUE, style.ORANGE, style.GREEN, style.PINK)):
            angle, radius = np.radians(np.linspace(-w, w, 90) + 90 * k), 1 - 0.16 * k
            ax.plot(-radius * np.sin(angle), radius * np.cos(angle), color=color, linewidth=7, solid_capstyle="butt")
            middle = np.radians(90 * k)
            x, y = -1.25 * np.sin(middle), 1.2 * np.cos(middle)
            ax.text(x, y, f"{90 * k}°", color=color, ha="center", va="center")
        ax.set(xlim=(-4.2, 1.5), ylim=(-1.35, 1.35), aspect="equal")
        ax.set_axis_off()
        return fig

    return plot


def loss(log: Tensor, floor: float) -> style.Figure:
    """The loss of every step, averaged over windows, between log 4 and the floor that is set by the star."""
    window = max(1, len(log) // 40)
    smooth = log[: len(log) // window * window, 0].unflatten(0, (-1, window)).mean(1)
    steps = np.arange(1, len(smooth) + 1) * window
    fig, ax = style.figure(
        f"The loss falls from {smooth[0]:.2f} to {smooth[-1]:.2f}.",
        name="rotation.loss",
        caption="The loss of the run: a plateau at log 4 while nothing is recognized, then a fall towards a floor "
        "that was computed before the run.",
    )
    ax.plot(steps, smooth)
    for text, level in (("log 4: no information", math.log(4)), ("floor set by the star", floor)):
        ax.axhline(level, color=style.GRAY, linestyle=":", linewidth=1)
        ax.annotate(text, (steps[-1], level + 0.03), ha="right", color=style.GRAY)
    ax.set(xlabel="step", ylabel="loss, nats", ylim=(0, 1.6))
    return fig


def by_shape(accuracies: Sequence[float]) -> style.Figure:
    """Rotation accuracy of each shape, sorted, with the star's bound."""
    order = np.argsort(accuracies)
    least = min(a for c, a in enumerate(accuracies) if c != STAR)
    fig, ax = style.figure(
        f"The star's rotation accuracy is {accuracies[STAR]:.0f} %, that of the others {least:.0f} % or more.",
        height=3.4,
        name="rotation.by_shape",
        caption="Rotation accuracy of each shape on test images. The star is lowest; its bound is 50 % (dotted), and "
        "100 % for every other shape.",
    )
    colors = [style.ORANGE if c == STAR else style.BLUE for c in order]
    ax.barh([Shapes.class_names[c] for c in order], [accuracies[c] for c in order], color=colors)
    ax.plot([50, 50], [-0.5, 9.5], color=style.GRAY, linestyle=":")
    ax.set(xlabel="rotation accuracy, %", xlim=(0, 100))
    return fig


def _name_ends(ax: Any, x: float, ends: Mapping[str, tuple[float, str]], gap: float) -> None:
    """Names of curves beside their ends, moved apart where two ends are nearer than `gap`; name: (height, color)."""
    last = -math.inf
    for name, (y, color) in sorted(ends.items(), key=lambda item: item[1][0]):
        last = max(y, last + gap)
        ax.annotate(f"  {name}", (x, last), color=color, va="center", annotation_clip=False)


def stages(values: Mapping[str, Mapping[str, Sequence[float]]]) -> style.Figure:
    """Linear accuracy by stage of the network, mean and standard deviation over seeds."""
    rows = {name: values[name] for name in ("random weights", "rotation prediction", "supervised, same rows")}
    means = {name: np.array([np.mean(row[f"stage {k}"]) for k in (1, 2, 3, 4)]) for name, row in rows.items()}
    best = {name: int(mean.argmax()) + 1 for name, mean in means.items()}
    fig, ax = style.figure(
        f"Rotation prediction is best at stage {best['rotation prediction']}, supervised training at stage "
        f"{best['supervised, same rows']}, random weights at stage {best['random weights']}.",
        width=6.2,
        name="rotation.stages",
        caption="Linear accuracy of each stage's map, mean and standard deviation over seeds. The last stage of "
        "rotation prediction is worse than the one before; with labels nothing is lost at the end.",
    )
    ends = {}
    for (name, row), color in zip(rows.items(), (style.GRAY, style.BLUE, style.GREEN)):
        std = [np.std(row[f"stage {k}"], ddof=int(len(row[f"stage {k}"]) > 1)) for k in (1, 2, 3, 4)]
        ax.errorbar([1, 2, 3, 4], means[name], std, color=color, capsize=3)
        ends[name] = (means[name][-1], color)
    _name_ends(ax, 4, ends, 8)
    ax.set(xlabel="stage", ylabel="linear accuracy, %", xticks=[1, 2, 3, 4], ylim=(0, 100))
    return fig


def pixels(images: Tensor, strength: Tensor, labels: Tensor, ratio: float) -> style.Figure:
    """Images, and below each the gradient's size at every pixel."""
    shown = strength[:, None] / strength[:, None].amax((2, 3), keepdim=True)
    titles = [Shapes.class_names[c] for c in labels] + ["gradient"] * len(images)
    return plots.grid(
        torch.cat([images, shown.expand(-1, 3, -1, -1)]),
        titles,
        columns=len(images),
        name="rotation.pixels",
        alt=f"The gradient is noisy; on shapes it is {ratio:.1f} times that around them.",
        caption=f"Eight test images, and how strongly the prediction depends on each pixel. Inside the shape's "
        f"circle the gradient is {ratio:.1f} times that outside.",
    )


def _losses(alt: str, curves: Mapping[str, Sequence[float]], **options: Any) -> style.Figure:
    """Curves of losses, ten steps a point, each with its name at its end; the first in gray."""
    fig, ax = style.figure(alt, width=6.2, height=2.8, **options)
    ends: dict[int, dict[str, tuple[float, str]]] = {}
    for (name, y), color in zip(curves.items(), (style.GRAY, style.ORANGE)):
        ax.plot(10 * np.arange(1, len(y) + 1), y, color=color)
        ends.setdefault(10 * len(y), {})[name] = (y[-1], color)
    for x, names in ends.items():
        _name_ends(ax, x, names, 0.16)
    ax.axhline(math.log(4), color=style.GRAY, linestyle=":", linewidth=1)
    ax.set(xlabel="step", ylabel="loss, nats", ylim=(0, 1.7))
    return fig


def broken(curves: Mapping[str, Mapping[str, Sequence[float]]]) -> Callable[[str], style.Figure]:
    """Frames over the changes: the loss of one beside that of the untouched run."""

    def plot(change: str) -> style.Figure:
        alt = f"Loss with the change '{change}': {curves[change]['seed 1'][-1]:.2f} at the end; untouched "
        alt += f"{curves[WHOLE]['seed 1'][-1]:.2f}."
        shown = {name: curves[name]["seed 1"] for name in (WHOLE, change)}
        return _losses(alt, shown, caption=None)

    return plot


def patience(
    patient: Mapping[str, Mapping[str, Sequence[float]]], curves: Mapping[str, Mapping[str, Sequence[float]]]
) -> style.Figure:
    """The loss of one rotation for each image over many steps, beside that of all four over few."""
    long = patient[ONE_EACH]["seed 1"]
    left = next((10 * (i + 1) for i in range(len(long)) if max(long[i : i + 5]) < 1.3), None)
    when = f"stays above 1.3 for {10 * len(long)} steps" if left is None else f"falls below 1.3 after {left} steps"
    return _losses(
        f"With one rotation for each image the loss {when}.",
        {"all four": curves[WHOLE]["seed 1"], "one each": long},
        name="rotation.patience",
        caption=f"With one rotation for each image, as many rows a step and the same settings, the loss {when}.",
    )


def misjudged(photographs: Any, log_p: Tensor, count: int = 8) -> style.Figure:
    """Upright test photographs that the network is surest about, and those it is most wrong about.

    Args:
        photographs: from `sslbook.notebook.photographs.cifar10`.
        log_p: log-probabilities of all four rotations of all test images, (4, n, 4).
        count: of each kind.
    """
    true = log_p[0, :, 0]  # of the images as they are
    order = true.argsort()
    rows = torch.cat([order[-count:].flip(0), order[:count]])
    said = log_p[0].argmax(1)
    titles = [f"{photographs.classes[photographs.test_labels[i]]}\n{90 * said[i]}°" for i in rows]
    names = [photographs.classes[photographs.test_labels[i]] for i in order[:count]]
    return plots.grid(
        photographs.test[rows],
        titles,
        columns=count,
        name="rotation.misjudged",
        alt=f"First row: upright photographs recognized with certainty. Second row, misjudged: {', '.join(names)}.",
        caption="Upright test photographs with their class and the predicted rotation. First row: surest and right. "
        "Second row: surest and wrong.",
    )


def photo_neighbors(photographs: Any, trained: Any, fresh: Any, queries: int = 5, k: int = 5) -> style.Figure:
    """The nearest training photographs by the second stage of the trained network, and their precision beside controls.

    Args:
        photographs: from `sslbook.notebook.photographs.cifar10`.
        trained: a backbone with `stages`.
        fresh: the same before training.
        queries: test photographs, one a row.
        k: neighbors of each.
    """
    from sslbook.evaluation import knn

    def second(backbone: Any) -> Callable[[Tensor], Tensor]:
        return lambda x: nn.functional.adaptive_avg_pool2d(backbone.stages(x)[1], 2).flatten(1)

    def nearest(features: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            bank, query = (features(x.float() / 255) for x in (photographs.train, photographs.test))
        found = knn.neighbors(bank, query, k=k)[1]
        return found, photographs.train_labels[found] == photographs.test_labels[:, None]

    found, same = nearest(second(trained))
    random, pixels = (nearest(features)[1].float().mean() for features in (second(fresh), nn.Flatten()))
    text = (
        f"{same.float().mean():.0%} of the five nearest photographs share the class; random weights find {random:.0%}"
    )
    text += f", pixels {pixels:.0%}"
    at = torch.arange(queries) + 3
    return plots.neighbors(
        photographs.test[at],
        photographs.train[found[at]],
        same[at],
        name="rotation.photo_neighbors",
        alt=f"Five photographs and their neighbors. {text}.",
        caption="Left, five test photographs; right, the training photographs with the nearest features of the second "
        f"stage. {text}, over all test photographs.",
    )


def schematic() -> Diagram:
    """The method as a schematic: one image, its four rotations, one network, four labels that cost nothing."""
    d = Diagram(
        name="rotation.schematic",
        alt="An image is rotated by 0, 90, 180 and 270 degrees. One backbone f turns each into features h, a linear head "
        "into four logits s, and the loss is the cross-entropy with the rotation. The backbone is kept, the head thrown "
        "away.",
        caption="Rotation prediction: the label is the rotation itself. No second network, no stopped gradient; after "
        "training only the backbone is kept.",
    )
    image = d.image(0, 1.5, "image x")
    backbone = d.network(2.5, 1.5, "backbone", "f", kept=True)
    h = d.vector(3.5, 1.5, "h")
    head = d.network(4.4, 1.5, "linear head", "W", thrown=True)
    s = d.vector(5.3, 1.5, "4 logits s")
    loss = d.loss(6.5, 1.5, "cross-\nentropy")
    for r in range(4):
        turned = d.view(1.25, r, f"r = {r}: {90 * r}°")
        turned.parts = [f'<g transform="rotate({-90 * r} {turned.x} {turned.y})">', *turned.parts, "</g>"]
        d.arrow(image, turned)
        d.arrow(turned, backbone)
    label = d.text(6.5, 0.4, "the rotation r")
    for start, end in ((backbone, h), (h, head), (head, s), (s, loss), (label, loss)):
        d.arrow(start, end)
    return d
