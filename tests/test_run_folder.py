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


@pytest.mark.parametrize("host", [socket.gethostname(), "another-machine"])
def test_the_lock_of_a_dead_process_is_taken_over(host: str, tmp_path: Path, brisk, capsys) -> None:
    done = subprocess.Popen([sys.executable, "-c", ""])
    done.wait()
    (tmp_path / ".lock").write_text(f"process {done.pid} on {host}\nabc\n0\n")
    (tmp_path / ".checkpoint-00000002.pt.x.part").write_bytes(b"half a checkpoint")
    train(out_dir=str(tmp_path))
    assert "its lock is taken over" in capsys.readouterr().out
    assert not list(tmp_path.glob(".*"))


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
