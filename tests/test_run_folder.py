"""The folder of a run: one process at a time, nothing of others overwritten, its plots never taken for images."""

import errno
import os
import signal
import socket
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from sslbook import checkpoint
from sslbook.data.datasets.folder import scan
from sslbook.data.datasets.shapes import Shapes
from sslbook.data.loader import Data
from sslbook.data.views import View
from sslbook.engine import run_lock
from sslbook.engine.loop import pretrain
from sslbook.engine.run_lock import RunLock
from sslbook.errors import UserError
from sslbook.methods.simclr import SimCLR
from sslbook.nn import ConvNet

ADAMW = partial(torch.optim.AdamW, lr=1e-3)


def train(data: Data | None = None, **options) -> object:
    method = SimCLR(ConvNet(4), View(size=16), projector_dim=4)
    data = data or Data(shapes=Shapes(num_train=16, num_test=4, size=16))
    return pretrain(method, data, ADAMW, batch_size=8, device="cpu", progress=False, **{"steps": 2, **options})


def photos(folder: Path, count: int = 6) -> Path:
    for kind in ("a", "b"):
        (folder / kind).mkdir(parents=True)
        for i in range(count):
            pixels = np.random.default_rng(i).integers(0, 255, (24, 24, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / kind / f"{i}.png")
    return folder


@pytest.fixture
def brisk(monkeypatch) -> None:
    monkeypatch.setattr(run_lock, "HEARTBEAT", 0.1)
    monkeypatch.setattr(run_lock, "PATIENCE", 1.0)


def test_a_second_run_in_the_same_folder_is_refused_and_the_first_goes_on(tmp_path: Path, brisk) -> None:
    with RunLock(tmp_path).acquire():
        with pytest.raises(UserError, match=rf"process {os.getpid()} on .* works there"):
            train(out_dir=str(tmp_path))
        with pytest.raises(UserError, match="works there"):
            RunLock(tmp_path).acquire()
    train(out_dir=str(tmp_path))  # the lock was given back
    assert not (tmp_path / ".lock").exists()


def test_two_resumes_at_once_are_not_both_let_in(tmp_path: Path, brisk) -> None:
    train(out_dir=str(tmp_path))
    with RunLock(tmp_path).acquire(), pytest.raises(UserError, match="works there"):
        train(resume=str(tmp_path), steps=4)


@pytest.mark.slow
@pytest.mark.parametrize("host", [socket.gethostname(), "another-machine"])
def test_the_lock_of_a_dead_process_is_taken_over(host: str, tmp_path: Path, brisk, capsys) -> None:
    done = subprocess.Popen([sys.executable, "-c", ""])
    done.wait()
    (tmp_path / ".lock").write_text(f"process {done.pid} on {host}\nabc\n0\n")
    (tmp_path / ".checkpoint-00000002.pt.x.part").write_bytes(b"half a checkpoint")
    train(out_dir=str(tmp_path))
    assert "its lock is taken over" in capsys.readouterr().out
    assert not list(tmp_path.glob(".*"))


@pytest.mark.slow
def test_the_lock_of_a_living_process_of_another_machine_is_respected(tmp_path: Path, brisk) -> None:
    script = (
        "import sys, pathlib; from sslbook.engine import run_lock; run_lock.HEARTBEAT = 0.1\n"
        "lock = run_lock.RunLock(pathlib.Path(sys.argv[1])); lock.text = 'process 1 on elsewhere'\n"
        "lock.acquire(); print('held', flush=True); sys.stdin.read()"
    )
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, "-c", script, str(tmp_path)], **pipes) as holder:
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(UserError, match="process 1 on elsewhere works there"):
            RunLock(tmp_path).acquire()
        holder.send_signal(signal.SIGKILL)
    RunLock(tmp_path).acquire().__exit__(None, None, None)


def test_who_has_lost_the_lock_writes_no_checkpoint(tmp_path: Path) -> None:
    class Suspended(SimCLR):
        def after_step(self, clock) -> None:
            (tmp_path / ".lock").write_text("process 1 on elsewhere\nother\n0\n")

    method = Suspended(ConvNet(4), View(size=16), projector_dim=4)
    data = Data(shapes=Shapes(num_train=16, num_test=4, size=16))
    with pytest.raises(UserError, match="another has taken over"):
        pretrain(method, data, ADAMW, batch_size=8, steps=2, device="cpu", progress=False, out_dir=str(tmp_path))
    assert not checkpoint.checkpoints(tmp_path)
    assert (tmp_path / ".lock").read_text().startswith("process 1")


