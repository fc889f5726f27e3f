"""NPID: instance discrimination, a softmax over all images whose weights are a memory bank of past features.

Every image is a class of its own. The memory bank holds a unit vector per image, and the features of an image must be
closest to the image's own vector. With a million classes the full softmax is expensive, so noise-contrastive estimation
(NCE) compares the own vector with some chosen at random; on small data sets the full softmax will do.

Wu, Xiong, Yu and Lin, 2018, "Unsupervised feature learning via non-parametric instance discrimination"
(arXiv:1805.01978), equations 2 and 5 to 8. Values, momentum and the partition constant, which is estimated once from
the first batch, are those of the authors' code; the proximal regularization of equation 9 is in the paper alone.

What differs from the authors' code (zhirongw/lemniscate.pytorch, 8051185):
- The memory bank starts as uniformly random directions; the authors sample every coordinate uniformly.
- Color jitter comes before grayscale, as in the authors' code for CIFAR-10; for ImageNet theirs has the reverse order.
- Negatives are a function of the image and the epoch, and logarithms replace the small constant that the authors add to
  the probabilities.
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
from sslbook.nn.precision import full_precision
from sslbook.schedules import Clock
from sslbook.types import PositiveFloat, PositiveInt

VIEW = View(crop=(0.2, 1.0), grayscale=0.2, color_jitter=(0.4, 0.4, 0.4, 0.4), color_jitter_p=1.0)


def nce(log_p: Float[Tensor, "n columns"], num_images: int) -> Float[Tensor, ""]:
    """Equation 7 averaged over the batch: binary classification of the positive (column 0) against noise samples.

    `log_p` are the logarithms of equation 4's probabilities. The noise distribution is uniform over the images, and
    every positive has as many noise samples as there are further columns.
    """
    log_noise = (log_p.new_tensor(log_p.shape[1] - 1) / num_images).log()  # log(m P_n)
    log_odds = log_p - log_noise  # of equation 6
    return (F.softplus(-log_odds[:, 0]) + F.softplus(log_odds[:, 1:]).sum(dim=1)).mean()


def sample_negatives(index: Int[Tensor, "n"], count: int, num_images: int, clock: Clock) -> Int[Tensor, "n {count}"]:
    """Rows of the memory bank, uniformly from all, with replacement: a function of image and epoch."""
    u = rng.uniform(clock.seed, clock.epoch, index, rng.METHOD, count)
    return (u.double() * num_images).long()


class NPID(Method):
    """Non-parametric instance discrimination (arXiv:1805.01978).

    Args:
        backbone: the network to train.
        view: augmentation of an image.
        projector_dim: width of the features in the memory bank.
        temperature: divides the cosine similarities.
        momentum: momentum of the memory bank: a row becomes momentum times itself plus the rest of the new feature.
        num_negatives: noise samples per image for noise-contrastive estimation; 0 for the softmax over all images.
    """

    log_partition: Tensor

    def __init__(
        self,
        backbone: nn.Module,
        view: View = VIEW,
        projector_dim: PositiveInt = 128,
        temperature: PositiveFloat = 0.07,
        momentum: float = 0.5,
        num_negatives: int = 4096,
    ) -> None:
        super().__init__()
        self.view, self.temperature, self.momentum, self.num_negatives = view, temperature, momentum, num_negatives
        self.backbone = backbone
        self.projector = nn.Linear(backbone_dim(backbone), projector_dim)
        self.memory = MemoryBank(projector_dim)
        # log Z; -inf until the first batch has estimated it. The full softmax needs none.
        self.register_buffer("log_partition", torch.tensor(-torch.inf if num_negatives else 0.0))

    def views(self) -> tuple[View, ...]:
        return (self.view,)

    def setup(self, data: Data) -> None:
        self.memory.allocate(data.num_train)

    def contrast(
        self, v: Float[Tensor, "n dim"], index: Int[Tensor, "n"], clock: Clock
    ) -> tuple[Float[Tensor, ""], Float[Tensor, "n classes"], Int[Tensor, "n"]]:
        """The loss, the logits, and the column of each row's positive."""
        rows = self.memory.rows
        if self.num_negatives == 0:  # equation 2; a copy, since the backward pass comes after rows have changed
            logits = v @ rows.clone().T / self.temperature
            return F.cross_entropy(logits, index), logits, index
        negatives = sample_negatives(index, self.num_negatives, len(rows), clock)
        compared = rows[torch.cat([index[:, None], negatives], dim=1)]  # (n, 1 + negatives, dim)
        logits = torch.einsum("nd,nkd->nk", v, compared) / self.temperature
        self.estimate_partition(logits.detach())
        return nce(logits - self.log_partition, len(rows)), logits, torch.zeros_like(index)

    def estimate_partition(self, logits: Float[Tensor, "n rows"]) -> None:
        """Equation 8 from the first batch of all processes: Z is the mean exponential times the number of images.

        In logarithms, since the exponentials may exceed float32: at a temperature of 0.01 they reach e^100.
        """
        log_sums = distributed.all_gather(logits.logsumexp(dim=(0, 1))[None])
        log_mean = log_sums.logsumexp(dim=0) - math.log(len(log_sums) * logits.numel())
        estimate = log_mean + math.log(len(self.memory.rows))
        self.log_partition.copy_(torch.where(self.log_partition.isfinite(), self.log_partition, estimate))

    def forward(self, batch: Batch, clock: Clock) -> dict[str, Tensor]:
        v = self.projector(self.backbone(batch.views[0]))  # (n, dim)
        with full_precision(v):  # a temperature of 0.07 amplifies rounding errors
            v = F.normalize(v.float(), dim=1)  # section 3.1: features on the unit sphere
            loss, logits, positive = self.contrast(v, batch.index, clock)
        # Detached: the memory bank is a constant for the next steps, no gradient reaches past features.
        self.memory.update(batch.index, v.detach(), self.momentum)
        accuracy = 100 * (logits.argmax(dim=1) == positive).float().mean()
        return {"loss": loss, "instance_accuracy": accuracy}
