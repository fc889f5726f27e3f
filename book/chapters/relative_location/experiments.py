"""What the chapter on relative location and jigsaw quotes: its settings, longer runs, shortcuts, ablations.

    python book/chapters/relative_location/experiments.py settings       learning rates, on another seed of Shapes
    python book/chapters/relative_location/experiments.py noise          relative location on images without objects, with
                                                                         and without gaps, jitter, a lens, colors
    python book/chapters/relative_location/experiments.py shapes         both methods and their controls, and the factors
    python book/chapters/relative_location/experiments.py sabotage       one part removed or replaced at a time
    python book/chapters/relative_location/experiments.py normalization  patches normalized, and the probed images or not
    python book/chapters/relative_location/experiments.py classes        jigsaw with 10, 100 and 1000 permutations
    python book/chapters/relative_location/experiments.py rates          learning rates on photographs, held-out images
    python book/chapters/relative_location/experiments.py photographs    CIFAR-10, from SSLBOOK_DATA or downloaded

The supervised control has four times as many images a step, as many as rotation has rows.
Three seeds each, but one of `settings` and `rates`. Each takes minutes on one CPU core; with --resume it goes on after
the seeds that its files hold. They write `relative_location_settings`; `relative_location_noise`;
`relative_location_shapes` and `relative_location_factors` (on test images); `relative_location_sabotage`,
`relative_location_normalization` and `relative_location_classes` (on held-out training images);
`relative_location_rates` and `relative_location_photographs`, with the checkpoint `relative_location_cifar10`.
"""

