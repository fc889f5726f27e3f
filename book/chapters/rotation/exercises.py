"""The exercises of the chapter *Rotation prediction*."""

import math

import torch
import torch.nn.functional as F

from sslbook.book.chapters.rotation.overlap import best_accuracy as best_accuracy
from sslbook.book.chapters.rotation.overlap import smallest_loss as smallest_loss
from sslbook.notebook.exercises import exercise


@exercise(
    inputs=lambda r: [(r.normal(3, 2, 5, 5),), (r.normal(1, 4, 4, 4),), (r.normal(2, 3, 3, 3),)],
    returns={"four rotations": "all four rotations of every image, stacked along the batch"},
    mistakes={
        "90 and 270 degrees are exchanged: counterclockwise, the right column becomes the top row": {"sign": -1},
        "the rows are grouped by image: put all images at 0 degrees first, then all at 90": lambda x: (
            rotate_without_rot90.solution(x).unflatten(0, (4, len(x))).transpose(0, 1).flatten(0, 1)
        ),
        "a transposition alone is a mirror image: flip one axis as well": lambda x: torch.cat(
            [x, x.mT, x.flip(2, 3), x.mT.flip(2, 3)]
        ),
        "180 degrees needs both axes flipped: one flip is a mirror image": lambda x: torch.cat(
            [x, x.mT.flip(2), x.flip(2), x.mT.flip(3)]
        ),
        "channels and height are exchanged: height and width are the axes 2 and 3": {"dims": (1, 2)},
    },
)
def rotate_without_rot90(x, *, sign=1, dims=(2, 3)):
    """`(x) -> (4n, c, s, s)`: all four rotations, by flips and transpositions."""
    return torch.cat([torch.rot90(x, sign * k, dims=dims) for k in range(4)])


