"""What the chapter on SimCLR quotes: its longer runs over several seeds, and its ablations.

    python book/chapters/simclr/experiments.py measure --seeds 3
    python book/chapters/simclr/experiments.py sabotage          each some minutes on one CPU core

Write `simclr_shapes` (accuracy on test images beside the controls), `simclr_factors` (how well h and z predict
every factor) and `simclr_sabotage`, which is measured on held-out training images, so that settings can be chosen from it.
"""

import argparse
import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sslbook import results
from sslbook.data.datasets.shapes import Shapes
from sslbook.data.loader import Batch, Data
from sslbook.data.views import View
from sslbook.errors import UserError
from sslbook.evaluation import controls, extract_features, factors, knn, linear
from sslbook.methods.simclr import SimCLR
from sslbook.schedules import Clock

TINY_SHAPES = Shapes(num_train=4000, num_test=1000)
VIEW = View(size=16, crop=(0.3, 1.0), color_jitter=(0.4, 0.4, 0.4, 0.5), grayscale=0.2)
CENTER = View.center(16)
BATCH, LR, TEMPERATURE = 256, 5e-3, 0.2
HELD_OUT = 800  # training images at the end that the ablations are evaluated on
TEMPERATURES = (0.02, 1.0)
STEPS = 120


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


class KeepsItself(SimCLR):
    """The sabotage: a row's similarity to itself stays among the candidates."""

    def forward(self, batch: Batch, clock: Clock) -> dict[str, Tensor]:
        z_1, z_2 = self.projector(self.backbone(torch.cat(batch.views))).chunk(2)
        z = F.normalize(torch.cat([z_1, z_2]), dim=1)
        loss = 2 * F.cross_entropy(z @ z.T / self.temperature, torch.arange(len(z)).roll(len(z_1)))
        return {"loss": loss, **self._measure(z_1.detach(), z_2.detach())}


def make(seed: int, kind: type[SimCLR] = SimCLR, view: View = VIEW, temperature: float = TEMPERATURE) -> SimCLR:
    torch.manual_seed(seed)
    return kind(SmallNet(), view, temperature, projector_num_layers=2, projector_dim=64)


def train(method: SimCLR, data: Data, steps: int, seed: int) -> dict[str, float]:
    """Train in place, as the chapter does; the mean of the last twenty steps' log."""
    optimizer = torch.optim.AdamW(method.parameters(), LR, weight_decay=0.01)
    rate = torch.optim.lr_scheduler.OneCycleLR(optimizer, LR, total_steps=steps, pct_start=0.1)
    log, epoch = [], 0
    method.train()
    while len(log) < steps:
        for batch in data.batches(method.views(), BATCH, seed=seed, epoch=epoch):
            if len(log) == steps:
                break
            out = method(batch, Clock(len(log), steps))
            optimizer.zero_grad()
            out["loss"].backward()
            optimizer.step()
            rate.step()
            log.append({name: value.item() for name, value in out.items()})
        epoch += 1
    return {name: sum(line[name] for line in log[-20:]) / len(log[-20:]) for name in log[0]}


def features(network: nn.Module, data: Data) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    train_part = extract_features(network, data, "train", CENTER, progress=False)
    return *train_part, *extract_features(network, data, "test", CENTER, progress=False)


def evaluate(backbone: nn.Module, data: Data) -> dict[str, float]:
    """On held-out training images: kNN, and linear probes of shape, hue and background."""
    x, y = extract_features(backbone, data, "train", CENTER, progress=False)
    bank, queries = x[:-HELD_OUT], x[-HELD_OUT:]
    found = {"kNN": knn.accuracy(bank, y[:-HELD_OUT], queries, y[-HELD_OUT:])}
    for name in ("shape", "hue", "background"):
        value = data.factors("train")[name]
        found[name] = linear.probe(bank, value[:-HELD_OUT], queries, value[-HELD_OUT:]).accuracy
    return found


