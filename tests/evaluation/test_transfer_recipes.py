"""The command line of the protocols that train, and their published settings."""

import json
import sys
from pathlib import Path

import pytest
import torch
import yaml

from sslbook import evaluate
from sslbook.errors import UserError
from sslbook.nn import ConvNet, VisionTransformer
from sslbook.weights.backbone import export_backbone

FILES = sorted(
    path
    for name in ("linear_sgd", "linear_stages", "attentive", "finetune", "semi_supervised")
    for path in (evaluate.RECIPES / name).glob("*.yaml")
)
SHAPES = ["--data.name", "shapes", "--data.shapes.num_train", "60", "--data.shapes.num_test", "20"]
QUICK = [
    "--training.epochs",
    "1",
    "--training.batch_size",
    "6",
    "--progress",
    "false",
    "--training.grad_accum_steps",
    "1",
]


def command(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["evaluate", *map(str, words)])
    evaluate.main()


@pytest.fixture
def exported(tmp_path: Path) -> dict[str, Path]:
    """A convolutional net and a transformer with their descriptions."""
    torch.manual_seed(0)
    view = {"view": {"size": 16, "mean": [0.5] * 3, "std": [0.25] * 3}}
    nets = {"convnet": ConvNet(4), "vit": VisionTransformer(16, 8, 16, 4, 16)}
    for name, net in nets.items():
        export_backbone(tmp_path / name / "backbone.safetensors", net, view)
    return {name: tmp_path / name for name in nets}


@pytest.mark.parametrize("path", FILES, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_recipes_say_whose_settings_they_are(path: Path) -> None:
    lines = path.read_text(encoding="utf-8").splitlines()
    for what in ("# Weights:  ", "# Expected: ", "# Source:   "):
        assert any(line.startswith(what) for line in lines), f"no line {what}"
    values = yaml.safe_load(path.read_text(encoding="utf-8"))
    assert {"lrs", "training"} <= set(values)
    assert all(isinstance(value, float) for value in values["lrs"])  # 1e-5 without a point would be a text


@pytest.mark.slow
@pytest.mark.parametrize("path", FILES, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_recipes_run(path: Path, exported: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every published setting, with its epochs and batch alone made small."""
    protocol, values = path.parent.name, yaml.safe_load(path.read_text(encoding="utf-8"))
    transformer = protocol == "attentive" or "drop_path" in values or values.get("pool", "backbone") != "backbone"
    words = [protocol, exported["vit" if transformer else "convnet"], "--recipe", path.stem, *SHAPES, *QUICK]
    if len(values["lrs"]) > 1:
        words += ["--lrs", "[0.001, 0.002]"]
    if len(values.get("weight_decays", [0])) > 1:
        words += ["--weight_decays", "[0.0]"]
    if protocol == "semi_supervised":
        words += ["--fraction", "0.5", "--head_lr_scales", "[1.0]"]
    command([*words, "--controls", "false", "--out", tmp_path / "result.json"], monkeypatch)
    result = json.loads((tmp_path / "result.json").read_text())
    assert protocol in next(iter(result["settings"]["details"].values()))


@pytest.mark.slow
def test_options_of_a_protocol_on_the_command_line(
    exported: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    words = ["linear_sgd", exported["convnet"], *SHAPES, *QUICK, "--lrs", "[0.1]", "--training.optimizer", "lars"]
    command([*words, "--augmentation.flip", "0.0", "--out", tmp_path / "result.json"], monkeypatch)
    result = json.loads((tmp_path / "result.json").read_text())
    rows = result["values"]
    assert {"pixels", "random weights", "chance"} < set(rows)
    assert all({"linear SGD", "linear SGD top-5"} <= set(row) for name, row in rows.items() if name != "chance")
    details = [one["linear_sgd"] for one in result["settings"]["details"].values()]
    assert [one["chosen"]["lr"] for one in details] == [0.1] * 3
    assert "lars" in str(result["settings"]["protocols"]["linear_sgd"])
    assert "linear SGD" in capsys.readouterr().out


@pytest.mark.slow
def test_a_run_that_is_kept_is_not_trained_again(
    exported: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["finetune", exported["convnet"], *SHAPES, *QUICK, "--keep", tmp_path / "kept"]
    command(words, monkeypatch)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "kept").rglob("checkpoint-*.pt")}
    assert len(before) == 2  # the network, and random weights
    command(words, monkeypatch)
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "kept").rglob("checkpoint-*.pt")} == before


@pytest.mark.parametrize(
    ("words", "answer"),
    [
        (["attentive"], "attentive needs a backbone with tokens"),
        (["linear_sgd", "--lrs", "[]"], "lrs"),
        (["linear_sgd", "--recipe", "mocco"], "did you mean moco"),
        (["finetune", "--augmentation.erasing", "2"], "augmentation.erasing = 2.0: it must be a probability"),
        (["finetune", "--training.epoch", "2"], "did you mean --training.epochs"),
        (["finetune", "--training.batch_size", "6", "--frozen", "9"], "frozen: the backbone has"),
        (["semi_supervised", "--fraction", "7"], "fraction is 7.0"),
        (["linear_sgd", "--training.batch_size", "5000"], "lower --training.batch_size"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_mistakes_are_one_line(
    words: list[str], answer: str, exported: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UserError) as error:
        command([words[0], exported["convnet"], *SHAPES, *words[1:], "--progress", "false"], monkeypatch)
    assert answer in str(error.value)
    assert "\n" not in str(error.value)
