"""Methods side by side, on the same data and for several seeds: `python -m sslbook.compare`.

Every method and seed is a run of `sslbook.train` in a folder of its own. Runs that are finished are not run again, and
one that was stopped is resumed, so the command can be stopped and started at will, and moved to another machine.
"""

import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import yaml

from sslbook import results
from sslbook.cli.common import cli
from sslbook.cli.recipes import method_class, resolve
from sslbook.engine.loop import pretrain
from sslbook.errors import UserError, explained
from sslbook.evaluation.base import SUMMARY, Tables, available
from sslbook.files import read_json, read_yaml
from sslbook.methods import METHODS

CONTROLS = ("pixels", "random weights", "supervised", "chance")
AFTER = {  # what these predict is the network of another method's run, which this option names
    "vqkd": ("simclr", "teacher"),
    "milan": ("simclr", "teacher"),
    "eva": ("simclr", "teacher"),
    "beit_v2": ("vqkd", "tokenizer"),
    "beit": ("dvae", "tokenizer"),
    "cae": ("dvae", "tokenizer"),
}


REPORT = {"seconds_per_1000": float, "peak_memory": float, "tables?": {str: {str: {str: float}}}}  # what is read of it


def compare(
    name: str,
    methods: list[str] | None = None,
    seeds: list[int] = [0],  # noqa: B006 (never changed)
    options: str = "",
    runs: Path = Path("runs/compare"),
) -> None:
    """Train every method with every seed, and write one table to book/results/NAME.json.

    Beside the metrics of a method stand those of its network before training and of the pixels of its images (recipes
    for the Shapes data set may choose other nuisance factors), the seconds of training steps for 1,000 images, and the
    peak memory in MB (of the GPU, or else of the process). The controls are those of the first method's network, which
    is also trained with labels. Teachers of MILAN, EVA and VQ-KD are SimCLR's runs of the same seed, the tokenizer of
    BEiT v2 is VQ-KD's, that of BEiT and CAE the discrete VAE's. Protocols with many metrics have a table of their own,
    NAME_PROTOCOL.json.

    A table that is there already, of the same options and seeds, keeps its other rows and its controls, so that it can
    be filled and refreshed method by method; the file's settings say at which commit a row was entered. A finished run
    is read, not trained again: delete its folder to measure it anew.

    Args:
        name: name of the result.
        methods: which methods; all by default, SimCLR first.
        seeds: which seeds.
        options: options of sslbook.train for all runs, in one string, such as "--recipe cifar10 --epochs 100".
        runs: where the runs' folders are kept.

    Raises:
        UserError: something the caller can mend, before anything is trained where that is possible.
    """
    methods = sorted(METHODS, key=lambda name: name != "simclr") if methods is None else list(dict.fromkeys(methods))
    seeds = list(dict.fromkeys(seeds))
    with explained(f"--options {options!r}: cannot be split into words", ValueError, cure="close the quotation"):
        words = shlex.split(options)
    if not re.fullmatch(r"\w[\w.-]*", name):
        raise UserError(f"{name!r} is not the name of a result: use letters, digits, - and _, such as cifar10")
    if not methods or not seeds:
        raise UserError("nothing to compare: give at least one method and one seed")
    for method in methods:
        method_class(method)  # a wrong name is refused before anything is trained
    _require_labels(next((method for method in methods if method not in AFTER), "simclr"), words)
    comparison = Comparison.load(name, options, seeds, controls_of=methods[0])
    for method in methods:
        full = method == comparison.controls_of
        for seed in seeds:
            comparison.add(method, seed, one_run(method, seed, runs / name, words, full), full)
        comparison.save(name, options, seeds)
    print(f"\n{results.show(name)}")


