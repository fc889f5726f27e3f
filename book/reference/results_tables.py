"""The tables of results, rewritten from `book/results`: `results.md` has all, `choosing.md` families, the README ten.

    python book/reference/results_tables.py

Each table comes from a file that `python -m sslbook.compare` wrote. What stands between the two markers of a page is
replaced, everything else stays. In `results.md` a method links to its file and its recipe, a table to its result file.
"""

import re
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path

from sslbook import results
from sslbook.checkpoint import write_text
from sslbook.errors import UserError
from sslbook.methods import METHODS

ROOT = Path(__file__).parents[2]
BEGIN, END = "<!-- results -->", "<!-- /results -->"
FILES = "https://github.com/sslbook/sslbook/blob/main"
TITLES = {
    "shapes": "The Shapes data set",
    "shapes_seeds": "The Shapes data set, three seeds",
    "fashion_mnist": "Fashion-MNIST",
    "cifar10_jpeg": "CIFAR-10 (JPEG), 32 pixels",
    "cifar10_jpeg_all": "CIFAR-10 (JPEG), 10,000 images, 20 epochs, with the networks and sizes of the Shapes data set",
    "cifar10_jpeg_long": "The same for 60 epochs",
    "clothing_160": "Clothing, photographs of 160 pixels",
}
COLUMNS = {
    "kNN": ("kNN (%)", 1),
    "linear": ("linear (%)", 1),
    "kNN, untrained": ("kNN, untrained", 1),
    "linear, untrained": ("linear, untrained", 1),
    "kNN, pixels": ("kNN, pixels", 1),
    "linear, pixels": ("linear, pixels", 1),
    "s per 1,000": ("s per 1,000 images", 2),
    "memory (MB)": ("memory (MB)", 0),
}
TEN = ["SimCLR", "MoCoV3", "BYOL", "SwAV", "DINO", "VICReg", "IJEPA", "MAE", "DeepClusterV2", "Rotation"]
TOKENIZERS = ("dvae", "vqkd")  # trained for their vocabulary
CONTROLS = ["pixels", "random weights", "supervised", "chance"]

Values = Mapping[str, Mapping[str, float | Sequence[float]]]


