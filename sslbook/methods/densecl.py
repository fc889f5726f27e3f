"""DenseCL: MoCo's contrastive loss for whole images and for matched local features of two views.

Besides MoCo's loss on global features, the local features at each position of one view must match their counterpart in
the other view, among a queue of past features. No ground truth gives the correspondence. It comes from the backbone:
the counterpart is the position of the other view whose features are the most similar.

Wang, Zhang, Shen, Kong and Li, 2021, "Dense contrastive learning for self-supervised visual pre-training"
(arXiv:2011.09157), equations 1 to 4, section 3. The defaults are those of the authors' code. As there, the second queue
receives one vector per image, the mean of its dense keys, and each position of the query is matched to one of the key.

What differs from the authors' code (WXinlong/DenseCL, 5d1c456):
- The key encoder is updated after each optimizer step instead of before each forward pass.
- Batch norm's groups, over which keys are shuffled, are an option instead of the number of GPUs, and the permutation is
  a function of image and epoch, as in our MoCo.
- OpenMMLab's port leaves the dense loss out of the first 1,000 iterations; the authors' code and ours do not.
- Any backbone with a feature map will do, a vision transformer too. Its global features are the mean of the map, so a
  class token is trained by attention alone: choose a transformer with `pool: mean`.
- The recipes' cosine schedule moves the learning rate at every step instead of once per epoch.
"""

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from sslbook.data.loader import Batch
from sslbook.data.views import MOCO_V2, View
from sslbook.methods.moco import MoCo, info_nce
from sslbook.nn import EMA, MLP, Queue, backbone_dim
from sslbook.nn.backbones import require
from sslbook.nn.feature_map import feature_map
from sslbook.nn.precision import full_precision
from sslbook.nn.shuffle import encode_shuffled
from sslbook.schedules import Clock
from sslbook.types import PositiveInt


def correspondence(f_q: Float[Tensor, "n s dim"], f_k: Float[Tensor, "n s dim"]) -> Int[Tensor, "n s"]:
    """Equation 4: for every position of the query the position of the key with the greatest cosine similarity."""
    return (F.normalize(f_q, dim=2) @ F.normalize(f_k, dim=2).mT).argmax(dim=2)


def local_features(backbone: nn.Module, x: Float[Tensor, "n channels h w"]) -> Float[Tensor, "n s dim"]:
    """The backbone's feature map, flattened to its S^2 positions; their mean is the global feature."""
    return feature_map(backbone, x).flatten(2).mT


class DenseCL(MoCo):
    """Dense contrastive learning (arXiv:2011.09157): MoCo v2 with a second head, queue and loss for local features.

    Args:
        backbone: the network to train, with a feature map; its batch norm becomes that of `sslbook.nn.BatchNorm`.
        view: the augmentation of both views, sampled twice independently.
        projector_dim: width of queries and keys, global and dense.
        dense_weight: weight lambda of the dense loss; the global loss has weight 1 - lambda.
        queue_size: keys in each of the two queues, the negatives.
        moco_options: the other options of MoCo.

    Raises:
        UserError: the backbone has no feature map.
    """

    def __init__(
        self,
        backbone: nn.Module,
        view: View = MOCO_V2,
        projector_dim: PositiveInt = 128,
        dense_weight: float = 0.5,
        queue_size: PositiveInt = 65536,
        **moco_options: Any,
    ) -> None:
        require(backbone, "forward_map", "DenseCL")
        super().__init__(backbone, view, projector_dim=projector_dim, queue_size=queue_size, **moco_options)
        self.dense_weight = dense_weight
        dim = backbone_dim(backbone)
        self.dense_projector = MLP(dim, dim, projector_dim, batch_norm=False)  # the authors' 1x1 convolutions
        self.key_dense_projector = EMA(self.dense_projector)
        self.dense_queue = Queue(queue_size, projector_dim)

    @torch.no_grad()
    def key_features(self, x: Float[Tensor, "n channels h w"], batch: Batch, clock: Clock) -> Float[Tensor, "n s dim"]:
        """Local features of the key backbone, by shuffling batch norm."""
        encoder = partial(local_features, self.key_backbone.module)
        return encode_shuffled(encoder, x, batch.index, clock) if self.shuffles else encoder(x)

    def forward(self, batch: Batch, clock: Clock) -> dict[str, Tensor]:
        x_q, x_k = batch.views
        f_q = local_features(self.backbone, x_q)  # (n, s, dim)
        f_k = self.key_features(x_k, batch, clock)  # without gradient, as are all keys
        # Two heads: one for the global feature, one shared by all positions (section 3.2).
        q, dense_q = self.projector(f_q.mean(dim=1)), self.dense_projector(f_q)
        k, dense_k = self.key_projector(f_k.mean(dim=1)), self.key_dense_projector(f_k)
        with full_precision(q):  # a temperature of 0.2 amplifies rounding errors
            q, k = F.normalize(q.float(), dim=1), F.normalize(k.float(), dim=1)
            pooled_k = F.normalize(dense_k.float().mean(dim=1), dim=1)
            dense_q, dense_k = F.normalize(dense_q.float(), dim=2), F.normalize(dense_k.float(), dim=2)
            # Equation 4, from the backbones' features. Detached: an argmax has no gradient.
            match = correspondence(f_q.detach().float(), f_k.float())
            matched_k = dense_k.gather(1, match[:, :, None].expand_as(dense_k))  # (n, s, dim)
            # Equations 1 and 2. The queues are copied, since the backward pass comes after `push` has overwritten rows.
            loss, logits = info_nce(q, k, self.queue.rows.clone(), self.temperature)
            dense_loss, dense_logits = info_nce(
                dense_q.flatten(0, 1), matched_k.flatten(0, 1), self.dense_queue.rows.clone(), self.temperature
            )
        self.queue.push(k)
        self.dense_queue.push(pooled_k)
        return {
            "loss": (1 - self.dense_weight) * loss + self.dense_weight * dense_loss,  # equation 3
            "contrastive_accuracy": 100 * (logits.argmax(dim=1) == 0).float().mean(),
            "dense_accuracy": 100 * (dense_logits.argmax(dim=1) == 0).float().mean(),
        }

    def after_step(self, clock: Clock) -> None:
        super().after_step(clock)
        self.key_dense_projector.update(self.dense_projector, self.momentum)
