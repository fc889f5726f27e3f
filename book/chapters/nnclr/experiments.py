"""What the chapter on NNCLR quotes: the choice of its settings, its longer runs over several seeds, its ablations.

    python book/chapters/nnclr/experiments.py settings       learning rates and sizes of the support set, on images of
                                                             another seed of Shapes
    python book/chapters/nnclr/experiments.py shapes         NNCLR, SimCLR and the controls, the factors, and what the
                                                             neighbors are at every step; three seeds
    python book/chapters/nnclr/experiments.py oracle         neighbors that are always right, for as many steps
    python book/chapters/nnclr/experiments.py long           NNCLR, no neighbors, right neighbors: 720 steps
    python book/chapters/nnclr/experiments.py sabotage       one part removed or replaced at a time; three seeds
    python book/chapters/nnclr/experiments.py photographs    CIFAR-10, from SSLBOOK_DATA or downloaded

Each takes minutes on one CPU core; with --resume it goes on after the seeds that its files hold. They write
`nnclr_settings`; `nnclr_shapes`, `nnclr_factors`, `nnclr_oracle` and `nnclr_long` (on test images) and
`nnclr_agreement`; `nnclr_sabotage` (on held-out training images) and `nnclr_purity`; `nnclr_photographs`, with the
checkpoint `nnclr_cifar10`.
"""

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn

from sslbook import default_device, results
from sslbook.book.chapters.experiments import (
    OTHER_SHAPES,
    PHOTOGRAPH,
    TINY_SHAPES,
    VIEW,
    Table,
    batches,
    begin,
    cifar10,
    held_out,
    main,
    note,
    note_factors,
    score,
    train,
    train_supervised,
)
from sslbook.book.chapters.nnclr.variants import (
    AmongNeighbors,
    InBackbone,
    OneOfFive,
    Oracle,
    OwnView,
    PushedFirst,
    Random,
    Traced,
    agreement,
)
from sslbook.data.loader import Data
from sslbook.data.views import View
from sslbook.methods.base import Method
from sslbook.methods.nnclr import NNCLR
from sslbook.methods.simclr import SimCLR
from sslbook.nn import MLP, ConvNet
from sslbook.weights.backbone import export_backbone

CROP = View(size=16, crop=VIEW.crop, interpolation="bilinear")
WIDTH, HIDDEN, DIM, TEMPERATURE, BATCH, QUEUE = 16, 256, 64, 0.2, 256, 3072
LR, LR_SUPERVISED = 1e-2, 5e-3  # the best of `settings`, and of SimCLR's chapter
LRS = (5e-3, 1e-2, 2e-2)
STEPS = {"settings": 120, "shapes": 240, "long": 720, "sabotage": 120, "photographs": 300}
PHOTOGRAPHS, PHOTOGRAPH_BATCH = (4000, 1000), 128
EVERY = 10  # steps over which the curves are averaged

NONE = "as it should be"
VARIANTS: dict[str, dict] = {
    NONE: {},
    "support set of 1024": {"queue_size": 1024},
    "support set of one batch": {"queue_size": BATCH},
    "own view": {"kind": OwnView},
    "right class (oracle)": {"kind": Oracle},
    "random row": {"kind": Random},
    "one of the 5 nearest": {"kind": OneOfFive},
    "neighbors in h": {"kind": InBackbone},
    "pushed before the search": {"kind": PushedFirst},
    "softmax over the neighbors": {"kind": AmongNeighbors},
    "no predictor": {"predictor": nn.Identity},
    "crop only": {"view": CROP},
}


def make(
    seed: int,
    *,
    kind: Callable[..., NNCLR] = Traced,
    view: View = VIEW,
    queue_size: int = QUEUE,
    predictor: Callable[[], nn.Module] | None = None,
) -> NNCLR:
    torch.manual_seed(seed)
    parts = {"predictor": predictor()} if predictor else {}
    method = kind(ConvNet(WIDTH), view, view, HIDDEN, DIM, HIDDEN, TEMPERATURE, queue_size, **parts)
    return method.to(default_device())


def simclr(seed: int, view: View = VIEW) -> SimCLR:
    """SimCLR with NNCLR's backbone, projector and temperature."""
    torch.manual_seed(seed)
    projector = MLP(4 * WIDTH, HIDDEN, DIM, num_layers=3, last_batch_norm="affine")
    return SimCLR(ConvNet(WIDTH), view, TEMPERATURE, projector=projector).to(default_device())


