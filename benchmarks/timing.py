"""How all benchmarks measure: the sides alternate, and their medians are compared."""

import statistics
import time
from collections.abc import Callable

import torch


def take_turns(
    sides: dict[str, Callable[[], object]],
    repetitions: int,
    device: str = "cpu",
    clock: Callable[[], float] = time.perf_counter,
    warm_up: bool = True,
) -> dict[str, list[float]]:
    """Seconds of every side in every repetition, after one unmeasured round if `warm_up`; `time.process_time` is CPU time."""
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for repetition in range(0 if warm_up else 1, repetitions + 1):
        for name, work in sides.items():
            if device != "cpu":
                torch.cuda.synchronize()
            began = clock()
            work()
            if device != "cpu":
                torch.cuda.synchronize()
            if repetition:
                seconds[name].append(clock() - began)
    return seconds


def table(seconds: dict[str, list[float]], items: int, unit: str) -> dict[str, dict[str, float]]:
    """Print and return, for every side: items per second, and how many times the first side's time it takes."""
    first = next(iter(seconds))
    rows = {}
    for name, values in seconds.items():
        ratios = sorted(v / f for v, f in zip(values, seconds[first]))
        rows[name] = {
            f"{unit} per s": round(items / statistics.median(values), 1),
            f"times {first}": round(statistics.median(ratios), 3),
            "least": round(ratios[0], 3),
            "most": round(ratios[-1], 3),
        }
        print(f"{name:42s}" + "".join(f"  {key} {value:,}" for key, value in rows[name].items()))
    return rows
