"""LeJEPA: views of an image predict each other, and the features of all images are kept a standard Gaussian.

Views should have the features that the large views have on average. That alone would allow a constant, so a second term
measures how far the features of a batch are from the isotropic Gaussian, the distribution that the paper shows to be
the best for unknown tasks: along many random directions, a statistical test of normality. One weight trades the two;
there is no teacher, no stop-gradient and no predictor.

Balestriero and LeCun, 2025, "LeJEPA: provable and scalable self-supervised learning without the heuristics"
(arXiv:2511.08544), the SIGReg and LeJEPA losses (algorithms 1 and 2). The defaults are those of the authors' README and
package: 1,024 directions, 17 knots on [0, 3] (paper: on [-5, 5]), views of 224 and 98 pixels; lambda is the paper's. The
directions are keyed by seed and step, so that all processes agree, and the test is of the global batch. The test of
each view is taken by itself and averaged.
"""

import math

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from sslbook import distributed, rng
from sslbook.data.loader import Batch
from sslbook.data.views import View
from sslbook.errors import UserError
from sslbook.methods.base import Method
from sslbook.nn import MLP, backbone_dim
from sslbook.nn.metrics import feature_std
from sslbook.schedules import Clock

GLOBAL_VIEW = View(
    crop=(0.3, 1.0),
    color_jitter=(0.4, 0.4, 0.2, 0.1),
    color_jitter_p=0.8,
    grayscale=0.2,
    blur=0.5,
    solarize=0.2,
)
LOCAL_VIEW = View(
    size=98,
    crop=(0.05, 0.3),
    color_jitter=(0.4, 0.4, 0.2, 0.1),
    color_jitter_p=0.8,
    grayscale=0.2,
    blur=0.5,
    solarize=0.2,
)
KNOTS = 17  # places at which the characteristic functions are compared ...
RANGE = 3.0  # ... from 0 to here: they are symmetric


def directions(dim: int, count: int, clock: Clock, device: torch.device) -> Float[Tensor, "{dim} {count}"]:
    """Random unit vectors, keyed by seed and step: the same in every process.

    Normal numbers by Box and Muller's transformation have no preferred direction.
    """
    index = torch.arange(count, device=device)
    u, v = rng.uniform(clock.seed, clock.step, index, rng.METHOD, 2 * dim).T.chunk(2)
    normal = (-2 * (1 - u).log()).sqrt() * (2 * math.pi * v).cos()
    return normal / normal.norm(dim=0)


def epps_pulley(x: Float[Tensor, "*views n count"]) -> Float[Tensor, "*views count"]:
    """How far the numbers of all processes are from a standard normal distribution, for every column.

    The squared difference of the empirical characteristic function from exp(-t^2 / 2), weighted by exp(-t^2 / 2) and
    integrated over t by the trapezoidal rule, times the number of samples (Epps and Pulley, 1983).
    """
    processes = distributed.world_size()
    t = torch.linspace(0, RANGE, KNOTS, dtype=x.dtype, device=x.device)
    gaussian = torch.exp(-t.square() / 2)
    weight = torch.full_like(t, 2 * RANGE / (KNOTS - 1))  # twice, for t and -t
    weight[0] = weight[-1] = RANGE / (KNOTS - 1)
    angle = x[..., None] * t
    functions = torch.stack([angle.cos().mean(dim=-3), angle.sin().mean(dim=-3)])
    real, imaginary = distributed.all_reduce_sum_with_grad(functions) / processes
    error = (real - gaussian).square() + imaginary.square()
    return error @ (weight * gaussian) * (x.shape[-2] * processes)


def prediction_loss(z: Float[Tensor, "views n dim"], num_global: int) -> Float[Tensor, ""]:
    """Mean squared difference of all views from the mean of the global ones, which come first."""
    return (z[:num_global].mean(dim=0) - z).square().mean()


class LeJEPA(Method):
    """Latent-Euclidean joint-embedding predictive architecture (arXiv:2511.08544).

    Args:
        backbone: the network to train; it must take images of both views' sizes.
        global_view: what an image becomes at large, `num_global` times.
        local_view: what it becomes in small parts, `num_local` times.
        num_global: large views of an image.
        num_local: small views of an image.
        lambda_: weight of the distance from a Gaussian; the prediction has the rest.
        num_slices: random directions along which the distribution is tested.
        hidden_dim: hidden width of the projector.
        projector_dim: width of the features that the loss is about.
        projector: another network between backbone and loss; it must give `projector_dim` values.
    """

    def __init__(
        self,
        backbone: nn.Module,
        global_view: View = GLOBAL_VIEW,
        local_view: View = LOCAL_VIEW,
        num_global: int = 2,
        num_local: int = 6,
        lambda_: float = 0.05,
        num_slices: int = 1024,
        hidden_dim: int = 2048,
        projector_dim: int = 128,
        projector: nn.Module | None = None,
    ) -> None:
        super().__init__()
        if num_global < 1 or num_global + num_local < 2:
            raise UserError(
                f"LeJEPA predicts the mean of the global views and has {num_global} of them and {num_local} local ones: "
                "use num_global=2"
            )
        if not 0 <= lambda_ <= 1:
            raise UserError(f"lambda_ = {lambda_} shares the loss between two terms: use a number from 0 to 1")
        self.global_view, self.local_view = global_view, local_view
        self.num_global, self.num_local = num_global, num_local
        self.lambda_, self.num_slices, self.projector_dim = lambda_, num_slices, projector_dim
        self.backbone = backbone
        self.projector = projector or MLP(backbone_dim(backbone), hidden_dim, projector_dim, num_layers=3)

    def views(self) -> tuple[View, ...]:
        return (self.global_view,) * self.num_global + (self.local_view,) * self.num_local

    def features(self, batch: Batch) -> Float[Tensor, "views n dim"]:
        """The projections of all views; views of one size go through the backbone together."""
        large, small = batch.views[: self.num_global], batch.views[self.num_global :]
        f = [self.backbone(torch.cat(views)) for views in (large, small) if views]
        return rearrange(self.projector(torch.cat(f)), "(views n) dim -> views n dim", n=len(batch.index))

    def forward(self, batch: Batch, clock: Clock) -> dict[str, Tensor]:
        z = self.features(batch)
        with torch.autocast(z.device.type, enabled=False):  # the angles of the characteristic function need precision
            z = z.float()
            a = directions(self.projector_dim, self.num_slices, clock, z.device)
            prediction = prediction_loss(z, self.num_global)
            sigreg = epps_pulley(z @ a).mean()
            loss = (1 - self.lambda_) * prediction + self.lambda_ * sigreg
            return {
                "loss": loss,
                "prediction": prediction.detach(),
                "sigreg": sigreg.detach(),
                "feature_std": feature_std(z[0]),
            }
