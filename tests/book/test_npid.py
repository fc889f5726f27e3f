"""The chapter on NPID: what its ablations do, and its formulas against simulations and literal versions."""

import copy
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from sslbook.book.chapters.npid import exercises, variants
from sslbook.data.datasets.shapes import Shapes
from sslbook.data.loader import Batch, Data
from sslbook.data.views import View
from sslbook.methods.npid import NPID, sample_negatives
from sslbook.nn import ConvNet
from sslbook.schedules import Clock

VIEW = View(size=16)


def make(kind: type[NPID] = variants.Watched, num_negatives: int = 0, **options) -> NPID:
    torch.manual_seed(0)
    method = kind(ConvNet(4), VIEW, 16, 0.2, options.pop("momentum", 0.5), num_negatives, **options)
    method.setup(data())
    return method


def data() -> Data:
    return Data(shapes=Shapes(num_train=64, num_test=1, size=16))


@pytest.fixture(scope="module")
def run() -> list[Batch]:
    return [b for epoch in range(2) for b in data().batches((VIEW,), 16, seed=0, epoch=epoch)]


@pytest.mark.parametrize("num_negatives", [0, 12])
def test_watching_changes_nothing(run: list[Batch], num_negatives: int) -> None:
    plain, watched = make(NPID, num_negatives), make(num_negatives=num_negatives)
    for step, batch in enumerate(run[:3]):
        losses = [method(batch, Clock(step, 8, 4))["loss"] for method in (plain, watched)]
        torch.testing.assert_close(*losses, rtol=0, atol=0)
        torch.testing.assert_close(plain.memory.rows, watched.memory.rows, rtol=0, atol=0)


def sums(method: NPID, batch: Batch) -> Tensor:
    """log Z/n of each view, from all rows."""
    with torch.no_grad():
        v = F.normalize(method.projector(method.backbone(batch.views[0])), dim=1)
        return (v @ method.memory.rows.T / 0.2).logsumexp(1) - math.log(64)


def test_the_constant_follows_the_sum_until_it_is_frozen(run: list[Batch]) -> None:
    every, until = make(num_negatives=400, constant_until=99), make(num_negatives=400, constant_until=2)
    wrong = make(num_negatives=400, constant_until=99, wrong=100.0)
    found = {name: [] for name in ("every", "until", "wrong", "true")}
    for step, batch in enumerate(run[:6]):
        found["true"].append(sums(every, batch).exp().mean().log().item())
        for name, method in (("every", every), ("until", until), ("wrong", wrong)):
            found[name].append(method(batch, Clock(step, 8, 4))["log constant/n"].item())
    assert found["every"] == pytest.approx(found["true"], abs=0.15)  # from 400 of 64 rows, with replacement
    assert len(set(found["until"])) == 2
    assert found["until"][1:] == [found["until"][1]] * 5
    assert found["true"][-1] > found["until"][-1] + 0.5  # the bank has filled: the constant has become too small
    assert found["wrong"] == pytest.approx([value + math.log(100) for value in found["every"]], abs=1e-4)


def test_what_is_never_updated_stays_and_what_is_not_normalized_has_other_lengths(run: list[Batch]) -> None:
    never, free = make(momentum=1.0), make(unit=False)
    start = never.memory.rows.clone()
    for method in (never, free):
        method(run[0], Clock())
    assert torch.equal(never.memory.rows, start)
    lengths = free.memory.rows.norm(dim=1)
    assert (lengths[run[0].index] - 1).abs().min() > 1e-3


def test_the_proximal_term_is_a_cosine(run: list[Batch]) -> None:
    plain, near = make(num_negatives=12), make(num_negatives=12, proximal=3.0)
    out, more = plain(run[0], Clock()), near(run[0], Clock())
    cosine = out["own row"]  # before the update
    torch.testing.assert_close(more["loss"], out["loss"] + 3 * (2 - 2 * cosine))


def test_info_nce_is_cross_entropy_over_the_rows_that_nce_compares(run: list[Batch]) -> None:
    method = make(num_negatives=12, loss="InfoNCE")
    rows = method.memory.rows.clone()
    v = F.normalize(method.projector(copy.deepcopy(method.backbone)(run[0].views[0])), dim=1)
    noise = sample_negatives(run[0].index, 12, 64, Clock())
    expected = torch.stack(
        [
            torch.logsumexp((rows[torch.cat([i[None], j])] @ a) / 0.2, 0) - rows[i] @ a / 0.2
            for a, i, j in zip(v, run[0].index, noise)
        ]
    ).mean()
    torch.testing.assert_close(method(run[0], Clock())["loss"], expected)


