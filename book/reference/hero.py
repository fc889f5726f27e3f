"""Nearest neighbors of test images before and after SimCLR on the Shapes data set.

    python book/reference/hero.py            about a minute of training on two CPU cores

It writes `book/_static/readme.png` for the README, and for the front page `book/_static/neighbors.html`: fewer and larger
images whose text takes the color of the page.
"""

import copy
import tempfile
from functools import partial
from pathlib import Path

import numpy as np
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from PIL import Image
from torch import Tensor, nn

from sslbook import Data, Shapes, View, pretrain
from sslbook.evaluation import extract_features, knn
from sslbook.methods.simclr import SimCLR
from sslbook.nn import ConvNet
from sslbook.notebook import style
from sslbook.schedules import Cosine, Warmup

STATIC = Path(__file__).parents[1] / "_static"
SHAPES = ("crown", "flower", "boat", "ice cream", "house", "cat")  # one query of each
RAW = {"mean": (0.5,) * 3, "std": (0.5,) * 3}
LOOK = View.center(16, **RAW)
K = 6
FRONT_SHAPES, FRONT_K = ("flower", "boat", "house", "cat"), 3


def train(backbone: nn.Module, data: Data) -> None:
    """SimCLR with the values of its recipe for Shapes."""
    view = View(
        size=16, crop=(0.3, 1.0), color_jitter=(0.4, 0.4, 0.4, 0.5), grayscale=0.2, interpolation="bilinear", **RAW
    )
    method = SimCLR(backbone, view, temperature=0.2, projector_num_layers=2, projector_dim=64)
    adamw = partial(torch.optim.AdamW, lr=0.005, weight_decay=0.01)
    with tempfile.TemporaryDirectory() as folder:
        pretrain(method, data, adamw, Warmup("5 %", then=Cosine()), batch_size=256, epochs=27, out_dir=f"{folder}/run")


def nearest(backbone: nn.Module, data: Data, queries: Tensor) -> tuple[Tensor, float]:
    """The nearest training images of the queries, and the kNN accuracy over all test images in percent."""
    bank, labels = extract_features(backbone, data, "train", LOOK, progress=False)
    features, truth = extract_features(backbone, data, "test", LOOK, progress=False)
    return knn.neighbors(bank, features[queries], K)[1], knn.accuracy(bank, labels, features, truth)


def figure(data: Data, queries: Tensor, found: list[tuple[Tensor, float]]) -> Figure:
    """A row per query: the query, its neighbors before, its neighbors after."""
    train_images, train_factors = data.shapes.render("train")
    test_images, test_factors = data.shapes.render("test")
    fig = Figure(figsize=(10, 5.1), dpi=160, facecolor="white")
    FigureCanvasAgg(fig)
    layout = fig.add_gridspec(
        len(queries), 2 * K + 3, width_ratios=[1, 0.35, *[1] * K, 0.5, *[1] * K],
        left=0.01, right=0.99, top=0.92, bottom=0.09, wspace=0.12, hspace=0.12,
    )  # fmt: skip

    def show(row: int, column: int, image: Tensor, color: str | None = None, line: str = "-") -> None:
        ax = fig.add_subplot(layout[row, column])
        ax.imshow(image.permute(1, 2, 0), interpolation="nearest")
        ax.set(xticks=[], yticks=[])
        for spine in ax.spines.values():
            spine.set(visible=color is not None, color=color, linestyle=line, linewidth=2.5)

    for row, query in enumerate(queries):
        show(row, 0, test_images[query])
        for part, (index, _) in enumerate(found):
            for rank, image in enumerate(index[row]):
                same = train_factors["shape"][image] == test_factors["shape"][query]
                color, line = (style.GREEN, "-") if same else (style.ORANGE, (0, (2, 1.5)))
                show(row, 2 + part * (K + 1) + rank, train_images[image], color, line)
    width = 0.98 / (2 * K + 1.85)
    fig.text(0.01 + width / 2, 0.945, "query", ha="center", fontsize=12)
    for part, (name, (_, accuracy)) in enumerate(zip(("before", "after"), found)):
        center = 0.01 + width * (1.35 + K / 2 + part * (K + 0.5))
        title = f"neighbors {name} training, kNN accuracy {accuracy:.0f} %"
        fig.text(center, 0.945, title, ha="center", fontsize=12)
    marks = [
        Rectangle((0, 0), 1, 1, fill=False, edgecolor=style.GREEN, linewidth=2.5),
        Rectangle((0, 0), 1, 1, fill=False, edgecolor=style.ORANGE, linewidth=2.5, linestyle=(0, (2, 1.5))),
    ]
    fig.legend(marks, ["same shape as the query", "another shape"], loc="lower center", ncols=2, frameon=False)
    return fig


