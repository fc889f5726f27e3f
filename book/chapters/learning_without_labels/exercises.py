"""The exercises of the chapter *Learning without labels*."""

import math

import torch
import torch.nn.functional as F

from sslbook.notebook.exercises import exercise


def _overwritten(s, y, k, tau, num_classes):
    top, index = s.topk(k)
    scores = torch.zeros(len(s), num_classes)
    scores[torch.arange(len(s))[:, None], y[index]] += (top / tau).exp()
    return scores


@exercise(
    inputs=lambda r: [
        *[(r.normal(8, 40).tanh(), r.integers(3, 40), k, tau, 3) for k, tau in ((5, 0.5), (1, 0.5), (20, 0.1))],
        (r.normal(4, 6).tanh(), torch.zeros(6, dtype=torch.int64), 3, 0.5, 5),
    ],
    returns={"votes": "one row per query, one column per class (num_classes, not labels.max())"},
    compare=lambda scores: scores / scores.sum(-1, keepdim=True),  # a factor for each query decides nothing
    mistakes={
        "every neighbor has one vote: weigh each by exp(similarity / temperature)": {"weight": lambda s, tau: s**0},
        "the temperature multiplies: the weight is exp(similarity / temperature)": {
            "weight": lambda s, t: (s * t).exp()
        },
        "the temperature has no effect: the weight is exp(similarity / temperature)": {
            "weight": lambda s, tau: s.exp()
        },
        "the exponential is missing: the weight is exp(similarity / temperature)": {"weight": lambda s, tau: s / tau},
        "the whole bank votes: keep only the k most similar": lambda s, y, k, *rest: knn_vote.solution(
            s, y, len(y), *rest
        ),
        "the k least similar vote: take the largest similarities": {"largest": False},
        "of two neighbors with one class only one is counted: add their weights (scatter_add)": _overwritten,
    },
)
def knn_vote(s, y, k, tau, num_classes, *, weight=lambda s, tau: ((s - 1) / tau).exp(), largest=True):
    """`(similarity (query, bank), labels, k, temperature, num_classes) -> scores`, up to a factor for each query."""
    top, index = s.topk(k, largest=largest)
    return torch.zeros(len(s), num_classes).scatter_add(1, y[index], weight(top, tau))


