"""The checks of the chapter on SimCLR accept right answers and name every mistake."""

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from sslbook.book.chapters.simclr import exercises as check
from sslbook.methods import simclr
from sslbook.notebook.exercises import CheckFailed


def scores(z: Tensor, tau: float, *, mask: bool = True, unit: bool = True) -> Tensor:
    z = z / z.norm(dim=1, keepdim=True) if unit else z
    s = z @ z.T / tau
    return s.masked_fill(torch.eye(len(z), dtype=torch.bool), -torch.inf) if mask else s


def partner(z: Tensor) -> Tensor:
    return torch.arange(len(z)).roll(len(z) // 2)


def loss(z: Tensor, tau: float) -> Tensor:
    return F.cross_entropy(scores(z, tau), partner(z))


def naive(z: Tensor, tau: float) -> Tensor:
    e = scores(z, tau).exp()
    return -(e.gather(1, partner(z)[:, None])[:, 0] / e.sum(1)).log().mean()


def without_positive(z: Tensor, tau: float) -> Tensor:
    s = scores(z, tau)
    own = s.gather(1, partner(z)[:, None])[:, 0]
    return (s.scatter(1, partner(z)[:, None], -torch.inf).logsumexp(1) - own).mean()


LOSS_MISTAKES = {
    "own similarity": lambda z, t: F.cross_entropy(scores(z, t, mask=False), partner(z)),
    "unit length": lambda z, t: F.cross_entropy(scores(z, t, unit=False), partner(z)),
    "temperature multiplies": lambda z, t: loss(z, 1 / t),
    "no effect": lambda z, t: loss(z, 1.0),
    "rows 2i and 2i": lambda z, t: F.cross_entropy(scores(z, t), torch.arange(len(z)) ^ 1),
    "only the first N": lambda z, t: F.cross_entropy(scores(z, t)[: len(z) // 2], partner(z)[: len(z) // 2]),
    "twice the mean": lambda z, t: 2 * loss(z, t),
    "divide by 2N": lambda z, t: len(z) * loss(z, t),
    "missing from the denominator": without_positive,
    "sign is wrong": lambda z, t: -loss(z, t),
    "one number": lambda z, t: F.cross_entropy(scores(z, t), partner(z), reduction="none"),
    "no gradient": lambda z, t: loss(z.detach(), t),
    "not finite": naive,
}


def anchor(z: Tensor, i: int, j: int, tau: float) -> Tensor:
    s = z @ z[i] / tau
    s[i] = -torch.inf
    return (s.softmax(0) @ z - z[j]) / tau


def anchor_negatives(z: Tensor, i: int, j: int, tau: float) -> Tensor:
    s = z @ z[i] / tau
    s[[i, j]] = -torch.inf
    return (s.softmax(0) @ z - z[j]) / tau


def anchor_hot(z: Tensor, i: int, j: int, tau: float) -> Tensor:
    return anchor(z, i, j, 1.0) / tau


def anchor_projected(z: Tensor, i: int, j: int, tau: float) -> Tensor:
    g = anchor(z, i, j, tau)
    return g - (g @ z[i]) * z[i]


ANCHOR_MISTAKES = {
    "factor 1 / temperature": lambda z, i, j, t: t * anchor(z, i, j, t),
    "sign is wrong": lambda z, i, j, t: -anchor(z, i, j, t),
    "contains k = i": lambda z, i, j, t: ((z @ z[i] / t).softmax(0) @ z - z[j]) / t,
    "misses the positive": anchor_negatives,
    "positive is missing": lambda z, i, j, t: anchor(z, i, j, t) + z[j] / t,
    "ignore the temperature": anchor_hot,
    "behind the normalization": anchor_projected,
}


def through(u: Tensor, g: Tensor) -> Tensor:
    z = u / u.norm()
    return (g - (g @ z) * z) / u.norm()


THROUGH_MISTAKES = {
    "is missing": lambda u, g: through(u, g) * u.norm(),
    "so divide": lambda u, g: through(u, g) * u.norm() ** 2,
    "nothing is projected": lambda u, g: g / u.norm(),
    "unit vector": lambda u, g: (g - (g @ u) * u) / u.norm(),
    "drops the rest": lambda u, g: (g @ u) * u / u.norm() ** 3,
}


def bound(s: Tensor) -> Tensor:
    return math.log(len(s)) + s.log_softmax(1).diagonal().mean()


BOUND_MISTAKES = {
    "this is the loss": lambda s: math.log(len(s)) - bound(s),
    "log N is missing": lambda s: bound(s) - math.log(len(s)),
    "added instead": lambda s: 2 * math.log(len(s)) - bound(s),
    "in bits": lambda s: bound(s) / math.log(2),
    "over columns": lambda s: bound(s.T),
    "missing from the denominator": lambda s: (
        math.log(len(s))
        + (s.diagonal() - s.masked_fill(torch.eye(len(s), dtype=torch.bool), -torch.inf).logsumexp(1)).mean()
    ),
    "negatives only": lambda s: bound(s) + math.log((len(s) - 1) / len(s)),
}


def share(z: Tensor, label: Tensor, tau: float, mask: bool = True, unit: bool = True, positive: bool = False) -> Tensor:
    s = scores(z, tau, mask=mask, unit=unit)
    if not positive:
        s = s.scatter(1, partner(z)[:, None], -torch.inf)
    return (s.softmax(1) * (label[:, None] == label)).sum(1).mean()


SHARE_MISTAKES = {
    "positive counts": lambda z, y, t: share(z, y, t, positive=True),
    "its own negative": lambda z, y, t: share(z, y, t, mask=False),
    "count alike": lambda z, y, t: (((y[:, None] == y).sum(1) - 2).double() / (len(y) - 2)).sum().float() / len(y),
    "OTHER classes": lambda z, y, t: 1 - share(z, y, t),
    "unit length": lambda z, y, t: share(z, y, t, unit=False),
}

EXERCISES = {
    "nt_xent": (loss, LOSS_MISTAKES),
    "anchor_gradient": (anchor, ANCHOR_MISTAKES),
    "through_normalization": (through, THROUGH_MISTAKES),
    "information_bound": (bound, BOUND_MISTAKES),
    "same_class_share": (share, SHARE_MISTAKES),
}


@pytest.mark.parametrize("name", EXERCISES)
def test_correct_solution_passes_and_a_stub_does_not_fail(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    getattr(check, name)(EXERCISES[name][0])
    assert f"{name}: passed" in capsys.readouterr().out
    getattr(check, name)(lambda *_: ...)
    assert "not written yet" in capsys.readouterr().out


@pytest.mark.parametrize(("name", "message"), [(name, m) for name, (_, wrong) in EXERCISES.items() for m in wrong])
def test_every_mistake_is_named(name: str, message: str) -> None:
    wrong: Callable = EXERCISES[name][1][message]
    with pytest.raises(CheckFailed, match=f"^{name}: .*{message}"):
        getattr(check, name)(wrong)


def test_constant_candidates_leave_the_loss_but_not_the_gradient() -> None:
    z_1, z_2 = torch.randn(2, 12, 5, generator=torch.Generator().manual_seed(0))
    found = check.shard_gradients(z_1, z_2, 0.2)
    right = z_1.clone().requires_grad_()
    value = simclr.nt_xent(right, z_2, 0.2)
    (gradient,) = torch.autograd.grad(value, right)
    torch.testing.assert_close(found["gather_with_grad"][1], gradient)
    assert found["gather"][0] == pytest.approx(value.item(), rel=1e-5)
    detached = found["gather"][1]
    assert detached.norm() < 0.7 * gradient.norm()  # what others want of a row is lost: about half
