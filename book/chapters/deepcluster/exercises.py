"""The exercises of the chapter *DeepCluster*."""

import math

import torch
import torch.nn.functional as F
from scipy.optimize import linear_sum_assignment

from sslbook.notebook.exercises import exercise


@exercise(
    inputs=lambda r: [(3 * r.normal(9, 4), r.normal(3, 4)), (r.normal(6, 2), 2 * r.normal(5, 2))],
    returns={"numbers": "one number for each row of u, below K"},
    mistakes={
        "the farthest centroid: take the smallest distance": {"pick": lambda d: d.argmax(1)},
        "the nearest row for each centroid: it must be the other way round": lambda u, c: torch.cdist(u, c).argmin(0),
        "the largest inner product: that is right only for centroids of equal length": {"far": lambda u, c: -u @ c.T},
        "the squared length of the centroid counts by half: |u - c|^2 has -2 u c and |c|^2": {
            "far": lambda u, c: c.square().sum(1) - u @ c.T
        },
        "directions alone are compared: that is spherical k-means": {
            "far": lambda u, c: -F.normalize(u, dim=1) @ F.normalize(c, dim=1).T
        },
        "these are centroids: return their numbers": lambda u, c: c[assign.solution(u, c)],
        "these are distances: return the numbers of the clusters": {"pick": lambda d: d.amin(1)},
    },
)
def assign(u, c, *, far=torch.cdist, pick=lambda d: d.argmin(1)):
    """`(u, c) -> (N,)`: the number of the nearest centroid for each row of u (N, d), with c (K, d)."""
    return pick(far(u, c))


@exercise(
    inputs=lambda r: [
        (r.normal(8, 3), torch.tensor([0, 0, 1, 1, 1, 3, 3, 3]), r.normal(4, 3)),
        (r.normal(5, 2), torch.tensor([2, 2, 0, 0, 2]), r.normal(3, 2)),
    ],
    returns={"centroids": "the shape of c"},
    mistakes={
        "an empty cluster became NaN or 0: keep its centroid": [
            lambda u, y, c: F.one_hot(y, len(c)).to(u.dtype).T @ u / y.bincount(minlength=len(c))[:, None],
            lambda u, y, c: F.one_hot(y, len(c)).to(u.dtype).T @ u / y.bincount(minlength=len(c)).clamp(min=1)[:, None],
        ],
        "these are sums: divide by the sizes": lambda u, y, c: torch.where(
            y.bincount(minlength=len(c))[:, None] > 0, F.one_hot(y, len(c)).to(u.dtype).T @ u, c
        ),
        "divided by the number of all rows: divide by the size of the cluster": lambda u, y, c: torch.where(
            y.bincount(minlength=len(c))[:, None] > 0, F.one_hot(y, len(c)).to(u.dtype).T @ u / len(u), c
        ),
        "the old centroid counts as one more row: leave it out": lambda u, y, c: (
            c.index_add(0, y, u) / (y.bincount(minlength=len(c))[:, None] + 1)
        ),
        "length 1 belongs to spherical k-means: here the centroid is the mean itself": lambda u, y, c: F.normalize(
            means.solution(u, y, c), dim=1
        ),
        "the mean of the rows and the old centroid: a full step goes to the mean": lambda u, y, c: (
            (means.solution(u, y, c) + c) / 2
        ),
        "every centroid is the mean of all rows": lambda u, y, c: u.mean(0).expand(len(c), -1),
    },
)
def means(u, y, c):
    """`(u, y, c) -> (K, d)`: the mean of each cluster's rows; an empty cluster keeps its centroid."""
    new = c.clone()
    for j in y.unique():
        new[j] = u[y == j].mean(0)
    return new


@exercise(
    inputs=lambda r: [(torch.tensor([0, 0, 0, 1, 2, 2]),), (torch.tensor([1, 1, 1, 1]),), (r.integers(7, 40),)],
    returns={"loss": "one number"},
    mistakes={
        "log K is the entropy of equal clusters only": lambda y: math.log(len(y.unique())),
        "the logarithm is to base 2": {"log": torch.log2},
        "the sign is wrong: entropy is not negative": lambda y: -floor.solution(y),
        "these are counts: frequencies are counts divided by N": lambda y: (
            -(n := _share(y) * len(y)).mul(n.log()).sum()
        ),
        "the mean over clusters: the entropy is the sum": lambda y: floor.solution(y) / len(_share(y)),
        "0 log 0 gave NaN: a number that no image has adds nothing": lambda y: (
            -(p := y.bincount().double() / len(y)).mul(p.log()).sum()
        ),
        "this is the perplexity: leave out the exponential": lambda y: floor.solution(y).exp(),
        "each cluster counts by its frequency, not all alike": lambda y: -_share(y).log().mean(),
        "this is the largest frequency's -log: average over all images": lambda y: -_share(y).max().log(),
    },
)
def floor(y, *, log=torch.log):
    """`(y) -> nats`: the least loss of a classifier whose output does not depend on the image."""
    p = _share(y)
    return -(p * log(p)).sum()


