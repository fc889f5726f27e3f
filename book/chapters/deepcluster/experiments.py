"""What the chapter on DeepCluster quotes: the choice of its settings, its longer runs over several seeds, its ablations.

    python book/chapters/deepcluster/experiments.py settings      learning rates, numbers of clusters and how often to
                                                                  cluster, on images of another seed of Shapes
    python book/chapters/deepcluster/experiments.py shapes        DeepCluster, v2, SimCLR and the controls, the factors,
                                                                  and the clusters of every epoch; three seeds
    python book/chapters/deepcluster/experiments.py sabotage      one part removed or replaced at a time; three seeds
    python book/chapters/deepcluster/experiments.py photographs   CIFAR-10, from SSLBOOK_DATA or downloaded

Each takes minutes on one CPU core; with --resume it goes on after the seeds that its files hold. They write
`deepcluster_settings`; `deepcluster_shapes` and `deepcluster_factors` (on test images) and `deepcluster_clusters`;
`deepcluster_sabotage` (on held-out training images) and `deepcluster_partitions`; `deepcluster_photographs`, with the
checkpoint `deepcluster_cifar10`.
"""

import copy

import torch
from torch import nn

from sslbook import default_device, results
from sslbook.book.chapters.deepcluster.variants import Watched, train, unit, whitened
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
from sslbook.data.loader import Data
from sslbook.data.views import View
from sslbook.methods.base import Method
from sslbook.methods.deepcluster_v2 import DeepClusterV2
from sslbook.methods.simclr import SimCLR
from sslbook.nn import MLP, ConvNet, Sobel
from sslbook.weights.backbone import export_backbone

WIDTH, HIDDEN, DIM, TEMPERATURE = 16, 256, 64, 0.2
CLUSTERS, PCA, EVERY, BATCH, HEAD_RATE = 100, 32, 2, 64, 4.0
PROTOTYPES, BATCH_V2 = 100, 64
LR, LR_V2, LR_SIMCLR, LR_SUPERVISED = 5e-3, 5e-3, 1e-2, 5e-3  # by `settings`, and of SimCLR's chapter
EPOCHS = {"settings": 12, "shapes": 24, "sabotage": 12, "photographs": 12}
PHOTOGRAPHS = (4000, 1000)

NONE = "as it should be"
VARIANTS: dict[str, dict] = {
    NONE: {},
    "classifier kept": {"head": "keep"},
    "classifier matched": {"head": "matched"},
    "no Sobel filter": {"sobel": False},
    "images not sampled uniformly": {"uniform": False},
    "empty clusters stay empty": {"fill": False},
    "own predictions as labels": {"labels": "own", "head": "keep", "uniform": False},
    "own predictions, sampled uniformly": {"labels": "own", "head": "keep"},
    "random labels": {"labels": "random"},
    "no PCA, no whitening": {"prepare": unit},
    "whitened, not normalized": {"prepare": whitened(PCA)},
    "10 clusters": {"num_clusters": 10},
    "400 clusters": {"num_clusters": 400},
    "clustered every epoch": {"recluster_every": 1},
    "clustered every 4th epoch": {"recluster_every": 4},
    "clustered once": {"recluster_every": 1000},
}


def make(seed: int, *, view: View = VIEW, sobel: bool = True, **options) -> Watched:
    torch.manual_seed(seed)
    chosen = {"num_clusters": CLUSTERS, "pca_dim": PCA, "recluster_every": EVERY} | options
    return Watched(ConvNet(WIDTH), view, view.size, sobel, **chosen).to(default_device())


def encoder(sobel: bool) -> nn.Module:
    return Sobel(ConvNet(WIDTH)) if sobel else ConvNet(WIDTH)


def make_v2(seed: int, view: View = VIEW, sobel: bool = False) -> DeepClusterV2:
    torch.manual_seed(seed)
    sizes = {"hidden_dim": HIDDEN, "projector_dim": DIM, "num_prototypes": PROTOTYPES, "num_heads": 2}
    return DeepClusterV2(encoder(sobel), view, num_small=0, **sizes).to(default_device())


def simclr(seed: int, view: View = VIEW, sobel: bool = False) -> SimCLR:
    """SimCLR with the same backbone and v2's width of the projector."""
    torch.manual_seed(seed)
    projector = MLP(4 * WIDTH, HIDDEN, DIM, num_layers=3, last_batch_norm="affine")
    return SimCLR(encoder(sobel), view, TEMPERATURE, projector=projector).to(default_device())


