"""Weighted k-nearest-neighbor classification on frozen features: no training, nothing to tune.

The k nearest training images of a test image (cosine similarity s) vote for their labels with weight exp(s / T).
Protocol of Wu et al. (2018, "Unsupervised feature learning via non-parametric instance discrimination", section 3.4),
with k = 20 as in Caron et al. (2021, "Emerging properties in self-supervised vision transformers", section 4) and
T = 0.07 in both.

The search is exact and its memory bounded: training features (the bank) and test features (the queries) are compared
chunk by chunk, and of each comparison only the k best are kept.
"""

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from sslbook import distributed
from sslbook.data.loader import Data
from sslbook.errors import UserError, at_least_one
from sslbook.evaluation.base import Metrics, Protocol, Representation
from sslbook.evaluation.features import everywhere
from sslbook.evaluation.metrics import MANY, classification, confusion_figure, top_k

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class KNN(Protocol):
    """Accuracy of weighted k-nearest-neighbor classification; top-5 too where there are more than ten classes.

    Args:
        k: neighbors that vote, at most all training images; several numbers are measured in one pass, such as [10, 20, 200].
        temperature: of the votes exp(similarity / temperature); lower gives the nearest more weight. Or several.
    """

    def __init__(self, k: int | list[int] = 20, temperature: float | list[float] = 0.07) -> None:
        self.k, self.temperature = k, temperature
        if not self._settings():
            raise UserError(f"k is {k} and temperature is {temperature}: give at least one of each")
        for number, value in self._settings().values():
            at_least_one(k=number)
            if not value > 0:
                raise UserError(f"temperature is {value}: give more than 0")
        self._details: dict[str, Any] = {}

    def _settings(self) -> dict[str, tuple[int, float]]:
        """The pairs of k and temperature, by the name of their metric: `kNN` if there is one, else `kNN, k=10, T=0.1`."""
        ks = self.k if isinstance(self.k, list) else [self.k]
        temperatures = self.temperature if isinstance(self.temperature, list) else [self.temperature]

        def name(k: int, temperature: float) -> str:
            parts = [f"k={k}"] * (len(ks) > 1) + [f"T={temperature}"] * (len(temperatures) > 1)
            return ", ".join(["kNN", *parts])

        return {name(k, temperature): (k, temperature) for k in ks for temperature in temperatures}

    def run(self, model: Representation, data: Data) -> Metrics:
        train_x, train_y, test_x, test_y = model.labeled()
        _require(train_x, test_x)
        found = divided(train_x, test_x, max(k for k, _ in self._settings().values()), device=model.device)
        metrics, ranked = {}, {}
        for name, (k, temperature) in self._settings().items():
            ranked[name] = vote(*(part[:, :k] for part in found), train_y, temperature, top=min(5, data.num_classes))
            metrics[name] = top_k(ranked[name][:, :1], test_y)
            if data.num_classes > MANY:
                metrics[name.replace("kNN", "kNN top-5")] = top_k(ranked[name], test_y)
        first = next(iter(ranked.values()))[:, 0]
        self._details = model.details[self.name] = classification(first, test_y, data.class_names)
        return metrics

    def figures(self) -> dict[str, "Figure"]:
        confusion = self._details.get("confusion")
        return {"confusion": confusion_figure(confusion, "kNN")} if confusion else {}

    def chance(self, data: Data) -> Metrics:
        level = majority(data.labels("train"), data.labels("test"))
        return dict.fromkeys(self._settings(), level)


