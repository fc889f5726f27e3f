"""The README's tables of results, rewritten from `book/results`.

    python book/experiments/readme_table.py

Each table comes from a file that `python -m sslbook.compare` wrote; a file that is not there yet has no table. What
stands between the two markers in the README is replaced, everything else stays.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

from sslbook.checkpoint import write_text
from sslbook.errors import UserError
from sslbook.notebook import results

README = Path(__file__).parents[2] / "README.md"
BEGIN, END = "<!-- results -->", "<!-- /results -->"
DATA = {
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


def table(values: Mapping[str, Mapping[str, float | Sequence[float]]]) -> list[str]:
    """A Markdown table with a line for every row of a result; a figure that a row lacks is left blank."""
    columns = {c: look for c, look in COLUMNS.items() if any(c in figures for figures in values.values())}
    lines = ["| | " + " | ".join(title for title, _ in columns.values()) + " |", "|---|" + "---:|" * len(columns)]
    for row, figures in values.items():
        cells = [results.number(figures[c], digits) if c in figures else "" for c, (_, digits) in columns.items()]
        lines.append(f"| {row} | " + " | ".join(cells) + " |")
    return lines


def tables() -> str:
    """All tables, each with its origin below it."""
    parts = []
    for name, title in DATA.items():
        if (README.parent / "book" / "results" / f"{name}.json").is_file():
            result = results.load(name)
            parts.append("\n".join([f"**{title}**", "", *table(result.values), "", result.origin()]))
    if not parts:
        raise UserError(f"no results yet: write book/results/{next(iter(DATA))}.json with python -m sslbook.compare")
    return "\n\n".join(parts)


def insert(text: str, new: str) -> str:
    """`text` with `new` between the markers."""
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(BEGIN) > text.index(END):
        raise UserError(f"{README}: needs one {BEGIN} and, after it, one {END}")
    return f"{text.partition(BEGIN)[0]}{BEGIN}\n\n{new}\n\n{END}{text.partition(END)[2]}"


def main() -> None:
    write_text(README, insert(README.read_text(encoding="utf-8"), tables()))


if __name__ == "__main__":
    from sslbook.configuration import run

    run(main)
