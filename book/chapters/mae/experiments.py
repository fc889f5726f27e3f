"""What the chapter on MAE quotes: the choice of its settings, its longer runs over several seeds, its ablations.

    python book/chapters/mae/experiments.py settings       learning rates, on another seed of Shapes
    python book/chapters/mae/experiments.py long           the checkpoint `mae_shapes`; one seed
    python book/chapters/mae/experiments.py shapes         MAE, its controls, that checkpoint, the factors; three seeds
    python book/chapters/mae/experiments.py sabotage       one change at a time; three seeds
                                                           with --resume, both go on after the seeds of their files
    python book/chapters/mae/experiments.py photographs    CIFAR-10, from SSLBOOK_DATA or downloaded

Each takes minutes on one CPU core. They write `mae_settings`; `mae_shapes` and `mae_factors`; `mae_sabotage`;
`mae_photographs` and `mae_filling`, with the checkpoint `mae_cifar10`.
"""

import argparse
import copy
import json
import tempfile
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from sslbook import default_device, results
from sslbook.data.datasets.shapes import Shapes
from sslbook.data.loader import Batch, Data
from sslbook.data.views import View
from sslbook.engine.loop import pretrain
from sslbook.evaluation import controls, extract_features, factors, knn, linear
from sslbook.evaluation.protocols.knn import majority
from sslbook.methods.mae import MAE, random_mask, reconstruction_loss
from sslbook.nn import VisionTransformer
from sslbook.nn.mask_tokens import gather_tokens
from sslbook.nn.patches import patchify
from sslbook.schedules import Clock, Cosine, Warmup

PATCH = 4
GRAY = {"mean": (0.5,) * 3, "std": (0.25,) * 3}
EASY = {"size": 24, "background": 0, "position": 1, "scale": 1, "lighting": 0, "noise": 0}
TINY_SHAPES = Shapes(num_train=4000, num_test=1000, **EASY)
OTHER_SHAPES = Shapes(num_train=4000, num_test=1000, seed=1, **EASY)  # settings are chosen on these
BATCH, LR, LR_SUPERVISED = 32, 1.5e-3, 1e-3  # of `settings`; MAE has no best one there, so the smallest
LRS = {"MAE": (1.5e-3, 3e-3, 6e-3), "supervised": (5e-4, 1e-3, 2e-3)}
STEPS = {"settings": 250, "shapes": 4000, "sabotage": 600, "photographs": 6000}
LONG_STEPS, LONG_BATCH, LONG_LR = 6000, 128, 1.5e-3  # of the stored checkpoint
LABELS, FINE_TUNING_STEPS = 300, 200
DIM, PHOTOGRAPH_DIM, PHOTOGRAPHS, LR_PHOTOGRAPHS = 64, 96, (6000, 1000), 3e-3
RATIOS = (0.25, 0.5, 0.75, 0.9)
LONG = "MAE, long run"
Row = dict[str, float]
Table = dict[str, dict[str, list[float]]]

CHANGES: dict[str, dict] = {
    "MAE": {},
    "mask 10 %": {"mask_ratio": 0.1},
    "loss on all": {"on": "all"},
    "loss on visible": {"on": "visible"},
    "no positions": {},
    "no decoder blocks": {"decoder_depth": 0},
    "4 decoder blocks": {"decoder_depth": 4},
}


class Broken(MAE):
    """MAE whose loss is taken over the patches that `on` names: "visible" or "all" instead of the masked ones."""

    def __init__(self, *args, on: str, **options) -> None:
        super().__init__(*args, **options)
        self.on = on

    def forward(self, batch: Batch, clock: Clock) -> dict[str, Tensor]:
        (images,) = batch.views
        decoder, tokens = self.decoder, self.backbone.embed(images)
        visible, masked = random_mask(batch.index, tokens.shape[1], self.mask_ratio, clock)
        order = torch.cat([visible, masked], dim=1)
        encoded = decoder.embed(self.backbone.encode(gather_tokens(tokens, visible)))
        masks = decoder.mask_token.expand(len(images), masked.shape[1], -1)
        patches = torch.cat([encoded[:, 1:], masks], dim=1) + decoder.positions[order]
        predicted = decoder.predict(decoder.norm(decoder.blocks(torch.cat([encoded[:, :1], patches], dim=1))))[:, 1:]
        scored = slice(None) if self.on == "all" else slice(0, visible.shape[1])
        target = gather_tokens(patchify(images, self.backbone.patch_size), order)
        return {"loss": reconstruction_loss(predicted[:, scored], target[:, scored])}


# -- training and measuring --------------------------------------------------------------------------------------------


def look(size: int) -> View:
    return View.center(size, **GRAY)


