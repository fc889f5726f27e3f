"""SwAV: predict the cluster assignment of one crop from another crop of the same image, with online clustering.

Every crop is compared with prototypes, learned directions. The target for a crop is the assignment (code) of another
crop of the image. Sinkhorn-Knopp computes the codes so that all prototypes are equally frequent in the batch, which
rules out one prototype for all. Two large crops get codes; further small crops only predict.

Caron, Misra, Mairal, Goyal, Bojanowski and Joulin, 2020, "Unsupervised learning of visual features by contrasting
cluster assignments" (arXiv:2006.09882), equations 1 to 5, section 3.2 on multi-crop, appendix A. The defaults are those
of the authors' code (facebookresearch/swav) for 800 epochs at a batch of 4096.

What differs from the authors' code (facebookresearch/swav, 5e073db):
- The prototypes are normalized after each step instead of before the next.
- The queue holds the projections of all processes and is divided among them for Sinkhorn-Knopp, which works with
  logarithms. One process and several compute the same.
- Batch norm is over the whole global batch instead of groups of 8 GPUs.
"""

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from sslbook import distributed
from sslbook.data.loader import Batch
from sslbook.data.views import SWAV_GLOBAL, SWAV_LOCAL, View
from sslbook.errors import UserError
from sslbook.methods.base import Method
from sslbook.nn import MLP, Queue, backbone_dim
from sslbook.nn.precision import full_precision
from sslbook.nn.sinkhorn import sinkhorn
from sslbook.schedules import Clock, Duration, in_steps
from sslbook.types import PositiveFloat, PositiveInt


def swapped_prediction(
    q: Float[Tensor, "assigned n prototypes"], scores: Float[Tensor, "crops n prototypes"], temperature: float
) -> Float[Tensor, ""]:
    """Equations 1, 2 and 6: cross-entropy of each code and the prediction of every other crop, the mean over all pairs.

    Args:
        q: codes of the large crops, which come first.
        scores: cosines of all crops with the prototypes.
        temperature: divides the scores.
    """
    log_p = F.log_softmax(scores / temperature, dim=2)
    pairs = [(s, t) for s in range(len(q)) for t in range(len(scores)) if s != t]
    return torch.stack([-(q[s] * log_p[t]).sum(dim=1).mean() for s, t in pairs]).mean()


@torch.no_grad()
def prototype_perplexity(scores: Float[Tensor, "crops n prototypes"], temperature: float) -> Float[Tensor, ""]:
    """The exponential of the entropy of the mean prediction over all processes: 1 if one prototype has all crops."""
    p = distributed.all_reduce_mean(F.softmax(scores / temperature, dim=2).mean(dim=(0, 1)))
    return (-torch.xlogy(p, p).sum()).exp()


