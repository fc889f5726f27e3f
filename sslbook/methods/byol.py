"""BYOL: predict what a slow copy of oneself says about another view of the image; no wrong answers at all.

The online network sees one view and predicts the projection that the target network, its moving average, makes of the
other. A constant output would solve this task perfectly, yet with the predictor on one side and no gradient on the
other the network does not go there.

Grill et al., 2020, "Bootstrap your own latent" (arXiv:2006.07733), equations 1 and 2, section 3 and appendix J. The
defaults are those of the authors' code for 1000 epochs. What differs: the first layer of projector and predictor has no
bias (batch norm follows and cancels it), the target starts as a copy of the online network (the authors draw each by
itself), and its momentum counts the step just taken, so that it reaches 1 at the last one.
"""

import math

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from sslbook.data.loader import Batch
from sslbook.data.views import BYOL_1, BYOL_2, View
from sslbook.methods.base import Method
from sslbook.nn import EMA, MLP, backbone_dim
from sslbook.nn.metrics import feature_std
from sslbook.schedules import Clock


def regression_loss(p: Float[Tensor, "n dim"], z: Float[Tensor, "n dim"]) -> Float[Tensor, ""]:
    """Equation 2: squared distance of the normalized rows, 2 - 2 cos, averaged over rows."""
    return (F.normalize(p, dim=1) - F.normalize(z, dim=1)).square().sum(dim=1).mean()


def target_momentum(base: float, progress: float) -> float:
    """From `base` to 1 along half a cosine (section 3.2, "Optimization")."""
    return 1 - (1 - base) * (math.cos(math.pi * progress) + 1) / 2


class BYOL(Method):
    """Bootstrap your own latent (arXiv:2006.07733).

    Args:
        backbone: the network to train.
        view_1: what an image becomes at first.
        view_2: what it becomes the second time.
        hidden_dim: hidden width of projector and predictor.
        projector_dim: width of the projection that is predicted.
        momentum: how much of itself the target keeps at a step, in the beginning; rises to 1.
        projector: another network behind the backbone, instead of the MLP described.
        predictor: another network from one projection to the other.
    """

    def __init__(
        self,
        backbone: nn.Module,
        view_1: View = BYOL_1,
        view_2: View = BYOL_2,
        hidden_dim: int = 4096,
        projector_dim: int = 256,
        momentum: float = 0.996,
        projector: nn.Module | None = None,
        predictor: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.view_1, self.view_2, self.momentum = view_1, view_2, momentum
        self.backbone = backbone
        self.projector = projector or MLP(backbone_dim(backbone), hidden_dim, projector_dim, last_bias=False)
        self.predictor = predictor or MLP(projector_dim, hidden_dim, projector_dim, last_bias=False)
        self.target_backbone = EMA(self.backbone)
        self.target_projector = EMA(self.projector)

    def views(self) -> tuple[View, ...]:
        return (self.view_1, self.view_2)

    def forward(self, batch: Batch, clock: Clock) -> dict[str, Tensor]:
        # One pass per view: batch norm never sees the two together, as in the authors' code.
        z = [self.projector(self.backbone(x)) for x in batch.views]
        p_1, p_2 = [self.predictor(z_view).float() for z_view in z]
        t_1, t_2 = [self.target_projector(self.target_backbone(x)).float() for x in batch.views]
        loss = regression_loss(p_1, t_2) + regression_loss(p_2, t_1)
        return {"loss": loss, "feature_std": feature_std(z[0])}

    def after_step(self, clock: Clock) -> None:
        momentum = target_momentum(self.momentum, clock.progress)
        self.target_backbone.update(self.backbone, momentum)
        self.target_projector.update(self.projector, momentum)
