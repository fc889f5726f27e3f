"""What a finished run shows: accuracies beside their controls, and images a person wants to look at."""

import copy
import json
import time
from pathlib import Path
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from sslbook import checkpoint
from sslbook.data.executors import apply_one
from sslbook.data.loader import Data
from sslbook.data.views import View
from sslbook.engine.hooks import read_metrics
from sslbook.engine.run import Run
from sslbook.evaluation import controls, factors, knn, linear
from sslbook.evaluation.features import center_view, extract_features, extract_with_index
from sslbook.evaluation.table import Row, chance_row, format_factors, format_table, to_json
from sslbook.methods.base import Method
from sslbook.notebook import plots, style

Split = Literal["train", "test"]
MAP_POINTS = 1000  # UMAP of more takes minutes and shows no more


def evaluation_view(view: View) -> View:
    """The image's center at the size a method was trained with; large images are first made 8/7 of it."""
    return center_view(view.size, view.mean, view.std)


def quick_knn(method: Method, data: Data, device: torch.device, k: int, limit: int) -> float:
    """kNN accuracy (percent) of a method's backbone, with at most `limit` training images voting."""
    view = evaluation_view(method.views()[0])
    some = data
    if data.num_train > limit:
        some = copy.copy(data)
        some.limit = limit
        some.__dict__.pop("_sets", None)  # which it chooses anew
    train_x, train_y = extract_features(method.backbone, some, "train", view, device=device, progress=False)
    test_x, test_y = extract_features(method.backbone, some, "test", view, device=device, progress=False)
    return knn.accuracy(train_x, train_y, test_x, test_y, k=k)


def report(run: Run, full: bool = True) -> dict[str, object]:
    """Measure the backbone beside its controls, print the table, draw the images, write `report.json`.

    Args:
        run: a finished run.
        full: also train the supervised control.
    """
    folder, data = run.folder, run.data
    view = evaluation_view(run.method.views()[0])
    images = max(1, run.clock.step * run.batch_size)
    result: dict[str, object] = {
        "run": folder.name,
        "steps": run.clock.step,
        "train_seconds": round(run.seconds, 1),
        "seconds_per_1000": round(1000 * run.seconds / images, 4),
        "peak_memory": round(run.peak_memory),
    }
    if data.skipped:
        print(f"skipped {data.skipped} images that could not be read")
        result["skipped"] = data.skipped
    before = _fresh(run) if (folder / "initial.safetensors").exists() else None
    labeled = data.has_test_labels
    split: Split = "test" if data.num_test else "train"
    features, places = {}, torch.arange(0)
    if labeled:
        rows, scores = [], {}
        for name, backbone in (("start", before), (type(run.method).__name__, run.method.backbone)):
            if backbone is None:
                continue
            began = time.perf_counter()
            train = extract_features(backbone, data, "train", view, device=run.device)
            x, y, places = extract_with_index(backbone, data, "test", view, device=run.device)
            test, features[name] = (x, y), x
            shown = {"start": "random weights"}.get(name, name)
            accuracy = linear.probe(*train, *test, device=run.device).accuracy
            vote = knn.accuracy(*train, *test, device=run.device)
            rows.append(Row(shown, knn=vote, linear=accuracy, seconds=time.perf_counter() - began))
            if data.factors("test"):
                scores[shown] = factors.probe(train[0], data.factors("train"), test[0], data.factors("test"))
        rows = [rows[-1], controls.pixels(data, view, device=run.device), *rows[:-1]]
        if full and before is not None and not bool((data.labels("pretrain") >= 0).any()):
            print("the images to learn from have no labels, so there is no supervised control")
        elif full and before is not None:
            transformer = any(name.endswith("attn") for name, _ in before.named_modules())
            rows.append(
                controls.supervised(
                    copy.deepcopy(before),
                    data,
                    run.method.views()[0],
                    steps=run.clock.total_steps,
                    batch_size=run.batch_size,
                    evaluation_view=view,
                    lr=1e-3 if transformer else 3e-3,
                    device=run.device,
                )
            )
        chance = chance_row(data)
        result["rows"] = to_json(rows, chance)
        print(f"\nAccuracy on {data.num_test:,} test images\n{format_table(rows, chance)}")
        if scores:
            scores = dict(reversed(scores.items()))  # the method first
            level = factors.chance_levels(data.factors("train"), data.factors("test"))
            result["factors"] = {**scores, "chance": level}
            print(f"\nWhat the features know of each factor\n{format_factors(scores, level)}")
    else:
        print("no labels, or no labeled test images, so no accuracy is reported; the images below still are")
        for name, backbone in (("start", before), (type(run.method).__name__, run.method.backbone)):
            if backbone is not None:
                features[name], _, places = extract_with_index(backbone, data, split, view, device=run.device)
    checkpoint.write_text(folder / "report.json", json.dumps(result, indent=2) + "\n")

    plot_curves(run)
    plot_views(run)
    plot_reconstructions(run)
    plot_neighbors(run, features, split, places)
    plot_umap(run, list(features.values())[-1], split, places)
    made = ", ".join(sorted(p.name for p in folder.glob("*.png")))
    print(f"\nIn {folder}: {made}; report.json; backbone.safetensors")
    return result


