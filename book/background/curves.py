"""Real runs on Shapes, healthy and not, for the page *Reading the curves*; a few minutes on one CPU core.

    python book/background/curves.py            trains them all, writes the result `curves` and plots it; goes on
                                                with what a stopped command has stored
    python book/background/curves.py --plot     plots the stored result into `book/background/curves/`

All runs of a family differ in one option only. What is measured besides the method's own metrics comes from a hook,
`EffectiveRank`, which any run can use:

    python -m sslbook.train byol --hooks+ sslbook.book.background.curves.EffectiveRank
"""

import argparse
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from sslbook import results
from sslbook.checkpoint import write_text
from sslbook.data.datasets.shapes import Shapes
from sslbook.data.loader import Batch, Data
from sslbook.data.views import View
from sslbook.engine.hooks import Hook, read_metrics
from sslbook.engine.loop import pretrain
from sslbook.engine.run import Run
from sslbook.evaluation import extract_features, knn
from sslbook.evaluation.features import evaluation_view
from sslbook.methods.base import Method
from sslbook.methods.byol import BYOL
from sslbook.methods.mae import MAE
from sslbook.methods.simclr import SimCLR
from sslbook.methods.swav import SwAV
from sslbook.methods.vicreg import VICReg
from sslbook.nn import ConvNet, VisionTransformer
from sslbook.notebook import style
from sslbook.schedules import Cosine, Warmup

BATCH, EVERY = 32, 3  # EVERY: epochs between measurements
STEPS = {"teacher": 500}  # learns more slowly than the others
IMAGES = Shapes(num_train=1000, num_test=300, background=0, position=0.6, scale=0.6, lighting=0, noise=0.3)
VIEW = View(size=16, crop=(0.3, 1.0), color_jitter=(0.4, 0.4, 0.4, 0.5), grayscale=0.2)
WHOLE = View(size=16, crop=None, mean=(0.5,) * 3, std=(0.25,) * 3)


def simclr(**options: Any) -> Method:
    return SimCLR(
        ConvNet(8), **{"view": VIEW, "temperature": 0.2, "projector_num_layers": 2, "projector_dim": 64, **options}
    )


def byol(**options: Any) -> Method:
    return BYOL(ConvNet(8), VIEW, VIEW, hidden_dim=128, projector_dim=32, **{"momentum": 0.9, **options})


def swav(**options: Any) -> Method:
    sizes = {"num_small": 0, "hidden_dim": 128, "projector_dim": 32, "num_prototypes": 100}
    return SwAV(ConvNet(8), VIEW, **{**sizes, "epsilon": 0.01, "freeze_prototypes": 0, **options})


def vicreg(**options: Any) -> Method:
    return VICReg(ConvNet(8), VIEW, VIEW, hidden_dim=128, projector_dim=64, projector_num_layers=2, **options)


def mae(**options: Any) -> Method:
    backbone = VisionTransformer(image_size=16, patch_size=4, dim=48, depth=3, num_heads=4, pool="mean")
    return MAE(backbone, WHOLE, norm_pix_loss=False, decoder_dim=32, decoder_depth=1, decoder_num_heads=4, **options)


# What differs from `healthy` in each run. In the order of the runs: first all healthy ones.
ORDER = ("healthy", "collapsed", "partly collapsed", "shortcut", "slow")
# family: (how its method is made, its learning rate, {state: what differs})
FAMILIES: dict[str, tuple[Any, float, dict[str, dict[str, Any]]]] = {
    "contrastive": (
        simclr,
        5e-3,
        {
            "healthy": {},
            "slow": {"lr": 5e-5},
            "partly collapsed": {"lr": 0.5},
            "shortcut": {"view": View(size=16, crop=(0.3, 1.0))},
        },
    ),
    "teacher": (
        byol,
        5e-3,
        {
            "healthy": {},
            "slow": {"lr": 5e-5},
            "partly collapsed": {"predictor": nn.Identity()},
            "collapsed": {"predictor": nn.Identity(), "momentum": 0.0},
        },
    ),
    "clustering": (
        swav,
        5e-3,
        {
            "healthy": {},
            "slow": {"lr": 5e-5},
            "partly collapsed": {"lr": 0.5},
            "collapsed": {"epsilon": 0.5},
        },
    ),
    "decorrelation": (
        vicreg,
        5e-3,
        {
            "healthy": {},
            "slow": {"lr": 5e-5},
            "partly collapsed": {"covariance_weight": 0.0},
            "collapsed": {"variance_weight": 0.0},
        },
    ),
    "masked": (
        mae,
        1.5e-3,
        {
            "healthy": {},
            "slow": {"lr": 3e-5},
            "partly collapsed": {"mask_ratio": 0.1},
            "collapsed": {"lr": 0.1},
        },
    ),
}


