"""The loop: it ends, it resumes to the bit, it stops cleanly, and several processes are one."""

import json
import os
import random
import shutil
import signal
import time
from functools import partial
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image

from sslbook import Data, Shapes, checkpoint, train
from sslbook.cli.recipes import resolve
from sslbook.data.views import View
from sslbook.engine.hooks import Hook, MetricsLog
from sslbook.engine.loop import pretrain
from sslbook.engine.run import Run
from sslbook.errors import UserError
from sslbook.loggers import OnlineKNN, TensorBoard, WandB
from sslbook.methods import METHODS
from sslbook.methods.base import Method
from sslbook.methods.simclr import SimCLR
from sslbook.nn import ResNet
from sslbook.schedules import Clock
from sslbook.weights.backbone import load_backbone
from tests.engine import assert_same_bits, command, lines, start, start_process, weights

TINY_SHAPES = Shapes(num_train=48, num_test=24)
SGD = partial(torch.optim.SGD, lr=0.05, momentum=0.9)
# Equality is shown with SGD: AdamW's first steps have the size of the rate whatever the gradient, rounding included.
PLAIN = '{"class_path": "torch.optim.SGD", "init_args": {"lr": 0.01, "momentum": 0.9}}'


def simclr() -> SimCLR:
    torch.manual_seed(0)
    return SimCLR(ResNet(18, 4, "small"), View(size=16), projector_dim=8)


class Count(Hook):
    """What was called, in order."""

    def __init__(self) -> None:
        self.calls: list[str] = []

    def start(self, run) -> None:
        self.calls.append("start")

    def step(self, run) -> None:
        self.calls.append(f"step {run.clock.step}")

    def epoch(self, run) -> None:
        self.calls.append("epoch")

    def save(self, run, path) -> None:
        self.calls.append("save")

    def end(self, run) -> None:
        self.calls.append("end")


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.slow
def test_every_method_runs_and_resumes_to_the_bit(method: str, tmp_path: Path) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    start(method, whole, steps=7, checkpoint_every="4 steps", keep_last=0)  # an epoch has 6: 4 is in the midst of one
    shutil.copytree(whole, parts)
    for path in checkpoint.checkpoints(parts)[1:]:
        path.unlink()
    (parts / "backbone.safetensors").unlink()
    train.main([method, f"--resume={parts}", "--report=none", "--progress=false"])
    assert [line["step"] for line in lines(parts)] == [line["step"] for line in lines(whole)]
    assert [line["loss"] for line in lines(parts)] == [line["loss"] for line in lines(whole)]
    assert_same_bits(weights(parts), weights(whole))
    assert (parts / "backbone.safetensors").read_bytes() == (whole / "backbone.safetensors").read_bytes()


def test_resumes_into_another_folder(tmp_path: Path) -> None:
    start("rotation", tmp_path / "one", steps=2, checkpoint_every="1 steps", keep_last=0)
    (tmp_path / "one" / "checkpoint-mine.pt").touch()  # somebody else's name is passed over
    train.main([f"--resume={tmp_path / 'one' / 'checkpoint-00000001.pt'}", f"--out_dir={tmp_path / 'other'}"])
    assert_same_bits(weights(tmp_path / "one"), weights(tmp_path / "other"))
    assert (tmp_path / "one" / "config.yaml").read_text() == (tmp_path / "other" / "config.yaml").read_text()


@pytest.mark.slow
def test_killed_at_a_random_moment_it_resumes_to_the_bit(tmp_path: Path) -> None:
    options = {"steps": 40, "checkpoint_every": "1 steps", "data__shapes__num_train": 80}
    start("byol", tmp_path / "whole", **options)
    killed = tmp_path / "killed"
    process = start_process(["-m", "sslbook.train", *command("byol", killed, **options)], tmp_path)
    seed = int.from_bytes(os.urandom(4), "big")
    print(f"killed after a number of steps drawn with seed {seed}")
    until = random.Random(seed).randint(2, 25)
    deadline = time.monotonic() + 120
    while not any(checkpoint.checkpoints(killed)) or int(checkpoint.checkpoints(killed)[-1].stem[-8:]) < until:
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < deadline
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    torch.set_num_threads(1)  # as the killed process had: sums over more threads round differently
    start("byol", tmp_path / "single", **options)
    train.main(["byol", f"--resume={killed}", "--progress=false", "--report=none"])
    assert_same_bits(weights(killed), weights(tmp_path / "single"))
    assert [line["step"] for line in lines(killed)] == list(range(1, 41))


