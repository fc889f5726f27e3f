"""Stopping without loss: SIGTERM or Ctrl-C lets the step end, a checkpoint is written, and the run leaves.

In a SLURM job SIGUSR1 and SIGUSR2 do the same, which it sends when the job's time is nearly over (`--signal`); then the
job is put into the queue again.
"""

import os
import signal
import subprocess
from types import FrameType, TracebackType

import torch

from sslbook import distributed


class PreemptionHandler:
    """Turns SIGTERM and Ctrl-C into a request that the loop answers; a second Ctrl-C interrupts at once.

    Outside the main thread signals cannot be handled, so there whoever runs the loop decides.
    """

    def __init__(self) -> None:
        self.requested = 0  # the signal
        self.previous: dict[int, object] = {}

    def __enter__(self) -> "PreemptionHandler":
        try:
            for number in (signal.SIGTERM, signal.SIGINT, *_slurm_signals()):
                self.previous[number] = signal.signal(number, self._request)
        except ValueError:  # not the main thread
            pass
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, handler)  # pyrefly: ignore

    def _request(self, number: int, frame: FrameType | None) -> None:
        if self.requested and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.requested = int(number)

    def agreed(self, device: torch.device) -> bool:
        """Whether any process was asked to stop; all of them get the same answer, so all stop after the same step."""
        if distributed.world_size() == 1:
            return self.requested > 0
        self.requested = int(distributed.all_reduce_max(torch.tensor(float(self.requested), device=device)))
        return self.requested > 0


def _slurm_signals() -> list[int]:
    names = ("SIGUSR1", "SIGUSR2") if "SLURM_JOB_ID" in os.environ else ()
    return [int(getattr(signal, name)) for name in names if hasattr(signal, name)]


def requeue(stopped_by: int) -> None:
    """Put this SLURM job into the queue again, if its time was over; `scancel` (SIGTERM) ends it for good."""
    if stopped_by in _slurm_signals():
        subprocess.run(["scontrol", "requeue", os.environ["SLURM_JOB_ID"]], check=False)
