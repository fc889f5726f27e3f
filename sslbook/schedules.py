"""Schedules: what changes during training, as a pure function of the step.

A schedule computes its value from the `Clock` alone. No "current learning rate" is stored, so a resumed run needs only
its step. The value is a factor: of the learning rate, of the weight decay, or of whatever a method schedules itself.

Lengths are durations: a number means epochs, `"500 steps"` optimizer steps, `"10 %"` a fraction of the run.

>>> warm = Warmup(length=10, then=Cosine())
>>> warm(Clock(step=50, total_steps=1000, steps_per_epoch=10))
0.5
"""

import math
import re
from abc import ABC, abstractmethod
from dataclasses import dataclass

from sslbook.errors import UserError

Duration = int | float | str


@dataclass(frozen=True)
class Clock:
    """Where training stands.

    Args:
        step: optimizer steps taken so far.
        total_steps: optimizer steps in the whole run.
        steps_per_epoch: optimizer steps in one pass over the data.
        seed: the run's seed, the first part of every key of `sslbook.rng`.
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
        """The fraction of the run that is done, from 0 to 1."""
        return self.step / max(1, self.total_steps)


def in_steps(duration: Duration, total_steps: int, steps_per_epoch: int) -> int:
    """A duration in optimizer steps: `10` and `"10 epochs"`, `"500 steps"`, `"5 %"` of the run.

    Raises:
        UserError: it is none of these.
    """
    match = re.fullmatch(r"\s*(\d*\.?\d+(?:e[+-]?\d+)?)\s*(epochs?|steps?|%)?\s*", str(duration))
    if match is None:
        raise UserError(f"{duration!r} is not a duration: write a number of epochs, or such as '500 steps' or '5 %'")
    unit = (match[2] or "epochs")[0]
    return round(float(match[1]) * {"e": steps_per_epoch, "s": 1, "%": total_steps / 100}[unit])


class Schedule(ABC):
    """A factor that changes over the run. Schedules compose: `Warmup(10, then=Cosine())`."""

    def __call__(self, clock: Clock) -> float:
        """The factor at this step."""
        return self.value(clock, 0, clock.total_steps)

    @abstractmethod
    def value(self, clock: Clock, begin: int, end: int) -> float:
        """The factor at this step, for a schedule that runs from step `begin` to step `end`."""


def _fraction_done(clock: Clock, begin: int, end: int) -> float:
    return min(1.0, max(0.0, (clock.step - begin) / max(1, end - begin)))


@dataclass(frozen=True)
class Constant(Schedule):
    """A constant.

    Args:
        factor: its value.
    """

    factor: float = 1.0

    def value(self, clock: Clock, begin: int, end: int) -> float:
        return self.factor


@dataclass(frozen=True)
class Linear(Schedule):
    """A straight line.

    Args:
        start: value at the beginning.
        stop: value at the end.
    """

    start: float = 1.0
    stop: float = 0.0

    def value(self, clock: Clock, begin: int, end: int) -> float:
        return self.start + (self.stop - self.start) * _fraction_done(clock, begin, end)


@dataclass(frozen=True)
class Cosine(Schedule):
    """Half a cosine (Loshchilov and Hutter, 2017, "SGDR", eq. 5, without restarts).

    Args:
        start: value at the beginning.
        stop: value at the end.
        stretch: decay as in a run `stretch` times as long, and stop early: `stop` is then not reached (MSN: 1.25).
    """

    start: float = 1.0
    stop: float = 0.0
    stretch: float = 1.0

    def value(self, clock: Clock, begin: int, end: int) -> float:
        wave = (1 + math.cos(math.pi * _fraction_done(clock, begin, round(self.stretch * end)))) / 2
        return self.stop + (self.start - self.stop) * wave


@dataclass(frozen=True)
class Step(Schedule):
    """Multiply by a factor at every milestone.

    Args:
        milestones: durations since the start of the run, also where this schedule follows another one.
        factor: multiplies the value at each milestone.
    """

    milestones: list[Duration]
    factor: float = 0.1

    def value(self, clock: Clock, begin: int, end: int) -> float:
        passed = [clock.step >= in_steps(m, clock.total_steps, clock.steps_per_epoch) for m in self.milestones]
        return self.factor ** sum(passed)


@dataclass(frozen=True)
class Warmup(Schedule):
    """Grow linearly to the first value of another schedule, then follow it.

    The full value is first reached at step `length`; the code of DINO and SwAV reaches it one step earlier.

    Args:
        length: duration of the warm-up.
        then: the schedule for the rest of the run.
        start: fraction of that schedule's first value to start from.
    """

    length: Duration
    then: Schedule
    start: float = 0.0

    def value(self, clock: Clock, begin: int, end: int) -> float:
        warm = begin + in_steps(self.length, clock.total_steps, clock.steps_per_epoch)
        factor = self.then.value(clock, min(warm, end), end)
        return factor * Linear(self.start, 1.0).value(clock, begin, warm) if clock.step < warm else factor


@dataclass(frozen=True)
class Sequence(Schedule):
    """One schedule after another.

    Args:
        parts: the schedules, in order.
        lengths: a duration for each but the last, which has the rest of the run.

    Raises:
        UserError: their numbers do not fit.
    """

    parts: list[Schedule]
    lengths: list[Duration]

    def __post_init__(self) -> None:
        if len(self.lengths) != len(self.parts) - 1:
            raise UserError(f"a sequence of {len(self.parts)} schedules needs {len(self.parts) - 1} lengths")

    def value(self, clock: Clock, begin: int, end: int) -> float:
        for part, length in zip(self.parts, self.lengths):
            stop = min(end, begin + in_steps(length, clock.total_steps, clock.steps_per_epoch))
            if clock.step < stop:
                return part.value(clock, begin, stop)
            begin = stop
        return self.parts[-1].value(clock, begin, end)
