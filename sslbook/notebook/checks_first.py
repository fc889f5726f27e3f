"""Checks for the chapter *Learning without labels*."""

from collections.abc import Callable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sslbook.notebook.checks import Check, exercise


def _vote(
    similarity: Float[Tensor, "query bank"], labels: Int[Tensor, "bank"], k: int, temperature: float, classes: int
) -> Float[Tensor, "query classes"]:
    top, index = similarity.topk(k, dim=1)
    scores = torch.zeros(len(similarity), classes)
    return scores.scatter_add(1, labels[index], (top / temperature).exp())


@exercise
def knn_vote(check: Check, answer: Callable) -> None:
    """`answer(similarity, labels, k, temperature, num_classes) -> scores`, as in Wu et al. (2018), section 3.4."""
    for k, tau in ((5, 0.5), (1, 0.5), (20, 0.1)):
        similarity, labels = check.random(8, 40).tanh(), check.integers(3, 40)
        scores = check.call(answer, similarity, labels, k, tau, 3)
        check.shape(scores, (8, 3), "one row per query, one column per class")
        check.dtype(scores, torch.float32, "sum the weights, not the labels")
        right = _vote(similarity, labels, k, tau, 3)
        counts = _vote(similarity, labels, k, torch.inf, 3)
        check.close(
            scores,
            right,
            mistakes={
                "every neighbor has one vote: weigh each by exp(similarity / temperature)": counts,
                "the temperature multiplies: the weight is exp(similarity / temperature)": _vote(
                    similarity, labels, k, 1 / tau, 3
                ),
                "the temperature has no effect: the weight is exp(similarity / temperature)": _vote(
                    similarity, labels, k, 1.0, 3
                ),
                "the whole bank votes: keep only the k most similar": _vote(similarity, labels, 40, tau, 3),
                "the k least similar vote: take the largest similarities (topk, or sort descending)": _vote(
                    -similarity, labels, k, -tau, 3
                ),
                "the scores are normalized: return the sums of the weights themselves": right / right.sum(1, True),
            },
            what="weighted votes",
        )
    rare = check.call(answer, check.random(4, 6), torch.zeros(6, dtype=torch.int64), 3, 0.5, 5)
    check.shape(rare, (4, 5), "a class without neighbors still has a column: use num_classes, not labels.max()")
    check.that((rare[:, 1:] == 0).all(), "a class without a neighbor must score 0", "absent classes")
