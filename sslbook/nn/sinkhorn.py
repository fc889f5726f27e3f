"""Assignments that use all clusters alike."""

import torch
from jaxtyping import Float
from torch import Tensor

from sslbook import distributed


@torch.no_grad()
def sinkhorn(scores: Float[Tensor, "n clusters"], epsilon: float, iterations: int = 3) -> Float[Tensor, "n clusters"]:
    """Soft assignments of the rows of all processes to clusters; every row sums to 1, every cluster gets equally much.

    Of all assignments whose clusters are equally full it is the one that maximizes the agreement with `scores` plus
    `epsilon` times the entropy; rows and columns of exp(scores / epsilon) are normalized in turn, rows last (Cuturi,
    2013, "Sinkhorn distances", arXiv:1306.0895; SwAV, arXiv:2006.09882, section 3.1). It is computed with logarithms,
    so that a small epsilon neither overflows nor leaves a cluster empty. Processes may hold different numbers of rows.
    """
    log_q = scores.float() / epsilon
    for _ in range(iterations):
        log_q = log_q - _log_sum_over_rows(log_q)  # every cluster gets one unit ...
        log_q = log_q - log_q.logsumexp(dim=1, keepdim=True)  # ... and every row gives one
    return log_q.exp()


def _log_sum_over_rows(x: Float[Tensor, "n clusters"]) -> Float[Tensor, "clusters"]:
    """The logarithm of the sum of exp(x) over the rows of all processes."""
    # A process without rows has no maximum of its own.
    own = x.amax(dim=0) if len(x) else x.new_full((x.shape[1],), -torch.inf)
    greatest = distributed.all_reduce_max(own)
    return greatest + distributed.all_reduce_sum((x - greatest).exp().sum(dim=0)).log()
