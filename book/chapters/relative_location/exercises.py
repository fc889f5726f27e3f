"""The exercises of the chapter *Relative location and jigsaw*."""

import math

import torch

from sslbook.notebook.exercises import exercise


def _others(n):
    return [i for i in range(n) if i != n // 2]


@exercise(
    inputs=lambda r: [(r.normal(3, 9, 4),), (r.normal(1, 9, 2),)],
    returns={"pairs": "(8 N, 2 d), the eight pairs of an image in consecutive rows"},
    gradient=True,
    mistakes={
        "the center is paired with itself: position 4 is no neighbor, leave it out": lambda h: torch.cat(
            [h[:, 4:5].expand_as(h), h], 2
        )[:, :8].flatten(0, 1),
        "the center is at index 4: rows of three, so 4 is the middle": [
            lambda h: pairs.solution(h.roll(-4, 1)),
            lambda h: torch.cat([h[:, :1].expand(-1, 8, -1), h[:, 1:]], 2).flatten(0, 1),
        ],
        "neighbor k must stand beside the center of its own image: repeat each center eight times in a row": lambda h: (
            torch.cat([h[:, 4].repeat(8, 1), h[:, _others(9)].flatten(0, 1)], 1)
        ),
        "neighbor first: the center's features are the first half": {"first": False},
        "grouped by position: the eight pairs of one image are consecutive rows": {
            "flatten": lambda x: x.transpose(0, 1).flatten(0, 1)
        },
        "differences: concatenate both, so that the head sees each": lambda h: torch.cat(
            [h[:, 4:5] - h[:, _others(9)], h[:, _others(9)]], 2
        ).flatten(0, 1),
    },
)
def pairs(h, *, first=True, flatten=lambda x: x.flatten(0, 1)):
    """`(h) -> pairs`: the center's features beside those of each of its eight neighbors."""
    center, others = h[:, 4:5].expand(-1, 8, -1), h[:, _others(9)]
    return flatten(torch.cat([center, others] if first else [others, center], 2))


@exercise(
    inputs=lambda r: [([2, 2, 2, 1, 1],), ([1] * 8,), ([8],), ([4, 4],)],
    returns={"accuracy": "a fraction", "loss floor": "in nats"},
    mistakes={
        "in percent: return a fraction": lambda g: (100 * len(g) / 8, twins.solution(g)[1]),
        "in bits: the natural logarithm gives nats": lambda g: (
            len(g) / 8,
            twins.solution(g)[1] / math.log(2),
        ),
        "groups are not equally likely: a group of s positions has probability s / 8": {
            "weight": lambda s, g: 1 / len(g)
        },
        "not the largest group alone: every group adds 1/8 to the accuracy": lambda g: (
            max(g) / 8,
            twins.solution(g)[1],
        ),
        "1 / G is the chance to guess the group: the group is seen, the position in it is guessed": lambda g: (
            1 / len(g),
            twins.solution(g)[1],
        ),
        "the loss is the mean of log s, with a plus: a mean cross-entropy is not negative": lambda g: (
            len(g) / 8,
            -twins.solution(g)[1],
        ),
        "exchanged: the answer is (accuracy, loss)": lambda g: twins.solution(g)[::-1],
        "this is log 8 minus the floor, the information that is there": lambda g: (
            len(g) / 8,
            math.log(8) - twins.solution(g)[1],
        ),
    },
)
def twins(groups, *, weight=lambda s, g: s / 8):
    """`(groups) -> (accuracy, loss)`: the best, if positions of one group look the same."""
    return len(groups) / 8, sum(weight(s, groups) * math.log(s) for s in groups)


@exercise(
    inputs=lambda r: [(0.9, True), (0.6, True), (0.6, False), (0.3, False), (0.0, True)],
    returns={"loss floor": "in nats"},
    mistakes={
        "a random letter points at a position with probability 8/25: it adds uncertainty where one points": lambda r, s: (
            (1 - (r * r if s else r)) * math.log(8)
        ),
        "of 25 letters 8 point at a position, not all": {"letters": 8},
        "with an unknown shift both letters must be correct: rho squared": {"power": lambda shifted: 1},
        "with a fixed layout the center is not needed: rho, not its square": {"power": lambda shifted: 2},
        "exchanged: it is the unknown shift that needs both letters": {"power": lambda shifted: 1 if shifted else 2},
        "in bits: the natural logarithm gives nats": lambda r, s: layout_floor.solution(r, s) / math.log(2),
        "this is log 8 minus the floor, the information that is there": lambda r, s: (
            math.log(8) - layout_floor.solution(r, s)
        ),
        "minus the logarithm of the accuracy is no mean loss: add up the entropy of each observation": lambda r, s: (
            -math.log(1 / 8 + 7 / 8 * (r * r if s else r))
        ),
        "where nothing points at a position all eight are equally likely: that case adds its log 8": {"unseen": 0.0},
        "the position pointed at is not certain: seven others share what is left": {"certain": True},
    },
)
def layout_floor(rho, shifted, *, letters=25, power=lambda shifted: 2 if shifted else 1, certain=False, unseen=8):
    """`(rho, shifted) -> nats`: the smallest loss of the toy."""
    known = rho ** power(shifted)
    other = (1 - known) / letters
    points = known + 8 * other
    p = [(known + other) / points] + 7 * [other / points]
    entropy = 0.0 if certain else -sum(value * math.log(value) for value in p)
    return points * entropy + (1 - points) * (math.log(unseen) if unseen else 0.0)


@exercise(
    inputs=lambda r: [(r.normal(4, 3, 16, 16) + 2 * r.normal(4, 3, 1, 1),), (5 * r.normal(2, 3, 12, 15) - 1,)],
    returns={"patches": "mean 0 and variance 1 in each channel of each patch"},
    mistakes={
        "one mean for the whole batch is batch norm: each patch has its own": {"over": (0, 2, 3)},
        "one mean for all patches and channels: every channel of every patch has its own": {"over": (0, 1, 2, 3)},
        "one mean for all channels: color relations between channels stay in": {"over": (1, 2, 3)},
        "mean and standard deviation run over the pixels of a patch, axes 2 and 3": [
            lambda x, axis=axis: (x - x.mean(axis, keepdim=True)) / x.std(axis, keepdim=True) for axis in range(4)
        ],
        "only the mean is removed: contrast tells patches apart, too": {"scale": lambda x, dims: 1},
        "only the scale is removed: subtract the mean": {"center": lambda x, dims: 0},
        "divided by the variance: divide by its root": {
            "scale": lambda x, dims: x.var(dims, correction=0, keepdim=True)
        },
    },
    rtol=1e-2,
    atol=1e-2,
)
def normalize(
    x,
    *,
    over=(2, 3),
    center=lambda x, dims: x.mean(dims, keepdim=True),
    scale=lambda x, dims: x.std(dims, correction=0, keepdim=True),
):
    """`(x) -> patches`: every channel of every patch (n, 3, h, w) standardized by itself."""
    return (x - center(x, over)) / scale(x, over)


def _moved(r, height, width, shift):
    """Two channels of a smooth field, one moved by a fraction of a pixel, as far as a gradient can say."""
    y, x = torch.meshgrid(torch.arange(height) / 3, torch.arange(width) / 3, indexing="ij")
    a, b, c = r.uniform(3)
    g = torch.sin(x + a) + torch.cos(0.7 * y + b) + 0.5 * torch.sin(x - y + c)
    dy, dx = torch.gradient(g)
    return g, g + shift[0] * dy + shift[1] * dx


@exercise(
    inputs=lambda r: [_moved(r, 10, 10, (0.3, -0.2)), _moved(r, 8, 12, (0.0, 0.5)), _moved(r, 9, 9, (-0.1, -0.1))],
    returns={"rows": "a number", "columns": "a number"},
    mistakes={
        "the sign is reversed: red(r) = green(r + shift), so red - green is shift times slope": lambda g, m: tuple(
            -v for v in shift.solution(g, m)
        ),
        "exchanged: rows first, then columns": lambda g, m: shift.solution(g, m)[::-1],
        "the two slopes are correlated: solve for both together": {"joint": False},
        "this is the sum of products: divide by the squared slopes": {"divide": False},
        "a mean of ratios breaks down where the slope is near 0: solve the least-squares problem": lambda g, m: tuple(
            ((m - g) / slope).mean() for slope in torch.gradient(g)
        ),
    },
    rtol=2e-2,
    atol=2e-3,
)
def shift(green, red, *, joint=True, divide=True):
    """`(green, red) -> (rows, columns)`: by how many pixels red is moved against green, by least squares."""
    slopes = torch.stack([s.flatten() for s in torch.gradient(green)], 1)
    A, b = slopes.T @ slopes, slopes.T @ (red - green).flatten()
    if not divide:
        return tuple(b)
    return tuple(torch.linalg.solve(A, b) if joint else b / A.diagonal())


@exercise(
    inputs=lambda r: [(9, 10), (9, 100), (2, 4), (4, 24), (9, 9)],
    returns={"largest average": "a number"},
    mistakes={
        "K / (K - 1) is missing: a permutation has no distance to itself": lambda n, K: n - 1,
        "pairs of a permutation with itself are counted: divide by K (K - 1)": {"pairs": lambda K: K * K},
        "n is reached only for K up to n: beyond, some permutations agree at each position": lambda n, K: n,
        "this is reached only where K / n is whole: let the counts k_v be whole numbers": lambda n, K: (
            (n - 1) * K / (K - 1)
        ),
        "the counts k_v must sum to K: K mod n of them are greater by one than the others": [
            lambda n, K: n * (K * K - n * (K // n) ** 2) / (K * (K - 1)),
            lambda n, K: n * (K * K - n * (-(-K // n)) ** 2) / (K * (K - 1)),
        ],
        "this is for one position: add up all n": lambda n, K: largest_average.solution(n, K) / n,
        "this is the smallest number of agreements: subtract it from all pairs": {"differ": False},
    },
)
def largest_average(n, K, *, pairs=lambda K: K * (K - 1), differ=True):
    """`(n, K) -> distance`: the largest possible average distance of K permutations of n elements."""
    low, more = divmod(K, n)  # so many of the values stand low + 1 times at a position, the others low times
    agree = more * (low + 1) ** 2 + (n - more) * low**2
    return n * ((K * K - agree) if differ else agree - K) / pairs(K)


@exercise(
    inputs=lambda r: [
        (r.uniform(k, 7).argsort(dim=1), r.uniform(40, 7).argsort(dim=1))
        for k in (20, 18, 15, 12, 10, 8, 6, 5, 4, 3, 2, 1)
    ],
    returns={"distance": "of the permutation that is added to the nearest one chosen"},
    mistakes={
        "the greatest average: then the nearest may be very near, take the minimum over those chosen": {
            "reduce": lambda d: d.double().mean(0)
        },
        "the farthest of those chosen: take the nearest": {"reduce": lambda d: d.amax(0)},
        "only the last one chosen is looked at": {"reduce": lambda d: d[-1]},
        "agreements: the Hamming distance counts the positions that differ": {
            "distance": lambda a, b: (a == b).sum(-1)
        },
        "axes exchanged: the minimum runs over those chosen, then the maximum over candidates": lambda c, p: (
            (c[:, None] != p[None]).sum(2).amin(1).amax()
        ),
        "this is the index of a candidate: return its distance to the nearest one chosen": lambda c, p: (
            (c[:, None] != p[None]).sum(2).amin(0).argmax()
        ),
        "this is the candidate itself: return its distance to the nearest one chosen": lambda c, p: p[
            (c[:, None] != p[None]).sum(2).amin(0).argmax()
        ],
        "the nearest candidate: take the one whose smallest distance is largest": {"best": torch.argmin},
    },
)
def greedy_distance(
    chosen,
    pool,
    *,
    distance=lambda a, b: (a != b).sum(-1),
    reduce=lambda d: d.amin(0),
    best=torch.argmax,
):
    """`(chosen, pool) -> distance`: what one step of the greedy choice gains."""
    pick = best(reduce(distance(chosen[:, None], pool[None])))
    return (pool[pick] != chosen).sum(1).min()


@exercise(
    inputs=lambda r: [([2, 2, 9], 0.5), ([8] * 99, 0.6), ([9, 8, 7, 4], 0.9), ([], 0.3)],
    returns={"bound": "the error is at most this fraction"},
    mistakes={
        "the factor 1/2 is missing: of two candidates that are left, one is right by luck": {"half": 1.0},
        "q is the probability that a patch IS recognized: all d must fail": {"fail": lambda q: q},
        "1 - q**d is the probability that not all are recognized: none must be, (1 - q)**d": lambda d, q: (
            0.5 * sum(1 - q**k for k in d)
        ),
        "the average distance in place of the sum: near permutations dominate": lambda d, q: (
            0.5 * len(d) * (1 - q) ** (sum(d) / len(d)) if d else 0.0
        ),
        "the nearest alone: add up all of them": lambda d, q: 0.5 * (1 - q) ** min(d) if d else 0.0,
        "divided by the number of permutations: the others add up, they are not averaged": lambda d, q: (
            ambiguity.solution(d, q) / max(1, len(d))
        ),
    },
)
def ambiguity(distances, q, *, half=0.5, fail=lambda q: 1 - q):
    """`(distances, q) -> bound` of the error for one permutation, from its distances to all the others."""
    return half * sum(fail(q) ** d for d in distances)
