"""The exercises of the chapter *Instance discrimination*."""

import math

import torch
import torch.nn.functional as F
from scipy.special import gammaln, ive

from sslbook.notebook.exercises import exercise


def _unit(x):
    return F.normalize(x, dim=-1)


def _views(r, n, overlap):
    return torch.cdist(r.normal(12, 2), overlap * r.normal(n, 2)).square().neg()


@exercise(
    inputs=lambda r: [(_views(r, 4, 1.0), r.integers(4, 12)), (_views(r, 6, 3.0), r.integers(6, 12))],
    returns={"loss": "one number"},
    mistakes={
        "that is log n: what a classifier pays that looks at no view": lambda log_a, i: math.log(log_a.shape[1]),
        "the densities are not normalized over the images: divide by their sum": lambda log_a, i: (
            -log_a.gather(1, i[:, None]).mean()
        ),
        "normalized over the views: the sum is over the images, which are the columns": {"dim": 0},
        "the best guess instead of the image that the view came from": lambda log_a, i: (
            -log_a.log_softmax(1).amax(1).mean()
        ),
        "a sum: take the mean over the views": lambda log_a, i: floor.solution(log_a, i) * len(i),
        "the sign is wrong: a loss is not negative": lambda log_a, i: -floor.solution(log_a, i),
    },
)
def floor(log_a, i, *, dim=1):
    """`(log_a, i) -> loss` of the best classifier on these views: log densities (views, images), true images (views,)."""
    return -log_a.log_softmax(dim).gather(1, i[:, None]).mean()


@exercise(
    inputs=lambda r: [
        (_unit(r.normal(5, 4)), r.integers(5, 5), r.normal(7, 4)),
        (_unit(r.normal(3, 6)), torch.tensor([2, 0, 2]), r.normal(5, 6)),
    ],
    returns={"gradient": "the shape of w"},
    mistakes={
        "only the own weights: the others are pushed by every view": lambda v, i, w: (
            weight_gradient.solution(v, i, w) * F.one_hot(i, len(w)).amax(0)[:, None]
        ),
        "only the pushes: the own weight is pulled": {"target": 0.0},
        "the sign is wrong: prediction minus target": lambda v, i, w: -weight_gradient.solution(v, i, w),
        "a sum over the batch: take the mean": {"scale": lambda n: 1.0},
        "transposed: one row for each class": lambda v, i, w: weight_gradient.solution(v, i, w).T.contiguous(),
    },
)
def weight_gradient(v, i, w, *, target=1.0, scale=lambda n: 1 / n):
    """`(v, i, w) -> gradient` of the mean cross-entropy for the weights w (n, d), of features v (N, d) and images i."""
    p = (v @ w.T).softmax(1)
    return scale(len(v)) * (p - target * F.one_hot(i, len(w))).T @ v


@exercise(
    inputs=lambda r: [(1281167, 256, 5004 * 200), (512, 32, 640), (4000, 32, 480)],
    returns={"visits": "a number"},
    mistakes={
        "that is the number of steps between two visits": lambda n, batch, steps: n / batch,
        "that is the number of images seen": lambda n, batch, steps: batch * steps,
        "the number of epochs is steps times batch over images": lambda n, batch, steps: steps / n,
    },
)
def visits(n, batch, steps):
    """`(n, batch, steps) -> number`: how often each image is seen, on average."""
    return steps * batch / n


@exercise(
    inputs=lambda r: [
        (_unit(r.normal(6, 5)), torch.tensor([1, 3]), _unit(r.normal(2, 5)), 0.5),
        (_unit(r.normal(4, 8)), torch.tensor([0, 2, 3]), _unit(r.normal(3, 8)), 0.9),
    ],
    returns={"rows": "the shape of u"},
    mistakes={
        "the rows are not of length one": {"normalize": lambda x: x},
        "momentum belongs to the old row, and 1 - m to the new feature": lambda u, i, v, m: update.solution(
            u, i, v, 1 - m
        ),
        "the row was replaced: m of the old one stays": lambda u, i, v, m: update.solution(u, i, v, 0.0),
        "the rows of the first images were written: use index": lambda u, i, v, m: update.solution(
            u, torch.arange(len(i)), v, m
        ),
        "all rows were changed: only those of the batch are": lambda u, i, v, m: _unit(
            m * u + (1 - m) * torch.zeros_like(u).index_copy(0, i, v).add(1e-3)
        ),
    },
)
def update(u, i, v, m, *, normalize=_unit):
    """`(u, i, v, m) -> (n, d)`: the bank after the step; u (n, d), the batch's images i (N,) and features v (N, d)."""
    new = u.clone()
    new[i] = normalize(m * u[i] + (1 - m) * v)
    return new


@exercise(
    inputs=lambda r: [
        (3 * r.normal(4, 9), 6.0, 100),
        (2 * r.normal(3, 2), 4.0, 50),
        (20 * r.normal(3, 5), 9.0, 1000),
    ],
    returns={"loss": "one number"},
    mistakes={
        "the constant is missing: P = e^s / Z": {"constant": 0.0},
        "the noise is not counted: the odds are P to K/n": {"prior": lambda k, n: 1 / n},
        "the noise's probability is K/n, not K": {"prior": lambda k, n: float(k)},
        "a mean over the noise: every noise row counts": {"reduce": lambda x: x.mean(1)},
        "only the positive: the noise rows must be called noise": {"reduce": lambda x: 0 * x.sum(1)},
        "the noise is rewarded for looking right: its term is -log(1 - D)": {"noise": -1.0},
        "cross-entropy over the K + 1 rows is InfoNCE: here each row is classified alone": lambda s, log_z, n: (
            F.cross_entropy(s, torch.zeros(len(s), dtype=torch.long))
        ),
        "the logarithm of a rounded 0 is infinite: use softplus or logsigmoid": lambda s, log_z, n: (
            -(d := torch.sigmoid(s - log_z - math.log((s.shape[1] - 1) / n)))[:, 0].log() - (1 - d[:, 1:]).log().sum(1)
        ).mean(),
    },
)
def nce(s, log_z, n, *, constant=1.0, prior=lambda k, n: k / n, reduce=lambda x: x.sum(1), noise=1.0):
    """`(s, log_z, n) -> loss`, the mean over the batch: logits (N, 1 + K) with the positive first, log Z, images."""
    log_odds = s - constant * log_z - math.log(prior(s.shape[1] - 1, n))
    return (F.softplus(-log_odds[:, 0]) + reduce(F.softplus(noise * log_odds[:, 1:]))).mean()


