"""What the chapters' experiments share: the batches of a run, a short training loop, controls, measurements, and result
files that a longer command fills seed by seed.

A chapter's own `experiments.py` holds what belongs to its method: settings, variants, commands.
"""

import argparse
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from sslbook import default_device, results
from sslbook.data.datasets.shapes import Shapes
from sslbook.data.loader import Batch, Data
from sslbook.data.views import View
from sslbook.evaluation import controls, extract_features, factors, knn, linear
from sslbook.methods.base import Method
from sslbook.notebook import photographs
from sslbook.schedules import Clock

Table = dict[str, dict[str, list[float]]]
HELD_OUT = 800  # training images at the end, on which ablations are measured
# What most chapters train on; the settings of a method are chosen on the other images.
TINY_SHAPES = Shapes(num_train=4000, num_test=1000)
OTHER_SHAPES = Shapes(num_train=4000, num_test=1000, seed=1)
COLORS = {"color_jitter": (0.4, 0.4, 0.4, 0.5), "grayscale": 0.2, "interpolation": "bilinear"}
VIEW = View(size=16, crop=(0.3, 1.0), **COLORS)
PHOTOGRAPH = View(size=32, crop=(0.2, 1.0), **COLORS | {"color_jitter": (0.4, 0.4, 0.4, 0.1)})


def batches(data: Data, views: Sequence[View], batch_size: int, steps: int, seed: int) -> list[Batch]:
    """The batches of a run, in memory, so that every variant of a seed trains on the same ones."""
    found, epoch = [], 0
    while len(found) < steps:
        found += data.batches(tuple(views), batch_size, seed=seed, epoch=epoch, device=default_device())
        epoch += 1
    return found[:steps]


def train(
    method: Method,
    run: Sequence[Batch],
    lr: float,
    *,
    groups: Sequence[dict] | None = None,
    watch: Callable[[int, Method], None] = lambda step, method: None,
) -> dict[str, float]:
    """Train in place by AdamW and one cycle of the learning rate; the mean of the last twenty steps' log.

    Args:
        method: what to train.
        run: one batch a step.
        lr: peak learning rate.
        groups: parameter groups with rates of their own, in place of all parameters at `lr`.
        watch: called before every step and after the last.
    """
    parameters = groups or [{"params": [p for p in method.parameters() if p.requires_grad]}]
    optimizer = torch.optim.AdamW(parameters, lr, weight_decay=0.01)
    rates = [group["lr"] for group in optimizer.param_groups]
    rate = torch.optim.lr_scheduler.OneCycleLR(optimizer, rates, total_steps=len(run), pct_start=0.1)
    log = []
    method.train()
    for step, batch in enumerate(run):
        watch(step, method)
        out = method(batch, Clock(step, len(run)))
        optimizer.zero_grad()
        out["loss"].backward()
        method.before_optimizer_step(Clock(step, len(run)))
        optimizer.step()
        rate.step()
        method.after_step(Clock(step + 1, len(run)))
        log.append({name: value.item() for name, value in out.items()})
    watch(len(run), method)
    return {name: sum(line[name] for line in log[-20:]) / len(log[-20:]) for name in log[0]}


def train_supervised(
    backbone: nn.Module, data: Data, view: View, steps: int, batch_size: int, seed: int, lr: float
) -> nn.Module:
    """The supervised control, with the method's views and as many steps; trained in place."""
    center = View.center(view.size)
    controls.train_supervised(
        backbone, data, view, steps, batch_size, evaluation_view=center, lr=lr, seed=seed, progress=False
    )
    return backbone


# -- measuring ---------------------------------------------------------------------------------------------------------


def features(network: nn.Module, data: Data, size: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Features and labels of the training images, then of the test images."""
    x, y = extract_features(network, data, "train", View.center(size), progress=False)
    test_x, test_y = extract_features(network, data, "test", View.center(size), progress=False)
    return x, y, test_x, test_y


def score(network: nn.Module, data: Data, size: int) -> dict[str, float]:
    """kNN and linear probe on test images, in %."""
    found = features(network, data, size)
    return {"kNN": knn.accuracy(*found), "linear": linear.probe(*found).accuracy}


def held_out(network: nn.Module, data: Data, size: int) -> dict[str, float]:
    """The same on the last `HELD_OUT` training images, and the effective rank of their features."""
    x, y = extract_features(network, data, "train", View.center(size), progress=False)
    found = x[:-HELD_OUT], y[:-HELD_OUT], x[-HELD_OUT:], y[-HELD_OUT:]
    accuracy = {"kNN": knn.accuracy(*found), "linear": linear.probe(*found).accuracy}
    return {"rank of h": effective_rank(x[-HELD_OUT:]), **accuracy}


def effective_rank(x: Tensor) -> float:
    """The exponential of the entropy of the normalized singular values of the centered rows."""
    singular = torch.linalg.svdvals((x - x.mean(0)).double())
    return torch.special.entr(singular / singular.sum().clamp(min=1e-12)).sum().exp().item()


def note_factors(table: Table, column: str, network: nn.Module, data: Data, size: int) -> None:
    """Add what a probe reads of each known factor of Shapes, in `column`; the first call adds the chance level."""
    if not table:
        for name, level in factors.chance_levels(data.factors("train"), data.factors("test")).items():
            table[name] = {"chance": [round(level, 2)]}
    x, _, test_x, _ = features(network, data, size)
    for name, value in factors.probe(x, data.factors("train"), test_x, data.factors("test")).items():
        table[name].setdefault(column, []).append(round(value, 2))


# -- tables and commands -----------------------------------------------------------------------------------------------


def note(table: Table, row: str, values: dict[str, float]) -> None:
    """Add one seed's values to a row, and print them."""
    for name, value in values.items():
        table.setdefault(row, {}).setdefault(name, []).append(round(value, 4))
    print(row, {name: round(value, 3) for name, value in values.items()}, flush=True)


def begin(names: Sequence[str], about: dict, resume: bool) -> tuple[list[Table], int]:
    """The tables to fill and how many seeds they hold: none, or with `resume` those of the files."""
    if not resume:
        return [{} for _ in names], 0
    found = [results.load(name) for name in names]
    if any((one.settings, one.seeds) != (about, list(range(len(found[0].seeds)))) for one in found):
        raise SystemExit("the files are of other settings or seeds: run without --resume")
    return [dict(one.values) for one in found], len(found[0].seeds)


def cifar10(num_train: int, num_test: int) -> Data:
    """Photographs, from `SSLBOOK_DATA` or downloaded."""
    found = photographs.cifar10(num_train, num_test)
    if found is None:
        raise SystemExit("no photographs: set SSLBOOK_DATA to a folder that holds CIFAR-10")
    return Data.from_images(found.train, found.train_labels, found.test, found.test_labels, found.classes, found.name)


def main(doc: str | None, *commands: Callable[[int, bool], None]) -> None:
    """Run the command named on the command line, which takes the number of seeds and whether to resume."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    named = {command.__name__: command for command in commands}
    parser.add_argument("what", choices=list(named))
    parser.add_argument("--seeds", type=int, default=None, help="how many: 3, of settings 1")
    parser.add_argument("--resume", action="store_true", help="go on after the seeds that the files hold")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    named[arguments.what](arguments.seeds or (1 if arguments.what == "settings" else 3), arguments.resume)
