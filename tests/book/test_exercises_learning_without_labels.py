"""Every exercise of the chapter *Learning without labels*: the right answer passes, each known mistake is named."""

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F

from sslbook import distributed
from sslbook.book.chapters.learning_without_labels import exercises as check
from sslbook.data.datasets.shapes import Shapes
from sslbook.data.views import View
from sslbook.notebook.exercises import CheckFailed


def vote(s, y, k, tau, classes, *, weight=lambda top, tau: (top / tau).exp(), largest=True):
    top, index = s.topk(k, dim=1, largest=largest)
    return torch.zeros(len(s), classes).scatter_add(1, y[index], weight(top, tau))


def merge(best, index, s, start, k, *, known=True, offset=None, lookup=True, sort=torch.sort, largest=True):
    column = torch.arange(s.shape[1]).expand_as(s) + (start if offset is None else offset(start, best))
    both, ids = (torch.cat([best, s], 1), torch.cat([index, column], 1)) if known else (s, column)
    top, place = sort(both, dim=1, descending=largest, stable=True)
    place = place[:, :k]
    return top[:, :k], ids.gather(1, place) if lookup else place


def last_of_equals(x, dim, descending, stable):
    top, place = x.flip(1).sort(dim=dim, descending=descending, stable=stable)
    return top, x.shape[1] - 1 - place


def gradient(w, z, y, decay, *, p=lambda a: a.softmax(1), target=1.0, scale=1.0, bias=0.0, penalty=1.0):
    pull = penalty * decay * w
    pull[-1] *= bias
    return scale * z.T @ (p(z @ w) - target * F.one_hot(y, w.shape[1])) / len(z) + pull


def standard(train, test, *, of=None, dim=0, power=1, shift=True):
    def moments(x):
        std = x.std(dim, keepdim=True, correction=0)
        return x.mean(dim, keepdim=True), torch.where(std < 1e-6, 1.0, std)

    def apply(x, source):
        mean, std = moments(source)
        return (x - mean * shift) / std**power

    return apply(train, train), apply(test, train if of is None else of(train, test))


def needed(p, half, z, *, by=1.0, end=math.ceil):
    return end(by * p * (1 - p) * (z / half) ** 2)


def paired(a, b, *, sign=1.0, power=0.5, deviation=None):
    d = a.double() - b.double()
    if deviation is not None:
        return d.mean(), deviation(a.double(), b.double())
    return sign * d.mean(), (d.var(correction=0) / len(d)) ** power


def unpaired(a, b):
    return sum(x.var(correction=0) / len(x) for x in (a, b)).sqrt()


def participation(h, *, center=True):
    c = h - h.mean(0) if center else h
    gram = c.T @ c
    return gram.trace() ** 2 / gram.square().sum()


def of_values(v):
    return v.sum() ** 2 / v.square().sum()


RIGHT = {
    "knn_vote": vote,
    "merge_neighbors": merge,
    "probe_gradient": gradient,
    "standardize": standard,
    "images_needed": needed,
    "paired_difference": paired,
    "participation_ratio": participation,
}

