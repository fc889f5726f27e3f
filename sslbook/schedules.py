"""Time, and what changes with it.

A schedule is a pure function of the `Clock`. Nothing stores "the current learning rate", so a resumed run needs to know
its step and nothing else.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Clock:
    """Where training stands.

    Args:
        step: optimizer steps taken so far.
        total_steps: optimizer steps in the whole run.
        steps_per_epoch: optimizer steps in one pass over the data.
        seed: the run's seed, the first part of every key of `sslbook.chance`.
    """

    step: int = 0
    total_steps: int = 1
    steps_per_epoch: int = 1
    seed: int = 0

    @property
    def epoch(self) -> int:
        """Passes over the data completed so far; the first is number 0."""
        return self.step // self.steps_per_epoch

    @property
    def progress(self) -> float:
        """The part of the run that lies behind, from 0 to 1."""
        return self.step / max(1, self.total_steps)
