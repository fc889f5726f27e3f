"""The exercises of the chapter *DenseCL, InterCLR and PIRL*."""

import math

import torch
import torch.nn.functional as F

from sslbook.notebook.exercises import exercise


def _unit(x):
    return F.normalize(x, dim=-1)


@exercise(
    inputs=lambda r: [
        (3 * r.normal(2, 6, 4), r.normal(2, 6, 4)),
        (r.normal(3, 4, 2), r.normal(3, 9, 2) * (1 + 5 * r.uniform(3, 9, 1))),
    ],
    returns={"matches": "for each cell of the first view the number of a cell of the second, (n, s)"},
    mistakes={
        "the largest inner product: long features win; divide by both lengths": {"unit": lambda x: x},
        "the least similar cell": {"pick": lambda s: s.argmin(2)},
        "these are matches of the second view's cells: take the argmax over the cells of the second view": {
            "pick": lambda s: s.argmax(1)
        },
        "these are similarities: return the numbers of the cells": {"pick": lambda s: s.amax(2)},
        "normalized over the cells: a feature lies along the last axis": {"unit": lambda x: F.normalize(x, dim=1)},
    },
)
def match(f, f_other, *, unit=_unit, pick=lambda s: s.argmax(2)):
    """`(f, f_other) -> (n, s)`: for each cell of f (n, s, d) the most similar of f_other (n, t, d), by the cosine."""
    return pick(unit(f) @ unit(f_other).mT)


@exercise(
    inputs=lambda r: [(0.7, 0.2), (1.0, 0.0), (0.5, 0.9)],
    returns={"slope": "one number"},
    mistakes={
        "that is the fraction of pairs that show the same shape": lambda a, b: a * b + (1 - a) * (1 - b),
        "both orders count: the first view may show b and the second a": lambda a, b: a * (1 - b),
        "twice that: the two orders differ": lambda a, b: 2 * a * (1 - b),
        "the difference of the fractions is the slope only where one view shows one shape": lambda a, b: abs(a - b),
    },
)
def slope(alpha, beta):
    """`(alpha, beta) -> slope` of the pooled similarity in the similarity of the two shapes."""
    return alpha * (1 - beta) + (1 - alpha) * beta


def _taken(t, c):
    return t.gather(1, c[:, :, None].expand(-1, -1, t.shape[2]))


@exercise(
    inputs=lambda r: [
        (_unit(r.normal(3, 5, 4)), _unit(r.normal(3, 5, 4)), r.integers(5, 3, 5), _unit(r.normal(7, 4)), 0.2),
        (_unit(r.normal(2, 4, 3)), _unit(r.normal(2, 4, 3)), r.integers(4, 2, 4), _unit(r.normal(6, 3)), 0.5),
    ],
    returns={"loss": "one number"},
    gradient=True,
    mistakes={
        "each cell has the key of its own position: take the match": {"take": lambda t, c: t},
        "the gradient must not reach the keys: detach them": {"stop": lambda x: x},
        "the temperature multiplies: divide by it": lambda r, t, c, q, tau: dense_loss.solution(r, t, c, q, 1 / tau),
        "the sum over cells: take the mean": {"reduce": lambda each: each.sum()},
        "the positive belongs into the denominator, too": lambda r, t, c, q, tau: (
            (r @ q.detach().T / tau).logsumexp(2) - (r * _taken(t.detach(), c)).sum(2) / tau
        ).mean(),
        "the matches are of the key's cells: r gets the match of its own cell": lambda r, t, c, q, tau: (
            dense_loss.solution(_taken(r, c), t, torch.arange(c.shape[1]).expand_as(c), q, tau)
        ),
    },
)
def dense_loss(r, t, c, queue, tau, *, take=_taken, stop=lambda x: x.detach(), reduce=lambda each: each.mean()):
    """`(r, t, c, queue, tau) -> loss`: InfoNCE of each cell with the key that c gives it, and a queue of negatives."""
    own = (r * take(stop(t), c)).sum(2, keepdim=True)
    logits = torch.cat([own, r @ stop(queue).T], 2) / tau
    return reduce(-logits.log_softmax(2)[:, :, 0])


@exercise(
    inputs=lambda r: [(9, 512, 0.2), (18, 65536, 0.2), (4, 100, 0.1)],
    returns={"loss": "one number"},
    mistakes={
        "the mean has length 1 / sqrt(M): normalized, its similarity with a cell is 1 / sqrt(M), not 1 / M": {
            "similarity": lambda M: 1 / M
        },
        "the negatives have a similarity above 0": {"similarity": lambda M: 0.0},
        "the temperature multiplies: divide by it": lambda M, K, tau: kinds.solution(M, K, 1 / tau),
        "this is the loss of guessing, log(1 + K)": lambda M, K, tau: math.log(1 + K),
        "the positive belongs into the denominator: 1 is missing": {"own": 0.0},
    },
)
def kinds(M, K, tau, *, similarity=lambda M: M**-0.5, own=1.0):
    """`(M, K, tau) -> loss` of an encoder that knows M kinds of cells, with K pooled negatives."""
    return math.log(own + K * math.exp((similarity(M) - 1) / tau))