def make(seed: int, size: int = 24, dim: int = DIM, **options) -> MAE:
    torch.manual_seed(seed)
    kind = Broken if "on" in options else MAE
    backbone = VisionTransformer(size, PATCH, dim=dim, depth=4, num_heads=4, pool="mean")
    options = {"norm_pix_loss": False, "decoder_dim": dim // 2, "decoder_depth": 1, "decoder_num_heads": 4} | options
    return kind(backbone, View(size=size, crop=None, flip=0.5, **GRAY), **options).to(default_device())


def train(
    method: MAE, data: Data, steps: int, seed: int, lr: float = LR, batch_size: int = BATCH
) -> tuple[float, float]:
    """Train; returns the loss, averaged over the first and the last 25 steps."""
    adamw = partial(torch.optim.AdamW, lr=lr, betas=(0.9, 0.95), weight_decay=0.05)
    with tempfile.TemporaryDirectory() as folder:
        pretrain(
            method, data, adamw, Warmup("10 %", then=Cosine()), batch_size=batch_size, steps=steps, seed=seed,
            device=default_device(), out_dir=folder, checkpoint_every="1000000 steps", log_every=1, progress=False,
        )  # fmt: skip
        lines = [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]
    loss = [line["loss"] for line in lines if "loss" in line]
    return sum(loss[:25]) / 25, sum(loss[-25:]) / 25


def train_supervised(backbone: VisionTransformer, data: Data, view: View, steps: int, seed: int, lr: float) -> float:
    """The same network, views, batch size and number of steps, with labels; returns its accuracy on test images."""
    options = {"evaluation_view": look(view.size), "seed": seed, "progress": False}
    return controls.train_supervised(backbone, data, view, steps, BATCH, lr=lr, **options)


def score(backbone: nn.Module, data: Data, size: int, with_factors: bool = False) -> tuple[Row, Row]:
    (train_x, train_y), (test_x, test_y) = (
        extract_features(backbone, data, split, look(size), progress=False) for split in ("train", "test")
    )
    near, inside = knn.accuracy(train_x, train_y, test_x, test_y), {}
    if with_factors:  # among them the linear probe of the shape, the class
        inside = factors.probe(train_x, data.factors("train"), test_x, data.factors("test"))
    line = inside["shape"] if with_factors else linear.probe(train_x, train_y, test_x, test_y).accuracy
    return {"kNN": near, "linear": line}, inside


def fine_tuned(backbone: VisionTransformer, seed: int) -> float:
    """Accuracy on test images of the encoder and a linear layer, both trained further on few labels."""
    few, view = Data(shapes=TINY_SHAPES, limit=LABELS), View(size=24, crop=None, flip=0.5, **GRAY)
    return controls.train_supervised(
        copy.deepcopy(backbone), few, view, FINE_TUNING_STEPS, 50, evaluation_view=look(24), seed=seed, progress=False
    )


def note(rows: Table, row: str, found: Row) -> None:
    """One more seed."""
    for column, value in found.items():
        rows.setdefault(row, {}).setdefault(column, []).append(round(value, 4))
    print(row, {column: round(value, 3) for column, value in found.items()}, flush=True)


def stored_tables(names: list[str], about: Row, resume: bool) -> tuple[list[Table], int]:
    """The tables that files of the same settings hold, and how many seeds; none without `resume`."""
    if not resume:
        return [{} for _ in names], 0
    stored = [results.load(name) for name in names]
    seeds = stored[0].seeds
    if any(one.settings != about or one.seeds != list(range(len(seeds))) for one in stored):
        raise SystemExit("the files are of other settings or seeds: run without --resume")
    return [one.values for one in stored], len(seeds)


# -- filling by rules --------------------------------------------------------------------------------------------------


def fill_mean(x: Tensor, mask: Tensor) -> Tensor:
    """Masked pixels become the mean of the visible ones of their image."""
    mean = (x * ~mask).sum((2, 3), keepdim=True) / (~mask).sum((2, 3), keepdim=True)
    return torch.where(mask, mean, x)


def fill_harmonic(x: Tensor, mask: Tensor, rounds: int = 200) -> Tensor:
    """Every masked pixel becomes the mean of its four neighbors, over and over."""
    filled = fill_mean(x, mask)
    for _ in range(rounds):
        p = F.pad(filled, (1, 1, 1, 1), mode="replicate")
        around = (p[..., 1:-1, :-2] + p[..., 1:-1, 2:] + p[..., :-2, 1:-1] + p[..., 2:, 1:-1]) / 4
        filled = torch.where(mask, around, x)
    return filled


def masked_pixels(masked: Tensor, side: int) -> Tensor:
    flat = torch.zeros(len(masked), side * side, device=masked.device).scatter(1, masked, 1.0)
    return F.interpolate(flat.reshape(-1, 1, side, side), scale_factor=PATCH) > 0


def recovered(method: MAE, data: Data, rho: float, count: int = 1000) -> dict[str, Row]:
    """Percentage of the variance of the masked pixels of test images, and of the structure within masked patches."""
    size = method.view.size
    (batch,) = data.evaluation_batches("test", look(size), batch_size=data.num_test)
    x, index = batch.views[0][:count].to(default_device()), torch.arange(min(count, data.num_test))
    method.mask_ratio, usual = rho, method.mask_ratio
    _, reconstructed = method.reconstruct(x, index.to(x.device), Clock())
    _, masked = random_mask(index.to(x.device), (size // PATCH) ** 2, rho, Clock())
    method.mask_ratio = usual
    mask, centered = masked_pixels(masked, size // PATCH), x - x.mean((0, 2, 3), keepdim=True)
    found = {}
    filled = {"MAE": reconstructed, "harmonic filling": fill_harmonic(x, mask), "mean color": fill_mean(x, mask)}
    for name, guess in filled.items():
        error, target = (gather_tokens(patchify(d, PATCH), masked) for d in (guess - x, centered))
        inner_error, inner = (d - d.mean(2, keepdim=True) for d in (error, target))
        found[name] = {
            "all": 100 * float(1 - error.square().sum() / target.square().sum()),
            "within": 100 * float(1 - inner_error.square().sum() / inner.square().sum()),
        }
    return found


# -- commands ----------------------------------------------------------------------------------------------------------


def settings(seeds: int, resume: bool = False) -> None:
    """Short runs on other images: the loss of MAE on test images, and the accuracy of the supervised network."""
    data, rows = Data(shapes=OTHER_SHAPES), {}
    for lr in LRS["MAE"]:
        method = make(100)
        train(method, data, STEPS["settings"], 100, lr)
        note(rows, f"MAE, lr {lr:g}", {"recovered": recovered(method, data, 0.75)["MAE"]["all"]})
    for lr in LRS["supervised"]:
        method = make(100)
        accuracy = train_supervised(method.backbone, data, method.view, STEPS["settings"], 100, lr)
        note(rows, f"supervised, lr {lr:g}", {"accuracy": accuracy})
    about = {"steps": STEPS["settings"], "batch": BATCH, "Shapes seed": OTHER_SHAPES.seed}
    results.save("mae_settings", rows, seeds=[100], settings=about)


def long(seeds: int, resume: bool = False) -> None:
    """The checkpoint that the chapter goes on from: one seed."""
    method = make(0)
    loss = train(method, Data(shapes=TINY_SHAPES), LONG_STEPS, 0, LONG_LR, LONG_BATCH)
    about = {"steps": LONG_STEPS, "batch": LONG_BATCH, "lr": LONG_LR, "loss": loss, "shapes": vars(TINY_SHAPES)}
    store(method, "mae_shapes", {"command": "python book/chapters/mae/experiments.py long", **about})


def shapes(seeds: int, resume: bool = False) -> None:
    """MAE beside its controls, on test images, and the stored checkpoint of a longer run, of which there is one."""
    data = Data(shapes=TINY_SHAPES)
    column, steps = f"fine-tuned, {LABELS} labels", STEPS["shapes"]
    about = {"steps": steps, "batch": BATCH, "lr": LR, "lr supervised": LR_SUPERVISED, "Shapes": vars(TINY_SHAPES)}
    (rows, known), done = stored_tables(["mae_shapes", "mae_factors"], about, resume)

    def measure(name: str, network: nn.Module) -> None:
        row, inside = score(network, data, 24, with_factors=True)
        note(rows, name, row)
        note(known, name, inside)

    if not done:
        for name in (LONG, "MAE", "random weights", "pixels", "supervised", "chance"):  # the order of the rows
            rows[name], known[name] = {}, {}
        level = majority(data.labels("train"), data.labels("test"))
        note(rows, "chance", {"kNN": level, "linear": level, column: level})
        note(known, "chance", factors.chance_levels(data.factors("train"), data.factors("test")))
        measure("pixels", nn.Flatten())
        stored = restore("mae_shapes")
        measure(LONG, stored.backbone)
        note(rows, LONG, {column: fine_tuned(stored.backbone, 0)})
    for seed in range(done, seeds):
        method = make(seed)
        fresh = copy.deepcopy(method.backbone)
        measure("random weights", fresh)
        note(rows, "random weights", {column: fine_tuned(fresh, seed)})
        print("loss", train(method, data, steps, seed), flush=True)
        measure("MAE", method.backbone)
        note(rows, "MAE", {column: fine_tuned(method.backbone, seed)})
        train_supervised(fresh, data, method.view, steps, seed, LR_SUPERVISED)
        measure("supervised", fresh)
        for name, table in {"mae_shapes": rows, "mae_factors": known}.items():
            results.save(name, table, seeds=list(range(seed + 1)), settings=about)


def sabotage(seeds: int, resume: bool = False) -> None:
    """One change at a time, from the same weights, on test images."""
    data = Data(shapes=TINY_SHAPES)
    about = {"steps": STEPS["sabotage"], "batch": BATCH, "lr": LR}
    (rows,), done = stored_tables(["mae_sabotage"], about, resume)
    for seed in range(done, seeds):
        note(rows, "random weights", score(make(seed).backbone, data, 24)[0])
        for name, change in CHANGES.items():
            method = make(seed, **change)
            if name == "no positions":
                method.backbone.pos_embed.zero_(), method.decoder.positions.zero_()
            first, last = train(method, data, STEPS["sabotage"], seed)
            row = {"first loss": first, "last loss": last, **score(method.backbone, data, 24)[0]}
            if "tokens" not in change:  # an encoder trained with mask tokens cannot do without them
                row["recovered"] = recovered(method, data, 0.75)["MAE"]["within"]
            note(rows, name, row)
        results.save("mae_sabotage", rows, seeds=list(range(seed + 1)), settings=about)


def photographs(seeds: int, resume: bool = False) -> None:
    """CIFAR-10: MAE beside its controls on test images; the checkpoint is of seed 0."""
    from sslbook.notebook import photographs as source

    found = source.cifar10(*PHOTOGRAPHS)
    if found is None:
        raise SystemExit("no photographs: set SSLBOOK_DATA to a folder that holds CIFAR-10")
    data = Data.from_images(found.train, found.train_labels, found.test, found.test_labels, found.classes)
    rows: Table = {name: {} for name in ("MAE", "random weights", "pixels", "supervised", "chance")}
    filling: Table = {}
    about = {"steps": STEPS["photographs"], "batch": BATCH, "lr": LR, "lr supervised": LR_SUPERVISED}
    about |= {"lr": LR_PHOTOGRAPHS, "images": len(found.train), "test images": len(found.test), "data": found.name}
    level = majority(data.labels("train"), data.labels("test"))
    note(rows, "chance", {"kNN": level, "linear": level})
    note(rows, "pixels", score(nn.Flatten(), data, 32)[0])
    for seed in range(seeds):
        method = make(seed, 32, PHOTOGRAPH_DIM)
        fresh = copy.deepcopy(method.backbone)
        note(rows, "random weights", score(fresh, data, 32)[0])
        print("loss", train(method, data, STEPS["photographs"], seed, LR_PHOTOGRAPHS), flush=True)
        note(rows, "MAE", score(method.backbone, data, 32)[0])
        for rho in RATIOS:
            for name, row in recovered(method, data, rho).items():
                note(filling, f"{rho:.0%} masked", {name: row["all"]})
        if seed == 0:
            store(method, "mae_cifar10", {"command": "python book/chapters/mae/experiments.py photographs", **about})
        results.save("mae_filling", filling, seeds=list(range(seed + 1)), settings=about)
        results.save("mae_photographs", rows, seeds=list(range(seed + 1)), settings=about)
        train_supervised(fresh, data, method.view, STEPS["photographs"], seed, LR_SUPERVISED)
        note(rows, "supervised", score(fresh, data, 32)[0])
        results.save("mae_photographs", rows, seeds=list(range(seed + 1)), settings=about)


def restore(name: str) -> MAE:
    method = make(0)
    left_out = method.load_state_dict(load_file(results.book() / "checkpoints" / f"{name}.safetensors"), strict=False)
    assert not left_out.unexpected_keys
    assert all("pos" in key for key in left_out.missing_keys)  # the fixed tables
    return method


def store(method: MAE, name: str, about: dict) -> None:
    """Encoder and decoder without the fixed tables of positions, and a description beside them."""
    folder = results.book() / "checkpoints"
    weights = {key: value.cpu().clone() for key, value in method.state_dict().items() if "pos" not in key}
    save_file(weights, folder / f"{name}.safetensors", metadata={"format": "pt"})
    facts = {"method": "MAE", "command": about.pop("command"), "seed": 0, "settings": about}
    facts |= {"commit": results.commit(folder), "torch": torch.__version__}
    (folder / f"{name}.json").write_text(json.dumps(facts, indent=2) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = {"settings": settings, "long": long, "shapes": shapes, "sabotage": sabotage, "photographs": photographs}
    parser.add_argument("what", choices=list(commands))
    parser.add_argument("--seeds", type=int, default=None, help="how many: 3, but 1 of photographs")
    parser.add_argument(
        "--resume", action="store_true", help="of shapes and sabotage: go on after the seeds of their files"
    )
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    commands[arguments.what](arguments.seeds or (1 if arguments.what == "photographs" else 3), arguments.resume)


if __name__ == "__main__":
    main()