class Watch:
    """Called before every step: notes how much the neighbors of the last step agree with their anchors."""

    def __init__(self, factors: dict[str, Tensor]) -> None:
        varied = {name: values for name, values in factors.items() if len(values.unique()) > 1}
        self.factors = {name: values.to(default_device()) for name, values in varied.items()}
        self.steps: list[dict[str, float]] = []

    def __call__(self, step: int, method: Method) -> None:
        if step == 0 or not isinstance(method, Traced):
            return
        a, b = method.batch.index, method.neighbor
        filled = b >= 0
        if filled.any():
            found = {name: agreement(values, a[filled], b[filled]) for name, values in self.factors.items()}
        else:  # before anything was pushed
            found = dict.fromkeys(self.factors, 0.0)
        self.steps.append({**found, **{name: value.item() for name, value in method.last.items()}})

    def curves(self) -> dict[str, list[float]]:
        """The mean of every `EVERY` steps."""
        rows = [self.steps[i : i + EVERY] for i in range(0, len(self.steps), EVERY)]
        return {name: [round(sum(s[name] for s in row) / len(row), 4) for row in rows] for name in self.steps[0]}


# -- commands ----------------------------------------------------------------------------------------------------------


def settings(num_seeds: int, resume: bool) -> None:
    """`nnclr_settings`: learning rates and support sets, on the images of another seed of Shapes."""
    steps, data, table = STEPS["settings"], Data(shapes=OTHER_SHAPES), {}
    run = batches(data, (VIEW, VIEW), BATCH, steps, 100)
    for lr in LRS:
        for name, method in (("NNCLR", make(100)), ("SimCLR", simclr(100))):
            train(method, run, lr)
            note(table, f"{name}, learning rate {lr:g}", score(method.backbone, data, 16))
    for size in (BATCH, 1024):
        method = make(100, queue_size=size)
        train(method, run, LR)
        note(table, f"NNCLR, support set of {size}", score(method.backbone, data, 16))
    about = {"steps": steps, "batch": BATCH, "support set": QUEUE, "shapes seed": 1}
    results.save("nnclr_settings", table, seeds=[100], settings=about)


def shapes(num_seeds: int, resume: bool) -> None:
    """`nnclr_shapes`, `nnclr_factors` and `nnclr_agreement`: the method beside its controls."""
    data, steps = Data(shapes=TINY_SHAPES), STEPS["shapes"]
    names = ["nnclr_shapes", "nnclr_factors", "nnclr_agreement"]
    about = {"steps": steps, "batch": BATCH, "support set": QUEUE, "images": TINY_SHAPES.num_train, "every": EVERY}
    (rows, known, curves), done = begin(names, about, resume)
    if not done:
        rows |= {name: {} for name in ("NNCLR", "SimCLR", "own view", "random weights", "pixels", "supervised")}
        note(rows, "pixels", score(nn.Flatten(), data, 16))
        note_factors(known, "pixels", nn.Flatten(), data, 16)
    for seed in range(done, num_seeds):
        run = batches(data, (VIEW, VIEW), BATCH, steps, seed)
        for row, method in (("NNCLR", make(seed)), ("own view", make(seed, kind=OwnView)), ("SimCLR", simclr(seed))):
            fresh, watch = copy.deepcopy(method.backbone), Watch(data.factors("train"))
            print(train(method, run, LR, watch=watch), flush=True)
            note(rows, row, score(method.backbone, data, 16))
            note_factors(known, f"h, {row}", method.backbone, data, 16)
            if row != "SimCLR":
                curves[f"{row}, {seed}"] = watch.curves()
            if row == "NNCLR":
                note(rows, "random weights", score(fresh, data, 16))
                note_factors(known, "random weights", fresh, data, 16)
                note_factors(known, "z, NNCLR", nn.Sequential(method.backbone, method.projector), data, 16)
                train_supervised(fresh, data, VIEW, steps, BATCH, seed, LR_SUPERVISED)
                note(rows, "supervised", score(fresh, data, 16))
        for name, table in zip(names, (rows, known, curves)):
            results.save(name, table, seeds=list(range(seed + 1)), settings=about)


def oracle(num_seeds: int, resume: bool) -> None:
    """`nnclr_oracle`: neighbors that are always of the right class, on the batches of `shapes`."""
    data, steps = Data(shapes=TINY_SHAPES), STEPS["shapes"]
    about = {"steps": steps, "batch": BATCH, "support set": QUEUE, "images": TINY_SHAPES.num_train}
    (rows,), done = begin(["nnclr_oracle"], about, resume)
    for seed in range(done, num_seeds):
        method = make(seed, kind=Oracle)
        train(method, batches(data, (VIEW, VIEW), BATCH, steps, seed), LR)
        note(rows, "right class (oracle)", score(method.backbone, data, 16))
        results.save("nnclr_oracle", rows, seeds=list(range(seed + 1)), settings=about)


