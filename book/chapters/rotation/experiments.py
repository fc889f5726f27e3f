"""What the chapter *Rotation prediction* quotes: the choice of its settings, its tables, its runs that are broken.

    python book/chapters/rotation/experiments.py settings       learning rates, on held-out training images of another seed
    python book/chapters/rotation/experiments.py shapes         the method beside its controls, and every stage; three seeds
    python book/chapters/rotation/experiments.py break          one line changed at a time
    python book/chapters/rotation/experiments.py patience       one rotation for each image, for many more steps
    python book/chapters/rotation/experiments.py photographs    CIFAR-10, from SSLBOOK_DATA or --data or downloaded

Each takes minutes on one CPU core. They write `rotation_settings`; `rotation_shapes` and `rotation_stages`;
`rotation_broken` and `rotation_curves`; `rotation_patience`; `rotation_photographs`, `rotation_photographs_stages` and
the checkpoint `rotation_cifar10`.
"""

import argparse
import copy
import json
import math
import os
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sslbook import default_device, results, rng
from sslbook.data.datasets.shapes import Shapes
from sslbook.data.loader import Batch, Data
from sslbook.data.views import View
from sslbook.evaluation import controls, extract_features, knn, linear
from sslbook.methods.rotation import Rotation, rotate, targets
from sslbook.schedules import Clock

KNOBS = {"position": 1.0, "scale": 1.0, "orientation": 0.1}
PLAIN = {"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)}  # pixels from 0 to 1; batch norm does the rest
BATCH, DECAY = 32, 0.01
LR, LR_SUPERVISED, LR_SAME_ROWS = 4e-3, 2e-3, 4e-3  # the best of `settings`; of two that are equal, the lower
LRS = (1e-3, 2e-3, 4e-3)
STEPS, BROKEN_STEPS, SETTINGS_STEPS, PATIENT_STEPS = 400, 400, 300, 1000
NUM_TRAIN, NUM_TEST, HELD_OUT = 3000, 1000, 600
PHOTOGRAPHS, PHOTOGRAPH_STEPS, PHOTOGRAPH_WIDTH = (10000, 2000), 500, 24
EVERY = 10  # steps that a point of a curve averages
METHOD, RANDOM, PIXELS, SUPERVISED = "rotation prediction", "random weights", "pixels", "supervised"
SAME_ROWS, TOO_HIGH = "supervised, same rows", "supervised, twice the rate"
Table = dict[str, dict[str, list[float]]]


class ConvNet(nn.Module):
    """The chapter's backbone: four blocks of two convolutions, mean over what is left of the image."""

    def __init__(self, width: int = 16, stride: int = 1) -> None:
        super().__init__()
        widths = [3, width, 2 * width, 4 * width, 4 * width]
        self.blocks = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(i, o, 3, step, padding=1, bias=False),
                nn.BatchNorm2d(o),
                nn.ReLU(),
                nn.Conv2d(o, o, 3, padding=1, bias=False),
                nn.BatchNorm2d(o),
                nn.ReLU(),
            )
            for i, o, step in zip(widths, widths[1:], (stride, 2, 2, 1))
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


class Stage(nn.Module):
    """One stage of the backbone, averaged over a 2 x 2 grid of positions."""

    def __init__(self, backbone: ConvNet, stage: int) -> None:
        super().__init__()
        self.backbone, self.stage = backbone, stage

    def forward(self, x: Tensor) -> Tensor:
        return F.adaptive_avg_pool2d(self.backbone.stages(x)[self.stage], 2).flatten(1)


def view(size: int) -> View:
    return View(size=size, crop=None, flip=0.5, **PLAIN)