def _share(y):
    return torch.as_tensor(y).unique(return_counts=True)[1].double() / len(y)


@exercise(
    inputs=lambda r: [(torch.tensor([0, 0, 0, 1, 3, 3]),), (torch.tensor([2, 2, 0, 0, 0, 0, 0, 2, 1]),)],
    returns={"weights": "one weight for each image"},
    mistakes={
        "these sum to the number of images or clusters: the mean over clusters needs a sum of 1": [
            lambda y: uniform.solution(y) * len(y),
            lambda y: uniform.solution(y) * len(y.unique()),
        ],
        "empty clusters must not count": {"clusters": lambda y: int(y.max()) + 1},
        "proportional to the size: large clusters need small weights": lambda y: (
            (s := y.bincount()[y].double()) / s.sum()
        ),
        "all images alike: that is the mean over images": lambda y: torch.full((len(y),), 1 / len(y)),
    },
)
def uniform(y, *, clusters=lambda y: len(y.unique())):
    """`(y) -> (N,)`: how much each image's loss counts, such that non-empty clusters count alike; the sum is 1."""
    return 1 / (clusters(y) * y.bincount()[y].double())


@exercise(
    inputs=lambda r: [(10, 3.0), (2, 1.5), (100, 0.0), (1000, 8.0)],
    returns={"loss": "one number"},
    mistakes={
        "that is the loss of an unchanged number: most numbers change": lambda K, s: math.log1p((K - 1) * math.exp(-s)),
        "a random number is the old one with probability 1/K": {"keep": lambda K: 0.0},
        "the probability of a change is 1 - 1/K": {"keep": lambda K: 1 - 1 / K},
        "a random number may be the old one: the change has 1 - 1/K, and not a share of K - 1": lambda K, s: (
            math.log1p((K - 1) * math.exp(-s)) + (1 - 1 / max(K - 1, 1)) * s
        ),
        "the margin is paid where the number has changed: plus": lambda K, s: (
            math.log1p((K - 1) * math.exp(-s)) - (1 - 1 / K) * s
        ),
        "that is a new classifier's loss, log K": lambda K, s: math.log(K),
        "there are K - 1 other labels": {"others": lambda K: K},
    },
)
def stale(K, s, *, keep=lambda K: 1 / K, others=lambda K: K - 1):
    """`(K, s) -> loss` of an old classifier with margin s after its clusters were numbered anew at random."""
    return math.log(1 + others(K) * math.exp(-s)) + (1 - keep(K)) * s


def _greedy(a, b, K):
    counts, total = _counts(a, b, K), 0
    for _ in range(K):
        row, column = divmod(int(counts.argmax()), K)
        total += counts[row, column].item()
        counts[row], counts[:, column] = -1, -1
    return total / len(a)


@exercise(
    inputs=lambda r: [
        (torch.tensor([0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 2, 2]), torch.tensor([1, 1, 1, 1, 2, 2, 2, 1, 1, 1, 0, 0]), 3),
        (r.integers(5, 60), r.integers(5, 60), 5),
    ],
    returns={"fraction": "between 0 and 1"},
    mistakes={
        "these are equal numbers: first find which new cluster continues which old one": lambda a, b, K: (
            (a == b).double().mean()
        ),
        "two new clusters continue the same old one: the matching must be one-to-one": [
            lambda a, b, K: _counts(a, b, K).amax(1).sum() / len(a),
            lambda a, b, K: _counts(a, b, K).amax(0).sum() / len(a),
        ],
        "the largest count first is not the best matching: its row and column may cost more elsewhere": _greedy,
        "in percent: return a fraction": lambda a, b, K: 100 * matched.solution(a, b, K),
        "this is the fraction that changes its cluster": lambda a, b, K: 1 - matched.solution(a, b, K),
        "the worst matching: maximize": {"maximize": False},
        "a number of images: divide by all": lambda a, b, K: matched.solution(a, b, K) * len(a),
    },
)
def matched(a, b, K, *, maximize=True):
    """`(a, b, K) -> fraction` of the images that keep their cluster under the best one-to-one matching."""
    counts = _counts(a, b, K)
    rows, columns = linear_sum_assignment(counts.numpy(), maximize=maximize)
    return counts[rows, columns].sum() / len(a)


def _counts(a, b, K):
    return (a * K + b).bincount(minlength=K * K).view(K, K).double()


def _entropy(*labels):
    p = torch.stack(labels).unique(dim=1, return_counts=True)[1].double() / len(labels[0])
    return torch.special.entr(p).sum()


