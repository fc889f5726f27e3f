"""MoCo: the wrong answers of contrastive learning come from a queue of past features instead of a giant batch.

A query must find the other view of its image, its key, among tens of thousands of older keys. For old keys to remain
comparable, the encoder that makes them may change only slowly: it is a moving average of the encoder that learns. Batch
norm over small groups, shuffled between the two encoders, keeps the answer from leaking through shared statistics.

He, Fan, Wu, Xie and Girshick, 2020, "Momentum contrast for unsupervised visual representation learning" (v1,
arXiv:1911.05722), equations 1 and 2, algorithm 1; Chen, Fan, Girshick and He, 2020, "Improved baselines with momentum
contrastive learning" (v2, arXiv:2003.04297). One class holds both; the defaults are v2. Version 1 is `mlp=False,
temperature=0.07` with a view of `color_jitter=(0.4, 0.4, 0.4, 0.4), color_jitter_p=1.0` and no blur.

What differs from the authors' code:

- The moving average is taken after each optimizer step instead of before each forward pass. The keys of every step
  come out the same, since the authors' first average changes nothing (both encoders start equal); with accumulated
  gradients theirs moves several times per step, ours once.
- The groups of batch norm are a choice, `batch_norm_groups`, instead of the number of GPUs, and the order of the keys
  is keyed by image and epoch. One process and eight then compute the same.
- The queue may have any size: where a batch does not fit evenly it wraps around.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from sslbook import distributed, rng
from sslbook.data.loader import Batch
from sslbook.data.views import MOCO_V2, View
from sslbook.methods.base import Method
from sslbook.nn import EMA, MLP, BatchNorm, Queue, backbone_dim, convert_batch_norm
from sslbook.schedules import Clock


def info_nce(
    q: Float[Tensor, "n dim"], k: Float[Tensor, "n dim"], negatives: Float[Tensor, "size dim"], temperature: float
) -> tuple[Float[Tensor, ""], Float[Tensor, "n 1+size"]]:
    """Equation 1 for unit vectors: the loss, and the logits with the right answer in column 0."""
    positive = (q * k).sum(dim=1, keepdim=True)
    logits = torch.cat([positive, q @ negatives.T], dim=1) / temperature
    return F.cross_entropy(logits, torch.zeros(len(q), dtype=torch.int64, device=q.device)), logits


class MoCo(Method):
    """Momentum contrast, versions 1 and 2 (arXiv:1911.05722, arXiv:2003.04297).

    Args:
        backbone: the network to train; its batch norm becomes that of `sslbook.nn.BatchNorm`.
        view: what an image becomes, twice, each augmented independently.
        mlp: project by two layers (v2) instead of one (v1).
        projector_dim: width of queries and keys.
        temperature: divides the similarities; 0.2 in v2, 0.07 in v1.
        momentum: how much of itself the key encoder keeps at a step.
        queue_size: keys kept as wrong answers.
        batch_norm_groups: parts of the global batch that batch norm sees separately, 8 as on the authors' 8 GPUs;
            the keys are shuffled over them. With 1, all images share their statistics and nothing is shuffled.
        projector: another network between backbone and loss; it must give `projector_dim` values.
    """

    def __init__(
        self,
        backbone: nn.Module,
        view: View = MOCO_V2,
        mlp: bool = True,
        projector_dim: int = 128,
        temperature: float = 0.2,
        momentum: float = 0.999,
        queue_size: int = 65536,
        batch_norm_groups: int = 8,
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
        normalizes = any(isinstance(module, BatchNorm) for module in self.backbone.modules())
        self.shuffles = normalizes and batch_norm_groups > 1

    def views(self) -> tuple[View, ...]:
        return (self.view, self.view)

    @torch.no_grad()
    def keys(self, x: Float[Tensor, "n 3 h w"], batch: Batch, clock: Clock) -> Float[Tensor, "n dim"]:
        """The keys of this process's images, encoded among other companions than their queries were."""
        if not self.shuffles:
            return self.key_projector(self.key_backbone(x))
        n, first = len(x), distributed.rank() * len(x)
        everyone = distributed.all_gather(batch.index)
        order = rng.uniform(clock.seed, clock.epoch, everyone, rng.METHOD, 1)[:, 0].argsort(stable=True)
        x = distributed.all_gather(x)[order[first : first + n]]
        k = distributed.all_gather(self.key_projector(self.key_backbone(x)))
        return k[order.argsort()[first : first + n]]

    def forward(self, batch: Batch, clock: Clock) -> dict[str, Tensor]:
        x_q, x_k = batch.views
        q = self.projector(self.backbone(x_q))
        k = self.keys(x_k, batch, clock)
        with torch.autocast(q.device.type, enabled=False):  # a temperature of 0.07 magnifies rounding
            q, k = F.normalize(q.float(), dim=1), F.normalize(k.float(), dim=1)
            # A copy, since the backward pass needs these rows after `push` has overwritten some.
            loss, logits = info_nce(q, k, self.queue.rows.clone(), self.temperature)
        self.queue.push(k)
        accuracy = 100 * (logits.argmax(dim=1) == 0).float().mean()
        alignment = (q.detach() - k).square().sum(dim=1).mean()
        return {"loss": loss, "contrastive_accuracy": accuracy, "alignment": alignment}

    def after_step(self, clock: Clock) -> None:
        self.key_backbone.update(self.backbone, self.momentum)
        self.key_projector.update(self.projector, self.momentum)