@pytest.mark.slow
def test_sigterm_saves_and_leaves_cleanly(tmp_path: Path) -> None:
    out = tmp_path / "run"
    words = command("simclr", out, steps=100_000, checkpoint_every="100000 steps")
    process = start_process(["-m", "sslbook.train", *words], tmp_path)
    deadline = time.monotonic() + 120
    while not (out / "metrics.jsonl").exists() or not lines_so_far(out):
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.terminate()
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 0
    assert "--resume" in output
    state = checkpoint.load(checkpoint.find(out))
    assert state["step"] == lines(out)[-1]["step"]


def lines_so_far(folder: Path) -> int:
    return (folder / "metrics.jsonl").read_text().count("\n")


@pytest.mark.slow
def test_torchrun_with_two_processes_is_one_process(tmp_path: Path) -> None:
    options = {"steps": 4, "device": "cpu", "optimizer": PLAIN, "report": "full"}  # which is one process's work
    torch.set_num_threads(1)
    start("rotation", tmp_path / "one", **{**options, "report": "none"})
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "sslbook.train"]
    process = start_process([*torchrun, *command("rotation", tmp_path / "two", **options)], tmp_path)
    output, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    assert output.count("training images") == 1  # said once, not by every process
    tables = json.loads((tmp_path / "two" / "report.json").read_text())["tables"]
    assert "supervised" in tables["summary"]
    one, two = weights(tmp_path / "one"), weights(tmp_path / "two")
    for name in one:
        torch.testing.assert_close(two[name], one[name], rtol=1e-3, atol=1e-4, msg=lambda m, n=name: f"{n}: {m}")
    for a, b in zip(lines(tmp_path / "one"), lines(tmp_path / "two"), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-5)


@pytest.mark.slow
def test_accumulation_is_the_whole_batch_for_a_loss_without_interaction(tmp_path: Path) -> None:
    """Rotation with a transformer: no batch norm and no negatives, so parts of a batch are independent."""
    backbone = (
        '{"class_path": "sslbook.nn.VisionTransformer", "init_args": '
        '{"image_size": 16, "patch_size": 8, "dim": 8, "depth": 1, "num_heads": 1}}'
    )
    for name, parts in (("whole", 1), ("parts", 4)):
        start("rotation", tmp_path / name, steps=3, grad_accum_steps=parts, method__backbone=backbone, optimizer=PLAIN)
    whole, parts = weights(tmp_path / "whole"), weights(tmp_path / "parts")
    for name in whole:
        torch.testing.assert_close(parts[name], whole[name], rtol=1e-4, atol=1e-6)


@pytest.mark.slow
def test_hooks_see_every_event_and_change_nothing(tmp_path: Path) -> None:
    data, count = Data(shapes=TINY_SHAPES), Count()
    common = {"batch_size": 16, "steps": 4, "progress": False}
    plain = pretrain(simclr(), data, SGD, out_dir=str(tmp_path / "a"), **common)
    hooks = [count, OnlineKNN(every=1, k=3), TensorBoard(every=1), WandB(every=1)]
    watched = pretrain(simclr(), data, SGD, out_dir=str(tmp_path / "b"), hooks=hooks, **common)
    assert_same_bits(dict(plain.method.state_dict()), dict(watched.method.state_dict()))
    assert count.calls == [
        *("start", "step 1", "step 2", "step 3", "epoch", "save"),
        *("step 4", "epoch", "save", "end"),
    ]
    assert 0 <= watched.evaluations["knn"] <= 100
    assert any("knn" in line for line in lines(tmp_path / "b"))
    assert list((tmp_path / "b" / "tensorboard").glob("events*"))
    assert list((tmp_path / "b" / "wandb").glob("offline-run*"))


