"""Methods side by side, on the same data and for several seeds: `python -m sslbook.compare`.

Every method and seed is a run of `sslbook.train` in a folder of its own. Runs that are finished are not run again, and
one that was stopped is resumed, so the command can be stopped and started at will, and moved to another machine.
"""

import json
import shlex
import subprocess
import sys
from pathlib import Path

from sslbook import configuration
from sslbook.errors import UserError
from sslbook.methods import METHODS

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

    Beside its accuracies stand those of its network before training and of the pixels of its pictures (recipes for the
    embedded world may choose other knobs), the seconds of training for 1,000 pictures, and the most memory that was
    used, in MB (of the GPU, or else of the process). The controls are those of the first method's network. Teachers
    of MILAN, EVA and VQ-KD are SimCLR's runs of the same seed, the tokenizer of BEiT v2 is VQ-KD's.

    Args:
        name: name of the result.
        methods: which methods; all by default, SimCLR first.
        seeds: which seeds.
        options: options of sslbook.train for all runs, in one string, such as "--recipe cifar10 --epochs 100".
        runs: where the runs' folders are kept.
    """
    from sslbook.notebook import results

    methods = sorted(METHODS, key=lambda name: name != "simclr") if methods is None else methods
    values: dict[str, dict[str, list[float]]] = {}
    factors: dict[str, dict[str, list[float]]] = {}
    for method in methods:
        first = method == methods[0]
        for seed in seeds:
            measured = one_run(method, seed, runs / name, shlex.split(options), full=first)
            if "rows" not in measured:
                raise UserError(f"{name}: the pictures have no labels, so there is nothing to compare")
            rows = {row["name"]: row for row in measured["rows"]}
            label = measured["rows"][0]["name"]
            for row in rows if first else [label]:
                for key, title in PROTOCOLS.items():
                    values.setdefault(row, {}).setdefault(title, []).append(round(rows[row][key], 2))
            facts = {f"{title}, untrained": rows["random weights"][key] for key, title in PROTOCOLS.items()}
            facts |= {f"{title}, pixels": rows["pixels"][key] for key, title in PROTOCOLS.items()}
            facts |= {"s per 1,000": measured["seconds_per_1000"], "memory (MB)": measured["peak_memory"]}
            for title, value in facts.items():
                values[label].setdefault(title, []).append(round(value, 2))
            for row, scores in measured.get("factors", {}).items():
                for factor, score in scores.items() if first or row == label else ():
                    factors.setdefault(row, {}).setdefault(factor, []).append(round(score, 2))
    order = [row for row in values if row not in CONTROLS] + [row for row in CONTROLS if row in values]
    command = f"python -m sslbook.compare {shlex.join(sys.argv[1:])}"
    settings = {"options": options, "controls_of": methods[0]}
    path = results.save(name, {row: values[row] for row in order}, command=command, seeds=seeds, settings=settings)
    if factors:
        results.save(f"{name}_factors", factors, command=command, seeds=seeds, settings=settings)
    print(f"\n{results.show(name)}\nwritten to {path}")


def one_run(method: str, seed: int, runs: Path, options: list[str], full: bool = False) -> dict:
    """The report of one run; it is trained first, in a process of its own, if it is not finished."""
    folder = runs / f"{method}-seed-{seed}"
    done = folder / "report.json"
    if not done.exists():
        words = [method, *options, f"--seed={seed}", f"--out={folder}", "--resume=auto"]
        if not full:
            words.append("--report=quick")
        if method in AFTER:
            source, option = AFTER[method]
            one_run(source, seed, runs, options)
            words.append(f"--method.{option}={runs / f'{source}-seed-{seed}'}")
        print(f"\n{method}, seed {seed}: {folder}", flush=True)
        status = subprocess.run([sys.executable, "-m", "sslbook.train", *words]).returncode
        if status:
            raise UserError(f"{folder}: the run failed; mend it and give the same command again to go on")
    if not done.exists():
        raise UserError(f"{folder}: stopped before the end; give the same command again to go on")
    return json.loads(done.read_text(encoding="utf-8"))


def main(argv: list[str] | None = None) -> None:
    """`python -m sslbook.compare`."""
    configuration.cli(compare, argv, prog="python -m sslbook.compare")


if __name__ == "__main__":
    configuration.run(main)
