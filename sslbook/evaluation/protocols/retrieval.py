"""Retrieval: every test image looks for the other test images of its class, by cosine similarity of features.

The image itself is left out. Reported are mean average precision over all other images, and recall@k: how often at least
one of the k nearest is of the class, as in metric learning (Song et al., 2016, "Deep metric learning via lifted
structured feature embedding", section 5.1). An image whose class has no other test image asks nothing.

Nothing is trained. The landmarks of ROxford and RParis, with query regions and ignored images, are a protocol of their
own, `landmarks`.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from sslbook import distributed
from sslbook.data.loader import Data
from sslbook.errors import UserError, at_least_one
from sslbook.evaluation.base import Metrics, Protocol, Representation
from sslbook.evaluation.features import everywhere

QUERIES = 256  # ranked at a time


class Retrieval(Protocol):
    """mAP and recall@k of test images that look for others of their class.

    Args:
        at: the numbers k of nearest images for recall@k.
    """

    def __init__(self, at: list[int] | None = None) -> None:
        self.at = [1, 5, 10] if at is None else at
        for k in self.at:
            at_least_one(at=k)

    def run(self, model: Representation, data: Data) -> Metrics:
        test = model.features("test")
        kept = test.y >= 0
        precision, rank = leave_one_out(test.x[kept], test.y[kept], device=model.device)
        asked = rank > 0
        if not asked.any():
            raise UserError("retrieval: no class has two test images, so there is nothing to find; give more of them")
        metrics = {"mAP": 100 * precision[asked].mean().item()}
        metrics |= {f"recall@{k}": 100 * (rank[asked] <= k).double().mean().item() for k in self.at}
        model.details[self.name] = {"queries": int(asked.sum()), "gallery": int(kept.sum()) - 1}
        return metrics

    def chance(self, data: Data) -> Metrics:
        """The expectation for a random order: of average precision (Bestgen, 2015), and one minus that k all miss."""
        labels = data.labels("test")
        _, own, counts = labels[labels >= 0].unique(return_inverse=True, return_counts=True)
        others, total = (counts[own] - 1).double(), len(own) - 1
        others = others[others > 0]
        harmonic = float((1 / torch.arange(1, total + 1, dtype=torch.float64)).sum())
        gap = max(total - 1, 1)
        level = {"mAP": 100 * float(((others - 1) / gap + (total - others) * harmonic / (total * gap)).mean())}
        for k in self.at:
            drawn = torch.arange(min(k, total), dtype=torch.float64)
            misses = ((total - others[:, None] - drawn).clamp(min=0) / (total - drawn)).prod(dim=1)
            level[f"recall@{k}"] = 100 * float((1 - misses).mean())
        return level


def leave_one_out(
    x: Float[Tensor, "n dim"], y: Int[Tensor, "n"], *, device: torch.device | str | None = None
) -> tuple[Float[Tensor, "n"], Int[Tensor, "n"]]:
    """Average precision of every row's ranking of the others, and the rank, from 1, of the first with the same label.

    Both are 0 where no other row has the label. Of equally similar rows the lower index comes first. Processes divide
    the rows and each gets all results, on the CPU.
    """
    device = x.device if device is None else torch.device(device)
    z, labels = F.normalize(x.to(device).float(), dim=1), y.to(device)
    precision, first = torch.zeros(len(x), dtype=torch.float64), torch.zeros(len(x), dtype=torch.int64)
    step = QUERIES * distributed.world_size()
    for start in range(distributed.rank() * QUERIES, len(x), step):
        rows = torch.arange(start, min(start + QUERIES, len(x)), device=device)
        similarity = (z[rows] @ z.T).index_put_((torch.arange(len(rows), device=device), rows), z.new_tensor(-2.0))
        order = similarity.argsort(dim=1, descending=True, stable=True)[:, :-1]  # the image itself is last
        relevant = labels[order] == labels[rows, None]
        precision[rows.cpu()] = average_precision(relevant).cpu()
        first[rows.cpu()] = torch.where(relevant.any(1), relevant.int().argmax(1) + 1, 0).cpu()
    return everywhere(precision, device), everywhere(first, device)


def average_precision(relevant: Bool[Tensor, "queries ranks"]) -> Float[Tensor, "queries"]:
    """Mean, over the relevant items of a ranking, of the precision down to each; 0 where there is none."""
    hits = relevant.cumsum(dim=1)
    ranks = torch.arange(1, relevant.shape[1] + 1, device=relevant.device)
    total = (relevant * hits / ranks).float().sum(dim=1, dtype=torch.float64 if relevant.device.type != "mps" else None)
    return (total / hits[:, -1].clamp(min=1)).double().cpu()
