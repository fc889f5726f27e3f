"""The exercises of the chapter *SwAV*."""

import math

import torch
import torch.nn.functional as F

from sslbook.notebook.exercises import exercise


def _scores(r, n, k):
    """Cosines of random unit vectors: (n, k)."""
    return F.normalize(r.normal(n, 6), dim=1) @ F.normalize(r.normal(k, 6), dim=1).T


def _two(r, n, k):
    return _scores(r, n, k), _scores(r, n, k), (2 * r.normal(n, k)).softmax(1), (2 * r.normal(n, k)).softmax(1)


@exercise(
    inputs=lambda r: [(*_two(r, 6, 4), 0.1), (*_two(r, 5, 3), 0.5)],
    returns={"loss": "the mean over images, and over both directions, is one number"},
    gradient=True,
    mistakes={
        "not swapped: each view predicts its own code": {"swap": lambda q_1, q_2: (q_1, q_2)},
        "the gradient flows into the codes: detach q": {"stop": lambda q: q},
        "the codes are inside the logarithm: it is -q log p, and p is the prediction": lambda s_1, s_2, q_1, q_2, tau: (
            (-((s_1 / tau).softmax(1) * q_2.log()).sum(1).mean() - ((s_2 / tau).softmax(1) * q_1.log()).sum(1).mean())
            / 2
        ),
        "the sign: the loss is minus the mean of q log p": {"both": (-0.5, -0.5)},
        "this is the KL divergence: the cross-entropy has the entropy of the codes in it": lambda s_1, s_2, q_1, q_2, tau: (
            swapped_loss.solution(s_1, s_2, q_1, q_2, tau)
            + sum(torch.xlogy(q, q).sum(1).mean() / 2 for q in (q_1.detach(), q_2.detach()))
        ),
        "codes are soft: their largest entry alone is another target": lambda s_1, s_2, q_1, q_2, tau: (
            (F.cross_entropy(s_1 / tau, q_2.argmax(1)) + F.cross_entropy(s_2 / tau, q_1.argmax(1))) / 2
        ),
        "codes are distributions already: no softmax of them": {"stop": lambda q: q.detach().softmax(1)},
        "the temperature multiplies: divide the scores by it": {"power": 1},
        "the temperature is missing: divide the scores by it": {"power": 0},
        "the softmax is over the images: it is over the prototypes, dim=1": {"dim": 0},
        "the mean over all entries: sum over the prototypes, then take the mean over images": lambda *a: (
            swapped_loss.solution(*a) / a[0].shape[1]
        ),
        "the sum over images: take the mean": lambda *a: swapped_loss.solution(*a) * len(a[0]),
        "only one direction: the second view's code is never predicted": {"both": (1.0, 0.0)},
        "the sum of both directions: take their mean": lambda *a: 2 * swapped_loss.solution(*a),
    },
)
def swapped_loss(
    s_1,
    s_2,
    q_1,
    q_2,
    tau,
    *,
    swap=lambda q_1, q_2: (q_2, q_1),
    stop=lambda q: q.detach(),
    power=-1,
    dim=1,
    both=(0.5, 0.5),
):
    """`(s_1, s_2, q_1, q_2, tau) -> loss`: cross-entropy of each code and the other view's prediction."""
    targets = swap(stop(q_1), stop(q_2))
    losses = [-(q * (s * tau**power).log_softmax(dim)).sum(1).mean() for q, s in zip(targets, (s_1, s_2))]
    return both[0] * losses[0] + both[1] * losses[1]


def _naive(scores, epsilon, iterations):
    q = (scores / epsilon).exp()
    for _ in range(iterations):
        q = q / q.sum(0)
        q = q / q.sum(1, keepdim=True)
    return q


