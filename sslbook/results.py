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
from dataclasses import asdict, dataclass, field, fields
from importlib import resources
from pathlib import Path
from typing import Any

from sslbook.checkpoint import write_text
from sslbook.errors import UserError, nearest, require_known
from sslbook.files import Whole, check, read_json

PROFILES = ("smoke", "colab", "full")
UNKNOWN = {"cores": "?", "processor": "?"}
RESULT = {  # the form of a result file
    **{"values": {str: object}, "command": str, "commit": str, "date": str, "hardware": {str: object}},
    **{"versions": {str: str}, "seeds": [Whole(-(2**63))], "settings?": {str: object}},
}
PAPER = {"source": str, "title?": str, "claims": {str: {"value": (float, str), "unit": str, "where": str}}}


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
        require_known(key, self.values, f"{self.name} has no {key!r}")
        return self.values[key]

    def origin(self) -> str:
        """One line: where the numbers come from."""
        chip = self.hardware.get("accelerator") or "{cores} cores of {processor}".format_map(
            {**UNKNOWN, **self.hardware}
        )
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
    require_known(name, sorted(path.stem for path in where.glob("*.json")), f"no result {name!r} in book/results")
    content = read_json(where / f"{name}.json", RESULT)
    return Result(name, **{part.name: content[part.name] for part in fields(Result)[1:] if part.name in content})


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
    """The commit of the checkout with the folder `where`, or "".

    It ends in `+` where tracked files are changed, other than results and checkpoints.
    """

    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", *arguments], cwd=where or folder(), capture_output=True, text=True, check=True
        ).stdout.strip()

    try:
        # A command that writes several results must not mark the second for having written the first.
        code = ["--", ":/", ":(top,exclude)book/results", ":(top,exclude)book/checkpoints"]
        changed = git("status", "--porcelain", "--untracked-files=no", *code)
        return git("rev-parse", "HEAD") + ("+" if changed else "")
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
    text = f"{statistics.fmean(value):.{digits}f}" if value else ""
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
        return _table_html(self.header, self.rows, [self.note])

    def __repr__(self) -> str:
        return _table_text(self.header, self.rows, [self.note])


def _table_html(
    header: Sequence[str], rows: Sequence[Sequence[str]], notes: Sequence[str], words: Sequence[int] = ()
) -> str:
    """A table as HTML: the first column and those in `words` left-aligned, the others numbers.

    Numbers never wrap and stand apart, on a phone too; there the table scrolls.
    """
    pad, number_style = (
        "padding:.3em .8em;vertical-align:baseline;",
        "text-align:right;white-space:nowrap;font-variant-numeric:tabular-nums",
    )

    def line(cells: Sequence[str], tag: str) -> str:
        parts = []
        for i, cell in enumerate(cells):
            style = pad + ("text-align:left" if i == 0 or i in words else number_style)
            kind, scope = (
                ("th", ' scope="row"') if i == 0 and tag == "td" else (tag, ' scope="col"' if tag == "th" else "")
            )
            parts.append(f'<{kind}{scope} style="{style}">{html.escape(cell)}</{kind}>')
        return f"<tr>{''.join(parts)}</tr>"

    body = "".join(line(row, "td") for row in rows)
    below = "<br>".join(html.escape(note) for note in notes if note)
    return (
        '<div style="overflow-x:auto;max-width:100%"><table class="dataframe" style="border-collapse:collapse">'
        f"<thead>{line(header, 'th')}</thead><tbody>{body}</tbody></table></div>"
        f'<p class="sslbook-origin"><small>{below}</small></p>'
    )


def _table_text(
    header: Sequence[str], rows: Sequence[Sequence[str]], notes: Sequence[str], words: Sequence[int] = ()
) -> str:
    """The same as aligned text."""
    widths = [max(map(len, column)) for column in zip(header, *rows)]
    lines = [
        "  ".join(
            c.ljust(w) if i == 0 or i in words else c.rjust(w) for i, (c, w) in enumerate(zip(cells, widths))
        ).rstrip()
        for cells in [header, *rows]
    ]
    return "\n".join([*lines, *filter(None, notes)])


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
    check(f"book/results/{name}.json", {"values": chosen}, {"values": {str: {str: (float, [float])}}})
    return Table(chosen, columns, result.origin(), digits)


# -- paper and here ----------------------------------------------------------------------------------------------------


class Comparison:
    """Claims of a paper beside what was measured here; made by `compare`."""

    header = ("claim", "paper", "where", "here")

    def __init__(self, rows: Sequence[Sequence[str]], notes: Sequence[str]) -> None:
        self.rows, self.notes = rows, notes

    def _repr_html_(self) -> str:
        return _table_html(self.header, self.rows, self.notes, words=(2,))

    def __repr__(self) -> str:
        return _table_text(self.header, self.rows, self.notes, words=(2,))


def compare(*, paper: str, here: Mapping[str, Sequence[str]], digits: int = 1) -> Comparison:
    """What a paper reports beside what was measured here: mean and standard deviation, the origins below.

    The paper's side is `book/results/papers/KEY.json`: `{"source": citation key, "claims": {claim: {"value": number,
    "unit": "%", "where": "table 5"}}}`.

    Args:
        paper: the file's name, without `.json`.
        here: for each claim, in this order, `(result, row, column)`.
        digits: digits behind the point of what was measured here; the paper's numbers stand as it prints them.

    Raises:
        UserError: no such paper, claim, result, row or column, or a claim that lacks value, unit or where.
    """
    claims, source = _claims(paper)
    rows, origins = [], {}
    for claim, place in here.items():
        require_known(claim, claims, f"{paper} has no claim {claim!r}")
        if isinstance(place, str) or len(place) != 3:
            raise UserError(f"here[{claim!r}] must be (result, row, column), not {place!r}")
        name, row, column = place
        result = load(name)
        known = result[row] if isinstance(result[row], Mapping) else []
        require_known(column, known, f"{name}, {row} has no {column!r}")
        reported = claims[claim]
        unit = f" {reported['unit']}" if reported["unit"] else ""
        rows.append(
            [claim, f"{reported['value']}{unit}", reported["where"], number(result[row][column], digits) + unit]
        )
        origins[name] = result.origin()
    return Comparison(rows, [f"Paper: {source}.", *(f"Here: {origin}" for origin in origins.values())])


def _claims(paper: str) -> tuple[dict[str, Any], str]:
    where = book() / "results" / "papers"
    known = sorted(path.stem for path in where.glob("*.json"))
    require_known(paper, known, f"no paper {paper!r} in book/results/papers")
    content = read_json(where / f"{paper}.json", PAPER)
    return content["claims"], content.get("title", content["source"])
