"""Report of a finished run: metrics beside their controls, and images of what was learned."""

import copy
import json
import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor, nn

from sslbook import checkpoint
from sslbook.data.executors import apply_one
from sslbook.data.views import View
from sslbook.engine.hooks import read_metrics
from sslbook.engine.run import Run
from sslbook.errors import UserError
from sslbook.evaluation import base, controls
from sslbook.evaluation.features import Features, Split, evaluation_view
from sslbook.evaluation.protocols.knn import neighbors
from sslbook.notebook import plots, style

MAP_POINTS = 1000  # UMAP of more takes minutes and shows no more


def report(run: Run, full: bool = False, protocols: Sequence[str] | None = None) -> dict[str, object]:
    """Measure the backbone beside its controls, print the tables, write `report.json`, then plot.

    Args:
        run: a finished run.
        full: also train the supervised control, which takes about as long as the run.
        protocols: names or import paths; by default those of `sslbook.evaluation.base.DEFAULT` that the data allow.

    Returns:
        What `report.json` holds: costs of the run, and `tables` as from `sslbook.evaluation.base.measure`.

    Raises:
        UserError: there is no such protocol, or the data or the backbone lack what it needs.
    """
    folder, data, method = run.folder, run.data, run.method
    view = evaluation_view(method.views()[0])
    seen = max(1, run.clock.step * run.batch_size)
    result: dict[str, object] = {
        "run": folder.name,
        "steps": run.clock.step,
        "train_seconds": round(run.seconds, 1),
        "seconds_per_1000": round(1000 * run.seconds / seen, 4),
        "peak_memory": round(run.peak_memory),
    }
    name = type(method).__name__
    models = {name: base.Representation(method.backbone, data, view, run.device)}
    if data.has_test_labels:
        models["pixels"] = controls.pixels(data, view, device=run.device)
    initial = _initial(run)
    if initial is not None:
        models["random weights"] = base.Representation(initial, data, view, run.device)
    measured = base.chosen(protocols, method.backbone, data)
    if measured:
        tables = base.measure(models, measured)
        print(f"\n{base.format_tables(tables, measured, data)}", flush=True)
        if full and initial is not None:
            try:
                extra = base.measure({"supervised": _supervised(run, initial, view)}, measured)
            except UserError as error:  # of a control, which must not cost the report
                print(f"no supervised control: {error}")
                extra = {}
            for table, rows in extra.items():
                chance = tables[table].pop("chance", None)
                tables[table] |= rows if chance is None else {**rows, "chance": chance}
            print(f"\n{base.format_tables(tables, measured, data)}" if extra else "", flush=True)
        result["tables"] = tables
    else:
        print(
            "no labeled images for training and test, so nothing is measured: give folders train/CLASS and test/CLASS"
        )
    if data.skipped:
        print(f"skipped {data.skipped} images that could not be read")
        result["skipped"] = data.skipped
    checkpoint.write_text(folder / "report.json", json.dumps(result, indent=2) + "\n")

    split: Split = "test" if data.num_test else "train"
    plot_curves(run)
    plot_views(run)
    plot_reconstructions(run)
    for when, model in (("after", models[name]), ("before", models.get("random weights"))):
        if model is not None:
            plot_neighbors(run, model.features(split), split, when)
    plot_umap(run, models[name].features(split), split)
    made = ", ".join(sorted(p.name for p in folder.glob("*.png")))
    print(f"\nIn {folder}: {made}; report.json; backbone.safetensors")
    if measured:
        _print_more(run, measured, supervised=full)
    return result


def _initial(run: Run) -> nn.Module | None:
    """The backbone as it was before the first step, if the run kept it."""
    from sslbook.weights.backbone import read_safetensors

    if not (run.folder / "initial.safetensors").exists():
        return None
    backbone = copy.deepcopy(run.method.backbone).cpu()
    backbone.load_state_dict(read_safetensors(run.folder / "initial.safetensors"))
    return backbone.to(run.device)


def _supervised(run: Run, initial: nn.Module, view: View) -> base.Representation:
    """The same network, trained with labels for as many steps on the same views."""
    backbone = copy.deepcopy(initial)
    transformer = any(name.endswith("attn") for name, _ in backbone.named_modules())
    controls.train_supervised(
        backbone,
        run.data,
        run.method.views()[0],
        steps=run.clock.total_steps,
        batch_size=run.batch_size,
        evaluation_view=view,
        lr=1e-3 if transformer else 3e-3,
        device=run.device,
    )
    return base.Representation(backbone, run.data, view, run.device)


