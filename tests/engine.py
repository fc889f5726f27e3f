"""Runs of the real command at the smallest size, shared by the tests of the engine."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from sslbook import checkpoint, train
from sslbook.engine.run import Run
from tests.methods.cases import case

COMMON = {
    "data.shapes.num_train": 48,
    "data.shapes.num_test": 24,
    "batch_size": 8,
    "epochs": 2,
    "report": "none",
    "progress": "false",
    "log_every": 1,
    "hooks": "[]",
}


def command(method: str, out: Path | None, **options: Any) -> list[str]:
    """The command line of a tiny run; `a__b` stands for `a.b`, and None leaves an option out."""
    chosen = {**COMMON, **case(method).command, **{key.replace("__", "."): value for key, value in options.items()}}
    words = [method] + [f"--{key}={value}" for key, value in chosen.items() if value is not None]
    return words + ([f"--out_dir={out}"] if out else [])


def start(method: str, out: Path, **options: Any) -> None:
    """The command, in this process."""
    train.main(command(method, out, **options))


def start_process(words: list[str], cwd: Path, **kwargs: Any) -> subprocess.Popen:
    """The command, in a process of its own."""
    root = str(Path(__file__).parents[1])
    path = os.pathsep.join([root, os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    return subprocess.Popen(
        [sys.executable, *words],
        cwd=cwd,
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        **kwargs,
    )


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """The whole state of the method in a run's newest checkpoint."""
    return checkpoint.load(checkpoint.find(folder))["method"]


def assert_same_bits(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    """Every tensor equal to the last bit."""
    assert a.keys() == b.keys()
    different = [name for name in a if not torch.equal(a[name], b[name])]
    assert not different, f"different: {different[:5]}"


def lines(folder: Path) -> list[dict[str, float]]:
    """The run's `metrics.jsonl`."""
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


__all__ = ["Run", "assert_same_bits", "command", "lines", "start", "start_process", "weights"]
