"""Stopped at any moment, a run goes on to the bit: signals by seed and step, one process and two, in the midst of writing.

Ten runs here; SSLBOOK_FAULTS=60 tries more of them.
"""

import json
import os
import random
import sys
from pathlib import Path

import pytest
import torch

from sslbook import checkpoint, train
from sslbook.cli.slurm import Job
from sslbook.engine.run import Run
from sslbook.errors import UserError
from tests.conftest import SEED
from tests.engine import assert_same_bits, command, lines, start_process, weights
from tests.faults import Fault, start

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="signals, fork")
RUNS = int(os.environ.get("SSLBOOK_FAULTS", "10"))
FAMILIES = [
    "simclr",
    "moco",
    "npid",
    "byol",
    "dino",
    "swav",
    "deepcluster",
    "mae",
    "ijepa",
    "dvae",
    "rotation",
    "vicreg",
]
STEPS = 8
PLAIN = '{"class_path": "torch.optim.SGD", "init_args": {"lr": 0.01, "momentum": 0.9}}'
OPTIONS = {"steps": STEPS, "checkpoint_every": "1 steps", "keep_last": 2, "epochs": None, "device": "cpu"}
CHOICE = random.Random(SEED)
CASES = [
    (
        FAMILIES[i % len(FAMILIES)],
        1 + (i % 3 == 2),
        Fault(
            kind=CHOICE.choice(["KILL", "KILL", "TERM", "INT"]),
            moment=CHOICE.choice(["forward", "update", "step", "write"]),
            step=CHOICE.randint(1, STEPS - 1),
            part=CHOICE.random(),
            rank=CHOICE.randrange(2) if i % 3 == 2 else 0,
        ),
    )
    for i in range(RUNS)
]


@pytest.fixture(scope="module")
def wholes(tmp_path_factory) -> dict:
    return {"folder": tmp_path_factory.mktemp("whole")}


@pytest.mark.parametrize(("method", "world", "fault"), CASES, ids=lambda value: str(value)[:60].replace(" ", ""))
def test_a_stopped_run_goes_on_to_the_bit(method: str, world: int, fault: Fault, tmp_path: Path, wholes: dict) -> None:
    whole = wholes["folder"] / f"{method}-{world}"
    if not whole.exists():
        assert start(command(method, whole, **OPTIONS), whole.with_suffix(".log"), world) == [0] * world
    run, log = tmp_path / "run", tmp_path / "log"
    words = [*command(method, run, **OPTIONS), "--resume=auto"]
    codes = start(words, log, world, fault)
    if fault.kind == "KILL" and not (fault.moment == "write" and fault.rank == 1):  # only process 0 writes
        assert codes[fault.rank] == -9
        assert not (run / "backbone.safetensors").exists()
    else:
        assert codes == [0] * world, log.read_text()[-2000:]  # it saved, and left
    assert start(words, log, world) == [0] * world, log.read_text()[-2000:]
    assert_same_bits(weights(run), weights(whole))
    assert [line["step"] for line in lines(run)] == list(range(1, STEPS + 1))
    assert "Traceback" not in log.read_text()
    assert [path.name for path in run.glob(".*")] == []


@pytest.mark.slow
@pytest.mark.parametrize("moment", ["forward", "update"])
def test_a_stalled_process_is_named(moment: str, tmp_path: Path) -> None:
    log = tmp_path / "log"
    words = command("simclr", tmp_path / "run", **OPTIONS)
    codes = start(words, log, 2, Fault("STALL", moment, 3, rank=1), patience=3.0)
    assert codes == [2, 2]
    assert "process 1 of 2 stands in faults.py" in log.read_text()
    assert "the others wait" in log.read_text()