def _print_more(run: Run, measured: Sequence[base.Protocol], supervised: bool) -> None:
    """What else could be measured, how, and what it costs."""
    lines, done = [], [protocol.name for protocol in measured]
    kinds = [base.find(name) for name in base.available()]
    others = [kind() for kind in kinds if kind.uses_data and kind.name not in done]  # the rest name images of their own
    if names := [other.name for other in others if other.lacks(run.method.backbone, run.data) is None]:
        lines.append(f"  python -m sslbook.evaluate PROTOCOL {run.folder}   ({', '.join(names)})")
    if not supervised:
        again = f"python -m sslbook.train --resume {run.folder} --report full"
        lines.append(f"  {again}   (also a network trained with labels, about {max(1, run.seconds):,.0f} s)")
    if lines:
        print("\n".join(["More can be measured:", *lines]))


# -- images ------------------------------------------------------------------------------------------------------------


def _save(figure: style.Figure, path: Path) -> None:
    checkpoint.write_atomically(path, lambda part: figure.savefig(part, format="png", dpi=144, facecolor="white"))


def plot_curves(run: Run) -> None:
    """`curves.png`: the loss, and what was measured on the way."""
    lines = read_metrics(run.folder / "metrics.jsonl") if (run.folder / "metrics.jsonl").exists() else []
    losses = [(line["step"], line["loss"]) for line in lines if "loss" in line]
    measured = sorted({key for line in lines if "loss" not in line for key in line} - {"step", "epoch"})
    if not losses:
        return
    alt = f"Training loss from {losses[0][1]:.3g} to {losses[-1][1]:.3g} over {losses[-1][0]} steps."
    shape = {"width": 5.6, "height": 2.6 * (1 + bool(measured)), "squeeze": False, "sharex": True}
    figure, axes = style.figure(alt, 1 + bool(measured), 1, caption=None, **shape)
    axes[0, 0].plot(*zip(*losses), color=style.BLUE)
    axes[0, 0].set(ylabel="loss")
    axes[-1, 0].set(xlabel="step")
    for i, name in enumerate(measured):
        points = [(line["step"], line[name]) for line in lines if name in line and "loss" not in line]
        axes[1, 0].plot(*zip(*points), color=style.COLORS[i + 1], marker="o", markersize=3)
        axes[1, 0].annotate(f" {name}", points[-1], color=style.COLORS[i + 1], va="center")
        axes[1, 0].set(ylabel="accuracy (%)")
    _save(figure, run.folder / "curves.png")


def plot_views(run: Run, rows: int = 4, columns: int = 7) -> None:
    """`views.png`: an image in each row, and its views in several epochs."""
    data, views = run.data, run.method.views()
    shown, titles = [], []
    count = len(data.labels("train"))
    rows = min(rows, count)
    side = max(view.size for view in views)  # small crops are shown as large as the others
    for row in range(rows):
        position = row * count // rows
        image = data.image("train", position)
        shown.append(apply_one(View.center(side, mean=(0, 0, 0), std=(1, 1, 1)), image, 0, 0, position, 0))
        titles.append("" if row else "image")
        for column in range(columns):
            stream, epoch = column % len(views), column // len(views)
            view = replace(views[stream], mean=(0, 0, 0), std=(1, 1, 1))
            made = apply_one(view, image, run.clock.seed, epoch, position, stream).clamp(0, 1)
            shown.append(torch.nn.functional.interpolate(made[None], side)[0])
            titles.append("" if row else f"view {stream + 1}" if len(views) > 1 else "view")
    alt = f"{rows} images, each followed by {columns} random views of it."
    inch = 0.9 if views[0].size < 64 else 1.2
    figure = plots.grid(torch.stack(shown), titles, alt=alt, caption=None, columns=columns + 1, inch=inch)
    _save(figure, run.folder / "views.png")


