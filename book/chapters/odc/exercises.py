"""The exercises of the chapter *ODC*."""

import math

import torch
import torch.nn.functional as F

from sslbook.notebook.exercises import exercise


@exercise(
    inputs=lambda r: [
        (r.normal(4, 3), r.integers(4, 12), r.normal(12, 3)),
        (r.normal(3, 2), r.integers(3, 5), r.normal(5, 2)),
    ],
    returns={"centroids": "the shape of c"},
    mistakes={
        "the first step must forget the start entirely: a centroid's first point has n = 1": {"first": 1},
        "n counts the points of this centroid, not all points": {"own": False},
        "a centroid that got no point must stay": lambda c, y, u: torch.stack(
            [u[y == j].mean(0) if (y == j).any() else torch.zeros_like(c[0]) for j in range(len(c))]
        ),
        "these are sums: step by (u - c) / n": lambda c, y, u: torch.zeros_like(c).index_add(0, y, u),
    },
)
def macqueen(c, y, u, *, first=0, own=True):
    """`(c, y, u) -> (K, d)`: the centroids after points u (M, d) went one by one to clusters y (M,), with steps 1/n."""
    c, n = c.clone(), torch.full((len(c),), first)
    for j, point in zip(y.tolist(), u):
        n[j] += 1
        c[j] = c[j] + (point - c[j]) / (n[j] if own else n.sum())
    return c


@exercise(
    inputs=lambda r: [(0.5, 2500, 10), (0.0, 20, 1), (0.9, 62, 10), (0.98, 62, 100)],
    returns={"steps": "one number"},
    mistakes={
        "an image is visited once an epoch: the momentum's part is E m / (1 - m)": {"clock": lambda E: 1},
        "1 / (1 - m) counts the present feature as one visit old": {"memory": lambda m: 1 / (1 - m)},
        "stored features wait for their visit, too: (E - 1) / 2": {"wait": lambda E: 0},
        "a centroid is on average (T - 1) / 2 steps old, and the wait (E - 1) / 2": lambda m, E, T: (
            E * m / (1 - m) + E - 1 + T - 1
        ),
        "centroids wait for their update: (T - 1) / 2": {"old": lambda T: 0},
        "ages begin at 0: (E - 1) / 2 and (T - 1) / 2": lambda m, E, T: E * m / (1 - m) + E / 2 + T / 2,
    },
    rtol=1e-4,
)
def lag(
    m,
    E,
    T,
    *,
    clock=lambda E: E,
    memory=lambda m: m / (1 - m),
    wait=lambda E: (E - 1) / 2,
    old=lambda T: (T - 1) / 2,
):
    """`(m, E, T) -> steps` that a centroid is behind the present features, in the mean over time."""
    return clock(E) * memory(m) + wait(E) + old(T)


@exercise(
    inputs=lambda r: [
        (r.normal(7, 4), torch.tensor([5, 0, 3]), r.normal(3, 4), 0.5),
        (r.normal(5, 3), torch.tensor([1, 2]), r.normal(2, 3), 0.9),
    ],
    returns={"rows": "the shape of rows: those of other images stay"},
    mistakes={
        "the new feature must have unit length before it is mixed in": {"unit": lambda z: z},
        "the row must have unit length after the update": {"after": lambda row: row},
        "m belongs to the stored row, 1 - m to the new feature": {"weight": lambda m: 1 - m},
        "rows of images outside the batch must not change": lambda rows, index, z, m: (
            F.normalize(visit.solution(rows, index, z, m), dim=1) * 1.0 + 0.1
        ),
        "row i of the memory belongs to image i, not to position i in the batch": lambda rows, index, z, m: (
            visit.solution(rows, torch.arange(len(index)), z, m)
        ),
    },
)
def visit(
    rows, index, z, m, *, unit=lambda z: F.normalize(z, dim=1), after=lambda r: F.normalize(r, dim=1), weight=None
):
    """`(rows, index, z, m) -> (N, d)`: the samples memory after the batch `index` with features z, any length."""
    m = m if weight is None else weight(m)
    rows = rows.clone()
    rows[index] = after(m * rows[index] + (1 - m) * unit(z))
    return rows