def _state(r, known, new, start, rounded):
    best, s = r.normal(6, known), r.normal(6, new)
    best, s = (best.round(), s.round()) if rounded else (best, s)
    return best.sort(1, descending=True)[0], torch.arange(known).repeat(6, 1) * (start // max(known, 1)), s, start


def _last_of_equals(x, **how):
    top, place = x.flip(1).sort(**how)
    return top, x.shape[1] - 1 - place


@exercise(
    inputs=lambda r: [(*_state(r, 5, 7, 30, 0), 5), (*_state(r, 0, 4, 0, 0), 6), (*_state(r, 4, 30, 100, 1), 6)],
    returns={"similarities": "the k best, or all where fewer have been seen", "indices": "one for each similarity"},
    mistakes={
        "only the new chunk was searched: the k best so far compete as well": lambda best, index, *rest: (
            merge_neighbors.solution(best[:, :0], index[:, :0], *rest)
        ),
        "the k least similar are kept: take the largest": {"largest": False},
        "not sorted: the nearest comes first": lambda *a: [v.flip(1) for v in merge_neighbors.solution(*a)],
        "columns of the chunk are not indices of the bank: add start": {"offset": lambda start, known: 0},
        "columns of the concatenation are not indices of the bank: look up which entry stands there": {"lookup": False},
        "start counts from the bank's first entry, whatever is known already": {
            "offset": lambda start, known: start + known
        },
        "ties: of equally similar ones the lower index comes first (a stable sort, known before new)": [
            {"sort": _last_of_equals},
            {"sort": lambda x, **how: x.topk(x.shape[1], 1)},
        ],
    },
)
def merge_neighbors(
    best, index, s, start, k, *, offset=lambda start, known: start, lookup=True, sort=torch.sort, largest=True
):
    """`(best, index, similarity, start, k) -> (best, index)`; of equally similar ones the lower index first."""
    both = torch.cat([best, s], 1)
    ids = torch.cat([index, (offset(start, best.shape[1]) + torch.arange(s.shape[1])).expand_as(s)], 1)
    top, place = sort(both, dim=1, descending=largest, stable=True)
    return top[:, :k], ids.gather(1, place[:, :k]) if lookup else place[:, :k]


@exercise(
    inputs=lambda r: [(0.3, 2), (0.5, 3), (0.9, 2)],
    returns={"posterior": ""},
    mistakes={
        "nothing changes: the copies vote as well": lambda p, m: p,
        "above 1: divide by the sum over the classes": lambda p, m: m * p,
        "these are the odds: the posterior is odds / (1 + odds)": lambda p, m: m * p / (1 - p),
        "the other class has the copies": lambda p, m: p / (p + m * (1 - p)),
        "copies raise the weight m times, not to the power m": lambda p, m: p**m / (p**m + (1 - p) ** m),
    },
)
def posterior_with_copies(p, copies):
    """`(posterior of class 1, copies) -> posterior` that the vote of all images gives when class 1 is stored `copies` times."""
    return copies * p / (copies * p + 1 - p)


@exercise(
    inputs=lambda r: [(0.1,), (0.5,), (0.8,)],
    returns={"error": ""},
    mistakes={
        "this is the best rule's error: the neighbor's label is random as well": lambda eta: min(eta, 1 - eta),
        "this is the upper bound, twice the best rule's error": lambda eta: 2 * min(eta, 1 - eta),
        "half of it: the labels differ in two ways": lambda eta: eta * (1 - eta),
        "this is the accuracy: the probability that the labels agree": lambda eta: eta**2 + (1 - eta) ** 2,
    },
)
def nearest_neighbor_error(eta):
    """`(probability of class 1) -> error` of the nearest neighbor, with endless training images."""
    return 2 * eta * (1 - eta)


def _probe_inputs(r):
    for n, dim, classes, decay in ((7, 4, 3, 0.5), (20, 3, 5, 0.01)):
        yield (
            r.normal(dim, classes),
            torch.cat([r.normal(n, dim - 1), torch.ones(n, 1)], 1),
            r.integers(classes, n),
            decay,
        )
    yield 300 * torch.eye(3), torch.eye(3), torch.arange(3), 0.0


@exercise(
    inputs=_probe_inputs,
    returns={"gradient": "the shape of w"},
    mistakes={
        "the decay is missing: add the gradient of the penalty": {"penalty": 0},
        "the bias decays too: the last row of w belongs to the appended 1": {"bias": 1},
        "the penalty has a half in front: its gradient is decay * w": {"penalty": 2},
        "the decay has the wrong sign: it pulls the weights to zero": {"penalty": -1},
        "this is the gradient of the sum: the loss is a mean over the images": {"scale": len},
        "the sign of the loss is reversed: it is softmax minus one-hot": {"scale": lambda z: -1},
        "the one-hot labels are missing: without them the probe only learns to be unsure": {"target": 0},
        "the softmax is missing: logits are not probabilities": {"p": lambda a: a},
        "the label's number is subtracted: subtract its one-hot vector": lambda w, z, y, decay: (
            z.T @ ((z @ w).softmax(1) - y[:, None]) / len(z) + decay * torch.cat([w[:-1], 0 * w[-1:]])
        ),
        "the softmax runs over the images: each row is one image's distribution (dim=1)": {"p": lambda a: a.softmax(0)},
        "not finite for logits of 300: use softmax, not exp": {"p": lambda a: a.exp() / a.exp().sum(1, keepdim=True)},
    },
)
def probe_gradient(w, z, y, decay, *, p=lambda a: a.softmax(1), target=1, scale=lambda z: 1, bias=0, penalty=1):
    """`(w, z, y, decay) -> gradient` of the loss plus half the decay times the squared weights, bias excepted."""
    pull = penalty * decay * torch.cat([w[:-1], bias * w[-1:]])
    return scale(z) * z.T @ (p(z @ w) - target * F.one_hot(y, w.shape[1])) / len(z) + pull


@exercise(
    inputs=lambda r: [
        (3 * r.normal(50, 4) + 2, 5 * r.normal(20, 4) - 1),
        (
            torch.cat([r.normal(30, 2), torch.full((30, 1), 0.5)], 1),
            torch.cat([r.normal(9, 2), torch.full((9, 1), 0.5)], 1),
        ),
    ],
    returns={"training features": "as given", "test features": "as given"},
    rtol=2e-2,  # n or n - 1 in the variance: both are in use
    atol=2e-2,
    mistakes={
        "each image was standardized by itself: mean and std are those of a feature (dim=0)": {"dim": 1},
        "one mean and one std for all features: each has its own": {"dim": (0, 1)},
        "the mean was not subtracted": {"shift": 0},
        "divided by the variance: divide by its root": {"power": 2},
        "the test features were standardized by themselves: the probe was trained in the other coordinates": {"of": 1},
        "mean and std of both splits together: test images must not influence the training": lambda a, b: (
            standardize.solution(torch.cat([a, b]), a)[1],
            standardize.solution(torch.cat([a, b]), b)[1],
        ),
        "the test features are unchanged": lambda a, b: (standardize.solution(a, b)[0], b),
        "a constant feature gives NaN: its standard deviation is 0, divide by 1 instead": {"least": -1},
    },
)
def standardize(train, test, *, dim=0, shift=1, power=1, of=0, least=1e-6):
    """`(train_x, test_x) -> both standardized`, with mean and standard deviation of the training set."""

    def apply(x, source):
        source = x if dim == 1 else source
        std = source.std(dim, keepdim=True, correction=0)
        return (x - shift * source.mean(dim, keepdim=True)) / torch.where(std > least, std, 1) ** power

    return apply(train, train), apply(test, test if of else train)


@exercise(
    inputs=lambda r: [(0.5, 0.03, 1.96), (0.75, 0.021, 1.3), (0.9, 0.02, 1.96)],  # none near a whole number
    returns={"images": "one number"},
    rtol=0,
    atol=0.1,
    mistakes={
        "rounded down: with one image less the interval is too wide (math.ceil)": [{"end": math.floor}, {"end": round}],
        "not a whole number: round up": {"end": float},
        "the interval reaches half_width to either side, so its whole width is twice that": {"by": 4},
        "half_width is half the width already: do not halve it": {"by": 1 / 4},
        "z is not used": lambda p, half, z: images_needed.solution(p, half, 1),
        "the variance of one prediction is p (1 - p), not p": lambda p, half, z: math.ceil(p * (z / half) ** 2),
        "the standard deviation falls with the root of n: square the ratio": lambda p, half, z: math.ceil(
            math.sqrt(p * (1 - p)) * z / half
        ),
    },
)
def images_needed(p, half, z, *, by=1.0, end=math.ceil):
    """`(accuracy, half_width, z) -> n`: the fewest test images for z standard deviations within half_width."""
    return end(by * p * (1 - p) * (z / half) ** 2)


@exercise(
    inputs=lambda r: [(a := r.normal(n) > -0.6, (r.normal(n) > 1) ^ a) for n in (40, 300)],
    returns={"difference": "one number", "standard deviation": "one number"},
    rtol=2e-2,  # n or n - 1
    mistakes={
        "the sign is reversed: a minus b": {"sign": -1},
        "in percent: give fractions": lambda a, b: [100 * v for v in paired_difference.solution(a, b)],
        "this is the fraction on which they disagree": lambda a, b: ((a ^ b).double().mean(), 0),
        "this is the standard deviation for two separate sets of images: here both use the same": {
            "std": lambda d, a, b: sum(x.double().var() / len(d) for x in (a, b)).sqrt()
        },
        "this is the std of one image: the mean of n has it over sqrt(n)": {"std": lambda d, a, b: d.std()},
        "this is the variance: take its root": {"std": lambda d, a, b: d.var() / len(d)},
        "divided by n: the std of a mean falls with sqrt(n)": {"std": lambda d, a, b: d.std() / len(d)},
    },
)
def paired_difference(a, b, *, sign=1, std=lambda d, a, b: d.std(correction=0) / len(d) ** 0.5):
    """`(correct_a, correct_b) -> (difference, std)` of two accuracies on the same images, as fractions."""
    d = a.double() - b.double()
    return sign * d.mean(), std(d, a, b)


@exercise(
    inputs=lambda r: [
        *[(r.normal(n, dim) @ r.normal(dim, dim) + 1,) for n, dim in ((60, 5), (200, 12))],
        (r.normal(30, 1) @ r.normal(1, 6),),
    ],
    returns={"participation ratio": "one number"},
    rtol=1e-2,
    mistakes={
        "the features are not centered: their mean counts as a direction of its own": {"center": 0},
        "singular values instead of variances: square them first": {"values": lambda c: torch.linalg.svdvals(c)},
        "the features' own variances: off-diagonal entries of the covariance count as well": {
            "values": lambda c: c.var(0)
        },
        "upside down": {"power": -1},
        "the trace is not squared": lambda h: participation_ratio.solution(h) / (h - h.mean(0)).square().sum(),
    },
)
def participation_ratio(h, *, center=1, values=lambda c: torch.linalg.svdvals(c).square(), power=1):
    """`(h) -> number`: (sum of variances)^2 / sum of squared variances, over the principal directions."""
    variance = values((h - center * h.mean(0)).double())
    return (variance.sum() ** 2 / variance.square().sum()) ** power


@exercise(
    inputs=lambda r: [(0.5, 100, 0.0), (0.8, 1000, 0.6)],
    returns={"optimism": ""},
    mistakes={
        "the correlation is not used: only what differs between the two decides": {"factor": lambda rho: 1},
        "the variance of the difference is 2 (1 - rho)": [
            {"factor": lambda rho: 1 - rho**2},
            {"factor": lambda rho: (1 - rho) ** 2},
            {"factor": lambda rho: 1 + rho},
        ],
        "half the distance: the maximum is the mean plus half of |a - b|": {"factor": lambda rho: 4 * (1 - rho)},
        "without 1 / sqrt(pi), the mean of the larger of two": {"factor": lambda rho: math.pi * (1 - rho)},
        "this is the variance: take its root": {"power": 1},
        "in percent: give a fraction": lambda p, n, rho: 100 * optimism_of_two.solution(p, n, rho),
    },
)
def optimism_of_two(p, n, rho, *, factor=lambda rho: 1 - rho, power=0.5):
    """`(accuracy, images, correlation) -> optimism` of the better of two equally good settings."""
    return (factor(rho) * p * (1 - p) / (math.pi * n)) ** power
