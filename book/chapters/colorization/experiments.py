"""What the chapter on colorization quotes: the choice of its settings, its longer runs over several seeds, its ablations.

    python book/chapters/colorization/experiments.py settings      learning rates, on images of another seed of Shapes
    python book/chapters/colorization/experiments.py shapes        colorization of painted shapes whose color depends on
                                                                   the shape, on nothing, or is one; regression; the
                                                                   context encoder; the controls; the factors (seed 0)
    python book/chapters/colorization/experiments.py sabotage      one part removed or replaced at a time
    python book/chapters/colorization/experiments.py photographs   CIFAR-10, from SSLBOOK_DATA or downloaded
    python book/chapters/colorization/experiments.py inpainting    the same, the context encoder with and without its
                                                                   adversarial term

Each takes minutes on one CPU core; with --resume it goes on after the seeds that its files hold. They write
`colorization_settings`; `colorization_shapes` and `colorization_factors` (on test images); `colorization_sabotage` (on
held-out training images); `colorization_photographs`, with the checkpoint `colorization_cifar10`, and
`colorization_inpainting`, with the checkpoint `colorization_inpainted`.
"""

import json
from collections.abc import Callable
from dataclasses import replace

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from sslbook import default_device, results
from sslbook.book.chapters.colorization.variants import (
    EASY,
    Adversarial,
    Regression,
    Seeing,
    Unmasked,
    chroma,
    gains,
    gradient_energy,
    painted,
)
from sslbook.book.chapters.colorization.variants import angles as angles_of
from sslbook.book.chapters.experiments import (
    Table,
    batches,
    begin,
    cifar10,
    features,
    held_out,
    main,
    note,
    score,
    train,
    train_supervised,
)
from sslbook.data.datasets.shapes import Shapes
from sslbook.data.loader import Data
from sslbook.data.views import View
from sslbook.evaluation import factors
from sslbook.methods.base import Method
from sslbook.methods.colorization import Colorization
from sslbook.methods.context_encoder import ContextEncoder
from sslbook.methods.simclr import SimCLR
from sslbook.nn import MLP, ConvNet

KNOBS = {**EASY, "position": 1.0, "scale": 1.0, "orientation": 0.25}
SHAPES = Shapes(num_train=4000, num_test=1000, **KNOBS)
OTHER_SHAPES = Shapes(num_train=4000, num_test=1000, seed=1, **KNOBS)  # settings are chosen on these
VIEW = View(size=16, crop=(0.6, 1.0))
CONTRASTIVE = replace(VIEW, crop=(0.3, 1.0), color_jitter=(0.4, 0.4, 0.0, 0.0), interpolation="bilinear")
PHOTOGRAPH = replace(VIEW, size=32)
PHOTOGRAPH_CONTRASTIVE = replace(PHOTOGRAPH, crop=(0.2, 1.0), color_jitter=(0.4, 0.4, 0.4, 0.1), grayscale=0.2)
WIDTH, BATCH, STRIDE, BIN_WIDTH, TEMPERATURE = 16, 64, 4, 10.0, 0.2
LR = {"colorization": 1e-2, "regression": 1e-2, "context encoder": 1e-2, "SimCLR": 1e-2, "supervised": 1e-2}
LRS = (3e-3, 1e-2)
STEPS = {"settings": 150, "shapes": 200, "sabotage": 150, "photographs": 150, "inpainting": 150}
PHOTOGRAPHS = (2000, 500)
ADVERSARIAL_WEIGHTS = (0.0, 0.001, 0.1)
METHODS = ("colorization", "regression", "context encoder", "SimCLR")
COLORS = ("by shape", "at random", "one")

AS_IT_IS = "as it should be"
VARIANTS: dict[str, dict] = {
    AS_IT_IS: {},
    "squared error": {"name": "regression"},
    "absolute error": {"name": "regression", "power": 1},
    "no rebalancing": {"rebalance": 1.0},
    "almost only rebalancing": {"rebalance": 1e-3},
    "bins of width 40": {"bin_width": 40.0},
    "color in the input": {"kind": Seeing},
    "colors at random": {"colors": "at random"},
    "colors at random, lightness tells them": {"colors": "at random", "leak": True},
    f"context encoder, {AS_IT_IS}": {"name": "context encoder", "colors": "none"},
    "context encoder, nothing masked": {"name": "context encoder", "colors": "none", "kind": Unmasked},
    "context encoder, one cell of 16 masked": {"name": "context encoder", "colors": "none", "mask_ratio": 1 / 16},
}


