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
        "transposed: row i of q belongs to the neighbor of image i": {"turn": lambda q: q},
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
    inputs=lambda r: [(torch.tensor([0, 0, 1, 2, 2, 2]),), (torch.arange(4),), (torch.tensor([5, 5, 5, 5]),)],
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
        "kappa of the class is set to eta: multiply eta by 1 - p": lambda C, alpha, rho: (
            ((1 - alpha) * rho * (C - 1) + 1) / C
        ),
    },
)
def threshold(C, alpha, rho, *, eta=lambda alpha, rho: (1 - alpha) * rho):
    """`(C, alpha, rho) -> p*`, above which the class functions come first."""
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
        "this is Q/n, the fraction of the images that the rows could show: only rows of the last epoch can repeat": (
            lambda Q, n: Q / n
        ),
        "averaged over the epoch there is a factor 1/2": {"half": 1.0},
        "this is Q / (2n): the chance grows with the square": lambda Q, n: Q / n / 2,
        "the share of the rows, not the chance that one of them is the image": lambda Q, n: Q / n / 2 / n,
    },
)
def own_image(Q, n, *, half=0.5):
    """`(Q, n) -> probability`, averaged over an epoch, that the support set holds the anchor's image; Q at most n."""
    return half * (Q / n) ** 2


@exercise(
    inputs=lambda r: [(3072, 256), (1024, 256), (98304, 4096), (256, 256)],
    returns={"age": "in steps"},
    mistakes={
        "this is the age of the oldest row": lambda Q, N: Q / N,
        "the newest rows are one step old, not zero: add 1/2": {"newest": 0},
        "in images: divide by the batch": lambda Q, N: (Q + N) / 2,
        "the ratio is upside down": lambda Q, N: (N / Q + 1) / 2,
    },
)
def mean_age(Q, N, *, newest=1):
    """`(Q, N) -> steps` since a row of the support set was pushed, on average, at the moment of the search."""
    return (Q / N + newest) / 2
