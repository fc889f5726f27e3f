"""Training as a SLURM job, by submitit.

    python -m sslbook.train mae --recipe imagenet --out_dir runs/mae --launcher slurm --slurm.nodes 4 --slurm.gpus_per_node 8

The job is the same command with `--resume auto`, a process for each GPU. Shortly before its time is over SLURM sends a
signal: the run saves, leaves and goes into the queue again (`sslbook.engine.preemption`), until it is finished.
"""

import runpy
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sslbook.errors import UserError, explained, import_extra
from sslbook.types import PositiveFloat, PositiveInt


@dataclass(frozen=True)
class Slurm:
    """What a job asks for.

    Args:
        nodes: machines.
        gpus_per_node: GPUs, and so processes, on each.
        cpus_per_gpu: cores for each process and its loader workers.
        hours: time until the job is put into the queue again.
        partition: partition, or SLURM's default.
        account: account, or yours.
        signal_seconds: how long before the end of its time the run gets a signal.
        dry_run: print the job's script, and submit nothing.
    """

    nodes: PositiveInt = 1
    gpus_per_node: PositiveInt = 1
    cpus_per_gpu: PositiveInt = 8
    hours: PositiveFloat = 24.0
    partition: str | None = None
    account: str | None = None
    signal_seconds: PositiveInt = 180
    dry_run: bool = False


@dataclass(frozen=True)
class Job:
    """What every process of the job calls.

    Args:
        words: the command line of `sslbook.train`.
    """

    words: list[str]

    def __call__(self) -> None:
        import submitit

        submitit.helpers.TorchDistributedEnvironment().export(set_cuda_visible_devices=False)
        sys.argv[1:] = self.words
        runpy.run_module("sslbook.train", run_name="__main__")

    def checkpoint(self) -> Any:
        """Called by submitit when the time is over before the first step: the same again."""
        import submitit

        return submitit.helpers.DelayedSubmission(self)


def submit(argv: list[str], options: Slurm, out_dir: Path | None) -> None:
    """Submit a command line of `sslbook.train`, or print what would be submitted.

    Args:
        argv: the words, with those for SLURM.
        options: what the job asks for.
        out_dir: the run's folder; the job's own files go beside it.

    Raises:
        UserError: there is no folder by which the job finds its run again, no submitit, or no SLURM.
    """
    submitit: Any = import_extra("submitit", "slurm")
    if out_dir is None:
        raise UserError(
            "--launcher slurm: give --out_dir, by which a job that was put into the queue again finds its run"
        )
    words, skip = [], False
    for word in argv:
        own = word.startswith(("--launcher", "--slurm."))
        if not own and not (skip and not word.startswith("--")):
            words.append(word)
        skip = own and "=" not in word
    words += [] if any(word.startswith("--resume") for word in words) else ["--resume=auto"]
    folder = out_dir.with_name(f"{out_dir.name}-slurm")
    asked = {
        "job_name": out_dir.name,
        "nodes": options.nodes,
        "ntasks_per_node": options.gpus_per_node,
        "gpus_per_node": options.gpus_per_node,
        "cpus_per_task": options.cpus_per_gpu,
        "time": max(1, round(60 * options.hours)),
        "partition": options.partition,
        "account": options.account,
        "signal_delay_s": options.signal_seconds,
        "additional_parameters": {"requeue": True},
    }
    asked = {name: value for name, value in asked.items() if value is not None}
    if options.dry_run:
        from submitit.slurm.slurm import _make_sbatch_string

        print(_make_sbatch_string(command=f"python -m sslbook.train {shlex.join(words)}", folder=folder, **asked))
        return
    kinds, cure = (RuntimeError, OSError, submitit.core.utils.FailedJobError), "--slurm.dry_run true prints the job"
    with explained("--launcher slurm: no job was submitted", *kinds, cure=cure):
        executor = submitit.SlurmExecutor(folder=folder)
        executor.update_parameters(**asked)
        job = executor.submit(Job(words))
    print(f"submitted job {job.job_id}; its output goes to {folder}, the run to {out_dir}")
