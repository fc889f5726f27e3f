"""What the chapter on MoCo quotes: the choice of its settings, its runs over several seeds, its ablations.

    python book/chapters/moco/experiments.py settings       learning rates and momenta, on other images of Shapes
    python book/chapters/moco/experiments.py shapes         MoCo and its controls; three seeds
    python book/chapters/moco/experiments.py sabotage       one part removed or replaced at a time, how stale the queue
                                                            is, and how much batch norm leaks; three seeds
    python book/chapters/moco/experiments.py toy            the toy in which batch norm leaks; three seeds
    python book/chapters/moco/experiments.py versions       from version 1 to version 2, one change at a time
    python book/chapters/moco/experiments.py transformer    version 3: patch embedding learned and frozen
    python book/chapters/moco/experiments.py photographs    CIFAR-10, from SSLBOOK_DATA or downloaded

Each takes minutes on one CPU core; with --resume it goes on after the seeds that its files hold. They write
`moco_settings`; `moco_shapes` and `moco_factors` (on test images), with the checkpoint `moco_shapes`; `moco_sabotage`
(on held-out training images), `moco_age`, `moco_queue` and `moco_lag`; `moco_toy`; `moco_versions`; `moco_transformer` and
`moco_gradients`; `moco_photographs`, with the checkpoint `moco_cifar10`.
"""

import copy
from collections.abc import Callable, Sequence
from dataclasses import replace

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
    train,
    train_supervised,
)
from sslbook.book.chapters.moco.toy import train as train_toy
from sslbook.book.chapters.moco.variants import (
    InBatch,
    Lag,
    PushedFirst,
    agreement,
    fresh_queue,
    leak,
    positives_found,
)
from sslbook.data.loader import Batch, Data
from sslbook.data.views import View
from sslbook.methods.base import Method
from sslbook.methods.moco import MoCo
from sslbook.methods.moco_v3 import MoCoV3
from sslbook.nn import ConvNet
from sslbook.nn.vit import VisionTransformer
from sslbook.schedules import Clock
from sslbook.weights.backbone import export_backbone

BLURRED = replace(VIEW, blur=0.5)
WIDTH, DIM, BATCH, QUEUE, GROUPS, MOMENTUM = 16, 64, 128, 1024, 8, 0.995
LR, LR_SUPERVISED = 1e-2, 5e-3  # the best of `settings`
LRS = (2e-3, 5e-3, 1e-2)
STEPS = {"settings": 150, "shapes": 300, "sabotage": 150, "versions": 120, "transformer": 80, "photographs": 150}
STEPS |= {"toy": 300}
GROUP_SIZES = (2, 4, 8, 16, 64)
PHOTOGRAPHS = (3000, 1000)

NONE = "as it should be"
VARIANTS: dict[str, dict] = {
    NONE: {},
    "no EMA (m = 0)": {"momentum": 0.0},
    "m = 0.9": {"momentum": 0.9},
    "keys never updated (m = 1)": {"momentum": 1.0},
    "queue of one batch": {"queue_size": BATCH},
    "negatives of the batch, no queue": {"kind": InBatch},
    "pushed before the loss": {"kind": PushedFirst},
    "no shuffling": {"shuffles": False},
    "groups of 4": {"batch_norm_groups": 32},
    "groups of 4, no shuffling": {"batch_norm_groups": 32, "shuffles": False},
}
FOLLOWED = ("no EMA (m = 0)", "m = 0.9", NONE, "keys never updated (m = 1)")
SHUFFLED = (NONE, "no shuffling", "groups of 4", "groups of 4, no shuffling")

V1 = {"mlp": False, "temperature": 0.07}
VERSIONS: dict[str, dict] = {  # the report's table 1; the temperature goes with the head
    "version 1": V1,
    "MLP, temperature 0.07": {"temperature": 0.07},
    "MLP": {},
    "blur": {**V1, "view": BLURRED},
    "MLP, blur": {"view": BLURRED},
    "MLP, blur, cosine": {"view": BLURRED, "cosine": True},
}