def neighbors(
    train_x: Float[Tensor, "train dim"],
    test_x: Float[Tensor, "test dim"],
    k: int = 20,
    *,
    query_chunk: int = 1024,
    bank_chunk: int = 8192,
    device: torch.device | str | None = None,
) -> tuple[Float[Tensor, "test k"], Int[Tensor, "test k"]]:
    """Cosine similarities and indices of the k nearest training features of every test feature, nearest first; on the CPU.

    Of equally similar ones the lower index comes first, on every device. With fewer than k training features all are
    returned. Every process searches for its own queries; see `divided`.

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
    none = torch.empty(0, device=device), torch.empty(0, dtype=torch.int64, device=device)
    best = dict.fromkeys(range(0, len(test_x), query_chunk), none)
    with torch.no_grad(), torch.autocast(device.type, enabled=False):
        for start in range(0, len(train_x), bank_chunk):  # the bank outside: it is the larger, and is moved only once
            bank = _normalized(train_x[start : start + bank_chunk], device)
            for first, (values, indices) in best.items():
                queries = _normalized(test_x[first : first + query_chunk], device)
                new_values, columns = _largest(queries @ bank.T, k)
                # Earlier chunks stand first, so that a stable sort keeps the lower index of equals in front.
                merged = torch.cat([values.view(len(queries), -1), new_values], dim=1)
                merged, order = merged.sort(dim=1, descending=True, stable=True)
                index = torch.cat([indices.view(len(queries), -1), start + columns], dim=1).gather(1, order)
                best[first] = merged[:, :k], index[:, :k]
    values, indices = torch.zeros(len(test_x), k), torch.zeros(len(test_x), k, dtype=torch.int64)
    for first, (value, index) in best.items():
        values[first : first + query_chunk], indices[first : first + query_chunk] = value.cpu(), index.cpu()
    return values, indices


def divided(
    train_x: Float[Tensor, "train dim"],
    test_x: Float[Tensor, "test dim"],
    k: int,
    *,
    query_chunk: int = 1024,
    device: torch.device | str | None = None,
) -> tuple[Float[Tensor, "test k"], Int[Tensor, "test k"]]:
    """`neighbors` of queries that are the same in every process: each searches for some chunks, and all get the whole."""
    k, chunks = min(k, len(train_x)), torch.arange(len(test_x)).split(query_chunk)
    own = torch.cat([torch.arange(0), *chunks[distributed.rank() :: distributed.world_size()]])
    values, indices = torch.zeros(len(test_x), k), torch.zeros(len(test_x), k, dtype=torch.int64)
    queries = test_x[own.to(test_x.device)]
    values[own], indices[own] = neighbors(train_x, queries, k, query_chunk=query_chunk, device=device)
    where = test_x.device if device is None else device
    return everywhere(values, where), everywhere(indices, where)


def vote(
    similarities: Float[Tensor, "test k"],
    indices: Int[Tensor, "test k"],
    train_y: Int[Tensor, "train"],
    temperature: float = 0.07,
    top: int = 1,
) -> Int[Tensor, "test top"]:
    """The `top` labels with the largest sums of votes of the neighbors, the lower label first where votes are equal."""
    classes, train_y = train_y.cpu().unique(return_inverse=True)
    # Only ratios of votes matter; relative to the nearest neighbor, no temperature overflows.
    votes = ((similarities - similarities[:, :1]).double() / temperature).exp()
    ranked = []
    for rows, index in zip(votes.split(4096), indices.split(4096)):  # classes may be many: bound the table of votes
        table = torch.zeros(len(rows), len(classes), dtype=torch.float64).scatter_add_(1, train_y[index], rows)
        # `argmax` takes the first of equals, `topk` promises nothing about them.
        best = table.argmax(1, keepdim=True) if top == 1 else table.sort(dim=1, descending=True, stable=True).indices
        ranked.append(classes[best[:, :top]])
    return torch.cat(ranked)


def predict(
    train_x: Float[Tensor, "train dim"],
    train_y: Int[Tensor, "train"],
    test_x: Float[Tensor, "test dim"],
    k: int = 20,
    temperature: float = 0.07,
    *,
    device: torch.device | str | None = None,
) -> Int[Tensor, "test"]:
    """The label with the largest sum of votes; the lower label where votes are equal. See `neighbors`."""
    return vote(*neighbors(train_x, test_x, k, device=device), train_y, temperature)[:, 0]


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
    _require(train_x, test_x)
    predicted = predict(train_x, train_y, test_x, k, temperature, device=device)
    return 100 * (predicted == test_y.cpu()).double().mean().item()


def _require(train_x: Tensor, test_x: Tensor) -> None:
    if len(train_x) == 0 or len(test_x) == 0:
        raise UserError(f"kNN needs both splits; got {len(train_x)} training and {len(test_x)} test images")


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
