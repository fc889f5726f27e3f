"""The figures of the chapter *DenseCL, InterCLR and PIRL*. The cells compute what they show; here it is only plotted."""

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from sslbook.book.chapters.densecl.scenes import SIZE, Scene
from sslbook.notebook import plots, style
from sslbook.notebook.schematic import Diagram

FIGURES = (
    "densecl.schematic",
    "densecl.crops",
    "densecl.curves",
    "densecl.matches",
    "densecl.lines",
    "densecl.photographs",
)
MARKS = "os^Dv"
Place = tuple[float, float]


def schematic() -> Diagram:
    """Three rows, one a method: what meets in the loss."""
    diagram = Diagram(
        alt="Three rows. DenseCL: two views become maps by the backbone f and its momentum encoder; the loss compares a "
        "cell of one map with the most similar cell of the other. InterCLR: a view becomes a query q, and the loss "
        "compares it with the memory of another image of the same cluster. PIRL: nine shuffled patches become one vector "
        "g, and the loss compares it with the memory of their own image. No gradient flows into the right side.",
        caption="Three answers to one question. Left of the loss is what is trained, right of it what it must agree "
        "with: a place of the other view (DenseCL), another image (InterCLR), the image itself unshuffled (PIRL). No "
        "gradient reaches the right side. MoCo's own pair, which DenseCL and InterCLR keep beside theirs, is left out.",
        name="densecl.schematic",
    )
    for row, name in enumerate(("DenseCL", "InterCLR", "PIRL")):
        diagram.text(-0.2, 1.5 * row, name)
    at = [0.0, 1.5, 3.0]
    losses = [
        diagram.loss(4.4, at[0], "each cell:\nmost similar"),
        diagram.loss(4.4, at[1], "InfoNCE,\nmargin"),
        diagram.loss(4.4, at[2], "NCE"),
    ]
    nets = [diagram.network(2, y, "backbone" if y == 0 else "", "f", kept=True) for y in at]
    view = diagram.view(0.9, at[0], "view 1")
    grid = diagram.patches(3.1, at[0], "map", visible="0000 0100 0000 0000")
    other = diagram.view(7.7, at[0], "view 2")
    ema = diagram.ema_network(6.7, at[0], "momentum\nencoder", "f")
    grid_2 = diagram.patches(5.7, at[0], "map", visible="0000 0000 0010 0000")
    view_2 = diagram.view(0.9, at[1], "view")
    q = diagram.vector(3.1, at[1], "q")
    bank = diagram.vector(5.7, at[1], "memory v")
    cluster = diagram.image(7.2, at[1], "another image\nof the cluster")
    puzzle = diagram.patches(0.9, at[2], "nine patches,\nshuffled", visible="101 011 110")
    g = diagram.vector(3.1, at[2], "g")
    own = diagram.vector(5.7, at[2], "memory v")
    image = diagram.image(7.2, at[2], "the image\nitself")
    for start, end in (
        (view, nets[0]),
        (nets[0], grid),
        (grid, losses[0]),
        (other, ema),
        (ema, grid_2),
        (view_2, nets[1]),
        (nets[1], q),
        (q, losses[1]),
        (cluster, bank),
        (puzzle, nets[2]),
        (nets[2], g),
        (g, losses[2]),
        (image, own),
    ):
        diagram.arrow(start, end)
    for start, end in ((grid_2, losses[0]), (bank, losses[1]), (own, losses[2])):
        diagram.arrow(start, end, stop=True)
    return diagram


# -- the toy -----------------------------------------------------------------------------------------------------------