def table(
    values: Values, columns: Mapping[str, tuple[str, int]] = COLUMNS, labels: Mapping[str, str] | None = None
) -> str:
    """A Markdown table with a line for every row of a result; a metric that a row lacks is left blank.

    Args:
        values: `{row: {column: number or one number per seed}}`.
        columns: from a column to its title and its digits behind the point.
        labels: what stands for the name of a row, such as a link.
    """
    columns = {c: look for c, look in columns.items() if any(c in metrics for metrics in values.values())}
    lines = ["| | " + " | ".join(title for title, _ in columns.values()) + " |", "|---|" + "---:|" * len(columns)]
    for row, metrics in values.items():
        cells = [results.number(metrics[c], digits) if c in metrics else "" for c, (_, digits) in columns.items()]
        lines.append(f"| {(labels or {}).get(row, row)} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def names() -> dict[str, str]:
    """From the name of a method's class, which is its row in a result, to the name of its file."""
    return {path.rpartition(".")[2]: name for name, path in METHODS.items()}


def links() -> dict[str, str]:
    """Labels of rows: a method links to its file, a control stands in italics."""
    files = {row: f"[{row}]({FILES}/sslbook/methods/{name}.py)" for row, name in names().items()}
    return files | {control: f"*{control}*" for control in CONTROLS}


def families() -> dict[str, str]:
    """From the name of a method's file to the heading under which `methods.md` introduces it."""
    found: dict[str, str] = {}
    for section in re.split(r"^## ", (ROOT / "book/reference/methods.md").read_text(encoding="utf-8"), flags=re.M)[1:]:
        heading, _, text = section.partition("\n")
        for name in re.findall(r"\(`(\w+)`[;)]", text):
            found.setdefault(name, heading.strip())
    if missing := [name for name in METHODS if name not in found]:
        raise UserError(f"methods.md introduces no {', '.join(missing)}: write (`name`; citation) in a paragraph")
    return found


def with_file(result: results.Result) -> str:
    """Where a table's numbers come from, and a link to the file that holds them."""
    return f"{result.origin()} ([file]({FILES}/book/results/{result.name}.json))"


def overview() -> str:
    """One line a method: its family, its recipe, and its accuracies on the two data sets that all methods have seen."""
    data = {"Shapes": results.load("shapes"), "CIFAR-10": results.load("cifar10_jpeg_all")}
    heads = ["method", *(f"{name}, {metric} (%)" for name in data for metric in ("kNN", "linear")), "family", "recipe"]
    lines = ["| " + " | ".join(heads) + " |", "|---|" + "---:|" * 4 + "---|---|"]
    labels, family, file_of = links(), families(), names()
    for row in data["Shapes"].values:
        found = [result.values.get(row, {}).get(m) for result in data.values() for m in ("kNN", "linear")]
        cells = ["" if value is None else results.number(value, 1) for value in found]
        name = file_of.get(row)
        last = [family[name], f"[{name}]({FILES}/sslbook/recipes/{name}/shapes.yaml)"] if name else ["*control*", ""]
        lines.append("| " + " | ".join([labels[row], *cells, *last]) + " |")
    return "\n".join(lines)


def all_tables() -> str:
    """The overview, then every table with its origin below it."""
    parts = [f"## All methods\n\n{overview()}"]
    for name, title in TITLES.items():
        result = results.load(name)
        parts.append("\n".join([f"## {title}", "", table(result.values, labels=links()), "", with_file(result)]))
    return "\n\n".join(parts)


def ten_methods() -> str:
    """Ten methods and the controls on two data sets; with the kNN accuracy of each method's own untrained network."""
    data = {"Shapes": results.load("shapes"), "CIFAR-10": results.load("cifar10_jpeg_all")}
    metrics = {"kNN": "kNN (%)", "linear": "linear (%)", "kNN, untrained": "kNN, untrained"}
    columns = {f"{name} {metric}": (f"{name}, {title}", 1) for name in data for metric, title in metrics.items()}
    values = {
        row: {f"{name} {m}": result[row][m] for name, result in data.items() for m in metrics if m in result[row]}
        for row in TEN + CONTROLS
    }
    return "\n\n".join([table(values, columns), *(result.origin() for result in data.values())])


def family_table() -> str:
    """A line a family: medians over its methods on CIFAR-10, beside what their networks reach before training."""
    result, file_of, family = results.load("cifar10_jpeg_all"), names(), families()
    members: dict[str, list[Mapping[str, Sequence[float]]]] = {}
    for row, metrics in result.values.items():
        if row in file_of and file_of[row] not in TOKENIZERS:
            members.setdefault(family[file_of[row]], []).append(metrics)
    rows = {}
    for name, methods in members.items():
        rows[f"{name} ({len(methods)})"] = row = {}
        for metric in ("kNN", "linear"):
            row[metric] = statistics.median(statistics.mean(m[metric]) for m in methods)
            before = (statistics.mean(m[metric]) - statistics.mean(m[f"{metric}, untrained"]) for m in methods)
            row[f"{metric} gain"] = statistics.median(before)
        row["s per 1,000"] = statistics.median(statistics.mean(m["s per 1,000"]) for m in methods)
    columns = {"kNN gain": ("kNN gain", 1), "linear gain": ("linear gain", 1)}
    order = {c: {**COLUMNS, **columns}[c] for c in ("kNN", "kNN gain", "linear", "linear gain", "s per 1,000")}
    return f"{table(rows, order)}\n\n{with_file(result)}"


def insert(page: Path, new: str) -> str:
    """The text of `page` with `new` between the markers."""
    text = page.read_text(encoding="utf-8")
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(BEGIN) > text.index(END):
        raise UserError(f"{page}: needs one {BEGIN} and, after it, one {END}")
    return f"{text.partition(BEGIN)[0]}{BEGIN}\n\n{new}\n\n{END}{text.partition(END)[2]}"


def pages() -> dict[Path, str]:
    """From a page to the text it should have."""
    reference = ROOT / "book" / "reference"
    content = {
        reference / "results.md": all_tables(),
        reference / "choosing.md": family_table(),
        ROOT / "README.md": ten_methods(),
    }
    return {page: insert(page, new) for page, new in content.items()}


if __name__ == "__main__":
    for page, text in pages().items():
        write_text(page, text)