def test_monitor_and_keep_last(tmp_path: Path) -> None:
    class Score(Hook):
        measures = ("score",)
        values = iter([10.0, 30.0, 20.0])

        def epoch(self, run) -> None:
            run.evaluations["score"] = next(self.values)

    options = {"batch_size": 16, "epochs": 3, "progress": False, "monitor": "score", "keep_last": 2}
    pretrain(simclr(), Data(shapes=TINY_SHAPES), SGD, out_dir=str(tmp_path), hooks=[Score()], **options)
    assert [path.stem for path in checkpoint.checkpoints(tmp_path)] == ["checkpoint-00000006", "checkpoint-00000009"]
    assert checkpoint.load(tmp_path / "best.pt")["step"] == 6
    options = {**options, "monitor": "scor"}
    with pytest.raises(UserError, match="did you mean score"):
        pretrain(simclr(), Data(shapes=TINY_SHAPES), SGD, out_dir=str(tmp_path / "x"), hooks=[Score()], **options)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.slow
def test_mixed_precision_with_clipping_compiles_down_to_numbers(precision: str, tmp_path: Path) -> None:
    start("mae", tmp_path / "run", steps=3, precision=precision, clip_grad_norm=1.0)
    assert all(line["loss"] == line["loss"] and "gradient_norm" in line for line in lines(tmp_path / "run"))


@pytest.mark.slow
def test_channels_last_changes_nothing_but_the_layout(tmp_path: Path) -> None:
    start("rotation", tmp_path / "a", steps=2)
    start("rotation", tmp_path / "b", steps=2, channels_last="true")
    for a, b in zip(lines(tmp_path / "a"), lines(tmp_path / "b")):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-3)


class Explodes(Method):
    """Its loss becomes NaN at step 2."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = ResNet(18, 4, "small")

    def views(self) -> tuple[View, ...]:
        return (View(size=16),)

    def forward(self, batch, clock):
        loss = self.backbone(batch.views[0]).mean()
        return {"loss": loss * float("nan") if clock.step == 2 else loss}


def test_nan_loss_stops_and_leaves_what_a_replay_needs(tmp_path: Path, capsys) -> None:
    with pytest.raises(UserError, match=r"became nan at step 2 \(epoch 0\).*replay"):
        train.main(
            ["tests.test_train.Explodes", f"--out_dir={tmp_path}", "--batch_size=8", "--data.shapes.num_train=48"]
        )
    (failure,) = tmp_path.glob("failed-step-2-rank-0.pt")
    from sslbook.tools.replay import replay

    with pytest.raises(UserError, match="code outside sslbook"):
        replay(str(failure))
    replay(str(failure), trust=True)
    output = capsys.readouterr().out
    assert "0 parameters hold NaN" in output
    assert "the loss itself is nan" in output


@pytest.mark.slow
def test_a_finished_run_says_so(tmp_path: Path, capsys) -> None:
    start("rotation", tmp_path, steps=2)
    before = weights(tmp_path)
    train.main([f"--resume={tmp_path}", "--report=none", "--progress=false"])
    assert "is finished: 2 of 2 steps" in capsys.readouterr().out
    assert_same_bits(weights(tmp_path), before)


@pytest.mark.slow
def test_a_failed_start_leaves_no_folder(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    words = [word for word in command("rotation", None, steps=1) if not word.startswith("--batch_size")]
    (tmp_path / "runs" / "rotation-shapes").mkdir(parents=True)  # an empty folder is used again
    with pytest.raises(UserError, match="matches no parameter"):
        train.main([*words, "--batch_size=8", '--rules=[{"pattern": "nothing"}]'])
    assert not (tmp_path / "runs" / "rotation-shapes").exists()
    train.main([*words, "--batch_size=8"])
    assert (tmp_path / "runs" / "rotation-shapes" / "config.yaml").exists()


@pytest.mark.slow
def test_the_four_ways_to_start(tmp_path: Path) -> None:
    """MMPretrain's load_from and resume: each combination has one spelling here."""
    out = tmp_path / "run"
    start("simclr", out, steps=3)
    fresh = weights(out)
    start("simclr", tmp_path / "warm", steps=3, init_from=str(out))  # weights from elsewhere, a new run
    assert checkpoint.load(checkpoint.find(tmp_path / "warm"))["step"] == 3
    assert not torch.equal(weights(tmp_path / "warm")["backbone.conv1.weight"], fresh["backbone.conv1.weight"])
    start("simclr", tmp_path / "new", steps=3, resume="auto")  # nothing to resume: a fresh run
    assert_same_bits(weights(tmp_path / "new"), fresh)
    train.main(["simclr", f"--out_dir={out}", "--resume", "--steps=5"])  # bare --resume: go on in this folder
    assert checkpoint.load(checkpoint.find(out))["step"] == 5
    path = checkpoint.find(out)
    train.main([f"--resume={path}", "--steps=6"])  # from a file; the method is read from its run
    assert checkpoint.load(checkpoint.find(out))["step"] == 6


