"""Hooks that watch a run: online kNN, measures without labels, plots, TensorBoard, Weights & Biases."""

import hashlib
from typing import Literal

from sslbook import distributed
from sslbook.engine.hooks import Hook
from sslbook.engine.run import Run
from sslbook.errors import UserError, at_least_one, import_extra


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
        """Raises UserError where training or test images have no labels."""
        if not run.data.has_test_labels:
            raise UserError("OnlineKNN needs labeled images, also for the test; leave it out of --hooks")

    def epoch(self, run: Run) -> None:
        if run.clock.epoch % self.every == 0 or run.clock.step >= run.clock.total_steps:
            from sslbook.evaluation.base import measure_online
            from sslbook.evaluation.features import evaluation_view
            from sslbook.evaluation.protocols.knn import KNN

            view = evaluation_view(run.method.views()[0])
            metrics = measure_online(run.method.backbone, run.data, view, [KNN(self.k)], self.limit, run.device)
            run.evaluations["knn"] = distributed.broadcast(metrics["kNN"])


class OnlineLabelFree(Hook):
    """RankMe, feature std, alignment and uniformity of the backbone while it learns: of collapse, without labels.

    Features of training images in the view for evaluation; alignment compares two samples of the first view. The equations
    stand in `sslbook.nn.metrics`.

    Args:
        every: epochs between measurements.
        images: training images at most, chosen at random, the same every time.
    """

    measures = ("rank_me", "feature_std", "alignment", "uniformity")

    def __init__(self, every: int = 1, images: int = 2000) -> None:
        at_least_one(every=every, images=images)
        self.every, self.images = every, images

    def epoch(self, run: Run) -> None:
        if run.clock.epoch % self.every == 0 or run.clock.step >= run.clock.total_steps:
            from sslbook.evaluation.features import evaluation_view, extract_views
            from sslbook.nn import metrics

            view = run.method.views()[0]
            views = (evaluation_view(view), view, view)
            z = extract_views(run.method.backbone, run.data, views, self.images, device=run.device)
            found = {
                "rank_me": metrics.rank_me(z[:, 0]),
                "feature_std": float(metrics.feature_std(z[:, 0])),
                "alignment": metrics.alignment(z[:, 1], z[:, 2]),
                "uniformity": metrics.uniformity(z[:, 0]),
            }
            run.evaluations.update({name: distributed.broadcast(value) for name, value in found.items()})


class Plots(Hook):
    """Plots while the run goes on: its views at the start, then curves and, where the method makes them, reconstructions.

    Args:
        every: epochs between images.
    """

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

    def __init__(self, every: int = 10) -> None:
        at_least_one(every=every)
        self.every = every

    def start(self, run: Run) -> None:
        self.writer = None
        if distributed.is_main():
            import_extra("tensorboard", "tensorboard")
            from torch.utils.tensorboard import SummaryWriter

            self.writer = SummaryWriter(str(run.folder / "tensorboard"), purge_step=run.clock.step + 1)

    def step(self, run: Run) -> None:
        if self.writer and run.clock.step % self.every == 0:
            for name, value in run.metrics.items():
                self.writer.add_scalar(f"train/{name}", value, run.clock.step)

    def epoch(self, run: Run) -> None:
        if self.writer:
            for name, value in run.evaluations.items():
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

    def __init__(
        self, project: str = "sslbook", mode: Literal["offline", "online", "disabled"] = "offline", every: int = 10
    ) -> None:
        at_least_one(every=every)
        self.project, self.mode, self.every = project, mode, every

    def start(self, run: Run) -> None:
        self.wandb = None
        if distributed.is_main():
            self.wandb = import_extra("wandb", "wandb").init(
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
        if self.wandb and run.evaluations:
            self.wandb.log({f"eval/{name}": value for name, value in run.evaluations.items()}, step=run.clock.step)

    def end(self, run: Run) -> None:
        if self.wandb:
            self.wandb.finish()