def plot_reconstructions(run: Run, rows: int = 6) -> None:
    """`reconstructions.png`: image, its visible patches, and the image reconstructed, for methods that can."""
    reconstruct = getattr(run.method, "reconstruct", None)
    if reconstruct is None:
        return
    view = evaluation_view(run.method.views()[0])
    split: Split = "test" if run.data.num_test else "train"
    batch = next(iter(run.data.evaluation_batches(split, view, 64, run.device)))
    rows = min(rows, len(batch.index))
    some = torch.arange(rows) * (len(batch.index) // rows)
    was_training = run.method.training
    run.method.eval()
    visible, reconstructed = reconstruct(batch.views[0][some], batch.index[some], run.clock)
    run.method.train(was_training)
    view = run.data.adapted(view)
    columns = [
        plots.denormalize(x.float().cpu(), view.mean, view.std)[:, [0, 1, 2] if x.shape[1] >= 3 else [0, 0, 0]]
        for x in (batch.views[0][some], visible, reconstructed)
    ]
    titles = [title if i < 6 else "" for i, title in enumerate(["image", "visible", "reconstructed"] * rows)]
    alt = "Images, the patches of them that the encoder saw, and the images reconstructed by the decoder."
    figure = plots.grid(torch.stack(columns, dim=1).flatten(0, 1), titles, alt=alt, caption=None, columns=6, inch=1.1)
    _save(figure, run.folder / "reconstructions.png")


def plot_neighbors(run: Run, features: Features, split: Split, when: str, rows: int = 6, k: int = 6) -> None:
    """`neighbors_before.png`, `neighbors_after.png`: nearest neighbors of a few images, before or after training."""
    count = len(features.x)
    k, rows = min(k, count - 1), min(rows, count)
    if k < 1:
        return
    queries = (torch.arange(rows) * count // rows).tolist()
    size = evaluation_view(run.method.views()[0]).size
    show = View.center(min(96, size), mean=(0, 0, 0), std=(1, 1, 1))

    def image(row: int) -> Tensor:
        position = int(features.index[row])
        return apply_one(show, run.data.image(split, position), 0, 0, position, 0)

    _, found = neighbors(features.x, features.x[queries], k + 1)
    kept = [[j for j in row.tolist() if j != q][:k] for q, row in zip(queries, found)]
    sheet = torch.stack([torch.stack([image(j) for j in row]) for row in kept])
    y = features.y
    same = torch.stack([y[row] == y[q] for q, row in zip(queries, kept)]) if y.max() >= 0 else None
    alt = f"Each row: an image and its {k} nearest neighbors {when} training; green frames share its class."
    figure = plots.neighbors(torch.stack([image(q) for q in queries]), sheet, same, alt=alt, caption=None)
    figure.suptitle(f"nearest neighbors {when} training", fontsize=10)
    _save(figure, run.folder / f"neighbors_{when}.png")


def plot_umap(run: Run, features: Features, split: Split) -> None:
    """`umap.png`: the features in the plane (McInnes, Healy and Melville, 2018), colored by class if there are any."""
    if len(features.x) < 16:
        return
    print("computing the UMAP map ...", flush=True)
    some = torch.randperm(len(features.x), generator=torch.Generator().manual_seed(0))[:MAP_POINTS]
    points, labels = umap_positions(features.x[some]), features.y[some]
    named = 0 < run.data.num_classes <= 20 and bool(labels.min() >= 0)
    by = ", colored by class" if named else ""
    figure = plots.scatter(
        points,
        labels,
        run.data.class_names if named else (),
        alt=f"UMAP map of the features of {len(some)} {split} images{by}.",
        caption=None,
        title=f"{type(run.method).__name__}: UMAP of {len(some):,} {split} images{by}",
    )
    _save(figure, run.folder / "umap.png")


def umap_positions(x: Float[Tensor, "n d"]) -> Float[Tensor, "n 2"]:
    """Positions in the plane in which nearby features stay nearby; the same for the same features."""
    threads = torch.get_num_threads()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from umap import UMAP

        options = {"metric": "cosine", "init": "pca", "random_state": 0, "n_jobs": 1}
        mapper = UMAP(n_neighbors=min(15, len(x) - 1), min_dist=0.8, **options)  # so far apart that the plane is filled
        positions = torch.from_numpy(mapper.fit_transform(x.numpy())).float()
    torch.set_num_threads(threads)  # numba gives the OpenMP that torch uses a thread a core
    return positions