def _unit(r, *shape):
    return F.normalize(r.normal(*shape), dim=1)


@exercise(
    inputs=lambda r: [(_unit(r, 40, 3), 0.8 * r.uniform(6, 1) * _unit(r, 6, 3)), (_unit(r, 20, 2), r.uniform(5, 2))],
    returns={"numbers": "one number for each row, below K"},
    mistakes={
        "that is the largest inner product: it prefers long centroids": {"half": 0.0},
        "subtract half of the squared length, not all of it": {"half": 1.0},
        "half of the length: it must be squared": lambda r, c: (r @ c.T - c.norm(dim=1) / 2).argmax(1),
        "the sign is wrong: long centroids are farther": {"half": -0.5},
        "with centroids of unit length another centroid can be nearest": lambda r, c: (
            r @ F.normalize(c, dim=1).T
        ).argmax(1),
        "one number for each row: the argmax runs over the centroids": lambda r, c: torch.cdist(r, c).argmin(0),
    },
)
def nearest(r, c, *, half=0.5):
    """`(r, c) -> (N,)`: the nearest centroid by distance, for unit rows r and centroids c of any length."""
    return (r @ c.T - half * c.square().sum(1)).argmax(1)


@exercise(
    inputs=lambda r: [(r.normal(9, 3), r.normal(4, 3)), (r.normal(2, 2) + 3, r.normal(30, 2))],
    returns={"gain": "one number"},
    mistakes={
        "the factor is n_a n_b / (n_a + n_b)": {"factor": lambda a, b: a * b},
        "(n_a + n_b) / (n_a n_b) is upside down": {"factor": lambda a, b: (a + b) / (a * b)},
        "that is for groups of one row each": {"factor": lambda a, b: 0.5},
        "this bounds the gain: the smaller group times the squared distance": {"factor": min},
        "square the distance of the means": {"power": 1},
    },
)
def ward(a, b, *, factor=lambda a, b: a * b / (a + b), power=2):
    """`(a, b) -> gain`: by how much the sum of squares falls if a cluster is split into the rows a and b."""
    return factor(len(a), len(b)) * (a.mean(0) - b.mean(0)).norm() ** power


@exercise(
    inputs=lambda r: [
        (_unit(r, 12, 3), torch.tensor([0, 0, 0, 0, 0, 1, 1, 2, 2, 2, 2, 3]), _unit(r, 4, 3), 3),
        (_unit(r, 9, 2), torch.tensor([0, 0, 0, 1, 1, 1, 1, 1, 2]), _unit(r, 3, 2), 3),
        (_unit(r, 14, 4), torch.tensor([0, 0, 1, 1, 1, 1, 2, 2, 3, 3, 3, 4, 4, 0]), _unit(r, 5, 4), 4),
        (_unit(r, 6, 2), torch.tensor([0, 0, 0, 1, 1, 1]), _unit(r, 2, 2), 2),
    ],
    returns={"labels": "one label for each row"},
    mistakes={
        "rows of small clusters must go to large ones only: leave the small centroids out": {"every": True},
        "these are positions among the large clusters: look the numbers up": lambda r, y, c, least: _dissolved(
            r, y, c, least, numbers=False
        ),
        "a cluster of exactly n_min images is large enough": {"strict": True},
        "rows of large clusters must stay where they are": lambda r, y, c, least: _dissolved(r, y, c, least, all=True),
        "nothing was dissolved": lambda r, y, c, least: y,
    },
)
def dissolve(r, y, c, least, *, every=False, strict=False):
    """`(r, y, c, least) -> (N,)`: labels after clusters of fewer than `least` rows gave theirs to the most similar large
    ones."""
    return _dissolved(r, y, c, least, every=every, strict=strict)


def _dissolved(r, y, c, least, *, every=False, strict=False, numbers=True, all=False):
    sizes = y.bincount(minlength=len(c))
    is_large = sizes > least if strict else sizes >= least
    large = torch.arange(len(c)) if every else is_large.nonzero()[:, 0]
    lost = ~is_large[y] | all
    found = (r[lost] @ c[large].T).argmax(1)
    y = y.clone()
    y[lost] = large[found] if numbers else found
    return y


