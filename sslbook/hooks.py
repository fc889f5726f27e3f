"""What watches a run. A hook never changes what a method computes: without hooks the weights come out the same.

Five events: `start`, `step` (after every optimizer step), `epoch` (after every pass over the data), `save` (a checkpoint
was written) and `end`.
"""

import hashlib
import json
import math
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from sslbook import distributed
from sslbook.checkpoint import write_atomically, write_text
from sslbook.data.loader import Batch, Data
from sslbook.errors import UserError, at_least_one
from sslbook.methods.base import Method
from sslbook.schedules import Clock


@dataclass
class Run:
    """A training in progress, as hooks see it.

    Args:
        method: the method, not wrapped.
        data: what it learns from.
        folder: where its files go.
        clock: where it stands.
        device: where it computes.
        batch_size: images per optimizer step over all processes.
        config: the resolved configuration.
        metrics: what the last step logged: `loss`, `lr`, and the method's own.
        figures: what hooks measured, such as `knn`; a figure can be monitored for the best checkpoint.
        seconds: time spent training, over all resumptions.
        images_per_second: over the last steps.
        peak_memory: the most memory so far, in MB: of the GPU by tensors, or else of the whole process.
        finished: whether all steps are done.
    """

    method: Method
    data: Data
    folder: Path
    clock: Clock
    device: torch.device
    batch_size: int
    config: dict[str, Any] = field(default_factory=dict)
    metrics: dict[str, float] = field(default_factory=dict)
    figures: dict[str, float] = field(default_factory=dict)
    seconds: float = 0.0
    images_per_second: float = 0.0
    peak_memory: float = 0.0
    finished: bool = False


class Hook:
    """Base of what watches a run; override the events you need. All processes call them, but for `save`."""

    measures: tuple[str, ...] | None = None
    """the figures that it puts into `run.figures`; a hook that does not say may have any"""

    def start(self, run: Run) -> None:
        """Before the first step, also of a resumed run."""

    def step(self, run: Run) -> None:
        """After every optimizer step."""

    def epoch(self, run: Run) -> None:
        """After every pass over the data."""

    def save(self, run: Run, path: Path) -> None:
        """After a checkpoint was written to `path`; in the main process only."""

    def end(self, run: Run) -> None:
        """When the run is over, finished or stopped."""


class Progress(Hook):
    """A progress bar: loss, images per second, time left."""

    measures = ()

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
        now = time.monotonic()
        if now - self.shown > 0.2:
            figures = {name: f"{value:.1f}" for name, value in run.figures.items()}
            rate = f"{run.images_per_second:,.0f}"
            shown = {"loss": f"{run.metrics['loss']:.4f}", "images_per_s": rate, **figures}
            self.bar.set_postfix(shown, refresh=False)
            self.shown = now
        self.bar.update(run.clock.step - self.bar.n)

    def end(self, run: Run) -> None:
        self.bar.close()


class Metrics(Hook):
    """`metrics.jsonl`: one line every few steps, and one for everything a hook measured.

    Args:
        every: steps between lines; each holds the mean over these steps.
    """

    measures = ()

    def __init__(self, every: int = 10) -> None:
        self.every = every

    def start(self, run: Run) -> None:
        self.path = run.folder / "metrics.jsonl"
        self.sums: dict[str, list[float]] = {}
        self.known = dict(run.figures)
        if distributed.is_main() and self.path.exists():  # a resumed run goes on where its checkpoint stands
            kept = [line for line in read_metrics(self.path) if line["step"] <= run.clock.step]
            write_text(self.path, "".join(json.dumps(line) + "\n" for line in kept))

    def step(self, run: Run) -> None:
        for name, value in run.metrics.items():
            if math.isfinite(value):  # fp16 passes over steps whose gradient is not
                self.sums.setdefault(name, []).append(value)
        if run.clock.step % self.every == 0 or run.clock.step == run.clock.total_steps:
            means = {name: sum(values) / len(values) for name, values in self.sums.items()}
            rate = {"images_per_second": round(run.images_per_second, 1), "seconds": round(run.seconds, 2)}
            self._write(run, {**means, "lr": run.metrics["lr"], **rate})
            self.sums = {}

    def epoch(self, run: Run) -> None:
        changed = {name: value for name, value in run.figures.items() if self.known.get(name) != value}
        if changed:
            self._write(run, changed)
            self.known = dict(run.figures)

    def _write(self, run: Run, values: dict[str, float]) -> None:
        if distributed.is_main():
            epoch = run.clock.step / run.clock.steps_per_epoch
            line = {"step": run.clock.step, "epoch": round(epoch, 4), **values}
            with open(self.path, "a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")


def read_metrics(path: Path) -> list[dict[str, float]]:
    """The lines of a `metrics.jsonl`; a last line cut short by a kill is left out."""
    lines = []
    for text in path.read_text(encoding="utf-8").splitlines():
        try:
            lines.append(json.loads(text))
        except ValueError:
            continue
    return lines


