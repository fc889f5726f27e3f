"""Methods side by side, on the same data and for several seeds: `python -m sslbook.compare`.

Every method and seed is a run of `sslbook.train` in a folder of its own. Runs that are finished are not run again, and
one that was stopped is resumed, so the command can be stopped and started at will, and moved to another machine.
"""

import json
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import yaml

from sslbook import configuration
from sslbook.errors import UserError
from sslbook.methods import METHODS
from sslbook.engine.loop import pretrain

CONTROLS = ("pixels", "random weights", "supervised", "chance")
PROTOCOLS = {"knn": "kNN", "linear": "linear"}
AFTER = {  # what these predict is the network of another method's run, which this option names
    "vqkd": ("simclr", "teacher"),
    "milan": ("simclr", "teacher"),
    "eva": ("simclr", "teacher"),
    "beit_v2": ("vqkd", "tokenizer"),
}


def compare(
    name: str,
    methods: list[str] | None = None,
    seeds: list[int] = [0],  # noqa: B006 (never changed)
    options: str = "",
    runs: Path = Path("runs/compare"),
) -> None:
    """Train every method with every seed, and write one table to book/results/NAME.json.

    Beside its accuracies stand those of its network before training and of the pixels of its images (recipes for the
    Shapes data set may choose other knobs), the seconds of training steps for 1,000 images, and the most memory that was
    used, in MB (of the GPU, or else of the process). The controls are those of the first method's network. Teachers
    of MILAN, EVA and VQ-KD are SimCLR's runs of the same seed, the tokenizer of BEiT v2 is VQ-KD's.

    A table that is there already, of the same options and seeds, keeps its other rows and its controls, so that it can
    be filled and refreshed method by method; the file's settings say at which commit a row was entered. A finished run
    is read, not trained again: delete its folder to measure it anew.

    Args:
        name: name of the result.
        methods: which methods; all by default, SimCLR first.
        seeds: which seeds.
        options: options of sslbook.train for all runs, in one string, such as "--recipe cifar10 --epochs 100".
        runs: where the runs' folders are kept.
    """
    from sslbook import results

    methods = sorted(METHODS, key=lambda name: name != "simclr") if methods is None else list(dict.fromkeys(methods))
    try:
        words = shlex.split(options)
    except ValueError as error:
        raise UserError(f"--options {options!r}: cannot be cut into words ({error}); close the quotation") from None
    seeds = list(dict.fromkeys(seeds))
    if not re.fullmatch(r"\w[\w.-]*", name):
        raise UserError(f"{name!r} is not the name of a result: use letters, digits, - and _, such as cifar10")
    if not methods or not seeds:
        raise UserError("nothing to compare: give at least one method and one seed")
    for method in methods:
        configuration.method_class(method)  # a wrong name is told before anything is trained
    comparison = Comparison.load(name, options, seeds, controls_of=methods[0])
    for method in methods:
        full = method == comparison.controls_of
        for seed in seeds:
            comparison.add(method, seed, one_run(method, seed, runs / name, words, full), full)
        comparison.save(name, options, seeds)
    print(f"\n{results.show(name)}")