def test_foreign_files_are_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "curves.png").write_text("mine")
    with pytest.raises(UserError, match=r"holds other files \(curves.png\)"):
        train(out_dir=str(tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == ["curves.png"]


@pytest.mark.parametrize("out", ["photos", "photos/runs/one", "."])
def test_a_run_inside_or_above_its_images_is_refused(out: str, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    data = Data(folder=photos(tmp_path / "photos"), workers=0)
    (tmp_path / "link").symlink_to(tmp_path)
    for name in (out, f"link/{out}"):
        with pytest.raises(UserError, match=r"lies (above|inside) the images' folder"):
            train(data, out_dir=name)
    monkeypatch.chdir(tmp_path / "photos")
    with pytest.raises(UserError, match="lies inside the images' folder"):
        train(Data(folder=Path("."), workers=0))
    assert len(scan(tmp_path / "photos")) == 12


def test_the_plots_of_a_run_are_not_images(tmp_path: Path) -> None:
    folder = photos(tmp_path / "photos")
    run = train(out_dir=str(tmp_path / "elsewhere"))
    Image.new("RGB", (9, 9)).save(run.folder / "curves.png")
    run.folder.rename(folder / "c")
    with pytest.warns(UserWarning, match="holds a training run"):
        data = Data(folder=folder, workers=0)
    assert data.class_names == ("a", "b")


def test_the_home_folder_may_be_abbreviated(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    assert train(out_dir="~/here").folder == tmp_path / "here"
    assert train(resume="~/here", steps=3).clock.step == 3
    assert not (tmp_path / "~").exists()


FULL = """
import resource, sys, torch, safetensors.torch
from pathlib import Path
from sslbook import checkpoint
from sslbook.errors import UserError
resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))  # as if the disk were full: nothing larger can be written
tensors = {"a": torch.zeros(99_999)}
path = Path(sys.argv[1])
for write in (
    lambda part: torch.save(tensors, part),
    lambda part: safetensors.torch.save_file(tensors, part),
    lambda part: part.write_bytes(bytes(99_999)),
):
    try:
        checkpoint.write_atomically(path, write)
    except UserError as error:
        print(error)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="files have no greatest size there")
def test_a_full_disk_is_one_line_and_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint-00000001.pt"
    checkpoint.save(path, {"step": 1})
    done = subprocess.run([sys.executable, "-c", FULL, str(path)], capture_output=True, text=True, check=True)
    lines = done.stdout.splitlines()
    assert len(lines) == 3
    assert all(line.startswith(f"{path}: cannot be written (") for line in lines)
    assert checkpoint.load(path, "step")["step"] == 1
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


def test_errors_of_writing_that_are_not_the_disk_stay_what_they_are(tmp_path: Path) -> None:
    def write(part: Path) -> None:
        raise RuntimeError("a bug")

    with pytest.raises(RuntimeError, match="a bug"):
        checkpoint.write_atomically(tmp_path / "x", write)


def test_an_error_of_the_system_is_one_line(capsys) -> None:
    from sslbook.cli.common import run

    def fail() -> None:
        raise OSError(errno.EROFS, "Read-only file system", "/mnt/metrics.jsonl")

    with pytest.raises(SystemExit):
        run(fail)
    assert capsys.readouterr().err == "error: /mnt/metrics.jsonl: Read-only file system\n"


def test_a_link_to_a_pipe_is_no_image_and_a_broken_link_is_reported(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "x.png").symlink_to(tmp_path / "pipe")
    (tmp_path / "y.png").symlink_to(tmp_path / "nothing")
    assert scan(tmp_path) == ["y.png"]


# -- going on ----------------------------------------------------------------------------------------------------------


def test_other_options_of_a_resumed_run_are_written_down(tmp_path: Path, capsys) -> None:
    train(out_dir=str(tmp_path), config={"steps": 2, "optimizer": {"lr": 0.1}, "gone": 1})
    first = (tmp_path / "config.yaml").read_text()
    train(resume=str(tmp_path), steps=4, config={"steps": 4, "optimizer": {"lr": 0.1}, "new": "x"})
    written = (tmp_path / "config-from-step-00000002.yaml").read_text()
    assert written.splitlines()[:3] == ["# gone: 1 -> None", "# new: None -> x", "# steps: 2 -> 4"]
    assert "steps: 2 -> 4" in capsys.readouterr().out
    assert (tmp_path / "config.yaml").read_text() == first
    train(resume=str(tmp_path), steps=6, config={"steps": 2, "optimizer": {"lr": 0.1}, "gone": 1})
    assert not (tmp_path / "config-from-step-00000004.yaml").exists()


def test_another_optimizer_is_refused_at_resume(tmp_path: Path) -> None:
    train(out_dir=str(tmp_path))
    method = SimCLR(ConvNet(4), View(size=16), projector_dim=4)
    data = Data(shapes=Shapes(num_train=16, num_test=4, size=16))
    options = {"batch_size": 8, "steps": 4, "device": "cpu", "progress": False, "resume": str(tmp_path)}
    with pytest.raises(UserError, match="written with optimizer AdamW, this run has SGD"):
        pretrain(method, data, partial(torch.optim.SGD, lr=0.1), **options)


def test_images_that_changed_meanwhile_are_noticed(tmp_path: Path) -> None:
    folder = photos(tmp_path / "photos", 8)
    out = str(tmp_path / "run")
    train(Data(folder=folder, workers=0), out_dir=out)
    train(Data(folder=folder, workers=0), resume=out, steps=3)  # the same images: no warning, which would be an error
    (folder / "a" / "0.png").rename(folder / "a" / "00.png")
    with pytest.warns(UserWarning, match="not those that the run began with"):
        train(Data(folder=folder, workers=0), resume=out, steps=4)


def test_relative_paths_are_found_from_elsewhere(tmp_path: Path, monkeypatch, capsys) -> None:
    from sslbook.evaluate import evaluate, own_data
    from sslbook.train import main

    photos(tmp_path / "photos", 8)
    words = "simclr --batch_size 8 --steps 2 --report none --progress false --method.view.size 16 --data.workers 0"
    words += " --method.backbone ConvNet --method.projector_dim 4 --data.folder photos --out_dir run --device cpu"
    monkeypatch.chdir(tmp_path)
    main(words.split())
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    _, options = own_data("../run")
    assert options["data"]["folder"] == str(tmp_path / "photos")
    main(["--resume", "../run", "--steps", "3"])
    capsys.readouterr()
    images = Data(folder=tmp_path / "photos", workers=0)
    assert set(evaluate("../run", images, progress=False, controls=False, device="cpu")) == {"SimCLR", "chance"}


@pytest.mark.parametrize("options", [{"batch_size": 1}, {"batch_size": 4, "grad_accum_steps": 4}])
def test_one_image_has_no_negatives(options: dict, tmp_path: Path) -> None:
    method = SimCLR(ConvNet(4), View(size=16), projector_dim=4)
    data = Data(shapes=Shapes(num_train=16, num_test=4, size=16))
    with pytest.raises(UserError, match="SimCLR compares at least 2 images and gets 1 at a time"):
        pretrain(method, data, ADAMW, steps=1, device="cpu", out_dir=str(tmp_path), progress=False, **options)


# -- folders that are sorted otherwise ---------------------------------------------------------------------------------


def test_test_images_without_the_training_classes_are_replaced_by_held_out_ones(tmp_path: Path) -> None:
    photos(tmp_path / "train", 10)
    photos(tmp_path / "val" / "images")  # Tiny ImageNet's, whose classes stand in a text file
    with pytest.warns(UserWarning, match="a tenth of the training images is held out"):
        data = Data(folder=tmp_path, workers=0)
    assert (data.num_train, data.num_test, data.has_test_labels) == (18, 2, True)


def test_an_unlabeled_split_that_is_not_used_is_named(tmp_path: Path) -> None:
    for name in ("train", "test", "val"):  # as in BSDS500
        (tmp_path / name).mkdir()
        Image.new("RGB", (9, 9)).save(tmp_path / name / "x.png")
    with pytest.warns(UserWarning, match="not used: val/"):
        Data(folder=tmp_path, workers=0)


# -- workers -----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_worker_killed_between_two_epochs_is_one_line(tmp_path: Path) -> None:
    data = Data(folder=photos(tmp_path), workers=2)
    epoch = {"views": (View(size=16),), "batch_size": 4, "seed": 0}
    assert len(list(data.batches(epoch=0, **epoch))) == 2
    workers = data._idle[1]._loader._iterator._workers
    for worker in workers:
        worker.kill()
        worker.join()
    with pytest.raises(UserError, match=r"a loader worker died .*or set --data\.workers 0"):
        list(data.batches(epoch=1, **epoch))


SMALL_SHARED_MEMORY = """
set -e
mount -t tmpfs -o size=64k tmpfs /dev/shm
exec "$0" -m sslbook.train simclr --data.folder "$1" --out_dir "$2" --batch_size 8 --steps 2 --report none \\
  --progress false --data.workers 1 --method.view.size 96 --method.backbone ConvNet --device cpu
"""


@pytest.mark.slow
def test_a_small_shared_memory_is_one_line_and_not_for_ever(tmp_path: Path) -> None:
    private = ["unshare", "--mount"]
    try:
        subprocess.run([*private, "true"], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("no mounts of its own for a process here")
    words = [
        *private,
        "bash",
        "-c",
        SMALL_SHARED_MEMORY,
        sys.executable,
        str(photos(tmp_path / "p")),
        str(tmp_path / "o"),
    ]
    done = subprocess.run(words, capture_output=True, text=True, timeout=600)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith("error: a loader worker")
    assert "docker run --shm-size 2g" in done.stderr
