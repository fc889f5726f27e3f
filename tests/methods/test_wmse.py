import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sslbook import rng
from sslbook.errors import UserError
from sslbook.methods import wmse
from sslbook.methods.wmse import WMSE, pair_loss, slices, whiten
from sslbook.nn import resnet50
from sslbook.schedules import Clock
from tests.methods.cases import CONVNET, VIEW, Case, make, make_batch, transformer

SMALL = {"view": VIEW, "hidden_dim": 32, "projector_dim": 2, "slice_size": 4, "num_permutations": 2}
CASE = Case(
    options={**SMALL, "slice_size": 8},
    command={
        "method.backbone": CONVNET,
        "method.hidden_dim": 16,
        "method.projector_dim": 2,
        "method.slice_size": 4,
        "method.epsilon": 0.01,
    },
    learned=lambda method, batch, out: bool(out["loss"] < 0.2),
    overfit={"projector_dim": 8, "slice_size": 32},
    lr=1e-3,
    corners=[(6, 1e-3, {"slice_size": 6}), (8, 1e-3, {"slice_size": 4, "num_views": 3, "epsilon": 0.1})],
    other_backbones=[transformer],
)


def cholesky(a: list[list[float]]) -> list[list[float]]:
    n = len(a)
    factor = [[0.0] * n for _ in range(n)]
    for i in range(n):
        for j in range(i + 1):
            rest = a[i][j] - sum(factor[i][k] * factor[j][k] for k in range(j))
            factor[i][j] = math.sqrt(rest) if i == j else rest / factor[j][j]
    return factor


def literal_whitening(x: Tensor, epsilon: float) -> list[list[float]]:
    """Mean, unbiased covariance, its Cholesky factor, and a triangular system for every row."""
    n, dim = x.shape
    means = [sum(row[d] for row in x.tolist()) / n for d in range(dim)]
    rows = [[row[d] - means[d] for d in range(dim)] for row in x.tolist()]
    covariance = [[sum(row[i] * row[j] for row in rows) / (n - 1) for j in range(dim)] for i in range(dim)]
    mixed = [[(1 - epsilon) * covariance[i][j] + epsilon * (i == j) for j in range(dim)] for i in range(dim)]
    factor = cholesky(mixed)
    out = []
    for row in rows:
        z: list[float] = []
        for i in range(dim):
            z.append((row[i] - sum(factor[i][k] * z[k] for k in range(i))) / factor[i][i])
        out.append(z)
    return out


@pytest.mark.parametrize(("n", "dim", "epsilon"), [(7, 3, 0.0), (5, 4, 0.1), (2, 1, 0.0)])
def test_whitening_equals_literal_computation(n: int, dim: int, epsilon: float) -> None:
    x = torch.randn(n, dim, dtype=torch.float64) @ torch.randn(dim, dim, dtype=torch.float64) + 1
    torch.testing.assert_close(whiten(x, epsilon), torch.tensor(literal_whitening(x, epsilon), dtype=torch.float64))


def test_whitened_slices_have_identity_covariance() -> None:
    x = torch.randn(2, 3, 9, 4, dtype=torch.float64) @ torch.randn(4, 4, dtype=torch.float64)
    z = whiten(x).flatten(0, 1)
    for part in z:  # every slice by itself
        torch.testing.assert_close(part.T.cov(), torch.eye(4, dtype=torch.float64))
    torch.testing.assert_close(z.mean(dim=1), torch.zeros(6, 4, dtype=torch.float64))


@pytest.mark.parametrize(("views", "n"), [(2, 5), (4, 3), (3, 1)])
def test_loss_is_the_mean_over_pairs(views: int, n: int) -> None:
    z = torch.randn(views, n, 3, dtype=torch.float64)
    terms = []
    for i in range(views):
        for j in range(i):
            for a, b in zip(z[i].tolist(), z[j].tolist()):
                terms.append(2 - 2 * sum(x * y for x, y in zip(a, b)) / math.hypot(*a) / math.hypot(*b))
    assert float(pair_loss(z)) == pytest.approx(sum(terms) / len(terms), rel=1e-10)


