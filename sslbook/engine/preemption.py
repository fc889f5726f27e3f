"""Stopping without loss: SIGTERM or Ctrl-C lets the step end, a checkpoint is written, and the run leaves."""

import signal
from types import FrameType, TracebackType

import torch

from sslbook import distributed


class PreemptionHandler:
    """Turns SIGTERM and Ctrl-C into a request that the loop answers; a second Ctrl-C interrupts at once.

    Outside the main thread signals cannot be handled, so there whoever runs the loop decides.
    """

    def __init__(self) -> None:
        self.requested = False
        self.previous: dict[int, object] = {}

    def __enter__(self) -> "PreemptionHandler":
        try:
            for number in (signal.SIGTERM, signal.SIGINT):
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
        self.requested = True

    def agreed(self, device: torch.device) -> bool:
        """Whether any process was asked to stop; all of them get the same answer, so all stop after the same step."""
        if distributed.world_size() == 1:
            return self.requested
        return bool(distributed.all_reduce_max(torch.tensor(float(self.requested), device=device)) > 0)
