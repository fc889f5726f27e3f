"""SimSiam: predict the projection of the other view by the same network, with a stop-gradient; no EMA, no negatives.

A predictor maps the projection of one view to that of the other. A constant output would solve this task perfectly, but
the projection to be predicted passes no gradient, so the network is never moved towards being easier to predict.
Without the stop-gradient it collapses within a few steps.

Chen and He, 2021, "Exploring simple Siamese representation learning" (arXiv:2011.10566), equations 1 to 4, algorithm 1.
The defaults are those of the authors' code (facebookresearch/simsiam). That the predictor's learning rate does not
decay (section 4.2) is a rule of the recipes.

What differs from the authors' code (facebookresearch/simsiam, a7bc177):
- The last linear layer of the projector has no bias. The authors keep one that is not trained, since batch norm cancels
  it.
- The cosine of the learning rate moves with every step instead of every epoch.
"""

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from sslbook.data.loader import Batch
from sslbook.data.views import MOCO_V2, View
from sslbook.methods.base import Method
from sslbook.nn import MLP, backbone_dim
from sslbook.nn.metrics import feature_std
from sslbook.nn.precision import full_precision
from sslbook.schedules import Clock
from sslbook.types import PositiveInt


def distance(p: Float[Tensor, "n dim"], z: Float[Tensor, "n dim"]) -> Float[Tensor, ""]:
    """Equation 1: negative cosine similarity, averaged over rows; -1 is the minimum."""
    return -F.cosine_similarity(p, z, dim=1).mean()


class SimSiam(Method):
    """Simple Siamese representation learning (arXiv:2011.10566).

    Args:
        backbone: the network to train.
        view: the augmentation of both views, sampled twice independently.
        hidden_dim: hidden width of the projector.
        projector_dim: width of the projection that is predicted.
        projector_num_layers: linear layers in the projector; 2 in the paper's CIFAR-10 experiment (appendix D).
        predictor_dim: hidden width of the predictor, a bottleneck.
        projector: replaces the MLP behind the backbone; its output must have `projector_dim` values.
        predictor: replaces the MLP from one projection to the other.
    """

    def __init__(
        self,
        backbone: nn.Module,
        view: View = MOCO_V2,
        hidden_dim: PositiveInt = 2048,
        projector_dim: PositiveInt = 2048,
        projector_num_layers: PositiveInt = 3,
        predictor_dim: PositiveInt = 512,
        projector: nn.Module | None = None,
        predictor: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.view = view
        self.backbone = backbone
        dim = backbone_dim(backbone)
        self.projector = projector or MLP(dim, hidden_dim, projector_dim, projector_num_layers, last_batch_norm="plain")
        self.predictor = predictor or MLP(projector_dim, predictor_dim, projector_dim)

    def views(self) -> tuple[View, ...]:
        return (self.view, self.view)

    def target(self, z: Float[Tensor, "n dim"]) -> Float[Tensor, "n dim"]:
        """The stop-gradient of equation 3: the projection to be predicted is a constant."""
        return z.detach()

    def forward(self, batch: Batch, clock: Clock) -> dict[str, Tensor]:
        # One pass per view: batch norm never sees the two together, as in the authors' code.
        z_1, z_2 = [self.projector(self.backbone(x)) for x in batch.views]  # (n, dim) each
        p_1, p_2 = self.predictor(z_1), self.predictor(z_2)
        with full_precision(z_1):
            z_1, z_2, p_1, p_2 = z_1.float(), z_2.float(), p_1.float(), p_2.float()
            # Equation 4: each view predicts the other, and only the predictions pass a gradient.
            loss = distance(p_1, self.target(z_2)) / 2 + distance(p_2, self.target(z_1)) / 2
            return {"loss": loss, "feature_std": feature_std(z_1)}
