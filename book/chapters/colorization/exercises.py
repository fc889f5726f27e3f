"""The exercises of the chapter *Colorization and inpainting*."""

import math

import torch
import torch.nn.functional as F

from sslbook.notebook.exercises import exercise


@exercise(
    inputs=lambda r: [(20 * r.normal(30, 2) + 5,), (torch.tensor([[40.0, 0.0], [-40.0, 10.0], [0.0, 30.0]]),)],
    returns={"ratio": "one number"},
    mistakes={
        "this is the length of the mean alone: divide by the mean of the lengths": lambda ab: ab.mean(0).norm(),
        "upside down: the mean's length over the mean length, at most 1": lambda ab: 1 / saturation.solution(ab),
        "the mean over a and b: average over colors": lambda ab: ab.mean(1).norm() / ab.norm(dim=1).mean(),
        "the root of the mean square is not the mean length": {"size": lambda ab: ab.square().sum(1).mean().sqrt()},
        "lengths add up without their directions: average the colors first": lambda ab: ab.norm(dim=1).mean() ** 0,
    },
)
def saturation(ab, *, size=lambda ab: ab.norm(dim=1).mean()):
    """`(ab) -> ratio` of the chroma of the mean color to the mean chroma, for colors ab (n, 2)."""
    return ab.mean(0).norm() / size(ab)


def _bins(width=10):
    side = torch.arange(-30, 31, width).float()
    return torch.cartesian_prod(side, side)


@exercise(
    inputs=lambda r: [(15 * r.normal(12, 2), _bins(), 5.0), (10 * r.normal(6, 2), _bins(20), 10.0)],
    returns={"Z": "one row a color, one column a bin"},
    mistakes={
        "all bins share the color: keep the 5 nearest": {"k": 49},
        "one bin: give each of the 5 nearest its share": {"k": 1},
        "equal shares: weight the 5 by a Gaussian of the distance": {"power": 0.0},
        "the shares do not sum to 1: divide by their sum": {"normalize": lambda z: z},
        "the Gaussian is exp(-d^2 / (2 sigma^2)): the factor 2 is missing": {"half": 1.0},
        "the distance is not squared": {"power": 1.0},
    },
)
def soft(ab, bins, sigma, *, k=5, power=2.0, half=0.5, normalize=lambda z: z / z.sum(1, keepdim=True)):
    """`(ab, bins, sigma) -> (n, Q)`: each color as a distribution over its 5 nearest bins."""
    d = (ab[:, None] - bins).norm(dim=2).double()
    k = min(k, len(bins))
    z = torch.exp(-half * d**power / sigma**power)
    return normalize(z * (d <= d.topk(k, dim=1, largest=False).values[:, -1:]))


@exercise(
    inputs=lambda r: [((3 * r.normal(20)).softmax(0), 0.5), (torch.tensor([0.7, 0.2, 0.1]), 0.1)],
    returns={"weights": "one weight a bin"},
    mistakes={
        "the expected weight is not 1: divide by the sum of p times the weights": {"scale": lambda w, p: 1.0},
        "the mean over bins is 1, but colors are not equally frequent: average with p": {
            "scale": lambda w, p: w.mean()
        },
        "rare colors must count more: invert": {"power": 1.0},
        "the root of the inverse: the exponent is -1": {"power": -0.5},
        "lambda belongs to the uniform distribution, 1 - lambda to p": {"swap": True},
        "the uniform distribution is 1 / Q, not 1": {"uniform": lambda p: 1.0},
    },
)
def weights(p, lam, *, power=-1.0, swap=False, uniform=lambda p: 1 / len(p), scale=lambda w, p: (w * p).sum()):
    """`(p, lam) -> (Q,)`: the weights of the bins from their smoothed frequencies p."""
    share = lam if not swap else 1 - lam
    w = ((1 - share) * p + share * uniform(p)) ** power
    return w / scale(w, p)


@exercise(
    inputs=lambda r: [(2 * r.normal(5, 49), _bins(), 0.38), (r.normal(3, 16), _bins(20), 1.0)],
    returns={"colors": "one color (a, b) for each row of logits"},
    mistakes={
        "this is the mean (T = 1): divide the logits by T": {"heat": lambda x, T: x},
        "multiplied by T: divide, so that a low temperature sharpens": {"heat": lambda x, T: x * T},
        "this is the mode: average the bins with the sharpened probabilities": lambda x, bins, T: bins[x.argmax(1)],
        "the softmax runs over rows: it must run over bins": {"dim": 0},
    },
)
def annealed(logits, bins, T, *, heat=lambda x, T: x / T, dim=1):
    """`(logits, bins, T) -> (n, 2)`: the mean color at temperature T."""
    return torch.softmax(heat(logits, T), dim) @ bins


@exercise(
    inputs=lambda r: [
        ((2 * r.normal(4, 6)).softmax(1), 0.2 + 3 * r.uniform(6)),
        (r.uniform(2, 3).softmax(1), r.uniform(3) + 1),
    ],
    returns={"p": "one distribution for each row"},
    mistakes={
        "tilted once more: divide by the weights": {"power": 1.0},
        "the rows do not sum to 1: normalize": {"normalize": lambda p: p},
        "normalized over rows: over bins": {"normalize": lambda p: p / p.sum(0)},
        "these are still the network's predictions": lambda q, w: q,
    },
)
def untilted(q, w, *, power=-1.0, normalize=lambda p: p / p.sum(1, keepdim=True)):
    """`(q, w) -> p`: the probabilities behind the optimal predictions q (n, Q) of a loss with weights w (Q,)."""
    return normalize(q * w**power)