def _fresh(run: Run) -> nn.Module:
    """The backbone as it was before the first step."""
    from safetensors.torch import load_file

    backbone = copy.deepcopy(run.method.backbone).cpu()
    backbone.load_state_dict(load_file(run.folder / "initial.safetensors"))
    return backbone.to(run.device)


# -- images ----------------------------------------------------------------------------------------------------------


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
    figure, axes = style.figure(alt, 1 + bool(measured), 1, **shape)
    axes[0, 0].plot(*zip(*losses), color=style.BLUE)
    axes[0, 0].set(ylabel="loss")
    axes[-1, 0].set(xlabel="step")
    for i, name in enumerate(measured):
        points = [(line["step"], line[name]) for line in lines if name in line and "loss" not in line]
        axes[1, 0].plot(*zip(*points), color=style.COLORS[i + 1], marker="o", markersize=3)
        axes[1, 0].annotate(f" {name}", points[-1], color=style.COLORS[i + 1], va="center")
        axes[1, 0].set(ylabel="accuracy (%)")
    _save(figure, run.folder / "curves.png")


def plot_views(run: Run, rows: int = 4, draws: int = 7) -> None:
    """`views.png`: an image in each row, as it is and as the method sees it in several epochs."""
    data, views = run.data, run.method.views()
    shown, titles = [], []
    count = len(data.labels("train"))
    side = max(view.size for view in views)  # small crops are drawn as large as the others
    for row in range(min(rows, count)):
        position = row * count // rows
        image = data.image("train", position)
        whole = View.center(side, mean=(0, 0, 0), std=(1, 1, 1))
        shown.append(apply_one(whole, image, 0, 0, position, 0))
        titles.append("image" if row == 0 else "")
        for draw in range(draws):
            stream, epoch = draw % len(views), draw // len(views)
            view = views[stream]
            seen = apply_one(view, image, run.clock.seed, epoch, position, stream)
            seen = plots.denormalize(seen, view.mean, view.std)
            shown.append(torch.nn.functional.interpolate(seen[None], side)[0])
            name = f"view {stream + 1}" if len(views) > 1 else "view"
            titles.append(f"{name}" if row == 0 else "")
    alt = f"{rows} images, each followed by {draws} random views of it."
    inch = 0.9 if views[0].size < 64 else 1.2
    _save(plots.grid(torch.stack(shown), titles, alt=alt, columns=draws + 1, inch=inch), run.folder / "views.png")


