"""A training in progress, as hooks and reports see it."""

import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from sslbook.data.loader import Data
from sslbook.methods.base import Method
from sslbook.schedules import Clock


@dataclass
class Run:
    """A training in progress, as hooks see it.

    Args:
        method: the method, not wrapped for several processes.
        data: what it learns from.
        folder: where its files go.
        clock: optimizer steps taken, and how many there will be.
        device: where it computes.
        batch_size: images per optimizer step over all processes.
        config: the resolved configuration.
        metrics: what the last step logged: `loss`, `lr`, and the method's own.
        evaluations: what hooks measured, such as `knn` in percent; one of them can be monitored for the best checkpoint.
        seconds: time spent in training steps, over all resumptions.
        seconds_waited: for images, since the run began or was resumed; of `seconds_here` in training steps.
        seconds_here: see `seconds_waited`.
        images_per_second: moving average over the last steps.
        peak_memory: the most memory so far, in MB: of tensors on the GPU, or else of the whole process.
        finished: whether all steps are done.
        stopped_by: the signal that stopped it, or 0.
    """

    method: Method
    data: Data
    folder: Path
    clock: Clock
    device: torch.device
    batch_size: int
    config: dict[str, Any] = field(default_factory=dict)
    metrics: dict[str, float] = field(default_factory=dict)
    evaluations: dict[str, float] = field(default_factory=dict)
    seconds: float = 0.0
    seconds_waited: float = 0.0
    seconds_here: float = 0.0
    images_per_second: float = 0.0
    peak_memory: float = 0.0
    finished: bool = False
    stopped_by: int = 0

    def count_step(self, seconds: float) -> None:
        """Add the time of one step."""
        rate = self.batch_size / seconds
        self.seconds += seconds
        self.seconds_here += seconds
        self.images_per_second += (rate - self.images_per_second) * (0.1 if self.images_per_second else 1)

    def measure_memory(self) -> None:
        """Note the most memory that was used, in MB."""
        if self.device.type == "cuda":
            self.peak_memory = torch.cuda.max_memory_allocated(self.device) / 2**20
        elif sys.platform != "win32":
            import resource

            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            self.peak_memory = peak / (2**20 if sys.platform == "darwin" else 2**10)  # bytes there, KB elsewhere
