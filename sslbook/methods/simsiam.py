"""SimSiam: BYOL without the slow teacher; two branches of one network, and the gradient stops in one of them.

A predictor must turn the projection of one view into that of the other. A constant output would solve this perfectly,
but since the branch to be predicted passes no gradient, the network is never moved towards being easier to predict.
Remove the stop-gradient and it collapses within a few steps.

Chen and He, 2021, "Exploring simple Siamese representation learning" (arXiv:2011.10566), equations 1 to 4, algorithm 1.
The defaults are those of the authors' code. What differs: the last linear layer of the projector has no bias, which the
authors keep fixed since batch norm cancels it. That the predictor's learning rate does not decay (section 4.2) is a
rule of the recipe, `rules: [{pattern: ^predictor, schedule: ...Constant}]`.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from sslbook.data.loader import Batch
from sslbook.data.views import MOCO_V2, View
from sslbook.methods.base import Method
from sslbook.nn import MLP, backbone_dim
from sslbook.nn.metrics import feature_std
from sslbook.schedules import Clock


def distance(p: Float[Tensor, "n dim"], z: Float[Tensor, "n dim"]) -> Float[Tensor, ""]:
    """Equation 1: negative cosine similarity, averaged over rows; -1 is the best."""
    return -F.cosine_similarity(p, z, dim=1).mean()


class SimSiam(Method):
    """Simple Siamese representation learning (arXiv:2011.10566).

    Args:
        backbone: the network to train.
        view: what an image becomes, twice, each augmented independently.
        hidden_dim: hidden width of the projector.
        projector_dim: width of the projection that is predicted.
        projector_num_layers: linear layers in the projector; 2 in the paper's CIFAR-10 experiment (appendix D).
        predictor_dim: hidden width of the predictor, a bottleneck.
        projector: another network behind the backbone, instead of the one that these describe.
        predictor: another network from one projection to the other.
    """

    def __init__(
        self,
        backbone: nn.Module,
        view: View = MOCO_V2,
        hidden_dim: int = 2048,
        projector_dim: int = 2048,
        projector_num_layers: int = 3,
        predictor_dim: int = 512,
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
        """What is to be predicted is taken as it is (section 3, "stop-gradient")."""
        return z.detach()

    def forward(self, batch: Batch, clock: Clock) -> dict[str, Tensor]:
        # One pass per view: batch norm never sees the two together, as in the authors' code.
        z_1, z_2 = [self.projector(self.backbone(x)) for x in batch.views]
        p_1, p_2 = self.predictor(z_1), self.predictor(z_2)
        with torch.autocast(z_1.device.type, enabled=False):
            z_1, z_2, p_1, p_2 = z_1.float(), z_2.float(), p_1.float(), p_2.float()
            loss = distance(p_1, self.target(z_2)) / 2 + distance(p_2, self.target(z_1)) / 2  # equation 4
            return {"loss": loss, "feature_std": feature_std(z_1)}