def long(num_seeds: int, resume: bool) -> None:
    """`nnclr_long`: neighbors, none, and right ones, for three times as many steps as in `shapes`."""
    data, steps = Data(shapes=TINY_SHAPES), STEPS["long"]
    about = {"steps": steps, "batch": BATCH, "support set": QUEUE, "images": TINY_SHAPES.num_train}
    (rows,), done = begin(["nnclr_long"], about, resume)
    for seed in range(done, num_seeds):
        run = batches(data, (VIEW, VIEW), BATCH, steps, seed)
        for row, kind in (("NNCLR", Traced), ("own view", OwnView), ("right class (oracle)", Oracle)):
            method = make(seed, kind=kind)
            purity = train(method, run, LR)["purity"]
            note(rows, row, {"purity": purity, **score(method.backbone, data, 16)})
        results.save("nnclr_long", rows, seeds=list(range(seed + 1)), settings=about)


def sabotage(num_seeds: int, resume: bool) -> None:
    """`nnclr_sabotage`: one part removed or replaced, on the same batches; `nnclr_purity`: how often the neighbor is
    right over the steps."""
    data, steps, names = Data(shapes=TINY_SHAPES), STEPS["sabotage"], ["nnclr_sabotage", "nnclr_purity"]
    about = {"steps": steps, "batch": BATCH, "support set": QUEUE, "images": TINY_SHAPES.num_train, "every": EVERY}
    (table, curves), done = begin(names, about, resume)
    for seed in range(done, num_seeds):
        runs = {view: batches(data, (view, view), BATCH, steps, seed) for view in (VIEW, CROP)}
        for name, options in VARIANTS.items():
            method, watch = make(seed, **options), Watch({"shape": data.factors("train")["shape"]})
            if name == NONE:
                note(table, "random weights", held_out(method.backbone, data, 16))
            log = train(method, runs[options.get("view", VIEW)], LR, watch=watch)
            note(table, name, {**log, **held_out(method.backbone, data, 16)})
            curves[f"{name}, {seed}"] = {key: watch.curves()[key] for key in ("purity", "own image", "age")}
        for name, view in (("SimCLR", VIEW), ("SimCLR, crop only", CROP)):
            method = simclr(seed, view)
            note(table, name, {**train(method, runs[view], LR), **held_out(method.backbone, data, 16)})
        for name, cropped in ((NONE, "crop only"), ("SimCLR", "SimCLR, crop only")):
            before, after = (table[row]["linear"][-1] for row in (name, cropped))
            note(table, name, {"lost by crop only": 100 * (1 - after / before)})
        for name, values in zip(names, (table, curves)):
            results.save(name, values, seeds=list(range(seed + 1)), settings=about)


def photographs(num_seeds: int, resume: bool) -> None:
    """`nnclr_photographs`: CIFAR-10, the method beside its controls on test images; the checkpoint is of seed 0."""
    data, steps = cifar10(*PHOTOGRAPHS), STEPS["photographs"]
    about = {"steps": steps, "batch": PHOTOGRAPH_BATCH, "support set": QUEUE, "images": PHOTOGRAPHS[0]}
    about |= {"test images": PHOTOGRAPHS[1], "data": data.name}
    rows: Table
    (rows,), done = begin(["nnclr_photographs"], about, resume)
    if not done:
        rows |= {name: {} for name in ("NNCLR", "SimCLR", "random weights", "pixels", "supervised")}
        note(rows, "pixels", score(nn.Flatten(), data, 32))
    for seed in range(done, num_seeds):
        run = batches(data, (PHOTOGRAPH, PHOTOGRAPH), PHOTOGRAPH_BATCH, steps, seed)
        method = make(seed, view=PHOTOGRAPH)
        fresh = copy.deepcopy(method.backbone)
        note(rows, "random weights", score(fresh, data, 32))
        found = train(method, run, LR)
        note(rows, "NNCLR", {**score(method.backbone, data, 32), "purity": found["purity"]})
        other = simclr(seed, PHOTOGRAPH)
        train(other, run, LR)
        note(rows, "SimCLR", score(other.backbone, data, 32))
        if seed == 0:
            path = results.book() / "checkpoints" / "nnclr_cifar10.safetensors"
            command = "python book/chapters/nnclr/experiments.py photographs"
            export_backbone(
                path, method.backbone, {"method": "NNCLR", "command": command, "seed": 0, "settings": about}
            )
        train_supervised(fresh, data, PHOTOGRAPH, steps, PHOTOGRAPH_BATCH, seed, LR_SUPERVISED)
        note(rows, "supervised", score(fresh, data, 32))
        results.save("nnclr_photographs", rows, seeds=list(range(seed + 1)), settings=about)


if __name__ == "__main__":
    main(__doc__, settings, shapes, oracle, long, sabotage, photographs)
