"""The exercises of the chapter *SimCLR*."""

import math

import torch
import torch.nn.functional as F

from sslbook.book.chapters.simclr.processes import shard_gradients as shard_gradients
from sslbook.notebook.exercises import exercise


def _scores(z, tau, unit=True, diagonal=-torch.inf):
    z = F.normalize(z, dim=1) if unit else z
    s = z @ z.T / tau
    return s if diagonal is None else s.diagonal_scatter(torch.full_like(s[0], diagonal))


def _positive(z):
    return torch.arange(len(z)).roll(len(z) // 2)


def _exp(z, tau):
    e = _scores(z, tau).exp()
    return -(e[torch.arange(len(z)), _positive(z)] / e.sum(1)).log().mean()


def _subtracted(z, tau):
    e = _scores(z, tau, diagonal=None).exp()
    return -(e[torch.arange(len(z)), _positive(z)] / (e.sum(1) - math.exp(1 / tau))).log().mean()


def _cross_view(z, tau, both=True):
    s = F.normalize(z, dim=1)[: len(z) // 2] @ F.normalize(z, dim=1)[len(z) // 2 :].T / tau
    y = torch.arange(len(s))
    return (F.cross_entropy(s, y) + F.cross_entropy(s.T, y)) / 2 if both else F.cross_entropy(s, y)


def _constants(z, tau):
    s = F.normalize(z, dim=1) @ F.normalize(z, dim=1).detach().T / tau
    return F.cross_entropy(s.diagonal_scatter(torch.full_like(s[0], -torch.inf)), _positive(z))


@exercise(
    inputs=lambda r: [(2 * r.normal(12, 5), 0.5), (r.normal(18, 5), 0.1), (r.normal(8, 4), 0.005)],
    returns={"loss": "the mean over all 2N rows is one number"},
    gradient=True,
    mistakes={
        "row i still contains its own similarity: mask the diagonal before the softmax": {"diagonal": None},
        "a masked score of 0 still has weight e^0 = 1 in the softmax: the diagonal must be -inf": {"diagonal": 0.0},
        "only the N x N products between the views: the other rows of the same view are negatives too": [
            _cross_view,
            lambda z, tau: _cross_view(z, tau, both=False),
        ],
        "the rows are not of unit length: divide each by its norm before the products": {"unit": False},
        "the temperature multiplies: divide the similarities by it": lambda z, tau: nt_xent.solution(z, 1 / tau),
        "the temperature has no effect: divide the similarities by it": lambda z, tau: nt_xent.solution(z, 1.0),
        "rows 2i and 2i + 1 are paired: here rows i and i + N belong together": {
            "pair": lambda z: torch.arange(len(z)) ^ 1
        },
        "only the first N rows ask: the second views are anchors too": {"rows": lambda z: len(z) // 2},
        "twice the mean over all 2N rows (the authors' code): the exercise asks for the paper's mean": {"scale": 2},
        "the sum over the rows: divide by 2N": lambda z, tau: len(z) * nt_xent.solution(z, tau),
        "the positive is missing from the denominator: k runs over all rows but i": {"positive": False},
        "the sign is wrong: the loss is minus the logarithm of a probability": {"scale": -1},
        "the candidates are constants: a row must learn as a candidate as well, without .detach()": _constants,
        "at temperature 0.005 the exponential overflows: use logsumexp or cross_entropy": [_exp, _subtracted],
    },
)
def nt_xent(z, tau, *, unit=True, diagonal=-torch.inf, pair=_positive, rows=len, scale=1, positive=True):
    """`(z, temperature) -> loss`; rows `i` and `i + N` of `z` belong together (equation 1, the paper's mean)."""
    s, j = _scores(z, tau, unit, diagonal), pair(z)[:, None]
    candidates = s if positive else s.scatter(1, j, -torch.inf)
    return scale * (candidates.logsumexp(1) - s.gather(1, j)[:, 0])[: rows(z)].mean()


@exercise(
    inputs=lambda r: [(F.normalize(r.normal(8, 5), dim=1), i, j, tau) for i, j, tau in ((0, 3, 0.5), (4, 1, 0.2))],
    returns={"gradient of one anchor": "one number per dimension of z_i"},
    mistakes={
        "the factor 1 / temperature is missing": lambda z, i, j, tau: tau * anchor_gradient.solution(z, i, j, tau),
        "the sign is wrong: this is the direction that lowers the loss": lambda *a: -anchor_gradient.solution(*a),
        "p still contains k = i: leave the anchor out of its own softmax": {"out": lambda i, j: []},
        "p misses the positive: it runs over all k but i, the positive among them": {"out": lambda i, j: [i, j]},
        "the positive is missing: subtract z_j": {"attraction": 0},
        "the weights ignore the temperature: p is the softmax of s / temperature": lambda z, i, j, tau: (
            anchor_gradient.solution(z, i, j, 1.0) / tau
        ),
        "this is the gradient behind the normalization: the exercise asks for the one before it is projected": (
            lambda z, i, j, tau: (g := anchor_gradient.solution(z, i, j, tau)) - (g @ z[i]) * z[i]
        ),
    },
)
def anchor_gradient(z, i, j, tau, *, out=lambda i, j: [i], attraction=1):
    """`(z, i, j, temperature) -> (dim,)`: the derivative of anchor i's loss for `z_i`, rows of unit length."""
    s = (z @ z[i] / tau).index_fill(0, torch.tensor(out(i, j), dtype=torch.int64), -torch.inf)
    return (s.softmax(0) @ z - attraction * z[j]) / tau


@exercise(
    inputs=lambda r: [(3 * r.normal(6), r.normal(6)), (r.normal(3), r.normal(3))],
    returns={"projected gradient": "the shape of u"},
    mistakes={
        "the factor 1 / |u| is missing": {"power": 0},
        "multiplied by |u|: a longer vector rotates less, so divide": {"power": -1},
        "nothing is projected out: subtract the component along z": {"projection": lambda g, u, z: 0},
        "the projection uses u where the unit vector z belongs": {"projection": lambda g, u, z: (g @ u) * u},
        "this keeps the component along z and drops the rest": {"projection": lambda g, u, z: g - (g @ z) * z},
    },
)
def through_normalization(u, g, *, power=1, projection=lambda g, u, z: (g @ z) * z):
    """`(u, gradient) -> (dim,)`: from the derivative for z = u / |u| to the one for u."""
    return (g - projection(g, u, u / u.norm())) / u.norm() ** power


@exercise(
    inputs=lambda r: [(2 * r.normal(n, n) + 3 * torch.eye(n),) for n in (5, 12)],
    returns={"bound": "one number of nats"},
    mistakes={
        "this is the loss: the bound is log K minus it": {"log_n": lambda n: 0, "sign": -1},
        "log K is missing: the bound is log K minus the loss": {"log_n": lambda n: 0},
        "added instead of subtracted: log K - loss": {"sign": -1},
        "in bits: take natural logarithms": lambda s: information_bound.solution(s) / math.log(2),
        "the softmax runs over the rows: for every x (row) the candidates y stand in the columns": {"dim": 0},
        "the positive is missing from the denominator": lambda s: (
            math.log(len(s)) + (s.diagonal() - s.clone().fill_diagonal_(-torch.inf).logsumexp(1)).mean()
        ),
        "K counts the negatives only: the positive is one of the K candidates": {"log_n": lambda n: math.log(n - 1)},
    },
)
def information_bound(scores, *, log_n=math.log, sign=1, dim=1):
    """`(scores) -> bound in nats`; `scores[i, k]` is phi(x_i, y_k), the pairs stand on the diagonal."""
    return log_n(len(scores)) + sign * scores.log_softmax(dim).diagonal().mean()


@exercise(
    inputs=lambda r: [(r.normal(24, 6), r.integers(3, 12).repeat(2), 0.3)],
    returns={"fraction": "one number, between 0 and 1"},
    mistakes={
        "the positive counts as a negative: leave it out of the softmax": {"positive": True},
        "the anchor counts as its own negative: leave k = i out": [{"diagonal": None}, {"diagonal": 0.0}],
        "all negatives count alike: weigh each by its softmax at this temperature": lambda z, label, tau: (
            same_class_share.solution(z, label, 1e6)
        ),
        "this is the fraction of the OTHER classes": lambda *a: 1 - same_class_share.solution(*a),
        "the rows are not of unit length": {"unit": False},
        "the sum over anchors: take the mean": lambda *a: len(a[0]) * same_class_share.solution(*a),
    },
)
def same_class_share(z, label, tau, *, unit=True, diagonal=-torch.inf, positive=False):
    """`(z, label, temperature) -> fraction`: how much of the repulsion is within the anchor's class."""
    s = _scores(z, tau, unit, diagonal)
    s = s if positive else s.scatter(1, _positive(z)[:, None], -torch.inf)
    return (s.softmax(1) * (label[:, None] == label)).sum(1).mean()


@exercise(
    inputs=lambda r: [(256, 0.5), (4096, 1.0), (8, 0.2)],
    returns={"floor": ""},
    mistakes={
        "N - 1 negatives: every other image gives two rows": {"count": lambda n: n - 1},
        "2N - 1 negatives: the positive is not among them": {"count": lambda n: 2 * n - 1},
        "the exponent is -1 / tau, for orthogonal negatives: cosines go down to -1": {"gap": 1},
        "exp(+2 / tau): at the floor the positive is more similar than the negatives": {"gap": -2},
        "the positive's own 1 in the sum is missing": {"one": 0},
        "the loss of equal rows: positive and negatives differ by 2 in cosine at best": {"gap": 0},
    },
)
def loss_floor(n, tau, *, count=lambda n: 2 * n - 2, gap=2, one=1):
    """`(N, temperature) -> floor` of one row's loss in a batch of N images, from cosines in [-1, 1] alone."""
    return math.log(one + count(n) * math.exp(-gap / tau))


@exercise(
    inputs=lambda r: [([0.5, 0.3, 0.2], 256), ([0.25] * 4, 100), (torch.tensor([0.9, 0.1]), 16)],
    returns={"false negatives": "one number"},
    mistakes={
        "N - 1 negatives: every other image gives two rows": {"count": lambda n: n - 1},
        "2N negatives: anchor and positive are not among them": {"count": lambda n: 2 * n},
        "2N - 1 negatives: the positive is not among them": {"count": lambda n: 2 * n - 1},
        "as if all classes were equally frequent: 1 / C is only the best case": {"chance": lambda p: 1 / len(p)},
        "this counts the true negatives": {"chance": lambda p: 1 - p @ p},
        "the anchor's own class is random as well: sum the squares": {"chance": lambda p: p.max()},
    },
)
def false_negatives(frequencies, n, *, count=lambda n: 2 * n - 2, chance=lambda p: p @ p):
    """`(class frequencies, N) -> number` of an anchor's negatives that have its class, on average over anchors."""
    return count(n) * chance(torch.as_tensor(frequencies))


@exercise(
    inputs=lambda r: [
        (F.normalize(r.normal(12, 5), dim=1), torch.tensor([0, 1, 2, 0, 1, 0]).repeat(2), i, tau)
        for i, tau in ((0, 0.5), (7, 0.2))
    ],
    returns={"gradient of one anchor": "one number per dimension of z_i"},
    mistakes={
        "the positives are summed: divide by their number |P(i)|": {"average": torch.sum},
        "the anchor is among its own positives: P(i) leaves i out": {"own": True},
        "p still contains k = i: leave the anchor out of its own softmax": {"out": False},
        "only the other view attracts: all rows of the class are positives": lambda z, y, i, tau: (
            anchor_gradient.solution(z, i, (i + len(z) // 2) % len(z), tau)
        ),
        "the sign is wrong: this is the direction that lowers the loss": lambda *a: -supcon_gradient.solution(*a),
        "the factor 1 / temperature is missing": lambda z, y, i, tau: tau * supcon_gradient.solution(z, y, i, tau),
    },
)
def supcon_gradient(z, label, i, tau, *, average=torch.mean, own=False, out=True):
    """`(z, label, i, temperature) -> (dim,)`: the derivative of anchor i's loss with all rows of its class as positives."""
    anchor = torch.arange(len(z)) == i
    p = (z @ z[i] / tau).masked_fill(anchor & out, -torch.inf).softmax(0)
    return (p @ z - average(z[(label == label[i]) & (~anchor | own)], dim=0)) / tau