def front(data: Data, queries: Tensor, found: list[tuple[Tensor, float]]) -> str:
    """The figure of the front page as HTML: a row per query, three neighbors before and three after."""
    train_images, train_factors = data.shapes.render("train")
    test_images, test_factors = data.shapes.render("test")
    before, after = (accuracy for _, accuracy in found)
    truth = test_factors["shape"][queries]
    same = [int((train_factors["shape"][index[:, :FRONT_K]] == truth[:, None]).sum()) for index, _ in found]
    total = len(queries) * FRONT_K
    alt = (
        f"Four images of shapes, each with its {FRONT_K} nearest neighbors. Before training {same[0]} of {total} neighbors "
        f"show the same shape, afterwards {same[1]}."
    )
    caption = (
        "The images most similar to the one on the left, for a small network with random weights and for the same network "
        "after about a minute of training without labels (SimCLR on a CPU). A solid frame marks the same shape. A vote of "
        f"nearest neighbors names {before:.0f} % of new images correctly before training and {after:.0f} % after it."
    )
    fig, axes = style.figure(
        alt, len(queries), 2 * FRONT_K + 3, width=6.9, height=3.95, caption=caption,
        width_ratios=[1, 0.3, *[1] * FRONT_K, 0.3, *[1] * FRONT_K],
    )  # fmt: skip
    fig.get_layout_engine().set(w_pad=0.05, h_pad=0.05, wspace=0.0, hspace=0.0)
    for ax in axes.flat:
        ax.set(xticks=[], yticks=[])
        ax.spines[:].set_visible(False)
    for row, query in enumerate(queries):
        axes[row, 0].imshow(test_images[query].permute(1, 2, 0))
        for part, (index, _) in enumerate(found):
            for rank, image in enumerate(index[row, :FRONT_K]):
                right = train_factors["shape"][image] == test_factors["shape"][query]
                ax = axes[row, 2 + part * (FRONT_K + 1) + rank]
                ax.imshow(train_images[image].permute(1, 2, 0))
                color, line = (style.GREEN, "-") if right else (style.ORANGE, (0, (2, 1.5)))
                ax.spines[:].set(visible=True, color=color, linestyle=line, linewidth=2.5)
    axes[0, 0].set_title("image")
    axes[0, 2 + FRONT_K // 2].set_title("neighbors before")
    axes[0, 3 + FRONT_K + FRONT_K // 2].set_title("neighbors after training")
    return fig.html()


def queries_of(names: tuple[str, ...], factors: dict[str, Tensor]) -> Tensor:
    """The first test image of each of these shapes."""
    classes = [Shapes.class_names.index(name) for name in names]
    return torch.tensor([int((factors["shape"] == c).nonzero()[0]) for c in classes])


def main() -> None:
    torch.manual_seed(0)
    data = Data(shapes=Shapes())
    _, factors = data.shapes.render("test")
    backbone = ConvNet()
    untrained = copy.deepcopy(backbone)
    train(backbone, data)
    networks = (untrained, backbone)
    queries = queries_of(SHAPES, factors)
    fig = figure(data, queries, [nearest(network, data, queries) for network in networks])
    fig.canvas.draw()
    Image.fromarray(np.asarray(fig.canvas.buffer_rgba())).convert("RGB").save(STATIC / "readme.png", optimize=True)
    queries = queries_of(FRONT_SHAPES, factors)
    html = front(data, queries, [nearest(network, data, queries) for network in networks])
    (STATIC / "neighbors.html").write_text(html + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
