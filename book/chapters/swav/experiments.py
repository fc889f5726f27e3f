"""What the chapter on SwAV quotes: the choice of its settings, its longer runs over several seeds, its ablations.

    python book/chapters/swav/experiments.py settings       epsilon, prototypes and learning rates, on images of another
                                                            seed of Shapes
    python book/chapters/swav/experiments.py shapes         SwAV, its controls and the factors; three seeds
    python book/chapters/swav/experiments.py sabotage       one part removed or replaced at a time; three seeds
    python book/chapters/swav/experiments.py crops          two crops, longer, and with small crops; three seeds

Each takes minutes on one CPU core; with --resume it goes on after the seeds that its files hold. They write
`swav_settings`; `swav_shapes` and `swav_factors` (on test images), with the checkpoint `swav_shapes`; `swav_sabotage`
and `swav_crops` (on held-out training images).
"""

import copy

import torch
from torch import nn

from sslbook import default_device, results
from sslbook.book.chapters.experiments import (
    COLORS,
    OTHER_SHAPES,
    TINY_SHAPES,
    VIEW,
    batches,
    begin,
    held_out,
    main,
    note,
    note_factors,
    score,
    train,
    train_supervised,
)
from sslbook.book.chapters.swav.variants import (
    GradientThroughCodes,
    HardCodes,
    LongPrototypes,
    OwnCodes,
    SoftmaxCodes,
)
from sslbook.data.loader import Data
from sslbook.data.views import View
from sslbook.methods.swav import SwAV
from sslbook.nn import ConvNet
from sslbook.weights.backbone import export_backbone

SMALL = View(size=8, crop=(0.1, 0.3), **COLORS)
WIDTH, BATCH, HIDDEN, DIM, PROTOTYPES, TEMPERATURE = 16, 128, 256, 64, 100, 0.1
EPSILON, LR, LR_SUPERVISED = 0.01, 1e-2, 5e-3  # the best of `settings`
STEPS = {"settings": 120, "shapes": 360, "sabotage": 120, "crops": 120}

NONE = "as it should be"
VARIANTS: dict[str, dict] = {
    NONE: {},
    "softmax assignment": {"kind": SoftmaxCodes},
    "one iteration": {"iterations": 1},
    "thirty iterations": {"iterations": 30},
    "hard codes": {"kind": HardCodes},
    "epsilon 0.05": {"epsilon": 0.05},
    "epsilon 0.1": {"epsilon": 0.1},
    "prototypes not normalized": {"kind": LongPrototypes},
    "gradient through the codes": {"kind": GradientThroughCodes},
    "no swap": {"kind": OwnCodes},
    "prototypes frozen for 31 steps": {"freeze": 31},
    "prototypes never trained": {"freeze": 1_000_000},
    "gradient through thirty iterations": {"kind": GradientThroughCodes, "iterations": 30},
}


def make(
    seed: int,
    *,
    kind: type[SwAV] = SwAV,
    small: int = 0,
    prototypes: int = PROTOTYPES,
    epsilon: float = EPSILON,
    iterations: int = 3,
    freeze: int = 0,
) -> SwAV:
    torch.manual_seed(seed)
    options = {"num_prototypes": prototypes, "epsilon": epsilon, "sinkhorn_iterations": iterations}
    options["freeze_prototypes"] = f"{freeze} steps"
    method = kind(ConvNet(WIDTH), VIEW, SMALL, small, HIDDEN, DIM, temperature=TEMPERATURE, **options)
    return method.to(default_device())


# -- commands ----------------------------------------------------------------------------------------------------------


def settings(num_seeds: int, resume: bool) -> None:
    """`swav_settings`: one setting changed at a time, on the images of another seed of Shapes."""
    steps, data, table = STEPS["settings"], Data(shapes=OTHER_SHAPES), {}
    run = batches(data, (VIEW, VIEW), BATCH, steps, 100)
    chosen = {"epsilon": EPSILON, "prototypes": PROTOTYPES, "lr": LR}
    tried = [chosen] + [chosen | {"epsilon": e} for e in (0.003, 0.02, 0.05)]
    tried += [chosen | {"prototypes": 400}] + [chosen | {"lr": lr} for lr in (5e-3, 2e-2)]
    for options in tried:
        method = make(100, **{key: value for key, value in options.items() if key != "lr"})
        train(method, run, options["lr"])
        name = "epsilon {epsilon:g}, {prototypes} prototypes, learning rate {lr:g}".format_map(options)
        note(table, name, score(method.backbone, data, 16))
    for lr in (5e-3, 1e-2):
        backbone = train_supervised(make(100).backbone, data, VIEW, steps, BATCH, 100, lr)
        note(table, f"supervised, learning rate {lr:g}", score(backbone, data, 16))
    results.save("swav_settings", table, seeds=[100], settings={"steps": steps, "batch": BATCH, "shapes seed": 1})


