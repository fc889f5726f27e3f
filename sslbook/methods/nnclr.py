"""NNCLR: the right answer is not the other view of the image but that view's nearest neighbor among past images.

Augmentation can only produce the variations somebody thought of; two images of the same kind differ in more. So the
projection of one view looks up its nearest neighbor in a queue, and the other view must find this neighbor among those
of the whole batch, by a softmax over similarities as in SimCLR, behind a predictor.

Dwibedi, Aytar, Tompson, Sermanet and Zisserman, 2021, "With a little help from my friends: nearest-neighbor contrastive
learning of visual representations" (arXiv:2104.14548), equation 3, algorithm 1. The defaults are the paper's; the
authors published no code. The loss is algorithm 1's: each neighbor looks for its own view among the batch's predictions,
averaged over the two ways to pair the views, and the queue takes the projections of the first view.
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
from sslbook.schedules import Clock


@torch.no_grad()
def nearest_neighbors(z: Float[Tensor, "n dim"], support: Float[Tensor, "size dim"]) -> Float[Tensor, "n dim"]:
    """Equation 4: for every row of `z` the most similar row of the support set; all are unit vectors."""
    return support[(z @ support.T).argmax(dim=1)]


def info_nce(
    neighbors: Float[Tensor, "n dim"], p: Float[Tensor, "n dim"], temperature: float
) -> tuple[Float[Tensor, ""], Float[Tensor, "n all"]]:
    """Equation 3 for unit vectors: each neighbor's own view among the predictions of all processes; and the logits."""
    logits = neighbors @ distributed.all_gather_with_grad(p).T / temperature
    own = distributed.rank() * len(p) + torch.arange(len(p), device=p.device)
    return F.cross_entropy(logits, own), logits


class NNCLR(Method):
    """Nearest-neighbor contrastive learning (arXiv:2104.14548).

    Args:
        backbone: the network to train.
        view_1: what an image becomes at first.
        view_2: what it becomes the second time.
        hidden_dim: hidden width of the projector.
        projector_dim: width of the projection, in which neighbors are sought.
        predictor_dim: hidden width of the predictor.
        temperature: divides the similarities.
        queue_size: past projections among which neighbors are sought.
        projector: another network behind the backbone; it must give `projector_dim` values.
        predictor: another network from one projection to the other.
    """

    def __init__(
        self,
        backbone: nn.Module,
        view_1: View = BYOL_1,
        view_2: View = BYOL_2,
        hidden_dim: int = 2048,
        projector_dim: int = 256,
        predictor_dim: int = 4096,
        temperature: float = 0.1,
        queue_size: int = 98304,
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

    def answer(self, z: Float[Tensor, "n dim"]) -> Float[Tensor, "n dim"]:
        """What the other view must find."""
        return nearest_neighbors(z, self.queue.rows)

    def forward(self, batch: Batch, clock: Clock) -> dict[str, Tensor]:
        z_1, z_2 = [self.projector(self.backbone(x)) for x in batch.views]
        p_1, p_2 = self.predictor(z_1), self.predictor(z_2)
        with torch.autocast(z_1.device.type, enabled=False):  # a temperature of 0.1 magnifies rounding tenfold
            z_1, z_2, p_1, p_2 = [F.normalize(x.float(), dim=1) for x in (z_1, z_2, p_1, p_2)]
            n_1, n_2 = self.answer(z_1), self.answer(z_2)
            loss_1, logits = info_nce(n_1, p_2, self.temperature)
            loss_2, _ = info_nce(n_2, p_1, self.temperature)
        self.queue.push(z_1)
        own = distributed.rank() * len(z_1) + torch.arange(len(z_1), device=z_1.device)
        return {
            "loss": (loss_1 + loss_2) / 2,
            "contrastive_accuracy": 100 * (logits.argmax(dim=1) == own).float().mean(),
            "neighbor_similarity": (z_1 * n_1).sum(dim=1).mean().detach(),
        }