def make(
    seed: int,
    *,
    kind: type[MoCo] = MoCo,
    view: View = VIEW,
    mlp: bool = True,
    temperature: float = 0.2,
    momentum: float = MOMENTUM,
    queue_size: int = QUEUE,
    batch_norm_groups: int = GROUPS,
    shuffles: bool = True,
) -> MoCo:
    torch.manual_seed(seed)
    method = kind(ConvNet(WIDTH), view, mlp, DIM, temperature, momentum, queue_size, batch_norm_groups)
    method.shuffles = method.shuffles and shuffles
    return method.to(default_device())


# -- commands ----------------------------------------------------------------------------------------------------------


def settings(num_seeds: int, resume: bool) -> None:
    """`moco_settings`: learning rates and momenta, on the images of another seed of Shapes."""
    steps, data, table = STEPS["settings"], Data(shapes=OTHER_SHAPES), {}
    run = batches(data, (VIEW, VIEW), BATCH, steps, 100)
    for lr in LRS:
        method = make(100)
        fresh = copy.deepcopy(method.backbone)
        train(method, run, lr)
        note(table, f"MoCo, learning rate {lr:g}", score(method.backbone, data, 16))
        train_supervised(fresh, data, VIEW, steps, BATCH, 100, lr)
        note(table, f"supervised, learning rate {lr:g}", score(fresh, data, 16))
    for momentum in (0.98, 0.999):
        method = make(100, momentum=momentum)
        train(method, run, LR)
        note(table, f"MoCo, momentum {momentum:g}", score(method.backbone, data, 16))
    about = {"steps": steps, "batch": BATCH, "queue": QUEUE, "momentum": MOMENTUM, "shapes seed": 1}
    results.save("moco_settings", table, seeds=[100], settings=about)


def shapes(num_seeds: int, resume: bool) -> None:
    """`moco_shapes` and `moco_factors`: the method beside its controls; its checkpoint is of seed 0."""
    data, steps, names = Data(shapes=TINY_SHAPES), STEPS["shapes"], ["moco_shapes", "moco_factors"]
    about = {"steps": steps, "batch": BATCH, "queue": QUEUE, "momentum": MOMENTUM, "images": TINY_SHAPES.num_train}
    (rows, known), done = begin(names, about, resume)
    if not done:
        rows |= {name: {} for name in ("MoCo", "random weights", "pixels", "supervised")}
        note(rows, "pixels", score(nn.Flatten(), data, 16))
        note_factors(known, "pixels", nn.Flatten(), data, 16)
    for seed in range(done, num_seeds):
        method = make(seed)
        fresh = copy.deepcopy(method.backbone)
        print(train(method, batches(data, (VIEW, VIEW), BATCH, steps, seed), LR), flush=True)
        note(rows, "MoCo", score(method.backbone, data, 16))
        note(rows, "random weights", score(fresh, data, 16))
        note_factors(known, "h", method.backbone, data, 16)
        note_factors(known, "random weights", fresh, data, 16)
        if seed == 0:
            path = results.book() / "checkpoints" / "moco_shapes.safetensors"
            command = "python book/chapters/moco/experiments.py shapes"
            export_backbone(path, method.backbone, {"method": "MoCo", "command": command, "seed": 0, "settings": about})
        train_supervised(fresh, data, VIEW, steps, BATCH, seed, LR_SUPERVISED)
        note(rows, "supervised", score(fresh, data, 16))
        for name, table in zip(names, (rows, known)):
            results.save(name, table, seeds=list(range(seed + 1)), settings=about)


def follow(name: str, run: Sequence[Batch], lag: Lag, ages: Table, queue: Table) -> Callable[[int, Method], None]:
    """What to call before every step: notes the lag, and in the middle of the run how stale the queue is."""

    def watch(step: int, method: Method) -> None:
        assert isinstance(method, MoCo)
        lag(step, method)
        if step != len(run) // 2:
            return
        for age, (same, other) in enumerate(agreement(method, run, step), 1):
            row = ages.setdefault(f"{name}, age {age}", {"same image": [], "other images": []})
            row["same image"].append(round(same, 4))
            row["other images"].append(round(other, 4))
        for which, rows in (("stored", method.queue.rows), ("encoded again", fresh_queue(method, run, step))):
            note(queue, f"{name}, {which}", positives_found(method, run, step, rows))

    return watch