class SwAV(Method):
    """Swapping assignments between views (arXiv:2006.09882).

    Args:
        backbone: the network to train.
        view: a large crop; there are two, each with its own code.
        small_view: a small crop, which only predicts.
        num_small: number of small crops.
        hidden_dim: hidden width of the projector.
        projector_dim: width of the projections and prototypes.
        num_prototypes: number of prototypes.
        temperature: divides the scores in the prediction.
        epsilon: divides the scores in Sinkhorn-Knopp; the smaller, the harder the codes.
        sinkhorn_iterations: normalizations of columns and rows.
        freeze_prototypes: duration at the beginning in which the prototypes are frozen.
        queue_size: projections of earlier batches that help to compute the codes of a small batch; 0 for none. The
            authors take 3840 at a batch of 256.
        queue_start: duration before the queue is filled; it is used once it is full.
    """

    queued: Tensor

    def __init__(
        self,
        backbone: nn.Module,
        view: View = SWAV_GLOBAL,
        small_view: View = SWAV_LOCAL,
        num_small: int = 6,
        hidden_dim: PositiveInt = 2048,
        projector_dim: PositiveInt = 128,
        num_prototypes: PositiveInt = 3000,
        temperature: PositiveFloat = 0.1,
        epsilon: PositiveFloat = 0.05,
        sinkhorn_iterations: PositiveInt = 3,
        freeze_prototypes: Duration = "313 steps",
        queue_size: int = 0,
        queue_start: Duration = 15,
    ) -> None:
        super().__init__()
        self.view, self.small_view, self.num_small = view, small_view, num_small
        self.temperature, self.epsilon, self.sinkhorn_iterations = temperature, epsilon, sinkhorn_iterations
        self.freeze_prototypes, self.queue_start = freeze_prototypes, queue_start
        self.backbone = backbone
        self.projector = MLP(backbone_dim(backbone), hidden_dim, projector_dim)
        self.prototypes = nn.Parameter(F.normalize(torch.randn(num_prototypes, projector_dim), dim=1))
        self.queues: Any = nn.ModuleList([Queue(queue_size, projector_dim) for _ in range(2 if queue_size else 0)])
        self.register_buffer("queued", torch.zeros((), dtype=torch.int64))

    def views(self) -> tuple[View, ...]:
        return (self.view, self.view, *[self.small_view] * self.num_small)

    def project(self, views: tuple[Tensor, ...]) -> Float[Tensor, "crops n dim"]:
        """Unit vectors of all crops: one pass of the backbone for each size, one of the projector for all."""
        features = [self.backbone(torch.cat(crops)) for crops in (views[:2], views[2:]) if crops]
        z = self.projector(torch.cat(features)).float()
        return F.normalize(z, dim=1).unflatten(0, (len(views), -1))

    @torch.no_grad()
    def codes(self, z: Float[Tensor, "large n dim"]) -> Float[Tensor, "large n prototypes"]:
        """Sinkhorn assignments of the large crops (equations 3 to 5), together with the queue's rows if it is full."""
        n, rank, processes = z.shape[1], distributed.rank(), distributed.world_size()
        codes = []
        for crop, z_crop in enumerate(z):
            if self.queues and self.queued >= len(self.queues[crop].rows):
                z_crop = torch.cat([z_crop, self.queues[crop].rows[rank::processes]])
            codes.append(sinkhorn(z_crop @ self.prototypes.T, self.epsilon, self.sinkhorn_iterations)[:n])
        return torch.stack(codes)

    @torch.no_grad()
    def enqueue(self, z: Float[Tensor, "large n dim"], clock: Clock) -> None:
        """Puts the projections of the large crops into their queues, from `queue_start` on.

        Raises:
            UserError: the queues do not hold a whole number of batches.
        """
        batch, size = z.shape[1] * distributed.world_size(), len(self.queues[0].rows)
        if size % batch:
            raise UserError(
                f"a queue of {size} does not hold whole batches of {batch}: "
                f"set --method.queue_size to a multiple of {batch}, such as {max(1, size // batch) * batch}"
            )
        if clock.step >= in_steps(self.queue_start, clock.total_steps, clock.steps_per_epoch):
            for queue, z_crop in zip(self.queues, z):
                queue.push(z_crop)
            self.queued.add_(batch).clamp_(max=size)

    def forward(self, batch: Batch, clock: Clock) -> dict[str, Tensor]:
        z = self.project(batch.views)  # (crops, n, dim), large crops first
        with full_precision(z):  # a temperature of 0.05 magnifies rounding
            scores = z @ self.prototypes.T  # cosines (crops, n, prototypes)
            q = self.codes(z[:2].detach())  # targets: no gradient through Sinkhorn-Knopp
            loss = swapped_prediction(q, scores, self.temperature)  # equation 1
        if self.queues:
            self.enqueue(z[:2].detach(), clock)
        return {"loss": loss, "prototype_perplexity": prototype_perplexity(scores.detach(), self.temperature)}

    def before_optimizer_step(self, clock: Clock) -> None:
        if clock.step < in_steps(self.freeze_prototypes, clock.total_steps, clock.steps_per_epoch):
            self.prototypes.grad = None  # frozen (appendix A)

    @torch.no_grad()
    def after_step(self, clock: Clock) -> None:
        self.prototypes.copy_(F.normalize(self.prototypes, dim=1))
