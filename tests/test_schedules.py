import math

import pytest

from sslbook.errors import UserError
from sslbook.schedules import Clock, Constant, Cosine, Linear, Schedule, Sequence, Step, Warmup, in_steps


def values(schedule: Schedule, total: int = 100, per_epoch: int = 10) -> list[float]:
    return [schedule(Clock(step, total, per_epoch)) for step in range(total + 1)]


@pytest.mark.parametrize(
    ("duration", "steps"),
    [(3, 30), (0.5, 5), ("3", 30), ("3 epochs", 30), ("1 epoch", 10), ("7 steps", 7), ("5 %", 5), ("5%", 5)],
)
def test_durations_in_steps(duration, steps) -> None:
    assert in_steps(duration, total_steps=100, steps_per_epoch=10) == steps


@pytest.mark.parametrize("duration", ["soon", "3 weeks", "", "-1", "nan steps", -2, float("inf")])
def test_rejects_invalid_durations(duration) -> None:
    with pytest.raises(UserError, match="not a duration"):
        in_steps(duration, 100, 10)


def test_cosine_formula() -> None:
    for step, value in enumerate(values(Cosine(2.0, 0.5))):
        assert value == pytest.approx(0.5 + 1.5 * (1 + math.cos(math.pi * step / 100)) / 2)


def test_stretched_cosine_is_that_of_a_longer_run() -> None:
    """MSN's code sets the length of both cosines to 1.25 times the run, warm-up included, and cuts them."""
    longer = values(Warmup("10 steps", then=Cosine(1.0, 0.001)), total=125)
    stretched = values(Warmup("10 steps", then=Cosine(1.0, 0.001, stretch=1.25)))
    assert stretched == pytest.approx(longer[:101], rel=1e-12)
    assert stretched[100] == pytest.approx(0.001 + 0.999 * (1 + math.cos(math.pi * 90 / 115)) / 2)
    assert values(Cosine(1.0, 10.0, stretch=1.25))[100] == pytest.approx(1 + 9 * (1 + math.cos(math.pi / 5)) / 2)


def test_warmup_is_continuous() -> None:
    v = values(Warmup(1, then=Cosine(), start=0.1))
    assert v[0] == pytest.approx(0.1)
    assert v[5] == pytest.approx(0.55)
    assert v[10] == pytest.approx(1.0)
    assert v[55] == pytest.approx(0.5)  # halfway through the rest of the run
    assert v[100] == pytest.approx(0.0)


def test_milestones_count_from_the_start_of_the_run() -> None:
    v = values(Warmup(2, then=Step([3, "70 steps"], factor=0.5)))
    assert v[29] == 1.0
    assert v[30] == 0.5
    assert v[69] == 0.5
    assert v[70] == 0.25


def test_sequence_runs_its_parts_in_turn() -> None:
    v = values(Sequence([Linear(0.0, 1.0), Constant(0.7), Linear(1.0, 0.0)], ["20 %", "30 steps"]))
    assert v[10] == pytest.approx(0.5)
    assert v[20] == v[49] == 0.7
    assert v[50] == pytest.approx(1.0)
    assert v[75] == pytest.approx(0.5)
    with pytest.raises(UserError, match="needs 1 lengths"):
        Sequence([Constant(), Constant()], [])


def test_clock_epoch_and_progress() -> None:
    clock = Clock(25, 100, 10)
    assert clock.epoch == 2
    assert clock.progress == 0.25
