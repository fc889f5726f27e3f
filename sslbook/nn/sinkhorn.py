"""Sinkhorn-Knopp: soft cluster assignments under the constraint that all clusters are equally full."""

import torch
from jaxtyping import Float
from torch import Tensor

from sslbook import distributed


@torch.no_grad()
def sinkhorn(scores: Float[Tensor, "n clusters"], epsilon: float, iterations: int = 3) -> Float[Tensor, "n clusters"]:
    """Soft assignments of the rows of all processes to clusters; every row sums to 1, every column to the same.

    Among all assignments with equally full clusters this is the one that maximizes the agreement with `scores` plus
    `epsilon` times the entropy. It is found by normalizing the columns and the rows of exp(scores / epsilon) in turn
    (Cuturi, 2013, "Sinkhorn distances", arXiv:1306.0895; SwAV, arXiv:2006.09882, section 3.1). Logarithms are used,
    so that a small epsilon neither overflows nor empties a cluster.

    Args:
        scores: similarity of each row to each cluster; processes may hold different numbers of rows.
        epsilon: divides the scores; the smaller, the harder the assignment.
        iterations: normalizations of columns and rows; rows come last.
    """
    log_q = scores.float() / epsilon
    for _ in range(iterations):
        log_q = log_q - _log_column_sums(log_q)  # every cluster holds 1 in total
        log_q = log_q - log_q.logsumexp(dim=1, keepdim=True)  # every row gives 1 in total
    return log_q.exp()


def _log_column_sums(x: Float[Tensor, "n clusters"]) -> Float[Tensor, "clusters"]:
    """The logarithm of the sum of exp(x) over the rows of all processes."""
    # A process without rows has no maximum of its own.
    largest = x.amax(dim=0) if len(x) else x.new_full((x.shape[1],), -torch.inf)
    largest = distributed.all_reduce_max(largest)
    return largest + distributed.all_reduce_sum((x - largest).exp().sum(dim=0)).log()
