import math

import pytest
import torch

from sslbook.methods.vicreg import VICReg, covariance_loss, invariance_loss, variance_loss
from sslbook.nn import resnet50
from sslbook.schedules import Clock
from tests.methods.cases import CONVNET, VIEW, Case, make, make_batch, transformer

CASE = Case(
    options={"view_1": VIEW, "view_2": VIEW, "hidden_dim": 32, "projector_dim": 16},
    command={"method.backbone": CONVNET, "method.hidden_dim": 16, "method.projector_dim": 8},
    learned=lambda method, batch, out: bool(out["invariance"] < 0.1 and out["variance"] < 0.1),
    lr=1e-3,
    corners=[(6, 1e-4, {"covariance_weight": 25.0}), (4, 1e-4, {})],
    other_backbones=[transformer],
)


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


def covariance(a: list[float], b: list[float]) -> float:
    return sum((x - mean(a)) * (y - mean(b)) for x, y in zip(a, b)) / (len(a) - 1)


@pytest.mark.parametrize(("n", "dim", "scale"), [(5, 3, 1.0), (2, 7, 0.01), (7, 1, 0.5)])
def test_terms_equal_equations_1_to_5(n: int, dim: int, scale: float) -> None:
    z_1, z_2 = scale * torch.randn(2, n, dim, dtype=torch.float64) + 1
    columns = z_1.T.tolist()
    variance = sum(max(0.0, 1 - math.sqrt(covariance(c, c) + 1e-4)) for c in columns) / dim
    off = sum(covariance(a, b) ** 2 for i, a in enumerate(columns) for j, b in enumerate(columns) if i != j) / dim
    paper = sum(sum((x - y) ** 2 for x, y in zip(a, b)) for a, b in zip(z_1.tolist(), z_2.tolist())) / n
    assert float(variance_loss(z_1)) == pytest.approx(variance, rel=1e-10, abs=1e-12)
    assert float(covariance_loss(z_1)) == pytest.approx(off, rel=1e-9, abs=1e-14)
    assert float(invariance_loss(z_1, z_2)) == pytest.approx(paper / dim, rel=1e-10)


def test_loss_weights_the_terms_as_the_authors_code() -> None:
    method = make("vicreg", invariance_weight=2.0, variance_weight=3.0, covariance_weight=5.0)
    batch = make_batch(method, 5)
    z_1, z_2 = [method.projector(method.backbone(x)) for x in batch.views]
    expected = 2 * invariance_loss(z_1, z_2) + 3 * (variance_loss(z_1) + variance_loss(z_2)) / 2
    expected = expected + 5 * (covariance_loss(z_1) + covariance_loss(z_2))
    torch.testing.assert_close(method(batch, Clock())["loss"], expected)


def after_training(**options: float) -> tuple[float, float]:
    """The mean standard deviation of a dimension, and the mean correlation of two different ones."""
    method = make("vicreg", **options)
    optimizer = torch.optim.AdamW(method.parameters(), lr=1e-2)
    batch = make_batch(method, 32)
    for _ in range(60):
        optimizer.zero_grad()
        method(batch, Clock())["loss"].backward()
        optimizer.step()
    z = method.projector(method.backbone(batch.views[0])).detach()
    c = torch.corrcoef(z.T)
    return float(z.std(dim=0).mean()), float((c - c.diag().diag()).abs().sum() / (16 * 15))


@pytest.mark.slow
def test_without_variance_it_collapses_and_without_covariance_dimensions_are_correlated() -> None:
    std, correlation = after_training(covariance_weight=5.0)
    assert std > 0.6
    assert correlation < 0.15
    assert after_training(variance_weight=0.0)[0] < 0.3
    assert after_training(covariance_weight=0.0)[1] > 0.25


def test_default_sizes() -> None:
    """Section 4.2: an expander of three layers of 8192; the authors' code has no bias in the last."""
    with torch.device("meta"):
        method = VICReg(resnet50())
        assert method.projector(method.backbone(torch.zeros(2, 3, 224, 224))).shape == (2, 8192)
    linear = 2048 * 8192 + 8192 * 8192 * 2
    assert sum(p.numel() for p in method.projector.parameters()) == linear + 4 * 8192
