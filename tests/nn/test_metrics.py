import math

import numpy as np
import pytest
import torch
from torch import Tensor

from sslbook import distributed
from sslbook.nn import metrics
from sslbook.nn.metrics import feature_std


def test_from_collapse_to_uniform() -> None:
    assert feature_std(torch.ones(6, 4)) < 1e-6
    assert feature_std(torch.ones(1, 4)) == 0
    assert feature_std(torch.randn(4000, 64)) == pytest.approx(1.0, abs=0.01)
    z = torch.randn(5, 3)
    torch.testing.assert_close(feature_std(z), feature_std(7 * z))


def _std(z: Tensor) -> float:
    n = len(z) // distributed.world_size()
    return float(feature_std(z[distributed.rank() * n :][:n]))


def test_two_processes_are_one(pool) -> None:
    z = torch.randn(6, 3)
    assert pool.run(_std, z) == pytest.approx([_std(z)] * 2)


# -- against literal versions ------------------------------------------------------------------------------------------


def features(n: int, dim: int, decay: float = 1.0, seed: int = 0) -> Tensor:
    """Features whose principal components have the variances i^-decay, turned at random."""
    g = torch.Generator().manual_seed(seed)
    rotation = torch.linalg.qr(torch.randn(dim, dim, generator=g)).Q
    return torch.randn(n, dim, generator=g) * torch.arange(1, dim + 1).float() ** (-decay / 2) @ rotation


@pytest.mark.parametrize("n", [200, 12])  # more rows than columns, and fewer
def test_rank_me_is_the_exponential_of_the_entropy_of_singular_values(n: int, monkeypatch) -> None:
    monkeypatch.setattr(metrics, "ROWS", 7)
    x = features(n, 16) + 0.5
    sigma = np.linalg.svd(x.double().numpy(), compute_uv=False)
    p = sigma / sigma.sum() + 1e-7
    assert metrics.rank_me(x) == pytest.approx(np.exp(-(p * np.log(p)).sum()), rel=1e-6)
    assert metrics.rank_me(torch.eye(9)) == pytest.approx(9, rel=1e-4)
    assert metrics.rank_me(torch.outer(torch.arange(1.0, 9), torch.ones(4))) == pytest.approx(1, rel=1e-4)  # a line
    assert metrics.rank_me(torch.zeros(5, 3)) == 0


def test_alpha_req_finds_the_exponent() -> None:
    """The eigenvalues are made exactly i^-1.5."""
    q = torch.linalg.qr(torch.randn(400, 120, dtype=torch.float64) - 0.0).Q
    q = torch.linalg.qr(q - q.mean(dim=0)).Q  # columns without a mean
    x = (q * torch.arange(1, 121).double() ** -0.75).float()
    assert metrics.alpha_req(x) == pytest.approx(1.5, abs=1e-3)
    assert metrics.decay_exponent(torch.arange(1, 6).double() ** -0.7) == pytest.approx(0.7)  # a short spectrum
    noisy = features(4000, 120, decay=0.8)
    i = np.arange(4, 101)
    values = np.linalg.eigvalsh(np.cov(noisy.double().numpy().T))[::-1][3:100]
    expected = -np.polyfit(np.log(i), np.log(values), 1, w=i**-0.5)[0]  # numpy squares its weights
    assert metrics.alpha_req(noisy) == pytest.approx(expected, abs=1e-6)
    assert math.isnan(metrics.alpha_req(torch.ones(10, 4)))


def test_lidar_is_literal_and_discounts_what_views_change() -> None:
    views = features(60 * 5, 8).view(60, 5, 8) + features(60, 8, seed=1)[:, None] * 2
    x = views.double()
    mean = x.mean(dim=1)
    around = (x - mean[:, None]).flatten(0, 1)
    within = around.T @ around / len(around) + 1e-4 * torch.eye(8)
    centered = mean - mean.mean(dim=0)
    root = torch.linalg.inv(scipy_root(within))
    values = torch.linalg.eigvalsh(root @ (centered.T @ centered / 60) @ root)
    p = values / values.sum() + 1e-7
    assert metrics.lidar(views) == pytest.approx(float((-p * p.log()).sum().exp()), rel=1e-6)
    # Eight directions vary, but in six of them views differ as much as images do: RankMe counts these too.
    strong = torch.cat([features(200, 2, 0)[:, None].expand(-1, 10, -1), torch.randn(200, 10, 6)], dim=2)
    assert metrics.lidar(strong) < 2.5 < 7 < metrics.rank_me(strong.flatten(0, 1))


def scipy_root(a: Tensor) -> Tensor:
    from scipy.linalg import sqrtm

    return torch.from_numpy(np.real(sqrtm(a.numpy())))


def test_alignment_and_uniformity_are_literal(monkeypatch) -> None:
    monkeypatch.setattr(metrics, "ROWS", 7)
    x, y = torch.randn(23, 5), torch.randn(23, 5)
    a, b = (v.double() / v.double().norm(dim=1, keepdim=True) for v in (x, y))
    assert metrics.alignment(x, y) == pytest.approx(sum(float((p - q).norm() ** 2) for p, q in zip(a, b)) / 23)
    pairs = [math.exp(-2 * float((a[i] - a[j]).norm() ** 2)) for i in range(23) for j in range(23) if i != j]
    assert metrics.uniformity(x) == pytest.approx(math.log(sum(pairs) / len(pairs)), rel=1e-5)
    assert metrics.uniformity(torch.ones(6, 4)) == pytest.approx(0, abs=1e-5)
    assert metrics.uniformity(torch.randn(500, 64)) < -3.8  # nearly uniform: -4 + 4 * 2 / 64


def test_cka_is_literal_and_blind_to_rotation_and_scale(monkeypatch) -> None:
    monkeypatch.setattr(metrics, "ROWS", 7)
    x, y = features(40, 6), features(40, 9, seed=1) + 3
    rotation = torch.linalg.qr(torch.randn(6, 6)).Q
    assert metrics.cka(x, 3 * x @ rotation + 1) == pytest.approx(1, abs=1e-5)
    k, l = ((v - v.mean(dim=0)).double() @ (v - v.mean(dim=0)).double().T for v in (x, y))
    assert metrics.cka(x, y) == pytest.approx(float((k * l).sum() / (k.norm() * l.norm())), rel=1e-5)
    assert math.isnan(metrics.cka(x, torch.ones(40, 2)))