def score(network: nn.Module, data: Data) -> dict[str, float]:
    """On test images."""
    x, y, test_x, test_y = features(network, data)
    return {
        "kNN": knn.accuracy(x, y, test_x, test_y),
        "linear": linear.probe(x, y, test_x, test_y).accuracy,
    }


NONE = "as it should be"
VARIANTS = {
    NONE: {},
    "no color jitter": {"view": View(size=16, crop=VIEW.crop)},
    "no projector": {},
    "k = i kept": {"kind": KeepsItself},
    **{f"temperature {t:g}": {"temperature": t} for t in TEMPERATURES},
    "textured background": {},
}
SETTINGS = {"steps": STEPS, "batch": BATCH, "temperature": TEMPERATURE, "images": TINY_SHAPES.num_train}
Table = dict[str, dict[str, list[float]]]


def note(table: Table, row: str, values: dict[str, float]) -> None:
    for name, value in values.items():
        table.setdefault(row, {}).setdefault(name, []).append(round(value, 3))
    print(row, {name: round(value, 2) for name, value in values.items()}, flush=True)


def measure(seeds: list[int]) -> None:
    """`simclr_shapes` and `simclr_factors`: the method as it should be, beside its controls, on test images."""
    data = Data(shapes=TINY_SHAPES)
    shapes: Table = {}
    known: Table = {}

    def factor(column: str, network: nn.Module) -> None:
        x, _, test_x, _ = features(network, data)
        for name, value in factors.probe(x, data.factors("train"), test_x, data.factors("test")).items():
            known.setdefault(name, {}).setdefault(column, []).append(round(value, 2))

    for name, level in factors.chance_levels(data.factors("train"), data.factors("test")).items():
        known[name] = {"chance": [round(level, 2)]}
    factor("pixels", nn.Flatten())
    pixels = score(nn.Flatten(), data)
    for seed in seeds:
        method = make(seed)
        fresh = copy.deepcopy(method.backbone)
        random = score(fresh, data)
        if seed == 0:
            factor("random weights", fresh)
        train(method, data, STEPS, seed)
        note(shapes, "SimCLR", score(method.backbone, data))
        if seed == 0:
            note(shapes, "pixels", pixels)
        note(shapes, "random weights", random)
        factor("h", method.backbone)
        factor("z", nn.Sequential(method.backbone, method.projector))
        controls.train_supervised(fresh, data, VIEW, STEPS, BATCH, evaluation_view=CENTER, seed=seed, progress=False)
        note(shapes, "supervised", score(fresh, data))
        results.save("simclr_shapes", shapes, seeds=seeds[: seed + 1], settings=SETTINGS)
        results.save("simclr_factors", known, seeds=seeds[: seed + 1], settings=SETTINGS)


def sabotage(seeds: list[int], only: list[str]) -> None:
    """`simclr_sabotage`: one line changed at a time, on held-out training images. Rows not in `only` are kept."""
    plain, textured = Data(shapes=TINY_SHAPES), Data(shapes=Shapes(**{**vars(TINY_SHAPES), "texture": 1.0}))
    for name in only:
        rows: Table = {}
        for seed in seeds:
            method, data = make(seed, **VARIANTS[name]), textured if name == "textured background" else plain
            if name == "no projector":
                method.projector = nn.Identity()
            log = train(method, data, STEPS, seed)
            note(rows, name, {**log, **evaluate(method.backbone, data)})
        try:
            old = results.load("simclr_sabotage")
            rows |= {row: old[row] for row in old.values if row not in rows and old.settings == SETTINGS}
        except UserError:  # there is none yet
            pass
        table = {row: rows[row] for row in VARIANTS if row in rows}
        results.save("simclr_sabotage", table, seeds=seeds, settings=SETTINGS)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["measure", "sabotage"])
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--only", nargs="+", choices=list(VARIANTS), default=list(VARIANTS), help="which sabotages")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    seeds = list(range(arguments.seeds))
    measure(seeds) if arguments.what == "measure" else sabotage(seeds, arguments.only)


if __name__ == "__main__":
    main()
