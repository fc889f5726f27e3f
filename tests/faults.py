"""Runs that are stopped at a chosen moment, in processes forked from a server that has imported everything once."""

import io
import multiprocessing
import os
import signal
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from sslbook import checkpoint, distributed, train
from sslbook.engine import heartbeat, loop
from sslbook.engine.hooks import Hook
from sslbook.engine.run import Run

PATIENCE = 120.0  # seconds until a process counts as stuck


@dataclass(frozen=True)
class Fault:
    """What happens to one process.

    Args:
        kind: `KILL`, `TERM`, `INT`, or `STALL`: it sleeps.
        moment: `forward`, `update` or `step` (in the middle of it, before the optimizer, after it), or `write`.
        step: at which step.
        part: for `write`: how much of the checkpoint is written before.
        rank: which process.
    """

    kind: str
    moment: str
    step: int
    part: float = 0.5
    rank: int = 0

    def strike(self) -> None:
        if self.kind == "STALL":
            time.sleep(1000)
        os.kill(os.getpid(), getattr(signal, f"SIG{self.kind}"))

    def install(self) -> None:
        """Let it happen in this process."""
        if self.kind.startswith("USR"):
            os.environ["SLURM_JOB_ID"] = "7"
        if self.moment == "write":
            return self._install_in_writing()
        owner, name = {
            "forward": (loop, "_forward_backward"),
            "update": (loop, "_update"),
            "step": (Run, "count_step"),
        }[self.moment]
        original, steps = getattr(owner, name), iter(range(1, 10_000))

        def strikes(*arguments: Any, **options: Any) -> Any:
            if next(steps) == self.step:
                self.strike()
            return original(*arguments, **options)

        setattr(owner, name, strikes)

    def _install_in_writing(self) -> None:
        original, writes = torch.save, iter(range(1, 10_000))

        def strikes(state: Any, path: Path) -> None:
            if next(writes) != self.step:
                return original(state, path)
            original(state, buffer := io.BytesIO())
            content = buffer.getvalue()
            Path(path).write_bytes(content[: int(self.part * len(content))])
            self.strike()
            Path(path).write_bytes(content)

        checkpoint.torch.save = strikes


class Killed(Hook):
    """Kills process 1 after a step, the first time that it comes there.

    Args:
        mark: a file that says that it has happened.
        at: the step.
    """

    def __init__(self, mark: Path, at: int) -> None:
        self.mark, self.at = mark, at

    def step(self, run: Run) -> None:
        if run.clock.step == self.at and distributed.rank() == 1 and not self.mark.exists():
            self.mark.touch()
            os.kill(os.getpid(), signal.SIGKILL)


def work(
    rank: int, world: int, rendezvous: str, words: list[str], fault: Fault | None, log: str, patience: float
) -> None:
    """One process of a run."""
    handle = os.open(log, os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    os.dup2(handle, 1)
    os.dup2(handle, 2)
    torch.set_num_threads(1)
    heartbeat.PATIENCE, heartbeat.BEAT = patience, patience / 10
    if world > 1:
        distributed.init_process_group(rank, world, Path(rendezvous), timeout=PATIENCE)
    if fault is not None and fault.rank == rank:
        fault.install()
    from sslbook.cli.common import run

    run(lambda: train.main(words))


def start(words: list[str], log: Path, world: int = 1, fault: Fault | None = None, patience: float = 60.0) -> list[int]:
    """Run a command in one or two processes to its end; returns their exit codes."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.faults", "tests.engine", "sslbook.methods.simclr"])
    rendezvous = str(log.with_name(f"{log.name}-{time.monotonic_ns()}"))
    processes = []
    for rank in range(world):
        arguments = (rank, world, rendezvous, words, fault, str(log), patience)
        processes.append(context.Process(target=work, args=arguments, daemon=True))
        processes[-1].start()
    deadline = time.monotonic() + PATIENCE
    for process in processes:
        process.join(max(0.1, deadline - time.monotonic()))
        if process.exitcode is None:
            for one in processes:
                one.kill()
            raise AssertionError(f"stuck: {log.read_text()[-2000:]}")
    sys.stdout.flush()
    return [int(process.exitcode or 0) for process in processes]