@exercise(
    inputs=lambda r: [(_scores(r, 8, 3), 0.1, 3), (_scores(r, 6, 4), 0.5, 1), (_scores(r, 9, 2), 0.003, 2)],
    returns={"codes": "one row per image, one column per prototype"},
    mistakes={
        "this is a softmax of each row: the columns are never normalized": lambda s, eps, n: (s / eps).softmax(1),
        "rows come first here: normalize the columns, then the rows, so that every row ends with the sum 1": {
            "order": (1, 0)
        },
        "the rows are not normalized: every code must sum to 1": {"order": (0,)},
        "epsilon multiplies the scores: divide by it": {"power": 1},
        "epsilon is missing: divide the scores by it": {"power": 0},
        "these are logarithms: return their exponentials": lambda s, eps, n: sinkhorn.solution(s, eps, n).log(),
        "one iteration too few": {"more": -1},
        "one iteration too many": {"more": 1},
        "the plan has mass 1: its rows sum to 1/N; multiply by N": lambda s, eps, n: (
            sinkhorn.solution(s, eps, n) / len(s)
        ),
        "exp overflows at a small epsilon: subtract the maximum, or work with logarithms": lambda s, eps, n: _naive(
            s, eps, n
        ),
    },
)
def sinkhorn(scores, epsilon, iterations, *, power=-1, order=(0, 1), more=0):
    """`(scores, epsilon, iterations) -> codes`: columns and rows of exp(scores / epsilon) normalized in turn."""
    log_q = scores.double() * epsilon**power
    for _ in range(iterations + more):
        for dim in order:
            log_q = log_q - log_q.logsumexp(dim, keepdim=True)
    return log_q.exp()


@exercise(
    inputs=lambda r: [(_scores(r, 6, 4), 0.1 * r.normal(6), 0.1 * r.normal(4), eps) for eps in (0.3, 1.0)],
    returns={"dual": "one number"},
    mistakes={
        "the first term is missing: the total mass, times epsilon": {"mass": 0.0},
        "the total mass is not multiplied by epsilon": {"mass": 1.0},
        "the sums of a and b: each is divided by its number, as the marginals are 1/N and 1/K": {"total": torch.sum},
        "the -1 in the exponent is missing": {"shift": 0.0},
        "the -1 in the exponent is not divided by epsilon": lambda S, a, b, eps: (
            eps * _plan(S, a, b, eps, 1 / eps).sum() + a.mean() + b.mean()
        ),
        "the means of a and b are added": {"total": lambda x: -x.mean()},
        "the first term is the sum of Q, not its mean": lambda S, a, b, eps: (
            eps * _plan(S, a, b, eps).mean() + a.mean() + b.mean()
        ),
        "the signs of a and b in the exponent are wrong: they are subtracted from the scores": {"sign": -1.0},
        "this is the objective of the plan, <Q, S> + epsilon H(Q): the dual is wanted": lambda S, a, b, eps: _objective(
            _plan(S, a, b, eps), S, eps
        ),
    },
)
def dual_value(S, a, b, epsilon, *, mass=None, total=torch.mean, shift=1.0, sign=1.0):
    """`(S, a, b, epsilon) -> D(a, b)`: the dual of the entropic transport problem."""
    Q = _plan(S, a, b, epsilon, shift, sign)
    return (epsilon if mass is None else mass) * Q.sum() + total(a.double()) + total(b.double())


def _plan(S, a, b, epsilon, shift=1.0, sign=1.0):
    return ((S.double() - sign * (a.double()[:, None] + b.double())) / epsilon - shift).exp()


def _objective(Q, S, epsilon):
    return (Q * S).sum() + epsilon * torch.special.entr(Q).sum()


def _solved(r, n, k, epsilon):
    return sinkhorn.solution(_scores(r, n, k), epsilon, 500) / n


