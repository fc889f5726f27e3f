"""What the chapter on decorrelation quotes: the choice of its settings, its longer runs, its ablations, its widths.

    python book/chapters/decorrelation/experiments.py settings       learning rates, lambda of Barlow Twins and
                                                                     width of W-MSE, on another seed of Shapes
    python book/chapters/decorrelation/experiments.py shapes         VICReg, Barlow Twins, W-MSE and their controls, and
                                                                     the factors; three seeds
    python book/chapters/decorrelation/experiments.py sabotage       one term removed or replaced at a time, and the
                                                                     spectra of the projections; three seeds
    python book/chapters/decorrelation/experiments.py width          projectors of 1, 4 and 16 times the width of the
                                                                     features; three seeds
    python book/chapters/decorrelation/experiments.py photographs    CIFAR-10, from SSLBOOK_DATA or downloaded

Each takes minutes on one CPU core; with --resume it goes on after the seeds that its files hold. They write
`decorrelation_settings`; `decorrelation_shapes` and `decorrelation_factors` (on test images); `decorrelation_sabotage`
(on held-out training images) and `decorrelation_spectra` (of seed 0); `decorrelation_width`, held out as well;
`decorrelation_photographs`, with the checkpoint `decorrelation_cifar10`.
"""

import copy
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from sslbook import default_device, results
from sslbook.book.chapters.decorrelation.variants import OtherVariance, hinge_on_variance, no_hinge
from sslbook.book.chapters.experiments import (
    HELD_OUT,
    OTHER_SHAPES,
    PHOTOGRAPH,
    TINY_SHAPES,
    VIEW,
    batches,
    begin,
    cifar10,
    effective_rank,
    held_out,
    main,
    note,
    note_factors,
    score,
    train,
    train_supervised,
)
from sslbook.data.loader import Batch, Data
from sslbook.data.views import View
from sslbook.evaluation import extract_features
from sslbook.methods.barlow_twins import BarlowTwins
from sslbook.methods.base import Method
from sslbook.methods.simclr import SimCLR
from sslbook.methods.vicreg import VICReg
from sslbook.methods.wmse import WMSE
from sslbook.nn import MLP, ConvNet
from sslbook.weights.backbone import export_backbone

WIDTH, FEATURES, BATCH = 16, 64, 128  # the backbone's last layer has four times its width
DIM, SLICE, TEMPERATURE = 256, 64, 0.2
LR = {"VICReg": 5e-3, "Barlow Twins": 5e-3, "W-MSE": 5e-3, "SimCLR": 5e-3, "supervised": 5e-3}  # the best of `settings`
LAMBDA, WHITENED = 0.005, 16  # of Barlow Twins and W-MSE, likewise
LRS, LAMBDAS, WHITENEDS = (2e-3, 5e-3, 1e-2), (0.001, 0.005, 0.025), (8, 16, 32)
STEPS = {"settings": 200, "shapes": 200, "sabotage": 200, "width": 200, "photographs": 200}
PHOTOGRAPHS = (4000, 1000)
METHODS = ("VICReg", "Barlow Twins", "W-MSE", "SimCLR")
NONE = "as it should be"

VARIANTS: dict[str, dict] = {
    f"VICReg, {NONE}": {},
    "no variance term": {"variance_weight": 0.0},
    "no covariance term": {"covariance_weight": 0.0},
    "no invariance term": {"invariance_weight": 0.0},
    "hinge on the variance": {"term": hinge_on_variance},
    "no hinge": {"term": no_hinge},
    "invariance as printed": {"invariance_weight": 25.0 * DIM},  # summed over dimensions: equation 5 of the paper
    "no projector": {"projector": nn.Identity()},
    f"Barlow Twins, {NONE}": {"name": "Barlow Twins"},
    "Barlow Twins, lambda 0": {"name": "Barlow Twins", "lambda_": 0.0},
    "Barlow Twins, lambda 1": {"name": "Barlow Twins", "lambda_": 1.0},
    f"W-MSE, {NONE}": {"name": "W-MSE"},
    "W-MSE, whole batch": {"name": "W-MSE", "slice_size": BATCH},
    "W-MSE, slices of 24": {"name": "W-MSE", "slice_size": 24},
}


