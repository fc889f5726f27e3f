"""What the chapter *Learning without labels* quotes: the first network beside its controls, over several seeds.

    python book/chapters/learning_without_labels/experiments.py settings       learning rates, on another seed of Shapes
    python book/chapters/learning_without_labels/experiments.py shapes         the network and its controls, three seeds
    python book/chapters/learning_without_labels/experiments.py photographs    CIFAR-10, from SSLBOOK_DATA or downloaded

A few minutes each on one CPU core. They write `learning_without_labels_settings`; `learning_without_labels_shapes`
(accuracy), `learning_without_labels_factors` (a probe for every factor) and `learning_without_labels_labels` (accuracy
with few labels), all on test images; `learning_without_labels_photographs` and the checkpoint
`learning_without_labels_cifar10`. Settings are chosen on images of another seed of Shapes, the probes' penalties on
held-out training images.
"""

import argparse
import copy
import tempfile
from functools import partial

import torch
from torch import Tensor, nn

from sslbook import default_device, results, rng
from sslbook.data.datasets.shapes import Shapes
from sslbook.data.loader import Data
from sslbook.data.views import View
from sslbook.engine.loop import pretrain
from sslbook.evaluation import controls, extract_features, factors, knn, linear
from sslbook.methods.simclr import SimCLR
from sslbook.nn import ConvNet
from sslbook.schedules import Cosine, Warmup
from sslbook.weights.backbone import export_backbone

NAME = "learning_without_labels"
KNOBS = {"position": 1.0, "scale": 1.0, "background": 0.0, "lighting": 0.2, "noise": 0.02}
IMAGES, TEST_IMAGES = 3000, 1000
VIEW = View(size=16, crop=(0.3, 1.0), color_jitter=(0.4, 0.4, 0.4, 0.5), grayscale=0.2)
COLOR_KEPT = View(size=16, crop=(0.3, 1.0), color_jitter=(0.4, 0.4, 0.4, 0.0))
PHOTOGRAPH = View(size=32, crop=(0.2, 1.0), color_jitter=(0.4, 0.4, 0.4, 0.1), grayscale=0.2)
BATCH, TEMPERATURE = 128, 0.2
LR, LR_SUPERVISED = 1e-2, 1e-2  # the best of `settings`
LRS = (1e-3, 3e-3, 1e-2, 3e-2)
STEPS, PHOTOGRAPH_STEPS, PHOTOGRAPHS = 240, 400, (5000, 1000)
PER_CLASS, SUBSETS = (1, 2, 5, 10, 30, 100), 5

Features = tuple[Tensor, Tensor, Tensor, Tensor]
Rows = dict[str, dict[str, list[float]]]


class InBf16(nn.Module):
    """A network whose convolutions compute in bfloat16, as `precision="bf16"` does for a method."""

    def __init__(self, f: ConvNet) -> None:
        super().__init__()
        self.f, self.dim = f, f.dim

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, torch.bfloat16):
            return self.f(x).float()


def make(seed: int, view: View = VIEW) -> SimCLR:
    """SimCLR around a fresh network."""
    torch.manual_seed(seed)
    return SimCLR(ConvNet(), view, TEMPERATURE, projector_num_layers=2, projector_dim=64)


def train(method: SimCLR, data: Data, steps: int, seed: int, lr: float = LR, precision: str = "float32") -> nn.Module:
    """Train in place by the package's loop; returns the backbone."""
    adamw = partial(torch.optim.AdamW, lr=lr, weight_decay=0.01)
    with tempfile.TemporaryDirectory() as folder:
        pretrain(
            method, data, adamw, Warmup("10 %", then=Cosine()), batch_size=BATCH, steps=steps, seed=seed,
            out_dir=f"{folder}/run", progress=False, checkpoint_every="1000000 steps", precision=precision,
        )  # fmt: skip
    return method.backbone


def train_supervised(f: nn.Module, data: Data, view: View, steps: int, seed: int, lr: float) -> nn.Module:
    """The same network, views, batch and number of steps, with labels."""
    device, look = default_device(), View.center(view.size)
    controls.train_supervised(
        f, data, view, steps, BATCH, evaluation_view=look, lr=lr, seed=seed, device=device, progress=False
    )
    return f


def features(f: nn.Module, data: Data, size: int = 16) -> Features:
    look = View.center(size)
    train_x, train_y = extract_features(f, data, "train", look, progress=False)
    return train_x, train_y, *extract_features(f, data, "test", look, progress=False)


def note(rows: Rows, name: str, found: dict[str, float]) -> None:
    """Append one seed's values to a row."""
    for column, value in found.items():
        rows.setdefault(name, {}).setdefault(column, []).append(round(value, 3))
    print(name, found, flush=True)


def score(parts: Features) -> dict[str, float]:
    return {"kNN %": knn.accuracy(*parts), "linear %": linear.probe(*parts).accuracy}


def few_labels(parts: Features, per_class: int) -> float:
    """Linear accuracy with `per_class` labels of each class, a mean over random subsets."""
    train_x, train_y, test_x, test_y = parts
    found = []
    for subset in range(SUBSETS):
        order = rng.permutation(subset, per_class, len(train_x))
        kept = torch.cat([order[train_y[order] == c][:per_class] for c in range(10)])
        found.append(linear.probe(train_x[kept], train_y[kept], test_x, test_y).accuracy)
    return sum(found) / SUBSETS