WRONG: list[tuple[str, Callable, str]] = [
    ("knn_vote", lambda *a: vote(*a, weight=lambda top, tau: torch.ones_like(top)), "has one vote"),
    ("knn_vote", lambda *a: vote(*a, weight=lambda top, tau: (top * tau).exp()), "temperature multiplies"),
    ("knn_vote", lambda *a: vote(*a, weight=lambda top, tau: top.exp()), "no effect"),
    ("knn_vote", lambda s, y, k, tau, c: vote(s, y, s.shape[1], tau, c), "whole bank"),
    ("knn_vote", lambda *a: vote(*a, largest=False), "least similar"),
    ("knn_vote", lambda *a: F.normalize(vote(*a), p=1, dim=1), "normalized"),
    ("knn_vote", lambda s, y, k, tau, c: vote(s, y, k, tau, int(y.max()) + 1), "still has a column"),
    ("merge_neighbors", lambda *a: merge(*a)[0], "two tensors"),
    ("merge_neighbors", lambda *a: merge(*a, known=False), "only the new chunk"),
    ("merge_neighbors", lambda *a: merge(*a, largest=False), "least similar"),
    ("merge_neighbors", lambda *a: [v.flip(1) for v in merge(*a)], "not sorted"),
    ("merge_neighbors", lambda *a: merge(*a, offset=lambda start, best: 0), "add start"),
    ("merge_neighbors", lambda *a: merge(*a, lookup=False), "look up"),
    ("merge_neighbors", lambda *a: merge(*a, offset=lambda start, best: start + best.shape[1]), "counts from"),
    ("merge_neighbors", lambda *a: merge(*a, sort=last_of_equals), "ties"),
    ("merge_neighbors", lambda *a: [v[:, :4] for v in merge(*a)], "the k best"),
    ("probe_gradient", lambda *a: gradient(*a, penalty=0), "decay is missing"),
    ("probe_gradient", lambda *a: gradient(*a, bias=1.0), "bias decays"),
    ("probe_gradient", lambda *a: gradient(*a, penalty=2), "half in front"),
    ("probe_gradient", lambda *a: gradient(*a, penalty=-1), "wrong sign"),
    ("probe_gradient", lambda w, z, y, decay: gradient(w, z, y, decay, scale=len(z)), "of the sum"),
    ("probe_gradient", lambda *a: gradient(*a, scale=-1), "sign of the loss"),
    ("probe_gradient", lambda *a: gradient(*a, target=0), "labels are missing"),
    ("probe_gradient", lambda *a: gradient(*a, p=lambda a: a), "softmax is missing"),
    ("probe_gradient", lambda *a: gradient(*a, p=lambda a: a.softmax(0)), "over the images"),
    ("probe_gradient", lambda *a: gradient(*a, p=lambda a: a.exp() / a.exp().sum(1, True)), "not finite"),
    ("probe_gradient", lambda *a: gradient(*a).T, "shape of w"),
    ("images_needed", lambda *a: needed(*a, end=float), "an int"),
    ("images_needed", lambda *a: needed(*a, end=math.floor), "rounded down"),
    ("images_needed", lambda *a: needed(*a, by=4), "either side"),
    ("images_needed", lambda *a: needed(*a, by=1 / 4), "do not halve"),
    ("images_needed", lambda p, half, z: needed(p, half, 1), "not used"),
    ("images_needed", lambda p, half, z: needed(p, half, z, by=1 / (1 - p)), "variance of one prediction"),
    ("images_needed", lambda p, half, z: math.ceil(math.sqrt(p * (1 - p)) * z / half), "root of n"),
    ("participation_ratio", lambda h: participation(h, center=False), "not centered"),
    ("participation_ratio", lambda h: of_values(torch.linalg.svdvals(h - h.mean(0))), "square them"),
    ("participation_ratio", lambda h: of_values(h.var(0)), "off-diagonal"),
    ("participation_ratio", lambda h: 1 / participation(h), "upside down"),
    ("participation_ratio", lambda h: participation(h) / (h - h.mean(0)).square().sum(), "trace is not squared"),
    ("standardize", lambda a, b: [standard(x, x, dim=1)[0] for x in (a, b)], "by itself"),
    ("standardize", lambda a, b: [(x - a.mean()) / a.std() for x in (a, b)], "each has its own"),
    ("standardize", lambda *a: standard(*a, shift=False), "not subtracted"),
    ("standardize", lambda *a: standard(*a, power=2), "variance"),
    ("standardize", lambda *a: standard(*a, of=lambda train, test: test), "other coordinates"),
    ("standardize", lambda *a: standard(*a, of=lambda train, test: torch.cat([train, test])), "must not influence"),
    ("standardize", lambda a, b: (standard(a, b)[0], b), "unchanged"),
    ("standardize", lambda a, b: [(x - a.mean(0)) / (a - a.mean(0)).std(0) for x in (a, b)], "NaN"),
    ("paired_difference", lambda *a: paired(*a, sign=-1), "a minus b"),
    ("paired_difference", lambda a, b: tuple(100 * v for v in paired(a, b)), "percent"),
    ("paired_difference", lambda a, b: ((a != b).double().mean(), 0.0), "disagree"),
    ("paired_difference", lambda *a: paired(*a, deviation=unpaired), "separate sets"),
    ("paired_difference", lambda *a: paired(*a, deviation=lambda x, y: (x - y).std(correction=0)), "one image"),
    ("paired_difference", lambda *a: paired(*a, power=1), "variance"),
    (
        "paired_difference",
        lambda *a: paired(*a, deviation=lambda x, y: (x - y).std(correction=0) / len(x)),
        "divided by n",
    ),
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


@pytest.mark.slow
def test_two_processes_see_the_parts_of_one_batch() -> None:
    shapes, view = Shapes(num_train=16, num_test=1), View(size=16, color_jitter=(0.4, 0.4, 0.4, 0.1))
    index, views = check.views_of_process(shapes, view, 8, 3, 2)
    parts = distributed.launch(check.views_of_process, 2, shapes, view, 8, 3, 2)
    assert torch.equal(torch.cat([part[0] for part in parts]), index)
    assert torch.equal(torch.cat([part[1] for part in parts]), views)