def make(
    seed: int, name: str = "VICReg", *, view: View = VIEW, dim: int = DIM, width: int = WIDTH, **options
) -> Method:
    """A method with a projector of two layers, `dim` wide; W-MSE's ends in `WHITENED` dimensions."""
    torch.manual_seed(seed)
    backbone = ConvNet(width)
    sizes = {"hidden_dim": dim, "projector_dim": dim}
    match name:
        case "VICReg":
            kind = OtherVariance if "term" in options else VICReg
            method = kind(backbone, view, view, **sizes, projector_num_layers=2, **options)
        case "Barlow Twins":
            options = {"lambda_": LAMBDA} | options
            method = BarlowTwins(backbone, view, view, **sizes, projector_num_layers=2, **options)
        case "W-MSE":
            options = {"projector_dim": WHITENED, "slice_size": SLICE, "num_permutations": 1} | options
            method = WMSE(backbone, view, hidden_dim=dim, **options)
        case _:
            projector = MLP(backbone.dim, dim, dim, last_bias=False)
            method = SimCLR(backbone, view, TEMPERATURE, projector=projector)
    return method.to(default_device())


def projections(method: Method, data: Data, size: int = 16) -> Tensor:
    """z of the held-out training images."""
    network = nn.Sequential(method.backbone, method.projector)  # pyrefly: ignore
    return extract_features(network, data, "train", View.center(size), progress=False)[0][-HELD_OUT:]


def measured(method: Method, data: Data) -> dict[str, float]:
    """What a log does not show: standard deviation and effective rank of z; rank and probes of h."""
    z = projections(method, data)
    return {"std of z": z.std(0).mean().item(), "rank of z": effective_rank(z), **held_out(method.backbone, data, 16)}


def spectrum(z: Tensor) -> list[float]:
    """The eigenvalues of the covariance of z, the largest first."""
    z = (z - z.mean(0)).double()
    values = torch.linalg.svdvals(z).square() / (len(z) - 1)
    return [float(f"{value:.4g}") for value in values.tolist()]


# -- commands ----------------------------------------------------------------------------------------------------------


def settings(num_seeds: int, resume: bool) -> None:
    """`decorrelation_settings`: learning rates and lambda, on images of another seed, which no other result uses."""
    steps, data, table = STEPS["settings"], Data(shapes=OTHER_SHAPES), {}
    run = batches(data, (VIEW, VIEW), BATCH, steps, 100)
    for name in METHODS:
        for lr in LRS:
            method = make(100, name)
            train(method, run, lr)
            note(table, f"{name}, learning rate {lr:g}", score(method.backbone, data, 16))
    for lambda_ in LAMBDAS:
        method = make(100, "Barlow Twins", lambda_=lambda_)
        train(method, run, LR["Barlow Twins"])
        note(table, f"Barlow Twins, lambda {lambda_:g}", score(method.backbone, data, 16))
    for whitened in WHITENEDS:
        method = make(100, "W-MSE", projector_dim=whitened)
        train(method, run, LR["W-MSE"])
        note(table, f"W-MSE, {whitened} dimensions", score(method.backbone, data, 16))
    for lr in LRS:
        fresh = make(100).backbone
        train_supervised(fresh, data, VIEW, steps, BATCH, 100, lr)
        note(table, f"supervised, learning rate {lr:g}", score(fresh, data, 16))
    about = {"steps": steps, "batch": BATCH, "shapes seed": 1, "lambda": LAMBDA, "whitened": WHITENED}
    results.save("decorrelation_settings", table, seeds=[100], settings=about)


def shapes(num_seeds: int, resume: bool) -> None:
    """`decorrelation_shapes` and `decorrelation_factors`: the methods beside their controls; what VICReg encodes."""
    data, steps, names = Data(shapes=TINY_SHAPES), STEPS["shapes"], ["decorrelation_shapes", "decorrelation_factors"]
    about = {"steps": steps, "batch": BATCH, "images": TINY_SHAPES.num_train, "projector": DIM, "lambda": LAMBDA}
    (rows, known), done = begin(names, about, resume)
    if not done:
        rows |= {name: {} for name in (*METHODS, "random weights", "pixels", "supervised")}
        note(rows, "pixels", score(nn.Flatten(), data, 16))
        note_factors(known, "pixels", nn.Flatten(), data, 16)
    for seed in range(done, num_seeds):
        run = batches(data, (VIEW, VIEW), BATCH, steps, seed)
        for name in METHODS:
            method = make(seed, name)
            fresh = copy.deepcopy(method.backbone)
            print(name, train(method, run, LR[name]), flush=True)
            note(rows, name, score(method.backbone, data, 16))
            if name == "VICReg":
                note(rows, "random weights", score(fresh, data, 16))
                note_factors(known, "random weights", fresh, data, 16)
                note_factors(known, "h", method.backbone, data, 16)
                note_factors(known, "z", nn.Sequential(method.backbone, method.projector), data, 16)
                train_supervised(fresh, data, VIEW, steps, BATCH, seed, LR["supervised"])
                note(rows, "supervised", score(fresh, data, 16))
        for name, table in zip(names, (rows, known)):
            results.save(name, table, seeds=list(range(seed + 1)), settings=about)