def shapes(num_seeds: int, resume: bool) -> None:
    """`swav_shapes` and `swav_factors`: the method beside its controls; the checkpoint is of seed 0."""
    data, steps, names = Data(shapes=TINY_SHAPES), STEPS["shapes"], ["swav_shapes", "swav_factors"]
    about = {"steps": steps, "batch": BATCH, "epsilon": EPSILON, "prototypes": PROTOTYPES}
    about |= {"images": TINY_SHAPES.num_train}
    (rows, known), done = begin(names, about, resume)
    if not done:
        rows |= {name: {} for name in ("SwAV", "random weights", "pixels", "supervised")}
        note(rows, "pixels", score(nn.Flatten(), data, 16))
        note_factors(known, "pixels", nn.Flatten(), data, 16)
    for seed in range(done, num_seeds):
        method = make(seed)
        fresh = copy.deepcopy(method.backbone)
        print(train(method, batches(data, (VIEW, VIEW), BATCH, steps, seed), LR), flush=True)
        note(rows, "SwAV", score(method.backbone, data, 16))
        note(rows, "random weights", score(fresh, data, 16))
        note_factors(known, "h", method.backbone, data, 16)
        note_factors(known, "z", nn.Sequential(method.backbone, method.projector), data, 16)
        note_factors(known, "random weights", fresh, data, 16)
        train_supervised(fresh, data, VIEW, steps, BATCH, seed, LR_SUPERVISED)
        note(rows, "supervised", score(fresh, data, 16))
        if seed == 0:
            path = results.book() / "checkpoints" / "swav_shapes.safetensors"
            command = "python book/chapters/swav/experiments.py shapes"
            export_backbone(path, method.backbone, {"method": "SwAV", "command": command, "seed": 0, "settings": about})
        for name, table in zip(names, (rows, known)):
            results.save(name, table, seeds=list(range(seed + 1)), settings=about)


def sabotage(num_seeds: int, resume: bool) -> None:
    """`swav_sabotage`: one part removed or replaced at a time, on the same batches."""
    data, steps = Data(shapes=TINY_SHAPES), STEPS["sabotage"]
    about = {"steps": steps, "batch": BATCH, "images": TINY_SHAPES.num_train, "prototypes": PROTOTYPES}
    (table,), done = begin(["swav_sabotage"], about, resume)
    for seed in range(done, num_seeds):
        run = batches(data, (VIEW, VIEW), BATCH, steps, seed)
        for name, options in VARIANTS.items():
            method = make(seed, **options)
            if name == NONE:
                note(table, "random weights", held_out(method.backbone, data, 16))
            log = train(method, run, LR)
            note(table, name, {**log, **held_out(method.backbone, data, 16)})
        results.save("swav_sabotage", table, seeds=list(range(seed + 1)), settings=about)


def crops(num_seeds: int, resume: bool) -> None:
    """`swav_crops`: small crops against more steps of two crops."""
    data, steps = Data(shapes=TINY_SHAPES), STEPS["crops"]
    about = {"steps": steps, "batch": BATCH, "images": TINY_SHAPES.num_train, "small crops": [0, 4]}
    (table,), done = begin(["swav_crops"], about, resume)
    for seed in range(done, num_seeds):
        for name, small, share in (("2 crops", 0, 1), ("2 crops, half as many steps again", 0, 1.5), ("2 + 4", 4, 1)):
            method = make(seed, small=small)
            run = batches(data, method.views(), BATCH, round(steps * share), seed)
            train(method, run, LR)
            note(table, name, {"steps": len(run), **held_out(method.backbone, data, 16)})
        results.save("swav_crops", table, seeds=list(range(seed + 1)), settings=about)


if __name__ == "__main__":
    main(__doc__, settings, shapes, sabotage, crops)