class Comparison:
    """What was measured: `{table: {row: {column: one number per seed}}}`.

    Args:
        controls_of: the method whose network the controls have.
        tables: metrics and costs under `summary`, and tables of single protocols.
        origins: the method of every row that is not a control, and the commit at which it was entered.
    """

    def __init__(self, controls_of: str, tables: dict[str, dict], origins: dict[str, dict[str, str]]) -> None:
        self.controls_of, self.tables, self.origins = controls_of, tables, origins
        self.begun: set[str] = set()  # rows of this command, which replace those that were there

    @classmethod
    def load(cls, name: str, options: str, seeds: list[int], controls_of: str) -> "Comparison":
        """The table that is there, or an empty one; UserError if it holds other options or seeds."""
        where = results.folder()
        if where is None:
            raise UserError("no book/results above this folder to write to: mkdir -p book/results, or use a checkout")
        if not (where / f"{name}.json").is_file():
            return cls(controls_of, {}, {})
        old = results.load(name)
        if (old.settings.get("options"), old.seeds) != (options, seeds) or "origins" not in old.settings:
            raise UserError(
                f"{where / name}.json holds other options ({old.settings.get('options')!r}) or seeds ({old.seeds}): "
                "give the same, choose another name, or delete it"
            )
        own = [t for t in old.settings.get("tables", available()) if (where / f"{name}_{t}.json").is_file()]
        tables = {SUMMARY: old.values, **{table: results.load(f"{name}_{table}").values for table in own}}
        return cls(old.settings["controls_of"], tables, old.settings["origins"])

    def add(self, method: str, seed: int, measured: dict, full: bool) -> None:
        """Append the report of a run, with the controls if it is a full one.

        Raises:
            UserError: the report holds no metrics.
        """
        tables: Tables = measured.get("tables", {})
        if SUMMARY not in tables:
            raise UserError(
                f"{method}, seed {seed}: its report.json holds no metrics; give labeled images, or delete the run if an "
                "older version made it"
            )
        summary = tables[SUMMARY]
        label = next(iter(summary))
        facts = {f"{metric}, untrained": value for metric, value in summary.get("random weights", {}).items()}
        facts |= {f"{metric}, pixels": value for metric, value in summary.get("pixels", {}).items()}
        facts |= {"s per 1,000": measured["seconds_per_1000"], "memory (MB)": measured["peak_memory"]}
        rows = {**tables, SUMMARY: {**summary, label: {**summary[label], **facts}}}
        for table, values in rows.items():
            for row in values if full else [label]:
                if row not in self.begun:
                    self.begun.add(row)
                    for other in self.tables.values():
                        other.pop(row, None)
                for column, value in values[row].items():
                    columns = self.tables.setdefault(table, {}).setdefault(row, {})
                    columns.setdefault(column, []).append(round(value, 2))
        self.origins[label] = {"method": method, "commit": results.commit()}

    def save(self, name: str, options: str, seeds: list[int]) -> None:
        """Write it: the method of the controls, the others in the book's order, the controls."""

        def position(row: str) -> tuple[bool, bool, int]:
            method = self.origins.get(row, {}).get("method", "")
            order = list(METHODS).index(method) if method in METHODS else CONTROLS.index(row) if row in CONTROLS else 0
            return row in CONTROLS, method != self.controls_of, order

        words = [name, *([f"--options={options}"] if options else []), *([f"--seeds={seeds}"] if seeds != [0] else [])]
        command = f"python -m sslbook.compare {shlex.join(words)}"  # of all rows
        own = [table for table in self.tables if table != SUMMARY]
        settings = {"options": options, "controls_of": self.controls_of, "tables": own, "origins": self.origins}
        for table in [*own, SUMMARY]:
            rows = {row: self.tables[table][row] for row in sorted(self.tables[table], key=position)}
            title = name if table == SUMMARY else f"{name}_{table}"
            results.save(title, rows, command=command, seeds=seeds, settings=settings)


def one_run(method: str, seed: int, runs: Path, options: list[str], full: bool = False) -> dict:
    """The report of one run; it is trained first, in a process of its own, if it is not finished.

    Raises:
        UserError: the run failed, was stopped, or was trained with other options.
    """
    folder = runs / f"{method}-seed-{seed}"
    done = folder / "report.json"
    words = [method, *options, f"--seed={seed}"]
    if method in AFTER:
        source, option = AFTER[method]
        words.append(f"--method.{option}={runs / f'{source}-seed-{seed}'}")
    if (folder / "config.yaml").exists():
        _require_same(words, folder)
    if not done.exists():
        words += [f"--out_dir={folder}", "--resume=auto"]
        if full and not any(word.startswith("--report") for word in options):
            words.append("--report=full")
        if method in AFTER:
            one_run(AFTER[method][0], seed, runs, options)
        print(f"\n{method}, seed {seed}: {folder}", flush=True)
        status = subprocess.run([sys.executable, "-m", "sslbook.train", *words]).returncode
        if status:
            raise UserError(f"{folder}: the run failed; mend it and give the same command again to go on")
    if not done.exists():
        raise UserError(f"{folder}: stopped before the end; give the same command again to go on")
    return read_json(done, REPORT)


def _require_labels(method: str, options: list[str]) -> None:
    """UserError if the images are not labeled: then nothing could be compared after the training."""
    parser, config, _ = resolve([method, *options], pretrain)
    data = parser.construct(config).data
    if not data.has_test_labels:
        raise UserError(f"{data.describe()}: methods are compared on labeled training and test images")


def _require_same(words: list[str], folder: Path) -> None:
    """UserError if the run in this folder had other options; options that its configuration lacks do not count."""
    wanted = resolve(words, pretrain)[2]
    written = read_yaml(folder / "config.yaml")
    there, here = (dict(_flat(values)) for values in (written, yaml.safe_load(yaml.safe_dump(wanted))))
    for key in sorted(there.keys() & here.keys()):
        if there[key] != here[key] and key not in ("report", "progress"):
            raise UserError(
                f"{folder}: was trained with {key} {there[key]!r}, now it is {here[key]!r}: delete it, choose another "
                "--runs, or give the options of then"
            )


def _flat(values: object, key: str = "") -> Iterator[tuple[str, object]]:
    """The leaves of nested mappings, under names such as `method.init_args.view.size`."""
    if isinstance(values, dict) and values:
        for name, value in values.items():
            yield from _flat(value, f"{key}.{name}" if key else str(name))
    else:
        yield key, values


def main(argv: list[str] | None = None) -> None:
    """`python -m sslbook.compare`."""
    cli(compare, argv, prog="python -m sslbook.compare")


if __name__ == "__main__":
    from sslbook.cli.common import run

    run(main)