def rows_of(variants: dict[str, dict], run: Sequence[Batch], data: Data, seed: int, table: dict, spectra: dict) -> None:
    """Train every variant on the same batches; adds what was measured to `table`, and spectra of seed 0 to `spectra`."""
    for row, options in variants.items():
        name, view_size = options.get("name", "VICReg"), options.get("slice_size", BATCH)
        # A slice that does not divide the batch: the images that are left over are left out.
        fitting = [shorten(batch, BATCH // view_size * view_size) for batch in run]
        method = make(seed, **copy.deepcopy(options))
        log = train(method, fitting, LR[name])
        note(table, row, {**log, **measured(method, data)})
        if seed == 0:
            spectra[row] = spectrum(projections(method, data))


def shorten(batch: Batch, count: int) -> Batch:
    """The first `count` images of a batch."""
    return Batch(tuple(x[:count] for x in batch.views), batch.index[:count], batch.label[:count])


def sabotage(num_seeds: int, resume: bool) -> None:
    """`decorrelation_sabotage`, and `decorrelation_spectra` of its first seed: one part removed or replaced at a time."""
    names = ["decorrelation_sabotage", "decorrelation_spectra"]
    data, steps = Data(shapes=TINY_SHAPES), STEPS["sabotage"]
    about = {"steps": steps, "batch": BATCH, "images": TINY_SHAPES.num_train, "projector": DIM, "lambda": LAMBDA}
    (table, spectra), done = begin(names, about, resume)
    for seed in range(done, num_seeds):
        if seed == 0:
            fresh = make(seed)
            note(table, "random weights", measured(fresh, data))
            spectra["random weights"] = spectrum(projections(fresh, data))
        rows_of(VARIANTS, batches(data, (VIEW, VIEW), BATCH, steps, seed), data, seed, table, spectra)
        for name, values in zip(names, (table, spectra)):
            results.save(name, values, seeds=list(range(seed + 1)), settings=about)


def width(num_seeds: int, resume: bool) -> None:
    """`decorrelation_width`: the projector's width against that of the features, with and without negatives."""
    data, steps = Data(shapes=TINY_SHAPES), STEPS["width"]
    about = {"steps": steps, "batch": BATCH, "images": TINY_SHAPES.num_train, "features": FEATURES, "lambda": LAMBDA}
    (table,), done = begin(["decorrelation_width"], about, resume)
    variants = {
        f"{name}, {times} x": {"name": name, "dim": times * FEATURES}
        for name in ("VICReg", "Barlow Twins", "SimCLR")
        for times in (1, 4, 16)
    }
    for seed in range(done, num_seeds):
        rows_of(variants, batches(data, (VIEW, VIEW), BATCH, steps, seed), data, seed, table, {})
        results.save("decorrelation_width", table, seeds=list(range(seed + 1)), settings=about)


def photographs(num_seeds: int, resume: bool) -> None:
    """`decorrelation_photographs`: CIFAR-10, the methods beside their controls; the checkpoint is VICReg's of seed 0."""
    data, steps = cifar10(*PHOTOGRAPHS), STEPS["photographs"]
    about = {"steps": steps, "batch": BATCH, "images": PHOTOGRAPHS[0], "test images": PHOTOGRAPHS[1]}
    about |= {"data": data.name, "projector": DIM, "lambda": LAMBDA}
    (rows,), done = begin(["decorrelation_photographs"], about, resume)
    if not done:
        rows |= {name: {} for name in (*METHODS, "random weights", "pixels", "supervised")}
        note(rows, "pixels", score(nn.Flatten(), data, 32))
    for seed in range(done, num_seeds):
        run = batches(data, (PHOTOGRAPH, PHOTOGRAPH), BATCH, steps, seed)
        for name in METHODS:
            method = make(seed, name, view=PHOTOGRAPH)
            fresh = copy.deepcopy(method.backbone)
            print(name, train(method, run, LR[name]), flush=True)
            note(rows, name, score(method.backbone, data, 32))
            if name == "VICReg":
                note(rows, "random weights", score(fresh, data, 32))
                train_supervised(fresh, data, PHOTOGRAPH, steps, BATCH, seed, LR["supervised"])
                note(rows, "supervised", score(fresh, data, 32))
                if seed == 0:
                    path = results.book() / "checkpoints" / "decorrelation_cifar10.safetensors"
                    command = "python book/chapters/decorrelation/experiments.py photographs"
                    facts = {"method": name, "command": command, "seed": 0, "settings": about}
                    export_backbone(path, method.backbone, facts)
        results.save("decorrelation_photographs", rows, seeds=list(range(seed + 1)), settings=about)


if __name__ == "__main__":
    main(__doc__, settings, shapes, sabotage, width, photographs)