@exercise(
    inputs=lambda r: [((3 * r.normal(7, 5)).softmax(1),), (torch.eye(4, 6),)],
    returns={"loss": "one number"},
    mistakes={
        "this is the mean of the entropies, as if each image could be distinguished: average the targets first": lambda z: (
            torch.special.entr(z).sum(1).mean()
        ),
        "log of the number of bins: only for a uniform mean": lambda z: math.log(z.shape[1]),
        "the logarithm is to base 2": {"unit": math.log(2)},
        "the sign is wrong": {"unit": -1.0},
        "averaged over bins: sum over them": lambda z: torch.special.entr(z.mean(0)).mean(),
    },
)
def floor(z, *, unit=1.0):
    """`(z) -> nats`: the least mean cross-entropy of one prediction for n soft targets z (n, Q)."""
    return torch.special.entr(z.double().mean(0)).sum() / unit


@exercise(
    inputs=lambda r: [(4,), (8,), (1,)],
    returns={"profile": "one value a masked pixel"},
    mistakes={
        "this is one possible edge: average over all": lambda n: (torch.arange(n) >= n // 2).float(),
        "everywhere the overall mean: the border is nearer on one side": lambda n: torch.full((n,), 0.5),
        "the edge has n + 1 possible positions": {"positions": lambda n: n},
        "it must rise from left to right": lambda n: ramp.solution(n).flip(0),
        "n + 2 values: leave out the visible pixels": lambda n: torch.arange(n + 2) / (n + 1),
    },
)
def ramp(n, *, positions=lambda n: n + 1):
    """`(n) -> (n,)`: the mean of all steps from 0 to 1 whose edge lies somewhere in n masked pixels, equally likely."""
    return (torch.arange(n) + 1) / positions(n)


@exercise(
    inputs=lambda r: [((2 * r.normal(6)).softmax(0), (2 * r.normal(6)).softmax(0)), (torch.tensor([0.5, 0.5]),) * 2],
    returns={"D": "one probability for each value", "V": "one number"},
    mistakes={
        "D is the probability of real: p over the sum": lambda p, q: ((d := q / (p + q)), _value(p, q, d)),
        "a ratio p / q is not a probability": lambda p, q: (p / q, _value(p, q, p / (p + q))),
        "V is an expectation: weight the logs by p and by q": lambda p, q: (
            (d := p / (p + q)),
            (d.log() + (1 - d).log()).sum(),
        ),
        "the second term is log(1 - D), for the generated": lambda p, q: (
            (d := p / (p + q)),
            (p * d.log() + q * d.log()).sum(),
        ),
        "this is the Jensen-Shannon divergence: V is twice that, less log 4": lambda p, q: (
            (d := p / (p + q)),
            (_value(p, q, d) + math.log(4)) / 2,
        ),
    },
)
def discriminator(p, q):
    """`(p, q) -> (D, V)`: the best discriminator of two distributions, and the value it reaches."""
    d = p / (p + q)
    return d, _value(p, q, d)


def _value(p, q, d):
    return (p * d.log() + q * (1 - d).log()).sum()


def _square(size, first, last):
    mask = torch.zeros(size, size, dtype=torch.bool)
    mask[first:last, first:last] = True
    return mask


@exercise(
    inputs=lambda r: [(_square(9, 3, 6), 1, 10.0), (_square(12, 4, 9), 2, 5.0)],
    returns={"weights": "one weight a pixel"},
    mistakes={
        "visible pixels far from the mask count nothing": {"far": 1.0},
        "the border lies inside the mask: it must be visible pixels": lambda mask, o, w: (
            mask.float() + (w - 1) * (mask & (_grown(~mask, o) > 0)).float()
        ),
        "masked pixels have weight 1, the border the larger one": {"flip": True},
        "the border has weight 1 like the mask: multiply": lambda mask, o, w: _grown(mask, o),
        "only the four neighbors: the border has corners": {"corners": False},
    },
)
def border(mask, overlap, weight, *, far=0.0, flip=False, corners=True):
    """`(mask, overlap, weight) -> weights`: 1 where masked, `weight` where visible and at most `overlap` away, else 0."""
    masked, near = mask.float(), _grown(mask, overlap)
    if not corners:
        near = _grown(mask, overlap, rows=True).maximum(_grown(mask, overlap, rows=False))
    a, b = (weight, 1.0) if flip else (1.0, weight)
    return a * masked + b * (near - masked) + far * (1 - near)


def _grown(mask, overlap, rows=None):
    kernel = {None: (2 * overlap + 1,) * 2, True: (2 * overlap + 1, 1), False: (1, 2 * overlap + 1)}[rows]
    padding = {None: (overlap,) * 2, True: (overlap, 0), False: (0, overlap)}[rows]
    return F.max_pool2d(mask.float()[None, None], kernel, stride=1, padding=padding)[0, 0]
