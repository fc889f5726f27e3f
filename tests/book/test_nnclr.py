"""The chapter on NNCLR: what its ablations do, and its formulas against matrices and counting."""

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from sslbook.book.chapters.nnclr import exercises, variants
from sslbook.data.datasets.shapes import Shapes
from sslbook.data.loader import Batch, Data
from sslbook.data.views import View
from sslbook.methods.nnclr import NNCLR
from sslbook.nn import ConvNet
from sslbook.schedules import Clock

VIEW = View(size=16)


def make(kind: type[NNCLR], size: int = 24) -> NNCLR:
    torch.manual_seed(0)
    return kind(ConvNet(4), VIEW, VIEW, hidden_dim=16, projector_dim=8, predictor_dim=16, queue_size=size)


@pytest.fixture(scope="module")
def batches() -> list[Batch]:
    data = Data(shapes=Shapes(num_train=64, num_test=1, size=16))
    return list(data.batches((VIEW, VIEW), 16, seed=0, epoch=0))


def test_tracing_changes_nothing_and_knows_what_every_row_shows(batches: list[Batch]) -> None:
    traced = make(variants.Traced)
    plain = make(NNCLR)
    projections = {}
    for step, batch in enumerate(batches):  # 64 images through 24 rows: it wraps around
        with torch.no_grad():
            z = F.normalize(copy.deepcopy(traced).train().projector(copy.deepcopy(traced).backbone(batch.views[0])))
        projections |= dict(zip(batch.index.tolist(), z))
        found = [method(batch, Clock(step, 4)) for method in (plain, traced)]
        torch.testing.assert_close(found[0]["loss"], found[1]["loss"], rtol=0, atol=0)
        for method, out in zip((plain, traced), found):
            out["loss"].backward()
            with torch.no_grad():
                for p in method.parameters():
                    p -= 0.1 * p.grad
                    p.grad = None
    for row, image in zip(traced.queue.rows, traced.images.tolist()):
        torch.testing.assert_close(row, projections[image], rtol=1e-3, atol=1e-4)
    assert sorted(set(traced.pushed.tolist())) == [2.0, 3.0]


def test_each_variant_takes_the_positive_that_its_name_says(batches: list[Batch]) -> None:
    oracle = make(variants.Oracle)
    for step, batch in enumerate(batches):
        stored = oracle.labels.clone()
        out = oracle(batch, Clock(step, 4))
        possible = (stored == batch.label[:, None]).any(1).double()  # a row of the class is there
        assert out["purity"].item() == pytest.approx(100 * possible.mean().item())
    assert possible.any()

    for kind, similarity in ((variants.OwnView, 1.0), (variants.PushedFirst, 1.0)):
        method = make(kind)
        for step, batch in enumerate(batches[:2]):
            out = method(batch, Clock(step, 4))
        assert out["neighbor_similarity"].item() == pytest.approx(similarity, abs=1e-5), kind
    usual = make(variants.Traced)
    for step, batch in enumerate(batches[:2]):
        out = usual(batch, Clock(step, 4))
    assert out["neighbor_similarity"] < 1 - 1e-4
    assert usual.queue.pointer == method.queue.pointer  # pushing first pushes no batch twice


def test_agreement_is_the_correlation_of_numbers_and_kappa_of_classes() -> None:
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randint(400, (2, 20_000), generator=generator)
    values = torch.randn(400, generator=generator)
    assert variants.agreement(values, a, b) == pytest.approx(0, abs=0.03)
    assert variants.agreement(values, a, a) == pytest.approx(1)
    both = np.concatenate([np.stack([values[a], values[b]]), np.stack([values[b], values[a]])], 1)
    assert variants.agreement(values, a, b) == pytest.approx(np.corrcoef(both)[0, 1], abs=0.02)
    classes = torch.arange(400) % 5
    half = torch.where(torch.arange(len(a)) < len(a) // 2, a, b)  # equal images in half of the pairs
    assert variants.agreement(classes, a, half) == pytest.approx(0.5, abs=0.02)


def eigenvalues(C: int, M: int, purity: float, alpha: float, rho: float) -> tuple[float, float]:
    """Of a function of the class and of one of the nuisance, from the matrices of the grid."""
    eye_c, eye_m, any_m = torch.eye(C).double(), torch.eye(M).double(), torch.full((M, M), 1 / M, dtype=torch.float64)
    wrong = torch.kron((1 - eye_c) / (C - 1), rho * eye_m + (1 - rho) * any_m)
    A = purity * torch.kron(eye_c, any_m) + (1 - purity) * wrong
    P = A.T @ torch.kron(eye_c, (1 - alpha) * eye_m + alpha * any_m)
    of_class = torch.kron(F.one_hot(torch.tensor(0), C).double() - 1 / C, torch.ones(M).double())
    of_nuisance = torch.kron(torch.ones(C).double(), F.one_hot(torch.tensor(0), M).double() - 1 / M)
    return tuple((u @ P @ u / (u @ u)).item() for u in (of_class, of_nuisance))


@pytest.mark.parametrize(("C", "M", "alpha", "rho"), [(3, 4, 0.0, 1.0), (10, 8, 0.3, 0.6), (2, 5, 0.9, 0.2)])
def test_class_and_nuisance_have_equal_eigenvalues_at_the_threshold(C: int, M: int, alpha: float, rho: float) -> None:
    at = exercises.threshold.solution(C, alpha, rho)
    assert np.diff(eigenvalues(C, M, at, alpha, rho)) == pytest.approx(0, abs=1e-12)
    below, above = (eigenvalues(C, M, at + step, alpha, rho) for step in (-0.05, 0.05))
    assert below[0] < below[1]
    assert above[0] > above[1]


def search_by_loops(z: Tensor, support: Tensor) -> list[list[float]]:
    found = []
    for row in z.tolist():
        cosines = [np.dot(row, s) / np.linalg.norm(s) for s in support.tolist()]
        best = support[int(np.argmax(cosines))]
        found.append((best / best.norm()).tolist())
    return found


def floor_by_counting(rows: Tensor) -> float:
    rows = rows.tolist()
    return float(np.mean([np.log(rows.count(row)) for row in rows]))


@pytest.mark.parametrize(
    ("exercise", "answer"),
    [
        (exercises.neighbors, search_by_loops),
        (
            exercises.nnclr_loss,
            lambda n, p, t: -(n @ F.normalize(p, dim=1, eps=1e-6).T / t).log_softmax(1).diag().mean(),
        ),
        (exercises.smallest_loss, floor_by_counting),
        (exercises.own_image, lambda Q, n: np.mean(np.clip(Q / n - np.linspace(0, 1, 20001), 0, None))),
        (exercises.mean_age, lambda Q, N: float(np.mean(np.arange(1, Q // N + 1)))),
        (exercises.agreement, lambda p, n: np.float64(p - 1 / n) / (1 - 1 / n)),
    ],
)
def test_unusual_solutions_pass(exercise, answer, capsys: pytest.CaptureFixture[str]) -> None:
    exercise(answer)
    assert "passed" in capsys.readouterr().out
