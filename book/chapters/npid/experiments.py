"""What the chapter on instance discrimination quotes: the choice of its settings, its longer runs over several seeds,
its ablations.

    python book/chapters/npid/experiments.py settings      learning rates and temperatures, on other images of Shapes
    python book/chapters/npid/experiments.py shapes        full softmax, noise-contrastive estimation, a trained weight for
                                                           every image, SimCLR and the controls; the age of the memory
                                                           bank; three seeds
    python book/chapters/npid/experiments.py limit         weights and memory bank over the number of images; three seeds
    python book/chapters/npid/experiments.py sabotage      one part removed or replaced at a time, and the constant;
                                                           three seeds
    python book/chapters/npid/experiments.py photographs   CIFAR-10, from SSLBOOK_DATA or downloaded

Each takes minutes on one CPU core; with --resume it goes on after the seeds that its files hold. They write
`npid_settings`; `npid_shapes` and `npid_factors` (on test images) and `npid_age`; `npid_limit`; `npid_sabotage` (on
held-out images) and `npid_partition`; `npid_photographs`, with the checkpoint `npid_cifar10`.
"""

import copy

import torch
from torch import nn

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
    train_supervised,
)
from sslbook.book.chapters.experiments import train as train_steps
from sslbook.book.chapters.npid.variants import Parametric, Watched, roughness, staleness, train
from sslbook.data.loader import Data
from sslbook.data.views import View
from sslbook.methods.base import Method
from sslbook.methods.simclr import SimCLR
from sslbook.nn import ConvNet
from sslbook.weights.backbone import export_backbone

WIDTH, DIM, BATCH, TEMPERATURE, MOMENTUM, NOISE = 16, 64, 32, 0.2, 0.5, 64
IMAGES = 512  # that a network is trained on; probes are fitted on all
BATCH_SIMCLR = 128
LR, LR_WEIGHTS, LR_SIMCLR, LR_SUPERVISED = 5e-3, 1e-2, 1e-2, 5e-3  # the best of `settings`
EPOCHS = {"settings": 40, "shapes": 60, "sabotage": 60, "photographs": 30}
STEPS = 480  # of `limit`
SLOW = 0.03  # learning rate of the slow weights there, over that of the network
SIZES = (100, 400, 1600, 4000)
PHOTOGRAPHS = (4000, 1000)
EVERY = 10**9  # the constant is estimated in every step

NONE = "as it should be"
NCE = {"num_negatives": NOISE, "constant_until": EVERY}
VARIANTS: dict[str, dict] = {
    NONE: {},
    "temperature 1": {"temperature": 1.0},
    "not normalized": {"unit": False},
    "memory never updated": {"momentum": 1.0},
    "memory momentum 0.99": {"momentum": 0.99},
    "no augmentation": {"view": View.center(16)},
    "every image twice": {},
    "half of the images": {},
    "NCE": NCE,
    "NCE, K = 1": {**NCE, "num_negatives": 1},
    "NCE, Z of the first batch": {"num_negatives": NOISE},
    "NCE, Z of epoch 8": {**NCE, "constant_until": 8 * 16},
    "NCE, Z 100 times too large": {**NCE, "wrong": 100.0},
    "NCE, proximal 10": {**NCE, "proximal": 10.0},
    "InfoNCE": {"num_negatives": NOISE, "loss": "InfoNCE"},
}
CURVES = (NONE, "NCE", "NCE, Z of the first batch", "NCE, Z of epoch 8", "NCE, Z 100 times too large")


def make(seed: int, **options) -> Watched:
    torch.manual_seed(seed)
    chosen = {"view": VIEW, "projector_dim": DIM, "temperature": TEMPERATURE, "momentum": MOMENTUM, "num_negatives": 0}
    return Watched(ConvNet(WIDTH), **chosen | options).to(default_device())


def make_parametric(seed: int, num_images: int, view: View = VIEW, rate: float = 1.0) -> Parametric:
    torch.manual_seed(seed)
    return Parametric(ConvNet(WIDTH), view, DIM, TEMPERATURE, num_images, rate).to(default_device())


def make_simclr(seed: int, view: View = VIEW) -> SimCLR:
    torch.manual_seed(seed)
    return SimCLR(ConvNet(WIDTH), view, TEMPERATURE, projector_num_layers=2, projector_dim=DIM).to(default_device())


def part(data: Data, count: int, copies: int = 1) -> Data:
    """The first `count` training images, each `copies` times."""
    return data.split(torch.arange(count).repeat(copies))


# -- commands ----------------------------------------------------------------------------------------------------------


