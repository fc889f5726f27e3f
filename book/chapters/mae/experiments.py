"""Longer runs of the chapter on MAE: results with seeds, the ablations, and the checkpoint of its sliders.

    python book/chapters/mae/experiments.py train        the controls, and the checkpoint
    python book/chapters/mae/experiments.py sabotage     one line changed at a time

Each run uses one CPU core; a second argument says how many runs go side by side.
"""

import copy
import itertools
import json
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from sslbook import results
from sslbook.data.datasets.shapes import Shapes
from sslbook.data.loader import Batch, Data
from sslbook.data.views import View
from sslbook.engine.loop import pretrain
from sslbook.evaluation import controls, extract_features, factors, knn, linear
from sslbook.methods.mae import MAE, random_mask, reconstruction_loss
from sslbook.nn import VisionTransformer
from sslbook.nn.mask_tokens import gather_tokens
from sslbook.nn.patches import normalize_patches, patchify
from sslbook.schedules import Clock, Cosine, Warmup

SIZE, PATCH = 24, 4
GRAY = {"mean": (0.5,) * 3, "std": (0.25,) * 3}
TINY_SHAPES = Shapes(num_train=4000, num_test=1000, size=SIZE, background=0, position=1, scale=1, lighting=0, noise=0)
VIEW = View(size=SIZE, crop=None, flip=0.5, **GRAY)
LOOK = View.center(SIZE, **GRAY)
BATCH, RATE = 128, 1.5e-3
STEPS = {"train": 6000, "sabotage": 1500}
LABELS = 300  # that fine-tuning may use
CHANGES: dict[str, dict] = {
    "MAE": {},
    "mask 10 %": {"mask_ratio": 0.1},
    "loss on all": {"on": "all"},
    "loss on visible": {"on": "visible"},
    "no positions": {},
    "tokens in encoder": {"tokens": True},
    "normalized patches": {"norm_pix_loss": True},
    "no decoder blocks": {"depth": 0},
    "4 decoder blocks": {"depth": 4},
}


class Broken(MAE):
    """MAE with one change: `tokens` puts mask tokens into the encoder, `on` selects the patches of the loss."""

    def __init__(self, *args, on: str = "masked", tokens: bool = False, **options) -> None:
        super().__init__(*args, **options)
        self.on = on
        self.token = nn.Parameter(0.02 * torch.randn(1, 1, self.backbone.dim)) if tokens else None

    def forward(self, batch: Batch, clock: Clock) -> dict[str, Tensor]:
        (images,) = batch.views
        size, decoder = self.backbone.patch_size, self.decoder
        tokens = self.backbone.embed(images)
        visible, masked = random_mask(batch.index, tokens.shape[1], self.mask_ratio, clock)
        order = torch.cat([visible, masked], dim=1)
        if self.token is None:
            encoded = decoder.embed(self.backbone.encode(gather_tokens(tokens, visible)))
            masks = decoder.mask_token.expand(len(images), masked.shape[1], -1)
            encoded = torch.cat([encoded, masks], dim=1)
        else:
            masks = (self.token + self.backbone.pos_embed[:, 1:]).expand(len(images), -1, -1)
            inputs = torch.cat([gather_tokens(tokens, visible), gather_tokens(masks, masked)], dim=1)
            encoded = decoder.embed(self.backbone.encode(inputs))
        encoded = torch.cat([encoded[:, :1], encoded[:, 1:] + decoder.positions[order]], dim=1)
        prediction = decoder.predict(decoder.norm(decoder.blocks(encoded)))[:, 1:]
        target = gather_tokens(patchify(images, size), order)
        if self.norm_pix_loss:
            target = normalize_patches(target)
        count = visible.shape[1]
        part = {"masked": slice(count, None), "visible": slice(0, count), "all": slice(None)}[self.on]
        return {"loss": reconstruction_loss(prediction[:, part], target[:, part])}


def make(seed: int, depth: int = 1, **options) -> MAE:
    torch.manual_seed(seed)
    kind = Broken if {"on", "tokens"} & set(options) else MAE
    options = {"norm_pix_loss": False, **options}
    backbone = VisionTransformer(SIZE, PATCH, dim=64, depth=4, heads=4, pool="mean")
    return kind(backbone, VIEW, decoder_dim=32, decoder_depth=depth, decoder_num_heads=4, **options)


def learn(method: MAE, data: Data, steps: int, seed: int) -> list[float]:
    """Train; returns the loss, averaged over every 25 steps."""
    adamw = partial(torch.optim.AdamW, lr=RATE, betas=(0.9, 0.95), weight_decay=0.05)
    with tempfile.TemporaryDirectory() as folder:
        pretrain(
            method, data, adamw, Warmup("10 %", then=Cosine()), batch_size=BATCH, steps=steps, seed=seed,
            device="cpu", out_dir=folder, checkpoint_every="1000000 steps", log_every=1, progress=False,
        )  # fmt: skip
        lines = [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]
    loss = torch.tensor([line["loss"] for line in lines if "loss" in line])
    return [float(part.mean()) for part in loss.split(25)]


def measure(backbone: nn.Module, data: Data, with_factors: bool = False) -> dict[str, float]:
    (train_x, train_y), (test_x, test_y) = (
        extract_features(backbone, data, split, LOOK, progress=False) for split in ("train", "test")
    )
    found = {
        "kNN": knn.accuracy(train_x, train_y, test_x, test_y),
        "linear": linear.probe(train_x, train_y, test_x, test_y).accuracy,
    }
    if with_factors:
        found |= factors.probe(train_x, data.factors("train"), test_x, data.factors("test"))
    return found