class Remembered(Data):
    """Keeps the batches it has made: the runs see the same views, which then cost once."""

    def batches(self, views: tuple[View, ...], batch_size: int, **options: Any) -> Iterator[Batch]:
        made = self.__dict__.setdefault("made", {})
        key = (views, batch_size, options["epoch"])
        if key not in made:
            made[key] = list(super().batches(views, batch_size, **{**options, "start": 0, "stop": None}))
        return iter(made[key][options.get("start", 0) : options.get("stop")])


FOLDER = Path(__file__).parent / "curves"
CAPTIONS = {
    "contrastive": "SimCLR. Views without color jitter give a lower loss and poorer features; a learning rate far too high "
    "leaves few directions.",
    "teacher": "BYOL. Without a predictor the loss is zero at once, and so is the standard deviation of the projections: all "
    "images get the same one. Both such runs lie on each other.",
    "clustering": "SwAV. Assignments that are too soft leave the loss at the logarithm of the number of prototypes; a learning "
    "rate far too high leaves few directions.",
    "decorrelation": "VICReg. Without the variance term the loss is zero and nothing is learned. Without the covariance term "
    "the features of this short run are as good; only the term itself shows what is wrong.",
    "masked": "MAE. A learning rate far too high makes all features alike, and the loss stays on a plateau. Nearest neighbors "
    "say little this early.",
}


def effective_rank(h: Float[Tensor, "n dim"]) -> float:
    """The exponential of the entropy of the centered features' singular values: how many directions are in use."""
    share = torch.linalg.svdvals((h - h.mean(0)).double())
    share = share / share.sum().clamp(min=1e-12)
    return torch.exp(torch.special.entr(share).sum()).item()


def features_std(h: Float[Tensor, "n dim"]) -> float:
    """As methods log it of projections: 0 if all features are the same, about 1 if they are uniform on the sphere."""
    z = torch.nn.functional.normalize(h, dim=1)
    return z.std(dim=0, correction=0).mean().item() * h.shape[1] ** 0.5


class EffectiveRank(Hook):
    """Effective rank, standard deviation and kNN accuracy of the backbone's features of test images. Needs labels.

    Args:
        every: epochs between measurements.
    """

    measures = ("knn", "effective_rank", "backbone_std")

    def __init__(self, every: int = 1) -> None:
        self.every = every

    def epoch(self, run: Run) -> None:
        if run.clock.epoch % self.every == 0 or run.clock.step >= run.clock.total_steps:
            run.evaluations.update(measure(run.method.backbone, run))


def measure(backbone: torch.nn.Module, run: Run) -> dict[str, float]:
    view = evaluation_view(run.method.views()[0])
    bank, queries = (extract_features(backbone, run.data, split, view, progress=False) for split in ("train", "test"))
    h = queries[0].float()
    rank, std = effective_rank(h), features_std(h)
    return {"knn": knn.accuracy(*bank, *queries), "effective_rank": rank, "backbone_std": std}


class Begin(Hook):
    """Measures once before the first step."""

    def start(self, run: Run) -> None:
        self.measured = measure(run.method.backbone, run)


def train(make: Any, lr: float, data: Data, options: dict[str, Any], steps: int) -> dict[str, list]:
    """The lines of the run's metrics.jsonl as one list per metric, of pairs (step, value)."""
    options = dict(options)
    adamw = partial(torch.optim.AdamW, lr=options.pop("lr", lr), weight_decay=0.01)
    torch.manual_seed(0)
    begin = Begin()
    with tempfile.TemporaryDirectory() as folder:
        pretrain(
            make(**options), data, adamw, Warmup("5 %", then=Cosine()), batch_size=BATCH, steps=steps, device="cpu",
            out_dir=f"{folder}/run", checkpoint_every="100000 steps", progress=False, hooks=[begin, EffectiveRank(EVERY)],
        )  # fmt: skip
        lines = read_metrics(Path(folder) / "run" / "metrics.jsonl")
    curves: dict[str, list] = {name: [[0, value]] for name, value in begin.measured.items()}
    for line in lines:
        for name, value in line.items():
            if name not in ("step", "epoch", "lr", "images_per_second", "seconds"):
                curves.setdefault(name, []).append([line["step"], float(f"{value:.4g}")])
    return curves


# -- plotting ----------------------------------------------------------------------------------------------------------