def train(
    method: Rotation,
    data: Data,
    steps: int,
    seed: int,
    lr: float = LR,
    change: Callable[[Tensor], Tensor] | None = None,
    batch_size: int = BATCH,
) -> tuple[list[float], float]:
    """Train as the chapter does; the loss, averaged over `EVERY` steps, and the accuracy of the last fifty."""
    device = default_device()
    method.to(device).train()
    optimizer = torch.optim.AdamW(method.parameters(), lr=lr, weight_decay=DECAY)
    per_epoch = data.steps_per_epoch(batch_size)
    clock, losses, accuracies = Clock(0, steps, per_epoch, seed), [], []
    while clock.step < steps:
        for batch in data.batches(method.views(), batch_size, seed=seed, epoch=clock.epoch, device=device):
            if clock.step == steps:
                break
            if change is not None:
                batch = batch._replace(views=(change(batch.views[0]),))
            warm = min(1.0, (clock.step + 1) / max(1, steps // 20))
            for group in optimizer.param_groups:
                group["lr"] = lr * warm * 0.5 * (1 + math.cos(math.pi * clock.progress))
            out = method(batch, clock)
            optimizer.zero_grad()
            out["loss"].backward()
            optimizer.step()
            losses.append(out["loss"].item())
            accuracies.append(out["rotation_accuracy"].item())
            if clock.step % 200 == 199:
                print(f"  step {clock.step + 1}: loss {sum(losses[-20:]) / 20:.2f}", flush=True)
            clock = Clock(clock.step + 1, steps, per_epoch, seed)
    method.eval()
    smooth = [sum(losses[i : i + EVERY]) / EVERY for i in range(0, len(losses) - EVERY + 1, EVERY)]
    return smooth, sum(accuracies[-50:]) / len(accuracies[-50:])


def train_supervised(
    backbone: ConvNet, data: Data, steps: int, seed: int, lr: float, batch_size: int, size: int = 16
) -> float:
    """The same network, view, steps and optimizer, with labels; the accuracy of its own head on the test split."""
    backbone.to(default_device())
    return controls.train_supervised(
        backbone,
        data,
        view(size),
        steps,
        batch_size,
        evaluation_view=View.center(size, **PLAIN),
        lr=lr,
        weight_decay=DECAY,
        seed=seed,
        progress=False,
    )


def accuracy_of(method: Rotation, data: Data, size: int = 16) -> float:
    """Rotation accuracy on the test split, in percent."""
    right = total = 0
    for batch in data.evaluation_batches("test", View.center(size, **PLAIN)):
        x = batch.views[0].to(default_device())
        with torch.no_grad():
            chosen = method.head(method.backbone(rotate(x))).argmax(1)
        right += (chosen == targets(len(x), chosen.device)).sum().item()
        total += len(chosen)
    return 100 * right / total


def features(backbone: nn.Module, data: Data, size: int = 16) -> list[Tensor]:
    see = View.center(size, **PLAIN)
    return [t for split in ("train", "test") for t in extract_features(backbone, data, split, see, progress=False)]


def score(backbone: nn.Module, data: Data, size: int = 16) -> dict[str, float]:
    found = features(backbone, data, size)
    return {"kNN": knn.accuracy(*found), "linear": linear.probe(*found).accuracy}


def by_stage(backbone: ConvNet, data: Data, size: int = 16) -> dict[str, float]:
    probed = [linear.probe(*features(Stage(backbone, stage), data, size)).accuracy for stage in range(4)]
    return {f"stage {stage + 1}": value for stage, value in enumerate(probed)}


def note(table: Table, row: str, values: dict[str, float]) -> None:
    for column, value in values.items():
        table.setdefault(row, {}).setdefault(column, []).append(round(value, 3))
    print(row, {column: round(value, 2) for column, value in values.items()}, flush=True)


def shapes(seed: int, **knobs: float) -> Data:
    return Data(shapes=Shapes(num_train=NUM_TRAIN, num_test=NUM_TEST, seed=seed, **(KNOBS | knobs)))


def held_out(seed: int = 0) -> Data:
    """Training images alone: those to learn from, and in the place of test images the last `HELD_OUT` of them."""
    x, known = Shapes(num_train=NUM_TRAIN, num_test=1, seed=seed, **KNOBS).render("train")
    y = known["shape"]
    return Data.from_images(x[:-HELD_OUT], y[:-HELD_OUT], x[-HELD_OUT:], y[-HELD_OUT:], Shapes.class_names)


# -- commands ----------------------------------------------------------------------------------------------------------


def settings(seeds: list[int]) -> None:
    """Learning rates: rotation accuracy, and the supervised controls' own accuracy, on held-out training images."""
    table: Table = {}
    data = held_out()
    for seed in seeds:
        for lr in LRS:
            torch.manual_seed(100 + seed)
            fresh = ConvNet()
            method = Rotation(copy.deepcopy(fresh), view(16))
            train(method, data, SETTINGS_STEPS, 100 + seed, lr)
            values = {METHOD: accuracy_of(method, data)}
            for name, batch_size in ((SUPERVISED, BATCH), (SAME_ROWS, 4 * BATCH)):
                backbone = copy.deepcopy(fresh)
                values[name] = train_supervised(backbone, data, SETTINGS_STEPS, 100 + seed, lr, batch_size)
            note(table, f"learning rate {lr:g}", values)
        about = {"shapes": KNOBS, "shapes seed": 0, "steps": SETTINGS_STEPS, "batch": BATCH, "held out": HELD_OUT}
        results.save("rotation_settings", table, seeds=seeds[: seeds.index(seed) + 1], settings=about)


def measure(seeds: list[int]) -> None:
    """The method beside its controls on test images: pooled features, and every stage."""
    table: Table = {row: {} for row in (METHOD, RANDOM, PIXELS, SUPERVISED, SAME_ROWS, TOO_HIGH)}
    stages: Table = {row: {} for row in (METHOD, RANDOM, SUPERVISED, SAME_ROWS)}
    for seed in seeds:
        data = shapes(1 + seed)
        torch.manual_seed(1 + seed)
        fresh = ConvNet()
        note(table, PIXELS, score(nn.Flatten(), data))
        method = Rotation(copy.deepcopy(fresh), view(16))
        train(method, data, STEPS, 1 + seed)
        note(table, METHOD, {"rotation accuracy": accuracy_of(method, data)})
        trained = {METHOD: method.backbone, RANDOM: fresh}
        for name, lr, batch_size in ((SUPERVISED, LR_SUPERVISED, BATCH), (SAME_ROWS, LR_SAME_ROWS, 4 * BATCH)):
            trained[name] = copy.deepcopy(fresh)
            note(table, name, {"own head": train_supervised(trained[name], data, STEPS, 1 + seed, lr, batch_size)})
        rate = 2 * LR_SUPERVISED
        note(table, TOO_HIGH, {"own head": train_supervised(copy.deepcopy(fresh), data, STEPS, 1 + seed, rate, BATCH)})
        for name, backbone in trained.items():
            note(table, name, score(backbone, data))
            note(stages, name, by_stage(backbone, data))
        about = {"shapes": KNOBS, "images": NUM_TRAIN, "steps": STEPS, "batch": BATCH, "weight_decay": DECAY}
        about |= {"lr": {METHOD: LR, SUPERVISED: LR_SUPERVISED, SAME_ROWS: LR_SAME_ROWS}}
        done = [1 + s for s in seeds[: seeds.index(seed) + 1]]
        results.save("rotation_shapes", table, seeds=done, settings=about)
        results.save("rotation_stages", stages, seeds=done, settings=about)


def light_from_above(x: Tensor) -> Tensor:
    """Brightness rises by 10 % from the middle to the upper edge."""
    return x * (1 + 0.1 * torch.linspace(1, -1, x.shape[-1], device=x.device)[:, None])


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

    def forward(self, batch: Batch, clock: Clock) -> dict[str, Tensor]:
        (x,) = batch.views
        y = (4 * rng.uniform(clock.seed, clock.epoch, batch.index, rng.METHOD, 1)[:, 0]).long().to(x.device)
        logits = self.head(self.backbone(rotate(x)[y * len(x) + torch.arange(len(x), device=x.device)]))
        accuracy = 100 * (logits.argmax(1) == y).float().mean()
        return {"loss": F.cross_entropy(logits, y), "rotation_accuracy": accuracy}


class WrongOrder(Rotation):
    """Targets 0 1 2 3 0 1 2 3 for rows that are grouped by rotation."""

    def forward(self, batch: Batch, clock: Clock) -> dict[str, Tensor]:
        (x,) = batch.views
        y = torch.arange(4, device=x.device).repeat(len(x))
        logits = self.head(self.backbone(rotate(x)))
        accuracy = 100 * (logits.argmax(1) == y).float().mean()
        return {"loss": F.cross_entropy(logits, y), "rotation_accuracy": accuracy}


ONE_EACH = "one rotation each"
BROKEN: dict[str, dict] = {
    "as it should be": {},
    "light from above": {"change": light_from_above},
    "watermark": {"change": watermark},
    "any way up": {"knobs": {"orientation": 1.0}},
    "no up in the image": {"change": no_up},
    ONE_EACH: {"method": OneRotation, "batch_size": 4 * BATCH},
    "targets out of order": {"method": WrongOrder},
}


def broken_run(name: str, seed: int, steps: int, plain: Data) -> tuple[dict[str, float], list[float]]:
    """One run of `BROKEN`: its figures, kNN on unchanged test images, and its curve."""
    how = BROKEN[name]
    data = shapes(seed, **how["knobs"]) if "knobs" in how else plain
    torch.manual_seed(seed)
    method = how.get("method", Rotation)(ConvNet(), view(16))
    losses, accuracy = train(
        method, data, steps, seed, change=how.get("change"), batch_size=how.get("batch_size", BATCH)
    )
    near = knn.accuracy(*features(method.backbone, plain))
    last = sum(losses[-5:]) / 5
    row = {"loss at step 50": losses[50 // EVERY - 1], "last loss": last, "rotation accuracy": accuracy, "kNN": near}
    return row, [round(loss, 4) for loss in losses]


def break_it(seeds: list[int]) -> None:
    """Each run of `BROKEN`, and the curves of their losses."""
    table: Table = {}
    curves: Table = {}
    for seed in seeds:
        plain = shapes(1 + seed)
        for name in BROKEN:
            row, curve = broken_run(name, 1 + seed, BROKEN_STEPS, plain)
            note(table, name, row)
            curves.setdefault(name, {})[f"seed {1 + seed}"] = curve
        about = {"shapes": KNOBS, "images": NUM_TRAIN, "steps": BROKEN_STEPS, "batch": BATCH, "lr": LR}
        done = [1 + s for s in seeds[: seeds.index(seed) + 1]]
        results.save("rotation_broken", table, seeds=done, settings=about)
        results.save("rotation_curves", curves, seeds=done, settings=about | {"steps a point": EVERY})


def patience(seeds: list[int]) -> None:
    """One rotation for each image, for many more steps than `break` takes: the curve, and the figures at its end."""
    curves: Table = {}
    for seed in seeds:
        row, curve = broken_run(ONE_EACH, 1 + seed, PATIENT_STEPS, shapes(1 + seed))
        print(row, flush=True)
        curves.setdefault(ONE_EACH, {})[f"seed {1 + seed}"] = curve
        for column in ("rotation accuracy", "kNN"):
            curves[ONE_EACH].setdefault(column, []).append(round(row[column], 3))
        about = {"shapes": KNOBS, "images": NUM_TRAIN, "steps": PATIENT_STEPS, "batch": 4 * BATCH, "lr": LR}
        done = [1 + s for s in seeds[: seeds.index(seed) + 1]]
        results.save("rotation_patience", curves, seeds=done, settings=about | {"steps a point": EVERY})


def photographs(seeds: list[int]) -> None:
    """CIFAR-10: the method beside its controls on test images, and every stage; the checkpoint is of the first seed."""
    from safetensors.torch import save_file

    from sslbook.notebook import photographs as source

    found = source.cifar10(*PHOTOGRAPHS)
    if found is None:
        raise SystemExit("no photographs: set SSLBOOK_DATA, or --data, to a folder that holds CIFAR-10")
    data = Data.from_images(
        found.train, found.train_labels, found.test, found.test_labels, found.classes, "photographs"
    )
    table: Table = {row: {} for row in (METHOD, RANDOM, PIXELS, SUPERVISED)}
    stages: Table = {row: {} for row in (METHOD, RANDOM, SUPERVISED)}
    about = {"data": found.name, "images": len(found.train), "test images": len(found.test), "batch": BATCH}
    about |= {"steps": PHOTOGRAPH_STEPS, "width": PHOTOGRAPH_WIDTH, "stride": 2, "weight_decay": DECAY}
    about |= {"lr": {METHOD: LR, SUPERVISED: LR_SAME_ROWS}}
    note(table, PIXELS, score(nn.Flatten(), data, 32))
    for seed in seeds:
        torch.manual_seed(seed)
        fresh = ConvNet(PHOTOGRAPH_WIDTH, stride=2)
        method = Rotation(copy.deepcopy(fresh), view(32))
        train(method, data, PHOTOGRAPH_STEPS, seed)
        note(table, METHOD, {"rotation accuracy": accuracy_of(method, data, 32)})
        if seed == seeds[0]:
            path = results.book() / "checkpoints" / "rotation_cifar10.safetensors"
            save_file({k: v.detach().cpu().contiguous() for k, v in method.state_dict().items()}, path)
            facts = {"command": "python book/chapters/rotation/experiments.py photographs", "seed": seed, **about}
            path.with_suffix(".json").write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
        labeled = copy.deepcopy(fresh)
        own_head = train_supervised(labeled, data, PHOTOGRAPH_STEPS, seed, LR_SAME_ROWS, 4 * BATCH, 32)
        note(table, SUPERVISED, {"own head": own_head})
        for name, backbone in ((METHOD, method.backbone), (RANDOM, fresh), (SUPERVISED, labeled)):
            note(table, name, score(backbone, data, 32))
            note(stages, name, by_stage(backbone, data, 32))
        done = seeds[: seeds.index(seed) + 1]
        results.save("rotation_photographs", table, seeds=done, settings=about)
        results.save("rotation_photographs_stages", stages, seeds=done, settings=about)


COMMANDS = {
    "settings": settings,
    "shapes": measure,
    "break": break_it,
    "patience": patience,
    "photographs": photographs,
}
SEEDS = {"settings": 1, "shapes": 3, "break": 3, "patience": 1, "photographs": 1}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=list(COMMANDS))
    parser.add_argument("--seeds", type=int, default=None, help=f"how many; by default {SEEDS}")
    parser.add_argument("--data", default=None, help="folder that holds CIFAR-10; as the variable SSLBOOK_DATA")
    arguments = parser.parse_args()
    if arguments.data is not None:
        os.environ["SSLBOOK_DATA"] = arguments.data
    torch.set_num_threads(1)
    COMMANDS[arguments.what](list(range(arguments.seeds or SEEDS[arguments.what])))


if __name__ == "__main__":
    main()
