"""What the chapter on ODC quotes: the choice of its settings, its longer runs over several seeds, its ablations.

    python book/chapters/odc/experiments.py settings      learning rates, momenta and clusters, on images of another seed
                                                          of Shapes
    python book/chapters/odc/experiments.py shapes        ODC, ODC with frozen labels and DeepCluster, their accuracy on
                                                          the way, the factors, the losses; three seeds
    python book/chapters/odc/experiments.py sabotage      one part removed or replaced at a time; three seeds
    python book/chapters/odc/experiments.py photographs   CIFAR-10, from SSLBOOK_DATA or downloaded

Each takes minutes on one CPU core; with --resume it goes on after the seeds that its files hold. They write
`odc_settings`; `odc_shapes` and `odc_factors` (on test images), `odc_clock`, `odc_clusters` and `odc_losses`;
`odc_sabotage` (on held-out training images) and `odc_partitions`; `odc_photographs`, with the checkpoint `odc_cifar10`.
SimCLR, supervised learning and the untrained network with the same images, views and seeds stand in
`deepcluster_shapes` and `deepcluster_photographs`.
"""

import torch
from torch import Tensor

from sslbook import default_device, results
from sslbook.book.chapters.deepcluster import experiments as deepcluster
from sslbook.book.chapters.deepcluster.variants import Watched as DeepCluster
from sslbook.book.chapters.deepcluster.variants import train
from sslbook.book.chapters.experiments import (
    OTHER_SHAPES,
    PHOTOGRAPH,
    TINY_SHAPES,
    VIEW,
    begin,
    cifar10,
    held_out,
    main,
    note,
    note_factors,
    score,
)
from sslbook.book.chapters.odc.variants import Watched, Work
from sslbook.data.loader import Data
from sslbook.data.views import View
from sslbook.nn import ConvNet, Sobel
from sslbook.weights.backbone import export_backbone

WIDTH, HIDDEN, DIM, BATCH = 16, 256, 256, 64
CLUSTERS, MOMENTUM, MIN_CLUSTER, EVERY = 100, 0.98, 5, 10
LR, HEAD_RATE = 5e-3, 1.0  # by `settings`
EPOCHS = {"settings": 12, "shapes": 24, "sabotage": 12, "photographs": 12}
MEASURED = (4, 8, 12, 18, 24)  # epochs at which `shapes` measures
PHOTOGRAPHS = deepcluster.PHOTOGRAPHS

NONE = "as it should be"
VARIANTS: dict[str, dict] = {
    NONE: {},
    "momentum 0.5": {"momentum": 0.5},
    "momentum 0": {"momentum": 0.0},
    "centroids never updated": {"centroids_every": 10**9},
    "no care for small clusters": {"care": False},
    "all images alike": {"power": 0.0},
    "all clusters alike": {"power": 1.0},
    "random first clusters": {"start": "random"},
    "labels never move": {"moving": False},
    "classifier reset every epoch": {"reset": True},
    "nearest by distance": {"distance": True},
    "no dropout": {"dropout": False},
    "400 clusters": {"num_clusters": 400},
}


