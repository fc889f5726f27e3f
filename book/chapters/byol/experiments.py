"""What the chapter on BYOL quotes: the choice of its settings, its longer runs over several seeds, its ablations.

    python book/chapters/byol/experiments.py settings       learning rates, on images of another seed of Shapes
    python book/chapters/byol/experiments.py shapes         BYOL and its controls; three seeds
    python book/chapters/byol/experiments.py group          BYOL with group norm in the backbone, and the factors
    python book/chapters/byol/experiments.py sabotage       one part removed or replaced at a time, and the predictor's
                                                            eigenvectors in the run with a linear one; three seeds
    python book/chapters/byol/experiments.py norm           group norm with weight standardization, or in the backbone
                                                            alone; three seeds
    python book/chapters/byol/experiments.py photographs    CIFAR-10, from SSLBOOK_DATA or downloaded

Each takes minutes on one CPU core; with --resume it goes on after the seeds that its files hold. They write
`byol_settings`; `byol_shapes`; `byol_group` and `byol_group_factors` (all on test images), with the checkpoint
`byol_group`; `byol_sabotage` (on held-out training images) and `byol_eigenspace`; `byol_norm`, likewise;
`byol_photographs`, with the checkpoint `byol_cifar10`.
"""

import argparse
import copy
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from sslbook import default_device, results
from sslbook.book.chapters.byol.variants import (
    Constant,
    DirectPred,
    NoStopGradient,
    convnet,
    mlp,
    standardize_weights,
)
from sslbook.data.datasets.shapes import Shapes
from sslbook.data.loader import Batch, Data
from sslbook.data.views import View
from sslbook.evaluation import controls, extract_features, factors, knn, linear
from sslbook.methods.byol import BYOL
from sslbook.schedules import Clock
from sslbook.weights.backbone import export_backbone

TINY_SHAPES = Shapes(num_train=4000, num_test=1000)
OTHER_SHAPES = Shapes(num_train=4000, num_test=1000, seed=1)  # settings are chosen on these
COLORS = {"color_jitter": (0.4, 0.4, 0.4, 0.5), "grayscale": 0.2, "interpolation": "bilinear"}
VIEW = View(size=16, crop=(0.3, 1.0), **COLORS)
PHOTOGRAPH = View(size=32, crop=(0.2, 1.0), **COLORS | {"color_jitter": (0.4, 0.4, 0.4, 0.1)})
WIDTH, HIDDEN, DIM, BATCH, MOMENTUM = 16, 256, 64, 64, 0.9
LR, LR_SUPERVISED = 5e-3, 5e-3  # the best of `settings`
LRS = (2e-3, 5e-3, 1e-2)
HELD_OUT = 800  # training images at the end, on which the ablations are measured
STEPS = {"settings": 200, "shapes": 600, "sabotage": 300, "photographs": 200}
PHOTOGRAPHS = (4000, 1000)
Table = dict[str, dict[str, list[float]]]

NONE = "as it should be"
VARIANTS: dict[str, dict] = {
    NONE: {},
    "no predictor": {"predictor": nn.Identity},
    "no stop-gradient": {"kind": NoStopGradient},
    "no EMA": {"kind": Constant, "momentum": 0.0},
    "no EMA, predictor 10 times as fast": {"kind": Constant, "momentum": 0.0, "faster": 10.0},
    "target never updated": {"kind": Constant, "momentum": 1.0},
    "linear predictor": {"predictor": partial(nn.Linear, DIM, DIM, bias=False)},
    "DirectPred": {"kind": DirectPred, "predictor": partial(nn.Linear, DIM, DIM, bias=False)},
    "group norm": {"norm": "group"},
    "no normalization": {"norm": "none"},
    "no predictor, group norm": {"norm": "group", "predictor": nn.Identity},
}

GROUP_BACKBONE = {"norm": "group", "head_norm": "batch"}
NORMS: dict[str, dict] = {
    "group norm, weight standardization": {"norm": "group", "standardize": True},
    "group norm, batch norm in the heads": GROUP_BACKBONE,
}


