"""The tables of `costs.md`: measured ratios, and what a step sends between processes at the scale of the recipes.

    python book/reference/costs.py

Numbers sent are of float32 values: of a gather all that a process then holds, of a reduction the tensor that is summed,
backward pass included. `tests/test_traffic.py` counts them in two processes.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

import torch

from sslbook import results
from sslbook.checkpoint import write_text
from sslbook.methods import load

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "book" / "reference" / "costs.md"
IMAGENET = 1_281_167  # training images
MB = 2**20


class Sizes(NamedTuple):
    """What the formulas depend on."""

    N: int
    """images in a batch, over all processes"""
    d: int
    """width of the projection z"""
    K: int = 0
    """prototypes, or outputs of the head"""
    T: int = 0
    """iterations of Sinkhorn-Knopp"""
    P: int = 0
    """values of a view"""


# The leading term as the page prints it; all of it, where 2 d is the log's `feature_std`, and a few single values.
SENT: Mapping[str, tuple[str, Callable[[Sizes], int]]] = {
    "simclr": ("$4Nd$", lambda s: 4 * s.N * s.d + 1),
    "nnclr": ("$5Nd$", lambda s: 5 * s.N * s.d),
    "moco": ("$N(P + 2d)$", lambda s: s.N * (s.P + 2 * s.d)),
    "moco_v3": ("$2Nd$", lambda s: 2 * s.N * s.d + 2 * s.d),
    "swav": ("$4TK$", lambda s: 4 * s.T * s.K + s.K),
    "dino": ("$2K$", lambda s: 2 * s.K),
    "barlow_twins": ("$2d^2$", lambda s: 2 * s.d**2 + 10 * s.d),
    "vicreg": ("$4Nd$", lambda s: 4 * s.N * s.d + 2 * s.d),
    "wmse": ("$4Nd$", lambda s: 4 * s.N * s.d + 2 * s.d),
    "byol": ("0", lambda s: 2 * s.d),
    "simsiam": ("0", lambda s: 2 * s.d),
    "mae": ("0", lambda s: 0),
}
KEPT = {  # rows of the memory that a method keeps, by the option that holds their number; None: one for each image
    "moco": "queue_size",
    "nnclr": "queue_size",
    "npid": None,
    "pirl": None,
    "odc": None,
    "interclr": None,
}
BENCHMARKS = {
    "benchmark_steps": "A training step",
    "benchmark_views": "Views of 32 pixels",
    "benchmark_files_32": "From files: two views of 32 pixels, images of 32",
    "benchmark_files_224": "From files: two views of 224 pixels, photographs of 640 x 480",
    "benchmark_files_camera": "From files: two views of 224 pixels, smooth rendered images of 12 megapixels",
    "benchmark_knn_kmeans": "Neighbors and clusters",
    "benchmark_heads_at_once": "Eight heads of a grid",
    "benchmark_startup": "Starting",
}


def recipe(name: str) -> tuple[torch.nn.Module, Mapping, int]:
    """A method as its recipe for ImageNet describes it, without memory for its weights; options; images in a batch."""
    from sslbook.cli.recipes import resolve
    from sslbook.train import pretrain

    parser, config, _ = resolve([name, "--recipe", "imagenet", "--data.name", "shapes"], pretrain)
    with torch.device("meta"):
        return parser.construct(config).method, vars(config.method), config.batch_size


def sizes_of(name: str) -> tuple[Sizes, int]:
    """At the scale of the recipe; and the number of trained parameters."""
    method, options, batch = recipe(name)
    width = options.get("projector_dim", 0)
    outputs = options.get("num_prototypes", options.get("num_outputs", 0))
    sizes = Sizes(batch, width, outputs, options.get("sinkhorn_iterations", 0), 3 * method.views()[0].size ** 2)
    return sizes, sum(p.numel() for p in method.parameters() if p.requires_grad)


def sent_table() -> str:
    lines = ["| | batch | values sent | MB sent | MB of gradients |", "|---|---:|---|---:|---:|"]
    for name, (text, formula) in SENT.items():
        sizes, parameters = sizes_of(name)
        sent, gradients = 4 * formula(sizes) / MB, 4 * parameters / MB
        lines.append(f"| {load(name).__name__} | {sizes.N:,} | {text} | {sent:,.1f} | {gradients:,.0f} |")
    return "\n".join(lines)


def kept_table() -> str:
    lines = ["| | rows | width | MB |", "|---|---:|---:|---:|"]
    for name, option in KEPT.items():
        _, options, _ = recipe(name)
        rows, width = options[option] if option else IMAGENET, options.get("projector_dim", options.get("feature_dim"))
        lines.append(f"| {load(name).__name__} | {rows:,} | {width} | {4 * rows * width / MB:,.0f} |")
    return "\n".join(lines)


def measured() -> str:
    """A table for every benchmark that has a result: the time of each side as a multiple of ours."""
    parts = []
    for name, title in BENCHMARKS.items():
        if not (results.book() / "results" / f"{name}.json").is_file():
            continue
        found = results.load(name)
        rows = dict(found.values)
        if all(isinstance(next(iter(row.values())), Mapping) for row in rows.values()):  # one table in another
            rows = {f"{outer}, {inner}": row for outer, table in rows.items() for inner, row in table.items()}
        lines = ["| | time, as a multiple | least | most |", "|---|---:|---:|---:|"]
        for row, values in rows.items():
            ratio = next(value for key, value in values.items() if key.startswith("times "))
            if ratio != 1:
                lines.append(f"| {row} | {ratio:.2f} | {values['least']:.2f} | {values['most']:.2f} |")
        parts.append(f"### {title}\n\n" + "\n".join(lines) + f"\n\n<small>{found.origin()}</small>")
    return "\n\n".join(parts)


def page(text: str) -> str:
    """The page with its tables made anew."""
    for name, make in {"measured": measured, "sent": sent_table, "kept": kept_table}.items():
        begin, end = f"<!-- {name} -->", f"<!-- /{name} -->"
        before, rest = text.split(begin)
        text = before + f"{begin}\n\n{make()}\n\n{end}" + rest.split(end)[1]
    return text


if __name__ == "__main__":
    write_text(PAGE, page(PAGE.read_text(encoding="utf-8")))
