"""W-MSE: whiten the projections of a batch, then minimize the distance between the views of an image.

After whitening, the projections of a batch have mean zero, variance one in every direction and no correlations,
whatever the network computes, so they cannot collapse to a point or a line. What is left to learn is a mean squared
error between views, without negatives, teacher or predictor. The covariance of few samples is unreliable; therefore the
batch is cut into random slices, several times, and each slice of each view is whitened by itself.

Ermolov, Siarohin, Sangineto and Sebe, 2021, "Whitening for self-supervised representation learning" (arXiv:2007.06346),
section 3. The defaults are those of the authors' code (htdt/self-supervised) for STL-10 and Tiny ImageNet, with four
permutations; its README also has a command for ImageNet-100, with one.

What differs from the authors' code (htdt/self-supervised, 2b963de):
- The slices are cut from the global batch.
- Slices are counter-based random numbers of seed, epoch and image; theirs come from a running generator.
- Color jitter comes after the crop; in the authors' code before it, so that its contrast is that of the whole image.
"""

from itertools import combinations

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor, nn

from sslbook import distributed, rng
from sslbook.data.loader import Batch
from sslbook.data.views import View
from sslbook.errors import UserError
from sslbook.methods.base import Method
from sslbook.nn import MLP, backbone_dim
from sslbook.nn.metrics import feature_std
from sslbook.nn.precision import full_precision
from sslbook.schedules import Clock
from sslbook.types import PositiveInt

VIEW = View(
    crop=(0.2, 1.0), interpolation="bicubic", color_jitter=(0.4, 0.4, 0.4, 0.1), color_jitter_p=0.8, grayscale=0.1
)


def whiten(x: Float[Tensor, "*slices size dim"], epsilon: float = 0.0) -> Float[Tensor, "*slices size dim"]:
    """W (x - mean) for every row of a slice, where W is the inverse Cholesky factor of the slice's covariance.

    Args:
        x: projections, slice by slice.
        epsilon: weight of the identity in the covariance, which has the rest.

    Raises:
        UserError: a covariance is singular.
    """
    x = x - x.mean(dim=-2, keepdim=True)
    covariance = x.mT @ x / (x.shape[-2] - 1)
    identity = torch.eye(x.shape[-1], dtype=x.dtype, device=x.device)
    factor, info = torch.linalg.cholesky_ex((1 - epsilon) * covariance + epsilon * identity)
    if bool(info.any()):
        raise UserError(
            f"a slice of {x.shape[-2]} images has projections that vary in too few of {x.shape[-1]} directions to be "
            "whitened: set method.slice_size to twice method.projector_dim, or method.epsilon=0.01"
        )
    return torch.linalg.solve_triangular(factor, x.mT, upper=False).mT


def slices(index: Int[Tensor, "batch"], size: int, stream: int, clock: Clock) -> Int[Tensor, "slices {size}"]:
    """The rows of a batch of images in random order, cut into slices of `size`; every permutation has its `stream`.

    Raises:
        UserError: the batch is not a multiple of the slice.
    """
    if len(index) % size:
        raise UserError(
            f"a batch of {len(index)} images cannot be cut into slices of {size}: "
            f"use a batch_size of {max(1, len(index) // size) * size}, or another method.slice_size"
        )
    order = rng.uniform(clock.seed, clock.epoch, index, stream, 1)[:, 0].argsort(stable=True)
    return order.view(-1, size)


def pair_loss(z: Float[Tensor, "views batch dim"]) -> Float[Tensor, ""]:
    """Squared distance of the normalized rows, 2 - 2 cos, averaged over rows and pairs of views."""
    z = F.normalize(z, dim=2)
    pairs = [(z[i] - z[j]).square().sum(dim=1).mean() for i, j in combinations(range(len(z)), 2)]
    return torch.stack(pairs).mean()


class WMSE(Method):
    """Whitening mean squared error (arXiv:2007.06346).

    Args:
        backbone: the network to train.
        view: the view, of which there are `num_views`, augmented independently.
        num_views: views of an image, at least 2; 2 and 4 in the paper (W-MSE 2, W-MSE 4).
        hidden_dim: hidden width of the projector.
        projector_dim: width of the projection that is whitened.
        slice_size: images whitened together, more than `projector_dim`: twice as many in the paper. The batch must be a
            multiple.
        num_permutations: how many times the batch is permuted and cut into slices.
        epsilon: weight of the identity that is mixed into the covariance.
        projector: replaces the MLP behind the backbone; its output must have `projector_dim` values.
    """

    def __init__(
        self,
        backbone: nn.Module,
        view: View = VIEW,
        num_views: PositiveInt = 2,
        hidden_dim: PositiveInt = 1024,
        projector_dim: PositiveInt = 128,
        slice_size: PositiveInt = 256,
        num_permutations: PositiveInt = 4,
        epsilon: float = 0.0,
        projector: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.view, self.num_views, self.slice_size = view, num_views, slice_size
        self.num_permutations, self.epsilon = num_permutations, epsilon
        self.backbone = backbone
        self.projector = projector or MLP(backbone_dim(backbone), hidden_dim, projector_dim)

    def views(self) -> tuple[View, ...]:
        return (self.view,) * self.num_views

    def forward(self, batch: Batch, clock: Clock) -> dict[str, Tensor]:
        # As in the authors' code, the backbone sees one view at a time, the projector all of them together.
        h = self.projector(torch.cat([self.backbone(x) for x in batch.views]))
        with full_precision(h):  # a covariance is hard to invert in bf16
            h = rearrange(h.float(), "(views n) dim -> n views dim", views=self.num_views)
            h_all = distributed.all_gather_with_grad(h).transpose(0, 1)  # (views, batch, dim)
            index = distributed.all_gather(batch.index)
            loss = h.new_zeros(())
            for k in range(self.num_permutations):
                rows = slices(index, self.slice_size, rng.METHOD + k, clock)  # (slices, size), the same for all views
                z = whiten(h_all[:, rows], self.epsilon)  # each slice of each view by itself; differentiated as well
                loss = loss + pair_loss(rearrange(z, "views slices size dim -> views (slices size) dim"))
            return {"loss": loss / self.num_permutations, "feature_std": feature_std(h[:, 0])}
