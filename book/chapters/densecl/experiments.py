"""What the chapter on DenseCL, InterCLR and PIRL quotes: the choice of settings, runs over several seeds, ablations.

    python book/chapters/densecl/experiments.py settings       learning rates, on images of another seed
    python book/chapters/densecl/experiments.py scenes         DenseCL and MoCo on images with two shapes: probes on
                                                               maps, correspondences over the steps; parts replaced
    python book/chapters/densecl/experiments.py positives      InterCLR that goes on from one SimCLR, with other pairs
    python book/chapters/densecl/experiments.py puzzles        PIRL and jigsaw: what is read from shuffled patches
    python book/chapters/densecl/experiments.py shapes         all three methods and their controls on Shapes
    python book/chapters/densecl/experiments.py photographs    the same on CIFAR-10, from SSLBOOK_DATA or downloaded

Three seeds each, but one of `settings`. Each takes minutes on one CPU core; with --resume it goes on after the seeds that
its files hold. They write `densecl_settings`; `densecl_scenes` and `densecl_matches`; `densecl_positives`;
`densecl_puzzles`; `densecl_shapes`; `densecl_photographs`, with the checkpoint `densecl_cifar10`.
"""

import copy
from collections.abc import Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F
from sklearn.linear_model import Ridge
from sklearn.metrics import average_precision_score
from torch import Tensor, nn

from sslbook import default_device, results
from sslbook.book.chapters.densecl.puzzles import read_puzzles
from sslbook.book.chapters.densecl.scenes import SIZE, Scene, Scenes, cell_centers, cell_shapes, truth
from sslbook.book.chapters.densecl.variants import Matched, OwnSum, Pairs, same_place
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
    score,
    train,
    train_supervised,
)
from sslbook.data.loader import Batch, Data
from sslbook.data.views import View
from sslbook.evaluation import linear
from sslbook.methods.base import Method
from sslbook.methods.densecl import local_features
from sslbook.methods.jigsaw import Jigsaw
from sslbook.methods.moco import MoCo
from sslbook.methods.pirl import PIRL
from sslbook.methods.simclr import SimCLR
from sslbook.nn import MLP, ConvNet
from sslbook.schedules import Clock
from sslbook.weights.backbone import export_backbone

FEW_SHAPES = replace(TINY_SHAPES, num_train=1000, seed=2)  # seen often enough for a memory bank
SCENE = replace(VIEW, size=24, crop=(0.4, 1.0))
WIDTH, DIM, CELL, PATCH = 16, 64, 8, 7
MOCO = {"projector_dim": DIM, "momentum": 0.99, "queue_size": 1024, "batch_norm_groups": 1}
INTER = {"num_clusters": 50, "num_negatives": 256, "pool_size": 400, "min_cluster": 10, "centroids_every": 1}
NCE = {"projector_dim": DIM, "temperature": 0.2, "num_negatives": 256, "momentum": 0.5}
BATCH, SCENE_BATCH = 128, 64
LR = {"MoCo": 1e-2, "DenseCL": 1e-2, "InterCLR": 1e-2, "PIRL": 1e-3, "jigsaw": 5e-3, "supervised": 5e-3}
STEPS = {"settings": 100, "scenes": 100, "warm": 120, "positives": 60, "puzzles": 300, "shapes": 150, "photographs": 80}
PHOTOGRAPHS = (3000, 1000)
EVERY = 20  # steps between two looks at the correspondences
METHODS = ("DenseCL", "InterCLR", "PIRL", "MoCo", "jigsaw")

MATCHES: dict[str, dict] = {
    "DenseCL": {},
    "MoCo (lambda 0)": {"dense_weight": 0.0},
    "lambda 1": {"dense_weight": 1.0},
    "negatives: cells": {"negatives": "cell"},
    "cells, matched by projections": {"negatives": "cell", "match": "projections"},
    "cells, matched at random": {"negatives": "cell", "match": "random"},
    "cells, same position": {"negatives": "cell", "match": "identity"},
    "cells, true locations": {"negatives": "cell", "match": "truth"},
}
POSITIVES: dict[str, dict] = {
    "InterCLR": {},
    "intra only (MoCo)": {"inter_weight": 0.0, "intra_weight": 1.0},
    "inter only": {"inter_weight": 1.0, "intra_weight": 0.0},
    "margin 0": {"margin": 0.0},
    "random positives": {"positives": "random"},
    "right class (oracle)": {"positives": "class"},
    "uniform negatives": {"negatives": "uniform"},
}
PUZZLES: dict[str, dict] = {
    "PIRL": {},
    "puzzle alone (lambda 1)": {"puzzle_weight": 1.0},
    "image alone (lambda 0)": {"puzzle_weight": 0.0},
    "memory never updated": {"momentum": 1.0},
    "constant Z": {"kind": PIRL},
}