def recovered(method: MAE, data: Data, rho: float = 0.75) -> float:
    """Percentage of the structure within masked patches of test images that the decoder recovers."""
    method.mask_ratio, usual = rho, method.mask_ratio
    (batch,) = data.evaluation_batches("test", LOOK, batch_size=data.num_test)
    with torch.no_grad():
        prediction, masked = method.predict(batch.views[0], batch.index, Clock())
    method.mask_ratio = usual
    patches = gather_tokens(patchify(batch.views[0], PATCH), masked)
    variance, mean = torch.var_mean(patches, dim=2, keepdim=True)
    if method.norm_pix_loss:
        prediction = prediction * (variance + 1e-6).sqrt()
    error = prediction - prediction.mean(2, keepdim=True) - (patches - mean)
    return 100 * float(1 - error.square().sum() / (patches - mean).square().sum())


def tuned(backbone: nn.Module, seed: int) -> float:
    """Accuracy on test images of the encoder and a linear layer, both trained further on few labels."""
    few = Data(shapes=TINY_SHAPES, limit=LABELS)
    return controls.train_supervised(
        copy.deepcopy(backbone), few, VIEW, 200, 50, evaluation_view=LOOK, seed=seed, progress=False
    )


def split(found: dict[str, float]) -> tuple[dict[str, float], dict[str, float]]:
    return {key: found.pop(key) for key in ("kNN", "linear")}, found


def one_seed(seed: int) -> tuple[dict, dict, list[float]]:
    """Rows of accuracies, rows of factors, and the loss."""
    torch.set_num_threads(1)
    data, rows, knowledge = Data(shapes=TINY_SHAPES), {}, {}
    method = make(seed)
    networks = {"random weights": copy.deepcopy(method.backbone), "MAE": method.backbone}
    loss = learn(method, data, STEPS["train"], seed)
    for name, network in networks.items():
        rows[name], knowledge[name] = split(measure(network, data, with_factors=True))
        rows[name][f"fine-tuned, {LABELS} labels"] = tuned(network, seed)
    if seed == 0:
        folder = Path(__file__).parents[2] / "checkpoints"
        folder.mkdir(exist_ok=True)
        weights = {name: value.clone() for name, value in method.state_dict().items() if "pos" not in name}
        save_file(weights, folder / "mae_shapes.safetensors", metadata={"format": "pt"})
        facts = {"command": "python book/chapters/mae/experiments.py train", "seed": seed, "shapes": vars(TINY_SHAPES)}
        facts |= settings("train")
        (folder / "mae_shapes.json").write_text(json.dumps(facts, indent=2) + "\n")
        rows["pixels"], knowledge["pixels"] = split(measure(nn.Flatten(), data, with_factors=True))
        guided = make(seed).backbone
        # A sixth of the steps: with all patches visible a step costs three times as much, and labels take fewer steps.
        options = {"evaluation_view": LOOK, "seed": seed, "progress": False}
        controls.train_supervised(guided, data, VIEW, STEPS["train"] // 6, BATCH, **options)
        rows["supervised, all labels"] = measure(guided, data)
    print(seed, rows, flush=True)
    return rows, knowledge, loss


def one_change(name: str, seed: int) -> dict[str, float]:
    torch.set_num_threads(1)
    data, method = Data(shapes=TINY_SHAPES), make(seed, **CHANGES[name])
    if name == "no positions":
        method.backbone.pos_embed.zero_(), method.decoder.positions.zero_()
    loss = learn(method, data, STEPS["sabotage"], seed)
    found = {"first loss": loss[0], "last loss": loss[-1], **measure(method.backbone, data)}
    if "tokens" not in CHANGES[name]:  # an encoder trained with mask tokens cannot do without them
        found["recovered"] = recovered(method, data)
    print(name, seed, found, flush=True)
    return found


def settings(which: str) -> dict[str, float]:
    return {"steps": STEPS[which], "batch": BATCH, "lr": RATE}


def gather(parts: list[dict[str, dict[str, float]]]) -> dict[str, dict[str, list[float]]]:
    """One number per seed where every part is a seed's rows."""
    table: dict[str, dict[str, list[float]]] = {}
    for rows in parts:
        for name, found in rows.items():
            for column, value in found.items():
                table.setdefault(name, {}).setdefault(column, []).append(round(value, 4))
    return table


def train(pool: ProcessPoolExecutor, seeds: tuple[int, ...] = (0,)) -> None:
    rows, knowledge, losses = zip(*pool.map(one_seed, seeds))
    about = {"seeds": seeds, "settings": settings("train")}
    results.save("mae_shapes", gather(rows), **about)
    results.save("mae_factors", gather(knowledge), **about)
    results.save("mae_loss", {"step": [25 * i + 12 for i in range(len(losses[0]))], "loss": losses}, **about)


def sabotage(pool: ProcessPoolExecutor, seeds: tuple[int, ...] = (0,)) -> None:
    runs = list(itertools.product(CHANGES, seeds))
    found = pool.map(one_change, *zip(*runs))
    table = gather([{name: row} for (name, _), row in zip(runs, found)])
    results.save("mae_sabotage", table, seeds=seeds, settings=settings("sabotage"))


if __name__ == "__main__":
    with ProcessPoolExecutor(int((sys.argv + ["1"])[2]), get_context("spawn")) as side_by_side:
        {"train": train, "sabotage": sabotage}[sys.argv[1]](side_by_side)
