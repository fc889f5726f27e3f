"""What a finished run leaves: the table beside its controls, the images, the exported backbone; and comparisons."""

import copy
import json
import subprocess
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from sslbook import Data, Shapes, compare, results, train
from sslbook.errors import UserError
from sslbook.report import report, umap_positions
from sslbook.weights.backbone import load_backbone
from tests.engine import command, start
from tests.methods.cases import make

pytestmark = pytest.mark.slow

IMAGES = ["curves.png", "neighbors_after.png", "neighbors_before.png", "umap.png", "views.png"]


def test_full_report(tmp_path: Path, capsys) -> None:
    out = tmp_path / "run"
    options = {"report": "full", "data__shapes__num_train": 64, "data__shapes__num_test": 32, "hooks": None}
    train.main(command("simclr", out, **options))
    printed = capsys.readouterr().out
    rows = json.loads((out / "report.json").read_text())["tables"]["summary"]
    assert list(rows) == ["SimCLR", "pixels", "random weights", "supervised", "chance"]
    for row, metrics in rows.items():
        assert row in printed
        assert 0 <= metrics["kNN"] <= 100
    assert sorted(p.name for p in out.glob("*.png")) == IMAGES
    for name in IMAGES:
        image = np.asarray(Image.open(out / name).convert("L"))
        assert image.std() > 5, f"{name} is blank"
    assert "Factors: accuracy" in printed
    backbone, facts = load_backbone(out)
    assert facts["view"] == {"size": 16, "mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5]}
    assert backbone(torch.zeros(2, 3, 16, 16)).shape == (2, backbone.dim)
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert {line["step"] for line in lines if "knn" in line} <= {8, 16}


def test_the_map_leaves_torch_its_number_of_threads() -> None:
    before = torch.get_num_threads()
    points = umap_positions(torch.randn(32, 8))
    assert points.shape == (32, 2) and points.isfinite().all()
    assert torch.get_num_threads() == before


@pytest.mark.filterwarnings("ignore:.*holds images of more than 8 bits")
def test_a_folder_without_labels_is_reported_without_accuracies(tmp_path: Path, capsys) -> None:
    rng = np.random.default_rng(0)
    kinds = ["RGB", "L", "RGBA", "P", "CMYK", "I;16", "1", "LA"]
    (tmp_path / "photos").mkdir()
    for i, mode in enumerate(kinds * 3):
        size = (20 + 3 * i, 50 - i)
        if mode == "I;16":
            image = Image.fromarray(rng.integers(0, 65535, size, dtype=np.uint16))
        else:
            image = Image.fromarray(rng.integers(0, 255, (*size, 3), dtype=np.uint8)).convert(mode)
        image.save(tmp_path / "photos" / f"{i}.{'jpg' if mode == 'CMYK' else 'png'}")
    options = {"data__shapes__num_train": None, "data__shapes__num_test": None, "method__view__size": 16}
    start("mae", tmp_path / "run", **options, data__folder=tmp_path / "photos", report="full", steps=2)
    assert "no labeled images" in capsys.readouterr().out
    images = {p.name for p in (tmp_path / "run").glob("*.png")}
    assert {"curves.png", "views.png", "reconstructions.png", "neighbors_after.png", "umap.png"} <= images


@pytest.mark.filterwarnings("ignore:skipped the unreadable image")
@pytest.mark.parametrize("labeled", [True, False])
def test_test_images_that_cannot_be_read_or_have_no_labels(labeled: bool, tmp_path: Path, capsys) -> None:
    rng = np.random.default_rng(0)
    for i in range(16):
        split = "train" if i < 10 else "test"
        path = tmp_path / "photos" / split / ("ab"[i % 2] if labeled else "") / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 255, (20, 20, 3), dtype=np.uint8)).save(path)
        if i == 10:  # what is shown must be the images whose features there are
            path.write_bytes(b"no image")
    options = {"data__shapes__num_train": None, "data__shapes__num_test": None, "data__workers": 0}
    start("rotation", tmp_path / "run", **options, data__folder=tmp_path / "photos", report="quick", steps=1)
    assert ("Metrics in %" in capsys.readouterr().out) == labeled
    assert (tmp_path / "run" / "neighbors_after.png").exists()


def test_comparison_resumes_and_refreshes_rows(tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "book" / "results").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    small = command("simclr", None, report="quick", steps=2)[1:]
    small = [word for word in small if not word.startswith("--method")]
    options = " ".join(f"'{word}'" for word in small)
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[1]))
    compare.compare("tiny", ["rotation", "simclr"], [0, 1], options)
    result = results.load("tiny")
    assert list(result.values) == ["Rotation", "SimCLR", "pixels", "random weights", "chance"]
    assert len(result["SimCLR"]["kNN"]) == len(result["pixels"]["linear"]) == 2
    assert result["pixels"]["kNN"][0] == result["pixels"]["kNN"][1]
    assert set(result["SimCLR"]) >= {"kNN, untrained", "linear, untrained", "s per 1,000", "memory (MB)"}
    assert min(result["SimCLR"]["memory (MB)"]) > 50
    reports = sorted((tmp_path / "runs" / "compare" / "tiny").glob("*/report.json"))
    written = {path: path.stat().st_mtime_ns for path in reports}
    (lost,) = (path for path in reports if path.parent.name == "simclr-seed-1")
    lost.unlink()
    compare.compare("tiny", ["rotation", "simclr"], [0, 1], options)
    assert [path for path in reports if path.stat().st_mtime_ns != written[path]] == [lost]  # what was not finished
    assert results.load("tiny").values == {**result.values, "SimCLR": results.load("tiny")["SimCLR"]}
    assert results.load("tiny")["SimCLR"]["kNN"] == result["SimCLR"]["kNN"]

    compare.compare("tiny", ["simclr"], [0, 1], options)  # one row refreshed, the others stay
    again = results.load("tiny")
    assert list(again.values) == list(result.values)
    assert again["Rotation"] == result["Rotation"]
    assert again["SimCLR"]["linear"] == result["SimCLR"]["linear"]
    assert again.settings["origins"]["SimCLR"]["method"] == "simclr"
    with pytest.raises(UserError, match="holds other options"):
        compare.compare("tiny", ["simclr"], [0], options)
    with pytest.raises(UserError, match="holds other options"):
        compare.compare("tiny", ["simclr"], [0, 1], options + " --steps 3")