def make(name: str, seed: int, view: View = VIEW, size: int = 24, **options) -> Method:
    """One of `METHODS` with its settings; PIRL and jigsaw cut 9 patches from views of `size` pixels."""
    torch.manual_seed(seed)
    backbone, puzzle = ConvNet(WIDTH), replace(view, size=size, crop=(0.6, 1.0))
    if name == "DenseCL":
        method = Matched(backbone, view, **MOCO | options)
    elif name == "InterCLR":
        method = Pairs(backbone, view, view.size, **MOCO | INTER | options)
    elif name == "PIRL":
        kind = options.pop("kind", OwnSum)
        method = kind(backbone, view, puzzle, size // 3, size // 3 - 1, **NCE | options)
    elif name == "jigsaw":
        method = Jigsaw(backbone, puzzle, size // 3, size // 3 - 1, 100, DIM)
    else:
        method = MoCo(backbone, view, **MOCO | options)
    return method.to(default_device())


def fit(method: Method, data: Data, steps: int, batch_size: int, lr: float, seed: int) -> dict[str, float]:
    """Train with the events of an epoch, by AdamW and one cycle of the learning rate; the mean of the last steps' log."""
    device, per_epoch = default_device(), data.steps_per_epoch(batch_size)
    optimizer = torch.optim.AdamW([p for p in method.parameters() if p.requires_grad], lr, weight_decay=0.01)
    rate = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps, pct_start=0.1)
    method.setup(data)
    method.train()
    log: list[dict[str, float]] = []
    while len(log) < steps:
        clock = Clock(len(log), steps, per_epoch, seed)
        method.before_epoch(data, clock)
        for batch in data.batches(method.views(), batch_size, seed=seed, epoch=clock.epoch, device=device):
            if len(log) == steps:
                break
            out = method(batch, Clock(len(log), steps, per_epoch, seed))
            optimizer.zero_grad()
            out["loss"].backward()
            optimizer.step()
            rate.step()
            log.append({name: value.item() for name, value in out.items()})
            method.after_step(Clock(len(log), steps, per_epoch, seed))
    last = log[-20:]
    return {name: sum(line[name] for line in last) / len(last) for name in log[0]}


# -- maps of scenes ----------------------------------------------------------------------------------------------------


class Cells(nn.Module):
    """The pixels of each cell as its features: the control of a probe on maps."""

    def forward_map(self, x: Tensor) -> Tensor:
        return F.pixel_unshuffle(x, 4)


@torch.no_grad()
def maps(network: nn.Module, scene: Scene) -> Tensor:
    """Features of all cells of whole images, (n, s, dim), with stored batch statistics."""
    view, device = View.center(SIZE), default_device()
    data = Data.from_images(scene.images, scene.shapes[:, 0])
    network = network.to(device).eval()
    found = [local_features(network, b.views[0]) for b in data.evaluation_batches("train", view, device=device)]
    network.train()
    return torch.cat(found).cpu()


def ridge_precision(x: Tensor, y: Tensor, test_x: Tensor, test_y: Tensor) -> float:
    """Average precision (%) of a ridge regression on 0 and 1; the mean over the columns of y."""
    mean, std = x.mean(0), x.std(0) + 1e-6
    found = Ridge(1.0).fit(((x - mean) / std).numpy(), y.float().numpy()).predict(((test_x - mean) / std).numpy())
    return 100 * float(average_precision_score(test_y.numpy(), found, average="macro"))


def score_maps(network: nn.Module, scenes: Scenes) -> dict[str, float]:
    """Probes on maps of test images: the shape at a cell that shows one, whether a shape's middle is in the cell, and,
    from the pooled map, which shapes the image shows."""
    x, test_x = maps(network, scenes.train), maps(network, scenes.test)
    y, test_y = cell_shapes(scenes.train), cell_shapes(scenes.test)
    few = torch.arange(len(x)) < 500  # a map has 64 cells
    on, test_on = (y > 0) & few[:, None], test_y > 0
    shape = linear.probe(x[on], y[on] - 1, test_x[test_on], test_y[test_on] - 1, penalties=(1e-2,)).accuracy
    middles = [cell_centers(s).flatten() for s in (scenes.train, scenes.test)]
    middle = ridge_precision(
        x[few].flatten(0, 1), middles[0][: few.sum() * x.shape[1]], test_x.flatten(0, 1), middles[1]
    )
    shown = [F.one_hot(s.shapes, 10).amax(1) for s in (scenes.train, scenes.test)]
    pooled = ridge_precision(x.mean(1), shown[0], test_x.mean(1), shown[1])
    return {"shape of a cell": shape, "middles": middle, "shapes, pooled": pooled}


class Watch:
    """Called before every step: sets the true pairs of a batch, and notes every `EVERY` steps how many matches are right.

    The matches are those of images 0 to 127 in views that no step shows.
    """

    def __init__(self, data: Data, scene: Scene, run: Sequence[Batch], per_epoch: int, seed: int) -> None:
        self.run, self.per_epoch, self.seed, self.side = run, per_epoch, seed, SCENE.size // 4
        order = torch.arange(128)
        shown = data.batches((SCENE, SCENE), 128, seed=99, epoch=0, stop=1, order=torch.arange(data.num_train))
        self.fixed = next(iter(shown))
        self.where = truth(SCENE, order, self.side, SIZE, seed=99)
        at = self.where.place.long().clamp(0, SIZE - 1)
        self.on = scene.masks[order[:, None], at[:, :, 0], at[:, :, 1]] > 0
        self.curves: dict[str, list[float]] = {"features": [], "projections": []}

    def __call__(self, step: int, method: Method) -> None:
        if isinstance(method, Matched) and method.match == "truth" and step < len(self.run):
            index = self.run[step].index
            found = truth(SCENE, index, self.side, SIZE, self.seed, step // self.per_epoch)
            method.pairs = found.nearest.to(index.device)
        if step % EVERY == 0:
            for name, values in self.curves.items():
                values.append(round(self.right(method, name == "projections"), 3))

    def right(self, method: nn.Module, project: bool) -> float:
        views = tuple(view.to(default_device()) for view in self.fixed.views)
        return same_place(method, views, self.where, self.on, project=project)

    def baselines(self) -> dict[str, float]:
        """What a random cell and the cell of the same position would give."""
        near, on = self.where.near, self.where.seen & self.on
        same = near.diagonal(dim1=1, dim2=2)
        return {
            "random": 100 * near.float().mean(2)[on].mean().item(),
            "same position": 100 * same[on].float().mean().item(),
        }


def supervised_scenes(backbone: nn.Module, run: Sequence[Batch], shapes: Tensor, lr: float) -> nn.Module:
    """Which of the ten shapes are in the image, from the pooled map; trained in place."""

    class Classifier(Method):
        def __init__(self) -> None:
            super().__init__()
            self.backbone, self.head = backbone, nn.Linear(backbone.dim, 10)

        def forward(self, batch: Batch, clock: Clock) -> dict[str, Tensor]:
            y = F.one_hot(shapes[batch.index.cpu()], 10).amax(1).float().to(batch.index.device)
            return {"loss": F.binary_cross_entropy_with_logits(self.head(self.backbone(batch.views[0])), y)}

    train(Classifier().to(default_device()), run, lr)
    return backbone


def first_purity(method: Pairs, data: Data) -> float:
    """Percent of the pairs within a first cluster that have one class, an image with itself left out."""
    method.setup(data)
    method.before_epoch(data, Clock())
    clusters, classes = method.clusters.assignment.cpu(), data.labels("train")
    counts = (clusters * 10 + classes).bincount(minlength=10 * method.clusters.num_clusters).view(-1, 10).double()
    size = counts.sum(1)
    same = (counts * (counts - 1)).sum(1) / (size - 1).clamp(min=1)
    return 100 * (same.sum() / size.sum()).item()


# -- commands ----------------------------------------------------------------------------------------------------------


def settings(num_seeds: int, resume: bool) -> None:
    """`densecl_settings`: learning rates, on the images of another seed of Shapes."""
    table: Table = {}
    many, few = Data(shapes=OTHER_SHAPES), Data(shapes=replace(FEW_SHAPES, seed=1))
    runs = [("MoCo", many, STEPS["settings"], BATCH, lr) for lr in (5e-3, 1e-2)]
    runs += [("DenseCL", *rest) for _, *rest in runs]
    runs += [("PIRL", few, STEPS["puzzles"], SCENE_BATCH, lr) for lr in (1e-3, 2e-3, 5e-3)]
    for name, data, steps, batch, lr in runs:
        method = make(name, 100)
        fit(method, data, steps, batch, lr, 100)
        note(table, f"{name}, learning rate {lr:g}", score(method.backbone, data, 16))
    about = {
        "steps": STEPS["settings"],
        "batch": BATCH,
        "steps of PIRL": STEPS["puzzles"],
        "batch of PIRL": SCENE_BATCH,
    }
    about |= {"images of PIRL": few.num_train, "shapes seed": 1}
    results.save("densecl_settings", table, seeds=[100], settings=about)


def scenes(num_seeds: int, resume: bool) -> None:
    """`densecl_scenes`: probes on maps of test images; `densecl_matches`: right correspondences over the steps."""
    found, names, steps = Scenes(), ["densecl_scenes", "densecl_matches"], STEPS["scenes"]
    data = found.data()
    about = {"steps": steps, "batch": SCENE_BATCH, "queue": 512, "images": found.num_train, "every": EVERY}
    (rows, curves), done = begin(names, about, resume)
    if not done:
        rows |= {name: {} for name in (*MATCHES, "random weights", "pixels", "supervised")}
        note(rows, "pixels", score_maps(Cells(), found))
    for seed in range(done, num_seeds):
        run = batches(data, (SCENE, SCENE), SCENE_BATCH, steps, seed)
        for name, options in MATCHES.items():
            method = make("DenseCL", seed, SCENE, queue_size=512, **options)
            watch = Watch(data, found.train, run, data.steps_per_epoch(SCENE_BATCH), seed)
            if name == "DenseCL":
                fresh = copy.deepcopy(method.backbone)
                note(rows, "random weights", {**score_maps(fresh, found), "right matches": watch.right(method, False)})
                curves["baselines"] = {key: [round(value, 3)] for key, value in watch.baselines().items()}
            log = train(method, run, LR["DenseCL"], watch=watch)
            kept = {key.replace("_", " "): log[key] for key in ("dense_loss", "dense_accuracy")}
            right = {"right matches": watch.curves["features"][-1]}
            note(rows, name, {**score_maps(method.backbone, found), **right, **kept})
            curves[f"{name}, {seed}"] = watch.curves
        supervised_scenes(fresh, run, found.train.shapes, LR["supervised"])
        method.backbone = fresh
        note(rows, "supervised", {**score_maps(fresh, found), "right matches": watch.right(method, False)})
        for name, table in zip(names, (rows, curves)):
            results.save(name, table, seeds=list(range(seed + 1)), settings=about)


def positives(num_seeds: int, resume: bool) -> None:
    """`densecl_positives`: every variant goes on from the same SimCLR; measured on held-out training images."""
    data = Data(shapes=TINY_SHAPES)
    about = {"steps": STEPS["positives"], "steps of SimCLR before": STEPS["warm"], "batch": BATCH, **INTER}
    (rows,), done = begin(["densecl_positives"], about, resume)
    for seed in range(done, num_seeds):
        torch.manual_seed(seed)  # SimCLR with MoCo's head: clusters of untrained features would mean nothing
        head = MLP(4 * WIDTH, 4 * WIDTH, DIM, num_layers=2, batch_norm=False)
        warm = SimCLR(ConvNet(WIDTH), VIEW, 0.2, projector=head).to(default_device())
        train(warm, batches(data, (VIEW, VIEW), 2 * BATCH, STEPS["warm"], seed), LR["MoCo"])
        note(rows, "before", held_out(warm.backbone, data, 16))
        for name, options in POSITIVES.items():
            method = make("InterCLR", seed, **options)
            for part in (method.backbone, method.key_backbone.module):
                part.load_state_dict(warm.backbone.state_dict(), strict=False)
            for part in (method.projector, method.key_projector.module):
                part.load_state_dict(warm.projector.state_dict())
            first = first_purity(method, data)
            if name == "InterCLR":
                rows["before"].setdefault("purity", []).append(round(first, 4))
            log = fit(method, data, STEPS["positives"], BATCH, LR["InterCLR"] / 2, seed + 50)
            kept = {key: log[key] for key in ("purity", "own image", "false negatives", "reassigned")}
            note(rows, name, {**kept, **held_out(method.backbone, data, 16)})
        results.save("densecl_positives", rows, seeds=list(range(seed + 1)), settings=about)


def puzzles(num_seeds: int, resume: bool) -> None:
    """`densecl_puzzles`: PIRL, its variants and jigsaw on a small set of its own; what is read from patches, and probes."""
    data, steps, batch = Data(shapes=FEW_SHAPES), STEPS["puzzles"], SCENE_BATCH
    about = {"steps": steps, "batch": batch, "images": FEW_SHAPES.num_train}
    (rows,), done = begin(["densecl_puzzles"], about, resume)
    for seed in range(done, num_seeds):
        for name, options in [("jigsaw", {}), *PUZZLES.items()]:
            method = make("jigsaw" if name == "jigsaw" else "PIRL", seed, **options)
            if name == "PIRL":
                method.setup(data)
                note(rows, "random weights", {**read_puzzles(method, data), **score(method.backbone, data, 16)})
            fit(method, data, steps, batch, LR["jigsaw" if name == "jigsaw" else "PIRL"], seed)
            note(rows, name, {**read_puzzles(method, data), **score(method.backbone, data, 16)})
        results.save("densecl_puzzles", rows, seeds=list(range(seed + 1)), settings=about)


def compare(name: str, data: Data, view: View, size: int, batch: int, steps: int, more: dict, n: int, resume: bool):
    """The three methods, MoCo, jigsaw and the controls: `densecl_shapes` or `densecl_photographs`."""
    about = {"steps": steps, "batch": batch, "images": data.num_train, "test images": data.num_test, **more}
    rows: Table
    (rows,), done = begin([name], about, resume)
    if not done:
        rows |= {row: {} for row in (*METHODS, "random weights", "pixels", "supervised")}
        note(rows, "pixels", score(nn.Flatten(), data, view.size))
    for seed in range(done, n):
        for row in METHODS:
            method = make(row, seed, view, size)
            fresh = copy.deepcopy(method.backbone)
            fit(method, data, steps, batch, LR[row], seed)
            note(rows, row, score(method.backbone, data, view.size))
            if row == "DenseCL":
                note(rows, "random weights", score(fresh, data, view.size))
                if name == "densecl_photographs" and seed == 0:
                    path = results.book() / "checkpoints" / "densecl_cifar10.safetensors"
                    command = "python book/chapters/densecl/experiments.py photographs"
                    facts = {"method": row, "command": command, "seed": 0, "settings": about}
                    export_backbone(path, method.backbone, facts)
        fresh = make("MoCo", seed, view).backbone
        train_supervised(fresh, data, view, steps, batch, seed, LR["supervised"])
        note(rows, "supervised", score(fresh, data, view.size))
        results.save(name, rows, seeds=list(range(seed + 1)), settings=about)


def shapes(num_seeds: int, resume: bool) -> None:
    """`densecl_shapes`: on test images."""
    compare("densecl_shapes", Data(shapes=TINY_SHAPES), VIEW, 24, BATCH, STEPS["shapes"], {}, num_seeds, resume)


def photographs(num_seeds: int, resume: bool) -> None:
    """`densecl_photographs`: CIFAR-10, on test images; the checkpoint is of seed 0."""
    data = cifar10(*PHOTOGRAPHS)
    more = {"data": data.name}
    compare("densecl_photographs", data, PHOTOGRAPH, 36, 64, STEPS["photographs"], more, num_seeds, resume)


if __name__ == "__main__":
    main(__doc__, settings, scenes, positives, puzzles, shapes, photographs)