@exercise(
    inputs=lambda r: [
        (r.integers(4, 50), r.integers(3, 50)),
        (torch.tensor([0, 0, 1, 1, 2, 2]), torch.tensor([1, 1, 0, 0, 0, 2])),
    ],
    returns={"NMI": "one number from 0 to 1"},
    mistakes={
        "this is mutual information: divide by the geometric mean of the entropies": {"scale": lambda a, b: 1.0},
        "divided by the arithmetic mean of the entropies: scikit-learn's default, not the paper's": {
            "scale": lambda a, b: (a + b) / 2
        },
        "divided by the sum of the entropies: the largest value is then 1/2": {"scale": lambda a, b: a + b},
        "divided by the entropy of both together": lambda a, b: (
            nmi.solution(a, b) * ((_entropy(a) * _entropy(b)) ** 0.5 / _entropy(a, b))
        ),
        "log K is the entropy of equal clusters only": lambda a, b: (
            nmi.solution(a, b)
            * ((_entropy(a) * _entropy(b)) ** 0.5 / (math.log(int(a.max()) + 1) * math.log(int(b.max()) + 1)) ** 0.5)
        ),
        "logarithms of different base": lambda a, b: nmi.solution(a, b) / math.log(2),
        "divided by the larger entropy": {"scale": max},
        "divided by the smaller entropy": {"scale": min},
        "the product of the entropies: take its square root": {"scale": lambda a, b: a * b},
        "equal numbers: the names of clusters mean nothing": lambda a, b: (a == b).double().mean(),
    },
)
def nmi(a, b, *, scale=lambda a, b: (a * b) ** 0.5):
    """`(a, b) -> NMI` of two partitions with at least two clusters each."""
    H_a, H_b = _entropy(a), _entropy(b)
    return (H_a + H_b - _entropy(a, b)) / scale(H_a, H_b)


def _equal(A, B):
    return math.sqrt(math.log(A) * math.log(B))


@exercise(
    inputs=lambda r: [(100, 10, 4000), (100, 100, 4000), (10000, 1000, 1281167)],
    returns={"NMI": "one number"},
    mistakes={
        "unrelated partitions of a sample do not have 0": lambda A, B, N: 0.0,
        "this is the expected mutual information: divide by the entropies": {"scale": lambda A, B: 1.0},
        "2 N I is chi-squared: divide by 2": {"half": 1.0},
        "the degrees of freedom are (A - 1)(B - 1)": {"free": lambda A, B: A * B},
        "the arithmetic mean of the entropies: take the geometric": {
            "scale": lambda A, B: (math.log(A) + math.log(B)) / 2
        },
        "the logarithm is to base 2": {"scale": lambda A, B: math.sqrt(math.log2(A) * math.log2(B))},
        "the geometric mean of the entropies is sqrt(log A log B)": {"scale": lambda A, B: math.log(A) * math.log(B)},
    },
)
def unrelated(A, B, N, *, half=0.5, free=lambda A, B: (A - 1) * (B - 1), scale=_equal):
    """`(A, B, N) -> NMI` to expect of unrelated partitions of N images into A and B clusters of equal size."""
    return half * free(A, B) / N / scale(A, B)


@exercise(
    inputs=lambda r: [(r.normal(40, 3) @ r.normal(3, 3),), (r.normal(60, 2) * torch.tensor([10.0, 0.1]) + 5,)],
    returns={"distances": "one for each pair of images (N, N)"},
    rtol=1.5e-2,  # covariances over N and N - 1 are both right
    atol=4e-2,  # of torch.cdist in float32, where distances are near 0
    mistakes={
        "length 1 after whitening: return the distances before": lambda h: torch.cdist(
            *[F.normalize(_whiten(h, -0.5), dim=1)] * 2
        ),
        "the sum over the rows is no covariance: divide by their number": lambda h: (
            whitened.solution(h) / len(h) ** 0.5
        ),
        "these are the whitened features: return the distances between them": lambda h: _whiten(h, -0.5),
        "these are plain distances: whiten first": lambda h: torch.cdist(h.double(), h.double()),
        "divided by the variance: divide by the standard deviation": {"power": -1.0},
        "multiplied by the standard deviation: divide": {"power": 0.5},
        "the features are divided by their own standard deviations: turn to principal components first": lambda h: (
            torch.cdist(*[(h / h.std(0, correction=0)).double()] * 2)
        ),
        "squared: take the root": lambda h: whitened.solution(h) ** 2,
    },
)
def whitened(h, *, power=-0.5):
    """`(h) -> (N, N)`: distances of the whitened features, all components kept, before they get unit length."""
    u = _whiten(h, power)
    return (u[:, None] - u[None]).norm(dim=2)


def _whiten(h, power):
    x = h.double() - h.double().mean(0)
    values, V = torch.linalg.eigh(x.T @ x / len(x))
    return x @ V * values**power
