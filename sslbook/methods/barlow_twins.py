"""Barlow Twins: every dimension should agree between two views of an image and repeat no other dimension.

The correlation of all dimensions of one view's projection with all of the other's, over the batch, is a matrix that
should be the identity. Its diagonal asks for agreement, which a constant output cannot give since it has no correlation
to speak of; the rest asks that no two dimensions say the same, so that a wide projection is filled with something.

Zbontar, Jing, Misra, LeCun and Deny, 2021, "Barlow Twins: self-supervised learning via redundancy reduction"
(arXiv:2103.03230), equations 1 and 2, algorithm 1. The defaults are those of the authors' code, whose lambda is 0.0051
(paper: 0.005). Mean and deviation are those of batch norm: over the global batch, biased, with an epsilon of 1e-5.

What differs from the authors' code: it sums the correlation over GPUs without telling the backward pass, so that the
gradient is divided by their number. LARS does not notice in weight matrices; biases and batch norms, whose rate of
0.0048 it does not adapt, are moved less there.
"""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from sslbook import distributed
from sslbook.data.loader import Batch
from sslbook.data.views import BYOL_1, BYOL_2, View
from sslbook.methods.base import Method
from sslbook.nn import MLP, backbone_dim
from sslbook.nn.metrics import feature_std
from sslbook.schedules import Clock


def standardize(z: Float[Tensor, "n dim"], epsilon: float = 1e-5) -> Float[Tensor, "n dim"]:
    """Every dimension with mean 0 and variance 1 over the rows of all processes."""
    processes = distributed.world_size()
    z = z - distributed.all_reduce_sum_with_grad(z.mean(dim=0)) / processes
    variance = distributed.all_reduce_sum_with_grad(z.square().mean(dim=0)) / processes
    return z * (variance + epsilon).rsqrt()


def cross_correlation(z_1: Float[Tensor, "n dim"], z_2: Float[Tensor, "n dim"]) -> Float[Tensor, "dim dim"]:
    """Equation 2: how each dimension of one view goes with each of the other, over the rows of all processes."""
    count = len(z_1) * distributed.world_size()
    return distributed.all_reduce_sum_with_grad(standardize(z_1).T @ standardize(z_2)) / count


def redundancy_loss(c: Float[Tensor, "dim dim"], lambda_: float) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
    """Equation 1 in its two terms: the diagonal's squared distance from 1, and the rest's from 0, times lambda."""
    diagonal = c.diagonal()
    return (1 - diagonal).square().sum(), lambda_ * (c.square().sum() - diagonal.square().sum())


class BarlowTwins(Method):
    """Barlow Twins (arXiv:2103.03230).

    Args:
        backbone: the network to train.
        view_1: what an image becomes at first.
        view_2: what it becomes the second time.
        lambda_: weight of the redundancy between dimensions.
        hidden_dim: hidden width of the projector.
        projector_dim: width of the projection, the number of dimensions to be decorrelated.
        projector_num_layers: linear layers in the projector.
        projector: another network between backbone and loss, instead of the one that these describe.
    """

    def __init__(
        self,
        backbone: nn.Module,
        view_1: View = BYOL_1,
        view_2: View = BYOL_2,
        lambda_: float = 0.0051,
        hidden_dim: int = 8192,
        projector_dim: int = 8192,
        projector_num_layers: int = 3,
        projector: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.view_1, self.view_2, self.lambda_ = view_1, view_2, lambda_
        self.backbone = backbone
        dim = backbone_dim(backbone)
        self.projector = projector or MLP(dim, hidden_dim, projector_dim, projector_num_layers, last_bias=False)

    def views(self) -> tuple[View, ...]:
        return (self.view_1, self.view_2)

    def forward(self, batch: Batch, clock: Clock) -> dict[str, Tensor]:
        # One pass per view: batch norm never sees the two together, as in the authors' code.
        z_1, z_2 = [self.projector(self.backbone(x)) for x in batch.views]
        with torch.autocast(z_1.device.type, enabled=False):  # small correlations would drown in bf16's rounding
            z_1, z_2 = z_1.float(), z_2.float()
            invariance, redundancy = redundancy_loss(cross_correlation(z_1, z_2), self.lambda_)
            return {
                "loss": invariance + redundancy,
                "invariance": invariance.detach(),
                "redundancy": redundancy.detach(),
                "feature_std": feature_std(z_1),
            }