class Comparison:
    """What was measured, row by row: `{row: {column: one number per seed}}`.

    Args:
        controls_of: the method whose network the controls have.
        values: accuracies and costs.
        factors: accuracies of each factor's probe in the Shapes data set.
        origins: the method of every row that is not a control, and the commit at which it was entered.
    """

    def __init__(self, controls_of: str, values: dict, factors: dict, origins: dict[str, dict[str, str]]) -> None:
        self.controls_of, self.values, self.factors, self.origins = controls_of, values, factors, origins
        self.begun: set[str] = set()  # rows of this command, which take the places of those that were there

    @classmethod
    def load(cls, name: str, options: str, seeds: list[int], controls_of: str) -> "Comparison":
        """The table that is there, or an empty one."""
        from sslbook import results

        where = results.folder()
        if where is None:
            raise UserError("no book/results above this folder to write to: mkdir -p book/results, or use a checkout")
        if not (where / f"{name}.json").is_file():
            return cls(controls_of, {}, {}, {})
        old = results.load(name)
        if (old.settings.get("options"), old.seeds) != (options, seeds) or "origins" not in old.settings:
            raise UserError(
                f"{where / name}.json holds other options ({old.settings.get('options')!r}) or seeds ({old.seeds}): "
                "give the same, choose another name, or delete it"
            )
        factors = results.load(f"{name}_factors").values if (where / f"{name}_factors.json").is_file() else {}
        return cls(old.settings["controls_of"], old.values, factors, old.settings["origins"])

    def row(self, rows: dict[str, dict[str, list[float]]], row: str) -> dict[str, list[float]]:
        """The row to write to; this command's first number empties it."""
        if row not in self.begun:
            self.begun.add(row)
            self.values.pop(row, None)
            self.factors.pop(row, None)
        return rows.setdefault(row, {})

    def add(self, method: str, seed: int, measured: dict, full: bool) -> None:
        """Append the report of a run, with the controls if it is a full one."""
        from sslbook import results

        if "rows" not in measured:
            raise UserError(f"{method}, seed {seed}: the images have no labels, so there is nothing to compare")
        rows = {row["name"]: row for row in measured["rows"]}
        label = measured["rows"][0]["name"]
        for row in rows if full else [label]:
            for key, title in PROTOCOLS.items():
                self.row(self.values, row).setdefault(title, []).append(round(rows[row][key], 2))
        facts = {f"{title}, untrained": rows["random weights"][key] for key, title in PROTOCOLS.items()}
        facts |= {f"{title}, pixels": rows["pixels"][key] for key, title in PROTOCOLS.items()}
        facts |= {"s per 1,000": measured["seconds_per_1000"], "memory (MB)": measured["peak_memory"]}
        for title, value in facts.items():
            self.row(self.values, label).setdefault(title, []).append(round(value, 2))
        for row, scores in measured.get("factors", {}).items():
            for factor, score in scores.items() if full or row == label else ():
                self.row(self.factors, row).setdefault(factor, []).append(round(score, 2))
        self.origins[label] = {"method": method, "commit": results.commit()}

    def save(self, name: str, options: str, seeds: list[int]) -> None:
        """Write it: the method of the controls, the others in the book's order, the controls."""
        from sslbook import results

        def place(row: str) -> tuple[bool, bool, int]:
            method = self.origins.get(row, {}).get("method", "")
            order = list(METHODS).index(method) if method in METHODS else CONTROLS.index(row) if row in CONTROLS else 0
            return row in CONTROLS, method != self.controls_of, order

        words = [name, *([f"--options={options}"] if options else []), *([f"--seeds={seeds}"] if seeds != [0] else [])]
        command = f"python -m sslbook.compare {shlex.join(words)}"  # of all rows
        settings = {"options": options, "controls_of": self.controls_of, "origins": self.origins}
        for title, rows in ((f"{name}_factors", self.factors), (name, self.values)):
            if rows:
                ordered = {row: rows[row] for row in sorted(rows, key=place)}
                results.save(title, ordered, command=command, seeds=seeds, settings=settings)


def one_run(method: str, seed: int, runs: Path, options: list[str], full: bool = False) -> dict:
    """The report of one run; it is trained first, in a process of its own, if it is not finished."""
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
        if not full:
            words.append("--report=quick")
        if method in AFTER:
            one_run(AFTER[method][0], seed, runs, options)
        print(f"\n{method}, seed {seed}: {folder}", flush=True)
        status = subprocess.run([sys.executable, "-m", "sslbook.train", *words]).returncode
        if status:
            raise UserError(f"{folder}: the run failed; mend it and give the same command again to go on")
    if not done.exists():
        raise UserError(f"{folder}: stopped before the end; give the same command again to go on")
    return json.loads(done.read_text(encoding="utf-8"))


def _require_same(words: list[str], folder: Path) -> None:
    """The run that is there was trained with these words; what its configuration does not know does not count."""
    wanted = configuration.resolve(words, pretrain)[2]
    written = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))
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
    configuration.cli(compare, argv, prog="python -m sslbook.compare")


if __name__ == "__main__":
    configuration.run(main)