@pytest.mark.slow
def test_the_resolved_configuration_is_accepted_back(tmp_path: Path) -> None:
    start("rotation", tmp_path / "a", steps=2, method__view__crop="null", rules='[{"pattern": "head", "lr_scale": 2}]')
    written = yaml.safe_load((tmp_path / "a" / "config.yaml").read_text())
    assert written["method"]["class_path"] == "sslbook.methods.rotation.Rotation"
    assert written["method"]["init_args"]["view"]["crop"] is None
    train.main(["--config", str(tmp_path / "a" / "config.yaml"), f"--out_dir={tmp_path / 'b'}"])
    assert yaml.safe_load((tmp_path / "b" / "config.yaml").read_text()) == written
    assert_same_bits(weights(tmp_path / "b"), weights(tmp_path / "a"))


@pytest.mark.parametrize("words", [["simmim", "--recipe=imagenet"], ["odc"], ["dino", "--recipe=imagenet"]])
def test_a_written_configuration_is_that_of_its_recipe(words: list[str], tmp_path: Path) -> None:
    """Alone and laid over the recipe, also with keyword arguments of a timm model and a backbone within a backbone."""
    _, _, resolved = resolve(words, pretrain)
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(resolved))
    for again in ([], words):
        assert resolve([*again, f"--config={tmp_path / 'config.yaml'}"], pretrain)[2] == resolved


def test_a_class_that_is_replaced_takes_its_arguments_along() -> None:
    words = ["simclr", "--recipe=folder", "--data.folder=.", "--method.backbone=resnet50", "--optimizer", "SGD"]
    _, _, resolved = resolve([*words, "--optimizer.lr=0.3", "--schedule=Cosine"], pretrain)
    assert resolved["method"]["init_args"]["backbone"] == {
        "class_path": "sslbook.nn.resnet50",
        "init_args": {"width": 64, "stem": "imagenet", "zero_init_residual": False, "in_channels": 3},
    }
    assert resolved["optimizer"]["init_args"]["lr"] == 0.3
    assert resolved["optimizer"]["init_args"]["weight_decay"] == 0.0
    words = ["simclr", "--recipe=folder", "--data.folder=.", "--method.backbone.width=16", "--optimizer.lr=0.5"]
    _, _, resolved = resolve(words, pretrain)
    assert resolved["method"]["init_args"]["backbone"]["init_args"]["depth"] == 18
    assert resolved["optimizer"]["init_args"]["weight_decay"] == 0.05


