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

import copy
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from sslbook import default_device, results
from sslbook.book.chapters import experiments
from sslbook.book.chapters.byol.variants import (
    Constant,
    DirectPred,
    NoStopGradient,
    convnet,
    mlp,
    standardize_weights,
)
from sslbook.book.chapters.experiments import (
    OTHER_SHAPES,
    PHOTOGRAPH,
    TINY_SHAPES,
    VIEW,
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
from sslbook.data.loader import Batch, Data
from sslbook.data.views import View
from sslbook.methods.byol import BYOL
from sslbook.weights.backbone import export_backbone

WIDTH, HIDDEN, DIM, BATCH, MOMENTUM = 16, 256, 64, 64, 0.9
LR, LR_SUPERVISED = 5e-3, 5e-3  # the best of `settings`
LRS = (2e-3, 5e-3, 1e-2)
STEPS = {"settings": 200, "shapes": 600, "sabotage": 300, "photographs": 200}
PHOTOGRAPHS = (4000, 1000)

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


def train(
    method: BYOL,
    run: Sequence[Batch],
    lr: float = LR,
    faster: float = 1.0,
    watch: Callable[[int, BYOL], None] = lambda step, method: None,
) -> dict[str, float]:
    """As the chapter does, with a predictor that learns `faster` times as fast as the rest."""
    head = [p for p in method.predictor.parameters() if p.requires_grad]
    rest = [p for p in method.parameters() if p.requires_grad and not any(p is other for other in head)]
    groups = [{"params": part, "lr": rate} for part, rate in ((rest, lr), (head, lr * faster)) if part]
    return experiments.train(method, run, lr, groups=groups, watch=watch)


# -- commands ----------------------------------------------------------------------------------------------------------


def settings(num_seeds: int, resume: bool) -> None:
    """`byol_settings`: learning rates, on the images of another seed of Shapes, which no other result uses."""
    steps, data, table = STEPS["settings"], Data(shapes=OTHER_SHAPES), {}
    run = batches(data, (VIEW, VIEW), BATCH, steps, 100)
    for lr in LRS:
        method = make(100)
        fresh = copy.deepcopy(method.backbone)
        train(method, run, lr)
        note(table, f"BYOL, learning rate {lr:g}", score(method.backbone, data, 16))
        train_supervised(fresh, data, VIEW, steps, BATCH, 100, lr)
        note(table, f"supervised, learning rate {lr:g}", score(fresh, data, 16))
    results.save("byol_settings", table, seeds=[100], settings={"steps": steps, "batch": BATCH, "shapes seed": 1})


def shapes(num_seeds: int, resume: bool) -> None:
    """`byol_shapes`: the method beside its controls."""
    data, steps = Data(shapes=TINY_SHAPES), STEPS["shapes"]
    about = {"steps": steps, "batch": BATCH, "momentum": MOMENTUM, "images": TINY_SHAPES.num_train}
    (rows,), done = begin(["byol_shapes"], about, resume)
    if not done:
        rows |= {name: {} for name in ("BYOL", "random weights", "pixels", "supervised")}
        note(rows, "pixels", score(nn.Flatten(), data, 16))
    for seed in range(done, num_seeds):
        method = make(seed)
        fresh = copy.deepcopy(method.backbone)
        print(train(method, batches(data, (VIEW, VIEW), BATCH, steps, seed)), flush=True)
        note(rows, "BYOL", score(method.backbone, data, 16))
        note(rows, "random weights", score(fresh, data, 16))
        note(
            rows, "supervised", score(train_supervised(fresh, data, VIEW, steps, BATCH, seed, LR_SUPERVISED), data, 16)
        )
        results.save("byol_shapes", rows, seeds=list(range(seed + 1)), settings=about)


def group(num_seeds: int, resume: bool) -> None:
    """`byol_group` and `byol_group_factors`: as `shapes`, with group norm in the backbone; its checkpoint of seed 0."""
    data, names = Data(shapes=TINY_SHAPES), ["byol_group", "byol_group_factors"]
    about = {"steps": STEPS["shapes"], "batch": BATCH, "momentum": MOMENTUM, "images": TINY_SHAPES.num_train}
    (rows, known), done = begin(names, about, resume)

    if not done:
        note_factors(known, "pixels", nn.Flatten(), data, 16)
    for seed in range(done, num_seeds):
        method = make(seed, **GROUP_BACKBONE)
        fresh = copy.deepcopy(method.backbone)
        print(train(method, batches(data, (VIEW, VIEW), BATCH, STEPS["shapes"], seed)), flush=True)
        note(rows, "BYOL, group norm in the backbone", score(method.backbone, data, 16))
        note(rows, "random weights, group norm", score(fresh, data, 16))
        note_factors(known, "h", method.backbone, data, 16)
        note_factors(known, "z", nn.Sequential(method.backbone, method.projector), data, 16)
        note_factors(known, "random weights", fresh, data, 16)
        if seed == 0:  # load_backbone needs convnet(WIDTH, "group")
            path = results.book() / "checkpoints" / "byol_group.safetensors"
            command = "python book/chapters/byol/experiments.py group"
            export_backbone(path, method.backbone, {"method": "BYOL", "command": command, "seed": 0, "settings": about})
        for name, table in zip(names, (rows, known)):
            results.save(name, table, seeds=list(range(seed + 1)), settings=about)


class Watch:
    """Keeps the spectrum of a method with a linear predictor at some steps."""

    def __init__(self, at: list[int], views: list[Tensor]) -> None:
        self.at, self.views, self.found = at, views, {}

    def __call__(self, step: int, method: BYOL) -> None:
        if step in self.at:
            found = spectrum(method, self.views)
            self.found[str(step)] = {name: [round(v, 6) for v in values] for name, values in found.items()}


def spectrum(method: BYOL, views: list[Tensor]) -> dict[str, list[float]]:
    """Eigenvalues of the correlation of z, and what the linear predictor does to each eigenvector.

    `predictor` is the component of W u_j along eigenvector u_j, `alignment` its cosine with u_j.
    """
    method.eval()
    with torch.no_grad():
        z = torch.cat([method.projector(method.backbone(x)) for x in views]).double()
    method.train()
    weight = method.predictor.weight.detach().double()  # pyrefly: ignore
    values, vectors = torch.linalg.eigh(z.T @ z / len(z))
    values, vectors = values.flip(0).clamp(min=0), vectors.flip(1)
    images_of = weight @ vectors  # column j: what becomes of eigenvector j
    along = (vectors * images_of).sum(0)
    return {
        "eigenvalues": values.tolist(),
        "predictor": along.tolist(),
        "alignment": (along / images_of.norm(dim=0)).tolist(),
        "asymmetry": [((weight - weight.T).norm() / (weight + weight.T).norm()).item()],
    }


def sabotage(num_seeds: int, resume: bool) -> None:
    """`byol_sabotage`: one part removed or replaced at a time, on the same batches; `byol_eigenspace` of the linear one."""
    data, steps, names = Data(shapes=TINY_SHAPES), STEPS["sabotage"], ["byol_sabotage", "byol_eigenspace"]
    at = [round(steps * share) for share in (0, 0.02, 0.04, 0.08, 0.12, 0.2, 0.3, 0.4, 0.6, 0.8, 1)]
    about = {"steps": steps, "batch": BATCH, "momentum": MOMENTUM, "images": TINY_SHAPES.num_train, "at": at}
    (table, followed), done = begin(names, about, resume)
    for seed in range(done, num_seeds):
        run = batches(data, (VIEW, VIEW), BATCH, steps, seed)
        some = [torch.cat([batch.views[i] for batch in run[-16:]]) for i in (0, 1)]
        for name, options in VARIANTS.items():
            method = make(seed, **{key: value for key, value in options.items() if key != "faster"})
            if name == NONE:
                note(table, "random weights", held_out(method.backbone, data, 16))
            watch = Watch(at if name == "linear predictor" else [], some)
            log = train(method, run, faster=options.get("faster", 1.0), watch=watch)
            note(table, name, {**log, **held_out(method.backbone, data, 16)})
            if watch.found:
                followed[str(seed)] = watch.found
        for name, values in zip(names, (table, followed)):
            results.save(name, values, seeds=list(range(seed + 1)), settings=about)


def norm(num_seeds: int, resume: bool) -> None:
    """`byol_norm`: two ways to do with group norm, on the batches of `sabotage`."""
    data, steps = Data(shapes=TINY_SHAPES), STEPS["sabotage"]
    about = {"steps": steps, "batch": BATCH, "momentum": MOMENTUM, "images": TINY_SHAPES.num_train}
    (table,), done = begin(["byol_norm"], about, resume)
    for seed in range(done, num_seeds):
        run = batches(data, (VIEW, VIEW), BATCH, steps, seed)
        for name, options in NORMS.items():
            method = make(seed, **options)
            log = train(method, run)
            note(table, name, {**log, **held_out(method.backbone, data, 16)})
        results.save("byol_norm", table, seeds=list(range(seed + 1)), settings=about)


def photographs(num_seeds: int, resume: bool) -> None:
    """`byol_photographs`: CIFAR-10, the method beside its controls on test images; the checkpoint is of seed 0."""
    data = cifar10(*PHOTOGRAPHS)
    steps = STEPS["photographs"]
    about = {"steps": steps, "batch": BATCH, "momentum": MOMENTUM, "images": PHOTOGRAPHS[0]}
    about |= {"test images": PHOTOGRAPHS[1], "data": data.name}
    (rows,), done = begin(["byol_photographs"], about, resume)
    if not done:
        names = ("BYOL", "BYOL, group norm in the backbone", "random weights", "pixels", "supervised")
        rows |= {name: {} for name in names}
        note(rows, "pixels", score(nn.Flatten(), data, 32))
    for seed in range(done, num_seeds):
        run = batches(data, (PHOTOGRAPH, PHOTOGRAPH), BATCH, steps, seed)
        for row, options in (("BYOL", {}), ("BYOL, group norm in the backbone", GROUP_BACKBONE)):
            method = make(seed, view=PHOTOGRAPH, **options)
            fresh = copy.deepcopy(method.backbone)
            if not options:
                note(rows, "random weights", score(fresh, data, 32))
                train_supervised(fresh, data, PHOTOGRAPH, steps, BATCH, seed, LR_SUPERVISED)
                note(rows, "supervised", score(fresh, data, 32))
            print(train(method, run), flush=True)
            note(rows, row, score(method.backbone, data, 32))
        if seed == 0:  # of the second row: load_backbone needs convnet(WIDTH, "group")
            path = results.book() / "checkpoints" / "byol_cifar10.safetensors"
            command = "python book/chapters/byol/experiments.py photographs"
            facts = {"method": row, "command": command, "seed": 0, "settings": about}
            export_backbone(path, method.backbone, facts)
        results.save("byol_photographs", rows, seeds=list(range(seed + 1)), settings=about)


if __name__ == "__main__":
    main(__doc__, settings, shapes, group, sabotage, norm, photographs)
