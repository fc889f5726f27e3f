"""What the chapter *Learning without labels* quotes: the first network beside its controls, over several seeds.

    python book/chapters/learning_without_labels/experiments.py            about five minutes on one CPU core

Writes `learning_without_labels_shapes` (accuracy on test images), `learning_without_labels_factors` (how well the
features predict every factor) and `learning_without_labels_labels` (accuracy with few labels). The probes choose their learning
rate on held-out training images. The knobs of Shapes were set by test accuracies of seed 0, so that a minute of training
suffices; nothing else was chosen on test images.
"""

import argparse
import copy
import tempfile
from functools import partial

import torch
from torch import Tensor, nn

from sslbook import results, rng
from sslbook.data.datasets.shapes import Shapes
from sslbook.data.loader import Data
from sslbook.data.views import View
from sslbook.engine.loop import pretrain
from sslbook.evaluation import controls, extract_features, factors, knn, linear
from sslbook.methods.simclr import SimCLR
from sslbook.schedules import Cosine, Warmup

KNOBS = {"position": 1.0, "scale": 1.0, "background": 0.0, "lighting": 0.2, "noise": 0.02}
TINY_SHAPES = Shapes(num_train=3000, num_test=1000, **KNOBS)
VIEW = View(size=16, crop=(0.3, 1.0), color_jitter=(0.8, 0.8, 0.8, 0.2), grayscale=0.2)
LOOK = View.center(16)
BATCH, LR = 128, 3e-3
PER_CLASS = (1, 2, 5, 10, 30, 100)
SUBSETS = 5

Features = tuple[Tensor, Tensor, Tensor, Tensor]
Rows = dict[str, dict[str, list[float]]]


class SmallNet(nn.Sequential):
    """Four convolutions for images of 16 x 16: 131,000 weights, 128 features."""

    def __init__(self, width: int = 32) -> None:
        def block(inside: int, outside: int, size: int, stride: int) -> list[nn.Module]:
            conv = nn.Conv2d(inside, outside, size, stride, padding=1, bias=False)
            return [conv, nn.BatchNorm2d(outside), nn.ReLU(inplace=True)]

        super().__init__(
            *block(3, width, 4, 2),
            *block(width, 2 * width, 3, 1),
            *block(2 * width, 2 * width, 3, 2),
            *block(2 * width, 4 * width, 3, 1),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
        )
        self.dim = 4 * width


def features(f: nn.Module, data: Data) -> Features:
    train_x, train_y = extract_features(f, data, "train", LOOK, progress=False)
    return train_x, train_y, *extract_features(f, data, "test", LOOK, progress=False)


def few_labels(parts: Features, per_class: int, draw: int) -> float:
    """Linear accuracy with `per_class` labels of each class."""
    train_x, train_y, test_x, test_y = parts
    order = rng.permutation(draw, per_class, len(train_x))
    kept = torch.cat([order[train_y[order] == c][:per_class] for c in range(10)])
    return linear.probe(train_x[kept], train_y[kept], test_x, test_y).accuracy


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--seeds", type=int, default=3)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    steps, seeds = arguments.steps, list(range(arguments.seeds))
    data = Data(shapes=TINY_SHAPES)
    table: Rows = {}
    known: Rows = {}
    labels: Rows = {}

    def note(name: str, f: nn.Module, few: bool) -> None:
        parts = features(f, data)
        found = {"kNN %": knn.accuracy(*parts), "linear %": linear.probe(*parts).accuracy}
        for where, values in (
            (table, found),
            (known, factors.probe(parts[0], data.factors("train"), parts[2], data.factors("test"))),
        ):
            for column, value in values.items():
                where.setdefault(name, {}).setdefault(column, []).append(round(value, 3))
        if few:
            labels[name] = {str(n): [round(few_labels(parts, n, d), 3) for d in range(SUBSETS)] for n in PER_CLASS}
        print(name, {key: value[-1] for key, value in table[name].items()}, flush=True)

    for seed in seeds:
        torch.manual_seed(seed)
        method = SimCLR(SmallNet(), VIEW, 0.2, projector_num_layers=2, projector_dim=64)
        fresh = copy.deepcopy(method.backbone)
        first = seed == seeds[0]
        if first:
            note("pixels", nn.Flatten(), few=True)
        note("random weights", fresh, few=first)
        with tempfile.TemporaryDirectory() as folder:
            pretrain(
                method, data, partial(torch.optim.AdamW, lr=LR, weight_decay=0.01), Warmup("10 %", then=Cosine()),
                batch_size=BATCH, steps=steps, seed=seed, device="cpu", out_dir=f"{folder}/run", progress=False,
                checkpoint_every="1000000 steps",
            )  # fmt: skip
        note("SimCLR", method.backbone, few=first)
        controls.train_supervised(
            fresh, data, VIEW, steps, BATCH, evaluation_view=LOOK, lr=LR, seed=seed, progress=False
        )
        note("supervised", fresh, few=False)
        save(table, known, labels, data, steps, seeds[: seed + 1])  # after every seed: a stop loses one at most


def save(table: Rows, known: Rows, labels: Rows, data: Data, steps: int, seeds: list[int]) -> None:
    level = factors.chance_levels(data.factors("train"), data.factors("test"))
    known["chance"] = {factor: [round(value, 3)] for factor, value in level.items()}
    settings = {"steps": steps, "batch": BATCH, "lr": LR, "shapes": KNOBS, "images": 3000, "test images": 1000}
    name = "learning_without_labels"
    results.save(f"{name}_shapes", table, seeds=seeds, settings=settings)
    results.save(f"{name}_factors", known, seeds=seeds, settings=settings)
    results.save(f"{name}_labels", labels, seeds=seeds[:1], settings={**settings, "label subsets": SUBSETS})


if __name__ == "__main__":
    main()
