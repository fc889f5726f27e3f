"""A look at the run's own health: have the features collapsed, does an EMA teacher stand still?

Both leave the loss a number, and often a falling one. A loss that is NaN ends every run by itself.
"""

import copy
import math
import warnings

import torch
import torch.nn.functional as F

from sslbook import distributed
from sslbook.data.views import View
from sslbook.engine.hooks import Hook
from sslbook.engine.run import Run
from sslbook.engine.sharding import whole
from sslbook.errors import UserError, at_least_one
from sslbook.nn.ema import EMA
from sslbook.nn.metrics import effective_rank, singular_values

COLLAPSED_STD = 0.05  # of the standard deviation at the start
COLLAPSED_RANK = 1.5  # nearly all images on a line
CURES = {
    "collapse": "lower the learning rate, make the augmentations stronger or the batch larger; if the method is yours, "
    "look for a stop-gradient, predictor, centering or variance term that is missing",
    "teacher": "raise the step of its average (an EMA momentum below 1), keep it in float32, and let after_step move it",
}


class Guard(Hook):
    """Notices features that collapse and EMA teachers that stand still; warns once of each, or ends the run.

    A few training images, always the same, pass through the backbone after every epoch, at least every 1,000 steps.
    Collapsed are features whose standard deviation has fallen to a twentieth of what it was at the start, or whose
    effective rank (exp of the entropy of the normalized singular values) has fallen below 1.5, at two looks in a row; or
    embeddings whose `feature_std` is below 0.1, where the method logs it: they collapse first.

    Args:
        stop: end the run, with what to try, instead of a warning.
        images: how many images are looked at.
    """

    def __init__(self, stop: bool = True, images: int = 64) -> None:
        at_least_one(images=images)
        self.stop, self.images = stop, images

    def start(self, run: Run) -> None:
        view = run.method.views()[0]
        center = View.center(view.size, resize=view.size, mean=view.mean, std=view.std)
        data = run.data
        if data.size is None:  # files: a few are decoded here, and no workers are started for them
            data = copy.copy(data)
            data.workers = 0
        batch = next(iter(data.evaluation_batches("pretrain", center, self.images, run.device)), None)
        self.shown = torch.zeros(0) if batch is None else batch.views[0]
        self.every = max(20, min(run.clock.steps_per_epoch, 1000))
        self.bad: dict[str, int] = {}
        self.first = self._look(run) if len(self.shown) else (0.0, 0.0)
        self.sums = _sums(run)

    def step(self, run: Run) -> None:
        if run.clock.step % self.every or len(self.shown) < 3:
            return
        (std, rank), (std_0, rank_0) = self._look(run), self.first
        embeddings = run.metrics.get("feature_std", 1.0)
        collapsed = std < COLLAPSED_STD * std_0 or rank < min(COLLAPSED_RANK, rank_0) or embeddings < 0.1
        text = (
            f"the features collapsed: standard deviation {std:.3g}, at the start {std_0:.3g}; effective rank {rank:.1f}"
        )
        self._note(run, "collapse", collapsed, f"{text}, at the start {rank_0:.1f}")
        sums = _sums(run)
        still = [
            name for name, (own, online) in sums.items() if own == self.sums[name][0] and online != self.sums[name][1]
        ]
        self._note(
            run, "teacher", bool(still) and run.clock.progress < 0.95, f"the EMA teacher {still[:1]} stands still"
        )
        self.sums = sums  # near the end of a run an EMA momentum may be 1

    def _note(self, run: Run, what: str, bad: bool, text: str) -> None:
        """Count what was found; the second time in a row it is a warning, and only once."""
        self.bad[what] = self.bad.get(what, 0) + 1 if bad else 0
        text = f"by step {run.clock.step} {text}. What to try: {CURES[what]}"
        if self.bad[what] == 2 and self.stop:
            raise UserError(f"{text}. The last checkpoint is as it was")
        if self.bad[what] == 2 and distributed.is_main():
            warnings.warn(f"{text}. --guard true ends such a run", stacklevel=2)

    @torch.no_grad()
    def _look(self, run: Run) -> tuple[float, float]:
        training = run.method.training
        run.method.eval()
        with whole(run.method):
            x = run.method.backbone(self.shown).float().flatten(1)
        run.method.train(training)
        if not x.isfinite().all():
            return math.nan, math.nan  # the loss will not be a number either, which ends the run
        z = F.normalize(x, dim=1)
        std = float(z.std(dim=0, correction=0).mean()) * z.shape[1] ** 0.5
        return distributed.broadcast((std, effective_rank(singular_values(x, center=True))))  # one verdict for all


def _sums(run: Run) -> dict[str, tuple[float, float]]:
    """The sum of the parameters of every EMA teacher, and that of its student."""
    return {
        name: (_sum(part.module), _sum(part._online[0]))
        for name, part in run.method.named_modules()
        if isinstance(part, EMA)
    }


def _sum(module: torch.nn.Module) -> float:
    return float(sum(distributed.full_tensor(p.detach().double().sum()) for p in module.parameters()))
