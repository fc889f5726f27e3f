"""Results side by side: a row per set of features, kNN and linear accuracy, and the level of chance."""

from dataclasses import asdict, dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from sslbook.data.loader import Data
from sslbook.data.views import View
from sslbook.errors import UserError
from sslbook.evaluation import knn, linear
from sslbook.evaluation.factors import majority
from sslbook.evaluation.features import extract_features


@dataclass(frozen=True)
class Row:
    """One set of features, measured; percentages of test images named rightly.

    Args:
        name: whose features.
        knn: by their nearest neighbors; none if not measured.
        linear: by the linear probe; none if not measured.
        head: by the network's own classifier, where it has one.
        seconds: spent on training and measuring.
    """

    name: str
    knn: float | None = None
    linear: float | None = None
    head: float | None = None
    seconds: float | None = None


def measure(
    name: str,
    backbone: nn.Module,
    data: Data,
    view: View,
    *,
    device: torch.device | str | None = None,
    batch_size: int = 256,
    progress: bool = True,
    **options,
) -> Row:
    """Extract the features of both splits, and measure them.

    Args:
        name: the row's name.
        backbone: maps images to features.
        data: labeled images with a test split.
        view: a view without chance.
        device: where to compute; by default where the backbone is.
        batch_size: images at a time.
        progress: show bars.
        options: passed on to `score`.

    Raises:
        UserError: the data have no labels or no test images.
    """
    require_labels(data)
    given = {"device": device, "batch_size": batch_size, "progress": progress}
    train = extract_features(backbone, data, "train", view, **given)
    test = extract_features(backbone, data, "test", view, **given)
    return score(name, train, test, device=device, **options)


def score(
    name: str,
    train: tuple[Float[Tensor, "train dim"], Int[Tensor, "train"]],
    test: tuple[Float[Tensor, "test dim"], Int[Tensor, "test"]],
    *,
    protocols: tuple[str, ...] = ("knn", "linear"),
    k: int = 20,
    temperature: float = 0.07,
    seed: int = 0,
    device: torch.device | str | None = None,
) -> Row:
    """Measure features that are already there. Images without a label neither teach nor count.

    Args:
        name: the row's name.
        train: features and labels of the training images.
        test: features and labels of the test images.
        protocols: what to measure: `knn`, `linear`.
        k: neighbors asked by kNN.
        temperature: of kNN's votes.
        seed: key of the linear probe.
        device: where to compute; by default where the features are.
    """
    known = [part[labels >= 0] for features, labels in (train, test) for part in (features, labels)]
    row = {}
    if "knn" in protocols:
        row["knn"] = knn.accuracy(*known, k=k, temperature=temperature, device=device)
    if "linear" in protocols:
        row["linear"] = linear.probe(*known, seed=seed, device=device).accuracy
    return Row(name, **row)


def require_labels(data: Data) -> None:
    """Refuse data that no protocol can measure."""
    if data.num_classes == 0:
        raise UserError("the images have no labels, so nothing can be measured; put them into one folder per class")
    if data.num_test == 0:
        raise UserError("there are no test images to measure on; put some aside, into FOLDER/test/CLASS")
    if int(data.labels("test").max()) < 0:
        raise UserError("the test images have no labels; put them into folders named like those of train/")


def chance_row(data: Data) -> Row:
    """Always naming the most frequent training label: what knowing nothing yields."""
    train_y, test_y = data.labels("train"), data.labels("test")
    level = majority(train_y[train_y >= 0], test_y[test_y >= 0])
    return Row("chance", knn=level, linear=level)


def format_table(rows: list[Row], chance: Row | None = None) -> str:
    """Aligned plain text: one line per row, percentages with one decimal, the level of chance under a rule."""
    titles = {"knn": "kNN %", "linear": "linear %", "head": "own head %"}
    columns = [column for column in titles if any(getattr(row, column) is not None for row in rows)]
    width = max(len(row.name) for row in [*rows, *([chance] if chance else [])])
    sizes = [len(titles[column]) for column in columns]

    def line(name: str, cells: list[str]) -> str:
        return "  ".join([name.ljust(width), *(cell.rjust(size) for cell, size in zip(cells, sizes))]).rstrip()

    def body(row: Row) -> str:
        values = [getattr(row, column) for column in columns]
        return line(row.name, ["" if value is None else f"{value:.1f}" for value in values])

    lines = [line("", [titles[column] for column in columns]), *map(body, rows)]
    if chance is not None:
        lines += ["-" * (width + sum(sizes) + 2 * len(sizes)), body(chance)]
    return "\n".join(lines)


def format_factors(scores: dict[str, dict[str, float]], chance: dict[str, float]) -> str:
    """Aligned plain text: one line per factor, a column for each set of features, the level of chance last."""
    columns = [*scores, "chance"]
    width = max(len(name) for name in [*chance, "factor"])
    sizes = [max(len(column), 6) for column in columns]
    lines = ["  ".join(["factor".ljust(width), *(c.rjust(size) for c, size in zip(columns, sizes))])]
    for name, level in chance.items():
        cells = [f"{scores[column][name]:.1f}" for column in scores] + [f"{level:.1f}"]
        lines.append("  ".join([name.ljust(width), *(cell.rjust(size) for cell, size in zip(cells, sizes))]))
    return "\n".join(lines)


def to_json(rows: list[Row], chance: Row | None = None) -> list[dict[str, str | float]]:
    """The same rows for a file of results; what was not measured is left out."""
    every = [*rows, *([chance] if chance else [])]
    return [{key: value for key, value in asdict(row).items() if value is not None} for row in every]