def test_comparison_rejects_invalid_options_before_training(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(results, "folder", lambda: None)
    monkeypatch.setattr(compare.subprocess, "run", lambda words: pytest.fail(f"started {words}"))
    with pytest.raises(UserError, match="mkdir -p book/results"):
        compare.compare("tiny", ["simclr"])
    with pytest.raises(UserError, match="close the quotation"):
        compare.compare("tiny", ["simclr"], options="--batch_size '8")
    with pytest.raises(UserError, match="did you mean simclr"):
        compare.compare("tiny", ["rotation", "simcrl"])
    for name in ("", "../tiny", "a/b"):
        with pytest.raises(UserError, match="is not the name of a result"):
            compare.compare(name, ["simclr"])
    for methods, seeds in (([], [0]), (["simclr"], [])):
        with pytest.raises(UserError, match="at least one"):
            compare.compare("tiny", methods, seeds)


def test_comparison_trains_teachers_first(tmp_path: Path, monkeypatch) -> None:
    """Which runs are started, in which order and with what, without running them."""
    started = []

    def start_only(words: list[str]) -> subprocess.CompletedProcess:
        started.append(words[3:])
        (folder,) = (Path(word.removeprefix("--out_dir=")) for word in words if word.startswith("--out_dir="))
        folder.mkdir(parents=True)
        (folder / "report.json").write_text('{"seconds_per_1000": 1.0, "peak_memory": 1.0}')
        return subprocess.CompletedProcess(words, 0)

    monkeypatch.setattr(compare.subprocess, "run", start_only)
    compare.one_run("beit_v2", 3, tmp_path, ["--steps=2"], full=True)
    assert [words[0] for words in started] == ["simclr", "vqkd", "beit_v2"]
    assert f"--method.teacher={tmp_path / 'simclr-seed-3'}" in started[1]
    assert f"--method.tokenizer={tmp_path / 'vqkd-seed-3'}" in started[2]
    assert all("--seed=3" in words and "--steps=2" in words for words in started)
    assert ["--report=full" in words for words in started] == [False, False, True]
    compare.one_run("eva", 3, tmp_path, [])
    assert [words[0] for words in started[3:]] == ["eva"], "SimCLR's run is there"


def test_plots_while_training(tmp_path: Path) -> None:
    hooks = '[{"class_path": "sslbook.loggers.Plots", "init_args": {"every": 1}}]'
    start("mae", tmp_path, steps=6, hooks=hooks)
    assert {p.name for p in (tmp_path).glob("*.png")} == {"curves.png", "reconstructions.png", "views.png"}


def test_protocols_that_the_data_cannot_serve_are_refused_before_training(tmp_path: Path) -> None:
    for i in range(8):
        (tmp_path / "photos").mkdir(exist_ok=True)
        Image.new("RGB", (20, 20), (i, i, i)).save(tmp_path / "photos" / f"{i}.png")
    options = {"data__shapes__num_train": None, "data__shapes__num_test": None, "protocols": "[linear]"}
    with pytest.raises(UserError, match="linear needs labeled training and test images; photos has no labels"):
        start("rotation", tmp_path / "run", **options, data__folder=tmp_path / "photos", steps=1)
    assert not (tmp_path / "run").exists()


def test_comparison_rejects_runs_of_other_options(tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "book" / "results").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    start("simclr", tmp_path / "runs" / "compare" / "tiny" / "simclr-seed-0", steps=1, report="quick")
    monkeypatch.setattr(compare.subprocess, "run", lambda words: pytest.fail(f"started {words}"))
    with pytest.raises(UserError, match="simclr-seed-0: was trained with batch_size 8, now it is 9: delete it"):
        compare.compare("tiny", ["simclr"], options="--batch_size 9 --epochs 2 --steps 1")
    assert not list((tmp_path / "book" / "results").iterdir())


def test_without_labels_to_learn_from_there_is_no_supervised_control(tmp_path: Path, monkeypatch, capsys) -> None:
    """As in STL-10, where images without labels come beside those with."""
    data = Data(shapes=Shapes(num_train=48, num_test=24))
    unlabeled = copy.copy(data._splits.train)
    unlabeled.labels = torch.full((48,), -1)
    data.__dict__["_splits"] = replace(data._splits, pretrain=unlabeled)
    run = train.pretrain(make("rotation"), data, torch.optim.SGD, out_dir=str(tmp_path), batch_size=8, steps=1)
    rows = report(run, full=True)["tables"]["summary"]
    assert list(rows) == ["Rotation", "pixels", "random weights", "chance"]
    assert "so there is no supervised control" in capsys.readouterr().out
