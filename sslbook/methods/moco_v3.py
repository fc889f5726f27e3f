"""MoCo v3: momentum contrast without a queue, for vision transformers as well as for ResNets.

With batches of thousands, the keys of the other images are negatives enough, so the queue is dropped. A predictor and
batch norm in the heads come from BYOL, and the loss is symmetrized over the two views. Training of transformers is
unstable: accuracy drops suddenly, beginning in the first layer. A frozen, random patch embedding makes this rarer.

Chen, Xie and He, 2021, "An empirical study of training self-supervised vision transformers" (arXiv:2104.02057),
equation 1, algorithm 1, sections 4 and 5. The defaults are those of the authors' code for ResNet-50 after 100 epochs;
for transformers see the recipe `imagenet_vit`. As there, the loss is the sum of both directions times twice the
temperature.

What differs from the authors' code (facebookresearch/moco-v3, 7074f47):
- The key encoder is updated after each step instead of before each forward pass, and its momentum counts the step just
  taken, so that it reaches 1 at the last one.
- A transformer's fixed positions are MAE's table, in which rows and columns are exchanged.
- A transformer's initial weights are MAE's too. The authors initialize the layers to query, key and value separately,
  the class token with a standard deviation of 1e-6 instead of 0.02, and the patch embedding's bias with zero.
"""

from dataclasses import replace

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from sslbook import distributed
from sslbook.data.loader import Batch
from sslbook.data.views import BYOL_1, BYOL_2, View
from sslbook.methods.base import Method
from sslbook.nn import EMA, MLP, backbone_dim
from sslbook.nn.metrics import feature_std
from sslbook.nn.precision import full_precision
from sslbook.schedules import Clock, Cosine
from sslbook.types import PositiveFloat, PositiveInt

VIEW_1 = replace(BYOL_1, crop=(0.2, 1.0), interpolation="bilinear")
VIEW_2 = replace(BYOL_2, crop=(0.2, 1.0), interpolation="bilinear")


def contrastive_loss(
    q: Float[Tensor, "n dim"], k: Float[Tensor, "n dim"], temperature: float
) -> tuple[Float[Tensor, ""], Float[Tensor, "n all"]]:
    """Equation 1 times twice the temperature, with the keys of all processes as candidates; and the logits."""
    q, k = F.normalize(q, dim=1), F.normalize(k, dim=1)
    logits = q @ distributed.all_gather(k).T / temperature
    positive = distributed.own_rows(len(q), q.device)
    return 2 * temperature * F.cross_entropy(logits, positive), logits


class MoCoV3(Method):
    """Momentum contrast, version 3 (arXiv:2104.02057).

    Args:
        backbone: the network to train.
        view_1: augmentation of the first view.
        view_2: augmentation of the second view.
        hidden_dim: hidden width of projector and predictor.
        projector_dim: width of queries and keys.
        projector_num_layers: linear layers in the projector; 2 for a ResNet, 3 for a transformer.
        predictor_batch_norm: batch norm at the predictor's output; false for a ResNet, true for a transformer.
        temperature: divides the cosine similarities; 1 for a ResNet, 0.2 for a transformer.
        momentum: EMA momentum m of the key encoder at the start; rises to 1 along a cosine.
        freeze_patch_embedding: keep a transformer's patch embedding at its random initialization.
        projector: replaces the MLP behind the backbone; its output must have `projector_dim` values.
        predictor: replaces the MLP from the queries' projections to queries.
    """

    min_images = 2

    def __init__(
        self,
        backbone: nn.Module,
        view_1: View = VIEW_1,
        view_2: View = VIEW_2,
        hidden_dim: PositiveInt = 4096,
        projector_dim: PositiveInt = 256,
        projector_num_layers: PositiveInt = 2,
        predictor_batch_norm: bool = False,
        temperature: PositiveFloat = 1.0,
        momentum: float = 0.99,
        freeze_patch_embedding: bool = True,
        projector: nn.Module | None = None,
        predictor: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.view_1, self.view_2, self.temperature = view_1, view_2, temperature
        self.momentum = Cosine(momentum, 1.0)  # section 5.1
        self.backbone = backbone
        embedding = getattr(backbone, "patch_embed", None)
        if freeze_patch_embedding and isinstance(embedding, nn.Module):
            embedding.requires_grad_(False)
        dim = backbone_dim(backbone)
        self.projector = projector or MLP(dim, hidden_dim, projector_dim, projector_num_layers, last_batch_norm="plain")
        self.predictor = predictor or MLP(
            projector_dim,
            hidden_dim,
            projector_dim,
            last_batch_norm="plain" if predictor_batch_norm else "none",
            last_bias=False,
        )
        self.key_backbone = EMA(self.backbone)
        self.key_projector = EMA(self.projector)

    def views(self) -> tuple[View, ...]:
        return (self.view_1, self.view_2)

    def forward(self, batch: Batch, clock: Clock) -> dict[str, Tensor]:
        # Algorithm 1: queries pass through the predictor, keys do not; each is (n, dim).
        q_1, q_2 = [self.predictor(self.projector(self.backbone(x))).float() for x in batch.views]
        # Keys carry no gradient: the key encoder is the EMA of the query encoder.
        k_1, k_2 = [self.key_projector(self.key_backbone(x)).float() for x in batch.views]
        with full_precision(q_1):  # small temperatures amplify rounding errors
            # Symmetrized: each view is the query once. The other images' keys are the negatives.
            loss_1, logits = contrastive_loss(q_1, k_2, self.temperature)
            loss_2, _ = contrastive_loss(q_2, k_1, self.temperature)
        positive = distributed.own_rows(len(q_1), q_1.device)
        accuracy = 100 * (logits.argmax(dim=1) == positive).float().mean()
        return {"loss": loss_1 + loss_2, "contrastive_accuracy": accuracy, "feature_std": feature_std(k_1)}

    def after_step(self, clock: Clock) -> None:
        momentum = self.momentum(clock)
        self.key_backbone.update(self.backbone, momentum)
        self.key_projector.update(self.projector, momentum)
