"""VICReg: three plain demands on the features of two views: invariance, variance, covariance.

Views of an image should have the same features (invariance), every dimension should differ between images by at
least a given deviation (variance), and no two dimensions should vary together (covariance). The second keeps the
network from a constant, the third from saying one thing many times; no negatives, teacher or normalization are needed.

Bardes, Ponce and LeCun, 2022, "VICReg: variance-invariance-covariance regularization for self-supervised learning"
(arXiv:2105.04906), equations 1 to 6, algorithm 1. The defaults are those of the authors' code, which differs from the
paper: the invariance is divided by the dimension too, and the variance terms of the two views are halved while their
covariance terms are not. Variance and covariance are over the global batch. What differs from the authors' code: the
hidden linear layers of the expander have no bias (batch norm follows and cancels it).
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from sslbook import distributed
from sslbook.data.loader import Batch
from sslbook.data.views import BYOL_1, BYOL_2, View
from sslbook.methods.base import Method
from sslbook.nn import MLP, backbone_dim
from sslbook.nn.metrics import feature_std
from sslbook.schedules import Clock


def invariance_loss(z_1: Float[Tensor, "n dim"], z_2: Float[Tensor, "n dim"]) -> Float[Tensor, ""]:
    """Equation 5, divided by the dimension as in the authors' code: mean squared difference."""
    return F.mse_loss(z_1, z_2)


def variance_loss(z: Float[Tensor, "n dim"], gamma: float = 1.0, epsilon: float = 1e-4) -> Float[Tensor, ""]:
    """Equations 1 and 2: by how much the deviation of a dimension falls short of `gamma`, averaged over dimensions."""
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
        view_1: what an image becomes at first.
        view_2: what it becomes the second time.
        invariance_weight: weight of the difference between the views' features.
        variance_weight: weight of what the deviations lack.
        covariance_weight: weight of the covariances between dimensions.
        hidden_dim: hidden width of the projector, which the paper calls expander.
        projector_dim: width of the features that the loss is about.
        projector_num_layers: linear layers in the projector.
        projector: another network between backbone and loss, instead of the one that these describe.
    """

    def __init__(
        self,
        backbone: nn.Module,
        view_1: View = BYOL_1,
        view_2: View = BYOL_2,
        invariance_weight: float = 25.0,
        variance_weight: float = 25.0,
        covariance_weight: float = 1.0,
        hidden_dim: int = 8192,
        projector_dim: int = 8192,
        projector_num_layers: int = 3,
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
        z_1, z_2 = [self.projector(self.backbone(x)) for x in batch.views]
        with torch.autocast(z_1.device.type, enabled=False):
            z_1, z_2 = z_1.float(), z_2.float()
            invariance, std = invariance_loss(z_1, z_2), feature_std(z_1)
            z_1, z_2 = distributed.all_gather_with_grad(z_1), distributed.all_gather_with_grad(z_2)
            variance = variance_loss(z_1) / 2 + variance_loss(z_2) / 2
            covariance = covariance_loss(z_1) + covariance_loss(z_2)
            loss = (  # equation 6
                self.invariance_weight * invariance
                + self.variance_weight * variance
                + self.covariance_weight * covariance
            )
            return {
                "loss": loss,
                "invariance": invariance.detach(),
                "variance": variance.detach(),
                "covariance": covariance.detach(),
                "feature_std": std,
            }
