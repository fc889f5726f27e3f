"""Methods side by side, on the same data and for several seeds: `python -m sslbook.compare`.

Every method and seed is a run of `sslbook.train` in a folder of its own. Runs that are finished are not run again, and
one that was stopped is resumed, so the command can be stopped and started at will, and moved to another machine.
"""

import json
import shlex
import sys
from pathlib import Path

from sslbook import configuration
from sslbook.errors import UserError

CONTROLS = ("pixels", "random weights", "supervised", "chance")


def compare(
    name: str,
    methods: list[str] = ["rotation", "simclr", "moco", "byol", "mae"],  # noqa: B006 (never changed)
    seeds: list[int] = [0],  # noqa: B006
    options: str = "",
    runs: Path = Path("runs/compare"),
) -> None:
    """Train every method with every seed, and write one table to book/results/NAME.json.

    Args:
        name: name of the result.
        methods: which methods.
        seeds: which seeds.
        options: options of sslbook.train for all runs, in one string, such as "--recipe cifar10 --epochs 100".
        runs: where the runs' folders are kept.
    """
    from sslbook.notebook import results

    values: dict[str, dict[str, list[float]]] = {}
    factors: dict[str, dict[str, list[float]]] = {}
    for method in methods:
        for seed in seeds:
            folder = runs / name / f"{method}-seed-{seed}"
            measured = one_run(method, seed, folder, shlex.split(options))
            if "rows" not in measured:
                raise UserError(f"{folder}: the pictures have no labels, so there is nothing to compare")
            label = measured["rows"][0]["name"]
            for row in measured["rows"]:
                control = row["name"] in CONTROLS
                if control and method != methods[0]:
                    continue  # pixels are the same for all, and one network stands for the others
                line = values.setdefault(row["name"], {})
                for key, title in (("knn", "kNN"), ("linear", "linear")):
                    line.setdefault(title, []).append(round(row[key], 2))
            values[label].setdefault("seconds", []).append(measured["train_seconds"])
            for row, scores in measured.get("factors", {}).items():
                for factor, score in scores.items() if row == label or method == methods[0] else ():
                    factors.setdefault(row, {}).setdefault(factor, []).append(round(score, 2))
    order = [row for row in values if row not in CONTROLS] + [row for row in CONTROLS if row in values]
    command = f"python -m sslbook.compare {shlex.join(sys.argv[1:])}"
    settings = {"options": options, "controls_of": methods[0]}
    path = results.save(name, {row: values[row] for row in order}, command=command, seeds=seeds, settings=settings)
    if factors:
        results.save(f"{name}_factors", factors, command=command, seeds=seeds, settings=settings)
    print(f"\n{results.show(name)}\nwritten to {path}")


def one_run(method: str, seed: int, folder: Path, options: list[str]) -> dict:
    """The report of one run; it is trained first if it is not finished."""
    from sslbook import train

    done = folder / "report.json"
    if not done.exists():
        print(f"\n{method}, seed {seed}: {folder}", flush=True)
        train.main([method, *options, f"--seed={seed}", f"--out={folder}", "--resume=auto"])
    if not done.exists():
        raise UserError(f"{folder}: stopped before the end; give the same command again to go on")
    return json.loads(done.read_text(encoding="utf-8"))


def main(argv: list[str] | None = None) -> None:
    """`python -m sslbook.compare`."""
    configuration.cli(compare, argv, prog="python -m sslbook.compare")


if __name__ == "__main__":
    configuration.run(main)
