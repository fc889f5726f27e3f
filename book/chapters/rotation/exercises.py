"""Checks for the chapter *Rotation prediction*."""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from sslbook.notebook.exercises import Check, exercise


def _rotated(x: Float[Tensor, "n c s s"], sign: int = 1, dims: tuple[int, int] = (2, 3)) -> Float[Tensor, "4*n c s s"]:
    return torch.cat([torch.rot90(x, sign * k, dims=dims) for k in range(4)])


@exercise
def rotate_without_rot90(check: Check, answer: Callable) -> None:
    """`answer(x) -> (4n, c, s, s)`: all four rotations by flips and transpositions."""
    for n, c, side in ((3, 2, 5), (1, 3, 4)):
        x = check.random(n, c, side, side)
        expected = _rotated(x)
        rotated = check.call(answer, x)
        check.shape(rotated, expected.shape, "all four rotations of every image, stacked along the batch")
        check.dtype(rotated, x.dtype)
        rows = expected.unflatten(0, (4, n))
        transposed = torch.cat([x, x.mT, x.flip(2, 3), x.mT.flip(2, 3)])
        mirrored = torch.cat([x, x.mT.flip(2), x.flip(2), x.mT.flip(3)])
        check.close(
            rotated,
            expected,
            mistakes={
                "90 and 270 degrees are exchanged: counterclockwise, the right column becomes the top row": _rotated(
                    x, sign=-1
                ),
                "the rows are grouped by image: put all images at 0 degrees first, then all at 90": rows.transpose(
                    0, 1
                ).flatten(0, 1),
                "a transposition alone is a mirror image: flip one axis as well": transposed,
                "180 degrees needs both axes flipped: one flip is a mirror image": mirrored,
                "channels and height are exchanged: height and width are the axes 2 and 3": (
                    _rotated(x, dims=(1, 2)) if c == side else torch.full_like(expected, math.inf)
                ),
            },
            what="four rotations",
        )


def _rotation_gradient(logits: Float[Tensor, "rows 4"]) -> Float[Tensor, "rows 4"]:
    n = len(logits) // 4
    target = F.one_hot(torch.arange(4).repeat_interleave(n), 4)
    return (logits.softmax(1) - target) / len(logits)


@exercise
def logit_gradient(check: Check, answer: Callable) -> None:
    """`answer(logits) -> gradient` of the mean rotation loss, for rows ordered as in `rotate`."""
    for n, scale in ((3, 1.0), (5, 4.0)):
        logits = scale * check.random(4 * n, 4)
        gradient = check.call(answer, logits)
        check.shape(gradient, (4 * n, 4), "one number for every logit")
        expected = _rotation_gradient(logits)
        wrong_order = (logits.softmax(1) - F.one_hot(torch.arange(4).repeat(n), 4)) / len(logits)
        check.close(
            gradient,
            expected,
            mistakes={
                "this is the gradient of the sum: the loss is a mean over 4n rows": expected * len(logits),
                "divided by the number of images: the loss is a mean over 4n rows": expected * 4,
                "the sign is reversed: descending on it would raise the loss (softmax minus one-hot)": -expected,
                "the targets run 0 1 2 3 0 1 2 3: rows are grouped by rotation, so repeat_interleave": wrong_order,
                "the softmax is missing: the logits themselves are not probabilities": (
                    logits - F.one_hot(torch.arange(4).repeat_interleave(n), 4)
                )
                / len(logits),
                "the softmax runs over the batch: each row is one image's distribution (dim=1)": (
                    logits.softmax(0) - F.one_hot(torch.arange(4).repeat_interleave(n), 4)
                )
                / len(logits),
            },
            what="gradient",
        )
    big = check.call(answer, torch.tensor([[300.0, 0, 0, 0]] * 4))
    check.that(torch.isfinite(big).all(), "not finite for a logit of 300: use softmax, not exp", "large logits")


def _overlap(half_width: float, folds: int = 1) -> tuple[float, float]:
    """Best accuracy (a fraction) and smallest loss for a shape of `folds`-fold symmetry, orientation uniform."""
    if half_width <= 0:
        return 1.0, 0.0
    reach = 2 * half_width * folds / 90  # how many claims an angle meets on average, over the four classes
    turns, rest = divmod(reach, 4)  # every class winds around the circle so many times, and covers a part once more
    more = rest - math.floor(rest)
    best = loss = 0.0
    for share, extra in ((more, math.floor(rest) + 1), (1 - more, math.floor(rest))):
        claims = [turns + 1] * extra + [turns] * (4 - extra)
        best += share * max(claims) / reach
        loss -= share * sum(c * math.log(c / sum(claims)) for c in claims if c > 0) / reach
    return best, loss


def best_accuracy(half_width: float, folds: int = 1) -> float:
    """The best accuracy (a fraction) at naming the rotation of a shape whose orientation is uniform on +- half_width.

    Args:
        half_width: in degrees, up to 180.
        folds: the shape looks the same after a turn by 360 / folds degrees.
    """
    return _overlap(half_width, folds)[0]


def smallest_loss(half_width: float, folds: int = 1) -> float:
    """The entropy, in nats, that remains of the rotation when the shape's angle is known exactly."""
    return _overlap(half_width, folds)[1]