import copy
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from sslbook import default_device, results
from sslbook.book.chapters.experiments import (
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
from sslbook.book.chapters.relative_location.fields import NO_LENS, lens, noise_data
from sslbook.book.chapters.relative_location.variants import (
    Blind,
    Prepared,
    dropped,
    near_permutations,
    normalized,
    projected,
    without_jitter,
)
from sslbook.data.datasets.shapes import Shapes
from sslbook.data.loader import Batch, Data
from sslbook.data.views import View
from sslbook.methods.base import Method
from sslbook.methods.jigsaw import Jigsaw
from sslbook.methods.relative_location import RelativeLocation
from sslbook.methods.rotation import Rotation
from sslbook.nn import ConvNet
from sslbook.weights.backbone import export_backbone

KNOBS = {"size": 32, "position": 1.0, "orientation": 0.1}
SHAPES = Shapes(num_train=4000, num_test=1000, **KNOBS)
OTHER_SHAPES = Shapes(num_train=4000, num_test=1000, seed=1, **KNOBS)  # settings are chosen on these
COLORS = {"color_jitter": (0.4, 0.4, 0.4, 0.5), "grayscale": 0.5, "interpolation": "bilinear"}
VIEW = View(size=32, crop=(0.8, 1.0), flip=0.0, **COLORS)
PHOTOGRAPH = View(size=32, crop=(0.6, 1.0), flip=0.0, **COLORS | {"color_jitter": (0.4, 0.4, 0.4, 0.1)})
RAW = View(size=32, crop=None, flip=0.0)
WIDTH, HIDDEN, PATCH_DIM, PERMUTATIONS, BATCH, CELL, PATCH = 16, 256, 64, 100, 64, 10, 8
LR = {
    "relative location": 2e-2,
    "jigsaw": 5e-3,
    "rotation": 2e-2,
    "supervised": 5e-3,
}  # the best of `settings`, and of `rates`, for the methods; of the supervised network the next to best
LRS = (5e-3, 1e-2, 2e-2)
STEPS = {"settings": 200, "noise": 150, "shapes": 300, "sabotage": 200, "classes": 200, "photographs": 1000}
PHOTOGRAPHS = (8000, 1000)
LENS, OTHER_LENS = (0.1, 0.0, 0.1), (0.1, 0.0, -0.1)  # red and blue against green; red against blue
METHODS = ("relative location", "jigsaw", "rotation")
CLASSES = (10, 100, 1000)
AS_IT_IS = "as it should be"

NOISE: dict[str, dict] = {
    "gray, no gap": {"cell": PATCH},
    "gray, gap of 2, no jitter": {"jitter": False},
    "gray, gap with jitter, 2 on average": {},
    "gray, gap with jitter, 5 on average": {"patch": 5},
    "lens": {"kappa": LENS},
    "lens, projected": {"kappa": LENS, "prepare": projected},
    "lens, two colors dropped": {"kappa": LENS, "prepare": dropped},
    "lens, two thirds gray": {"kappa": LENS, "gray": 0.66},
    "lens, all gray": {"kappa": LENS, "gray": 1.0},
    "other lens": {"kappa": OTHER_LENS},
    "other lens, projected": {"kappa": OTHER_LENS, "prepare": projected},
    "other lens, two colors dropped": {"kappa": OTHER_LENS, "prepare": dropped},
}
VARIANTS: dict[str, dict] = {
    f"relative location, {AS_IT_IS}": {},
    "no gap, no jitter": {"cell": PATCH},
    "no jitter": {"jitter": False},
    "no color jitter, no gray": {"view": replace(VIEW, color_jitter=(0.0,) * 4, grayscale=0.0)},
    "patches normalized": {"prepare": normalized},
    "head without the center": {"blind": True},
    "lens": {"kappa": LENS},
    "lens, no color jitter, no gray": {"kappa": LENS, "view": replace(VIEW, color_jitter=(0.0,) * 4, grayscale=0.0)},
    f"jigsaw, {AS_IT_IS}": {"name": "jigsaw"},
    "jigsaw, no gap, no jitter": {"name": "jigsaw", "cell": PATCH},
    "jigsaw, patches normalized": {"name": "jigsaw", "prepare": normalized},
    "jigsaw, near permutations": {"name": "jigsaw", "near": True},
}


def make(
    seed: int,
    name: str = "relative location",
    *,
    view: View = VIEW,
    cell: int = CELL,
    patch: int = PATCH,
    prepare: Callable[[Tensor], Tensor] | None = None,
    blind: bool = False,
    near: bool = False,
    num_permutations: int = PERMUTATIONS,
) -> Method:
    """A method, or one of its variants."""
    torch.manual_seed(seed)
    backbone = ConvNet(WIDTH)
    eyes = backbone if prepare is None else Prepared(backbone, prepare)
    if name == "rotation":
        method = Rotation(backbone, view)
    elif name == "jigsaw":
        method = Jigsaw(eyes, view, cell, patch, num_permutations, PATCH_DIM)
        if near:
            method.permutations = near_permutations(num_permutations)
    else:
        method = RelativeLocation(eyes, view, cell, patch, HIDDEN)
        if blind:
            method.head = Blind(method.head)
    return method.to(default_device())


def fit(
    seed: int,
    run: Sequence[Batch],
    name: str = "relative location",
    *,
    jitter: bool = True,
    lr: float | None = None,
    **options,
) -> tuple[nn.Module, dict[str, float]]:
    """Train a variant; the backbone, and the mean of the last twenty steps' log."""
    if not jitter:
        cell, patch = options.pop("cell", CELL), options.get("patch", PATCH)
        run = [without_jitter(batch, cell, patch) for batch in run]
        options |= {"cell": patch, "view": View(size=3 * patch, crop=None, flip=0.0)}
    method = make(seed, name, **options)
    log = train(method, run, lr or LR[name])
    named = {"task": next(value for key, value in log.items() if key.endswith("accuracy"))}
    return getattr(method.backbone, "backbone", method.backbone), {"loss": log["loss"], **named}


def through(data: Data, kappa: Sequence[float]) -> Data:
    """The images of Shapes, seen through a lens."""
    (x, factors), (test_x, test_factors) = data.shapes.render("train"), data.shapes.render("test")
    images = [lens(one, kappa) for one in (x, test_x)]
    labels = [found["shape"] for found in (factors, test_factors)]
    return Data.from_images(images[0], labels[0], images[1], labels[1], Shapes.class_names, "shapes through a lens")


# -- commands ----------------------------------------------------------------------------------------------------------


def settings(num_seeds: int, resume: bool) -> None:
    """`relative_location_settings`: learning rates, on images of another seed, which no other result uses."""
    steps, data, table = STEPS["settings"], Data(shapes=OTHER_SHAPES), {}
    run = batches(data, (VIEW,), BATCH, steps, 100)
    for name in METHODS:
        for lr in LRS:
            method = make(100, name)
            train(method, run, lr)
            note(table, f"{name}, learning rate {lr:g}", score(method.backbone, data, 32))
    for lr in LRS:
        fresh = make(100).backbone
        train_supervised(fresh, data, VIEW, steps, 4 * BATCH, 100, lr)
        note(table, f"supervised, learning rate {lr:g}", score(fresh, data, 32))
    about = {"steps": steps, "batch": BATCH, "shapes seed": 1, "permutations": PERMUTATIONS}
    results.save("relative_location_settings", table, seeds=[100], settings=about)


def noise(num_seeds: int, resume: bool) -> None:
    """`relative_location_noise`: location accuracy in percent where there is nothing to recognize."""
    steps = STEPS["noise"]
    about = {"steps": steps, "batch": BATCH, "images": 2000, "lens": list(LENS), "other lens": list(OTHER_LENS)}
    (table,), done = begin(["relative_location_noise"], about, resume)
    for seed in range(done, num_seeds):
        for row, options in NOISE.items():
            options = dict(options)
            kappa, gray = options.pop("kappa", NO_LENS), options.pop("gray", 0.0)
            data = noise_data(length=3.0 if kappa == NO_LENS else 2.0, kappa=kappa, seed=seed)
            run = batches(data, (replace(RAW, grayscale=gray),), BATCH, steps, seed)
            note(table, row, {"location accuracy": fit(seed, run, **options)[1]["task"]})
        results.save("relative_location_noise", table, seeds=list(range(seed + 1)), settings=about)


def shapes(num_seeds: int, resume: bool) -> None:
    """`relative_location_shapes`, `relative_location_factors`: the methods beside their controls; what they encode."""
    names = ["relative_location_shapes", "relative_location_factors"]
    data, steps = Data(shapes=SHAPES), STEPS["shapes"]
    about = {"steps": steps, "batch": BATCH, "images": SHAPES.num_train, "permutations": PERMUTATIONS}
    (rows, known), done = begin(names, about, resume)
    if not done:
        rows |= {name: {} for name in (*METHODS, "random weights", "pixels", "supervised")}
        note(rows, "pixels", score(nn.Flatten(), data, 32))
        note_factors(known, "pixels", nn.Flatten(), data, 32)
    for seed in range(done, num_seeds):
        run = batches(data, (VIEW,), BATCH, steps, seed)
        fresh = make(seed).backbone
        note(rows, "random weights", score(fresh, data, 32))
        note_factors(known, "random weights", fresh, data, 32)
        for name in METHODS:
            backbone, log = fit(seed, run, name)
            note(rows, name, {**score(backbone, data, 32), "task": log["task"]})
            note_factors(known, name, backbone, data, 32)
        train_supervised(fresh, data, VIEW, steps, 4 * BATCH, seed, LR["supervised"])
        note(rows, "supervised", score(fresh, data, 32))
        for name, table in zip(names, (rows, known)):
            results.save(name, table, seeds=list(range(seed + 1)), settings=about)


def sabotage(num_seeds: int, resume: bool) -> None:
    """`relative_location_sabotage`: one part removed or replaced at a time, on the same images."""
    data, steps = Data(shapes=SHAPES), STEPS["sabotage"]
    about = {"steps": steps, "batch": BATCH, "images": SHAPES.num_train, "lens": list(LENS)}
    (table,), done = begin(["relative_location_sabotage"], about, resume)
    bent = through(data, LENS)
    for seed in range(done, num_seeds):
        note(table, "random weights", held_out(make(seed).backbone, data, 32))
        for row, options in VARIANTS.items():
            options = dict(options)
            source = bent if options.pop("kappa", None) else data
            run = batches(source, (options.get("view", VIEW),), BATCH, steps, seed)
            backbone, log = fit(seed, run, options.pop("name", "relative location"), **options)
            note(table, row, {**log, **held_out(backbone, data, 32)})
        results.save("relative_location_sabotage", table, seeds=list(range(seed + 1)), settings=about)


def normalization(num_seeds: int, resume: bool) -> None:
    """`relative_location_normalization`: patches normalized in training, and the images that are probed or not."""
    data, steps = Data(shapes=SHAPES), STEPS["sabotage"]
    about = {"steps": steps, "batch": BATCH, "images": SHAPES.num_train}
    (table,), done = begin(["relative_location_normalization"], about, resume)

    def both(network: nn.Module) -> list[tuple[str, nn.Module]]:
        return [("as they are", network), ("normalized", Prepared(network, normalized))]

    for seed in range(done, num_seeds):
        run = batches(data, (VIEW,), BATCH, steps, seed)
        for name, network in (("random weights", make(seed).backbone), ("pixels", nn.Flatten())):
            for probed, eyes in both(network):
                note(table, f"{name}: images {probed}", held_out(eyes, data, 32))
        for name in METHODS[:2]:
            for trained, options in (("as they are", {}), ("normalized", {"prepare": normalized})):
                backbone, log = fit(seed, run, name, **options)
                for probed, eyes in both(backbone):
                    found = {"task": log["task"], **held_out(eyes, data, 32)}
                    note(table, f"{name}: patches {trained}, images {probed}", found)
        results.save("relative_location_normalization", table, seeds=list(range(seed + 1)), settings=about)


def classes(num_seeds: int, resume: bool) -> None:
    """`relative_location_classes`: jigsaw with more and more permutations, at equal steps and batches."""
    data, steps = Data(shapes=SHAPES), STEPS["classes"]
    about = {"steps": steps, "batch": BATCH, "images": SHAPES.num_train, "classes": list(CLASSES)}
    (table,), done = begin(["relative_location_classes"], about, resume)
    for seed in range(done, num_seeds):
        run = batches(data, (VIEW,), BATCH, steps, seed)
        for count in CLASSES:
            backbone, log = fit(seed, run, "jigsaw", num_permutations=count)
            note(table, f"{count} permutations", {**log, **held_out(backbone, data, 32)})
        results.save("relative_location_classes", table, seeds=list(range(seed + 1)), settings=about)


class FirstHalf(nn.Module):
    """The backbone up to its feature map at half of the resolution, averaged over positions."""

    def __init__(self, backbone: nn.Module) -> None:
        super().__init__()
        self.backbone = backbone

    def forward(self, x: Tensor) -> Tensor:
        return self.backbone.forward_stages(x)[0].mean((2, 3))


def rates(num_seeds: int, resume: bool) -> None:
    """`relative_location_rates`: learning rates on photographs, measured on held-out training images."""
    data, steps, table = cifar10(*PHOTOGRAPHS), STEPS["photographs"], {}
    run = batches(data, (PHOTOGRAPH,), BATCH, steps, 100)
    for name in METHODS[:2]:
        for lr in LRS:
            backbone, log = fit(100, run, name, view=PHOTOGRAPH, lr=lr)
            note(table, f"{name}, learning rate {lr:g}", {"task": log["task"], **held_out(backbone, data, 32)})
    about = {"steps": steps, "batch": BATCH, "images": PHOTOGRAPHS[0], "data": data.name}
    results.save("relative_location_rates", table, seeds=[100], settings=about)


def photographs(num_seeds: int, resume: bool) -> None:
    """`relative_location_photographs`: CIFAR-10, beside the controls; the checkpoint is relative location's, seed 0."""
    data, steps = cifar10(*PHOTOGRAPHS), STEPS["photographs"]
    about = {"steps": steps, "batch": BATCH, "images": PHOTOGRAPHS[0], "test images": PHOTOGRAPHS[1]}
    about |= {"data": data.name, "permutations": PERMUTATIONS}
    (rows,), done = begin(["relative_location_photographs"], about, resume)
    if not done:
        rows |= {name: {} for name in (*METHODS, "random weights", "pixels", "supervised")}
        note(rows, "pixels", score(nn.Flatten(), data, 32))

    def both(row: str, backbone: nn.Module, **log: float) -> None:
        half = {f"{name}, first half": value for name, value in score(FirstHalf(backbone), data, 32).items()}
        note(rows, row, {**log, **score(backbone, data, 32), **half})

    for seed in range(done, num_seeds):
        run = batches(data, (PHOTOGRAPH,), BATCH, steps, seed)
        fresh = make(seed).backbone
        both("random weights", fresh)
        for name in METHODS:
            backbone, log = fit(seed, run, name, view=PHOTOGRAPH)
            both(name, backbone, task=log["task"])
            if name == "relative location" and seed == 0:
                path = results.book() / "checkpoints" / "relative_location_cifar10.safetensors"
                command = "python book/chapters/relative_location/experiments.py photographs"
                facts = {"method": name, "command": command, "seed": 0, "settings": about}
                export_backbone(path, copy.deepcopy(backbone), facts)
        train_supervised(fresh, data, PHOTOGRAPH, steps, 4 * BATCH, seed, LR["supervised"])
        both("supervised", fresh)
        results.save("relative_location_photographs", rows, seeds=list(range(seed + 1)), settings=about)


if __name__ == "__main__":
    main(__doc__, settings, noise, shapes, sabotage, normalization, classes, rates, photographs)
