"""Every exercise of the chapter *Rotation prediction*: the right answer passes, each known mistake is named."""

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F

from sslbook.book.chapters.rotation import exercises as check
from sslbook.methods.rotation import rotate
from sslbook.notebook.exercises import CheckFailed


def stacked(*parts: torch.Tensor) -> torch.Tensor:
    return torch.cat(parts)


def by_flips(x):
    return stacked(x, x.mT.flip(2), x.flip(2, 3), x.mT.flip(3))


def gradient(logits, *, rows=None, scale=1.0, order=None, p=None):
    n = len(logits) // 4
    target = F.one_hot(torch.arange(4).repeat_interleave(n) if order is None else order(n), 4)
    return scale * ((logits.softmax(1) if p is None else p(logits)) - target) / (rows or len(logits))


def average(f, x):
    return f(rotate(x)).unflatten(0, (4, len(x))).mean(0)


def variance(g):
    mean = g.mean(1)
    return (mean - mean.mean(0)).square().sum(1).mean(), (g - mean[:, None]).square().sum(2).mean()


def total(g):
    return (g - g.mean((0, 1))).square().sum(2).mean()


def floor(joint):
    given = joint / joint.sum(0)
    return -(joint * given.log()).nan_to_num().sum()


def accuracy(half_width, folds):
    return min(1.0, 45 / (half_width * folds))


RIGHT = {
    "rotate_without_rot90": by_flips,
    "logit_gradient": gradient,
    "bayes_accuracy": accuracy,
    "group_average": average,
    "gradient_variance": variance,
    "loss_floor": floor,
}

WRONG: list[tuple[str, Callable, str]] = [
    ("rotate_without_rot90", lambda x: stacked(*[torch.rot90(x, -k, dims=(2, 3)) for k in range(4)]), "exchanged"),
    ("rotate_without_rot90", lambda x: rotate(x).unflatten(0, (4, len(x))).transpose(0, 1).flatten(0, 1), "grouped by"),
    ("rotate_without_rot90", lambda x: stacked(x, x.mT, x.flip(2, 3), x.mT.flip(2, 3)), "a transposition alone"),
    ("rotate_without_rot90", lambda x: stacked(x, x.mT.flip(2), x.flip(2), x.mT.flip(3)), "both axes flipped"),
    ("rotate_without_rot90", lambda x: by_flips(x)[: 2 * len(x)], "all four rotations of every image"),
    ("logit_gradient", lambda z: gradient(z, rows=1), "gradient of the sum"),
    ("logit_gradient", lambda z: gradient(z, scale=4), "number of images"),
    ("logit_gradient", lambda z: gradient(z, scale=-1), "sign is reversed"),
    ("logit_gradient", lambda z: gradient(z, order=lambda n: torch.arange(4).repeat(n)), "repeat_interleave"),
    ("logit_gradient", lambda z: gradient(z, p=lambda z: z), "softmax is missing"),
    ("logit_gradient", lambda z: gradient(z, p=lambda z: z.softmax(0)), "over the batch"),
    ("logit_gradient", lambda z: gradient(z, p=lambda z: z.exp() / z.exp().sum(1, True)), "not finite"),
    ("bayes_accuracy", lambda w, f: 100 * accuracy(w, f), "percent"),
    ("bayes_accuracy", lambda w, f: 45 / (w * f), "above 1"),
    ("bayes_accuracy", lambda w, f: accuracy(w, 1), "folds is not used"),
    ("bayes_accuracy", lambda w, f: min(1.0, 45 * f / w), "symmetry divides"),
    ("bayes_accuracy", lambda w, f: min(1.0, 90 / (w * f)), "whole width"),
    ("group_average", lambda f, x: f(rotate(x).unflatten(0, (4, len(x))).mean(0)), "averaged before f"),
    ("group_average", lambda f, x: 4 * average(f, x), "summed"),
    ("group_average", lambda f, x: f(rotate(x)).unflatten(0, (len(x), 4)).mean(1), "mixed"),
    ("group_average", lambda f, x: f(rotate(x)).unflatten(0, (4, len(x)))[:3].mean(0), "missing"),
    ("gradient_variance", lambda g: variance(g)[::-1], "within part"),
    ("gradient_variance", lambda g: (total(g), variance(g)[1]), "first average"),
    ("gradient_variance", lambda g: (variance(g)[0], total(g)), "own mean"),
    ("gradient_variance", lambda g: (variance(g)[0] / 7, variance(g)[1]), "averaged over parameters"),
    ("gradient_variance", lambda g: (variance(g)[0], variance(g)[1] / 7), "averaged over parameters"),
    ("gradient_variance", lambda g: (variance(g)[0], (g.mean(0) - g.mean((0, 1))).square().sum(1).mean()), "mean grad"),
    ("gradient_variance", total, "two numbers"),
    ("loss_floor", lambda p: floor(p) / math.log(2), "bits"),
    ("loss_floor", lambda p: floor(p.T), "column sums"),
    ("loss_floor", lambda p: -(p * p.log()).nan_to_num().sum(), "joint table"),
    ("loss_floor", lambda p: -(p.sum(1) * p.sum(1).log()).sum(), "has not been used"),
    ("loss_floor", lambda p: -((p / p.sum(0)) * (p / p.sum(0)).log()).nan_to_num().sum(0).mean(), "counts alike"),
]


@pytest.mark.parametrize("name", RIGHT)
def test_correct_solution_passes(name: str, capsys: pytest.CaptureFixture) -> None:
    getattr(check, name)(RIGHT[name])
    assert "passed" in capsys.readouterr().out


@pytest.mark.parametrize("name", RIGHT)
def test_stub_is_not_written_yet(name: str, capsys: pytest.CaptureFixture) -> None:
    getattr(check, name)(lambda *args: ...)
    assert "not written yet" in capsys.readouterr().out


@pytest.mark.parametrize(("name", "answer", "message"), WRONG, ids=[f"{n}-{m.replace(' ', '_')}" for n, _, m in WRONG])
def test_mistake_is_named(name: str, answer: Callable, message: str) -> None:
    with pytest.raises(CheckFailed, match=message):
        getattr(check, name)(answer)


@pytest.mark.parametrize("folds", [1, 3, 5])
@pytest.mark.parametrize("half_width", [5.0, 22.5, 60.0, 100.0, 180.0])
def test_closed_form_against_a_grid_of_angles(half_width: float, folds: int) -> None:
    """Densities of the four classes on the circle of angles that a shape of that symmetry leaves visible."""
    angle = (torch.arange(7200, dtype=torch.float64) + 0.5) / 20
    density = torch.zeros(4, 7200, dtype=torch.float64)
    for rotation in range(4):
        for wound in range(-6, 13):
            density[rotation] += (angle - 90 * rotation * folds % 360 + 360 * wound).abs() < half_width * folds
    joint = density / density.sum()
    assert check.best_accuracy(half_width, folds) == pytest.approx(joint.amax(0).sum().item(), abs=2e-3)
    assert check.smallest_loss(half_width, folds) == pytest.approx(floor(joint).item(), abs=2e-3)
