"""Bad input: one line that names the cure, status 2, no traceback, nothing overwritten."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from sslbook import checkpoint, tools, train
from sslbook.compare import compare
from sslbook.data.views import View
from sslbook.errors import UserError
from sslbook.evaluate import own_data, require_writable
from sslbook.methods.simclr import SimCLR
from sslbook.nn import ConvNet
from sslbook.weights.backbone import export_backbone, load_backbone
from tests.engine import command, start, start_process


class Hungry(SimCLR):
    """A method that asks for more memory than there is."""

    def forward(self, batch, clock):
        return {"loss": torch.empty(2**50)}


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """A folder of twelve small images, two classes."""
    rng = np.random.default_rng(0)
    for i in range(12):
        path = tmp_path / "photos" / ("ab"[i % 2]) / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 255, (20, 24, 3), dtype=np.uint8)).save(path)
    return tmp_path / "photos"


def refusal(*words: str) -> str:
    """The message with which the command refuses; it must be one line."""
    with pytest.raises(UserError) as caught:
        train.main(list(words))
    message = str(caught.value)
    assert "\n" not in message
    assert len(message) < 450
    return message


@pytest.mark.parametrize(
    ("words", "answer"),
    [
        (["simclr", "--out_dir=", "--batch_size=8"], "--out_dir is empty"),
        (["simclr", "--method.view.size=1", "--batch_size=8"], "raise their size"),
        (["mae", "--method.decoder_dim=32", "--method.decoder_num_heads=5"], "use a divisor of 32"),
        (["swav", "--method.num_prototypes=0"], "num_prototypes is 0: give 1 or more"),
        (["deepcluster_v2", "--method.num_prototypes=0"], "num_prototypes is 0: give 1 or more"),
        (["msn", "--method.num_prototypes=0"], "num_prototypes is 0: give 1 or more"),
        (["simclr", "--method.backbone=ResNet", "--method.backbone.depth=19"], "use one of 18"),
        (["simclr", "--data.name=cifra10"], "did you mean cifar10?"),
        (["simclr", "--data.folder=nowhere"], "nowhere"),
        (["simclr", "--data.shapes.size=8"], "16 to 96"),
        (["simclr", "--data.shapes.num_train=12", "--batch_size=16"], "use a smaller one"),
        (["simclr", "--batch_size=10", "--grad_accum_steps=3"], "multiple of 3"),
        (["simclr", '--hooks=[{"class_path": "Plots", "init_args": {"every": 0}}]'], "every is 0"),
        (["simclr", "--device=tpu"], "use cpu, cuda"),
        (["byol", "--batch_size=1"], "raise --batch_size"),
        (["tests.test_bad_input.Hungry", "--batch_size=8"], "out of memory"),
        (["simclr", "--method.view.flip=2"], "probability"),
        (["mae", "--method.backbone=resnet18"], "vision transformer"),
        (["mae", "--method.view.size=18"], "18"),
        (["mae", "--method.mask_ratio=1.0"], "leaves nothing"),
    ],
    ids=lambda value: "_".join(value)[:60] if isinstance(value, list) else None,
)
def test_rejects_invalid_options(words: list[str], answer: str, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    small = [] if any("data." in word for word in words) else ["--data.shapes.num_train=32"]
    common = ["--steps=1", "--progress=false", "--report=none", "--hooks=[]"]
    assert answer in refusal(words[0], *small, *common, *words[1:])


def test_an_empty_folder(tmp_path: Path) -> None:
    assert "no images" in refusal("simclr", f"--data.folder={tmp_path}")


def test_a_used_run_folder_is_not_overwritten(tmp_path: Path) -> None:
    start("rotation", tmp_path / "run", steps=1)
    before = {p.name: p.read_bytes() for p in (tmp_path / "run").iterdir()}
    assert "holds another run" in refusal(*command("simclr", tmp_path / "run", steps=1))
    assert {p.name: p.read_bytes() for p in (tmp_path / "run").iterdir()} == before
    (tmp_path / "file").write_text("mine")
    assert "is a file" in refusal(*command("simclr", tmp_path / "file", steps=1))
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.slow
def test_a_folder_where_no_step_was_taken_is_free(tmp_path: Path) -> None:
    words = ["simclr", "--batch_size=8", "--steps=1", "--report=none", f"--out_dir={tmp_path / 'run'}"]
    assert "raise their size" in refusal(*words, "--method.view.size=1")
    assert not (tmp_path / "run").exists()
    train.main(words)
    assert (tmp_path / "run" / "checkpoint-00000001.pt").exists()


@pytest.mark.slow
def test_a_network_of_timm_that_takes_one_size(tmp_path: Path) -> None:
    pytest.importorskip("timm", reason="needs timm")
    words = ["simclr", "--batch_size=2", "--steps=1", "--report=none", f"--out_dir={tmp_path / 'run'}"]
    words += ["--method.backbone=timm/vit_tiny_patch16_224", "--method.view.size=32"]
    assert "dict_kwargs.dynamic_img_size true" in refusal(*words)
    train.main([*words, "--method.backbone.dict_kwargs.dynamic_img_size=true"])


@pytest.mark.slow
def test_resuming_something_else_is_refused(tmp_path: Path) -> None:
    start("rotation", tmp_path / "run", steps=1)
    assert "method Rotation" in refusal(*command("simclr", None, steps=2, resume=str(tmp_path / "run")))
    assert "batch_size 8" in refusal("rotation", f"--resume={tmp_path / 'run'}", "--batch_size=16")
    assert "--init_from" in refusal("rotation", f"--resume={tmp_path / 'run'}", "--init_from=x.pt")


@pytest.mark.parametrize("keep", [10, 0.7])
def test_a_truncated_checkpoint(keep: float, tmp_path: Path) -> None:
    start("rotation", tmp_path / "run", steps=1)
    path = checkpoint.find(tmp_path / "run")
    content = path.read_bytes()
    path.write_bytes(content[: keep if isinstance(keep, int) else int(keep * len(content))])
    assert "truncated or not a checkpoint" in refusal("rotation", f"--resume={tmp_path / 'run'}", "--steps=2")


def test_a_foreign_checkpoint(tmp_path: Path) -> None:
    torch.save({"state_dict": {}}, tmp_path / "theirs.pt")
    assert "not a checkpoint of sslbook" in refusal("rotation", f"--resume={tmp_path / 'theirs.pt'}", "--steps=2")


def test_a_broken_image_is_skipped_and_counted_or_refused(photos: Path, tmp_path: Path, capsys) -> None:
    broken = photos / "a" / "0.png"
    broken.write_bytes(broken.read_bytes()[:200])
    options = {"data__shapes__num_train": None, "data__shapes__num_test": None, "data__folder": photos}
    options = {**options, "steps": 2, "batch_size": 4, "method__view__size": 16}
    with pytest.warns(UserWarning, match=r"0\.png"):
        start("simclr", tmp_path / "run", **options)
    assert (tmp_path / "run" / "backbone.safetensors").exists()
    message = refusal(*command("simclr", tmp_path / "strict", **options, data__strict="true", data__workers=0))
    assert "0.png" in message


@pytest.mark.slow
def test_the_command_line_itself_exits_with_one_line(tmp_path: Path) -> None:
    process = start_process(["-m", "sslbook.train", "simclrr"], tmp_path)
    output, errors = process.communicate(timeout=120)
    assert process.returncode == 2
    assert errors == "error: there is no method simclrr; did you mean simclr?\n"
    assert output == ""
    assert list(tmp_path.iterdir()) == []


class Dies(torch.utils.data.Dataset):
    """A data set whose loader process is killed, as when memory runs out."""

    def __init__(self, root: str | None = None) -> None:
        self.main = os.getpid()

    def __len__(self) -> int:
        return 16

    def __getitem__(self, i: int):
        if os.getpid() != self.main:
            os.kill(os.getpid(), signal.SIGKILL)
        return Image.new("RGB", (20, 20)), 0


@pytest.mark.skipif(sys.platform == "win32", reason="signals")
@pytest.mark.slow
def test_a_worker_that_dies(tmp_path: Path) -> None:
    options = {"data__shapes__num_train": None, "data__shapes__num_test": None, "data__workers": 1}
    message = refusal(*command("simclr", tmp_path / "run", data__name="tests.test_bad_input.Dies", **options))
    assert "--data.workers" in message


@pytest.mark.parametrize(
    "backbone",
    [
        {"class_path": "sslbook.nn.backbones.timm_model", "init_args": {"name": "resnet18", "checkpoint_path": "x.pt"}},
        {"class_path": "sslbook.nn.teachers.Teacher", "init_args": {"teacher": "timm/resnet18", "view": None}},
        {"class_path": "torch.nn.Linear", "init_args": {"in_features": 1, "out_features": 1}},
    ],
)
def test_a_description_chooses_no_code(backbone: dict, tmp_path: Path) -> None:
    """Not even that of a library which would read another file, or fetch one."""
    export_backbone(tmp_path / "backbone.safetensors", torch.nn.Linear(1, 1), {})
    (tmp_path / "backbone.json").write_text(json.dumps({"backbone": backbone}))
    with pytest.raises(UserError, match="build it yourself and pass --backbone"):
        load_backbone(tmp_path)


# -- code that a run's configuration names -----------------------------------------------------------------------------

EVIL = "import pathlib; pathlib.Path(__file__).with_suffix('.ran').touch()\n"


@pytest.mark.parametrize(
    "change",
    [
        {"method": {"class_path": "evilmod.X", "init_args": {}}},
        {"data": {"name": "evilmod.X"}},
        {"hooks": [{"class_path": "evilmod.X"}]},
        {"hooks": ["evilmod.X"]},
        {"optimizer": "evilmod.X"},
        {"optimizer": {"class_path": "torch.optim.SGD", "init_args": {"lr": "evilmod.X"}}},
        {"protocols": ["evilmod.X"]},
        {"optimizer": {"class_path": "os.system", "init_args": {"command": "true"}}},
    ],
    ids=str,
)
def test_a_resumed_run_imports_no_code_from_elsewhere(change: dict, tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "evilmod.py").write_text(EVIL)
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text(yaml.safe_dump({"method": {"class_path": "simclr"}, **change}))
    for words in ([f"--resume={tmp_path / 'run'}"], ["--resume", "auto", f"--out_dir={tmp_path / 'run'}"]):
        assert "code outside sslbook; if you know it, give --trust true" in refusal(*words)
    assert not (tmp_path / "evilmod.ran").exists()


@pytest.mark.slow
@pytest.mark.parametrize("words", [["--trust=true"], ["tests.test_bad_input.Mine"]])
def test_a_resumed_run_imports_what_its_user_names(words: list[str], tmp_path: Path) -> None:
    common = ["--batch_size=8", "--data.shapes.num_train=16", "--report=none", "--progress=false", "--hooks=[]"]
    train.main(["tests.test_bad_input.Mine", *common, "--steps=1", f"--out_dir={tmp_path / 'run'}"])
    words = [*[word for word in words if word[0] != "-"], f"--resume={tmp_path / 'run'}", "--steps=2", *words]
    train.main(list(dict.fromkeys(words)))
    assert checkpoint.find(tmp_path / "run").name == "checkpoint-00000002.pt"


class Mine(SimCLR):
    """A method of somebody's own."""

    def __init__(self) -> None:
        super().__init__(ConvNet(4), View(size=16), projector_dim=4)


