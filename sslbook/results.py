"""Results with their origin: what a chapter prints comes from a file that a command wrote, never from typing.

A result is `book/results/NAME.json` with the values and their origin: command, commit, hardware, versions, seeds,
date. `save` writes one, `load` reads it, `show` prints it as a table with its origin below.

The environment variable `SSLBOOK_PROFILE` says how much a chapter computes: `smoke` (seconds on a CPU, for the tests),
`colab` (the default: one small GPU or a patient CPU), `full` (the scale of the papers).
"""

import html
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

from sslbook.checkpoint import write_text
from sslbook.errors import UserError, nearest

PROFILES = ("smoke", "colab", "full")


def profile() -> str:
    """The profile in force: `SSLBOOK_PROFILE`, else `colab`; UserError for any other word."""
    name = os.environ.get("SSLBOOK_PROFILE", "colab")
    if name not in PROFILES:
        raise UserError(
            f"SSLBOOK_PROFILE is {name!r}; it must be one of {', '.join(PROFILES)}{nearest(name, list(PROFILES))}"
        )
    return name


def choose(*, smoke: Any, colab: Any, full: Any = None) -> Any:
    """The value for the profile in force; `full` is `colab`'s unless given."""
    return {"smoke": smoke, "colab": colab, "full": colab if full is None else full}[profile()]


# -- files -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Result:
    """A result file. `result["key"]` reads its values.

    Args:
        name: the file's name, without `.json`.
        values: what was measured; by convention `{row: {column: number or one number per seed}}`.
        command: the command line that wrote it.
        commit: the commit it ran at, ending in `+` where tracked files had been changed.
        date: when it was written, UTC.
        hardware: processor, number of cores, accelerator.
        versions: of Python and of the packages that matter.
        seeds: the seeds of the runs, in the order of the lists in `values`.
        settings: what else the values depend on.
    """

    name: str
    values: dict[str, Any]
    command: str
    commit: str
    date: str
    hardware: dict[str, Any]
    versions: dict[str, str]
    seeds: list[int]
    settings: dict[str, Any] = field(default_factory=dict)

    def __getitem__(self, key: str) -> Any:
        if key not in self.values:
            known = list(self.values)
            raise UserError(f"{self.name} has no {key!r}; it has {', '.join(known)}{nearest(key, known)}")
        return self.values[key]

    def origin(self) -> str:
        """One line: where the numbers come from."""
        chip = self.hardware.get("accelerator") or f"{self.hardware['cores']} cores of {self.hardware['processor']}"
        seeds = f"seed{'s' if len(self.seeds) > 1 else ''} {', '.join(map(str, self.seeds))}; " if self.seeds else ""
        return (
            f"book/results/{self.name}.json: `{self.command}`; {seeds}{chip}; "
            f"torch {self.versions.get('torch', '?')}; commit {self.commit[:7] or 'unknown'}; {self.date[:10]}"
        )


def folder() -> Path | None:
    """`book/results` of the checkout: above the working folder, else beside the package. None outside a checkout."""
    places = [place / "book" / "results" for place in (Path.cwd(), *Path.cwd().parents, Path(__file__).parents[1])]
    return next((place for place in places if place.is_dir()), None)


def book() -> Path:
    """The folder `book` with results and checkpoints: of the checkout, else as installed with the package."""
    checkout = folder()
    return checkout.parent if checkout else Path(str(resources.files("sslbook.book")))


def load(name: str) -> Result:
    """The result `name`; UserError where there is none."""
    where = book() / "results"
    if not (where / f"{name}.json").is_file():
        known = sorted(path.stem for path in where.glob("*.json"))
        raise UserError(f"no result {name!r} in book/results{nearest(name, known)}")
    return Result(name, **json.loads((where / f"{name}.json").read_text(encoding="utf-8")))


def save(
    name: str,
    values: Mapping[str, Any],
    *,
    command: str | None = None,
    seeds: Sequence[int] = (),
    settings: Mapping[str, Any] | None = None,
    to: Path | None = None,
) -> Path:
    """Write `values` and their origin to `book/results/NAME.json` (or into the folder `to`), all or nothing.

    Args:
        name: the file's name, without `.json`.
        values: anything JSON can hold; by convention `{row: {column: number or one number per seed}}`.
        command: the command line; without it, this process's.
        seeds: the seeds of the runs.
        settings: what else the values depend on.
        to: another folder.

    Raises:
        UserError: there is no folder of results.
        ValueError: a value that JSON does not know, such as NaN.
    """
    where = to or folder()
    if where is None:
        raise UserError("no book/results above this folder: run from a checkout, or pass to=FOLDER")
    if command is None:
        module = getattr(sys.modules["__main__"], "__spec__", None)
        program = f"-m {module.name.removesuffix('.__main__')}" if module else sys.argv[0]
        command = " ".join(["python", program, *sys.argv[1:]])
    result = Result(
        name=name,
        values=dict(values),
        command=command,
        commit=commit(where),
        date=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        hardware=_hardware(),
        versions=_versions(),
        seeds=list(seeds),
        settings=dict(settings or {}),
    )
    content = {key: value for key, value in asdict(result).items() if key != "name"}
    write_text(where / f"{name}.json", json.dumps(content, indent=1, allow_nan=False) + "\n")
    return where / f"{name}.json"