@exercise(
    inputs=lambda r: [(0.3 * r.normal(50), 0.2, -0.5), (0.1 * r.normal(8), 0.1, 0.0), (r.uniform(20), 0.5, 0.2)],
    returns={"similarity": "one number"},
    mistakes={
        "the margin is subtracted from the similarity: it is added to the switch": {"sign": -1},
        "multiply the logarithm by the temperature": {"scale": lambda tau: 1.0},
        "divide the similarities by the temperature before the exponential": lambda s, tau, m: m + tau * s.logsumexp(0),
        "the sum of the exponentials, not their mean": lambda s, tau, m: (
            switch.solution(s, tau, m) - tau * math.log(len(s))
        ),
        "the largest negative alone decides only at small temperatures": lambda s, tau, m: m + s.max(),
    },
)
def switch(s, tau, margin, *, sign=1, scale=lambda tau: tau):
    """`(s, tau, margin) -> similarity` of the positive at which it has half of the weight, with negatives s (k,)."""
    return sign * margin + scale(tau) * (s / tau).logsumexp(0)


@exercise(
    inputs=lambda r: [(0.5, 1), (0.5, 4), (0.95, 10), (0.0, 2)],
    returns={"fraction": "one number from 0 to 1"},
    mistakes={
        "that is what is left of the older updates": lambda mu, k: mu**k,
        "that is the weight of one update: sum the last k": lambda mu, k: (1 - mu) * mu ** (k - 1),
        "the last update has weight 1 - mu, not mu": lambda mu, k: 1 - (1 - mu) ** k,
        "that counts one update too many": lambda mu, k: 1 - mu ** (k + 1),
    },
)
def fresh(mu, k):
    """`(mu, k) -> fraction` of a row that comes from the last k updates with momentum mu."""
    return sum((1 - mu) * mu**j for j in range(k))


@exercise(
    inputs=lambda r: [(r.normal(4, 3, 5), r.normal(4, 5) + 1), (r.normal(9, 2, 3) + 2, r.normal(9, 3))],
    returns={"variance": "one number"},
    mistakes={
        "center the weights over positions: what is common does not vary": {"weights": lambda W: W},
        "center the patches: their mean does not vary": {"patches": lambda h: h},
        "divide by P - 1: the patches at two positions are never the same": {"divide": lambda P: P},
        "all pairs of position and patch count, not only equal ones": lambda W, h: (
            torch.einsum("pod,pd->po", W - W.mean(0), h - h.mean(0)).square().sum() / (len(W) - 1)
        ),
        "a mean over outputs: sum them": lambda W, h: order_variance.solution(W, h) / W.shape[1],
    },
)
def order_variance(W, h, *, weights=lambda W: W - W.mean(0), patches=lambda h: h - h.mean(0), divide=lambda P: P - 1):
    """`(W, h) -> variance` over all orders of the patches h (P, d), with a matrix for each position, W (P, out, d)."""
    each = torch.einsum("iod,jd->ijo", weights(W), patches(h))
    return each.square().sum() / divide(len(W))


@exercise(
    inputs=lambda r: [(r.normal(3, 12), 4), (r.normal(2, 5).repeat(1, 9) + 0.1 * r.normal(2, 45), 9)],
    returns={"kappa": "one number from 0 to 1"},
    mistakes={
        "1 / P for equal weights: multiply by the number of positions": lambda weight, P: (
            common.solution(weight, P) / P
        ),
        "the columns are P blocks of d: view(out, P, d)": lambda weight, P: (
            P * weight.view(len(weight), -1, P).mean(2).square().sum() / weight.square().sum()
        ),
        "squares before the mean give 1 for any weights": lambda weight, P: (
            P * weight.view(len(weight), P, -1).square().mean(1).sum() / weight.square().sum()
        ),
        "that is the fraction of the differences from the mean": lambda weight, P: 1 - common.solution(weight, P),
        "norms, not squares": lambda weight, P: common.solution(weight, P) ** 0.5,
    },
)
def common(weight, P):
    """`(weight, P) -> kappa`: the fraction of the squared weights (out, P d) that is common to all P positions."""
    mean = weight.view(len(weight), P, -1).mean(1)
    return P * mean.square().sum() / weight.square().sum()
