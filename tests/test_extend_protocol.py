"""A protocol from a file outside the package: seen by evaluate, the report of a run, and comparisons."""

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from sslbook import compare, evaluate, results
from sslbook.cli.common import run as run_command
from tests.engine import command, start

pytestmark = pytest.mark.slow

MINE = '''
from sslbook.evaluation.base import Protocol


class Norm(Protocol):
    """Mean length of the features of the test images."""

    labels = False

    def __init__(self, power: int = 1) -> None:
        self.power = power

    def run(self, model, data):
        x = model.features("test").x
        return {"length": (x.norm(dim=1) ** self.power).mean().item(), "features": float(x.shape[1])}
'''


@pytest.fixture
def mine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    (tmp_path / "length_protocol.py").write_text(MINE)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{Path(__file__).parents[1]}")
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    sys.modules.pop("length_protocol", None)


def call(monkeypatch: pytest.MonkeyPatch, *words: object) -> None:
    monkeypatch.setattr(sys, "argv", ["prog", *map(str, words)])
    run_command(evaluate.main)


def test_a_protocol_of_ones_own(mine: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    start("simclr", mine / "run", report="quick", steps=1, protocols="[knn, length_protocol.Norm]")
    assert "length  features" in capsys.readouterr().out
    rows = json.loads((mine / "run" / "report.json").read_text())["tables"]["summary"]
    assert set(rows["SimCLR"]) == {"kNN", "length", "features"}
    assert set(rows["chance"]) == {"kNN"}

    common = ["--progress", "false", "--device", "cpu", "--controls", "false"]
    call(monkeypatch, mine / "run", "--protocols", "length_protocol.Norm", *common, "--out", "plain.json")
    plain = json.loads(Path("plain.json").read_text())["values"]["SimCLR"]
    assert plain["length"] == pytest.approx(rows["SimCLR"]["length"])
    squared = '[{"class_path": "length_protocol.Norm", "init_args": {"power": 2}}]'
    call(monkeypatch, mine / "run", "--protocols", squared, *common, "--out", "squared.json")
    written = json.loads(Path("squared.json").read_text())
    assert written["values"]["SimCLR"]["length"] != plain["length"]
    assert written["settings"]["protocols"] == {"norm": {"power": 2}}


def test_a_comparison_by_a_protocol_of_ones_own(mine: Path) -> None:
    (mine / "book" / "results").mkdir(parents=True)
    words = command("simclr", None, report="quick", steps=1, protocols="[length_protocol.Norm]")[1:]
    options = " ".join(f"'{word}'" for word in words if not word.startswith("--method"))
    compare.compare("tiny", ["simclr"], [0], options)
    assert set(results.load("tiny")["SimCLR"]) >= {"length", "features", "length, untrained", "length, pixels"}
