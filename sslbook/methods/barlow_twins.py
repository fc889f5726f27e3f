"""Barlow Twins: make the cross-correlation matrix between the projections of two views the identity.

Ones on the diagonal mean that each dimension agrees between the views. A constant output cannot achieve this, since it
has no correlation. Zeros elsewhere mean that different dimensions are uncorrelated, which fills a wide projection with
information.

Zbontar, Jing, Misra, LeCun and Deny, 2021, "Barlow Twins: self-supervised learning via redundancy reduction"
(arXiv:2103.03230), equations 1 and 2, algorithm 1. The defaults are those of the authors' code
(facebookresearch/barlowtwins), whose lambda is 0.0051 (paper: 0.005). Mean and standard deviation are those of batch
norm: over the global batch, biased, with an epsilon of 1e-5.

What differs from the authors' code (facebookresearch/barlowtwins, a655214):
- The authors' code sums the correlation over GPUs outside of autograd, so that its gradient is divided by their number.
  LARS cancels this factor for weight matrices. It does not adapt biases and batch norms, so the recipe's learning rate
  of 0.0048 for these is the authors' number and not its effect: on their 16 GPUs they moved by 1/16 of it.
"""

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


def standardize(z: Float[Tensor, "n dim"], epsilon: float = 1e-5) -> Float[Tensor, "n dim"]:
    """Every dimension with mean 0 and variance 1 over the rows of all processes."""
    processes = distributed.world_size()
    z = z - distributed.all_reduce_sum_with_grad(z.mean(dim=0)) / processes
    variance = distributed.all_reduce_sum_with_grad(z.square().mean(dim=0)) / processes
    return z * (variance + epsilon).rsqrt()


def cross_correlation(z_1: Float[Tensor, "n dim"], z_2: Float[Tensor, "n dim"]) -> Float[Tensor, "dim dim"]:
    """Equation 2: the correlation of each dimension of one view with each of the other, over the global batch."""
    count = len(z_1) * distributed.world_size()
    return distributed.all_reduce_sum_with_grad(standardize(z_1).T @ standardize(z_2)) / count


def redundancy_loss(c: Float[Tensor, "dim dim"], lambda_: float) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
    """Equation 1 in its two terms: the diagonal's squared distance from 1, and lambda times the rest's from 0."""
    diagonal = c.diagonal()
    return (1 - diagonal).square().sum(), lambda_ * (c.square().sum() - diagonal.square().sum())


class BarlowTwins(Method):
    """Barlow Twins (arXiv:2103.03230).

    Args:
        backbone: the network to train.
        view_1: augmentation of the first view.
        view_2: augmentation of the second view.
        lambda_: weight of the redundancy between dimensions.
        hidden_dim: hidden width of the projector.
        projector_dim: width of the projection, the number of dimensions to be decorrelated.
        projector_num_layers: linear layers in the projector.
        projector: replaces the MLP behind the backbone.
    """

    min_images = 2

    def __init__(
        self,
        backbone: nn.Module,
        view_1: View = BYOL_1,
        view_2: View = BYOL_2,
        lambda_: float = 0.0051,
        hidden_dim: PositiveInt = 8192,
        projector_dim: PositiveInt = 8192,
        projector_num_layers: PositiveInt = 3,
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
        z_1, z_2 = [self.projector(self.backbone(x)) for x in batch.views]  # (n, dim) each
        with full_precision(z_1):  # small correlations would be lost in bf16's rounding
            z_1, z_2 = z_1.float(), z_2.float()
            c = cross_correlation(z_1, z_2)  # (dim, dim)
            invariance, redundancy = redundancy_loss(c, self.lambda_)  # the two terms of equation 1
            return {
                "loss": invariance + redundancy,
                "invariance": invariance.detach(),
                "redundancy": redundancy.detach(),
                "feature_std": feature_std(z_1),
            }