def fit(method: Watched, data: Data, epochs: int, seed: int, lr: float = LR) -> dict[str, float]:
    """Train DeepCluster with the chapter's settings."""
    found = train(method, data, epochs, BATCH, lr, seed, head_rate=HEAD_RATE)
    return found | {name: values[-1] for name, values in method.partitions.curves().items()}


# -- commands ----------------------------------------------------------------------------------------------------------


def settings(num_seeds: int, resume: bool) -> None:
    """`deepcluster_settings`: on the images of another seed of Shapes."""
    epochs, data, table = EPOCHS["settings"], Data(shapes=OTHER_SHAPES), {}
    tried: list[tuple[str, dict, float]] = [(f"learning rate {lr:g}", {}, lr) for lr in (2e-3, 5e-3, 1e-2)]
    tried += [(f"{k} clusters", {"num_clusters": k}, LR) for k in (30, 300)]
    tried += [(f"clustered every {n} epochs", {"recluster_every": n}, LR) for n in (1, 4)]
    for name, options, lr in tried:
        method = make(100, **options)
        fit(method, data, epochs, 100, lr)
        note(table, name, score(method.backbone, data, 16))
    for lr in (2e-3, 5e-3, 1e-2):
        method = make_v2(100)
        train(method, data, epochs // 2, BATCH_V2, lr, 100)
        note(table, f"v2, no filter, learning rate {lr:g}", score(method.backbone, data, 16))
    about = {"epochs": epochs, "epochs of v2": epochs // 2, "clusters": CLUSTERS, "clustered every": EVERY}
    results.save("deepcluster_settings", table, seeds=[100], settings=about | {"shapes seed": 1})


def shapes(num_seeds: int, resume: bool) -> None:
    """`deepcluster_shapes`, `deepcluster_factors` and `deepcluster_clusters`: the methods beside their controls, all
    with the same number of views."""
    data, epochs = Data(shapes=TINY_SHAPES), EPOCHS["shapes"]
    names = ["deepcluster_shapes", "deepcluster_factors", "deepcluster_clusters"]
    steps = epochs * TINY_SHAPES.num_train // 512
    about = {"epochs": epochs, "epochs of v2": epochs // 2, "steps of SimCLR": steps, "clusters": CLUSTERS}
    about |= {"clustered every": EVERY, "images": TINY_SHAPES.num_train}
    (rows, known, curves), done = begin(names, about, resume)
    if not done:
        order = ("DeepCluster", "DeepCluster v2", "SimCLR", "random weights", "pixels", "supervised")
        rows |= {name: {} for name in (*order, "random weights, Sobel")}
        note(rows, "pixels", score(nn.Flatten(), data, 16))
        note_factors(known, "pixels", nn.Flatten(), data, 16)
    for seed in range(done, num_seeds):
        method = make(seed)
        fresh = copy.deepcopy(method.backbone.backbone)  # behind the filter
        note(rows, "random weights", score(fresh, data, 16))
        note_factors(known, "random weights", fresh, data, 16)
        note(rows, "random weights, Sobel", score(Sobel(copy.deepcopy(fresh)).to(default_device()), data, 16))
        print(fit(method, data, epochs, seed), flush=True)
        curves[f"DeepCluster, {seed}"] = method.partitions.curves()
        plain = make(seed, sobel=False)
        print(fit(plain, data, epochs, seed), flush=True)
        curves[f"DeepCluster, color, {seed}"] = plain.partitions.curves()
        trained: dict[str, Method] = {"DeepCluster": method, "DeepCluster, color": plain}
        run = batches(data, (VIEW, VIEW), 256, steps, seed)
        for end, sobel in (("", False), (", Sobel", True)):
            second, other = make_v2(seed, sobel=sobel), simclr(seed, sobel=sobel)
            train(second, data, epochs // 2, BATCH_V2, LR_V2, seed)
            train_steps(other, run, LR_SIMCLR)
            trained |= {f"DeepCluster v2{end}": second, f"SimCLR{end}": other}
        for name, one in trained.items():
            note(rows, name, score(one.backbone, data, 16))
            note_factors(known, name, one.backbone, data, 16)
        train_supervised(fresh, data, VIEW, 2 * steps, 256, seed, LR_SUPERVISED)
        note(rows, "supervised", score(fresh, data, 16))
        for name, table in zip(names, (rows, known, curves)):
            results.save(name, table, seeds=list(range(seed + 1)), settings=about)


def sabotage(num_seeds: int, resume: bool) -> None:
    """`deepcluster_sabotage`: one part removed or replaced; `deepcluster_partitions`: the clusters of every epoch."""
    names = ["deepcluster_sabotage", "deepcluster_partitions"]
    data, epochs = Data(shapes=TINY_SHAPES), EPOCHS["sabotage"]
    about = {"epochs": epochs, "clusters": CLUSTERS, "clustered every": EVERY, "images": TINY_SHAPES.num_train}
    (table, curves), done = begin(names, about, resume)
    for seed in range(done, num_seeds):
        for name, options in VARIANTS.items():
            method = make(seed, **options)
            if name == NONE:
                note(table, "random weights", held_out(method.backbone, data, 16))
            log = fit(method, data, epochs, seed)
            note(table, name, {**log, **held_out(method.backbone, data, 16)})
            curves[f"{name}, {seed}"] = method.partitions.curves()
        for name, values in zip(names, (table, curves)):
            results.save(name, values, seeds=list(range(seed + 1)), settings=about)


def photographs(num_seeds: int, resume: bool) -> None:
    """`deepcluster_photographs`: CIFAR-10, the methods beside their controls; the checkpoint is of seed 0."""
    data, epochs = cifar10(*PHOTOGRAPHS), EPOCHS["photographs"]
    steps = epochs * PHOTOGRAPHS[0] // 512
    about = {"epochs": epochs, "epochs of v2": epochs // 2, "steps of SimCLR": steps, "images": PHOTOGRAPHS[0]}
    about |= {"test images": PHOTOGRAPHS[1], "data": data.name}
    rows: Table
    (rows,), done = begin(["deepcluster_photographs"], about, resume)
    if not done:
        order = ("DeepCluster", "DeepCluster, color", "DeepCluster v2", "SimCLR", "random weights")
        rows |= {name: {} for name in (*order, "random weights, Sobel", "pixels", "supervised")}
        note(rows, "pixels", score(nn.Flatten(), data, 32))
    for seed in range(done, num_seeds):
        method = make(seed, view=PHOTOGRAPH)
        fresh = copy.deepcopy(method.backbone.backbone)
        note(rows, "random weights", score(fresh, data, 32))
        note(rows, "random weights, Sobel", score(Sobel(copy.deepcopy(fresh)).to(default_device()), data, 32))
        found = fit(method, data, epochs, seed)
        note(rows, "DeepCluster", {**score(method.backbone, data, 32), "NMI to classes": found["NMI to classes"]})
        plain = make(seed, view=PHOTOGRAPH, sobel=False)
        found = fit(plain, data, epochs, seed)
        note(rows, "DeepCluster, color", {**score(plain.backbone, data, 32), "NMI to classes": found["NMI to classes"]})
        second, other = make_v2(seed, PHOTOGRAPH), simclr(seed, PHOTOGRAPH)
        train(second, data, epochs // 2, BATCH_V2, LR_V2, seed)
        note(rows, "DeepCluster v2", score(second.backbone, data, 32))
        train_steps(other, batches(data, (PHOTOGRAPH, PHOTOGRAPH), 256, steps, seed), LR_SIMCLR)
        note(rows, "SimCLR", score(other.backbone, data, 32))
        if seed == 0:
            path = results.book() / "checkpoints" / "deepcluster_cifar10.safetensors"
            command = "python book/chapters/deepcluster/experiments.py photographs"
            about_it = {"method": "DeepCluster", "command": command, "seed": 0, "settings": about}
            export_backbone(path, method.backbone, about_it)
        train_supervised(fresh, data, PHOTOGRAPH, 2 * steps, 256, seed, LR_SUPERVISED)
        note(rows, "supervised", score(fresh, data, 32))
        results.save("deepcluster_photographs", rows, seeds=list(range(seed + 1)), settings=about)


if __name__ == "__main__":
    main(__doc__, settings, shapes, sabotage, photographs)
