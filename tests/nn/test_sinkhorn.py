import math

import pytest
import torch
from torch import Tensor

from sslbook import distributed
from sslbook.nn.sinkhorn import sinkhorn


def literal(scores: Tensor, epsilon: float, iterations: int) -> Tensor:
    """Columns and rows of exp(scores / epsilon) divided by their sums in turn, one number at a time."""
    q = [[math.exp(v / epsilon) for v in row] for row in scores.tolist()]
    for _ in range(iterations):
        for j in range(len(q[0])):
            total = sum(row[j] for row in q)
            for row in q:
                row[j] /= total
        q = [[v / sum(row) for v in row] for row in q]
    return torch.tensor(q)


@pytest.mark.parametrize(("n", "clusters"), [(7, 3), (1, 4), (2, 9), (5, 1)])
@pytest.mark.parametrize(("epsilon", "iterations"), [(0.05, 3), (1.0, 1), (0.01, 10)])
def test_normalizes_columns_and_rows_in_turn(n: int, clusters: int, epsilon: float, iterations: int) -> None:
    scores = 2 * torch.rand(n, clusters, dtype=torch.float64) - 1
    torch.testing.assert_close(
        sinkhorn(scores, epsilon, iterations), literal(scores, epsilon, iterations), rtol=1e-3, atol=1e-5
    )


def test_converges_to_equally_full_clusters() -> None:
    scores = torch.randn(12, 4) + torch.tensor([3.0, 0.0, 0.0, 0.0])  # all rows prefer the first
    q = sinkhorn(scores, 0.5, 200)
    torch.testing.assert_close(q.sum(dim=1), torch.ones(12))
    torch.testing.assert_close(q.sum(dim=0), torch.full((4,), 3.0), rtol=1e-3, atol=1e-3)
    assert (scores / 0.5).softmax(dim=1).sum(dim=0)[0] > 8


def test_small_epsilon_neither_overflows_nor_empties_a_cluster() -> None:
    scores = torch.rand(9, 3) + torch.tensor([1.0, 0.0, 0.0])
    q = sinkhorn(scores, 1e-4, 3)  # exp(10,000) overflows
    assert q.isfinite().all()
    torch.testing.assert_close(q.sum(dim=1), torch.ones(9))
    assert q.sum(dim=0).min() > 0.1


def _rows(scores: Tensor, first: int) -> Tensor:
    mine = scores[:first] if distributed.rank() == 0 else scores[first:]
    return sinkhorn(mine, 0.05, 3)


@pytest.mark.parametrize("first", [4, 1, 7, 0])
def test_two_processes_with_unequal_rows_equal_one(first: int, pool) -> None:
    scores = torch.randn(7, 5)
    torch.testing.assert_close(torch.cat(pool.run(_rows, scores, first)), sinkhorn(scores, 0.05, 3))