@exercise(
    inputs=lambda r: [
        (torch.tensor([0, 0, 0, 0, 1, 2, 2]), 0.5),
        (torch.tensor([3, 3, 1, 1, 1, 1]), 1.0),
        (r.integers(4, 30), 0.25),
    ],
    returns={"shares": "one share for each image"},
    mistakes={
        "these do not sum to 1": lambda y, beta: y.bincount()[y].double() ** -beta,
        "the sign of the power is wrong: large clusters need small weights": {"sign": 1},
        "that is the weight of a whole cluster, n^(1 - beta): one image has n^(-beta)": lambda y, beta: (
            (w := y.bincount()[y].double() ** (1 - beta)) / w.sum()
        ),
        "weights of the clusters' shares, not of images: one entry for each image": lambda y, beta: (
            (w := y.unique(return_counts=True)[1].double() ** -beta) / w.sum()
        ),
        "the square root is for beta = 1/2 only": lambda y, beta: (w := y.bincount()[y].double().rsqrt()) / w.sum(),
    },
)
def reweight(y, beta, *, sign=-1):
    """`(y, beta) -> (N,)`: the weight of each image, its cluster's size to the power -beta; the sum is 1."""
    w = y.bincount()[y].double() ** (sign * beta)
    return w / w.sum()


def _binary(p):
    return -p * math.log(p) - (1 - p) * math.log(1 - p)


@exercise(
    inputs=lambda r: [(100, 0.1), (100, 0.97), (10, 0.5), (10000, 0.3)],
    returns={"floor": "one number"},
    mistakes={
        "a changed label may be any of K - 1 others: rho log(K - 1) is missing": {"others": lambda K, rho: 0.0},
        "the label can not change to itself: log(K - 1)": {"others": lambda K, rho: rho * math.log(K)},
        "whether a label changed is uncertain, too: add H_2(rho)": {"whether": lambda rho: 0.0},
        "rho is the probability of a change": lambda K, rho: _binary(rho) + (1 - rho) * math.log(K - 1),
        "that is the best margin, not the loss": lambda K, rho: math.log((K - 1) * (1 - rho) / rho),
        "in nats, not in bits": lambda K, rho: (_binary(rho) + rho * math.log(K - 1)) / math.log(2),
    },
)
def moving(K, rho, *, others=lambda K, rho: rho * math.log(K - 1), whether=_binary):
    """`(K, rho) -> nats`: the least loss of a classifier that knows the last label, if a fraction rho changes at random."""
    return whether(rho) + others(K, rho)


@exercise(
    inputs=lambda r: [(0.1, 1.0), (1.0, 1.0), (0.01, 0.5), (0.5, 0.1)],
    returns={"momentum": "between 0 and 1"},
    mistakes={
        "the lag's part is squared": {"lag": lambda m: m / (1 - m)},
        "delta and sigma are exchanged": lambda delta, sigma: best.solution(sigma, delta),
        "without the lag the best momentum is always near 1": {"lag": lambda m: 0 * m},
        "the variance of the moving average is (1 - m) / (1 + m) of one feature's": {"noise": lambda m: 1 - m},
        "that is the least error: return the momentum": lambda delta, sigma: _error(delta, sigma).min(),
    },
    rtol=5e-3,
    atol=5e-3,
)
def best(delta, sigma, *, lag=lambda m: (m / (1 - m)) ** 2, noise=lambda m: (1 - m) / (1 + m)):
    """`(delta, sigma) -> m` with the least error: features move by delta between visits, their noise is sigma."""
    m = torch.linspace(0, 0.9999, 10000).double()
    return m[(lag(m) * delta**2 + noise(m) * sigma**2).argmin()]


def _error(delta, sigma):
    m = torch.linspace(0, 0.9999, 10000).double()
    return (m / (1 - m)) ** 2 * delta**2 + (1 - m) / (1 + m) * sigma**2