def test_from_python_without_a_command_line(tmp_path: Path) -> None:
    run = pretrain(
        simclr(), Data(shapes=TINY_SHAPES), SGD, batch_size=16, epochs=1, out_dir=str(tmp_path), progress=False
    )
    assert run.finished
    assert run.clock.step == 3
    backbone, facts = load_backbone(tmp_path)
    assert facts["view"]["size"] == 16
    assert torch.equal(backbone.conv1.weight, run.method.backbone.conv1.weight)
    assert json.loads((tmp_path / "backbone.json").read_text())["method"] == "SimCLR"


@pytest.mark.slow
def test_a_run_from_weights_is_resumed_like_any_other(tmp_path: Path) -> None:
    start("rotation", tmp_path / "source", steps=1)
    options = {
        "steps": 3,
        "seed": 1,
        "checkpoint_every": "1 steps",
        "keep_last": 0,
        "init_from": str(tmp_path / "source"),
    }
    start("rotation", tmp_path / "run", **options)
    whole = weights(tmp_path / "run")
    checkpoint.checkpoints(tmp_path / "run")[-1].unlink()
    train.main([f"--resume={tmp_path / 'run'}", "--progress=false", "--report=none"])
    assert_same_bits(weights(tmp_path / "run"), whole)


@pytest.mark.slow
def test_the_control_of_a_run_from_weights_has_random_ones(tmp_path: Path) -> None:
    start("rotation", tmp_path / "source", steps=1)
    given = load_backbone(tmp_path / "source")[0].state_dict()
    start("rotation", tmp_path / "run", steps=1, seed=1, init_from=str(tmp_path / "source"), report="quick")
    fresh = load_backbone(tmp_path / "run" / "initial.safetensors")[0].state_dict()
    assert not torch.equal(fresh["conv1.weight"], given["conv1.weight"])


@pytest.mark.slow
def test_resuming_an_older_checkpoint_renames_newer_ones(tmp_path: Path, capsys) -> None:
    run = tmp_path / "run"
    start("rotation", run, steps=4, checkpoint_every="1 steps", keep_last=0)
    ahead = (run / "checkpoint-00000004.pt").read_bytes()
    words = ["--keep_last=1", "--progress=false", "--report=none"]
    train.main([f"--resume={run / 'checkpoint-00000002.pt'}", *words])
    assert "renamed to aside-1-checkpoint-00000003.pt" in capsys.readouterr().out
    assert (run / "aside-1-checkpoint-00000004.pt").read_bytes() == ahead
    assert [path.name for path in checkpoint.checkpoints(run)] == ["checkpoint-00000004.pt"]


def test_nan_weights_are_not_saved(tmp_path: Path) -> None:
    class Spoil(Hook):
        def step(self, run) -> None:
            if run.clock.step == 2:
                with torch.no_grad():
                    next(run.method.parameters()).fill_(torch.nan)

    options = {"batch_size": 16, "epochs": 1, "checkpoint_every": "1 steps", "progress": False, "hooks": [Spoil()]}
    with pytest.raises(UserError, match="became NaN or Inf by step 2"):
        pretrain(simclr(), Data(shapes=TINY_SHAPES), SGD, out_dir=str(tmp_path), **options)
    assert [path.name for path in checkpoint.checkpoints(tmp_path)] == ["checkpoint-00000001.pt"]


def test_monitored_metric_may_be_measured_now_and_then(tmp_path: Path) -> None:
    options = {"batch_size": 16, "epochs": 3, "progress": False, "monitor": "knn"}
    data = Data(shapes=TINY_SHAPES)
    pretrain(simclr(), data, SGD, out_dir=str(tmp_path / "a"), hooks=[OnlineKNN(every=2, k=3)], **options)
    assert checkpoint.load(tmp_path / "a" / "best.pt")["step"] in (6, 9)
    with pytest.raises(UserError, match="nothing measures 'knn'"):
        pretrain(simclr(), data, SGD, out_dir=str(tmp_path / "b"), **options)
    assert not (tmp_path / "b").exists()  # told before anything is trained


