"""What the chapter on SimSiam quotes: the choice of its settings, its runs over several seeds, its ablations.

    python book/chapters/simsiam/experiments.py settings       learning rates, on images of another seed of Shapes
    python book/chapters/simsiam/experiments.py shapes         SimSiam and its controls, and the factors; three seeds
    python book/chapters/simsiam/experiments.py sabotage       one part removed or replaced at a time, and three runs
                                                               followed step by step; three seeds
    python book/chapters/simsiam/experiments.py steps          targets that stay for 1 to 62 steps, or that are an EMA
                                                               network's; three seeds
    python book/chapters/simsiam/experiments.py photographs    CIFAR-10, from SSLBOOK_DATA or downloaded

Each takes minutes on one CPU core; with --resume it goes on after the seeds that its files hold. They write
`simsiam_settings`; `simsiam_shapes` and `simsiam_factors` (on test images), with the checkpoint `simsiam_shapes`;
`simsiam_sabotage` (on held-out training images) and `simsiam_curves` (of seed 0); `simsiam_steps`, held out as well;
`simsiam_photographs`, with the checkpoint `simsiam_cifar10`.
"""

import copy
import math
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from sslbook import default_device, results
from sslbook.book.chapters.byol.variants import convnet
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
    train_supervised,
)
from sslbook.book.chapters.simsiam.variants import (
    Bias,
    ManyViews,
    MovingAverage,
    MultiStep,
    NoStopGradient,
    OneDirection,
    WithEMA,
)
from sslbook.data.loader import Batch, Data
from sslbook.data.views import View
from sslbook.evaluation import extract_features
from sslbook.methods.simsiam import SimSiam
from sslbook.nn import MLP
from sslbook.schedules import Clock
from sslbook.weights.backbone import export_backbone

WIDTH, DIM, BOTTLENECK, BATCH = 16, 256, 64, 64
LR, LR_SUPERVISED = 5e-3, 5e-3  # the best of `settings`
LRS = (2e-3, 5e-3, 1e-2)
STEPS = {"settings": 300, "shapes": 600, "sabotage": 300, "steps": 300, "photographs": 200}
PHOTOGRAPHS = (4000, 1000)
EPOCH = TINY_SHAPES.num_train // BATCH

NONE = "as it should be"
plain_output = partial(MLP, 4 * WIDTH, DIM, DIM)
VARIANTS: dict[str, dict] = {
    NONE: {},
    "no stop-gradient": {"kind": NoStopGradient},
    "no predictor": {"predictor": nn.Identity},
    "no stop-gradient, no output norm": {"kind": NoStopGradient, "projector": plain_output},
    "no output norm": {"projector": plain_output},
    "no norm in the heads": {
        "projector": partial(plain_output, batch_norm=False),
        "predictor": partial(MLP, DIM, BOTTLENECK, DIM, batch_norm=False),
    },
    "norm on the prediction too": {"predictor": partial(MLP, DIM, BOTTLENECK, DIM, last_batch_norm="affine")},
    "batch norm in the backbone": {"norm": "batch"},
    "predictor's rate decays": {"decay": True},
    "predictor 10 times as fast": {"faster": 10.0},
    "predictor never trained": {"faster": 0.0},
    "predictor without bottleneck": {"predictor": partial(MLP, DIM, DIM, DIM)},
    "linear predictor": {"predictor": partial(nn.Linear, DIM, DIM)},
    "predictor is one bias": {"predictor": partial(Bias, DIM)},
    "one direction": {"kind": OneDirection},
    "moving average, no predictor": {"kind": partial(MovingAverage, num_images=TINY_SHAPES.num_train)},
    "mean of 4 views, no predictor": {"kind": partial(ManyViews, count=4)},
    "batch 16": {"batch": 16},
    "batch 256": {"batch": 256},
}
FOLLOWED = (NONE, "no stop-gradient", "no stop-gradient, no output norm")
KEPT_FOR: dict[str, dict] = {  # how the targets of the multi-step versions and of EMA networks are made
    **{f"{k} step{'s' if k > 1 else ''}": {"kind": partial(MultiStep, every=k)} for k in (1, 3, 10, 30)},
    "1 epoch": {"kind": partial(MultiStep, every=EPOCH)},
    "EMA 0.9": {"kind": partial(WithEMA, momentum=0.9)},
    "EMA 0.9, 3/4 of the steps": {"kind": partial(WithEMA, momentum=0.9), "share": 0.75},
    "EMA 0.97": {"kind": partial(WithEMA, momentum=0.97)},
}


def make(
    seed: int,
    *,
    kind: Callable[..., SimSiam] = SimSiam,
    view: View = VIEW,
    projector: Callable[[], nn.Module] | None = None,
    predictor: Callable[[], nn.Module] | None = None,
    norm: str = "group",
) -> SimSiam:
    """SimSiam with two layers in the projector; the backbone has group norm, the heads batch norm."""
    torch.manual_seed(seed)
    parts = {name: part() for name, part in (("projector", projector), ("predictor", predictor)) if part}
    sizes = {"hidden_dim": DIM, "projector_dim": DIM, "projector_num_layers": 2, "predictor_dim": BOTTLENECK}
    return kind(convnet(WIDTH, norm), view, **sizes, **parts).to(default_device())


