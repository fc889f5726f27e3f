"""Checks for the chapter *Learning without labels*."""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from sslbook import distributed
from sslbook.data.datasets.shapes import Shapes
from sslbook.data.loader import Data
from sslbook.data.views import View
from sslbook.notebook.exercises import Check, exercise


def views_of_process(shapes: Shapes, view: View, batch_size: int, seed: int, epoch: int) -> tuple[Tensor, Tensor]:
    """Indices and views of this process's part of the epoch's first batch; for `sslbook.distributed.launch`."""
    part = {"rank": distributed.rank(), "world_size": distributed.world_size()}
    batch = next(iter(Data(shapes=shapes).batches((view,), batch_size, seed=seed, epoch=epoch, **part)))
    return batch.index, batch.views[0]


def _vote(
    similarity: Float[Tensor, "query bank"], labels: Int[Tensor, "bank"], k: int, temperature: float, classes: int
) -> Float[Tensor, "query classes"]:
    top, index = similarity.topk(k, dim=1)
    scores = torch.zeros(len(similarity), classes)
    return scores.scatter_add(1, labels[index], (top / temperature).exp())


@exercise
def knn_vote(check: Check, answer: Callable) -> None:
    """`answer(similarity, labels, k, temperature, num_classes) -> scores`, as in Wu et al. (2018), section 3.4."""
    for k, tau in ((5, 0.5), (1, 0.5), (20, 0.1)):
        similarity, labels = check.random(8, 40).tanh(), check.integers(3, 40)
        scores = check.call(answer, similarity, labels, k, tau, 3)
        check.shape(scores, (8, 3), "one row per query, one column per class")
        check.dtype(scores, torch.float32, "sum the weights, not the labels")
        expected = _vote(similarity, labels, k, tau, 3)
        counts = _vote(similarity, labels, k, torch.inf, 3)
        check.close(
            scores,
            expected,
            mistakes={
                "every neighbor has one vote: weigh each by exp(similarity / temperature)": counts,
                "the temperature multiplies: the weight is exp(similarity / temperature)": _vote(
                    similarity, labels, k, 1 / tau, 3
                ),
                "the temperature has no effect: the weight is exp(similarity / temperature)": _vote(
                    similarity, labels, k, 1.0, 3
                ),
                "the whole bank votes: keep only the k most similar": _vote(similarity, labels, 40, tau, 3),
                "the k least similar vote: take the largest similarities (topk, or sort descending)": _vote(
                    -similarity, labels, k, -tau, 3
                ),
                "the scores are normalized: return the sums of the weights themselves": expected
                / expected.sum(1, True),
            },
            what="weighted votes",
        )
    rare = check.call(answer, check.random(4, 6), torch.zeros(6, dtype=torch.int64), 3, 0.5, 5)
    check.shape(rare, (4, 5), "a class without neighbors still has a column: use num_classes, not labels.max()")
    check.that((rare[:, 1:] == 0).all(), "a class without a neighbor must score 0", "absent classes")


def _merged(
    similarity: Float[Tensor, "query seen"], index: Int[Tensor, "query seen"], k: int, largest: bool = True
) -> tuple[Tensor, Tensor]:
    """The k best; of equals those that stand first."""
    top, column = similarity.sort(dim=1, descending=largest, stable=True)
    return top[:, :k], index.gather(1, column)[:, :k]