@exercise(
    inputs=lambda r: [(_solved(r, 8, 4, 0.2),), (_solved(r, 6, 5, 0.1),)],
    returns={"rate": "one number between 0 and 1"},
    mistakes={
        "this is the first singular value, which is 1: it belongs to the constants and is no error": {"which": 0},
        "the third singular value: the slowest error decays with the second": {"which": 2},
        "the singular value itself: an iteration applies the plan and its transpose, so take the square": {"power": 1},
        "Q is not scaled: its largest singular value must be 1, so multiply by the root of N K": {
            "scale": lambda n, k: 1.0
        },
        "scaled by N K: take the root": {"scale": lambda n, k: float(n * k)},
        "scaled by N: the rows then sum to 1, but the columns do not": {"scale": lambda n, k: float(n)},
    },
)
def convergence_rate(Q, *, which=1, power=2, scale=lambda n, k: math.sqrt(n * k)):
    """`(Q) -> rate`: by how much the error of the marginals shrinks in one iteration near the solution."""
    return torch.linalg.svdvals(scale(*Q.shape) * Q.double())[which] ** power


@exercise(
    inputs=lambda r: [(_scores(r, 6, 4) + 0.3 * r.normal(4), 3.0), (_scores(r, 5, 7) + r.normal(7), 10.0)],
    returns={"codes": "one row per image, one column per prototype"},
    mistakes={
        "the means of the rows alone are subtracted: a column's mean must go as well": {"column": 0.0},
        "the means of the columns alone are subtracted: a row's mean must go as well": {"row": 0.0},
        "the mean of all is subtracted twice: add it once": {"all_": 0.0},
        "epsilon is missing: divide the centered scores by it": {"divide": lambda eps: 1.0},
        "epsilon multiplies: divide by it": {"divide": lambda eps: 1 / eps},
        "the factor 1/K is missing: without scores every code is 1/K": lambda S, eps: (
            S.shape[1] * first_order.solution(S, eps)
        ),
        "1/N: a code is a distribution over the K prototypes": lambda S, eps: (
            S.shape[1] / len(S) * first_order.solution(S, eps)
        ),
        "1/K multiplies the scores as well": lambda S, eps: first_order.solution(S * S.shape[1], eps),
        "a softmax of the centered scores has higher orders in it": lambda S, eps: (_center(S) / eps).softmax(1),
        "the scores are not centered": {"row": 0.0, "column": 0.0, "all_": 0.0},
        "the 1 is missing: this is the difference from uniform codes": lambda S, eps: (
            first_order.solution(S, eps) - 1 / S.shape[1]
        ),
    },
)
def first_order(S, epsilon, *, row=1.0, column=1.0, all_=1.0, divide=lambda eps: eps):
    """`(S, epsilon) -> codes`: the codes for a large epsilon, to first order in the scores."""
    S = S.double()
    centered = S - column * S.mean(0) - row * S.mean(1, keepdim=True) + all_ * S.mean()
    return (1 + centered / divide(epsilon)) / S.shape[1]


def _views(r, n, k):
    shared = _scores(r, n, k)
    return (shared + 0.5 * r.normal(k) + 0.3 * r.normal(n, k), shared + 0.3 * r.normal(n, k), 0.1)


def _center(S):
    return S - S.mean(0) - S.mean(1, keepdim=True) + S.mean()