# -- small things ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("optimizer", ["SparseAdam", "LBFGS"])
def test_an_optimizer_that_needs_more_than_gradients(optimizer: str, tmp_path: Path) -> None:
    words = ["simclr", "--batch_size=8", "--data.shapes.num_train=16", "--steps=1", f"--out_dir={tmp_path / 'run'}"]
    message = refusal(*words, f"--optimizer={optimizer}")
    assert message.startswith("optimizer: ")
    assert not (tmp_path / "run").exists()


def test_a_name_that_is_too_long(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    long = "x" * 300
    assert "File name too long" in refusal(
        "simclr", "--data.shapes.num_train=16", "--batch_size=8", f"--out_dir={long}"
    )
    for suffix in (".json", ".npz"):
        with pytest.raises(UserError, match="--out"):
            require_writable(Path(f"{long}{suffix}"), (suffix,))


def test_ctrl_c_while_python_imports_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").write_text("raise KeyboardInterrupt\n")
    words = [sys.executable, "-m", "sslbook.train"]
    path = os.pathsep.join([str(tmp_path), str(Path(__file__).parents[1])])
    done = subprocess.run(words, cwd=tmp_path, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True)
    assert done.stderr == "stopped\n"
    assert done.returncode != 0


def test_compare_refuses_unlabeled_images_before_it_trains(tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "book" / "results").mkdir(parents=True)
    (tmp_path / "photos").mkdir()
    for i in range(8):
        Image.new("RGB", (16, 16), (i, 2 * i, 3 * i)).save(tmp_path / "photos" / f"{i}.png")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="compared on labeled training and test images"):
        compare("x", ["rotation"], options="--data.folder photos --data.workers 0 --batch_size 4")
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("name", ["../x", ".x", "os.path", "nowhere.x", "os.system"])
def test_what_is_no_tool(name: str) -> None:
    with pytest.raises(UserError, match="cannot be imported"):
        tools.main([name])


def test_a_run_folder_with_an_impossible_name() -> None:
    with pytest.raises(UserError, match="null byte"):
        train.main(["simclr", "--batch_size=8", "--data.shapes.num_train=16", "--out_dir=a\0b"])


@pytest.mark.parametrize(
    "data",
    [{"name": "evilmod.X"}, {"name": "shapes", "shapes": {"class_path": "evilmod.X"}}, {"folder": ["evilmod.X"]}],
)
def test_the_description_of_a_run_names_no_code(data: dict, tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "evilmod.py").write_text(EVIL)
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "backbone.json").write_text(json.dumps({"data": data}))
    with pytest.raises(UserError, match="a class of your own"):
        own_data(str(tmp_path))
    assert not (tmp_path / "evilmod.ran").exists()
    (tmp_path / "backbone.json").write_text("[" * 100_000)
    with pytest.raises(UserError, match="not valid JSON"):
        own_data(str(tmp_path))
