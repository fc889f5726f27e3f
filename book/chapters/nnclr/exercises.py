"""The exercises of the chapter *NNCLR*."""

import math

import torch
import torch.nn.functional as F

from sslbook.notebook.exercises import exercise


def _unit(x):
    return F.normalize(x, dim=1)


@exercise(
    inputs=lambda r: [(2 * r.normal(5, 3), r.normal(9, 3) * r.uniform(9, 1)), (r.normal(4, 6), 3 * r.normal(7, 6))],
    returns={"neighbors": "one row of the support set for each row of z, normalized"},
    mistakes={
        "the support set is not normalized: long rows win": {"unit": lambda s: s, "last": _unit},
        "the row is returned with its own length: give it length 1": lambda z, s: s[(_unit(z) @ _unit(s).T).argmax(1)],
        "the columns are normalized: each row is one projection, dim=1": lambda z, s: F.normalize(s, dim=0)[
            (F.normalize(z, dim=0) @ F.normalize(s, dim=0).T).argmax(1)
        ],
        "the row with the smallest similarity: take the largest": {"pick": lambda s: s.argmin(1)},
        "these are similarities: return the rows of the support set": lambda z, s: (_unit(z) @ _unit(s).T).amax(1),
        "these are positions: return the rows": lambda z, s: (_unit(z) @ _unit(s).T).argmax(1),
        "the nearest z for each row of the support set: it must be the other way round": lambda z, s: (
            neighbors.solution(s, z)
        ),
        "a weighted mean of all rows: take one row": lambda z, s: (_unit(z) @ _unit(s).T).softmax(1) @ _unit(s),
    },
)
def neighbors(z, support, *, unit=_unit, pick=lambda s: s.argmax(1), last=lambda x: x):
    """`(z, support) -> (n, d)`: for each row of z the most similar row of the support set, of unit length."""
    return last(unit(support)[pick(_unit(z) @ unit(support).T)])


@exercise(
    inputs=lambda r: [(_unit(r.normal(6, 4)), 2 * r.normal(6, 4), 0.2), (_unit(r.normal(3, 5)), r.normal(3, 5), 0.5)],
    returns={"loss": "the mean over the rows is one number"},
    mistakes={
        "the predictions are not normalized": {"unit": lambda p: p},
        "the temperature multiplies: divide by it": {"scale": lambda t: t},
        "the rows are the predictions: the softmax of a neighbor runs over the predictions of the batch": {
            "turn": lambda s: s.T
        },
        "the mean of the logarithms, not the logarithm of the mean": lambda n, p, t: (
            -(n @ _unit(p).T / t).softmax(1).diagonal().mean().log()
        ),
        "the logarithm is missing: this is the mean probability": lambda n, p, t: (
            -(n @ _unit(p).T / t).softmax(1).diagonal().mean()
        ),
        "the mean of both directions of the softmax: only a neighbor chooses": lambda n, p, t: (
            (nnclr_loss.solution(n, p, t) + nnclr_loss.solution(_unit(p), n, t)) / 2
        ),
        "the mean over all pairs: only the own prediction counts, on the diagonal": lambda n, p, t: (
            -(n @ _unit(p).T / t).log_softmax(1).mean()
        ),
        "the sum over the rows: take the mean": lambda n, p, t: len(n) * nnclr_loss.solution(n, p, t),
        "the positive is missing from the denominator": lambda n, p, t: (
            (s := n @ _unit(p).T / t).masked_fill(torch.eye(len(n), dtype=torch.bool), -torch.inf).logsumexp(1)
            - s.diagonal()
        ).mean(),
        "the sign is wrong: this is the mean log probability": lambda n, p, t: -nnclr_loss.solution(n, p, t),
    },
)
def nnclr_loss(n, p, temperature, *, unit=_unit, scale=lambda t: 1 / t, turn=lambda s: s):
    """`(n, p, temperature) -> loss` for neighbors of unit length and predictions of any length."""
    logits = turn(n @ unit(p).T) * scale(temperature)
    return F.cross_entropy(logits, torch.arange(len(n)))