def commit(where: Path | None = None) -> str:
    """The commit of the checkout with the folder `where`, ending in `+` where tracked files are changed, or ""."""

    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", *arguments], cwd=where or folder(), capture_output=True, text=True, check=True
        ).stdout.strip()

    try:
        return git("rev-parse", "HEAD") + ("+" if git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.CalledProcessError):
        return ""


def _hardware() -> dict[str, Any]:
    import torch

    processor = platform.processor() or platform.machine()
    if (cpuinfo := Path("/proc/cpuinfo")).is_file():
        names = [line.split(":", 1)[1].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line]
        processor = names[0] if names else processor
    accelerator = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {"processor": processor, "cores": os.cpu_count(), "accelerator": accelerator}


def _versions() -> dict[str, str]:
    from importlib.metadata import PackageNotFoundError, version

    found = {"python": platform.python_version()}
    for package in ("sslbook", "torch", "torchvision", "numpy"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue  # sslbook itself, run from a checkout that was never installed
    return found


# -- tables ------------------------------------------------------------------------------------------------------------


def number(value: float | Sequence[float], digits: int = 1) -> str:
    """`68.1`, or `68.1 ± 0.9` (mean and standard deviation) for one value per seed."""
    if isinstance(value, int | float):
        return f"{value:.{digits}f}"
    text = f"{statistics.fmean(value):.{digits}f}"
    return f"{text} ± {statistics.stdev(value):.{digits}f}" if len(value) > 1 else text


class Table:
    """Rows by columns; prints as aligned text and shows itself in a notebook. A value that a row lacks is left blank.

    Args:
        rows: `{row: {column: number or one number per seed}}`.
        columns: which columns, in this order; by default all.
        note: a line below the table.
        digits: digits behind the point.
    """

    def __init__(
        self,
        rows: Mapping[str, Mapping[str, float | Sequence[float]]],
        columns: Sequence[str] | None = None,
        note: str = "",
        digits: int = 1,
    ) -> None:
        heads = list(dict.fromkeys(c for values in rows.values() for c in values)) if columns is None else columns
        self.header = ["", *heads]
        self.rows = [[row, *(number(v[c], digits) if c in v else "" for c in heads)] for row, v in rows.items()]
        self.note = note

    def _repr_html_(self) -> str:
        def line(cells: list[str], tag: str) -> str:
            head, scope = ("col", ' scope="col"') if tag == "th" else ("row", "")
            first = f'<th scope="{head}" style="text-align:left">{html.escape(cells[0])}</th>'
            others = "".join(f'<{tag}{scope} style="text-align:right">{html.escape(c)}</{tag}>' for c in cells[1:])
            return f"<tr>{first}{others}</tr>"

        body = "".join(line(row, "td") for row in self.rows)
        return (
            f'<table class="dataframe"><thead>{line(self.header, "th")}</thead><tbody>{body}</tbody></table>'
            f'<p class="sslbook-origin"><small>{html.escape(self.note)}</small></p>'
        )

    def __repr__(self) -> str:
        widths = [max(map(len, column)) for column in zip(self.header, *self.rows)]
        lines = [
            "  ".join([cells[0].ljust(widths[0])] + [c.rjust(w) for c, w in zip(cells[1:], widths[1:])]).rstrip()
            for cells in [self.header, *self.rows]
        ]
        return "\n".join([*lines, self.note] if self.note else lines)


def show(
    name: str, *, rows: Sequence[str] | None = None, columns: Sequence[str] | None = None, digits: int = 1
) -> Table:
    """The result `name`, written as `{row: {column: number(s)}}`, as a table with its origin below.

    Args:
        name: the result.
        rows: which rows, in this order; without it, all.
        columns: which columns, in this order; without it, all.
        digits: digits behind the point.
    """
    result = load(name)
    chosen = {row: result[row] for row in (result.values if rows is None else rows)}
    return Table(chosen, columns, result.origin(), digits)