def train(
    method: SimSiam,
    run: Sequence[Batch],
    lr: float = LR,
    *,
    decay: bool = False,
    faster: float = 1.0,
    watch: Callable[[int, SimSiam], None] = lambda step, method: None,
) -> list[dict[str, float]]:
    """Train in place, as the chapter does: AdamW, a rise and a cosine, and a predictor whose rate stays constant.

    Args:
        method: what to train.
        run: one batch a step.
        lr: peak learning rate.
        decay: whether the predictor's rate follows the others'.
        faster: the predictor's rate, relative to `lr`.
        watch: called before every step and after the last.
    """
    head = list(method.predictor.parameters())
    rest = [p for p in method.parameters() if p.requires_grad and not any(p is other for other in head)]
    groups = [{"params": part} for part in (rest, head) if part]
    optimizer = torch.optim.AdamW(groups, lr, weight_decay=0.01)
    log = []
    method.train()
    for step, batch in enumerate(run):
        watch(step, method)
        clock = Clock(step, len(run))
        share = min(1.0, (step + 1) / (0.1 * len(run))) * 0.5 * (1 + math.cos(math.pi * step / len(run)))
        for group, rate in zip(optimizer.param_groups, (lr * share, lr * faster * (share if decay else 1.0))):
            group["lr"] = rate
        out = method(batch, clock)
        optimizer.zero_grad()
        out["loss"].backward()
        optimizer.step()
        method.after_step(Clock(step + 1, len(run)))
        log.append({name: value.item() for name, value in out.items()})
    watch(len(run), method)
    return log


def ends(log: Sequence[dict[str, float]]) -> dict[str, float]:
    """The means over the last twenty steps."""
    return {name: sum(line[name] for line in log[-20:]) / len(log[-20:]) for name in log[0]}


def projections(method: SimSiam, data: Data) -> Tensor:
    """z of the held-out training images."""
    network = nn.Sequential(method.backbone, method.projector)
    return extract_features(network, data, "train", View.center(16), progress=False)[0][-HELD_OUT:]


def first_share(z: Tensor) -> float:
    """The first principal component's share of the variance, in %."""
    values = torch.linalg.svdvals((z - z.mean(0)).double()).square()
    return 100 * (values[0] / values.sum()).item()


def measured(method: SimSiam, data: Data) -> dict[str, float]:
    """What the log does not show: rank and first share of z; rank and probes of h."""
    z = projections(method, data)
    return {"rank of z": effective_rank(z), "first share": first_share(z), **held_out(method.backbone, data, 16)}


def row(
    name: str, options: dict, data: Data, seed: int, steps: int, watch: Callable | None = None
) -> tuple[dict, list]:
    """Train one variant; what was measured and its log. As many images are seen whatever the batch size."""
    options = dict(options)
    how = {key: options.pop(key) for key in ("decay", "faster") if key in options}
    batch, share = options.pop("batch", BATCH), options.pop("share", 1.0)
    method = make(seed, **options)
    count = round(steps * share * BATCH / batch)
    log = train(method, batches(data, method.views(), batch, count, seed), **how, **({"watch": watch} if watch else {}))
    return {**ends(log), **measured(method, data)}, log


# -- commands ----------------------------------------------------------------------------------------------------------


def settings(num_seeds: int, resume: bool) -> None:
    """`simsiam_settings`: learning rates, on the images of another seed of Shapes, which no other result uses."""
    steps, data, table = STEPS["settings"], Data(shapes=OTHER_SHAPES), {}
    run = batches(data, (VIEW, VIEW), BATCH, steps, 100)
    for lr in LRS:
        method = make(100)
        fresh = copy.deepcopy(method.backbone)
        train(method, run, lr)
        note(table, f"SimSiam, learning rate {lr:g}", score(method.backbone, data, 16))
        train_supervised(fresh, data, VIEW, steps, BATCH, 100, lr)
        note(table, f"supervised, learning rate {lr:g}", score(fresh, data, 16))
    results.save("simsiam_settings", table, seeds=[100], settings={"steps": steps, "batch": BATCH, "shapes seed": 1})


