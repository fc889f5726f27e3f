"""SimCLR: contrastive learning of two views per image against all other views of the batch (NT-Xent loss).

Each view is an anchor whose positive is the other view of the same image; the views of all other images are negatives.
A softmax over cosine similarities must select the positive, so features keep what the views share and may discard what
augmentation changes. Similarities are measured behind a projector, which is discarded after training.

Chen, Kornblith, Norouzi and Hinton, 2020, "A simple framework for contrastive learning of visual representations"
(arXiv:2002.05709), equation 1 and algorithm 1. The defaults are those of the authors' code.

What differs in the authors' code from the paper:
- The loss is the mean over images of the SUM of both views' terms, twice the paper's mean over all views.
- The projector has three layers with batch norm after each, the last without shift (paper: two layers, no batch norm).

What differs from the authors' code (google-research/simclr, be133b3):
- Images are normalized by ImageNet's mean and standard deviation; the authors leave them between 0 and 1.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from sslbook import distributed
from sslbook.data.loader import Batch
from sslbook.data.views import SIMCLR, View
from sslbook.methods.base import Method
from sslbook.nn import MLP, backbone_dim
from sslbook.nn.precision import full_precision
from sslbook.schedules import Clock
from sslbook.types import PositiveFloat, PositiveInt


def similarities(
    z_1: Float[Tensor, "n dim"], z_2: Float[Tensor, "n dim"]
) -> tuple[Float[Tensor, "n candidates"], Float[Tensor, "n candidates"]]:
    """Cosine similarities of the rows of `z_1`, then of those of `z_2`, to the views of all processes.

    The columns of each are the other views, in which row i has its positive, and then the same view of all images. The
    similarity of a row to itself is set to minus infinity: a view is not its own negative.
    """
    z = F.normalize(z_1, dim=1), F.normalize(z_2, dim=1)
    everywhere = [distributed.all_gather_with_grad(one) for one in z]
    itself, minus_infinity = distributed.rank() * len(z_1), z_1.new_full((len(z_1),), -torch.inf)
    s_12, s_21 = z[0] @ everywhere[1].T, z[1] @ everywhere[0].T
    s_11, s_22 = ((own @ them.T).diagonal_scatter(minus_infinity, itself) for own, them in zip(z, everywhere))
    return torch.cat([s_12, s_11], dim=1), torch.cat([s_21, s_22], dim=1)


def cross_entropies(
    s_1: Float[Tensor, "n candidates"], s_2: Float[Tensor, "n candidates"], temperature: float
) -> Float[Tensor, ""]:
    """Equation 1 for anchors of the first and of the second view, each averaged over its rows, added up."""
    positive = distributed.own_rows(len(s_1), s_1.device)
    return F.cross_entropy(s_1 / temperature, positive) + F.cross_entropy(s_2 / temperature, positive)


def nt_xent(z_1: Float[Tensor, "n dim"], z_2: Float[Tensor, "n dim"], temperature: float) -> Float[Tensor, ""]:
    """The normalized temperature-scaled cross-entropy (equation 1), summed over the two views of an image.

    Row i of `z_1` and row i of `z_2` are a positive pair. With several processes each passes its own rows and gets the
    mean over them, against the rows of all processes.
    """
    return cross_entropies(*similarities(z_1, z_2), temperature)


class SimCLR(Method):
    """SimCLR (arXiv:2002.05709).

    Args:
        backbone: the network to train.
        view: the augmentation of both views, sampled twice independently.
        temperature: divides the cosine similarities; the lower, the more the most similar negatives weigh.
        projector_num_layers: linear layers in the projector; 3 in the authors' code, 2 in the paper.
        projector_dim: width of the projection z, in which similarity is measured.
        projector: replaces the MLP behind the backbone.
    """

    min_images = 2

    def __init__(
        self,
        backbone: nn.Module,
        view: View = SIMCLR,
        temperature: PositiveFloat = 0.1,
        projector_num_layers: PositiveInt = 3,
        projector_dim: PositiveInt = 128,
        projector: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.view, self.temperature = view, temperature
        self.backbone = backbone
        dim = backbone_dim(backbone)
        self.projector = projector or MLP(dim, dim, projector_dim, projector_num_layers, last_batch_norm="scale")

    def views(self) -> tuple[View, ...]:
        return (self.view, self.view)

    @staticmethod
    def _measure(s_1: Float[Tensor, "n candidates"]) -> dict[str, Tensor]:
        """How often the positive is the most similar view, and the alignment and uniformity of the projections.

        Alignment and uniformity: Wang and Isola, 2020 (arXiv:2005.10242), equations 5 and 6.
        """
        positive = s_1.diagonal(offset=distributed.rank() * len(s_1))
        s_11 = s_1.chunk(2, dim=1)[1]  # -inf at a view itself adds nothing
        others = torch.exp(4 * s_11 - 4).sum() / (s_11.numel() - len(s_11))
        return {
            "contrastive_accuracy": 100 * (positive >= s_1.amax(dim=1)).float().mean(),
            "alignment": (2 - 2 * positive).mean(),
            "uniformity": distributed.all_reduce_mean(others).log(),
        }

    def forward(self, batch: Batch, clock: Clock) -> dict[str, Tensor]:
        # h = f(x), z = g(h) (section 2.1). One pass, so that batch norm's statistics are over both views.
        z = self.projector(self.backbone(torch.cat(batch.views)))  # (2n, dim)
        with full_precision(z):  # a temperature of 0.1 amplifies rounding errors tenfold
            s_1, s_2 = similarities(*z.float().chunk(2))
            loss = cross_entropies(s_1, s_2, self.temperature)
            return {"loss": loss, **self._measure(s_1.detach())}