def settings(num_seeds: int, resume: bool) -> None:
    """`npid_settings`: learning rates and temperatures, on the images of another seed of Shapes."""
    data, epochs, table = Data(shapes=OTHER_SHAPES), EPOCHS["settings"], {}
    few = part(data, IMAGES)
    steps = epochs * few.steps_per_epoch(BATCH)
    run = batches(few, (VIEW,), BATCH, steps, 100)
    tried: list[tuple[str, dict, float]] = [(f"learning rate {lr:g}", {}, lr) for lr in (2e-3, 5e-3, 1e-2)]
    tried += [(f"temperature {t:g}", {"temperature": t}, LR) for t in (0.1, 0.5)]
    for name, options, lr in tried:
        method = make(100, **options)
        train(method, few, run, BATCH, lr, 100)
        note(table, name, score(method.backbone, data, 16))
    for lr in (5e-3, 1e-2):
        weights = make_parametric(100, IMAGES)
        train(weights, few, run, BATCH, lr, 100)
        note(table, f"weights, learning rate {lr:g}", score(weights.backbone, data, 16))
    views = batches(few, (VIEW, VIEW), BATCH_SIMCLR, steps * BATCH // (2 * BATCH_SIMCLR), 100)
    for lr in (5e-3, 1e-2):
        other = make_simclr(100)
        train_steps(other, views, lr)
        note(table, f"SimCLR, learning rate {lr:g}", score(other.backbone, data, 16))
    for lr in (2e-3, 5e-3):
        torch.manual_seed(100)
        backbone = ConvNet(WIDTH)
        train_supervised(backbone, few, VIEW, steps, BATCH, 100, lr)
        note(table, f"supervised, learning rate {lr:g}", score(backbone, data, 16))
    about = {"epochs": epochs, "images": IMAGES, "batch": BATCH, "shapes seed": 1}
    results.save("npid_settings", table, seeds=[100], settings=about)


def shapes(num_seeds: int, resume: bool) -> None:
    """`npid_shapes`, `npid_factors`: the methods beside their controls, with as many views; `npid_age`: how well the
    memory bank of seed 0 agrees with the network, by age, at the end of some epochs."""
    data, epochs, names = Data(shapes=TINY_SHAPES), EPOCHS["shapes"], ["npid_shapes", "npid_factors", "npid_age"]
    few = part(data, IMAGES)
    per_epoch = few.steps_per_epoch(BATCH)
    steps = epochs * per_epoch
    about = {"epochs": epochs, "images": IMAGES, "batch": BATCH, "K": NOISE, "steps per epoch": per_epoch}
    (rows, known, age), done = begin(names, about, resume)
    if not done:
        order = ("NPID", "NPID, NCE", "a weight per image", "SimCLR", "random weights", "pixels", "supervised")
        rows |= {name: {} for name in order}
        note(rows, "pixels", score(nn.Flatten(), data, 16))
        note_factors(known, "pixels", nn.Flatten(), data, 16)
    for seed in range(done, num_seeds):
        run = batches(few, (VIEW,), BATCH, steps, seed)
        fresh = make(seed).backbone
        trained: dict[str, Method] = {"NPID": make(seed), "NPID, NCE": make(seed, **NCE)}
        trained["a weight per image"] = make_parametric(seed, IMAGES)

        def watch(step: int, method: Method, seed: int = seed, run: list = run) -> None:
            if seed == 0 and step in [per_epoch * epoch for epoch in (2, 4, 10, 30, epochs)]:
                assert isinstance(method, Watched)
                age[f"epoch {step // per_epoch}"] = staleness(method, run, step, per_epoch)

        for name, method in trained.items():
            watched = {"watch": watch} if name == "NPID" else {}
            lr = LR_WEIGHTS if isinstance(method, Parametric) else LR
            print(name, train(method, few, run, BATCH, lr, seed, **watched)[0], flush=True)
        trained["SimCLR"] = make_simclr(seed)
        views = batches(few, (VIEW, VIEW), BATCH_SIMCLR, steps * BATCH // (2 * BATCH_SIMCLR), seed)
        train_steps(trained["SimCLR"], views, LR_SIMCLR)
        measured = {"random weights": fresh, **{name: method.backbone for name, method in trained.items()}}
        for name, network in measured.items():
            note(rows, name, score(network, data, 16))
            note_factors(known, name, network, data, 16)
        train_supervised(fresh, few, VIEW, steps, BATCH, seed, LR_SUPERVISED)
        note(rows, "supervised", score(fresh, data, 16))
        for name, table in zip(names, (rows, known, age)):
            results.save(name, table, seeds=list(range(seed + 1)), settings=about)


def limit(num_seeds: int, resume: bool) -> None:
    """`npid_limit`: a weight per image and the memory bank over the number of images, at equal steps."""
    data = Data(shapes=TINY_SHAPES)
    about = {"steps": STEPS, "batch": BATCH}
    (table,), done = begin(["npid_limit"], about, resume)
    for seed in range(done, num_seeds):
        for n in SIZES:
            few = part(data, n)
            run = batches(few, (VIEW,), BATCH, STEPS, seed)
            tried = {"memory": (make(seed), LR), "weights": (make_parametric(seed, n), LR_WEIGHTS)}
            tried["slow weights"] = (make_parametric(seed, n, rate=SLOW), LR_WEIGHTS)
            for name, (method, lr) in tried.items():
                log = train(method, few, run, BATCH, lr, seed)[0]
                chosen = {key: log[key] for key in ("loss", "accuracy", "own row")}
                note(table, f"{name}, {n}", {**chosen, **score(method.backbone, data, 16)})
        results.save("npid_limit", table, seeds=list(range(seed + 1)), settings=about)


def twins(method: Watched) -> dict[str, float]:
    """Of images that occur twice: the cosine of the two rows, and whether one's nearest row is the other."""
    rows = method.memory.rows
    cosine = rows @ rows.T - 2 * torch.eye(len(rows), device=rows.device)
    half = len(rows) // 2
    other = torch.arange(len(rows), device=rows.device).roll(half)
    found = cosine.gather(1, other[:, None]).mean().item()
    return {"twin": found, "twin nearest": 100 * (cosine.argmax(1) == other).float().mean().item()}


def sabotage(num_seeds: int, resume: bool) -> None:
    """`npid_sabotage`: one part removed or replaced; `npid_partition`: the constant and the sum that it stands for, over
    the steps of seed 0."""
    data, epochs, names = Data(shapes=TINY_SHAPES), EPOCHS["sabotage"], ["npid_sabotage", "npid_partition"]
    full, twice, half = part(data, IMAGES), part(data, IMAGES // 2, copies=2), part(data, IMAGES // 2)
    steps = epochs * full.steps_per_epoch(BATCH)
    about = {"epochs": epochs, "images": IMAGES, "batch": BATCH, "K": NOISE}
    (table, curves), done = begin(names, about, resume)
    for seed in range(done, num_seeds):
        usual = batches(full, (VIEW,), BATCH, steps, seed)
        for name, options in VARIANTS.items():
            method = make(seed, **options)
            few = {"every image twice": twice, "half of the images": half}.get(name, full)
            same = few is full and method.view == VIEW
            run = usual if same else batches(few, (method.view,), BATCH, steps, seed)
            if name == NONE:
                note(table, "random weights", held_out(method.backbone, data, 16))
            end, log = train(method, few, run, BATCH, LR, seed)
            more = twins(method) if few is twice else {}
            more |= {"roughness": 100 * roughness(log["loss"])}
            note(table, name, {**end, **more, **held_out(method.backbone, data, 16)})
            if seed == 0 and name in CURVES:
                kept = [key for key in ("loss", "log Z/n", "log constant/n") if key in log]
                curves[name] = {key: [round(value, 4) for value in log[key][::8]] for key in kept}
        for name, values in zip(names, (table, curves)):
            results.save(name, values, seeds=list(range(seed + 1)), settings=about)


def photographs(num_seeds: int, resume: bool) -> None:
    """`npid_photographs`: CIFAR-10, the methods beside their controls; the checkpoint is of seed 0."""
    data, epochs = cifar10(*PHOTOGRAPHS), EPOCHS["photographs"]
    few = part(data, IMAGES)
    steps = epochs * few.steps_per_epoch(BATCH)
    about = {"epochs": epochs, "images": IMAGES, "labeled images": PHOTOGRAPHS[0], "test images": PHOTOGRAPHS[1]}
    about |= {"data": data.name}
    rows: Table
    (rows,), done = begin(["npid_photographs"], about, resume)
    if not done:
        order = ("NPID", "a weight per image", "SimCLR", "random weights", "pixels", "supervised")
        rows |= {name: {} for name in order}
        note(rows, "pixels", score(nn.Flatten(), data, 32))
    for seed in range(done, num_seeds):
        run = batches(few, (PHOTOGRAPH,), BATCH, steps, seed)
        method, weights = make(seed, view=PHOTOGRAPH), make_parametric(seed, IMAGES, PHOTOGRAPH)
        fresh = copy.deepcopy(method.backbone)
        note(rows, "random weights", score(fresh, data, 32))
        for name, one, lr in (("NPID", method, LR), ("a weight per image", weights, LR_WEIGHTS)):
            train(one, few, run, BATCH, lr, seed)
            note(rows, name, score(one.backbone, data, 32))
        del run
        other = make_simclr(seed, PHOTOGRAPH)
        views = batches(few, (PHOTOGRAPH, PHOTOGRAPH), BATCH_SIMCLR, steps * BATCH // (2 * BATCH_SIMCLR), seed)
        train_steps(other, views, LR_SIMCLR)
        note(rows, "SimCLR", score(other.backbone, data, 32))
        if seed == 0:
            path = results.book() / "checkpoints" / "npid_cifar10.safetensors"
            command = "python book/chapters/npid/experiments.py photographs"
            export_backbone(path, method.backbone, {"method": "NPID", "command": command, "seed": 0, "settings": about})
        train_supervised(fresh, few, PHOTOGRAPH, steps, BATCH, seed, LR_SUPERVISED)
        note(rows, "supervised", score(fresh, data, 32))
        results.save("npid_photographs", rows, seeds=list(range(seed + 1)), settings=about)


if __name__ == "__main__":
    main(__doc__, settings, shapes, limit, sabotage, photographs)