@exercise
def merge_neighbors(check: Check, answer: Callable) -> None:
    """`answer(best, index, similarity, start, k) -> (best, index)`; of equally similar ones the lower index first."""
    for known, new, k, start, tied in ((5, 7, 5, 30, False), (0, 4, 6, 0, False), (4, 30, 6, 100, True)):
        best, similarity = check.random(6, known), check.random(6, new)
        if tied:
            best, similarity = best.round(), similarity.round()
        best = best.sort(1, descending=True).values
        index = torch.arange(known).expand(6, known) * max(1, start // max(1, known))
        returned = check.call(answer, best, index, similarity, start, k)
        check.that(
            isinstance(returned, tuple | list) and len(returned) == 2, "must return two tensors: similarities, indices"
        )
        top, found = returned
        width = min(k, known + new)
        check.shape(top, (6, width), "the k best, or all where fewer have been seen")
        check.shape(found, (6, width), "one bank index per similarity")
        check.dtype(found, torch.int64, "indices are integers")
        column = torch.arange(new).expand(6, new)
        both, ids = torch.cat([best, similarity], 1), torch.cat([index, start + column], 1)
        shifted = torch.cat([index, start + known + column], 1)
        expected, expected_index = _merged(both, ids, k)
        check.close(
            top,
            expected,
            mistakes={
                "only the new chunk was searched: the k best so far compete as well": _merged(similarity, column, k)[0],
                "the k least similar are kept: take the largest": _merged(both, ids, k, largest=False)[0],
                "the similarities are not sorted: the nearest comes first": expected.flip(1),
            },
            what="similarities",
        )
        check.close(
            found,
            expected_index,
            mistakes={
                "columns of the chunk are not indices of the bank: add start": _merged(
                    both, torch.cat([index, column], 1), k
                )[1],
                "these are columns of the concatenation: look up which bank entry stands there (gather)": _merged(
                    both, torch.arange(known + new).expand(6, -1), k
                )[1],
                "start counts from the bank's first entry, whatever is known already": _merged(both, shifted, k)[1],
            },
            what="ties" if tied else "indices",
        )


def _probe_gradient(
    w: Float[Tensor, "dim classes"], z: Float[Tensor, "n dim"], y: Int[Tensor, "n"], decay: float, free: int = 1
) -> Float[Tensor, "dim classes"]:
    penalty = decay * w
    if free:
        penalty[-free:] = 0
    return z.T @ ((z @ w).softmax(1) - F.one_hot(y, w.shape[1])) / len(z) + penalty


@exercise
def probe_gradient(check: Check, answer: Callable) -> None:
    """`answer(w, z, y, decay) -> gradient` of the loss plus half the decay times the squared weights, bias excepted."""
    for n, dim, classes, decay in ((7, 4, 3, 0.5), (20, 3, 5, 0.01)):
        w, y = check.random(dim, classes), check.integers(classes, n)
        z = torch.cat([check.random(n, dim - 1), torch.ones(n, 1)], 1)
        gradient = check.call(answer, w, z, y, decay)
        check.shape(gradient, (dim, classes), "the shape of w: one number per weight")
        expected, bare = _probe_gradient(w, z, y, decay), _probe_gradient(w, z, y, 0.0)
        target, logits = F.one_hot(y, classes).float(), z @ w
        penalty = expected - bare
        check.close(
            gradient,
            expected,
            mistakes={
                "the decay is missing: add the gradient of the penalty": bare,
                "the bias decays too: the last row of w belongs to the appended 1": _probe_gradient(w, z, y, decay, 0),
                "the penalty has a half in front: its gradient is decay * w": bare + 2 * penalty,
                "the decay has the wrong sign: it pulls the weights to zero": bare - penalty,
                "this is the gradient of the sum: the loss is a mean over the images": bare * n + penalty,
                "the sign of the loss is reversed: it is softmax minus one-hot": penalty - bare,
                "the one-hot labels are missing: without them the probe only learns to be unsure": z.T
                @ logits.softmax(1)
                / n
                + penalty,
                "the softmax is missing: logits are not probabilities": z.T @ (logits - target) / n + penalty,
                "the softmax runs over the images: each row is one image's distribution (dim=1)": z.T
                @ (logits.softmax(0) - target)
                / n
                + penalty,
            },
            what="gradient",
        )
    big = check.call(answer, 300 * torch.eye(3), torch.eye(3), torch.arange(3), 0.0)
    check.that(torch.isfinite(big).all(), "not finite for logits of 300: use softmax, not exp", "large logits")


@exercise
def standardize(check: Check, answer: Callable) -> None:
    """`answer(train_x, test_x) -> (train_z, test_z)`, with mean and standard deviation of the training set."""
    train, test = 3 * check.random(50, 4) + 2, 5 * check.random(20, 4) - 1
    returned = check.call(answer, train, test)
    check.that(isinstance(returned, tuple | list) and len(returned) == 2, "must return two tensors: train, test")
    mean, std = train.mean(0), train.std(0, correction=0)
    check.close(
        returned[0],
        (train - mean) / std,
        mistakes={
            "each image was standardized by itself: mean and standard deviation are those of a feature (dim=0)": (
                train - train.mean(1, keepdim=True)
            )
            / train.std(1, keepdim=True, correction=0),
            "one mean and one standard deviation for all features: each has its own": (train - train.mean())
            / train.std(correction=0),
            "the mean was not subtracted": train / std,
            "divided by the variance: divide by its root": (train - mean) / std.square(),
        },
        what="training features",
        rtol=2e-2,  # n or n - 1 under the root: both are in use
        atol=2e-2,
    )
    both = torch.cat([train, test])
    check.close(
        returned[1],
        (test - mean) / std,
        mistakes={
            "the test features were standardized by themselves: the probe was trained in the other coordinates": (
                test - test.mean(0)
            )
            / test.std(0, correction=0),
            "mean and std of both splits together: test images must not influence the training": (test - both.mean(0))
            / both.std(0, correction=0),
            "the test features are unchanged": test,
        },
        what="test features",
        rtol=2e-2,
        atol=2e-2,
    )
    train[:, 0] = 0.1
    dead, _ = check.call(answer, train, test)
    check.that(
        torch.isfinite(dead).all(), "a constant feature gives NaN: its standard deviation is 0, divide by 1 instead"
    )
    check.that((dead[:, 0].abs() < 1e-3).all(), "a constant feature must become 0, not grow", "constant features")


@exercise
def images_needed(check: Check, answer: Callable) -> None:
    """`answer(accuracy, half_width, z) -> n`: the fewest test images for z standard deviations within half_width."""
    for p, half, z in ((0.5, 0.01, 1.96), (0.9, 0.03, 1.96), (0.7, 0.02, 1.0)):
        n = check.call(answer, p, half, z)
        check.that(isinstance(n, int), "must return an int: half an image cannot be tested")
        exact = p * (1 - p) * (z / half) ** 2
        check.close(
            n,
            math.ceil(exact),
            mistakes={
                "rounded down: with one image less the interval is too wide (math.ceil)": math.floor(exact),
                "the interval reaches half_width to either side, so its whole width is twice that": math.ceil(
                    4 * exact
                ),
                "half_width is the whole width here: do not halve it": math.ceil(exact / 4),
                "z is not used": math.ceil(exact / z**2),
                "the variance of one prediction is p (1 - p), not p": math.ceil(p * (z / half) ** 2),
                "the standard deviation falls with the root of n: square the ratio": math.ceil(
                    math.sqrt(p * (1 - p)) * z / half
                ),
            },
            what="images",
            rtol=0,
            atol=0.5,
        )


@exercise
def paired_difference(check: Check, answer: Callable) -> None:
    """`answer(correct_a, correct_b) -> (difference, std)` of two accuracies on the same images, as fractions."""
    for n in (40, 300):
        a = check.random(n) > -0.6
        b = (check.random(n) > 1) ^ a
        returned = check.call(answer, a, b)
        check.that(
            isinstance(returned, tuple | list) and len(returned) == 2,
            "must return two numbers: difference, standard deviation",
        )
        d = a.double() - b.double()
        difference, std = d.mean(), d.std(correction=0) / math.sqrt(n)
        check.close(
            returned[0],
            difference,
            mistakes={
                "the sign is reversed: a minus b": -difference,
                "in percent: give fractions": 100 * difference,
                "this is the fraction on which they disagree": d.abs().mean(),
            },
            what="difference",
        )
        pa, pb = a.double().mean(), b.double().mean()
        check.close(
            returned[1],
            std,
            mistakes={
                "this is the standard deviation for two separate sets of images: here both use the same images": (
                    (pa * (1 - pa) + pb * (1 - pb)) / n
                ).sqrt(),
                "this is the standard deviation for one image: the mean of n has it over sqrt(n)": std * math.sqrt(n),
                "this is the variance: take its root": std.square(),
                "divided by n: the standard deviation of a mean falls with sqrt(n)": std / math.sqrt(n),
            },
            what="standard deviation",
            rtol=2e-2,  # n or n - 1
        )


def _participation(h: Float[Tensor, "n dim"], center: bool = True) -> Float[Tensor, ""]:
    variance = torch.linalg.svdvals((h - h.mean(0) if center else h).double()).square()
    return variance.sum().square() / variance.square().sum()


@exercise
def participation_ratio(check: Check, answer: Callable) -> None:
    """`answer(h) -> number`: (sum of variances)^2 / sum of squared variances, over the principal directions."""
    for n, dim in ((60, 5), (200, 12)):
        h = check.random(n, dim) @ check.random(dim, dim) + 1
        c = (h - h.mean(0)).double()
        gram, own = c.T @ c, c.square().sum(0)
        singular = torch.linalg.svdvals(c)
        check.close(
            check.call(answer, h),
            _participation(h),
            mistakes={
                "the features are not centered: their mean counts as a direction of its own": _participation(h, False),
                "singular values instead of variances: square them first": singular.sum().square()
                / singular.square().sum(),
                "the features' own variances: off-diagonal entries of the covariance count as well": own.sum().square()
                / own.square().sum(),
                "upside down": 1 / _participation(h),
                "the trace is not squared": gram.trace() / gram.square().sum(),
            },
            what="participation ratio",
            rtol=1e-3,
        )
    line = check.random(30, 1) @ check.random(1, 6)
    check.close(check.call(answer, line), 1.0, what="features on a line", rtol=1e-2)