class OnlineKNN(Hook):
    """kNN accuracy of the backbone while it learns: trained features vote for the test images. Needs labels.

    Args:
        every: epochs between measurements.
        k: neighbors that vote.
        limit: training images that take part at most.
    """

    measures = ("knn",)

    def __init__(self, every: int = 1, k: int = 20, limit: int = 10_000) -> None:
        at_least_one(every=every, k=k, limit=limit)
        self.every, self.k, self.limit = every, k, limit

    def start(self, run: Run) -> None:
        if not run.data.measurable:
            raise UserError("OnlineKNN needs labeled images, also for the test; leave it out of --hooks")

    def epoch(self, run: Run) -> None:
        if run.clock.epoch % self.every == 0 or run.clock.step >= run.clock.total_steps:
            from sslbook.report import quick_knn

            accuracy = quick_knn(run.method, run.data, run.device, k=self.k, limit=self.limit)
            run.figures["knn"] = distributed.broadcast(accuracy)


class Plots(Hook):
    """Images while the run goes on: its views at the start, then curves and (if the method paints) reconstructions.

    Args:
        every: epochs between images.
    """

    measures = ()

    def __init__(self, every: int = 10) -> None:
        at_least_one(every=every)
        self.every = every

    def start(self, run: Run) -> None:
        if distributed.is_main():
            from sslbook.report import plot_views

            plot_views(run)

    def epoch(self, run: Run) -> None:
        if distributed.is_main() and (run.clock.epoch % self.every == 0 or run.clock.step >= run.clock.total_steps):
            from sslbook.report import plot_curves, plot_reconstructions

            plot_curves(run)
            plot_reconstructions(run)


class TensorBoard(Hook):
    """Scalars for TensorBoard, in the run's folder.

    Args:
        every: steps between points.
    """

    measures = ()

    def __init__(self, every: int = 10) -> None:
        at_least_one(every=every)
        self.every = every

    def start(self, run: Run) -> None:
        self.writer = None
        if distributed.is_main():
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError:
                raise UserError('TensorBoard is not installed: pip install "sslbook[tensorboard]"') from None
            self.writer = SummaryWriter(str(run.folder / "tensorboard"), purge_step=run.clock.step + 1)

    def step(self, run: Run) -> None:
        if self.writer and run.clock.step % self.every == 0:
            for name, value in run.metrics.items():
                self.writer.add_scalar(f"train/{name}", value, run.clock.step)

    def epoch(self, run: Run) -> None:
        if self.writer:
            for name, value in run.figures.items():
                self.writer.add_scalar(f"eval/{name}", value, run.clock.step)

    def end(self, run: Run) -> None:
        if self.writer:
            self.writer.close()


class WandB(Hook):
    """Scalars for Weights & Biases.

    Args:
        project: the project's name there.
        mode: `offline` keeps everything in the run's folder until `wandb sync`; `online` needs an account.
        every: steps between points.
    """

    measures = ()

    def __init__(
        self, project: str = "sslbook", mode: Literal["offline", "online", "disabled"] = "offline", every: int = 10
    ) -> None:
        at_least_one(every=every)
        self.project, self.mode, self.every = project, mode, every

    def start(self, run: Run) -> None:
        self.wandb = None
        if distributed.is_main():
            try:
                import wandb
            except ImportError:
                raise UserError('Weights & Biases is not installed: pip install "sslbook[wandb]"') from None
            self.wandb = wandb.init(
                project=self.project,
                name=run.folder.name,
                dir=str(run.folder),
                mode=self.mode,
                config=run.config,
                id=hashlib.blake2b(str(run.folder.resolve()).encode(), digest_size=8).hexdigest(),  # names recur
                resume="allow",
            )

    def step(self, run: Run) -> None:
        if self.wandb and run.clock.step % self.every == 0:
            self.wandb.log({f"train/{name}": value for name, value in run.metrics.items()}, step=run.clock.step)

    def epoch(self, run: Run) -> None:
        if self.wandb and run.figures:
            self.wandb.log({f"eval/{name}": value for name, value in run.figures.items()}, step=run.clock.step)

    def end(self, run: Run) -> None:
        if self.wandb:
            self.wandb.finish()


def keep_for_replay(run: Run, batch: Batch, loss: Tensor, optimizer: torch.optim.Optimizer) -> Path:
    """Save the batch and the state with which the loss stopped being a number."""
    path = run.folder / f"failed-step-{run.clock.step}-rank-{distributed.rank()}.pt"
    state = {
        "format": "sslbook failure 1",
        "method": run.method.state_dict(),
        "optimizer": optimizer.state_dict(),
        "views": [view.cpu() for view in batch.views],
        "index": batch.index.cpu(),
        "label": batch.label.cpu(),
        "clock": vars(run.clock),
        "loss": loss.detach().item(),
    }
    write_atomically(path, lambda part: torch.save(state, part))
    return path