def plot_reconstructions(run: Run, rows: int = 6) -> None:
    """`reconstructions.png`: image, what was visible, what the method painted; for methods that paint."""
    reconstruct = getattr(run.method, "reconstruct", None)
    if reconstruct is None:
        return
    view = evaluation_view(run.method.views()[0])
    split: Split = "test" if run.data.num_test else "train"
    batch = next(iter(run.data.evaluation_batches(split, view, 64, run.device)))
    chosen = torch.arange(min(rows, len(batch.index))) * (len(batch.index) // min(rows, len(batch.index)))
    images, index = batch.views[0][chosen], batch.index[chosen]
    was_training = run.method.training
    run.method.eval()
    masked, painted = reconstruct(images, index, run.clock)
    run.method.train(was_training)
    columns = [plots.denormalize(x.float().cpu(), view.mean, view.std) for x in (images, masked, painted)]
    shown = torch.stack(columns, dim=1).flatten(0, 1)
    titles = ["image", "visible", "painted"] * len(chosen)
    alt = "Images, what the encoder saw of them, and what the decoder painted in the gaps."
    titles = [title if i < 6 else "" for i, title in enumerate(titles)]
    _save(plots.grid(shown, titles, alt=alt, columns=6, inch=1.1), run.folder / "reconstructions.png")


def plot_neighbors(
    run: Run,
    features: dict[str, Float[Tensor, "n d"]],
    split: Split,
    places: Int[Tensor, "n"],
    rows: int = 6,
    k: int = 6,
) -> None:
    """`neighbors.png`: nearest neighbors of a few images, before training and after.

    `places` are the features' places in the split, which images that cannot be read leave gaps in.
    """
    data, view = run.data, evaluation_view(run.method.views()[0])
    count = len(next(iter(features.values())))
    k, rows = min(k, count - 1), min(rows, count)
    if k < 1:
        return
    queries = (torch.arange(rows) * count // rows).tolist()
    labels = data.labels(split)[places]
    show = View.center(min(96, view.size), mean=(0, 0, 0), std=(1, 1, 1))

    def image(row: int) -> Tensor:
        place = int(places[row])
        return apply_one(show, data.image(split, place), 0, 0, place, 0)

    for name, x in features.items():
        _, found = knn.neighbors(x, x[queries], k + 1)
        kept = [[j for j in row.tolist() if j != q][:k] for q, row in zip(queries, found)]
        sheet = torch.stack([torch.stack([image(j) for j in row]) for row in kept])
        same = torch.stack([labels[row] == labels[q] for q, row in zip(queries, kept)]) if labels.max() >= 0 else None
        when = "before" if name == "start" else "after"
        alt = f"Each row: an image and its {k} nearest neighbors {when} training; green frames share its class."
        figure = plots.neighbors(torch.stack([image(q) for q in queries]), sheet, same, alt=alt)
        figure.suptitle(f"nearest neighbors {when} training", fontsize=10)
        _save(figure, run.folder / f"neighbors_{when}.png")


def plot_umap(run: Run, x: Float[Tensor, "n d"], split: Split, places: Int[Tensor, "n"]) -> None:
    """`umap.png`: the features in the plane (McInnes, Healy and Melville, 2018), colored by class if there are any."""
    if len(x) < 16:
        return
    print("drawing the UMAP map ...", flush=True)
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from umap import UMAP

        chosen = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))[:MAP_POINTS]
        neighbors = min(15, len(chosen) - 1)
        mapper = UMAP(n_neighbors=neighbors, metric="cosine", random_state=0, n_jobs=1, init="pca")
        points = torch.from_numpy(mapper.fit_transform(x[chosen].numpy())).float()
    labels = run.data.labels(split)[places[chosen]]
    alt = f"UMAP map of the features of {len(chosen)} images, colored by class."
    names = run.data.class_names if run.data.num_classes <= 20 and labels.min() >= 0 else ()
    _save(plots.scatter(points, labels, names, alt=alt), run.folder / "umap.png")