def sabotage(num_seeds: int, resume: bool) -> None:
    """`moco_sabotage`: one part removed or replaced, on the same batches; `moco_age` and `moco_queue`: how stale the
    queue is in the middle of some runs; `moco_lag`: the key encoder's distance and its bounds."""
    data, steps = Data(shapes=TINY_SHAPES), STEPS["sabotage"]
    names = ["moco_sabotage", "moco_age", "moco_queue", "moco_lag"]
    about = {"steps": steps, "batch": BATCH, "queue": QUEUE, "momentum": MOMENTUM, "images": TINY_SHAPES.num_train}
    (table, ages, queue, lags), done = begin(names, about, resume)
    for seed in range(done, num_seeds):
        run = batches(data, (VIEW, VIEW), BATCH, steps, seed)
        for name, options in VARIANTS.items():
            method = make(seed, **options)
            if name == NONE:
                note(table, "random weights", held_out(method.backbone, data, 16))
            lag, watch = Lag(method.momentum), None
            if name in FOLLOWED:
                watch = follow(name, run, lag, ages, queue)
            log = train(method, run, LR, watch=watch or (lambda step, method: None))
            if watch and seed == 0:
                lags[name] = lag.rows[:: max(1, steps // 30)]
            more = leak(method, run) if name in SHUFFLED else {}
            note(table, name, {**log, **more, **held_out(method.backbone, data, 16)})
        for file, values in zip(names, (table, ages, queue, lags)):
            results.save(file, values, seeds=list(range(seed + 1)), settings=about)


def train_by(
    method: Method, run: Sequence[Batch], lr: float, rate: Callable[[float], float], watch: Callable[[Method], None]
) -> None:
    """As `experiments.train`, with the learning rate `lr * rate(progress)`; `watch` is called after every backward."""
    trained = [p for p in method.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr, weight_decay=0.01)
    method.train()
    for step, batch in enumerate(run):
        for group in optimizer.param_groups:
            group["lr"] = lr * rate(step / len(run))
        loss = method(batch, Clock(step, len(run)))["loss"]
        optimizer.zero_grad()
        loss.backward()
        watch(method)
        optimizer.step()
        method.after_step(Clock(step + 1, len(run)))


def toy(num_seeds: int, resume: bool) -> None:
    """`moco_toy`: the toy of the leak, over the size of the groups of batch norm."""
    about = {"steps": STEPS["toy"]}
    (table,), done = begin(["moco_toy"], about, resume)
    for seed in range(done, num_seeds):
        for size in GROUP_SIZES:
            for how in ("own groups", "shuffled"):
                note(table, f"groups of {size}, {how}", train_toy(size, how == "shuffled", STEPS["toy"], seed))
        results.save("moco_toy", table, seeds=list(range(seed + 1)), settings=about)


def steps_down(progress: float) -> float:
    """Version 1's schedule: a tenth after 60 % of the run and again after 80 %."""
    return 0.1 ** ((progress >= 0.6) + (progress >= 0.8))


def cosine(progress: float) -> float:
    return 0.5 + 0.5 * torch.cos(torch.tensor(torch.pi * progress)).item()


def warmed_up(progress: float) -> float:
    """Version 3's schedule: a linear warm-up, then a cosine."""
    return min(1.0, 10 * progress + 0.01) * cosine(progress)


def versions(num_seeds: int, resume: bool) -> None:
    """`moco_versions`: from version 1 to version 2, one change at a time, on held-out training images."""
    data, steps = Data(shapes=TINY_SHAPES), STEPS["versions"]
    about = {"steps": steps, "batch": BATCH, "queue": QUEUE, "momentum": MOMENTUM, "images": TINY_SHAPES.num_train}
    (table,), done = begin(["moco_versions"], about, resume)
    for seed in range(done, num_seeds):
        runs = {view: batches(data, (view, view), BATCH, steps, seed) for view in (VIEW, BLURRED)}
        for name, options in VERSIONS.items():
            options = dict(options)
            rate = cosine if options.pop("cosine", False) else steps_down
            method = make(seed, **options)
            train_by(method, runs[method.view], LR, rate, lambda method: None)
            note(table, name, held_out(method.backbone, data, 16))
        results.save("moco_versions", table, seeds=list(range(seed + 1)), settings=about)


def gradients(parts: Sequence[nn.Module], lengths: dict[str, list[float]]) -> Callable[[Method], None]:
    """What to call after every backward: notes the length of the gradient of each part, 0 where it is frozen."""

    def watch(method: Method) -> None:
        for part, found in zip(parts, lengths.values()):
            grads = [p.grad.norm() for p in part.parameters() if p.grad is not None]
            found.append(round(torch.stack(grads).norm().item(), 5) if grads else 0.0)

    return watch


def transformer(num_seeds: int, resume: bool) -> None:
    """`moco_transformer`: version 3 with a small transformer, patch embedding learned or frozen; `moco_gradients`: the
    length of the gradient of the first and of the last layers at every step, of seed 0."""
    data, steps = Data(shapes=TINY_SHAPES), STEPS["transformer"]
    about = {"steps": steps, "batch": BATCH, "momentum": 0.99, "images": TINY_SHAPES.num_train}
    (table, curves), done = begin(["moco_transformer", "moco_gradients"], about, resume)
    for seed in range(done, num_seeds):
        run = batches(data, (VIEW, VIEW), BATCH, steps, seed)
        for lr in (1e-3, 1e-2):
            for frozen in (False, True):
                name = f"{'frozen' if frozen else 'learned'}, learning rate {lr:g}"
                torch.manual_seed(seed)
                backbone = VisionTransformer(16, 4, 64, 2, 4)
                method = MoCoV3(backbone, VIEW, VIEW, 128, DIM, 3, True, 0.2, 0.99, frozen).to(default_device())
                lengths: dict[str, list[float]] = {"patch embedding": [], "first block": [], "last block": []}
                parts = (backbone.patch_embed, backbone.blocks[0], backbone.blocks[-1])

                train_by(
                    method,
                    run,
                    lr,
                    lambda progress: min(1.0, 10 * progress + 0.01) * cosine(progress),
                    gradients(parts, lengths),
                )
                first = torch.tensor(lengths["patch embedding" if not frozen else "first block"][10:])
                spikes = {"largest / median gradient": (first.max() / first.median()).item()}
                note(table, name, {**spikes, **held_out(method.backbone, data, 16)})
                if seed == 0:
                    curves[name] = lengths
        for file, values in (("moco_transformer", table), ("moco_gradients", curves)):
            results.save(file, values, seeds=list(range(seed + 1)), settings=about)


def photographs(num_seeds: int, resume: bool) -> None:
    """`moco_photographs`: CIFAR-10, the method beside its controls on test images; the checkpoint is of seed 0."""
    data, steps = cifar10(*PHOTOGRAPHS), STEPS["photographs"]
    about = {"steps": steps, "batch": BATCH, "queue": QUEUE, "momentum": MOMENTUM, "images": PHOTOGRAPHS[0]}
    about |= {"test images": PHOTOGRAPHS[1], "data": data.name}
    rows: Table
    (rows,), done = begin(["moco_photographs"], about, resume)
    if not done:
        rows |= {name: {} for name in ("MoCo", "random weights", "pixels", "supervised")}
        note(rows, "pixels", score(nn.Flatten(), data, 32))
    for seed in range(done, num_seeds):
        method = make(seed, view=PHOTOGRAPH)
        fresh = copy.deepcopy(method.backbone)
        note(rows, "random weights", score(fresh, data, 32))
        print(train(method, batches(data, (PHOTOGRAPH, PHOTOGRAPH), BATCH, steps, seed), LR), flush=True)
        note(rows, "MoCo", score(method.backbone, data, 32))
        if seed == 0:
            path = results.book() / "checkpoints" / "moco_cifar10.safetensors"
            command = "python book/chapters/moco/experiments.py photographs"
            export_backbone(path, method.backbone, {"method": "MoCo", "command": command, "seed": 0, "settings": about})
        train_supervised(fresh, data, PHOTOGRAPH, steps, BATCH, seed, LR_SUPERVISED)
        note(rows, "supervised", score(fresh, data, 32))
        results.save("moco_photographs", rows, seeds=list(range(seed + 1)), settings=about)


if __name__ == "__main__":
    main(__doc__, settings, shapes, sabotage, toy, versions, transformer, photographs)