@exercise(
    inputs=lambda r: [_views(r, 12, 5), _views(r, 9, 4)],
    returns={"epsilon": "one number"},
    mistakes={
        "the scores are not centered: subtract the means of rows and columns": {"center": lambda S: S},
        "only the rows are centered: what all images share is no signal, so center the columns too": {
            "center": lambda S: S - S.mean(1, keepdim=True)
        },
        "only the columns are centered: a constant added to a row changes nothing, so center the rows too": {
            "center": lambda S: S - S.mean(0)
        },
        "this is the correlation: multiply by the temperature": lambda s_1, s_2, tau: critical_epsilon.solution(
            s_1, s_2, 1.0
        ),
        "tau / rho: the correlation multiplies": lambda s_1, s_2, tau: (
            tau**2 / critical_epsilon.solution(s_1, s_2, tau)
        ),
        "divided by the square of one view only: take the mean of both": {"below": lambda a, b: a},
        "divided by the geometric mean of both squares: take the arithmetic": {"below": lambda a, b: (a * b).sqrt()},
        "only the mean of all is subtracted: center rows and columns": {"center": lambda S: S - S.mean()},
        "divided by the sum of both squares: take their mean": {"below": lambda a, b: a + b},
    },
)
def critical_epsilon(s_1, s_2, tau, *, center=_center, below=lambda a, b: (a + b) / 2):
    """`(s_1, s_2, tau) -> epsilon` below which differences between images grow near a collapse."""
    s_1, s_2 = center(s_1.double()), center(s_2.double())
    return tau * (s_1 * s_2).sum() / below(s_1.square().sum(), s_2.square().sum())


def _exact_entropy(n, k):
    """As many full entries as fit, and the rest: the least that is reached, above the bound if k / n is not whole."""
    share, full = min(1.0, n / k), max(1, k // n)
    rest = max(0.0, 1 - full * share)
    return -full * share * math.log(share) - (rest * math.log(rest) if rest > 1e-9 else 0.0)


@exercise(
    inputs=lambda r: [(256, 3000), (4096, 3000), (32, 200)],
    returns={"entropy": "one number, in nats"},
    mistakes={
        "log K: this is the entropy of a uniform code": lambda n, k: math.log(k),
        "upside down: log(N/K) is negative if there are more prototypes than images": lambda n, k: max(
            0.0, math.log(n / k)
        ),
        "a negative entropy: with more images than prototypes the bound is 0": lambda n, k: math.log(k / n),
        "K/N entries need not be whole for the bound: it is log(K/N) itself": [
            lambda n, k: math.log(math.ceil(k / n)),
            lambda n, k: math.log(max(1, k // n)),
            _exact_entropy,
        ],
        "in bits: take the natural logarithm": lambda n, k: max(0.0, math.log2(k / n)),
        "this is the number of prototypes of a code: take its logarithm": lambda n, k: max(0.0, k / n),
    },
)
def smallest_entropy(n, k):
    """`(n, k) -> entropy` in nats that every code of n images and k equally full prototypes has at least."""
    return max(0.0, math.log(k / n))


@exercise(
    inputs=lambda r: [(224, 96, 6), (160, 96, 4), (16, 8, 4)],
    returns={"cost": "pixels, relative to two large crops", "terms": "a number of pairs"},
    mistakes={
        "sides instead of areas: a crop's pixels are the square of its side": {"power": 1},
        "one large crop: there are two": {"large": 1},
        "exchanged: first the cost, then the terms": lambda *a: multicrop.solution(*a)[::-1],
        "this is what the small crops add: the cost is relative to two large crops, so 1 plus it": lambda R, r, v: (
            multicrop.solution(R, r, v)[0] - 1,
            2 * (v + 1),
        ),
        "two crops have codes, and each is predicted by all others": {"terms": lambda v: v + 1},
        "all pairs of crops: only the two large crops have codes": {
            "terms": lambda v: (v + 2) * (v + 1) // 2,
        },
        "all ordered pairs of crops: only the two large crops have codes": {"terms": lambda v: (v + 2) * (v + 1)},
        "a crop does not predict its own code: each code has V + 1 predictions, not V + 2": {
            "terms": lambda v: 2 * (v + 2)
        },
        "the large crops also predict each other: each code has V + 1 predictions, not V": {"terms": lambda v: 2 * v},
    },
)
def multicrop(size, small, v, *, power=2, large=2, terms=lambda v: 2 * (v + 1)):
    """`(size, small, v) -> (cost, terms)` of two crops of side `size` and v of side `small`."""
    pixels = large * size**power
    return (pixels + v * small**power) / pixels, terms(v)
