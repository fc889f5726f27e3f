"""`python -m sslbook.evaluate` and `python -m sslbook.extract`, from the words of the command on."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.numpy import load_file

from sslbook import evaluate, extract, results
from sslbook.cli.common import run as run_command
from sslbook.data.datasets.shapes import Shapes
from sslbook.data.loader import Data
from sslbook.errors import UserError
from sslbook.evaluation.base import Representation
from sslbook.evaluation.features import center_view, extract_features
from sslbook.evaluation.protocols.knn import KNN, accuracy
from sslbook.nn import ResNet
from sslbook.weights.backbone import export_backbone, load_backbone

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a run leaves behind, of a network that was not trained."""
    folder = tmp_path_factory.mktemp("runs") / "simclr-shapes"
    shapes = {"num_train": 60, "num_test": 30, "size": 16}
    view = {"size": 16, "mean": [0.5, 0.5, 0.5], "std": [0.25, 0.25, 0.25]}
    data = {"class_path": "sslbook.Data", "init_args": {"name": "shapes", "shapes": shapes, "download": False}}
    facts = {"method": "SimCLR", "view": view, "data": data}
    with torch.random.fork_rng():
        for seed, name in enumerate(("initial", "backbone")):
            torch.manual_seed(seed)
            export_backbone(folder / f"{name}.safetensors", ResNet(18, width=2, stem="small"), facts)
    return folder


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Two classes of any sizes and modes, one image broken."""
    for i in range(20):
        path = tmp_path / "photos" / ("dark" if i % 2 else "light") / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        image = Image.new("RGB", (20 + i, 40 - i), (20, 30, 40) if i % 2 else (220, 210, 200))
        image.convert(["RGB", "L", "RGBA", "P"][i % 4]).save(path)
    (tmp_path / "photos" / "dark" / "5.png").write_bytes(b"no image")
    return tmp_path / "photos"


def call(monkeypatch: pytest.MonkeyPatch, command: object, *words: object) -> int:
    """The exit status of the command."""
    monkeypatch.setattr(sys, "argv", ["prog", *map(str, words)])
    try:
        run_command(command.main)
    except SystemExit as leaving:
        return int(leaving.code or 0)
    return 0


def test_evaluate_prints_a_table_and_writes_a_result(run: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    out = tmp_path / "deep" / "result.json"
    words = [run, "--protocols", "knn", "linear", "factors", "--out", out, "--progress", "false", "--device", "cpu"]
    assert call(monkeypatch, evaluate, *words) == 0
    text = capsys.readouterr().out
    assert "shapes: 60 training images, 10 classes, 30 test images" in text
    for line in ("SimCLR", "pixels", "random weights", "chance", "shape", "background"):
        assert f"\n{line} " in text
    result = results.Result("result", **json.loads(out.read_text()))
    assert list(result.values) == ["SimCLR", "pixels", "random weights", "chance", "factors"]
    assert result.seeds == [0]
    assert result.settings["view"]["size"] == 16
    assert result.settings["protocols"]["knn"] == {"k": 20, "temperature": 0.07}
    assert result.date
    assert torch.__version__.startswith(result.versions["torch"])
    assert result.hardware["cores"]
    # The figures are those of the exported weights on the run's own images.
    module, _ = load_backbone(run)
    data = Data(shapes=Shapes(num_train=60, num_test=30))
    view = center_view(16, (0.5,) * 3, (0.25,) * 3)
    train, test = (extract_features(module, data, split, view, progress=False) for split in ("train", "test"))
    assert result["SimCLR"]["kNN"] == pytest.approx(accuracy(*train, *test))


def test_evaluate_on_other_images(run: Path, photos: Path, monkeypatch, capsys) -> None:
    knn = '[{"class_path": "KNN", "init_args": {"k": 3}}]'
    words = [run / "backbone.safetensors", "--data.folder", photos, "--data.workers", 0, "--protocols", knn]
    assert call(monkeypatch, evaluate, *words, "--controls", "false", "--progress", "false") == 0
    said = capsys.readouterr()
    assert "photos: 18 training images, 2 classes, 2 test images" in said.out
    assert "linear" not in said.out
    assert "pixels" not in said.out
    assert "5.png" in said.err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["RUN", "--protocls", "knn"], "did you mean --protocols"),
        (["RUN", "--protocols", "knm"], "knm"),
        (["RUN", "--k", "3"], "python -m sslbook.evaluate knn RUN --k"),
        (["knn", "RUN", "--kk", "3"], "did you mean --k"),
        (["knnn", "RUN"], "did you mean knn"),
        (["knn", "RUN", "--recipe", "moco"], "knn has none"),
        (["RUN", "--protocols", '[{"class_path": "KNN", "init_args": {"k": "many"}}]'], "many"),
        (["RUN", "--protocols", '[{"class_path": "KNN", "init_args": {"kk": 3}}]'], "kk"),
        (["RUN", "--data.folder", "/no/such/folder"], "does not exist"),
        (["RUN", "--out", "result.txt"], ".json"),
        (["RUN", "--out", "/dev/null/result.json"], "cannot be"),
        (["RUN", "--device", "quantum"], "--device quantum"),
        (["/no/such/run"], "no such run folder"),
        ([], "which run?"),
    ],
)
def test_rejects_invalid_options_in_one_line(words: list[str], message: str, run: Path, monkeypatch, capsys) -> None:
    assert call(monkeypatch, evaluate, *[str(run) if word == "RUN" else word for word in words]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert message in error


def test_evaluate_refuses_to_overwrite_and_unlabeled_images(
    run: Path, photos: Path, tmp_path: Path, monkeypatch, capsys
) -> None:
    out = tmp_path / "kept.json"
    out.write_text("precious")
    assert call(monkeypatch, evaluate, run, "--out", out) == 2
    assert "nothing is overwritten" in capsys.readouterr().err
    assert out.read_text() == "precious"
    folder = [run, "--data.folder", photos / "light", "--data.workers", 0, "--progress", "false"]
    assert call(monkeypatch, evaluate, *folder) == 2
    assert "no labels" in capsys.readouterr().err
    assert call(monkeypatch, evaluate, *folder, "--protocols", "factors") == 2
    assert "which only the Shapes data set has" in capsys.readouterr().err


@pytest.mark.parametrize("command", [evaluate, extract])
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": "evil_module.Set"}, "a class of your own"),
        ({"name=evil_module.Set": ""}, "unknown option data.name=evil_module.Set"),
        ({"shapes": {"class_path": "evil_module.Set"}}, "a class of your own"),
        ({"folder": {"class_path": "evil_module.Set"}}, "a class of your own"),
        ({"limit --batch_size": 2}, "unknown option"),
        (["evil_module.Set"], "does not say which images"),
        ({}, "does not say which images"),
    ],
)
def test_a_description_does_not_choose_code(
    command, options, message: str, run: Path, tmp_path: Path, monkeypatch, capsys
) -> None:
    (tmp_path / "evil_module.py").write_text("raise SystemExit('imported')")
    monkeypatch.syspath_prepend(tmp_path)
    for name in ("backbone.safetensors", "backbone.json"):
        (tmp_path / name).write_bytes((run / name).read_bytes())
    facts = json.loads((tmp_path / "backbone.json").read_text())
    facts["data"]["init_args"] = options
    (tmp_path / "backbone.json").write_text(json.dumps(facts))
    assert call(monkeypatch, command, tmp_path, *(["--out", tmp_path / "x.npz"] if command is extract else [])) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_extract_to_npz(run: Path, photos: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    out = tmp_path / "features.npz"
    words = [run, "--data.folder", photos, "--data.workers", 0, "--out", out, "--progress", "false"]
    assert call(monkeypatch, extract, *words) == 0
    said = capsys.readouterr()
    assert "5.png" in said.err
    with np.load(out) as table:
        assert table["features"].shape == (19, ResNet(18, width=2, stem="small").dim)
        assert table["features"].dtype == np.float32
        assert set(table["paths"]) == {f"{'dark' if i % 2 else 'light'}/{i}.png" for i in range(20)} - {"dark/5.png"}
        assert [str(table["class_names"][label]) for label in table["labels"]] == [
            path.split("/")[0] for path in table["paths"]
        ]
        assert table["split"].tolist() == sorted(table["split"])
        assert set(table["split"]) == {0, 1}
        first = table["features"].copy()
    # Nothing is overwritten unless asked, and then it is replaced whole.
    assert call(monkeypatch, extract, *words) == 2
    assert "--overwrite true" in capsys.readouterr().err
    assert call(monkeypatch, extract, *words, "--overwrite", "true", "--split", "test") == 0
    with np.load(out) as table:
        assert np.array_equal(table["features"], first[-len(table["features"]) :])
    assert [path.name for path in tmp_path.glob("*feat*")] == ["features.npz"]


def test_extract_unlabeled_to_safetensors(run: Path, photos: Path, tmp_path: Path, monkeypatch) -> None:
    out = tmp_path / "features.safetensors"
    words = ["--out", out, "--data.folder", photos / "light", "--data.workers", 0, "--progress", "false"]
    assert call(monkeypatch, extract, run, *words) == 0
    table = load_file(out)
    assert set(table["labels"]) == {-1}
    paths = bytes(table["paths"]).decode().split("\0")[:-1]
    assert paths == sorted(f"{i}.png" for i in range(0, 20, 2))
    assert len(table["features"]) == 10


def test_options_that_choose_no_images_leave_the_runs_own(run: Path, monkeypatch, capsys) -> None:
    few = ["--k", 3, "--controls", "false", "--progress", "false", "--device", "cpu"]
    assert call(monkeypatch, evaluate, "knn", run, *few, "--data.workers", 0, "--data.limit", 40) == 0
    assert "shapes: 40 training images, 10 classes, 30 test images" in capsys.readouterr().out
    assert call(monkeypatch, evaluate, "knn", run, *few, "--data.shapes.num_train", 50, "--data.shapes.size", 16) == 0
    assert "shapes: 50 training images, 10 classes, 1,000 test images" in capsys.readouterr().out


def test_extract_the_runs_own_images(run: Path, tmp_path: Path, monkeypatch) -> None:
    out = tmp_path / "shapes.npz"
    assert call(monkeypatch, extract, run, "--out", out, "--split", "test", "--progress", "false") == 0
    with np.load(out) as table:
        assert table["index"].tolist() == list(range(30))
        assert "paths" not in table
        assert np.array_equal(table["labels"], Shapes(num_train=60, num_test=30).render("test")[1]["shape"])


@pytest.mark.parametrize(("out", "message"), [("features.parquet", ".npz or .safetensors"), (None, "out")])
def test_extract_rejects_invalid_files(
    run: Path, tmp_path: Path, out: str | None, message: str, monkeypatch, capsys
) -> None:
    words = [] if out is None else ["--out", tmp_path / out]
    assert call(monkeypatch, extract, run, *words) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert message in error


def test_rejects_empty_batches(tmp_path: Path) -> None:
    data = Data(shapes=Shapes(num_train=4, num_test=4))
    with pytest.raises(UserError, match="batch_size is 0"):
        evaluate.evaluate("nowhere", data, batch_size=0)
    with pytest.raises(UserError, match="batch_size is 0"):
        extract.extract("nowhere", data, out=str(tmp_path / "features.npz"), batch_size=0)


def test_a_backbone_from_elsewhere_beside_its_initial_weights(run: Path) -> None:
    class Mine(ResNet):
        """Not of sslbook.nn: it cannot be built from its description."""

    folder = run.parent / "mine"
    for seed, name in enumerate(("initial", "backbone")):
        facts = json.loads((run / f"{name}.json").read_text())
        torch.manual_seed(seed)
        backbone = Mine(18, width=2, stem="small")
        backbone.init_args = None
        export_backbone(folder / f"{name}.safetensors", backbone, facts | {"backbone": {}})
    data = Data(shapes=Shapes(num_train=60, num_test=30))
    values = evaluate.evaluate(str(folder), data, [KNN(k=1)], backbone=Mine(18, width=2, stem="small"))
    initial, facts = load_backbone(folder / "initial.safetensors", Mine(18, width=2, stem="small"))
    expected = KNN(k=1).run(Representation(initial, data, evaluate.view_of(facts, None), progress=False), data)
    assert values["random weights"] == expected


def test_a_protocol_before_the_run_has_its_options_on_the_command_line(run, monkeypatch, tmp_path) -> None:
    common = [run, "--progress", "false", "--device", "cpu", "--controls", "false", "--out"]
    call(
        monkeypatch, evaluate, "knn", *common, tmp_path / "one.json", "--k", "3", "--temperature", "0.5", "--seed", "4"
    )
    call(monkeypatch, evaluate, *common, tmp_path / "other.json", "--protocols", "knn")
    one, other = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("one", "other"))
    assert one["settings"]["protocols"] == {"knn": {"k": 3, "temperature": 0.5}}
    assert one["seeds"] == [4]
    assert other["settings"]["protocols"]["knn"]["k"] == 20


def test_a_view_that_cannot_be_says_which_number_is_wrong() -> None:
    facts = {"view": {"size": 32, "mean": [0.5] * 3, "std": [0.5] * 3}}
    assert evaluate.view_of(facts, 40).resize == 40
    with pytest.raises(UserError, match=r"view.resize = 4: it must be at least size = 32"):
        evaluate.view_of(facts, 4)
    with pytest.raises(UserError, match="does not say its view"):
        evaluate.view_of({"view": {"size": 32}}, None)
