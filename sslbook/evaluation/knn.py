"""Weighted k-nearest-neighbor classification on frozen features: no training, nothing to tune.

A test image asks its k nearest training images (cosine similarity) for their labels; a neighbor with similarity s
votes with weight exp(s / T). Protocol of Wu et al. (2018, "Unsupervised feature learning via non-parametric instance
discrimination", section 3.4), with k = 20 as in Caron et al. (2021, "Emerging properties in self-supervised vision
transformers", section 4) and T = 0.07 in both.

The search is exact and its memory bounded: training features (the bank) and test features (the queries) are met chunk
by chunk, normalized only then, and of each meeting only the k best survive. A million by a million similarities are
computed, never held.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from sslbook.errors import UserError


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

    Of equally similar ones the lower index comes first. With fewer than k training features all are returned.

    Args:
        train_x: the bank.
        test_x: the queries.
        k: how many neighbors.
        query_chunk: queries met at a time.
        bank_chunk: bank entries met at a time.
        device: where to compute; by default where `test_x` is. The results are on the CPU.
    """
    if k < 1 or len(train_x) == 0:
        raise UserError(f"kNN needs k >= 1 and at least one training image; got k={k}, {len(train_x)} images")
    device = test_x.device if device is None else torch.device(device)
    k = min(k, len(train_x))
    best = torch.empty(len(test_x), 0, dtype=torch.int64, device=device)
    with torch.no_grad(), torch.autocast(device.type, enabled=False):
        for start in range(0, len(train_x), bank_chunk):  # the bank outside: it is the larger, and travels only once
            bank = _normalized(train_x[start : start + bank_chunk], device)
            survivors = []
            for first in range(0, len(test_x), query_chunk):
                block = slice(first, first + query_chunk)
                keys = _best(_normalized(test_x[block], device) @ bank.T, k, start)
                keys = torch.cat([best[block], keys], dim=1)
                survivors.append(keys.topk(min(k, keys.shape[1])).values)
            best = torch.cat(survivors) if survivors else best.new_empty(0, k)
    similarities, indices = _unpack(best)
    return similarities.cpu(), indices.cpu()


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
    if temperature <= 0:
        raise UserError(f"the kNN temperature must be above 0; got {temperature}")
    if len(train_y) and int(train_y.min()) < 0:
        raise UserError("kNN needs a label for every training image; put the images into one folder per class")
    similarities, indices = neighbors(train_x, test_x, k, device=device)
    classes, train_y = train_y.cpu().unique(return_inverse=True)
    # Only ratios of votes matter; measured from the nearest neighbor, no temperature overflows.
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
    """Percentage of test images that their neighbors name rightly."""
    if len(test_x) == 0:
        raise UserError("kNN needs at least one test image; the test split is empty")
    predicted = predict(train_x, train_y, test_x, k, temperature, device=device)
    return 100 * (predicted == test_y.cpu()).double().mean().item()


def _normalized(x: Float[Tensor, "n dim"], device: torch.device) -> Float[Tensor, "n dim"]:
    return F.normalize(x.to(device).float(), dim=1)


# A similarity and an index make one 64-bit key: in the upper half the similarity's bits, arranged so that they sort as
# integers; in the lower half the index, counted down. No two keys are equal, so "the k largest" has one answer on
# every device (`topk` on the similarities alone promises nothing about equals).


def _best(similarity: Float[Tensor, "n m"], k: int, start: int) -> Int[Tensor, "n best"]:
    """Keys of the k largest similarities of each row; column 0 is bank entry `start`."""
    k = min(k, similarity.shape[1])
    values, columns = similarity.topk(k, sorted=False)
    keys = _pack(values, start + columns)
    # Keys of whole rows are needed only where equals stand on both sides of the cut.
    torn = (similarity >= values.amin(1, keepdim=True)).sum(1) > k
    if torn.any():
        index = torch.arange(start, start + similarity.shape[1], device=similarity.device)
        keys[torn] = _pack(similarity[torn], index).topk(k).values
    return keys


def _pack(similarity: Float[Tensor, "n m"], index: Int[Tensor, "..."]) -> Int[Tensor, "n m"]:
    bits = (similarity + 0.0).view(torch.int32)  # + 0.0: minus zero equals zero, but its bits do not
    bits = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits).long() << 32
    return bits | (0xFFFFFFFF - index)


def _unpack(keys: Int[Tensor, "n k"]) -> tuple[Float[Tensor, "n k"], Int[Tensor, "n k"]]:
    bits = (keys >> 32).int()
    bits = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    return bits.view(torch.float32), 0xFFFFFFFF - (keys & 0xFFFFFFFF)