def make(
    seed: int,
    *,
    kind: type[BYOL] = BYOL,
    view: View = VIEW,
    momentum: float = MOMENTUM,
    predictor: Callable[[], nn.Module] | None = None,
    norm: str = "batch",
    head_norm: str = "",
    standardize: bool = False,
    width: int = WIDTH,
) -> BYOL:
    torch.manual_seed(seed)
    backbone, head_norm = convnet(width, norm), head_norm or norm
    parts = {"projector": mlp(4 * width, HIDDEN, DIM, head_norm), "predictor": mlp(DIM, HIDDEN, DIM, head_norm)}
    if standardize:
        for part in (backbone, *parts.values()):
            standardize_weights(part)
    if predictor is not None:
        parts["predictor"] = predictor()
    return kind(backbone, view, view, HIDDEN, DIM, momentum, **parts).to(default_device())


def batches(data: Data, view: View, steps: int, seed: int) -> list[Batch]:
    """The batches of a run; every variant of a seed trains on the same ones."""
    found, epoch = [], 0
    while len(found) < steps:
        found += data.batches((view, view), BATCH, seed=seed, epoch=epoch, device=default_device())
        epoch += 1
    return found[:steps]


def train(
    method: BYOL,
    run: list[Batch],
    lr: float = LR,
    faster: float = 1.0,
    watch: Callable[[int, BYOL], None] = lambda step, method: None,
) -> dict[str, float]:
    """Train in place, as the chapter does; the mean of the last twenty steps' log.

    Args:
        method: what to train.
        run: one batch a step.
        lr: peak learning rate.
        faster: how many times as fast the predictor learns.
        watch: called before every step and after the last.
    """
    head = [p for p in method.predictor.parameters() if p.requires_grad]
    rest = [p for p in method.parameters() if p.requires_grad and not any(p is other for other in head)]
    groups = [{"params": part, "lr": rate} for part, rate in ((rest, lr), (head, lr * faster)) if part]
    optimizer = torch.optim.AdamW(groups, lr, weight_decay=0.01)
    rates = [group["lr"] for group in groups]
    rate = torch.optim.lr_scheduler.OneCycleLR(optimizer, rates, total_steps=len(run), pct_start=0.1)
    log = []
    method.train()
    for step, batch in enumerate(run):
        watch(step, method)
        clock = Clock(step, len(run))
        out = method(batch, clock)
        optimizer.zero_grad()
        out["loss"].backward()
        optimizer.step()
        rate.step()
        method.after_step(Clock(step + 1, len(run)))
        log.append({name: value.item() for name, value in out.items()})
    watch(len(run), method)
    return {name: sum(line[name] for line in log[-20:]) / len(log[-20:]) for name in log[0]}


def train_supervised(backbone: nn.Module, data: Data, view: View, steps: int, seed: int, lr: float) -> nn.Module:
    center = View.center(view.size)
    controls.train_supervised(
        backbone, data, view, steps, BATCH, evaluation_view=center, lr=lr, seed=seed, progress=False
    )
    return backbone


def features(network: nn.Module, data: Data, size: int = 16) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    x, y = extract_features(network, data, "train", View.center(size), progress=False)
    test_x, test_y = extract_features(network, data, "test", View.center(size), progress=False)
    return x, y, test_x, test_y


def score(network: nn.Module, data: Data, size: int = 16) -> dict[str, float]:
    """On test images."""
    found = features(network, data, size)
    return {"kNN": knn.accuracy(*found), "linear": linear.probe(*found).accuracy}


def effective_rank(x: Tensor) -> float:
    """The exponential of the entropy of the normalized singular values of the centered rows."""
    singular = torch.linalg.svdvals((x - x.mean(0)).double())
    return torch.special.entr(singular / singular.sum().clamp(min=1e-12)).sum().exp().item()


def held_out(method: BYOL, data: Data) -> dict[str, float]:
    """On training images that the probe did not see: kNN and a linear probe of the shape; the effective rank of h."""
    x, y = extract_features(method.backbone, data, "train", View.center(16), progress=False)
    found = x[:-HELD_OUT], y[:-HELD_OUT], x[-HELD_OUT:], y[-HELD_OUT:]
    accuracy = {"kNN": knn.accuracy(*found), "linear": linear.probe(*found).accuracy}
    return {"rank of h": effective_rank(x[-HELD_OUT:]), **accuracy}