def row_of(scene: Scene, number: int) -> int:
    """The top of the half in which both shapes of a scene stand."""
    return int(scene.centers[number, 0, 0] >= SIZE // 2) * (SIZE // 2)


def pick_scene(scene: Scene) -> int:
    """The first scene whose shapes stand beside each other."""
    half = SIZE / 2
    rows, columns = scene.centers[:, :, 0] >= half, scene.centers[:, :, 1] >= half
    beside = (rows[:, 0] == rows[:, 1]) & (columns[:, 0] != columns[:, 1])
    return int(beside.nonzero()[0, 0])


def crops(
    image: Tensor, which: Tensor, top: int, left: int, curve: Mapping[int, tuple[float, float]], side: int = 16
) -> style.Figure:
    """The image with both crops, what the cells of each show, and both similarities over the place of the second."""
    from matplotlib.patches import Rectangle

    pooled, matched = curve[left]
    alt = f"With the second crop at {left}: pooled cosine {pooled:.2f}, matched cells of the first shape {matched:.2f}."
    fig, axes = style.figure(alt, 1, 3, width=7.2, height=2.7, caption=None, least=520)
    plots._show_image(axes[0], image)
    for x, color, style_ in ((0, style.BLUE, "-"), (left, style.ORANGE, "--")):
        axes[0].add_patch(Rectangle((x - 0.5, top - 0.5), side, side, fill=False, lw=2.5, ec=color, ls=style_))
    axes[0].axis("off")
    names = ("background", "left shape", "right shape")
    for k, (x, color) in enumerate(((0, style.BLUE), (left, style.ORANGE))):
        crop = which[top : top + side, x : x + side].long().reshape(side // 4, 4, side // 4, 4).permute(0, 2, 1, 3)
        label = torch.nn.functional.one_hot(crop.reshape(-1, 16), 3).sum(1).argmax(1)
        share = label.bincount(minlength=3) / len(label)
        axes[1].barh(np.arange(3) + 0.2 - 0.4 * k, share, height=0.36, color=color, label=("first", "second")[k])
    axes[1].set(yticks=range(3), yticklabels=names, xlim=(0, 1), xlabel="fraction of cells")
    axes[1].legend(fontsize=8, loc="lower right")
    xs = list(curve)
    for i, (name, color) in enumerate((("pooled", style.GRAY), ("matched cells", style.GREEN))):
        axes[2].plot(xs, [curve[x][i] for x in xs], color=color, label=name, ls="-" if i else "--")
        axes[2].plot(left, curve[left][i], "o", color=color)
    axes[2].set(xlabel="second crop at (pixels)", ylabel="cosine", ylim=(-0.05, 1.08))
    axes[2].legend(fontsize=8, loc="lower left")
    return fig


# -- training ----------------------------------------------------------------------------------------------------------


def curves(logs: Mapping[str, Sequence[float]], right: Mapping[str, Sequence[float]], every: int, start: float):
    """The dense loss of two runs, and the right matches of both."""
    end = {name: values[-1] for name, values in right.items()}
    said = ", ".join(f"{name} {value:.0f} %" for name, value in end.items())
    caption = (
        f"Left: the dense losses; guessing would be {start:.1f} (dotted). Right: matches within a cell of the true place, "
        f"on images of the run in other views. At the end: {said}."
    )
    fig, axes = style.figure(
        f"Right matches at the end: {said}.",
        1,
        2,
        width=7.0,
        height=2.8,
        caption=caption,
        name="densecl.curves",
        least=480,
    )
    for name, color in zip(logs, style.COLORS):
        axes[0].plot(style.smooth(logs[name]), color=color, label=name)
    axes[0].axhline(start, color=style.GRAY, ls=":")
    axes[0].set(xlabel="step", ylabel="dense loss", ylim=(0, None))
    axes[0].legend(fontsize=8)
    for name, color, mark in zip(right, (*style.COLORS[: len(logs)], style.PINK, style.AMBER), MARKS):
        axes[1].plot(
            [every * i for i in range(len(right[name]))], right[name], mark + "-", ms=4, color=color, label=name
        )
    axes[1].set(xlabel="step", ylabel="right matches (%)", ylim=(0, 100))
    axes[1].legend(fontsize=8)
    return fig


def matches(runs: Mapping[str, Mapping[str, Sequence[float]]], names: Sequence[str], every: int) -> style.Figure:
    """Right matches by features over the steps, means over seeds, beside what needs no network."""

    def mean(name: str, what: str) -> np.ndarray:
        return np.mean([run[what] for key, run in runs.items() if key.rsplit(",", 1)[0] == name], axis=0)

    base = {name: values[0] for name, values in runs["baselines"].items()}
    ends = ", ".join(f"{name} {mean(name, 'features')[-1]:.0f} %" for name in names)
    caption = (
        f"Matches within a cell of the true place, means over seeds. Before training {mean(names[0], 'features')[0]:.0f} %, "
        f"a random cell {base['random']:.0f} %, the same position {base['same position']:.0f} % (dotted). At the end: {ends}."
    )
    fig, ax = style.figure(
        f"At the end: {ends}.", width=6.2, height=3.4, caption=caption, name="densecl.matches", least=420
    )
    for name, color, mark in zip(names, style.COLORS, MARKS):
        values = mean(name, "features")
        ax.plot([every * i for i in range(len(values))], values, mark + "-", ms=4, color=color, label=name)
    for name, value in base.items():
        ax.axhline(value, color=style.GRAY, ls=":")
        ax.text(0, value + 1, name, fontsize=8, color=style.GRAY)
    ax.set(xlabel="step", ylabel="right matches (%)", ylim=(0, None))
    ax.legend(fontsize=8)
    return fig


# -- correspondences ---------------------------------------------------------------------------------------------------


def lines(
    views: tuple[Tensor, Tensor],
    match: Mapping[str, Tensor],
    near: Tensor,
    counted: Tensor,
    images: Sequence[int],
    name: str = "densecl.lines",
    every: int = 2,
) -> style.Figure:
    """Lines from cells of the first view to their matches in the second: one row a network, one column an image.

    Args:
        views: both views (n, 3, h, w), normalized.
        match: for each network the matched cells (n, s).
        near: which pairs of cells are less than a cell apart (n, s, s).
        counted: the cells whose place the second view shows (n, s).
        images: which images to show.
        name: of the figure.
        every: one in so many cells has a line.
    """
    from matplotlib.patches import ConnectionPatch

    side, size = round(counted.shape[1] ** 0.5), views[0].shape[-1]
    share = {}
    for key, found in match.items():
        right = near.gather(2, found[:, :, None])[:, :, 0]
        share[key] = 100 * right[counted].float().mean().item()
    said = ", ".join(f"{key} {value:.0f} %" for key, value in share.items())
    caption = (
        "Cells of the first view and their most similar cells in the second. Solid and green: less than a cell from the "
        f"true place; dashed and orange: elsewhere. Over all {len(counted)} images: {said}."
    )
    fig, axes = style.figure(
        f"Right matches: {said}.",
        len(match),
        2 * len(images),
        width=7.4,
        height=1.5 * len(match) + 0.2,
        caption=caption,
        name=name,
        least=560,
        squeeze=False,
    )
    for row, (key, found) in zip(axes, match.items()):
        row[0].set_title(key, fontsize=9.5, loc="left")
        for k, i in enumerate(images):
            pair = row[2 * k : 2 * k + 2]
            for ax, view in zip(pair, views):
                plots._show_image(ax, plots.denormalize(view[i][None].cpu())[0])
                ax.axis("off")
            for s in counted[i].nonzero()[:, 0].tolist():
                if (s // side) % every or (s % side) % every:
                    continue
                t = int(found[i, s])
                fine = bool(near[i, s, t])
                ends = [((c % side + 0.5) * size / side - 0.5, (c // side + 0.5) * size / side - 0.5) for c in (s, t)]
                color = style.GREEN if fine else style.ORANGE
                fig.add_artist(
                    ConnectionPatch(
                        ends[0],
                        ends[1],
                        "data",
                        "data",
                        axesA=pair[0],
                        axesB=pair[1],
                        color=color,
                        lw=1.3,
                        ls="-" if fine else "--",
                    )
                )
                pair[0].plot(*ends[0], "o", ms=3, color=color)
    return fig