@exercise
def bayes_accuracy(check: Check, answer: Callable) -> None:
    """`answer(half_width, folds) -> fraction`, for one turn around the circle at most (folds * half_width <= 180)."""
    cases = [(w, f) for f in (1, 3, 5) for w in (2.0, 9.0, 12.0, 22.5, 36.0, 60.0, 100.0, 180.0) if w * f <= 180]
    values = torch.tensor([float(check.call(answer, w, f)) for w, f in cases])

    def all_of(rule: Callable[[float, int], float]) -> Tensor:
        return torch.tensor([rule(w, f) for w, f in cases])

    check.close(
        values,
        all_of(best_accuracy),
        mistakes={
            "in percent: return a fraction": all_of(lambda w, f: 100 * best_accuracy(w, f)),
            "above 1 for small half-widths: an accuracy is at most 1": all_of(lambda w, f: 45 / (w * f)),
            "folds is not used: a symmetry of order n makes the same turn n times as large": all_of(
                lambda w, f: best_accuracy(w)
            ),
            "the symmetry divides: the angle that can be seen is folds times the orientation": all_of(
                lambda w, f: min(1.0, 45 * f / w)
            ),
            "half_width taken for the whole width: the orientation runs over 2 half_width": all_of(
                lambda w, f: min(1.0, 90 / (w * f))
            ),
        },
        what="best accuracy",
    )


@exercise
def group_average(check: Check, answer: Callable) -> None:
    """`answer(f, x) -> (n, d)`: features averaged over the four rotations of every image."""
    weight = check.random(3 * 6 * 6, 5)

    def f(x: Float[Tensor, "m 3 6 6"]) -> Float[Tensor, "m 5"]:
        return (x.flatten(1) @ weight).tanh()

    x = check.random(4, 3, 6, 6)
    features = check.call(answer, f, x)
    check.shape(features, (4, 5), "one row for every image")
    each = torch.stack([f(torch.rot90(x, k, dims=(2, 3))) for k in range(4)])
    check.close(
        features,
        each.mean(0),
        mistakes={
            "the images are averaged before f: average the features": f(
                torch.stack([torch.rot90(x, k, dims=(2, 3)) for k in range(4)]).mean(0)
            ),
            "the features are summed: divide by four": each.sum(0),
            "rows of different images are mixed: unflatten to (4, n, d), rotation first": f(_rotated(x))
            .unflatten(0, (4, 4))
            .mean(1),
            "one rotation is missing: 0, 90, 180 and 270 degrees": each[:3].mean(0),
        },
        what="average",
    )
    rotated = check.call(answer, f, torch.rot90(x, 1, dims=(2, 3)))
    check.close(rotated, features, what="the same for a rotated image")


@exercise
def gradient_variance(check: Check, answer: Callable) -> None:
    """`answer(g) -> (between, within)` from gradients `g` of shape (images, 4, parameters)."""
    g = check.random(40, 4, 7) + 2 * check.random(40, 1, 7) + check.random(1, 4, 7)
    returned = check.call(answer, g)
    check.that(
        isinstance(returned, tuple) and len(returned) == 2,
        "return two numbers: between images, within an image",
    )
    between, within = (torch.as_tensor(v) for v in returned)
    mean = g.mean(1)
    expected_between = (mean - mean.mean(0)).square().sum(1).mean()
    expected_within = (g - mean[:, None]).square().sum(2).mean()
    total = (g - g.mean((0, 1))).square().sum(2).mean()
    per_rotation = (g.mean(0) - g.mean((0, 1))).square().sum(1).mean()
    for value in (between, within):
        check.that(value.ndim == 0, "each is one number: sum over the parameters, then average", "two numbers")
    check.close(
        between,
        expected_between,
        mistakes={
            "this is the within part: the answer is (between, within)": expected_within,
            "this is the total variance: first average each image's four gradients": total,
            "averaged over parameters: the variance of a vector is the sum over its components": expected_between / 7,
        },
        what="between images",
    )
    check.close(
        within,
        expected_within,
        mistakes={
            "this is the total variance: subtract each image's own mean": total,
            "these are the differences between the mean gradients of the rotations, not within an image": per_rotation,
            "averaged over parameters: the variance of a vector is the sum over its components": expected_within / 7,
        },
        what="within an image",
    )


def _remaining_entropy(joint: Float[Tensor, "r s"]) -> Tensor:
    p = joint / joint.sum()
    given = p / p.sum(0, keepdim=True)
    return -(p * given.log()).nan_to_num().sum()


@exercise
def loss_floor(check: Check, answer: Callable) -> None:
    """`answer(joint) -> nats`: H(r | s) from a joint table (4, states) of probabilities, with zeros."""
    table: Int[Tensor, "4 6"] = check.integers(5, 4, 6)
    joint = (table + torch.eye(4, 6)) / (table + torch.eye(4, 6)).sum()
    value = torch.as_tensor(check.call(answer, joint))
    check.that(value.ndim == 0, "return one number", "one number")
    expected = _remaining_entropy(joint)
    reverse = _remaining_entropy(joint.T)
    row = joint.sum(1)
    check.close(
        value,
        expected,
        mistakes={
            "in bits: the natural logarithm gives nats": expected / math.log(2),
            "this is H(s | r), the uncertainty about the state: divide by the column sums": reverse,
            "this is the entropy of the joint table: condition on the state": -(joint * joint.log()).nan_to_num().sum(),
            "this is H(r): the state has not been used": -(row * row.log()).sum(),
            "every state counts alike: weigh its entropy by its probability": -(
                (joint / joint.sum(0)) * (joint / joint.sum(0)).log()
            )
            .nan_to_num()
            .sum(0)
            .mean(),
        },
        what="remaining entropy",
    )
    sure = torch.as_tensor(check.call(answer, torch.eye(4) / 4))
    check.close(sure, 0.0, what="nothing remains where each state has one rotation")
