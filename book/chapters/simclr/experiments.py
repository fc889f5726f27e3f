"""What the chapter on SimCLR quotes: the choice of its settings, its longer runs over several seeds, its ablations.

    python book/chapters/simclr/experiments.py settings       learning rates, on images of another seed of Shapes
    python book/chapters/simclr/experiments.py shapes         the controls, the factors and the ablations, three seeds;
                                                              with --resume, the seeds that its files lack
    python book/chapters/simclr/experiments.py photographs    CIFAR-10, from SSLBOOK_DATA or downloaded

Each takes minutes on one CPU core. They write `simclr_settings`; `simclr_shapes` and `simclr_factors` (on test images)
and `simclr_sabotage` (on held-out training images); `simclr_photographs` and the checkpoint `simclr_cifar10`.
"""

import argparse
import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sslbook import default_device, results
from sslbook.data.datasets.shapes import Shapes
from sslbook.data.loader import Batch, Data
from sslbook.data.views import View
from sslbook.evaluation import controls, extract_features, factors, knn, linear
from sslbook.methods.simclr import SimCLR, similarities
from sslbook.nn import ConvNet
from sslbook.schedules import Clock
from sslbook.weights.backbone import export_backbone

TINY_SHAPES = Shapes(num_train=4000, num_test=1000)
VIEW = View(size=16, crop=(0.3, 1.0), color_jitter=(0.4, 0.4, 0.4, 0.5), grayscale=0.2)
PHOTOGRAPH = View(size=32, crop=(0.2, 1.0), color_jitter=(0.4, 0.4, 0.4, 0.1), grayscale=0.2)
BATCH, TEMPERATURE = 256, 0.2
LR, LR_SUPERVISED = 1e-2, 5e-3  # the best of `settings`
LRS = (2e-3, 5e-3, 1e-2, 2e-2)
HELD_OUT = 800  # training images at the end that settings are chosen on, and the ablations measured
STEPS, PHOTOGRAPH_STEPS, PHOTOGRAPHS = 120, 300, (8000, 2000)
Table = dict[str, dict[str, list[float]]]


class KeepsItself(SimCLR):
    """The sabotage: a row's similarity to itself stays among the candidates."""

    def forward(self, batch: Batch, clock: Clock) -> dict[str, Tensor]:
        z_1, z_2 = self.projector(self.backbone(torch.cat(batch.views))).chunk(2)
        z = F.normalize(torch.cat([z_1, z_2]), dim=1)
        positive = torch.arange(len(z), device=z.device).roll(len(z_1))
        loss = 2 * F.cross_entropy(z @ z.T / self.temperature, positive)
        return {"loss": loss, **self._measure(similarities(z_1.detach(), z_2.detach())[0])}


class Fast(nn.Module):
    """A backbone that trains in bfloat16, twice as fast where the processor has instructions for it."""

    def __init__(self, backbone: nn.Module) -> None:
        super().__init__()
        self.backbone, self.dim = backbone, backbone.dim

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, torch.bfloat16, enabled=self.training):
            return self.backbone(x).float()


NONE, TEXTURED = "as it should be", "textured background"
VARIANTS: dict[str, dict] = {
    NONE: {},
    "no color jitter": {"view": View(size=16, crop=VIEW.crop)},
    "no projector": {"projector": nn.Identity()},
    "k = i kept": {"kind": KeepsItself},
    "temperature 0.02": {"temperature": 0.02},
    "temperature 1": {"temperature": 1.0},
    TEXTURED: {},
}


def make(
    seed: int,
    *,
    kind: type[SimCLR] = SimCLR,
    view: View = VIEW,
    temperature: float = TEMPERATURE,
    projector: nn.Module | None = None,
) -> SimCLR:
    torch.manual_seed(seed)
    method = kind(ConvNet(), view, temperature, projector_num_layers=2, projector_dim=64, projector=projector)
    return method.to(default_device())


