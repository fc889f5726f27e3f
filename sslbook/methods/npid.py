"""NPID: every image is a class of its own, and what the network said of it when it was last seen is its classifier.

A memory bank holds one unit vector per image, and the network must find the image's own row among all others. With
a million classes the softmax over all of them is dear, so noise-contrastive estimation compares the right row with some
drawn at random; on small data the full softmax will do.

Wu, Xiong, Yu and Lin, 2018, "Unsupervised feature learning via non-parametric instance discrimination"
(arXiv:1805.01978), equations 2 and 5 to 8. Values, momentum and the partition constant, which the first batch estimates
once, are those of the authors' code; the proximal regularization of equation 9 is in the paper alone. What differs:

- The memory starts as random directions of unit length; the authors draw every value uniformly.
- Views jitter colors before some become gray, as the authors do for CIFAR-10; for ImageNet they do it the other way.
- Negatives are keyed by the image and the epoch, and logarithms take the place of the small constant that the authors
  add to the probabilities.
"""

import math

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from sslbook import distributed, rng
from sslbook.data.loader import Batch, Data
from sslbook.data.views import View
from sslbook.methods.base import Method
from sslbook.nn import MemoryBank, backbone_dim
from sslbook.schedules import Clock

VIEW = View(crop=(0.2, 1.0), grayscale=0.2, color_jitter=(0.4, 0.4, 0.4, 0.4), color_jitter_p=1.0)


def nce(log_p: Float[Tensor, "n columns"], num_images: int) -> Float[Tensor, ""]:
    """Equation 7 averaged over the batch: which of the rows is the image's own (column 0), which are noise?

    `log_p` are the logarithms of equation 4's probabilities. The noise is uniform, and for every right row there are as
    many of noise as there are further columns.
    """
    log_noise = (log_p.new_tensor(log_p.shape[1] - 1) / num_images).log()  # log(m P_n)
    odds = log_p - log_noise  # of equation 6
    return (F.softplus(-odds[:, 0]) + F.softplus(odds[:, 1:]).sum(dim=1)).mean()


def draw_negatives(index: Int[Tensor, "n"], count: int, num_images: int, clock: Clock) -> Int[Tensor, "n {count}"]:
    """Rows to compare with, uniformly from all, at random that is keyed by image and epoch."""
    u = rng.uniform(clock.seed, clock.epoch, index, rng.METHOD, count)
    return (u.double() * num_images).long()


class NPID(Method):
    """Non-parametric instance discrimination (arXiv:1805.01978).

    Args:
        backbone: the network to train.
        view: what an image becomes.
        projector_dim: width of the vectors in memory.
        temperature: divides the similarities.
        momentum: how much of itself a row of the memory keeps when its image is seen.
        num_negatives: rows drawn for noise-contrastive estimation; 0 for the softmax over all images.
    """

    def __init__(
        self,
        backbone: nn.Module,
        view: View = VIEW,
        projector_dim: int = 128,
        temperature: float = 0.07,
        momentum: float = 0.5,
        num_negatives: int = 4096,
    ) -> None:
        super().__init__()
        self.view, self.temperature, self.momentum, self.num_negatives = view, temperature, momentum, num_negatives
        self.backbone = backbone
        self.projector = nn.Linear(backbone_dim(backbone), projector_dim)
        self.memory = MemoryBank(projector_dim)
        # -inf: no batch seen yet; the softmax needs none
        self.register_buffer("log_partition", torch.tensor(-torch.inf if num_negatives else 0.0))

    log_partition: Tensor

    def views(self) -> tuple[View, ...]:
        return (self.view,)

    def setup(self, data: Data) -> None:
        self.memory.allocate(data.num_train)

    def contrast(
        self, v: Float[Tensor, "n dim"], index: Int[Tensor, "n"], clock: Clock
    ) -> tuple[Float[Tensor, ""], Float[Tensor, "n classes"], Int[Tensor, "n"]]:
        """The loss, the logits, and which of these is right."""
        rows = self.memory.rows
        if self.num_negatives == 0:  # equation 2; a copy, since the backward pass comes after rows have changed
            logits = v @ rows.clone().T / self.temperature
            return F.cross_entropy(logits, index), logits, index
        negatives = draw_negatives(index, self.num_negatives, len(rows), clock)
        compared = rows[torch.cat([index[:, None], negatives], dim=1)]
        logits = torch.einsum("nd,nkd->nk", v, compared) / self.temperature
        self.fix_partition(logits.detach())
        return nce(logits - self.log_partition, len(rows)), logits, torch.zeros_like(index)

    def fix_partition(self, logits: Float[Tensor, "n rows"]) -> None:
        """Equation 8 by the first batch: the mean exponential times the number of images, as a logarithm.

        The exponentials themselves may exceed float32: at a temperature of 0.01 they reach e^100.
        """
        log_sums = distributed.all_gather(logits.logsumexp(dim=(0, 1))[None])
        log_mean = log_sums.logsumexp(dim=0) - math.log(len(log_sums) * logits.numel())
        estimate = log_mean + math.log(len(self.memory.rows))
        self.log_partition.copy_(torch.where(self.log_partition.isfinite(), self.log_partition, estimate))

    def forward(self, batch: Batch, clock: Clock) -> dict[str, Tensor]:
        v = self.projector(self.backbone(batch.views[0]))
        with torch.autocast(v.device.type, enabled=False):  # a temperature of 0.07 magnifies rounding
            v = F.normalize(v.float(), dim=1)
            loss, logits, right = self.contrast(v, batch.index, clock)
        self.memory.update(batch.index, v.detach(), self.momentum)
        accuracy = 100 * (logits.argmax(dim=1) == right).float().mean()
        return {"loss": loss, "instance_accuracy": accuracy}
