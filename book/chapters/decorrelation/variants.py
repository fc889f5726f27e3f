"""VICReg with another variance term, for the chapter's ablations."""

from collections.abc import Callable

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from sslbook.data.loader import Batch
from sslbook.methods.vicreg import VICReg, covariance_loss, invariance_loss, variance_loss
from sslbook.nn.metrics import feature_std
from sslbook.schedules import Clock


def hinge_on_variance(z: Float[Tensor, "n dim"], gamma: float = 1.0) -> Float[Tensor, ""]:
    """How far the variance, and not its root, falls short of `gamma`: its slope vanishes where features collapse."""
    return F.relu(gamma - z.var(dim=0)).mean()


def no_hinge(z: Float[Tensor, "n dim"], gamma: float = 1.0, epsilon: float = 1e-4) -> Float[Tensor, ""]:
    """The distance to `gamma` without a hinge: a larger standard deviation is always better."""
    return (gamma - (z.var(dim=0) + epsilon).sqrt()).mean()


class OtherVariance(VICReg):
    """VICReg with `term` in place of the hinge on the standard deviations, in one process.

    Args:
        term: from projections to the variance term.
        options: as for VICReg.
    """

    def __init__(self, *args, term: Callable[[Tensor], Tensor] = variance_loss, **options) -> None:
        super().__init__(*args, **options)
        self.term = term

    def forward(self, batch: Batch, clock: Clock) -> dict[str, Tensor]:
        z_1, z_2 = (self.projector(self.backbone(x)) for x in batch.views)
        invariance = invariance_loss(z_1, z_2)
        variance = self.term(z_1) / 2 + self.term(z_2) / 2
        covariance = covariance_loss(z_1) + covariance_loss(z_2)
        loss = self.invariance_weight * invariance + self.variance_weight * variance
        loss = loss + self.covariance_weight * covariance
        parts = {"invariance": invariance, "variance": variance, "covariance": covariance}
        return {"loss": loss, **{k: v.detach() for k, v in parts.items()}, "feature_std": feature_std(z_1)}