def make(
    seed: int, name: str = "colorization", *, kind: type[Method] | None = None, view: View = VIEW, **options
) -> Method:
    """A method, or one of its variants."""
    torch.manual_seed(seed)
    backbone = ConvNet(WIDTH)
    if name == "context encoder":
        chosen = {"mask_ratio": 0.25, "mask_grid": 4, "overlap": 1, "decoder_dim": 64} | options
        method = (kind or ContextEncoder)(backbone, view, **chosen)
    elif name == "SimCLR":
        projector = MLP(4 * WIDTH, 256, 64, num_layers=3, last_batch_norm="affine")
        method = SimCLR(backbone, view, TEMPERATURE, projector=projector)
    else:
        chosen = {"stride": STRIDE, "bin_width": BIN_WIDTH} | options
        method = (kind or (Regression if name == "regression" else Colorization))(backbone, view, **chosen)
    return method.to(default_device())


def fit(
    seed: int,
    data: Data,
    steps: int,
    name: str = "colorization",
    *,
    lr: float | None = None,
    watch: Callable[[int, Method], None] = lambda step, method: None,
    **options,
) -> tuple[Method, dict[str, float]]:
    """Train a method; it, and the mean of the last twenty steps' log. SimCLR has two views, so half of the steps."""
    method = make(seed, name, **options)
    half = 2 if name == "SimCLR" else 1
    run = batches(data, method.views(), BATCH, steps // half, seed)
    log = train(method, run, lr or LR[name], watch=watch)
    return method, {key.replace("color_accuracy", "task"): value for key, value in log.items()}


def known(shapes: Shapes, split: str) -> dict[str, Tensor]:
    """The factors of the gray images, and the color of each image, which they do not show where it is random."""
    found = shapes.render(split)[1]
    shown = {name: found[name] for name in ("shape", "x", "y", "scale", "orientation")}
    color = (angles_of(found["shape"], "at random", shapes.seed) * 10 / (2 * torch.pi)).round().long()
    return {**shown, "contrast": gains(len(color), shapes.seed), "random color": color}


# -- commands ----------------------------------------------------------------------------------------------------------


def settings(num_seeds: int, resume: bool) -> None:
    """`colorization_settings`: learning rates, on images of another seed, which no other result uses."""
    steps, table = STEPS["settings"], {}
    data, gray = painted(OTHER_SHAPES, "by shape"), painted(OTHER_SHAPES, "none")
    for lr in LRS:
        for name in METHODS:
            view = CONTRASTIVE if name == "SimCLR" else VIEW
            given = data if name in METHODS[:2] else gray
            method, _ = fit(100, given, steps, name, lr=lr, view=view)
            note(table, f"{name}, learning rate {lr:g}", score(method.backbone, gray, 16))
        fresh = make(100).backbone
        train_supervised(fresh, gray, VIEW, steps, BATCH, 100, lr)
        note(table, f"supervised, learning rate {lr:g}", score(fresh, gray, 16))
    about = {"steps": steps, "batch": BATCH, "shapes seed": 1}
    results.save("colorization_settings", table, seeds=[100], settings=about)


def shapes(num_seeds: int, resume: bool) -> None:
    """`colorization_shapes`, `colorization_factors`: the methods beside their controls, all measured on gray images."""
    steps, probed = STEPS["shapes"], {}
    about = {"steps": steps, "batch": BATCH, "images": SHAPES.num_train, "steps of SimCLR": steps // 2}
    rows: Table
    (rows,), done = begin(["colorization_shapes"], about, resume)
    data, gray = {colors: painted(SHAPES, colors) for colors in COLORS}, painted(SHAPES, "none")
    facts = known(SHAPES, "train"), known(SHAPES, "test")

    def measure(row: str, network: nn.Module, seed: int = 0, **log: float) -> None:
        note(rows, row, {**score(network, gray, 16), **log})
        if seed:
            return  # the factors of one seed are enough for what the chapter says of them
        x, _, test_x, _ = features(network, gray, 16)
        for name, value in factors.probe(x, facts[0], test_x, facts[1]).items():
            probed.setdefault(name, {}).setdefault(row, []).append(round(value, 2))

    if not done:
        for name, level in factors.chance_levels(*facts).items():
            probed[name] = {"chance": [round(level, 2)]}
        rows |= {f"colorization, {colors}": {} for colors in COLORS}
        rows |= {row: {} for row in ("regression, by shape", *METHODS[2:], "random weights", "pixels", "supervised")}
        measure("pixels", nn.Flatten())
    for seed in range(done, num_seeds):
        fresh = make(seed).backbone
        measure("random weights", fresh, seed)
        for colors in COLORS:
            method, log = fit(seed, data[colors], steps)
            measure(f"colorization, {colors}", method.backbone, seed, **log)
        method, _ = fit(seed, data["by shape"], steps, "regression")
        measure("regression, by shape", method.backbone, seed)
        for name, view in (("context encoder", VIEW), ("SimCLR", CONTRASTIVE)):
            method, _ = fit(seed, gray, steps, name, view=view)
            measure(name, method.backbone, seed)
        train_supervised(fresh, gray, VIEW, steps, BATCH, seed, LR["supervised"])
        measure("supervised", fresh, seed)
        results.save("colorization_shapes", rows, seeds=list(range(seed + 1)), settings=about)
        if not seed:
            results.save("colorization_factors", probed, seeds=[0], settings=about)


def sabotage(num_seeds: int, resume: bool) -> None:
    """`colorization_sabotage`: one part removed or replaced at a time, on the same shapes."""
    steps = STEPS["sabotage"]
    about = {"steps": steps, "batch": BATCH, "images": SHAPES.num_train}
    (table,), done = begin(["colorization_sabotage"], about, resume)
    gray = painted(SHAPES, "none")
    for seed in range(done, num_seeds):
        note(table, "random weights", held_out(make(seed).backbone, gray, 16))
        for row, options in VARIANTS.items():
            options = dict(options)
            colors, leak = options.pop("colors", "by shape"), options.pop("leak", False)
            method, log = fit(
                seed, painted(SHAPES, colors, leak=leak), steps, options.pop("name", METHODS[0]), **options
            )
            seen = painted(SHAPES, "none", leak=True) if leak else gray
            note(table, row, {**log, **held_out(method.backbone, seen, 16)})
        leaked = painted(SHAPES, "none", leak=True)
        note(table, "random weights, lightness tells the colors", held_out(make(seed).backbone, leaked, 16))
        results.save("colorization_sabotage", table, seeds=list(range(seed + 1)), settings=about)


def photographs(num_seeds: int, resume: bool) -> None:
    """`colorization_photographs`: CIFAR-10, beside the controls; how colorful the predictions are on test images."""
    data, steps = cifar10(*PHOTOGRAPHS), STEPS["photographs"]
    about = {"steps": steps, "batch": BATCH, "images": PHOTOGRAPHS[0], "test images": PHOTOGRAPHS[1], "data": data.name}
    rows: Table
    (rows,), done = begin(["colorization_photographs"], about, resume)
    colored: dict[str, tuple[str, dict]] = {
        "colorization": ("colorization", {}),
        "colorization, no rebalancing": ("colorization", {"rebalance": 1.0}),
        "regression": ("regression", {}),
    }
    if not done:
        rows |= {row: {} for row in (*colored, *METHODS[2:], "random weights", "pixels", "supervised")}
        note(rows, "pixels", score(nn.Flatten(), data, 32))
    for seed in range(done, num_seeds):
        fresh = make(seed, view=PHOTOGRAPH).backbone
        note(rows, "random weights", score(fresh, data, 32))
        kept = {}
        for row, (name, options) in colored.items():
            method, _ = fit(seed, data, steps, name, view=PHOTOGRAPH, **options)
            kept[row] = method.eval()
            note(rows, row, {**score(method.backbone, data, 32), **chroma(method, data)})
        for name, view in (("context encoder", PHOTOGRAPH), ("SimCLR", PHOTOGRAPH_CONTRASTIVE)):
            method, _ = fit(seed, data, steps, name, view=view)
            note(rows, name, score(method.backbone, data, 32))
        train_supervised(fresh, data, PHOTOGRAPH, steps, BATCH, seed, LR["supervised"])
        note(rows, "supervised", score(fresh, data, 32))
        if seed == 0:
            store({row: method for row, method in kept.items()}, "colorization_cifar10", "photographs", about)
        results.save("colorization_photographs", rows, seeds=list(range(seed + 1)), settings=about)


def make_inpainter(seed: int, weight: float) -> Adversarial:
    torch.manual_seed(seed)
    backbone = ConvNet(WIDTH // 2)
    return Adversarial(backbone, PHOTOGRAPH, weight, overlap=1, decoder_dim=32).to(default_device())


def inpainting(num_seeds: int, resume: bool) -> None:
    """`colorization_inpainting`: the middle of photographs, by squared error and with the adversarial term."""
    data, steps = cifar10(*PHOTOGRAPHS), STEPS["inpainting"]
    about = {
        "steps": steps,
        "batch": BATCH // 2,
        "images": PHOTOGRAPHS[0],
        "test images": PHOTOGRAPHS[1],
        "data": data.name,
    }
    rows: Table
    (rows,), done = begin(["colorization_inpainting"], about, resume)
    center = View.center(32)
    x = torch.cat([batch.views[0] for batch in data.evaluation_batches("test", center, device=default_device())])
    inside = (slice(None), slice(None), slice(9, 23), slice(9, 23))
    for seed in range(done, num_seeds):
        kept = {}
        for weight in ADVERSARIAL_WEIGHTS:
            method = make_inpainter(seed, weight)
            parts = dict(method.named_parameters())
            groups = [
                {"params": [p for name, p in parts.items() if ("discriminator" in name) == told], "lr": lr}
                for told, lr in ((False, LR["context encoder"]), (True, LR["context encoder"] / 10))
            ]
            log = train(method, batches(data, (PHOTOGRAPH,), BATCH // 2, steps, seed), 1.0, groups=groups)
            kept[f"{weight:g}"] = method.eval()
            filled = method.reconstruct(x, torch.arange(len(x), device=x.device))[1][inside]
            found = {
                "squared error": (filled - x[inside]).square().mean().item(),
                "sharpness, % of the photographs'": 100 * gradient_energy(filled) / gradient_energy(x[inside]),
            }
            note(rows, f"adversarial weight {weight:g}", {**found, **{k: v for k, v in log.items() if "disc" in k}})
        if seed == 0:
            store(kept, "colorization_inpainted", "inpainting", about)
        results.save("colorization_inpainting", rows, seeds=list(range(seed + 1)), settings=about)


def store(methods: dict[str, Method], name: str, command: str, about: dict) -> None:
    """The weights of several methods in one file, in half precision, and a description beside it."""
    folder = results.book() / "checkpoints"
    weights = {
        f"{row}/{key}": value.cpu().half() if value.is_floating_point() else value.cpu().clone()
        for row, method in methods.items()
        for key, value in method.state_dict().items()
        if "discriminator" not in key
    }
    save_file(weights, folder / f"{name}.safetensors", metadata={"format": "pt"})
    command = f"python book/chapters/colorization/experiments.py {command}"
    facts = {"method": list(methods), "command": command, "seed": 0, "settings": about}
    facts |= {"commit": results.commit(folder), "torch": torch.__version__}
    (folder / f"{name}.json").write_text(json.dumps(facts, indent=2) + "\n")


def restore(method: Method, name: str, row: str) -> Method:
    """A method with the weights of `row` in a checkpoint that `store` wrote."""
    from safetensors.torch import load_file

    found = load_file(results.book() / "checkpoints" / f"{name}.safetensors")
    chosen = {key.removeprefix(f"{row}/"): value for key, value in found.items() if key.startswith(f"{row}/")}
    method.load_state_dict(chosen, strict=not any("discriminator" in key for key in method.state_dict()))
    return method.to(default_device()).eval()


if __name__ == "__main__":
    main(__doc__, settings, shapes, sabotage, photographs, inpainting)
