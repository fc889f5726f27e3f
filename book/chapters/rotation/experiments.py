"""What the chapter *Rotation prediction* reports: rotation prediction on the Shapes data set, whole and broken.

    python book/chapters/rotation/experiments.py            about fifteen minutes on one CPU core
    python book/chapters/rotation/experiments.py measure    only book/results/rotation_shapes.json and rotation_stages.json
    python book/chapters/rotation/experiments.py labels     only book/results/rotation_labels.json
    python book/chapters/rotation/experiments.py break      only book/results/rotation_broken.json and rotation_curves.json
    python book/chapters/rotation/experiments.py break "watermark"    one row of these anew

Learning rate, steps and network were chosen on Shapes(seed=0). All results are of seeds 1 and 2, those of the
runs that are broken on purpose of seed 1 alone.
"""

import copy
import math
import sys

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sslbook import results, rng
from sslbook.data.datasets.shapes import Shapes
from sslbook.data.loader import Data
from sslbook.data.views import View
from sslbook.evaluation import controls, extract_features, knn, linear
from sslbook.methods.rotation import Rotation, rotate, targets
from sslbook.schedules import Clock

KNOBS = {"position": 1.0, "scale": 1.0, "orientation": 0.1}
PLAIN = {"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)}  # pixels from 0 to 1; batch norm does the rest
VIEW = View(size=16, crop=None, flip=0.5, **PLAIN)
SEE = View.center(16, **PLAIN)
BATCH, LR, DECAY = 32, 4e-3, 0.01


class ConvNet(nn.Module):
    """The chapter's backbone: four blocks of two convolutions, mean over what is left of the image."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        widths = [3, width, 2 * width, 4 * width, 4 * width]
        self.blocks = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(i, o, 3, stride, padding=1, bias=False),
                nn.BatchNorm2d(o),
                nn.ReLU(),
                nn.Conv2d(o, o, 3, padding=1, bias=False),
                nn.BatchNorm2d(o),
                nn.ReLU(),
            )
            for i, o, stride in zip(widths, widths[1:], (1, 2, 2, 1))
        )
        self.dim = widths[-1]

    def stages(self, x: Tensor) -> list[Tensor]:
        maps = []
        for block in self.blocks:
            x = block(x)
            maps.append(x)
        return maps

    def forward(self, x: Tensor) -> Tensor:
        return self.stages(x)[-1].mean((2, 3))


def train(method, data, steps, seed, change=None, batch_size=BATCH, every=10):
    """Train as the chapter does; returns the loss of every tenth step and the accuracy of the last fifty."""
    optimizer = torch.optim.AdamW(method.parameters(), lr=LR, weight_decay=DECAY)
    per_epoch = data.steps_per_epoch(batch_size)
    clock, losses, accuracies = Clock(0, steps, per_epoch, seed), [], []
    method.train()
    while clock.step < steps:
        for batch in data.batches(method.views(), batch_size, seed=seed, epoch=clock.epoch):
            if clock.step == steps:
                break
            if change is not None:
                batch = batch._replace(views=(change(batch.views[0]),))
            warm = min(1.0, (clock.step + 1) / max(1, steps // 20))
            for group in optimizer.param_groups:
                group["lr"] = LR * warm * 0.5 * (1 + math.cos(math.pi * clock.progress))
            out = method(batch, clock)
            optimizer.zero_grad()
            out["loss"].backward()
            optimizer.step()
            losses.append(out["loss"].item())
            if clock.step % 100 == 0:
                print(f"  step {clock.step}: loss {losses[-1]:.2f}", flush=True)
            accuracies.append(out["rotation_accuracy"].item())
            clock = Clock(clock.step + 1, steps, per_epoch, seed)
    method.eval()
    smooth = [sum(losses[i : i + every]) / every for i in range(0, len(losses) - every + 1, every)]
    return smooth, sum(accuracies[-50:]) / len(accuracies[-50:])


def accuracy_of(method, data) -> float:
    """Rotation accuracy on test images, in percent."""
    right = total = 0
    for batch in data.evaluation_batches("test", SEE):
        with torch.no_grad():
            chosen = method.head(method.backbone(rotate(batch.views[0]))).argmax(1)
        right += (chosen == targets(len(batch.index), chosen.device)).sum().item()
        total += len(chosen)
    return 100 * right / total


def features(backbone, data):
    return [t for split in ("train", "test") for t in extract_features(backbone, data, split, SEE, progress=False)]


def knn_of(backbone, data) -> float:
    return knn.accuracy(*features(backbone, data))


class Stage(nn.Module):
    """One stage of the backbone, averaged over a 2 x 2 grid of positions."""

    def __init__(self, backbone: ConvNet, stage: int) -> None:
        super().__init__()
        self.backbone, self.stage = backbone, stage

    def forward(self, x: Tensor) -> Tensor:
        return F.adaptive_avg_pool2d(self.backbone.stages(x)[self.stage], 2).flatten(1)


def shapes(seed: int) -> Data:
    return Data(shapes=Shapes(num_train=3000, num_test=1000, seed=seed, **KNOBS))


def measure(seeds=(1, 2), steps=600) -> None:
    table: dict[str, dict[str, list[float]]] = {}
    stages: dict[str, dict[str, list[float]]] = {}

    def note(row: str, column: str, value: float, where=table) -> None:
        where.setdefault(row, {}).setdefault(column, []).append(value)

    for seed in seeds:
        data = shapes(seed)
        torch.manual_seed(seed)
        fresh = ConvNet()
        pixels = features(nn.Flatten(), data)
        note("pixels", "kNN", knn.accuracy(*pixels))
        note("pixels", "linear", linear.probe(*pixels).accuracy)

        method = Rotation(copy.deepcopy(fresh), VIEW)
        train(method, data, steps, seed)
        labeled = copy.deepcopy(fresh)
        own_head = controls.train_supervised(
            labeled, data, VIEW, steps, BATCH, evaluation_view=SEE, lr=LR, weight_decay=DECAY, seed=seed,
            progress=False,
        )  # fmt: skip
        note("rotation prediction", "rotation accuracy", accuracy_of(method, data))
        note("supervised", "own head", own_head)
        for name, backbone in (
            ("random weights", fresh),
            ("rotation prediction", method.backbone),
            ("supervised", labeled),
        ):
            x = features(backbone, data)
            note(name, "kNN", knn.accuracy(*x))
            note(name, "linear", linear.probe(*x).accuracy)
            for stage in range(4):
                x = features(Stage(backbone, stage), data)
                note(name, f"stage {stage + 1}", linear.probe(*x).accuracy, stages)
        print(seed, table, stages, flush=True)
        settings = {"shapes": KNOBS, "images": 3000, "steps": steps, "batch": BATCH, "lr": LR, "weight_decay": DECAY}
        order = ["pixels", "random weights", "rotation prediction", "supervised"]
        done = list(seeds)[: list(seeds).index(seed) + 1]
        results.save("rotation_shapes", {row: table[row] for row in order}, seeds=done, settings=settings)
        results.save("rotation_stages", stages, seeds=done, settings=settings)


def labels(seeds=(1, 2), steps=600) -> None:
    """The supervised control again, with as many rows a step as rotation prediction has: four times the images."""
    table: dict[str, dict[str, list[float]]] = {}
    name = "supervised, same rows"
    for seed in seeds:
        data = shapes(seed)
        torch.manual_seed(seed)
        backbone = ConvNet()
        own_head = controls.train_supervised(
            backbone, data, VIEW, steps, 4 * BATCH, evaluation_view=SEE, lr=LR, weight_decay=DECAY, seed=seed,
            progress=False,
        )  # fmt: skip
        x = features(backbone, data)
        values = {"kNN": knn.accuracy(*x), "linear": linear.probe(*x).accuracy, "own head": own_head}
        for stage in range(4):
            values[f"stage {stage + 1}"] = linear.probe(*features(Stage(backbone, stage), data)).accuracy
        for column, value in values.items():
            table.setdefault(name, {}).setdefault(column, []).append(value)
        print(seed, table, flush=True)
        settings = {"shapes": KNOBS, "images": 3000, "steps": steps, "batch": 4 * BATCH, "lr": LR}
        done = list(seeds)[: list(seeds).index(seed) + 1]
        results.save("rotation_labels", table, seeds=done, settings=settings)


# -- broken on purpose -------------------------------------------------------------------------------------------------


def light_from_above(x: Tensor) -> Tensor:
    """Brightness rises by 10 % from the middle to the upper edge."""
    return x * (1 + 0.1 * torch.linspace(1, -1, x.shape[-1])[:, None])


def watermark(x: Tensor) -> Tensor:
    """Two by two white pixels in the lower right corner of every image."""
    x = x.clone()
    x[:, :, -2:, -2:] = 1.0
    return x


def no_up(x: Tensor) -> Tensor:
    """Every image is the mean of its own four rotations."""
    return rotate(x).unflatten(0, (4, len(x))).mean(0)


class OneRotation(Rotation):
    """Each image in one rotation of its own; with four times the images, a step has as many rows as before."""

    def forward(self, batch, clock):
        (x,) = batch.views
        y = (4 * rng.uniform(clock.seed, clock.epoch, batch.index, rng.METHOD, 1)[:, 0]).long()
        turned = rotate(x)[y * len(x) + torch.arange(len(x))]
        logits = self.head(self.backbone(turned))
        accuracy = 100 * (logits.argmax(1) == y).float().mean()
        return {"loss": F.cross_entropy(logits, y), "rotation_accuracy": accuracy}


class WrongOrder(Rotation):
    """Targets 0 1 2 3 0 1 2 3 for rows that are grouped by rotation."""

    def forward(self, batch, clock):
        (x,) = batch.views
        y = torch.arange(4).repeat(len(x))
        logits = self.head(self.backbone(rotate(x)))
        accuracy = 100 * (logits.argmax(1) == y).float().mean()
        return {"loss": F.cross_entropy(logits, y), "rotation_accuracy": accuracy}


BROKEN = {
    "as it should be": {},
    "light from above": {"change": light_from_above},
    "watermark": {"change": watermark},
    "any way up": {"knobs": {"orientation": 1.0}},
    "no up in the image": {"change": no_up},
    "one rotation each": {"method": OneRotation, "batch_size": 4 * BATCH},
    "targets out of order": {"method": WrongOrder},
}


def break_it(names=(), seeds=(1,), steps=400) -> None:
    """All of `BROKEN`; or some by name, and the others as the files have them."""
    table: dict[str, dict[str, list[float]]] = {}
    curves: dict[str, dict[str, list[float]]] = {}
    if names:
        table = {k: v for k, v in results.load("rotation_broken").values.items() if k not in names}
        curves = {k: v for k, v in results.load("rotation_curves").values.items() if k not in names}
    for seed in seeds:
        plain = shapes(seed)
        for name in names or BROKEN:
            how = BROKEN[name]
            data = plain
            if "knobs" in how:
                data = Data(shapes=Shapes(num_train=3000, num_test=1000, seed=seed, **(KNOBS | how["knobs"])))
            torch.manual_seed(seed)
            method = how.get("method", Rotation)(ConvNet(), VIEW)
            losses, accuracy = train(method, data, steps, seed, how.get("change"), how.get("batch_size", BATCH))
            row = {
                "loss at step 50": losses[4],
                "last loss": sum(losses[-5:]) / 5,
                "rotation accuracy": accuracy,
                "kNN": knn_of(method.backbone, plain),
            }
            for column, value in row.items():
                table.setdefault(name, {}).setdefault(column, []).append(value)
            curves.setdefault(name, {})[f"seed {seed}"] = [round(v, 4) for v in losses]
            print(seed, name, {k: round(v, 2) for k, v in row.items()}, flush=True)
        settings = {"shapes": KNOBS, "images": 3000, "steps": steps, "batch": BATCH, "lr": LR, "curve every": 10}
        done = list(seeds)[: list(seeds).index(seed) + 1]
        results.save("rotation_broken", {k: table[k] for k in BROKEN}, seeds=done, settings=settings)
        results.save("rotation_curves", {k: curves[k] for k in BROKEN}, seeds=done, settings=settings)


if __name__ == "__main__":
    torch.set_num_threads(1)
    wanted, names = sys.argv[1:2] or ["measure", "labels", "break"], sys.argv[2:]
    if "measure" in wanted:
        measure()
    if "labels" in wanted:
        labels()
    if "break" in wanted:
        break_it(names)
