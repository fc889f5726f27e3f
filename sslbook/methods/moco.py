"""MoCo: contrastive learning against a queue of past keys, encoded by a momentum encoder.

The query (one view of an image) must match its key (the other view) among tens of thousands of keys of earlier batches,
the negatives. To keep old keys comparable, their encoder changes slowly: its weights are an exponential moving average
of the query encoder's. Shuffling batch norm keeps query and key from being matched by the statistics of their batch.

He, Fan, Wu, Xie and Girshick, 2020, "Momentum contrast for unsupervised visual representation learning" (v1,
arXiv:1911.05722), equations 1 and 2, algorithm 1; Chen, Fan, Girshick and He, 2020, "Improved baselines with momentum
contrastive learning" (v2, arXiv:2003.04297). One class holds both; the defaults are v2. Version 1 is `mlp=False,
temperature=0.07` with a view of `color_jitter=(0.4, 0.4, 0.4, 0.4), color_jitter_p=1.0` and no blur.

What differs from the authors' code (facebookresearch/moco, 3b42c2a):
- The key encoder is updated after each optimizer step instead of before each forward pass. The keys of every step come
  out the same, since the authors' first update changes nothing (both encoders start equal). With accumulated gradients
  theirs is updated several times per step, ours once.
- The groups of batch norm are an option, `batch_norm_groups`, instead of the number of GPUs, and the permutation of the
  keys is a function of image and epoch. One process and eight then compute the same.
- The queue may have any size: where a batch does not fit evenly it wraps around.
- The recipes' cosine schedule moves the learning rate at every step; v2's code moves it once per epoch.
- Version 1 makes images gray before it jitters their colors; here color jitter comes first in both versions.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from sslbook.data.loader import Batch
from sslbook.data.views import MOCO_V2, View
from sslbook.methods.base import Method
from sslbook.nn import EMA, MLP, Queue, backbone_dim, convert_batch_norm
from sslbook.nn.precision import full_precision
from sslbook.nn.shuffle import encode_shuffled, needs_shuffling
from sslbook.schedules import Clock
from sslbook.types import PositiveFloat, PositiveInt


def info_nce(
    q: Float[Tensor, "n dim"], k: Float[Tensor, "n dim"], negatives: Float[Tensor, "size dim"], temperature: float
) -> tuple[Float[Tensor, ""], Float[Tensor, "n 1+size"]]:
    """Equation 1 for unit vectors: the loss, and the logits with the positive in column 0."""
    positive = (q * k).sum(dim=1, keepdim=True)
    logits = torch.cat([positive, q @ negatives.T], dim=1) / temperature
    return F.cross_entropy(logits, torch.zeros(len(q), dtype=torch.int64, device=q.device)), logits


class MoCo(Method):
    """Momentum contrast, versions 1 and 2 (arXiv:1911.05722, arXiv:2003.04297).

    Args:
        backbone: the network to train; its batch norm becomes that of `sslbook.nn.BatchNorm`.
        view: the augmentation of both views, sampled twice independently.
        mlp: project by an MLP of two layers (v2) instead of a linear layer (v1).
        projector_dim: width of queries and keys.
        temperature: divides the cosine similarities; 0.2 in v2, 0.07 in v1.
        momentum: EMA momentum m of the key encoder.
        queue_size: keys in the queue, the negatives.
        batch_norm_groups: groups of the global batch that batch norm normalizes separately, 8 for the authors' 8 GPUs;
            the keys are shuffled over them. With 1, all images share their statistics and nothing is shuffled.
        projector: replaces the MLP behind the backbone; its output must have `projector_dim` values.
    """

    def __init__(
        self,
        backbone: nn.Module,
        view: View = MOCO_V2,
        mlp: bool = True,
        projector_dim: PositiveInt = 128,
        temperature: PositiveFloat = 0.2,
        momentum: float = 0.999,
        queue_size: PositiveInt = 65536,
        batch_norm_groups: PositiveInt = 8,
        projector: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.view, self.temperature, self.momentum = view, temperature, momentum
        self.backbone = convert_batch_norm(backbone, batch_norm_groups)
        dim = backbone_dim(backbone)
        self.projector = projector or MLP(dim, dim, projector_dim, num_layers=2 if mlp else 1, batch_norm=False)
        self.key_backbone = EMA(self.backbone)
        self.key_projector = EMA(self.projector)
        self.queue = Queue(queue_size, projector_dim)
        self.shuffles = needs_shuffling(self.backbone, batch_norm_groups)

    def views(self) -> tuple[View, ...]:
        return (self.view, self.view)

    def keys(self, x: Float[Tensor, "n channels h w"], batch: Batch, clock: Clock) -> Float[Tensor, "n dim"]:
        """Outputs of the key encoder, by shuffling batch norm (v1, section 3.3)."""
        encoder = nn.Sequential(self.key_backbone, self.key_projector)
        return encode_shuffled(encoder, x, batch.index, clock) if self.shuffles else encoder(x)

    def forward(self, batch: Batch, clock: Clock) -> dict[str, Tensor]:
        x_q, x_k = batch.views
        q = self.projector(self.backbone(x_q))  # queries, (n, dim)
        k = self.keys(x_k, batch, clock)  # keys without gradient: the encoder follows by its EMA alone, (n, dim)
        with full_precision(q):  # a temperature of 0.07 amplifies rounding errors
            q, k = F.normalize(q.float(), dim=1), F.normalize(k.float(), dim=1)
            # Equation 1. The queue is copied, since the backward pass comes after `push` has overwritten rows.
            loss, logits = info_nce(q, k, self.queue.rows.clone(), self.temperature)
        self.queue.push(k)  # algorithm 1: enqueue this batch's keys, dequeue the oldest
        accuracy = 100 * (logits.argmax(dim=1) == 0).float().mean()
        alignment = (q.detach() - k).square().sum(dim=1).mean()
        return {"loss": loss, "contrastive_accuracy": accuracy, "alignment": alignment}

    def after_step(self, clock: Clock) -> None:
        self.key_backbone.update(self.backbone, self.momentum)  # equation 2
        self.key_projector.update(self.projector, self.momentum)
