"""LeJEPA: views of an image predict their mean, and SIGReg keeps the features of all images an isotropic Gaussian.

Each view should have the mean projection of the large views. A constant would satisfy this, so a second term (SIGReg)
measures how far the batch's features are from the isotropic Gaussian, which the paper shows to be the best distribution
for unknown tasks: a statistical test of normality along many random directions. One weight trades the two; there is no
teacher, no stop-gradient and no predictor.

Balestriero and LeCun, 2025, "LeJEPA: provable and scalable self-supervised learning without the heuristics"
(arXiv:2511.08544), the SIGReg and LeJEPA losses (algorithms 1 and 2). The defaults are those of the authors' README and
package (rbalestr-lab/lejepa): 1,024 directions, 17 knots on [0, 3] (paper: on [-5, 5]), views of 224 and 98 pixels;
lambda is the paper's.

What differs from the authors' code (rbalestr-lab/lejepa, a0d6745):
- The directions are counter-based random numbers of seed and step, so that all processes have the same.
- The statistic is computed over the global batch, for each view by itself, and averaged over views.
"""

import math
from dataclasses import replace

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from sslbook import distributed, rng
from sslbook.data.loader import Batch
from sslbook.data.views import BYOL_1, View
from sslbook.methods.base import Method
from sslbook.nn import MLP, backbone_dim
from sslbook.nn.metrics import feature_std
from sslbook.nn.precision import full_precision
from sslbook.schedules import Clock
from sslbook.types import PositiveInt

GLOBAL_VIEW = replace(BYOL_1, crop=(0.3, 1.0), interpolation="bilinear", blur=0.5, solarize=0.2)
LOCAL_VIEW = replace(GLOBAL_VIEW, size=98, crop=(0.05, 0.3))
KNOTS = 17  # points t at which the characteristic functions are compared ...
RANGE = 3.0  # ... between 0 and here: they are symmetric


def directions(dim: int, count: int, clock: Clock, device: torch.device) -> Float[Tensor, "{dim} {count}"]:
    """Random unit vectors as columns, a function of seed and step: the same in every process.

    They are normalized Gaussian vectors (by the Box-Muller transform), which are uniform on the sphere.
    """
    index = torch.arange(count, device=device)
    u, v = rng.uniform(clock.seed, clock.step, index, rng.METHOD, 2 * dim).T.chunk(2)
    normal = (-2 * (1 - u).log()).sqrt() * (2 * math.pi * v).cos()
    return normal / normal.norm(dim=0)


def epps_pulley(x: Float[Tensor, "*views n count"]) -> Float[Tensor, "*views count"]:
    """The Epps-Pulley statistic of every column: its distance from a standard normal distribution.

    The squared difference of the empirical characteristic function from exp(-t^2 / 2), weighted by exp(-t^2 / 2) and
    integrated over t by the trapezoidal rule, times the number of samples in all processes (Epps and Pulley, 1983).
    """
    processes = distributed.world_size()
    t = torch.linspace(0, RANGE, KNOTS, dtype=x.dtype, device=x.device)
    gaussian = torch.exp(-t.square() / 2)
    weight = torch.full_like(t, 2 * RANGE / (KNOTS - 1))  # twice, for t and -t
    weight[0] = weight[-1] = RANGE / (KNOTS - 1)
    angle = x[..., None] * t  # (*views, n, count, knots)
    functions = torch.stack([angle.cos().mean(dim=-3), angle.sin().mean(dim=-3)])
    real, imaginary = distributed.all_reduce_sum_with_grad(functions) / processes
    error = (real - gaussian).square() + imaginary.square()
    return error @ (weight * gaussian) * (x.shape[-2] * processes)


def prediction_loss(z: Float[Tensor, "views n dim"], num_global: int) -> Float[Tensor, ""]:
    """Mean squared distance of all views from the mean of the global ones, which come first."""
    return (z[:num_global].mean(dim=0) - z).square().mean()


class LeJEPA(Method):
    """Latent-Euclidean joint-embedding predictive architecture (arXiv:2511.08544).

    Args:
        backbone: the network to train; it must accept images of both views' sizes.
        global_view: the global view, of which there are `num_global`.
        local_view: the local view, of which there are `num_local`.
        num_global: global views of an image.
        num_local: local views of an image.
        lambda_: weight of SIGReg, from 0 to 1; the prediction has the rest.
        num_slices: random directions along which the distribution is tested.
        hidden_dim: hidden width of the projector.
        projector_dim: width of the projections.
        projector: replaces the MLP behind the backbone; its output must have `projector_dim` values.
    """

    min_images = 2

    def __init__(
        self,
        backbone: nn.Module,
        global_view: View = GLOBAL_VIEW,
        local_view: View = LOCAL_VIEW,
        num_global: PositiveInt = 2,
        num_local: int = 6,
        lambda_: float = 0.05,
        num_slices: PositiveInt = 1024,
        hidden_dim: PositiveInt = 2048,
        projector_dim: PositiveInt = 128,
        projector: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.global_view, self.local_view = global_view, local_view
        self.num_global, self.num_local = num_global, num_local
        self.lambda_, self.num_slices, self.projector_dim = lambda_, num_slices, projector_dim
        self.backbone = backbone
        self.projector = projector or MLP(backbone_dim(backbone), hidden_dim, projector_dim, num_layers=3)

    def views(self) -> tuple[View, ...]:
        return (self.global_view,) * self.num_global + (self.local_view,) * self.num_local

    def features(self, batch: Batch) -> Float[Tensor, "views n dim"]:
        """The projections of all views; views of one size go through the backbone together."""
        views = batch.views[: self.num_global], batch.views[self.num_global :]
        f = [self.backbone(torch.cat(same_size)) for same_size in views if same_size]
        return rearrange(self.projector(torch.cat(f)), "(views n) dim -> views n dim", n=len(batch.index))

    def forward(self, batch: Batch, clock: Clock) -> dict[str, Tensor]:
        z = self.features(batch)  # (views, n, dim)
        with full_precision(z):  # the angles t * x need it
            z = z.float()
            # The mean of the global views is differentiated too: there is no stop-gradient.
            prediction = prediction_loss(z, self.num_global)
            # SIGReg (algorithm 1): project on random directions, test each, average over directions and views.
            a = directions(self.projector_dim, self.num_slices, clock, z.device)
            sigreg = epps_pulley(z @ a).mean()  # of (views, slices)
            loss = (1 - self.lambda_) * prediction + self.lambda_ * sigreg  # algorithm 2
            return {
                "loss": loss,
                "prediction": prediction.detach(),
                "sigreg": sigreg.detach(),
                "feature_std": feature_std(z[0]),
            }