def note(table: Table, row: str, values: dict[str, float]) -> None:
    for name, value in values.items():
        table.setdefault(row, {}).setdefault(name, []).append(round(value, 4))
    print(row, {name: round(value, 3) for name, value in values.items()}, flush=True)


def begin(names: list[str], about: dict, resume: bool) -> tuple[list[Table], int]:
    """The tables to fill and how many seeds they hold: none, or with `resume` those of the files."""
    if not resume:
        return [{} for _ in names], 0
    found = [results.load(name) for name in names]
    if any((one.settings, one.seeds) != (about, list(range(len(found[0].seeds)))) for one in found):
        raise SystemExit("the files are of other settings or seeds: run without --resume")
    return [dict(one.values) for one in found], len(found[0].seeds)


# -- commands ----------------------------------------------------------------------------------------------------------


def settings(num_seeds: int, resume: bool) -> None:
    """`byol_settings`: learning rates, on the images of another seed of Shapes, which no other result uses."""
    steps, data, table = STEPS["settings"], Data(shapes=OTHER_SHAPES), {}
    run = batches(data, VIEW, steps, 100)
    for lr in LRS:
        method = make(100)
        fresh = copy.deepcopy(method.backbone)
        train(method, run, lr)
        note(table, f"BYOL, learning rate {lr:g}", score(method.backbone, data))
        train_supervised(fresh, data, VIEW, steps, 100, lr)
        note(table, f"supervised, learning rate {lr:g}", score(fresh, data))
    results.save("byol_settings", table, seeds=[100], settings={"steps": steps, "batch": BATCH, "shapes seed": 1})


def shapes(num_seeds: int, resume: bool) -> None:
    """`byol_shapes`: the method beside its controls."""
    data, steps = Data(shapes=TINY_SHAPES), STEPS["shapes"]
    about = {"steps": steps, "batch": BATCH, "momentum": MOMENTUM, "images": TINY_SHAPES.num_train}
    (rows,), done = begin(["byol_shapes"], about, resume)
    if not done:
        rows |= {name: {} for name in ("BYOL", "random weights", "pixels", "supervised")}
        note(rows, "pixels", score(nn.Flatten(), data))
    for seed in range(done, num_seeds):
        method = make(seed)
        fresh = copy.deepcopy(method.backbone)
        print(train(method, batches(data, VIEW, steps, seed)), flush=True)
        note(rows, "BYOL", score(method.backbone, data))
        note(rows, "random weights", score(fresh, data))
        note(rows, "supervised", score(train_supervised(fresh, data, VIEW, steps, seed, LR_SUPERVISED), data))
        results.save("byol_shapes", rows, seeds=list(range(seed + 1)), settings=about)


def group(num_seeds: int, resume: bool) -> None:
    """`byol_group` and `byol_group_factors`: as `shapes`, with group norm in the backbone; its checkpoint of seed 0."""
    data, names = Data(shapes=TINY_SHAPES), ["byol_group", "byol_group_factors"]
    about = {"steps": STEPS["shapes"], "batch": BATCH, "momentum": MOMENTUM, "images": TINY_SHAPES.num_train}
    (rows, known), done = begin(names, about, resume)

    def factor(column: str, network: nn.Module) -> None:
        x, _, test_x, _ = features(network, data)
        for name, value in factors.probe(x, data.factors("train"), test_x, data.factors("test")).items():
            known.setdefault(name, {}).setdefault(column, []).append(round(value, 2))

    if not done:
        for name, level in factors.chance_levels(data.factors("train"), data.factors("test")).items():
            known[name] = {"chance": [round(level, 2)]}
        factor("pixels", nn.Flatten())
    for seed in range(done, num_seeds):
        method = make(seed, **GROUP_BACKBONE)
        fresh = copy.deepcopy(method.backbone)
        print(train(method, batches(data, VIEW, STEPS["shapes"], seed)), flush=True)
        note(rows, "BYOL, group norm in the backbone", score(method.backbone, data))
        note(rows, "random weights, group norm", score(fresh, data))
        factor("h", method.backbone)
        factor("z", nn.Sequential(method.backbone, method.projector))
        factor("random weights", fresh)
        if seed == 0:  # load_backbone needs convnet(WIDTH, "group")
            path = results.book() / "checkpoints" / "byol_group.safetensors"
            command = "python book/chapters/byol/experiments.py group"
            export_backbone(path, method.backbone, {"method": "BYOL", "command": command, "seed": 0, "settings": about})
        for name, table in zip(names, (rows, known)):
            results.save(name, table, seeds=list(range(seed + 1)), settings=about)