@exercise(
    inputs=lambda r: [
        (_unit(r.normal(6, 4)), _unit(r.normal(6, 4)), 0.2),
        (_unit(r.normal(3, 5)), _unit(r.normal(3, 5)), 0.5),
    ],
    returns={"gradient": "the shape of p"},
    mistakes={
        "the attraction is missing: subtract the own neighbor": {"own": 0},
        "the attraction and the repulsion have the wrong sign": lambda n, p, t: -gradient.solution(n, p, t),
        "transposed: row i of the weights belongs to neighbor i, and the sum runs over i": {"turn": lambda q: q},
        "predictions are pulled to neighbors: the vectors in the sum are those of n": lambda n, p, t: (
            ((n @ p.T / t).softmax(1).T @ p - p) / (len(n) * t)
        ),
        "this is the gradient for the neighbors, and they are constants": lambda n, p, t: (
            ((n @ p.T / t).softmax(1) @ p - p) / (len(n) * t)
        ),
        "the derivative of the normalization is in it: the formula takes p as it is": lambda n, p, t: (
            (g := gradient.solution(n, p, t)) - (g * p).sum(1, keepdim=True) * p
        ),
        "the temperature is missing in the softmax": lambda n, p, t: ((n @ p.T).softmax(1).T @ n - n) / (len(n) * t),
        "1/tau is missing": lambda n, p, t: t * gradient.solution(n, p, t),
        "the mean over the rows is missing: divide by N": lambda n, p, t: len(n) * gradient.solution(n, p, t),
        "the softmax runs over the rows: it must run over the predictions": {"axis": 0},
    },
)
def gradient(n, p, temperature, *, own=1, turn=lambda q: q.T, axis=1):
    """`(n, p, temperature) -> (n, d)`: the derivative of the loss with respect to the predictions, not normalized."""
    q = (n @ p.T / temperature).softmax(axis)
    return (turn(q) @ n - own * n) / (len(n) * temperature)


@exercise(
    inputs=lambda r: [(torch.tensor([0, 0, 1, 2, 2, 2, 3]),), (torch.arange(4),), (torch.tensor([5, 5, 5, 5]),)],
    returns={"loss": "one number"},
    mistakes={
        "log m counts once for each image, not once for each shared row": lambda rows: (
            _counts(rows).log().sum() / len(rows)
        ),
        "the mean over images is missing": {"mean": lambda total, n: total},
        "the mean is over the different rows: divide by the number of images": lambda rows: (
            (_counts(rows) * _counts(rows).log()).sum() / len(_counts(rows))
        ),
        "this is log N, the loss of equal logits": lambda rows: math.log(len(rows)),
        "this is the entropy of the rows: it is largest where no row is shared": lambda rows: torch.special.entr(
            _counts(rows) / len(rows)
        ).sum(),
        "a bound below zero says nothing: the sign is plus": lambda rows: -smallest_loss.solution(rows),
        "the largest group alone: every image adds the log of its own": lambda rows: _counts(rows).max().log(),
        "the logarithm is to base 2": {"log": torch.log2},
    },
)
def smallest_loss(rows, *, log=torch.log, mean=lambda total, n: total / n):
    """`(rows) -> loss`: the lower bound, if image i has the row `rows[i]` of the support set as its neighbor."""
    m = _counts(rows)
    return mean((m * log(m)).sum(), len(rows))


def _counts(rows):
    return torch.as_tensor(rows).unique(return_counts=True)[1].double()


@exercise(
    inputs=lambda r: [(0.35, 5), (0.1, 10), (0.9, 3)],
    returns={"agreement": "one number, 0 for random pairs"},
    mistakes={
        "this is the fraction itself: guessing must give 0": lambda p, n: p,
        "p - 1/n: divide by what is left above chance, so that 1 stays 1": {"span": lambda n: 1.0},
        "divide by 1 - 1/n, what is left above guessing, not by 1/n": lambda p, n: (p - 1 / n) * n,
        "divided by 1/n: the ratio to guessing is 1 for random pairs": lambda p, n: p * n,
        "the level of guessing is 1/n, not 1/(n - 1)": {"level": lambda n: 1 / (n - 1)},
    },
)
def agreement(p, n, *, level=lambda n: 1 / n, span=lambda n: 1 - 1 / n):
    """`(p, n) -> kappa`: the fraction p of pairs with the same of n values, 0 for random pairs and 1 for equal ones."""
    return (p - level(n)) / span(n)