def test_forward_slice_by_slice() -> None:
    method = make("wmse", slice_size=4, num_views=3, num_permutations=2, epsilon=0.1)
    batch, clock = make_batch(method, 8), Clock(seed=2)
    h = method.projector(torch.cat([method.backbone(x) for x in batch.views])).double().unflatten(0, (3, 8))
    terms = []
    for k in range(2):
        for rows in slices(batch.index, 4, rng.METHOD + k, clock):
            white = []
            for x in (view[rows] - view[rows].mean(dim=0) for view in h):
                factor = torch.linalg.cholesky(0.9 * x.T @ x / 3 + 0.1 * torch.eye(2))
                white.append(F.normalize(x @ torch.linalg.inv(factor).T, dim=1))
            terms += [(white[i] - white[j]).square().sum(dim=1).mean() for i, j in ((0, 1), (0, 2), (1, 2))]
    literal, weights = torch.stack(terms).mean(), list(method.projector.parameters())
    loss = method(batch, clock)["loss"]
    torch.testing.assert_close(loss, literal.float(), rtol=1e-4, atol=1e-5)
    expected = torch.autograd.grad(literal, weights)  # the whitening itself is differentiated
    torch.testing.assert_close(torch.autograd.grad(loss, weights), expected, rtol=1e-3, atol=1e-4)


def test_all_views_get_a_gradient() -> None:
    z = torch.randn(3, 5, 4, requires_grad=True)
    pair_loss(z).backward()
    assert (z.grad.abs().amax(dim=(1, 2)) > 0).all()


def test_slices_depend_on_image_epoch_and_stream_alone() -> None:
    index, clock = torch.randperm(64)[:12], Clock(step=7, steps_per_epoch=2, seed=5)
    rows = slices(index, 4, rng.METHOD, clock)
    assert torch.equal(rows.flatten().sort().values, torch.arange(12))
    order = torch.randperm(12)
    assert torch.equal(index[order][slices(index[order], 4, rng.METHOD, clock)], index[rows])
    assert not torch.equal(rows, slices(index, 4, rng.METHOD + 1, clock))
    assert not torch.equal(rows, slices(index, 4, rng.METHOD, Clock(step=8, steps_per_epoch=2, seed=5)))


def test_repeated_images_are_each_in_one_slice() -> None:
    rows = slices(torch.tensor([3, 3, 3, 5, 5, 3]), 3, 0, Clock())
    assert sorted(rows.flatten().tolist()) == list(range(6))


def std_after_training() -> float:
    torch.manual_seed(0)
    method = WMSE(CASE.backbone(), **{**SMALL, "projector_dim": 4, "slice_size": 16, "num_permutations": 1})
    optimizer = torch.optim.AdamW(method.parameters(), lr=5e-3)
    for step in range(80):
        out = method(make_batch(method, 16, seed=step), Clock())
        optimizer.zero_grad()
        out["loss"].backward()
        optimizer.step()
    return float(out["feature_std"])


@pytest.mark.slow
def test_without_whitening_it_collapses(monkeypatch) -> None:
    assert std_after_training() > 0.6
    monkeypatch.setattr(wmse, "whiten", lambda x, epsilon: x)
    assert std_after_training() < 0.3


def test_rejects_invalid_options() -> None:
    method = make("wmse", slice_size=4)
    with pytest.raises(UserError, match=r"slices of 4: use a batch_size of 8, or another method\.slice_size"):
        method(make_batch(method, 10), Clock())
    with pytest.raises(UserError, match=r"slice of 8 images .* in too few of 3 directions .*: set method\.slice_size"):
        whiten(torch.ones(8, 3))


def test_default_sizes() -> None:
    with torch.device("meta"):
        method = WMSE(resnet50())
        assert method.projector(method.backbone(torch.zeros(2, 3, 224, 224))).shape == (2, 128)
    assert [m.out_features for m in method.projector if isinstance(m, nn.Linear)] == [1024, 128]