def panels(states: Mapping[str, Mapping[str, list]]) -> dict[str, str]:
    """What is plotted, with its title: the standard deviation is the method's own where it logs one."""
    std = "feature_std" if all("feature_std" in run for run in states.values()) else "backbone_std"
    return {"loss": "loss", "knn": "knn (%)", std: std, "effective_rank": "effective_rank"}


LINES = {
    "healthy": (style.GREEN, "-"),
    "slow": (style.BLUE, "--"),
    "partly collapsed": (style.AMBER, "-."),
    "collapsed": (style.ORANGE, ":"),
    "shortcut": (style.PINK, ":"),
}


def alt(family: str, states: Mapping[str, Mapping[str, list]]) -> str:
    """The figure in words, with each run's last values."""
    ends = [
        f"{state}: "
        + ", ".join(f"{title.split(' ')[0]} {run[name][-1][1]:.3g}" for name, title in panels(states).items())
        for state, run in states.items()
    ]
    return f"Four curves of {len(states)} runs of the family {family}. At the end, {'; '.join(ends)}."


def plot(family: str, states: Mapping[str, Mapping[str, list]]) -> str:
    """The family's curves as HTML: loss, kNN accuracy, standard deviation and effective rank."""
    fig, axes = style.figure(alt(family, states), 2, 2, height=4.6, caption=CAPTIONS[family], sharex=True)
    for ax, (name, label) in zip(axes.flat, panels(states).items()):
        for state, run in states.items():
            color, dashes = LINES[state]
            x, y = zip(*run[name])
            ax.plot(x, y, dashes, color=color, label=state)
        ax.set(title=label, ylim=(0, None) if name != "loss" else None)
    axes[0, 0].set_ylim(*limits([run["loss"] for run in states.values()]))
    for ax in axes[1]:
        ax.set_xlabel("step")
    fig.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside upper center", ncols=4, fontsize=9, frameon=False)
    return fig.html()


def limits(curves: Sequence[list]) -> tuple[float, float]:
    """From 0 to what all curves stay below after their first tenth."""
    return 0.0, 1.1 * max(value for curve in curves for _, value in curve[len(curve) // 10 :])


def table(found: Mapping[str, Mapping[str, Mapping[str, list]]], family: str) -> results.Table:
    """The last value of every metric of the family's runs; kNN before the first step, too."""
    rows = {
        state: {"knn at step 0": run["knn"][0][1], **{name: values[-1][1] for name, values in run.items()}}
        for state, run in found[family].items()
    }
    return results.Table(rows, digits=2, note=results.load("curves").origin())


def plot_all() -> None:
    found = results.load("curves").values
    for family, states in found.items():
        name = family.lower().replace(" ", "_").replace("-", "_")
        write_text(FOLDER / f"{name}.html", plot(family, states) + "\n")
        write_text(FOLDER / f"{name}_table.html", table(found, family)._repr_html_() + "\n")


def stored() -> dict[str, dict[str, dict[str, list]]]:
    """The runs of a command that was stopped, where their options are still the same."""
    found: dict[str, dict[str, dict[str, list]]] = {family: {} for family in FAMILIES}
    if (results.book() / "results" / "curves.json").is_file():
        result = results.load("curves")
        for family, states in FAMILIES.items():
            for state, options in states[2].items():
                run = result.values.get(family, {}).get(state)
                if run and result.settings["changes"][family].get(state) == str(options):
                    found[family][state] = run
    return found


def save(found: dict[str, dict[str, dict[str, list]]]) -> None:
    """After every run, so that a stopped command leaves what it has measured."""
    changes = {f: {state: str(options) for state, options in s.items()} for f, (_, _, s) in FAMILIES.items()}
    results.save("curves", found, seeds=[0], settings={"batch_size": BATCH, "changes": changes})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--plot", action="store_true", help="plot the stored result, train nothing")
    parser.add_argument("--only", nargs="*", default=[], help="FAMILY/STATE: try these, write no result")
    arguments = parser.parse_args()
    if not arguments.plot:
        data, found = Remembered(shapes=IMAGES), stored()
        for state in ORDER:
            for family, (make, lr, states) in FAMILIES.items():
                if (
                    state not in states
                    or state in found[family]
                    or (arguments.only and f"{family}/{state}" not in arguments.only)
                ):
                    continue
                run = found[family][state] = train(make, lr, data, states[state], STEPS.get(family, 300))
                last = {name: round(values[-1][1], 3) for name, values in run.items()}
                print(f"{family:18} {state:17} first kNN {run['knn'][0][1]:.1f}; last {last}", flush=True)
                if not arguments.only:
                    save(found)
        if arguments.only:
            return
    plot_all()


if __name__ == "__main__":
    main()