def train(method: SimCLR, data: Data, steps: int, seed: int, lr: float = LR) -> dict[str, float]:
    """Train in place, as the chapter does; the mean of the last twenty steps' log."""
    optimizer = torch.optim.AdamW(method.parameters(), lr, weight_decay=0.01)
    rate = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps, pct_start=0.1)
    log, epoch = [], 0
    method.train()
    while len(log) < steps:
        for batch in data.batches(method.views(), BATCH, seed=seed, epoch=epoch, device=default_device()):
            if len(log) == steps:
                break
            out = method(batch, Clock(len(log), steps))
            optimizer.zero_grad()
            out["loss"].backward()
            optimizer.step()
            rate.step()
            log.append({name: value.item() for name, value in out.items()})
        epoch += 1
    return {name: sum(line[name] for line in log[-20:]) / len(log[-20:]) for name in log[0]}


def train_supervised(backbone: nn.Module, data: Data, view: View, steps: int, seed: int, lr: float) -> nn.Module:
    center = View.center(view.size)
    controls.train_supervised(
        backbone, data, view, steps, BATCH, evaluation_view=center, lr=lr, seed=seed, progress=False
    )
    return backbone


def features(network: nn.Module, data: Data, size: int = 16) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    x, y = extract_features(network, data, "train", View.center(size), progress=False)
    test_x, test_y = extract_features(network, data, "test", View.center(size), progress=False)
    return x, y, test_x, test_y


def score(network: nn.Module, data: Data, size: int = 16) -> dict[str, float]:
    """On test images."""
    found = features(network, data, size)
    return {"kNN": knn.accuracy(*found), "linear": linear.probe(*found).accuracy}


def held_out(backbone: nn.Module, data: Data, names: tuple[str, ...]) -> dict[str, float]:
    """On training images that the probes did not see: kNN of the class, and linear probes of factors."""
    x, y = extract_features(backbone, data, "train", View.center(16), progress=False)
    bank, queries = x[:-HELD_OUT], x[-HELD_OUT:]
    found = {"kNN": knn.accuracy(bank, y[:-HELD_OUT], queries, y[-HELD_OUT:])}
    for name in names:
        value = data.factors("train")[name]
        found[name] = linear.probe(bank, value[:-HELD_OUT], queries, value[-HELD_OUT:]).accuracy
    return found


def note(table: Table, row: str, values: dict[str, float]) -> None:
    for name, value in values.items():
        table.setdefault(row, {}).setdefault(name, []).append(round(value, 3))
    print(row, {name: round(value, 2) for name, value in values.items()}, flush=True)


def settings(_: int) -> None:
    """`simclr_settings`: learning rates, on the images of another seed of Shapes, which no other result uses."""
    data, table = Data(shapes=Shapes(**{**vars(TINY_SHAPES), "seed": 1})), {}
    for lr in LRS:
        method = make(100)
        fresh = copy.deepcopy(method.backbone)
        train(method, data, STEPS, 100, lr)
        note(table, f"SimCLR, learning rate {lr:g}", score(method.backbone, data))
        train_supervised(fresh, data, VIEW, STEPS, 100, lr)
        note(table, f"supervised, learning rate {lr:g}", score(fresh, data))
    results.save("simclr_settings", table, seeds=[100], settings={"steps": STEPS, "batch": BATCH, "shapes seed": 1})


