"""What watches a run. A hook never changes what a method computes: without hooks the weights come out the same.

Five events: `start`, `step` (after every optimizer step), `epoch` (after every pass over the data), `save` (a checkpoint
was written) and `end`. The two hooks of every run stand here; the others are in `sslbook.loggers`.
"""

import json
import math
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from sslbook import distributed
from sslbook.checkpoint import write_text
from sslbook.engine.run import Run
from sslbook.files import Whole, check


class Hook:
    """Base of what watches a run; override the events you need. All processes call them, but for `save`."""

    measures: tuple[str, ...] = ()
    """the metrics that it puts into `run.evaluations`: those that can be monitored"""

    def start(self, run: Run) -> None:
        """Before the first step, also of a resumed run."""

    def step(self, run: Run) -> None:
        """After every optimizer step."""

    def epoch(self, run: Run) -> None:
        """After every pass over the data, with the method in evaluation mode."""

    def save(self, run: Run, path: Path) -> None:
        """After a checkpoint was written to `path`; in the main process only."""

    def end(self, run: Run) -> None:
        """When the run is over, finished or stopped."""


@contextmanager
def watching(hooks: list[Hook], run: Run) -> Iterator[None]:
    """Start the hooks, and end in any case those that were started."""
    started: list[Hook] = []
    try:
        for hook in hooks:
            hook.start(run)
            started.append(hook)
        yield
    finally:
        for hook in started:
            hook.end(run)


class Progress(Hook):
    """A progress bar: loss, images per second, the last evaluations, time left."""

    def start(self, run: Run) -> None:
        from tqdm import tqdm

        self.shown = 0.0
        self.bar = tqdm(
            total=run.clock.total_steps,
            initial=run.clock.step,
            desc=type(run.method).__name__,
            unit="step",
            dynamic_ncols=True,
            disable=not distributed.is_main(),
            mininterval=0.2 if sys.stderr.isatty() else 10,
        )

    def step(self, run: Run) -> None:
        if time.monotonic() - self.shown > 0.2:
            self._show(run)
        self.bar.update(run.clock.step - self.bar.n)

    def epoch(self, run: Run) -> None:
        self._show(run)  # so that the bar ends with the last evaluation

    def _show(self, run: Run) -> None:
        evaluations = {name: f"{value:.1f}" for name, value in run.evaluations.items()}
        rate = f"{run.images_per_second:,.0f}"
        self.bar.set_postfix({"loss": f"{run.metrics['loss']:.4f}", "images_per_s": rate, **evaluations}, refresh=False)
        self.shown = time.monotonic()

    def end(self, run: Run) -> None:
        self.bar.close()
        waited = run.seconds_waited / max(run.seconds_here, 1e-9)
        if waited > 0.1 and run.data.size is None and run.seconds_here > 60 and distributed.is_main():
            workers = run.data.workers
            cure = "raise --data.workers, read from a faster disk, or store smaller images"
            print(f"{waited:.0%} of the time went into waiting for images ({workers} loader processes): {cure}")


class MetricsLog(Hook):
    """`metrics.jsonl`: one line every few steps, and one for everything a hook measured.

    Args:
        every: steps between lines; each holds the mean over these steps.
    """

    def __init__(self, every: int = 10) -> None:
        self.every = every

    def start(self, run: Run) -> None:
        self.path = run.folder / "metrics.jsonl"
        self.sums: dict[str, list[float]] = {}
        self.known = dict(run.evaluations)
        if distributed.is_main() and self.path.exists():  # a resumed run goes on where its checkpoint stands
            kept = [line for line in read_metrics(self.path) if line["step"] <= run.clock.step]
            write_text(self.path, "".join(json.dumps(line) + "\n" for line in kept))

    def step(self, run: Run) -> None:
        for name, value in run.metrics.items():
            if math.isfinite(value):  # fp16 skips steps whose gradient is not
                self.sums.setdefault(name, []).append(value)
        if run.clock.step % self.every == 0 or run.clock.step == run.clock.total_steps:
            means = {name: sum(values) / len(values) for name, values in self.sums.items()}
            rate = {"images_per_second": round(run.images_per_second, 1), "seconds": round(run.seconds, 2)}
            wait = {"data_wait": round(100 * run.seconds_waited / max(run.seconds_here, 1e-9), 1)}  # %
            self._write(run, {**means, "lr": run.metrics["lr"], **rate, **wait})
            self.sums = {}

    def epoch(self, run: Run) -> None:
        changed = {name: value for name, value in run.evaluations.items() if self.known.get(name) != value}
        if changed:
            self._write(run, changed)
            self.known = dict(run.evaluations)

    def _write(self, run: Run, values: dict[str, float]) -> None:
        if distributed.is_main():
            epoch = run.clock.step / run.clock.steps_per_epoch
            line = {"step": run.clock.step, "epoch": round(epoch, 4), **values}
            with open(self.path, "a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")


def read_metrics(path: Path) -> list[dict[str, float]]:
    """The lines of a `metrics.jsonl`; a last line cut short by a kill, or any that is no metrics, is left out."""
    lines = []
    for number, text in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(), start=1):
        try:
            lines.append(check(f"{path}, line {number}", json.loads(text), {"step": Whole(), str: float}))
        except (ValueError, RecursionError):  # of JSON, or a UserError
            continue
    return lines