def shapes(num_seeds: int, resume: bool) -> None:
    """`simsiam_shapes` and `simsiam_factors`: the method beside its controls, and what it encodes; the checkpoint."""
    data, steps, names = Data(shapes=TINY_SHAPES), STEPS["shapes"], ["simsiam_shapes", "simsiam_factors"]
    about = {"steps": steps, "batch": BATCH, "images": TINY_SHAPES.num_train}
    (rows, known), done = begin(names, about, resume)
    if not done:
        rows |= {name: {} for name in ("SimSiam", "random weights", "pixels", "supervised")}
        note(rows, "pixels", score(nn.Flatten(), data, 16))
        note_factors(known, "pixels", nn.Flatten(), data, 16)
    for seed in range(done, num_seeds):
        method = make(seed)
        fresh = copy.deepcopy(method.backbone)
        print(ends(train(method, batches(data, (VIEW, VIEW), BATCH, steps, seed))), flush=True)
        note(rows, "SimSiam", score(method.backbone, data, 16))
        note(rows, "random weights", score(fresh, data, 16))
        note_factors(known, "random weights", fresh, data, 16)
        note_factors(known, "h", method.backbone, data, 16)
        note_factors(known, "z", nn.Sequential(method.backbone, method.projector), data, 16)
        train_supervised(fresh, data, VIEW, steps, BATCH, seed, LR_SUPERVISED)
        note(rows, "supervised", score(fresh, data, 16))
        if seed == 0:
            export("simsiam_shapes", method, "shapes", about)
        for name, table in zip(names, (rows, known)):
            results.save(name, table, seeds=list(range(seed + 1)), settings=about)


def export(name: str, method: SimSiam, command: str, about: dict) -> None:
    """The backbone as a checkpoint; load_backbone needs convnet(WIDTH, "group")."""
    facts = {"method": "SimSiam", "seed": 0, "settings": about}
    facts["command"] = f"python book/chapters/simsiam/experiments.py {command}"
    export_backbone(results.book() / "checkpoints" / f"{name}.safetensors", method.backbone, facts)


class Watch:
    """feature_std and rank of the projections of the same held-out images, every `every` steps."""

    def __init__(self, data: Data, every: int) -> None:
        self.data, self.every, self.found = data, every, {}

    def __call__(self, step: int, method: SimSiam) -> None:
        if step % self.every == 0:
            z = projections(method, self.data)
            self.found[str(step)] = {"rank of z": round(effective_rank(z), 3), "first share": round(first_share(z), 2)}
            method.train()


def sabotage(num_seeds: int, resume: bool) -> None:
    """`simsiam_sabotage`: one part removed or replaced at a time; `simsiam_curves`: three of the runs, of seed 0."""
    data, steps, names = Data(shapes=TINY_SHAPES), STEPS["sabotage"], ["simsiam_sabotage", "simsiam_curves"]
    about = {"steps": steps, "batch": BATCH, "images": TINY_SHAPES.num_train}
    (table, curves), done = begin(names, about, resume)
    for seed in range(done, num_seeds):
        note(table, "random weights", measured(make(seed), data))
        for name, options in VARIANTS.items():
            watch = Watch(data, 20) if seed == 0 and name in FOLLOWED else None
            values, log = row(name, options, data, seed, steps, watch)
            note(table, name, values)
            if watch:
                curves[name] = {
                    **{key: [round(line[key], 4) for line in log] for key in log[0]},
                    "at": [int(step) for step in watch.found],
                    **{key: [one[key] for one in watch.found.values()] for key in ("rank of z", "first share")},
                }
        for name, values in zip(names, (table, curves)):
            results.save(name, values, seeds=list(range(seed + 1)), settings=about)


def steps(num_seeds: int, resume: bool) -> None:
    """`simsiam_steps`: the targets are renewed every k steps, or by an EMA."""
    data, count = Data(shapes=TINY_SHAPES), STEPS["steps"]
    about = {"steps": count, "batch": BATCH, "images": TINY_SHAPES.num_train}
    (table,), done = begin(["simsiam_steps"], about, resume)
    for seed in range(done, num_seeds):
        for name, options in KEPT_FOR.items():
            note(table, name, row(name, options, data, seed, count)[0])
        results.save("simsiam_steps", table, seeds=list(range(seed + 1)), settings=about)


def photographs(num_seeds: int, resume: bool) -> None:
    """`simsiam_photographs`: CIFAR-10, the method beside its controls on test images; the checkpoint is of seed 0."""
    data, count = cifar10(*PHOTOGRAPHS), STEPS["photographs"]
    about = {"steps": count, "batch": BATCH, "images": PHOTOGRAPHS[0]}
    about |= {"test images": PHOTOGRAPHS[1], "data": data.name}
    (rows,), done = begin(["simsiam_photographs"], about, resume)
    if not done:
        rows |= {name: {} for name in ("SimSiam", "random weights", "pixels", "supervised")}
        note(rows, "pixels", score(nn.Flatten(), data, 32))
    for seed in range(done, num_seeds):
        method = make(seed, view=PHOTOGRAPH)
        fresh = copy.deepcopy(method.backbone)
        print(ends(train(method, batches(data, (PHOTOGRAPH, PHOTOGRAPH), BATCH, count, seed))), flush=True)
        note(rows, "SimSiam", score(method.backbone, data, 32))
        note(rows, "random weights", score(fresh, data, 32))
        train_supervised(fresh, data, PHOTOGRAPH, count, BATCH, seed, LR_SUPERVISED)
        note(rows, "supervised", score(fresh, data, 32))
        if seed == 0:
            export("simsiam_cifar10", method, "photographs", about)
        results.save("simsiam_photographs", rows, seeds=list(range(seed + 1)), settings=about)


if __name__ == "__main__":
    main(__doc__, settings, shapes, sabotage, steps, photographs)