def shapes(num_seeds: int, resume: bool = False) -> None:
    """All of Shapes: the method beside its controls, what h and z encode, and one line changed at a time."""
    plain, textured = Data(shapes=TINY_SHAPES), Data(shapes=Shapes(**{**vars(TINY_SHAPES), "texture": 1.0}))
    rows: Table = {name: {} for name in ("SimCLR", "random weights", "pixels", "supervised")}
    known: Table = {}
    broken: Table = {}
    about = {"steps": STEPS, "batch": BATCH, "temperature": TEMPERATURE, "images": TINY_SHAPES.num_train}
    done = 0
    if resume:
        found = [results.load(name) for name in ("simclr_shapes", "simclr_factors", "simclr_sabotage")]
        if any((one.settings, one.seeds) != (about, list(range(len(found[0].seeds)))) for one in found):
            raise SystemExit("the files are of other settings or seeds: run without --resume")
        rows, known, broken = ({name: row for name, row in one.values.items() if row} for one in found)
        done = len(found[0].seeds)

    def factor(column: str, network: nn.Module) -> None:
        x, _, test_x, _ = features(network, plain)
        for name, value in factors.probe(x, plain.factors("train"), test_x, plain.factors("test")).items():
            known.setdefault(name, {}).setdefault(column, []).append(round(value, 2))

    if not done:
        for name, level in factors.chance_levels(plain.factors("train"), plain.factors("test")).items():
            known[name] = {"chance": [round(level, 2)]}
        factor("pixels", nn.Flatten())
        note(rows, "pixels", score(nn.Flatten(), plain))
    for seed in range(done, num_seeds):
        for name, options in VARIANTS.items():
            data = textured if name == TEXTURED else plain
            method = make(seed, **options)
            fresh = copy.deepcopy(method.backbone)
            log = train(method, data, STEPS, seed)
            note(broken, name, {**log, **held_out(method.backbone, data, ("shape", "hue", "background"))})
            if name == NONE:
                note(rows, "SimCLR", score(method.backbone, data))
                note(rows, "random weights", score(fresh, data))
                factor("random weights", fresh)
                factor("h", method.backbone)
                factor("z", nn.Sequential(method.backbone, method.projector))
                note(rows, "supervised", score(train_supervised(fresh, data, VIEW, STEPS, seed, LR_SUPERVISED), data))
        for result, table in (("simclr_shapes", rows), ("simclr_factors", known), ("simclr_sabotage", broken)):
            results.save(result, table, seeds=list(range(seed + 1)), settings=about)


def photographs(num_seeds: int) -> None:
    """CIFAR-10: the method beside its controls on test images; the checkpoint is of seed 0."""
    from sslbook.notebook import photographs as source

    found = source.cifar10(*PHOTOGRAPHS)
    if found is None:
        raise SystemExit("no photographs: set SSLBOOK_DATA to a folder that holds CIFAR-10")
    data = Data.from_images(found.train, found.train_labels, found.test, found.test_labels, found.classes, found.name)
    rows: Table = {name: {} for name in ("SimCLR", "random weights", "pixels", "supervised")}
    note(rows, "pixels", score(nn.Flatten(), data, 32))
    about = {"steps": PHOTOGRAPH_STEPS, "batch": BATCH, "temperature": TEMPERATURE, "images": len(found.train)}
    about |= {"test images": len(found.test), "data": found.name, "precision": "bf16"}
    for seed in range(num_seeds):
        method = make(seed, view=PHOTOGRAPH)
        fresh = copy.deepcopy(method.backbone)
        note(rows, "random weights", score(fresh, data, 32))
        network, method.backbone = method.backbone, Fast(method.backbone)
        log = train(method, data, PHOTOGRAPH_STEPS, seed)
        note(rows, "SimCLR", score(network, data, 32))
        print(log, flush=True)
        if seed == 0:
            path = results.book() / "checkpoints" / "simclr_cifar10.safetensors"
            command = "python book/chapters/simclr/experiments.py photographs"
            view = {"size": PHOTOGRAPH.size, "mean": PHOTOGRAPH.mean, "std": PHOTOGRAPH.std}
            facts = {"method": "SimCLR", "view": view, "command": command, "seed": seed, "settings": about}
            export_backbone(path, network, facts)
        train_supervised(Fast(fresh), data, PHOTOGRAPH, PHOTOGRAPH_STEPS, seed, LR_SUPERVISED)
        note(rows, "supervised", score(fresh, data, 32))
        results.save("simclr_photographs", rows, seeds=list(range(seed + 1)), settings=about)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = {"settings": settings, "shapes": shapes, "photographs": photographs}
    parser.add_argument("what", choices=list(commands))
    parser.add_argument("--seeds", type=int, default=None, help="how many: 3 of shapes, 1 of photographs")
    parser.add_argument("--resume", action="store_true", help="of shapes: go on after the seeds that its files hold")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.what == "shapes":
        shapes(arguments.seeds or 3, arguments.resume)
    else:
        commands[arguments.what](arguments.seeds or 1)


if __name__ == "__main__":
    main()
