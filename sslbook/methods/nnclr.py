"""NNCLR: contrastive learning whose positive is the other view's nearest neighbor in a queue of past features.

Augmentation can only produce the variations that its designer thought of; two images of the same class differ in more.
So the projection of one view is replaced by its nearest neighbor among past projections. The prediction of the other
view must match this neighbor, by a softmax over the similarities of the batch as in SimCLR.

Dwibedi, Aytar, Tompson, Sermanet and Zisserman, 2021, "With a little help from my friends: nearest-neighbor contrastive
learning of visual representations" (arXiv:2104.14548), equations 3 and 4, algorithm 1. The defaults are the paper's;
its authors published no code.

What the paper leaves open:

- The loss is algorithm 1's: each neighbor is compared with the predictions of the whole batch, and the two ways to pair
  the views are averaged.
- The queue receives the projections of the first view.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from sslbook import distributed
from sslbook.data.loader import Batch
from sslbook.data.views import BYOL_1, BYOL_2, View
from sslbook.methods.base import Method
from sslbook.nn import MLP, Queue, backbone_dim
from sslbook.nn.precision import full_precision
from sslbook.schedules import Clock
from sslbook.types import PositiveFloat, PositiveInt


@torch.no_grad()
def nearest_neighbors(z: Float[Tensor, "n dim"], support: Float[Tensor, "size dim"]) -> Float[Tensor, "n dim"]:
    """Equation 4: for every row of `z` the most similar row of the support set; all are unit vectors."""
    return support[(z @ support.T).argmax(dim=1)]


def info_nce(
    neighbors: Float[Tensor, "n dim"], p: Float[Tensor, "n dim"], temperature: float
) -> tuple[Float[Tensor, ""], Float[Tensor, "n all"]]:
    """Equation 3 for unit vectors, with the predictions of all processes as candidates; and the logits."""
    logits = neighbors @ distributed.all_gather_with_grad(p).T / temperature
    return F.cross_entropy(logits, distributed.own_rows(len(p), p.device)), logits


class NNCLR(Method):
    """Nearest-neighbor contrastive learning (arXiv:2104.14548).

    Args:
        backbone: the network to train.
        view_1: augmentation of the first view.
        view_2: augmentation of the second view.
        hidden_dim: hidden width of the projector.
        projector_dim: width of the projection, in which neighbors are searched.
        predictor_dim: hidden width of the predictor.
        temperature: divides the cosine similarities.
        queue_size: past projections in the queue, the paper's support set.
        projector: replaces the MLP behind the backbone; its output must have `projector_dim` values.
        predictor: replaces the MLP from projections to predictions.
    """

    min_images = 2

    def __init__(
        self,
        backbone: nn.Module,
        view_1: View = BYOL_1,
        view_2: View = BYOL_2,
        hidden_dim: PositiveInt = 2048,
        projector_dim: PositiveInt = 256,
        predictor_dim: PositiveInt = 4096,
        temperature: PositiveFloat = 0.1,
        queue_size: PositiveInt = 98304,
        projector: nn.Module | None = None,
        predictor: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.view_1, self.view_2, self.temperature = view_1, view_2, temperature
        self.backbone = backbone
        dim = backbone_dim(backbone)
        self.projector = projector or MLP(dim, hidden_dim, projector_dim, num_layers=3, last_batch_norm="affine")
        self.predictor = predictor or MLP(projector_dim, predictor_dim, projector_dim)
        self.queue = Queue(queue_size, projector_dim)

    def views(self) -> tuple[View, ...]:
        return (self.view_1, self.view_2)

    def positives(self, z: Float[Tensor, "n dim"]) -> Float[Tensor, "n dim"]:
        """What replaces each projection as the positive of the other view: its nearest neighbor in the queue."""
        return nearest_neighbors(z, self.queue.rows)

    def forward(self, batch: Batch, clock: Clock) -> dict[str, Tensor]:
        z_1, z_2 = [self.projector(self.backbone(x)) for x in batch.views]  # projections, (n, dim)
        p_1, p_2 = self.predictor(z_1), self.predictor(z_2)  # predictions, (n, dim)
        with full_precision(z_1):  # a temperature of 0.1 amplifies rounding errors tenfold
            z_1, z_2, p_1, p_2 = [F.normalize(x.float(), dim=1) for x in (z_1, z_2, p_1, p_2)]
            # Neighbors carry no gradient: they are past features. It flows through the predictions alone.
            n_1, n_2 = self.positives(z_1), self.positives(z_2)
            loss_1, logits = info_nce(n_1, p_2, self.temperature)  # equation 3, symmetrized
            loss_2, _ = info_nce(n_2, p_1, self.temperature)
        self.queue.push(z_1)  # after the search, so that no view finds itself
        own = distributed.own_rows(len(z_1), z_1.device)
        return {
            "loss": (loss_1 + loss_2) / 2,
            "contrastive_accuracy": 100 * (logits.argmax(dim=1) == own).float().mean(),
            "neighbor_similarity": (z_1 * n_1).sum(dim=1).mean().detach(),
        }