@exercise(
    inputs=lambda r: [(3, 0.0, 0.5), (10, 0.2, 1.0), (5, 1.0, 0.7), (4, 0.3, 0.0)],
    returns={"purity": "between 0 and 1"},
    mistakes={
        "1/C, the threshold for random errors alone": lambda C, alpha, rho: 1 / C,
        "one half: the majority need not be right": lambda C, alpha, rho: 0.5,
        "1 - alpha is missing: augmentation weakens the nuisance": {"eta": lambda alpha, rho: rho},
        "alpha instead of 1 - alpha": {"eta": lambda alpha, rho: alpha * rho},
        "errors are spread over C - 1 classes: C - 1 times eta": [
            lambda C, alpha, rho: (1 + (1 - alpha) * rho) / (C + (1 - alpha) * rho),
            lambda C, alpha, rho: (1 + C * (1 - alpha) * rho) / (C + C * (1 - alpha) * rho),
        ],
        "wrong neighbors share the nuisance, so kappa_M is (1 - pi) rho and not pi rho": lambda C, alpha, rho: (
            1 / (C - (C - 1) * (1 - alpha) * rho)
        ),
        "kappa of the class is set to eta: multiply eta by 1 - pi": lambda C, alpha, rho: (
            ((1 - alpha) * rho * (C - 1) + 1) / C
        ),
    },
)
def threshold(C, alpha, rho, *, eta=lambda alpha, rho: (1 - alpha) * rho):
    """`(C, alpha, rho) -> pi*`, above which the class functions come first."""
    e = (C - 1) * eta(alpha, rho)
    return (1 + e) / (C + e)


def _symmetric(r, n):
    T = r.uniform(n, n)
    return (T + T.T) / (T + T.T).sum()


@exercise(
    inputs=lambda r: [(r.normal(5, 2), _symmetric(r, 5)), (r.normal(4, 4), _symmetric(r, 4))],
    returns={"loss": "one number"},
    gradient=True,
    mistakes={
        "the attraction counts twice: -2 times the mean over pairs": {"two": 1},
        "the repulsion is not squared": {"power": 1},
        "independent images i and j have the weight w_i w_j": [
            lambda F, P: -2 * (P * (F @ F.T)).sum() + (F @ F.T).square().sum(),
            lambda F, P: -2 * (P * (F @ F.T)).sum() + (F @ F.T).square().mean(),
            lambda F, P: -2 * (P * (F @ F.T)).sum() + (P.sum(1)[:, None] * (F @ F.T).square()).sum(),
        ],
        "the square of the mean: take the mean of the squares": lambda F, P: (
            -2 * (P * (F @ F.T)).sum() + (torch.outer(P.sum(1), P.sum(1)) * (F @ F.T)).sum() ** 2
        ),
        "the pairs are not weighted by their probability": lambda F, P: spectral_loss.solution(
            F, torch.ones_like(P) / P.numel() + 0 * P
        ),
        "the repulsion is over positives: it is over independent images": lambda F, P: (
            -2 * (P * (F @ F.T)).sum() + (P * (F @ F.T) ** 2).sum()
        ),
        "attraction and repulsion have the wrong signs": lambda F, P: -spectral_loss.solution(F, P),
    },
)
def spectral_loss(f, P, *, two=2, power=2):
    """`(f, P) -> loss`: features (n, k) and the probability P (n, n) of each pair of positives, which sums to 1."""
    s, w = f @ f.T, P.sum(1)
    return -two * (P * s).sum() + (w[:, None] * w * s**power).sum()


@exercise(
    inputs=lambda r: [(1000, 4000), (3072, 4000), (4000, 4000), (98304, 1281167)],
    returns={"probability": "between 0 and 1"},
    rtol=2e-3,
    mistakes={
        "this is K/D, the fraction of the images that the rows could show: only rows of the last epoch can repeat": (
            lambda K, D: K / D
        ),
        "averaged over the epoch there is a factor 1/2": {"half": 1.0},
        "this is K / (2D): the chance grows with the square": lambda K, D: K / D / 2,
        "the share of the rows, not the chance that one of them is the image": lambda K, D: K / D / 2 / D,
    },
)
def own_image(K, D, *, half=0.5):
    """`(K, D) -> probability`, averaged over an epoch, that the support set holds the anchor's image; K at most D."""
    return half * (K / D) ** 2


@exercise(
    inputs=lambda r: [(3072, 256), (1024, 256), (98304, 4096), (256, 256)],
    returns={"age": "in steps"},
    mistakes={
        "this is the age of the oldest row": lambda K, N: K / N,
        "half of the sum of the newest and the oldest age, not of their difference": lambda K, N: (K / N - 1) / 2,
        "half of it is missing: this is the sum of the newest and the oldest age": lambda K, N: K / N + 1,
        "the newest rows are one step old, not zero: add 1/2": {"newest": 0},
        "in images: divide by the batch": lambda K, N: (K + N) / 2,
        "the ratio is upside down": lambda K, N: (N / K + 1) / 2,
    },
)
def mean_age(K, N, *, newest=1):
    """`(K, N) -> steps` since a row of the support set was pushed, on average, at the moment of the search."""
    return (K / N + newest) / 2