@exercise(
    inputs=lambda r: [(128, 0.07), (64, 0.2), (64, 0.1), (3, 1.0)],
    returns={"Z/n": "one number"},
    rtol=0.02,
    mistakes={
        "this is its logarithm": lambda d, tau: math.log(start.solution(d, tau)),
        "the mean exponential is not the exponential of the mean, 1": lambda d, tau: 1.0,
        "a coordinate of a random direction has variance 1/d": lambda d, tau: math.exp(1 / (2 * tau**2)),
        "half of the variance stands in the exponent": lambda d, tau: math.exp(1 / (d * tau**2)),
        "the variance of s is 1/(d tau^2)": lambda d, tau: math.exp(1 / (2 * d * tau)),
    },
)
def start(d, tau):
    """`(d, tau) -> Z/n` of a bank of random directions in d dimensions at temperature tau."""
    order = d / 2 - 1
    log = gammaln(d / 2) + order * math.log(2 * tau) + math.log(ive(order, 1 / tau)) + 1 / tau
    return math.exp(log)


@exercise(
    inputs=lambda r: [(2 * r.normal(9), 0, 1.0), (3 * r.normal(20), 4, 0.1), (3 * r.normal(20), 7, 10.0)],
    returns={"push": "one number", "pull": "one number"},
    mistakes={
        "a constant that is c times too large divides: P / c": {"power": 1.0},
        "this is c = 1: the constant does not cancel": {"power": 0.0},
        "the pull does not depend on c when K is large": lambda s, i, c: (1 / c, 1 / c),
        "the positive is not left out of the push: its row is noise like any other": lambda s, i, c: (
            (1 - s.softmax(0)[i]) / c,
            1.0,
        ),
    },
)
def wrong_constant(s, i, c, *, power=-1.0):
    """`(s, i, c) -> (push, pull)`: the sums of NCE's weights on noise and positive for K to infinity; logits s (n,)."""
    return s.softmax(0).sum() * c**power, 1.0


@exercise(
    inputs=lambda r: [(0.5,), (0.0,), (0.9,)],
    returns={"negative": "epochs", "positive": "epochs"},
    mistakes={
        "half an epoch is right only if the order never changes": {"last": 0.5},
        "the own row was written in the last epoch: one epoch, not 7/12": {"own": 7 / 12},
        "momentum makes rows older": {"more": lambda m: 0.0, "earlier": 7 / 12},
        "a random row's visits before the last one are k + 1/2 epochs old": {"earlier": 7 / 12},
        "m/(1 - m) visits, not 1/(1 - m): the last visit counts as 0": {"more": lambda m: 1 / (1 - m)},
        "the weights are (1 - m) m^k for k = 0, 1, 2, ...: all visits count": {"more": lambda m: m},
        "the two are exchanged": lambda m: ages.solution(m)[::-1],
    },
)
def ages(m, *, last=7 / 12, earlier=0.5, own=1.0, more=lambda m: m / (1 - m)):
    """`(m) -> (negative, positive)`: mean age in epochs of a random row and of the own row, with memory momentum m."""
    return (1 - m) * last + m * earlier + more(m), own + more(m)


@exercise(
    inputs=lambda r: [
        (_unit(r.normal(40, 6)), r.integers(4, 40), _unit(r.normal(9, 6)), 5, 0.07, 4),
        (_unit(r.normal(30, 3)), r.integers(3, 30), _unit(r.normal(12, 3)), 9, 0.2, 3),
    ],
    returns={"votes": "one row a query, one column a class"},
    compare=lambda votes: votes / votes.sum(1, keepdim=True),
    mistakes={
        "all rows vote: only the k nearest do": lambda bank, y, q, k, tau, c: knn_votes.solution(
            bank, y, q, len(bank), tau, c
        ),
        "every neighbor counts alike: weigh by exp(s / tau)": {"weigh": lambda s, tau: torch.ones_like(s)},
        "the temperature divides the cosine": {"weigh": lambda s, tau: (s * tau).exp()},
        "weighed by the cosine itself: its exponential over tau is meant": {"weigh": lambda s, tau: s.clamp(min=1e-3)},
        "the farthest rows": {"largest": False},
        "only the nearest one votes": lambda bank, y, q, k, tau, c: knn_votes.solution(bank, y, q, 1, tau, c),
    },
)
def knn_votes(bank, y, q, k, tau, c, *, weigh=lambda s, tau: (s / tau).exp(), largest=True):
    """`(bank, y, q, k, tau, c) -> (Q, c)`: votes of the k nearest rows of bank (n, d), with labels y, for queries q."""
    s, near = (q @ bank.T).topk(k, dim=1, largest=largest)
    return torch.zeros(len(q), c).scatter_add(1, y[near], weigh(s, tau))
