"""BYOL: predict the EMA target network's projection of the other view; no negatives.

The online network sees one view and predicts the projection that the target network makes of the other. A constant
output would solve this task perfectly, yet with a predictor on the online side and no gradient on the target side,
training does not go there.

Grill et al., 2020, "Bootstrap your own latent" (arXiv:2006.07733), equations 1 and 2, section 3 and appendix J. The
defaults are those of the authors' code (google-deepmind/deepmind-research) for 1000 epochs.

What differs from the authors' code (google-deepmind/deepmind-research, 4822a45):
- The first layer of projector and predictor has no bias: batch norm follows and cancels it.
- The target network starts as a copy of the online network; the authors initialize each by itself.
- The EMA momentum counts the step just taken, so that it reaches 1 at the last one.
"""

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from sslbook.data.loader import Batch
from sslbook.data.views import BYOL_1, BYOL_2, View
from sslbook.methods.base import Method
from sslbook.nn import EMA, MLP, backbone_dim
from sslbook.nn.metrics import feature_std
from sslbook.schedules import Clock, Cosine
from sslbook.types import PositiveInt


def regression_loss(p: Float[Tensor, "n dim"], z: Float[Tensor, "n dim"]) -> Float[Tensor, ""]:
    """Equation 2: squared distance of the normalized rows, 2 - 2 cos, averaged over rows."""
    return (F.normalize(p, dim=1) - F.normalize(z, dim=1)).square().sum(dim=1).mean()


class BYOL(Method):
    """Bootstrap your own latent (arXiv:2006.07733).

    Args:
        backbone: the network to train.
        view_1: augmentation of the first view.
        view_2: augmentation of the second view.
        hidden_dim: hidden width of projector and predictor.
        projector_dim: width of the projection that is predicted.
        momentum: EMA momentum of the target network at the start; rises to 1 along a cosine.
        projector: replaces the MLP behind the backbone; its output must have `projector_dim` values.
        predictor: replaces the MLP from one projection to the other.
    """

    def __init__(
        self,
        backbone: nn.Module,
        view_1: View = BYOL_1,
        view_2: View = BYOL_2,
        hidden_dim: PositiveInt = 4096,
        projector_dim: PositiveInt = 256,
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
        # Online network. One pass per view: batch norm never sees the two together, as in the authors' code.
        z = [self.projector(self.backbone(x)) for x in batch.views]  # 2 x (n, dim)
        p_1, p_2 = [self.predictor(z_view).float() for z_view in z]
        # Target network, on the same views. An EMA module computes no gradient: the stop-gradient of equation 2.
        t_1, t_2 = [self.target_projector(self.target_backbone(x)).float() for x in batch.views]
        # Symmetrized: each view predicts the target of the other.
        loss = regression_loss(p_1, t_2) + regression_loss(p_2, t_1)
        return {"loss": loss, "feature_std": feature_std(z[0])}

    def after_step(self, clock: Clock) -> None:
        momentum = Cosine(self.momentum, 1.0)(clock)  # tau, section 3.2
        self.target_backbone.update(self.backbone, momentum)  # equation 1
        self.target_projector.update(self.projector, momentum)