@exercise(
    inputs=lambda r: [(r.normal(12, 4),), (4 * r.normal(20, 4),), (torch.tensor([[300.0, 0, 0, 0]] * 4),)],
    returns={"gradient": "one number for every logit"},
    mistakes={
        "this is the gradient of the sum: the loss is a mean over 4n rows": {"rows": lambda logits: 1},
        "divided by the number of images: the loss is a mean over 4n rows": {"rows": lambda logits: len(logits) / 4},
        "the sign is reversed: descending on it would raise the loss (softmax minus one-hot)": {
            "rows": lambda logits: -len(logits)
        },
        "the targets run 0 1 2 3 0 1 2 3: rows are grouped by rotation, so repeat_interleave": {
            "order": torch.Tensor.repeat
        },
        "the softmax is missing: the logits themselves are not probabilities": {"p": lambda logits: logits},
        "the softmax runs over the batch: each row is one image's distribution (dim=1)": {"p": lambda z: z.softmax(0)},
        "not finite for a logit of 300: use softmax, not exp": {"p": lambda z: z.exp() / z.exp().sum(1, keepdim=True)},
    },
)
def logit_gradient(logits, *, rows=len, order=torch.Tensor.repeat_interleave, p=lambda logits: logits.softmax(1)):
    """`(logits) -> gradient` of the mean rotation loss, for rows ordered as in `rotate`."""
    return (p(logits) - F.one_hot(order(torch.arange(4), len(logits) // 4), 4)) / rows(logits)


@exercise(
    inputs=lambda r: [
        (w, f) for f in (1, 3, 5) for w in (2.0, 9.0, 12.0, 22.5, 36.0, 60.0, 100.0, 180.0) if w * f <= 180
    ],
    returns={"best accuracy": ""},
    mistakes={
        "in percent: return a fraction": lambda w, folds: 100 * best_accuracy(w, folds),
        "above 1 for small half-widths: an accuracy is at most 1": lambda w, folds: 45 / (w * folds),
        "folds is not used: a symmetry of order n makes the same turn n times as large": lambda w, folds: best_accuracy(
            w
        ),
        "the symmetry divides: the angle that can be seen is folds times the orientation": lambda w, f: min(
            1, 45 * f / w
        ),
        "half_width taken for the whole width: the orientation runs over 2 half_width": lambda w, f: min(
            1, 90 / (w * f)
        ),
    },
)
def bayes_accuracy(half_width, folds):
    """`(half_width, folds) -> fraction`, for one turn around the circle at most (folds * half_width <= 180)."""
    return best_accuracy(half_width, folds)


def _network(weight):
    return lambda x: (x.flatten(1) @ weight).tanh()


def _four(x):
    return rotate_without_rot90.solution(x).unflatten(0, (4, len(x)))


@exercise(
    inputs=lambda r: [(_network(r.normal(36 * c, 5)), r.normal(n, c, 6, 6)) for n, c in ((4, 3), (3, 1))],
    returns={"average": "one row for every image"},
    mistakes={
        "the images are averaged before f: average the features": lambda f, x: f(_four(x).mean(0)),
        "the features are summed: divide by four": lambda f, x: 4 * group_average.solution(f, x),
        "rows of different images are mixed: unflatten to (4, n, d), rotation first": lambda f, x: (
            f(_four(x).flatten(0, 1)).unflatten(0, (len(x), 4)).mean(1)
        ),
        "one rotation is missing: 0, 90, 180 and 270 degrees": {"rotations": 3},
    },
)
def group_average(f, x, *, rotations=4):
    """`(f, x) -> (n, d)`: features averaged over the four rotations of every image."""
    return torch.stack([f(rotated) for rotated in _four(x)[:rotations]]).mean(0)


@exercise(
    inputs=lambda r: [(r.normal(n, 4, 7) + 2 * r.normal(n, 1, 7) + r.normal(1, 4, 7),) for n in (8, 5)],
    returns={"between images": "sum over the parameters, then average", "within an image": "sum, then average"},
    mistakes={
        "exchanged: the answer is (between, within)": lambda g: gradient_variance.solution(g)[::-1],
        "total instead of between: first average each image's four gradients": lambda g: (
            (g - g.mean((0, 1))).square().sum(2).mean(),
            gradient_variance.solution(g)[1],
        ),
        "total instead of within: subtract each image's own mean": {"center": lambda g: g.mean((0, 1))},
        "this is the variance between the rotations' mean gradients, not within an image": lambda g: (
            gradient_variance.solution(g)[0],
            (g.mean(0) - g.mean((0, 1))).square().sum(1).mean(),
        ),
        "averaged over parameters: the variance of a vector is the sum over its components": {"over": torch.mean},
        "divided by n - 1: B + V is the variance of all rows only if both are plain means": {"correction": 1},
    },
)
def gradient_variance(g, *, center=lambda g: g.mean(1, keepdim=True), over=torch.sum, correction=0):
    """`(g) -> (between, within)` from gradients `g` of shape (images, 4, parameters)."""
    n = len(g) - correction
    between = over(g.mean(1).var(0, correction=0), 0) * len(g) / n
    return between, over((g - center(g)).square(), 2).mean() * 4 / (4 - correction)


@exercise(
    inputs=lambda r: [(2.0, 3.0, 10, 1), (2.0, 3.0, 10, 2), (0.5, 4.0, 8, 3), (0.5, 4.0, 8, 4)],
    returns={"variance": ""},
    mistakes={
        "as if the rotations were independent: they are taken without replacement": {"left": lambda m: 1},
        "all four rotations leave no variance within an image, one leaves all of it": {"left": lambda m: 4 - m},
        "the images are independent: B is divided by their number, not by the number of rows": {"shared": lambda m: m},
        "(B + V) over the number of rows holds for independent rows; those of one image are not": {
            "shared": lambda m: m,
            "left": lambda m: 1,
        },
        "the part within an image is missing": {"left": lambda m: 0},
        "not divided by the number of images": lambda B, V, n, m: n * mean_variance.solution(B, V, n, m),
    },
)
def mean_variance(between, within, images, rotations, *, left=lambda m: (4 - m) / 3, shared=lambda m: 1):
    """`(B, V, images, rotations) -> variance` of the mean gradient, with that many of each image's four rotations."""
    return (between / shared(rotations) + left(rotations) / rotations * within) / images


@exercise(
    inputs=lambda r: [((table := r.integers(5, 4, 6) + torch.eye(4, 6)) / table.sum(),), (torch.eye(4) / 4,)],
    returns={"remaining entropy": "one number"},
    atol=1e-4,
    mistakes={
        "in bits: the natural logarithm gives nats": lambda joint: loss_floor.solution(joint) / math.log(2),
        "this is H(s | r), the uncertainty about the state: divide by the column sums": lambda p: loss_floor.solution(
            p.T
        ),
        "this is the entropy of the joint table: condition on the state": {"given": lambda p: p},
        "this is H(r): the state has not been used": {"given": lambda p: p.sum(1, keepdim=True).expand_as(p)},
        "every state counts alike: weigh its entropy by its probability": {
            "weight": lambda p: p / p.sum(0) / p.shape[1]
        },
        "0 * log(0) is NaN, but the term is 0: mask it or clamp before the logarithm": {"zero": torch.nan},
    },
)
def loss_floor(joint, *, given=lambda p: p / p.sum(0), weight=lambda p: p, zero=0.0):
    """`(joint) -> nats`: H(r | s) from a joint table (4, states) of probabilities, with zeros."""
    return -(weight(joint) * given(joint).log()).nan_to_num(zero).sum()


@exercise(
    inputs=lambda r: [(30.0,), (90.5,), (120.0,), (180.0,)],
    returns={"best accuracy": ""},
    mistakes={
        "this is the four-way task: two arcs, each with weight 1/2, overlap later": lambda w: min(1, 45 / w),
        "above 1 for small half-widths: an accuracy is at most 1": lambda w: 90 / w,
        "half_width taken for the whole width: the orientation runs over 2 half_width": lambda w: min(1, 180 / w),
        "in percent: return a fraction": lambda w: 100 * halfturn_accuracy.solution(w),
        "where the arcs overlap one of the two is right: half of that part is not lost": lambda w: min(1, 180 / w - 1),
    },
)
def halfturn_accuracy(half_width):
    """`(half_width) -> fraction`: the best accuracy at two classes, 0 and 180 degrees, for a tilt of up to half_width."""
    return min(1.0, 90 / half_width)


@exercise(
    inputs=lambda r: [(0.7,), (0.25,), (1.0,)],
    returns={"floor": ""},
    mistakes={
        "two classes show the same image, not all eight: log 2": {"classes": 8},
        "two classes show the same image, not four: the rotation can be predicted": {"classes": 4},
        "in bits: the natural logarithm gives nats": {"unit": math.log(2)},
        "only the symmetric images are ambiguous: multiply by their fraction": lambda share: math.log(2),
        "the symmetric ones are ambiguous, not the others": lambda share: (1 - share) * math.log(2),
    },
)
def mirror_floor(symmetric, *, classes=2, unit=1):
    """`(fraction of mirror-symmetric images) -> nats`: the floor of the mean loss of the eight-way task, upright."""
    return symmetric * math.log(classes) / unit


@exercise(
    inputs=lambda r: [(0.1,), (0.3,), (0.01,)],
    returns={"best accuracy": "", "smallest loss": ""},
    mistakes={
        "the incorrect rotations share epsilon: each has probability epsilon / 3": {"wrong": 1},
        "there are three incorrect rotations, not four": {"wrong": 4},
        "the smallest loss is the entropy of the label: the images stored correctly count too": {"correct": 0},
        "the part of the noisy labels is missing": lambda e: (1 - e, -(1 - e) * math.log(1 - e)),
        "this is the loss of the images stored correctly alone: average it with that of the others": lambda e: (
            1 - e,
            -math.log(1 - e),
        ),
        "in bits: the natural logarithm gives nats": lambda e: (1 - e, noise_floor.solution(e)[1] / math.log(2)),
        "a noisy label is never the correct rotation": lambda e: (1 - 0.75 * e, noise_floor.solution(e)[1]),
    },
)
def noise_floor(epsilon, *, wrong=3, correct=1):
    """`(epsilon) -> (best accuracy, smallest loss)` if that fraction of the images is stored in an incorrect rotation."""
    right = 1 - epsilon
    return right, -correct * right * math.log(right) - epsilon * math.log(epsilon / wrong)