def test_a_hook_that_fails_at_the_start_leaves_the_keyboard_alone(tmp_path: Path) -> None:
    class Broken(Hook):
        def start(self, run) -> None:
            raise RuntimeError("no")

    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(RuntimeError, match="no"):
        pretrain(
            simclr(), Data(shapes=TINY_SHAPES), SGD, out_dir=str(tmp_path), batch_size=16, steps=1, hooks=[Broken()]
        )
    assert signal.getsignal(signal.SIGINT) is before


def test_lines_of_metrics_hold_numbers_only(tmp_path: Path) -> None:
    run = Run(simclr(), Data(shapes=TINY_SHAPES), tmp_path, Clock(0, 4, 2), torch.device("cpu"), 16, {})
    run.evaluations = {"knn": 50.0}
    hook = MetricsLog(every=2)
    hook.start(run)
    for step, norm in enumerate((float("inf"), 3.0, float("nan"), float("nan")), start=1):
        run.clock, run.metrics = Clock(step, 4, 2), {"loss": 1.0, "gradient_norm": norm, "lr": 0.1}
        hook.step(run)
    hook.epoch(run)  # what was measured before the run was resumed is not new
    first, second = lines(tmp_path)
    assert first["gradient_norm"] == 3.0
    assert "gradient_norm" not in second
    assert second["loss"] == 1.0


@pytest.mark.slow
def test_auto_goes_on_with_runs_of_these_data_only(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("A", "Aa", "other/A"):
        folder = tmp_path / name / "x"
        folder.mkdir(parents=True)
        for i in range(8):
            Image.new("RGB", (16, 16), (i, 2 * i, 3 * i)).save(folder / f"{i}.png")
    words = command("rotation", tmp_path / "unused", steps=1, batch_size=4, data__workers=0)
    words = [word for word in words if not word.startswith(("--out_dir", "--data"))] + ["--data.workers=0"]
    for name, run in (("Aa", "rotation-Aa"), ("A", "rotation-A"), ("other/A", "rotation-A-2")):
        train.main([*words, f"--data.folder={tmp_path / name}", "--resume=auto"])
        assert (tmp_path / "runs" / run / "config.yaml").exists()


def test_a_folder_named_in_a_file_gets_the_recipe_for_folders(tmp_path: Path) -> None:
    (tmp_path / "x").mkdir()
    for i in range(4):
        Image.new("RGB", (80, 80), (i, 2 * i, 3 * i)).save(tmp_path / "x" / f"{i}.png")
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump({"data": {"folder": str(tmp_path / "x")}}))
    _, _, named = resolve(["simclr", "--config", str(tmp_path / "mine.yaml")], pretrain)
    _, _, given = resolve(["simclr", f"--data.folder={tmp_path / 'x'}"], pretrain)
    assert named == given


@pytest.mark.parametrize(("wait", "told"), [(12.0, True), (0.25, False)])
def test_time_spent_waiting_for_images_is_logged(
    wait: float, told: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    now = [0.0]  # a clock that only loading and the forward pass move
    monkeypatch.setattr("sslbook.engine.loop.time.perf_counter", lambda: now[0])
    original, forward = Data.batches, SimCLR.forward

    def slow(self: Data, *args, **kwargs):
        for batch in original(self, *args, **kwargs):
            now[0] += wait
            yield batch

    def computing(self: SimCLR, *args):
        now[0] += 12.0
        return forward(self, *args)

    monkeypatch.setattr(Data, "batches", slow)
    monkeypatch.setattr(SimCLR, "forward", computing)
    (tmp_path / "photographs").mkdir()
    for number in range(24):
        Image.new("RGB", (20, 20), (10 * number, 0, 0)).save(tmp_path / "photographs" / f"{number}.png")
    data = Data(folder=tmp_path / "photographs", workers=0)
    run = pretrain(simclr(), data, SGD, batch_size=8, epochs=2, log_every=1, out_dir=tmp_path / "run")
    waits = {line["data_wait"] for line in lines(run.folder) if "data_wait" in line}
    assert waits == {round(100 * wait / (wait + 12), 1)}
    assert ("50% of the time went into waiting for images" in capsys.readouterr().out) == told