def make(seed: int, *, view: View = VIEW, sobel: bool = True, **options) -> Watched:
    torch.manual_seed(seed)
    chosen = {"hidden_dim": HIDDEN, "feature_dim": DIM, "num_clusters": CLUSTERS, "momentum": MOMENTUM}
    chosen |= {"min_cluster": MIN_CLUSTER, "centroids_every": EVERY} | options
    chosen["min_cluster"] = min(chosen["min_cluster"], 2000 // chosen["num_clusters"])
    backbone = Sobel(ConvNet(WIDTH)) if sobel else ConvNet(WIDTH)
    return Watched(backbone, view, view.size, **chosen).to(default_device())


def fit(method: Watched | DeepCluster, data: Data, epochs: int, seed: int, lr: float = LR, **more) -> dict[str, float]:
    """Train with the chapter's settings; the last epoch's log and the last clusters."""
    rate = HEAD_RATE if isinstance(method, Watched) else deepcluster.HEAD_RATE
    log = train(method, data, epochs, BATCH, lr, seed, head_rate=rate, **more)
    if isinstance(method, Watched):
        method.partitions(method.clusters.assignment, method.clusters.num_clusters)  # at the end
    return log | {name: values[-1] for name, values in method.partitions.curves().items()}


class Measured:
    """Beside a run: its work so far and its accuracy at the epochs `MEASURED`, and its losses, ten steps a number."""

    def __init__(self, method: Watched | DeepCluster, data: Data) -> None:
        self.method, self.data, self.work = method, data, Work(method.backbone)
        self.losses: list[float] = []
        self.steps = 0
        self.curves: dict[str, list[float]] = {"epoch": [], "passes": [], "forward only": [], "kNN": [], "linear": []}

    def __call__(self, out: dict[str, Tensor]) -> None:
        self.losses.append(out["loss"].item())
        self.steps += 1
        epoch, rest = divmod(self.steps, self.data.steps_per_epoch(BATCH))
        if rest or epoch not in MEASURED:
            return
        self.work.on = False
        found = score(self.method.backbone, self.data, self.method.view.size)
        self.method.train()
        self.work.on = True
        line = {"epoch": epoch, "passes": self.work.passes(), "forward only": self.work.embedded, **found}
        for name, value in line.items():
            self.curves[name].append(round(value, 4))

    def tens(self) -> list[float]:
        parts = torch.tensor(self.losses).split(10)
        return [round(part.mean().item(), 4) for part in parts]


# -- commands ----------------------------------------------------------------------------------------------------------


def settings(num_seeds: int, resume: bool) -> None:
    """`odc_settings`: on the images of another seed of Shapes."""
    epochs, data, table = EPOCHS["settings"], Data(shapes=OTHER_SHAPES), {}
    tried: list[tuple[str, dict, float]] = [(f"learning rate {lr:g}", {}, lr) for lr in (2e-3, 5e-3, 1e-2)]
    tried += [(f"momentum {m:g}", {"momentum": m}, LR) for m in (0.9, 0.99)]
    tried += [("30 clusters", {"num_clusters": 30}, LR)]
    tried += [("centroids every step", {"centroids_every": 1}, LR)]
    for name, options, lr in tried:
        method = make(100, **options)
        fit(method, data, epochs, 100, lr)
        note(table, name, score(method.backbone, data, 16))
    about = {"epochs": epochs, "clusters": CLUSTERS, "momentum": MOMENTUM, "centroids every": EVERY}
    results.save("odc_settings", table, seeds=[100], settings=about | {"shapes seed": 1})


def shapes(num_seeds: int, resume: bool) -> None:
    """`odc_shapes`, `odc_factors`, `odc_clock`, `odc_clusters`, `odc_losses`: ODC beside DeepCluster."""
    data, epochs = Data(shapes=TINY_SHAPES), EPOCHS["shapes"]
    names = ["odc_shapes", "odc_factors", "odc_clock", "odc_clusters", "odc_losses"]
    about = {"epochs": epochs, "clusters": CLUSTERS, "momentum": MOMENTUM, "centroids every": EVERY}
    about |= {"DeepCluster clusters every": deepcluster.EVERY, "images": TINY_SHAPES.num_train, "batch": BATCH}
    (rows, known, clock, clusters, losses), done = begin(names, about, resume)
    for seed in range(done, num_seeds):
        methods = {"ODC": make(seed), "labels never move": make(seed, moving=False), "DeepCluster": None}
        for name, method in methods.items():
            method = method or deepcluster.make(seed)
            beside = Measured(method, data)
            print(name, fit(method, data, epochs, seed, watch=beside), flush=True)
            note(rows, name, score(method.backbone, data, 16))
            note_factors(known, name, method.backbone, data, 16)
            clock[f"{name}, {seed}"] = beside.curves
            clusters[f"{name}, {seed}"] = method.partitions.curves()
            losses[f"{name}, {seed}"] = {"loss": beside.tens()}
        for name, table in zip(names, (rows, known, clock, clusters, losses)):
            results.save(name, table, seeds=list(range(seed + 1)), settings=about)


def sabotage(num_seeds: int, resume: bool) -> None:
    """`odc_sabotage`: one part removed or replaced; `odc_partitions`: the clusters at the end of every epoch."""
    names = ["odc_sabotage", "odc_partitions"]
    data, epochs = Data(shapes=TINY_SHAPES), EPOCHS["sabotage"]
    about = {"epochs": epochs, "clusters": CLUSTERS, "momentum": MOMENTUM, "centroids every": EVERY}
    about |= {"images": TINY_SHAPES.num_train}
    (table, curves), done = begin(names, about, resume)
    for seed in range(done, num_seeds):
        for name, options in VARIANTS.items():
            method = make(seed, **options)
            log = fit(method, data, epochs, seed)
            note(table, name, {**log, "changed": 100 - log["same number"], **held_out(method.backbone, data, 16)})
            curves[f"{name}, {seed}"] = method.partitions.curves()
        for name, values in zip(names, (table, curves)):
            results.save(name, values, seeds=list(range(seed + 1)), settings=about)


def photographs(num_seeds: int, resume: bool) -> None:
    """`odc_photographs`: CIFAR-10, with labels that move and that do not; the checkpoint is of seed 0."""
    data, epochs = cifar10(*PHOTOGRAPHS), EPOCHS["photographs"]
    about = {"epochs": epochs, "clusters": CLUSTERS, "momentum": MOMENTUM, "centroids every": EVERY}
    about |= {"images": PHOTOGRAPHS[0], "test images": PHOTOGRAPHS[1], "data": data.name}
    (rows,), done = begin(["odc_photographs"], about, resume)
    for seed in range(done, num_seeds):
        for name, moving in (("ODC", True), ("labels never move", False)):
            method = make(seed, view=PHOTOGRAPH, moving=moving)
            found = fit(method, data, epochs, seed)
            agree = {"NMI to classes": found["NMI to classes"], "changed": 100 - found["same number"]}
            note(rows, name, {**score(method.backbone, data, 32), **agree})
            if seed == 0 and moving:
                path = results.book() / "checkpoints" / "odc_cifar10.safetensors"
                command = "python book/chapters/odc/experiments.py photographs"
                export_backbone(
                    path, method.backbone, {"method": "ODC", "command": command, "seed": 0, "settings": about}
                )
        results.save("odc_photographs", rows, seeds=list(range(seed + 1)), settings=about)


if __name__ == "__main__":
    main(__doc__, settings, shapes, sabotage, photographs)