@pytest.mark.slow
@pytest.mark.parametrize(("before", "after"), [(2, 1), (1, 2)])
def test_another_number_of_processes_keeps_the_trajectory(before: int, after: int, tmp_path: Path) -> None:
    """Rotation, whose training is stable: SimCLR's at this size makes 1e-2 of a rounding error in two steps."""
    options = {**OPTIONS, "optimizer": PLAIN}
    start(command("rotation", tmp_path / "whole", **options), tmp_path / "log")
    words = command("rotation", tmp_path / "parts", **options)
    codes = start(words, tmp_path / "log", before, Fault("TERM", "step", 4))
    assert codes == [0] * before, (tmp_path / "log").read_text()[-2000:]
    assert checkpoint.load(checkpoint.find(tmp_path / "parts"))["step"] == 4
    codes = start([*words, "--resume=auto"], tmp_path / "log", after)
    assert codes == [0] * after, (tmp_path / "log").read_text()[-2000:]
    one, other = weights(tmp_path / "whole"), weights(tmp_path / "parts")
    for name in one:
        torch.testing.assert_close(other[name], one[name], rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.slow
@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_torchrun_starts_a_killed_process_again(parallel: str, tmp_path: Path) -> None:
    """The survivor ends, both start anew, and the run goes on from its last checkpoint as if nothing had happened."""
    options = {**OPTIONS, "parallel": parallel}
    hooks = [{"class_path": "tests.faults.Killed", "init_args": {"mark": str(tmp_path / "mark"), "at": 3}}]
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "--max-restarts=2"]
    for run, watched in (("killed", json.dumps(hooks)), ("whole", "[]")):
        words = [*command("rotation", tmp_path / run, **{**options, "hooks": watched}), "--resume=auto"]
        process = start_process([*torchrun, "-m", "sslbook.train", *words], tmp_path)
        _, errors = process.communicate(timeout=600)
        assert process.returncode == 0, errors[-3000:]
        assert "Traceback" not in errors
    assert (tmp_path / "mark").exists()
    assert [line["step"] for line in lines(tmp_path / "killed")] == list(range(1, STEPS + 1))
    assert_same_bits(weights(tmp_path / "killed"), weights(tmp_path / "whole"))


# -- SLURM -------------------------------------------------------------------------------------------------------------

SLURM = ["--launcher=slurm", "--slurm.nodes=2", "--slurm.gpus_per_node", "4", "--slurm.hours=1.5"]


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "again"), [("USR2", True), ("TERM", False)])
def test_a_job_whose_time_is_over_saves_and_is_put_into_the_queue_again(
    kind: str, again: bool, tmp_path: Path, monkeypatch
) -> None:
    from sslbook.engine import preemption

    calls: list[list[str]] = []
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setattr(preemption.subprocess, "run", lambda words, **_: calls.append(words))
    monkeypatch.setattr(Run, "count_step", Run.count_step)
    fault = Fault(kind, "step", 3)
    fault.install()
    train.main(command("rotation", tmp_path / "run", **OPTIONS))
    assert checkpoint.load(checkpoint.find(tmp_path / "run"))["step"] == 3
    assert calls == ([["scontrol", "requeue", "7"]] if again else [])


def test_the_job_is_printed_and_not_submitted(tmp_path: Path, capsys) -> None:
    pytest.importorskip("submitit", reason="needs submitit")
    words = command("simclr", tmp_path / "run", **OPTIONS)
    train.main([*words, *SLURM, "--slurm.dry_run=true", "--slurm.partition=gpu"])
    script = capsys.readouterr().out
    for line in ("nodes=2", "ntasks-per-node=4", "time=90", "signal=USR2@180", "requeue", "partition=gpu"):
        assert f"#SBATCH --{line}\n" in script
    assert f"--out_dir={tmp_path / 'run'} --resume=auto" in script
    assert "slurm.nodes" not in script
    assert not list(tmp_path.iterdir())
    with pytest.raises(UserError, match=r"--launcher slurm: .*srun.*dry_run true"):
        train.main([*words, *SLURM])
    with pytest.raises(UserError, match="give --out_dir"):
        train.main(["simclr", *SLURM])


@pytest.mark.filterwarnings("ignore:.*found in sys.modules:RuntimeWarning")
def test_the_job_is_the_command(tmp_path: Path, monkeypatch) -> None:
    submitit = pytest.importorskip("submitit", reason="needs submitit")
    job = Job(command("rotation", tmp_path / "run", **{**OPTIONS, "steps": 1}))
    assert job.checkpoint().function == job
    exported: list[dict] = []
    environment = type("Environment", (), {"export": lambda self, **options: exported.append(options)})
    monkeypatch.setattr(submitit.helpers, "TorchDistributedEnvironment", environment)
    monkeypatch.setattr(sys, "argv", ["submitit"])
    job()
    assert exported == [{"set_cuda_visible_devices": False}]
    assert checkpoint.find(tmp_path / "run").name == "checkpoint-00000001.pt"