def test_a_network_that_stands_still_has_rows_of_age_zero(run: list[Batch]) -> None:
    method, found = make(), {}

    def watch(step: int, method: variants.Watched) -> None:
        if step == 8:
            found.update(variants.staleness(method, run, step, 4))

    variants.train(method, data(), run, 16, 0.0, 0, watch)
    assert found["same view"] == pytest.approx([1.0] * 8, abs=1e-3)
    assert max(found["error"]) < 1e-2
    variants.train(method, data(), run, 16, 1e-2, 0, watch)
    assert found["same view"][0] > found["same view"][-1]
    assert found["error"][-1] > 0.5
    for cosine, error in zip(found["same view"], found["error"]):  # |a - b|^2 = 2 - 2 cos, and Jensen
        assert error * 0.2 <= math.sqrt(2 - 2 * cosine) + 1e-3


def test_a_weight_between_its_visits_is_only_pushed(run: list[Batch]) -> None:
    torch.manual_seed(0)
    method = variants.Parametric(ConvNet(4), VIEW, 16, 0.2, 64)
    method(run[0], Clock())["loss"].backward()
    v = F.normalize(method.projector(method.backbone(run[0].views[0])), dim=1).detach()
    absent = sorted(set(range(64)) - set(run[0].index.tolist()))
    assert len(absent) == 48
    tangent = v.mean(0) - method.weight.detach()[absent] * (method.weight.detach()[absent] @ v.mean(0))[:, None]
    assert ((-method.weight.grad[absent] * tangent).sum(1) < 0).all()


def test_roughness_is_zero_for_a_straight_line_and_large_for_a_saw() -> None:
    assert variants.roughness([5 - 0.01 * i for i in range(200)]) < 1e-6
    assert variants.roughness([5 + (-1) ** i for i in range(200)]) == pytest.approx(math.sqrt(2) / 5, rel=0.02)


@pytest.mark.parametrize("m", [0.0, 0.5])
def test_ages_by_simulation(m: float) -> None:
    n, written, others, own = 100, torch.zeros(100), [], []
    generator = torch.Generator().manual_seed(0)
    for epoch in range(60):
        for step, i in enumerate(torch.randperm(n, generator=generator).tolist()):
            now = epoch * n + step
            if epoch > 20:
                others.append((now - written).mean().item() / n)
                own.append((now - written[i]).item() / n)
            written[i] = m * written[i] + (1 - m) * now  # the mean time at which a row's parts were written
    expected = exercises.ages.solution(m)
    assert sum(others) / len(others) == pytest.approx(expected[0], abs=0.015)
    assert sum(own) / len(own) == pytest.approx(expected[1], abs=0.015)


@pytest.mark.parametrize(
    ("exercise", "answer"),
    [
        (
            exercises.floor,
            lambda log_a, i: torch.stack([torch.logsumexp(a, 0) - a[j] for a, j in zip(log_a, i)]).mean(),
        ),
        (exercises.visits, lambda n, batch, steps: np.float64(batch * steps) / n),
        (exercises.start, lambda d, tau: torch.tensor(1 / (2 * d * tau**2)).exp()),
        (exercises.wrong_constant, lambda s, i, c: [1 / c, 1]),
        (exercises.ages, lambda m: np.array([1 / 2 + (1 - m) / 12 + m / (1 - m), 1 / (1 - m)])),
        (
            exercises.nce,
            lambda s, log_z, n: (
                -(
                    F.logsigmoid(s[:, 0] - log_z - math.log((s.shape[1] - 1) / n)).sum()
                    + F.logsigmoid(-(s[:, 1:] - log_z - math.log((s.shape[1] - 1) / n))).sum()
                )
                / len(s)
            ),
        ),
    ],
)
def test_unusual_solutions_pass(exercise, answer, capsys: pytest.CaptureFixture[str]) -> None:
    exercise(answer)
    assert "passed" in capsys.readouterr().out