def sabotage(num_seeds: int, resume: bool) -> None:
    """`byol_sabotage`: one part removed or replaced at a time, on the same batches; `byol_eigenspace` of the linear one."""
    data, steps, names = Data(shapes=TINY_SHAPES), STEPS["sabotage"], ["byol_sabotage", "byol_eigenspace"]
    at = [round(steps * share) for share in (0, 0.02, 0.04, 0.08, 0.12, 0.2, 0.3, 0.4, 0.6, 0.8, 1)]
    about = {"steps": steps, "batch": BATCH, "momentum": MOMENTUM, "images": TINY_SHAPES.num_train, "at": at}
    (table, followed), done = begin(names, about, resume)
    for seed in range(done, num_seeds):
        run = batches(data, VIEW, steps, seed)
        some = [torch.cat([batch.views[i] for batch in run[-16:]]) for i in (0, 1)]
        for name, options in VARIANTS.items():
            method = make(seed, **{key: value for key, value in options.items() if key != "faster"})
            if name == NONE:
                note(table, "random weights", held_out(method, data))
            watch = Watch(at if name == "linear predictor" else [], some)
            log = train(method, run, faster=options.get("faster", 1.0), watch=watch)
            note(table, name, {**log, **held_out(method, data)})
            if watch.found:
                followed[str(seed)] = watch.found
        for name, values in zip(names, (table, followed)):
            results.save(name, values, seeds=list(range(seed + 1)), settings=about)


def photographs(num_seeds: int, resume: bool) -> None:
    """`byol_photographs`: CIFAR-10, the method beside its controls on test images; the checkpoint is of seed 0."""
    from sslbook.notebook import photographs as source

    found = source.cifar10(*PHOTOGRAPHS)
    if found is None:
        raise SystemExit("no photographs: set SSLBOOK_DATA to a folder that holds CIFAR-10")
    data = Data.from_images(found.train, found.train_labels, found.test, found.test_labels, found.classes, found.name)
    steps = STEPS["photographs"]
    about = {"steps": steps, "batch": BATCH, "momentum": MOMENTUM, "images": len(found.train)}
    about |= {"test images": len(found.test), "data": found.name}
    (rows,), done = begin(["byol_photographs"], about, resume)
    if not done:
        names = ("BYOL", "BYOL, group norm in the backbone", "random weights", "pixels", "supervised")
        rows |= {name: {} for name in names}
        note(rows, "pixels", score(nn.Flatten(), data, 32))
    for seed in range(done, num_seeds):
        run = batches(data, PHOTOGRAPH, steps, seed)
        for row, options in (("BYOL", {}), ("BYOL, group norm in the backbone", GROUP_BACKBONE)):
            method = make(seed, view=PHOTOGRAPH, **options)
            fresh = copy.deepcopy(method.backbone)
            if not options:
                note(rows, "random weights", score(fresh, data, 32))
                train_supervised(fresh, data, PHOTOGRAPH, steps, seed, LR_SUPERVISED)
                note(rows, "supervised", score(fresh, data, 32))
            print(train(method, run), flush=True)
            note(rows, row, score(method.backbone, data, 32))
        if seed == 0:  # of the second row: load_backbone needs convnet(WIDTH, "group")
            path = results.book() / "checkpoints" / "byol_cifar10.safetensors"
            command = "python book/chapters/byol/experiments.py photographs"
            facts = {"method": row, "command": command, "seed": 0, "settings": about}
            export_backbone(path, method.backbone, facts)
        results.save("byol_photographs", rows, seeds=list(range(seed + 1)), settings=about)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = {f.__name__: f for f in (settings, shapes, group, sabotage, norm, photographs)}
    parser.add_argument("what", choices=list(commands))
    parser.add_argument("--seeds", type=int, default=None, help="how many: 3, of settings and photographs 1")
    parser.add_argument("--resume", action="store_true", help="go on after the seeds that the files hold")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    default = 1 if arguments.what in ("settings", "photographs") else 3
    commands[arguments.what](arguments.seeds or default, arguments.resume)


if __name__ == "__main__":
    main()
