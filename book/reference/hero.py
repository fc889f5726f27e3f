"""`book/_static/readme.png`: nearest neighbors of six test images before and after SimCLR on the Shapes data set.

python book/reference/hero.py            about a minute of training on two CPU cores
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

PAGE = Path(__file__).parents[1] / "_static" / "readme.png"
SHAPES = ("crown", "flower", "boat", "ice cream", "house", "cat")  # one query of each
RAW = {"mean": (0.5,) * 3, "std": (0.5,) * 3}
LOOK = View.center(16, **RAW)
K = 6


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


def main() -> None:
    torch.manual_seed(0)
    data = Data(shapes=Shapes())
    _, factors = data.shapes.render("test")
    classes = [Shapes.class_names.index(name) for name in SHAPES]
    queries = torch.tensor([int((factors["shape"] == c).nonzero()[0]) for c in classes])
    backbone = ConvNet()
    untrained = copy.deepcopy(backbone)
    train(backbone, data)
    fig = figure(data, queries, [nearest(network, data, queries) for network in (untrained, backbone)])
    fig.canvas.draw()
    Image.fromarray(np.asarray(fig.canvas.buffer_rgba())).convert("RGB").save(PAGE, optimize=True)


if __name__ == "__main__":
    main()
