"""Weighted k-nearest-neighbor classification on frozen features: no training, nothing to tune.

The k nearest training images of a test image (cosine similarity s) vote for their labels with weight exp(s / T).
Protocol of Wu et al. (2018, "Unsupervised feature learning via non-parametric instance discrimination", section 3.4),
with k = 20 as in Caron et al. (2021, "Emerging properties in self-supervised vision transformers", section 4) and
T = 0.07 in both.

The search is exact and its memory bounded: training features (the bank) and test features (the queries) are compared
chunk by chunk, and of each comparison only the k best are kept.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from sslbook.data.loader import Data
from sslbook.errors import UserError, at_least_one
from sslbook.evaluation.base import Metrics, Protocol, Representation


class KNN(Protocol):
    """Accuracy of weighted k-nearest-neighbor classification.

    Args:
        k: neighbors that vote.
        temperature: of the votes exp(similarity / temperature); lower gives the nearest more weight.
    """

    def __init__(self, k: int = 20, temperature: float = 0.07) -> None:
        at_least_one(k=k)
        if not temperature > 0:
            raise UserError(f"temperature is {temperature}: give more than 0")
        self.k, self.temperature = k, temperature

    def run(self, model: Representation, data: Data) -> Metrics:
        return {"kNN": accuracy(*model.labeled(), self.k, self.temperature, device=model.device)}

    def chance(self, data: Data) -> Metrics:
        return {"kNN": majority(data.labels("train"), data.labels("test"))}


def neighbors(
    train_x: Float[Tensor, "train dim"],
    test_x: Float[Tensor, "test dim"],
    k: int = 20,
    *,
    query_chunk: int = 1024,
    bank_chunk: int = 8192,
    device: torch.device | str | None = None,
) -> tuple[Float[Tensor, "test k"], Int[Tensor, "test k"]]:
    """Cosine similarities and indices of the k nearest training features of every test feature, nearest first.

    Of equally similar ones the lower index comes first, on every device. With fewer than k training features all are
    returned. The results are on the CPU.

    Args:
        train_x: the bank, not empty.
        test_x: the queries.
        k: how many neighbors.
        query_chunk: queries compared at a time.
        bank_chunk: bank entries compared at a time.
        device: where to compute; by default where `test_x` is.
    """
    device = test_x.device if device is None else torch.device(device)
    k = min(k, len(train_x))
    values = torch.empty(len(test_x), 0, device=device)
    indices = torch.empty(len(test_x), 0, dtype=torch.int64, device=device)
    with torch.no_grad(), torch.autocast(device.type, enabled=False):
        for start in range(0, len(train_x), bank_chunk):  # the bank outside: it is the larger, and is moved only once
            bank = _normalized(train_x[start : start + bank_chunk], device)
            kept = []
            for first in range(0, len(test_x), query_chunk):
                rows = slice(first, first + query_chunk)
                new_values, columns = _largest(_normalized(test_x[rows], device) @ bank.T, k)
                # Earlier chunks stand first, so that a stable sort keeps the lower index of equals in front.
                merged = torch.cat([values[rows], new_values], dim=1)
                best, order = merged.sort(dim=1, descending=True, stable=True)
                index = torch.cat([indices[rows], start + columns], dim=1).gather(1, order)
                kept.append((best[:, :k], index[:, :k]))
            if kept:
                values, indices = (torch.cat(parts) for parts in zip(*kept))
    return values.cpu(), indices.cpu()


def predict(
    train_x: Float[Tensor, "train dim"],
    train_y: Int[Tensor, "train"],
    test_x: Float[Tensor, "test dim"],
    k: int = 20,
    temperature: float = 0.07,
    *,
    device: torch.device | str | None = None,
) -> Int[Tensor, "test"]:
    """The label with the largest sum of votes; the lower label where votes are equal."""
    similarities, indices = neighbors(train_x, test_x, k, device=device)
    classes, train_y = train_y.cpu().unique(return_inverse=True)
    # Only ratios of votes matter; relative to the nearest neighbor, no temperature overflows.
    votes = ((similarities - similarities[:, :1]).double() / temperature).exp()
    predicted = []
    for vote, index in zip(votes.split(4096), indices.split(4096)):  # classes may be many: bound the table of votes
        table = torch.zeros(len(vote), len(classes), dtype=torch.float64)
        predicted.append(table.scatter_add_(1, train_y[index], vote).argmax(dim=1))
    return classes[torch.cat(predicted)]


def accuracy(
    train_x: Float[Tensor, "train dim"],
    train_y: Int[Tensor, "train"],
    test_x: Float[Tensor, "test dim"],
    test_y: Int[Tensor, "test"],
    k: int = 20,
    temperature: float = 0.07,
    *,
    device: torch.device | str | None = None,
) -> float:
    """Percentage of test images that are classified correctly.

    Raises:
        UserError: a split is empty.
    """
    if len(train_x) == 0 or len(test_x) == 0:
        raise UserError(f"kNN needs both splits; got {len(train_x)} training and {len(test_x)} test images")
    predicted = predict(train_x, train_y, test_x, k, temperature, device=device)
    return 100 * (predicted == test_y.cpu()).double().mean().item()


def majority(train_y: Int[Tensor, "train"], test_y: Int[Tensor, "test"]) -> float:
    """Accuracy, in percent, of always predicting the most frequent training label; labels of -1 do not count."""
    train_y, test_y = train_y[train_y >= 0], test_y[test_y >= 0]
    return 100 * (test_y == train_y.mode().values).double().mean().item()


def _normalized(x: Float[Tensor, "n dim"], device: torch.device) -> Float[Tensor, "n dim"]:
    return F.normalize(x.to(device).float(), dim=1)


def _largest(similarity: Float[Tensor, "n m"], k: int) -> tuple[Float[Tensor, "n k"], Int[Tensor, "n k"]]:
    """The k largest of each row and their columns, in descending order, the lower column first among equals."""
    k, more = min(k, similarity.shape[1]), min(k + 1, similarity.shape[1])
    values, columns = similarity.topk(more)  # which promises nothing about equals: one more shows where they are cut
    if more > k and (cut := values[:, k] == values[:, k - 1]).any():
        ordered = (similarity[cut] + 0.0).sort(dim=1, descending=True, stable=True)  # + 0.0: minus zero equals zero
        values[cut], columns[cut] = ordered.values[:, :more], ordered.indices[:, :more]
    columns, order = columns[:, :k].sort(dim=1)
    values = values[:, :k].gather(1, order) + 0.0
    values, order = values.sort(dim=1, descending=True, stable=True)
    return values, columns.gather(1, order)
