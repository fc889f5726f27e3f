"""DenseCL: MoCo for every place of the feature map, so that a network also knows where it sees what.

Beside MoCo's loss for whole images, each place of one view must find its counterpart in the other view among past
images' features. Which places correspond is not told but taken from the backbone: the counterpart is the place of the
other view whose features are the most similar.

Wang, Zhang, Shen, Kong and Li, 2021, "Dense contrastive learning for self-supervised visual pre-training"
(arXiv:2011.09157), equations 1 to 4, section 3. The defaults are those of the authors' code. As there, the second queue
takes one vector per image, the mean of its dense keys, and correspondence is sought from every place of the query.

What differs from the authors' code: the moving average is taken after each optimizer step instead of before each forward
pass, and batch norm's groups and the shuffling of the keys over them are a choice instead of the number of GPUs, keyed
by image and epoch, as in our MoCo. OpenMMLab's port leaves the dense loss out of the first 1,000 iterations; the
authors do not.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from sslbook import distributed, rng
from sslbook.data.loader import Batch
from sslbook.data.views import MOCO_V2, View
from sslbook.errors import UserError
from sslbook.methods.base import Method
from sslbook.nn import EMA, MLP, BatchNorm, Queue, backbone_dim, convert_batch_norm
from sslbook.nn.vit import VisionTransformer
from sslbook.schedules import Clock


def info_nce(
    q: Float[Tensor, "n dim"], k: Float[Tensor, "n dim"], negatives: Float[Tensor, "size dim"], temperature: float
) -> tuple[Float[Tensor, ""], Float[Tensor, "n 1+size"]]:
    """Equations 1 and 2 for unit vectors: the loss, and the logits with the right answer in column 0."""
    positive = (q * k).sum(dim=1, keepdim=True)
    logits = torch.cat([positive, q @ negatives.T], dim=1) / temperature
    return F.cross_entropy(logits, torch.zeros(len(q), dtype=torch.int64, device=q.device)), logits


def correspondence(f_q: Float[Tensor, "n places dim"], f_k: Float[Tensor, "n places dim"]) -> Int[Tensor, "n places"]:
    """Equation 4: for every place of the query the place of the key whose features have the greatest cosine to it."""
    return (F.normalize(f_q, dim=2) @ F.normalize(f_k, dim=2).mT).argmax(dim=2)


def feature_map(
    backbone: nn.Module, x: Float[Tensor, "n 3 h w"]
) -> tuple[Float[Tensor, "n dim"], Float[Tensor, "n places dim"]]:
    """An image's features as a whole and at every place, from one pass through the backbone."""
    if isinstance(backbone, VisionTransformer):
        tokens = backbone.encode(backbone.embed(x))
        return (tokens[:, 0] if backbone.pool == "cls" else tokens[:, 1:].mean(dim=1)), tokens[:, 1:]
    places = backbone.forward_map(x).flatten(2).mT  # pyrefly: ignore[not-callable]
    return places.mean(dim=1), places


class DenseCL(Method):
    """Dense contrastive learning (arXiv:2011.09157).

    Args:
        backbone: the network to train, one with a feature map (ResNet, ConvNet) or a vision transformer; its batch norm
            becomes that of `sslbook.nn.BatchNorm`.
        view: what an image becomes, twice, each augmented independently.
        projector_dim: width of queries and keys.
        dense_weight: weight of the dense loss; the loss of whole images has the rest.
        temperature: divides the similarities.
        momentum: how much of itself the key encoder keeps at a step.
        queue_size: keys kept as wrong answers, in each of the two queues.
        batch_norm_groups: parts of the global batch that batch norm sees separately, 8 as on the authors' 8 GPUs;
            the keys are shuffled over them. With 1, all images share their statistics and nothing is shuffled.
    """

    def __init__(
        self,
        backbone: nn.Module,
        view: View = MOCO_V2,
        projector_dim: int = 128,
        dense_weight: float = 0.5,
        temperature: float = 0.2,
        momentum: float = 0.999,
        queue_size: int = 65536,
        batch_norm_groups: int = 8,
    ) -> None:
        super().__init__()
        if not (isinstance(backbone, VisionTransformer) or hasattr(backbone, "forward_map")):
            raise UserError(
                f"DenseCL needs features of every place and cannot use a {type(backbone).__name__}: choose "
                "sslbook.nn.ResNet, ConvNet or VisionTransformer, or give it a method `forward_map`"
            )
        self.view, self.dense_weight = view, dense_weight
        self.temperature, self.momentum = temperature, momentum
        self.backbone = convert_batch_norm(backbone, batch_norm_groups)
        dim = backbone_dim(backbone)
        self.projector = MLP(dim, dim, projector_dim, batch_norm=False)
        self.dense_projector = MLP(dim, dim, projector_dim, batch_norm=False)  # the authors' 1x1 convolutions
        self.key_backbone = EMA(self.backbone)
        self.key_projector = EMA(self.projector)
        self.key_dense_projector = EMA(self.dense_projector)
        self.queue = Queue(queue_size, projector_dim)
        self.dense_queue = Queue(queue_size, projector_dim)
        normalizes = any(isinstance(module, BatchNorm) for module in self.backbone.modules())
        self.shuffles = normalizes and batch_norm_groups > 1

    def views(self) -> tuple[View, ...]:
        return (self.view, self.view)

    @torch.no_grad()
    def key_features(
        self, x: Float[Tensor, "n 3 h w"], batch: Batch, clock: Clock
    ) -> tuple[Float[Tensor, "n dim"], Float[Tensor, "n places dim"]]:
        """What the key backbone makes of this process's images, among other companions than their queries had."""
        if not self.shuffles:
            return feature_map(self.key_backbone.module, x)
        n, first = len(x), distributed.rank() * len(x)
        everyone = distributed.all_gather(batch.index)
        order = rng.uniform(clock.seed, clock.epoch, everyone, rng.METHOD, 1)[:, 0].argsort(stable=True)
        x = distributed.all_gather(x)[order[first : first + n]]
        back = order.argsort()[first : first + n]
        whole, places = feature_map(self.key_backbone.module, x)
        return distributed.all_gather(whole)[back], distributed.all_gather(places)[back]

    def forward(self, batch: Batch, clock: Clock) -> dict[str, Tensor]:
        x_q, x_k = batch.views
        f_q, map_q = feature_map(self.backbone, x_q)
        f_k, map_k = self.key_features(x_k, batch, clock)
        q, dense_q = self.projector(f_q), self.dense_projector(map_q)
        k, dense_k = self.key_projector(f_k), self.key_dense_projector(map_k)
        with torch.autocast(q.device.type, enabled=False):  # a temperature of 0.2 magnifies rounding
            q, k = F.normalize(q.float(), dim=1), F.normalize(k.float(), dim=1)
            pooled_k = F.normalize(dense_k.float().mean(dim=1), dim=1)
            dense_q, dense_k = F.normalize(dense_q.float(), dim=2), F.normalize(dense_k.float(), dim=2)
            match = correspondence(map_q.detach().float(), map_k.float())
            matched_k = dense_k.gather(1, match[:, :, None].expand_as(dense_k))
            # Copies, since the backward pass needs these rows after `push` has overwritten some.
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
        self.key_backbone.update(self.backbone, self.momentum)
        self.key_projector.update(self.projector, self.momentum)
        self.key_dense_projector.update(self.dense_projector, self.momentum)
