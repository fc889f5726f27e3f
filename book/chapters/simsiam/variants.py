"""SimSiam with one part removed or replaced, for the chapter's ablations."""

import copy

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from sslbook.data.loader import Batch
from sslbook.data.views import View
from sslbook.methods.simsiam import SimSiam, distance
from sslbook.nn.metrics import feature_std
from sslbook.schedules import Clock


class NoStopGradient(SimSiam):
    """The gradient flows into the target, too."""

    def target(self, z: Float[Tensor, "n dim"]) -> Float[Tensor, "n dim"]:
        return z


class OneDirection(SimSiam):
    """View 1 predicts view 2, and not the other way round."""

    def forward(self, batch: Batch, clock: Clock) -> dict[str, Tensor]:
        z_1, z_2 = (self.projector(self.backbone(x)) for x in batch.views)
        return {"loss": distance(self.predictor(z_1), self.target(z_2)), "feature_std": feature_std(z_1)}


class MultiStep(SimSiam):
    """The targets of `every` steps come from the network as it was before the first of them (section 5.2).

    With `every` 1 this is SimSiam.
    """

    def __init__(self, *args, every: int = 1, **options) -> None:
        super().__init__(*args, **options)
        self.every = every
        self.old = copy.deepcopy(nn.Sequential(self.backbone, self.projector)).requires_grad_(False)

    def forward(self, batch: Batch, clock: Clock) -> dict[str, Tensor]:
        if clock.step % self.every == 0:
            self.old.load_state_dict(nn.Sequential(self.backbone, self.projector).state_dict())
        z_1, z_2 = (self.projector(self.backbone(x)) for x in batch.views)
        with torch.no_grad():
            eta_1, eta_2 = (self.old(x) for x in batch.views)
        loss = distance(self.predictor(z_1), eta_2) / 2 + distance(self.predictor(z_2), eta_1) / 2
        return {"loss": loss, "feature_std": feature_std(z_1)}


class MovingAverage(SimSiam):
    """No predictor: the target of an image is a moving average of its projections in earlier epochs (section 5.2).

    Args:
        num_images: how many images the data set has.
        keep: how much of an image's average is kept when it is seen again; the paper's m.
    """

    eta: Tensor
    seen: Tensor

    def __init__(self, *args, num_images: int, keep: float = 0.8, **options) -> None:
        super().__init__(*args, **options, predictor=nn.Identity())
        self.keep = keep
        width = self.projector[-1].num_features  # pyrefly: ignore
        self.register_buffer("eta", torch.zeros(num_images, width))
        self.register_buffer("seen", torch.zeros(num_images, 1))

    def forward(self, batch: Batch, clock: Clock) -> dict[str, Tensor]:
        z_1, z_2 = (self.projector(self.backbone(x)) for x in batch.views)
        with torch.no_grad():
            old, keep = self.eta[batch.index], self.keep * self.seen[batch.index]  # nothing to keep the first time
            eta_1, eta_2 = (keep * old + (1 - keep) * z for z in (z_1, z_2))
            self.eta[batch.index], self.seen[batch.index] = (eta_1 + eta_2) / 2, torch.ones_like(keep)
        loss = distance(z_1, eta_2) / 2 + distance(z_2, eta_1) / 2
        return {"loss": loss, "feature_std": feature_std(z_1)}


class ManyViews(SimSiam):
    """No predictor: the target is the mean of the normalized projections of `count` other views of the image."""

    def __init__(self, backbone: nn.Module, view: View, *args, count: int = 8, **options) -> None:
        super().__init__(backbone, view, *args, **options, predictor=nn.Identity())
        self.count = count

    def views(self) -> tuple[View, ...]:
        return (self.view,) * (1 + self.count)

    def forward(self, batch: Batch, clock: Clock) -> dict[str, Tensor]:
        z = self.projector(self.backbone(batch.views[0]))
        with torch.no_grad():
            others = [F.normalize(self.projector(self.backbone(x)), dim=1) for x in batch.views[1:]]
        return {"loss": distance(z, torch.stack(others).mean(0)), "feature_std": feature_std(z)}


class WithEMA(MultiStep):
    """SimSiam with BYOL's target: an EMA of backbone and projector, with one momentum throughout."""

    def __init__(self, *args, momentum: float, **options) -> None:
        super().__init__(*args, **options, every=10**9)
        self.momentum = momentum

    def after_step(self, clock: Clock) -> None:
        for old, new in zip(self.old.parameters(), nn.Sequential(self.backbone, self.projector).parameters()):
            old.lerp_(new, 1 - self.momentum)


class Bias(nn.Module):
    """A predictor that adds one trained vector (Zhang et al., 2022)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(width))

    def forward(self, z: Float[Tensor, "n dim"]) -> Float[Tensor, "n dim"]:
        return z + self.bias
