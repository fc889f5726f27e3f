"""VICReg: variance, invariance and covariance regularization of the projections of two views.

Invariance: views of an image should have the same projection. Variance: the standard deviation of every dimension over
the batch should reach a threshold, which rules out a constant. Covariance: no two dimensions should vary together,
which rules out that all encode the same. There are no negatives, no teacher and no normalization.

Bardes, Ponce and LeCun, 2022, "VICReg: variance-invariance-covariance regularization for self-supervised learning"
(arXiv:2105.04906), equations 1 to 6, algorithm 1. The defaults are those of the authors' code
(facebookresearch/vicreg). As there, and unlike in the paper, the invariance is divided by the dimension too, and the
variance terms of the two views are halved while their covariance terms are not. Variance and covariance are of the
global batch.

What differs from the authors' code (facebookresearch/vicreg, b42aa23):
- The hidden linear layers of the expander have no bias: batch norm follows and cancels it.
"""

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from sslbook import distributed
from sslbook.data.loader import Batch
from sslbook.data.views import BYOL_1, BYOL_2, View
from sslbook.methods.base import Method
from sslbook.nn import MLP, backbone_dim
from sslbook.nn.metrics import feature_std
from sslbook.nn.precision import full_precision
from sslbook.schedules import Clock
from sslbook.types import PositiveInt


def invariance_loss(z_1: Float[Tensor, "n dim"], z_2: Float[Tensor, "n dim"]) -> Float[Tensor, ""]:
    """Equation 5, divided by the dimension as in the authors' code: mean squared difference."""
    return F.mse_loss(z_1, z_2)


def variance_loss(z: Float[Tensor, "n dim"], gamma: float = 1.0, epsilon: float = 1e-4) -> Float[Tensor, ""]:
    """Equations 1 and 2: how far the standard deviation falls short of `gamma`, averaged over dimensions."""
    return F.relu(gamma - (z.var(dim=0) + epsilon).sqrt()).mean()


def covariance_loss(z: Float[Tensor, "n dim"]) -> Float[Tensor, ""]:
    """Equations 3 and 4: the squared covariances of different dimensions, summed and divided by the dimension."""
    z = z - z.mean(dim=0)
    covariance = z.T @ z / (len(z) - 1)
    return (covariance.square().sum() - covariance.diagonal().square().sum()) / z.shape[1]


class VICReg(Method):
    """Variance-invariance-covariance regularization (arXiv:2105.04906).

    Args:
        backbone: the network to train.
        view_1: augmentation of the first view.
        view_2: augmentation of the second view.
        invariance_weight: weight of the squared difference between the views' projections.
        variance_weight: weight of the hinge on the standard deviations.
        covariance_weight: weight of the covariances between dimensions.
        hidden_dim: hidden width of the projector, which the paper calls expander.
        projector_dim: width of the projections.
        projector_num_layers: linear layers in the projector.
        projector: replaces the MLP behind the backbone.
    """

    min_images = 2

    def __init__(
        self,
        backbone: nn.Module,
        view_1: View = BYOL_1,
        view_2: View = BYOL_2,
        invariance_weight: float = 25.0,
        variance_weight: float = 25.0,
        covariance_weight: float = 1.0,
        hidden_dim: PositiveInt = 8192,
        projector_dim: PositiveInt = 8192,
        projector_num_layers: PositiveInt = 3,
        projector: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.view_1, self.view_2 = view_1, view_2
        self.invariance_weight, self.variance_weight = invariance_weight, variance_weight
        self.covariance_weight = covariance_weight
        self.backbone = backbone
        dim = backbone_dim(backbone)
        self.projector = projector or MLP(dim, hidden_dim, projector_dim, projector_num_layers, last_bias=False)

    def views(self) -> tuple[View, ...]:
        return (self.view_1, self.view_2)

    def forward(self, batch: Batch, clock: Clock) -> dict[str, Tensor]:
        # One pass per view: batch norm never sees the two together, as in the authors' code.
        z_1, z_2 = [self.projector(self.backbone(x)) for x in batch.views]  # (n, dim) each
        with full_precision(z_1):
            z_1, z_2 = z_1.float(), z_2.float()
            invariance, std = invariance_loss(z_1, z_2), feature_std(z_1)  # s of equation 5
            # Variance and covariance need the whole batch: (n, dim) -> (batch, dim).
            z_1, z_2 = distributed.all_gather_with_grad(z_1), distributed.all_gather_with_grad(z_2)
            variance = variance_loss(z_1) / 2 + variance_loss(z_2) / 2  # v of equation 1
            covariance = covariance_loss(z_1) + covariance_loss(z_2)  # c of equation 4
            loss = self.invariance_weight * invariance + self.variance_weight * variance
            return {
                "loss": loss + self.covariance_weight * covariance,  # equation 6
                "invariance": invariance.detach(),
                "variance": variance.detach(),
                "covariance": covariance.detach(),
                "feature_std": std,
            }