def settings(num_seeds: int) -> None:
    """Accuracies of each learning rate on images of another seed of Shapes, which no table is about."""
    data = Data(shapes=Shapes(num_train=IMAGES, num_test=TEST_IMAGES, seed=1, **KNOBS))
    rows: Rows = {}
    for seed in range(num_seeds):
        for lr in LRS:
            method = make(seed)
            fresh = copy.deepcopy(method.backbone)
            note(rows, f"SimCLR, lr {lr}", score(features(train(method, data, STEPS, seed, lr), data)))
            train_supervised(fresh, data, VIEW, STEPS, seed, lr)
            note(rows, f"supervised, lr {lr}", score(features(fresh, data)))
        about = {"steps": STEPS, "batch": BATCH, "shapes": {**KNOBS, "seed": 1}, "images": IMAGES}
        results.save(f"{NAME}_settings", rows, seeds=list(range(seed + 1)), settings=about)


def shapes(num_seeds: int) -> None:
    """The network beside its controls: accuracies, a probe for every factor, and few labels."""
    data = Data(shapes=Shapes(num_train=IMAGES, num_test=TEST_IMAGES, **KNOBS))
    known: list[dict[str, Tensor]] = [data.factors("train"), data.factors("test")]
    order = ("SimCLR", "SimCLR, colors kept", "random weights", "pixels", "supervised")
    table: Rows = {name: {} for name in order}
    found: Rows = {name: {} for name in (*order, "chance")}
    labels: Rows = {name: {} for name in ("SimCLR", "random weights", "pixels")}

    def measure(name: str, f: nn.Module) -> None:
        parts = features(f, data)
        note(table, name, score(parts))
        note(found, name, factors.probe(parts[0], known[0], parts[2], known[1]))
        if name in labels:
            note(labels, name, {str(n): few_labels(parts, n) for n in PER_CLASS})

    measure("pixels", nn.Flatten())
    note(found, "chance", factors.chance_levels(*known))
    for seed in range(num_seeds):
        method, kept = make(seed), make(seed, COLOR_KEPT)
        fresh = copy.deepcopy(method.backbone)
        measure("random weights", fresh)
        measure("SimCLR", train(method, data, STEPS, seed))
        measure("SimCLR, colors kept", train(kept, data, STEPS, seed))
        measure("supervised", train_supervised(fresh, data, VIEW, STEPS, seed, LR_SUPERVISED))
        about = {"steps": STEPS, "batch": BATCH, "lr": LR, "shapes": KNOBS, "images": IMAGES}
        about |= {"test images": TEST_IMAGES}
        for result, rows in (("shapes", table), ("factors", found), ("labels", labels)):
            more = {"label subsets": SUBSETS} if result == "labels" else {}
            results.save(f"{NAME}_{result}", rows, seeds=list(range(seed + 1)), settings={**about, **more})


def photographs(num_seeds: int) -> None:
    """CIFAR-10: the method beside its controls on test images; the checkpoint is of seed 0. Nothing is chosen here."""
    from sslbook.notebook import photographs as source

    found = source.cifar10(*PHOTOGRAPHS)
    if found is None:
        raise SystemExit("no photographs: set SSLBOOK_DATA to a folder that holds CIFAR-10")
    data = Data.from_images(found.train, found.train_labels, found.test, found.test_labels, found.classes, found.name)
    rows: Rows = {name: {} for name in ("SimCLR", "random weights", "pixels", "supervised", "chance")}
    note(rows, "pixels", score(features(nn.Flatten(), data, 32)))
    most_frequent = 100 * data.labels("test").bincount().max().item() / len(found.test)
    note(rows, "chance", {"kNN %": most_frequent, "linear %": most_frequent})
    about = {"steps": PHOTOGRAPH_STEPS, "batch": BATCH, "lr": LR, "images": len(found.train)}
    about |= {"test images": len(found.test), "data": found.name, "precision": "bf16"}
    for seed in range(num_seeds):
        method = make(seed, PHOTOGRAPH)
        fresh = copy.deepcopy(method.backbone)
        note(rows, "random weights", score(features(fresh, data, 32)))
        train(method, data, PHOTOGRAPH_STEPS, seed, precision="bf16")
        note(rows, "SimCLR", score(features(method.backbone, data, 32)))
        if seed == 0:
            path = results.book() / "checkpoints" / f"{NAME}_cifar10.safetensors"
            command = f"python book/chapters/{NAME}/experiments.py photographs"
            view = {"size": PHOTOGRAPH.size, "mean": list(PHOTOGRAPH.mean), "std": list(PHOTOGRAPH.std)}
            facts = {"method": "SimCLR", "view": view, "command": command, "seed": seed, "settings": about}
            export_backbone(path, method.backbone, facts)
        train_supervised(InBf16(fresh), data, PHOTOGRAPH, PHOTOGRAPH_STEPS, seed, LR_SUPERVISED)
        note(rows, "supervised", score(features(fresh, data, 32)))
        results.save(f"{NAME}_photographs", rows, seeds=list(range(seed + 1)), settings=about)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = {"settings": settings, "shapes": shapes, "photographs": photographs}
    parser.add_argument("what", choices=list(commands))
    parser.add_argument("--seeds", type=int, default=None, help="how many: 1 for settings, else 3")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    commands[arguments.what](arguments.seeds or (1 if arguments.what == "settings" else 3))


if __name__ == "__main__":
    main()
