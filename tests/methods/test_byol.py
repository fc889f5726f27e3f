import math

import pytest
import torch
from torch import nn

from sslbook.methods.byol import regression_loss
from sslbook.nn.metrics import feature_std
from sslbook.schedules import Clock
from tests.methods.cases import CONVNET, VIEW, Case, apart, make, make_batch, transformer

CASE = Case(
    options={"view_1": VIEW, "view_2": VIEW, "hidden_dim": 32, "projector_dim": 16},
    command={"method.backbone": CONVNET, "method.hidden_dim": 16, "method.projector_dim": 8},
    learned=lambda method, batch, out: bool(out["loss"] < 0.2 and out["feature_std"] > 0.5),
    overfit={"momentum": 0.9},
    other_backbones=[transformer],
)


@pytest.mark.parametrize("n", [1, 5])
def test_regression_loss_equals_equation_2(n: int) -> None:
    p, z = torch.randn(2, n, 4, dtype=torch.float64)
    expected = 0.0
    for a, b in zip(p.tolist(), z.tolist()):
        dot, norms = sum(x * y for x, y in zip(a, b)), math.hypot(*a) * math.hypot(*b)
        expected += (2 - 2 * dot / norms) / n
    assert float(regression_loss(p, z)) == pytest.approx(expected, rel=1e-12)


def test_loss_is_symmetric_with_one_pass_per_view() -> None:
    method = apart(make("byol"))
    batch = make_batch(method, 5)
    out = method(batch, Clock())
    one, two = batch.views
    expected = 0.0
    for x, other in ((one, two), (two, one)):
        p = method.predictor(method.projector(method.backbone(x)))
        z = method.target_projector(method.target_backbone(other))
        expected += float(regression_loss(p, z).detach())
    assert float(out["loss"].detach()) == pytest.approx(expected, rel=1e-5)
    out["loss"].backward()
    assert all(p.grad is None for p in method.target_backbone.parameters())


@pytest.mark.parametrize("progress", [0.0, 0.25, 0.5, 1.0])
def test_target_follows_with_a_momentum_that_rises_along_a_cosine(progress: float) -> None:
    method = make("byol", momentum=0.5)
    momentum = 1 - 0.5 * (math.cos(math.pi * progress) + 1) / 2  # section 3.2
    for target, online in ((method.target_backbone, method.backbone), (method.target_projector, method.projector)):
        start = next(target.module.parameters()).clone()
        with torch.no_grad():
            next(online.parameters()).add_(1)
        method.after_step(Clock(round(1000 * progress), 1000))
        torch.testing.assert_close(next(target.module.parameters()), start + 1 - momentum)


def test_feature_std() -> None:
    assert feature_std(torch.ones(6, 4)) < 1e-6
    assert feature_std(torch.randn(4000, 64)) == pytest.approx(1.0, abs=0.01)
    assert feature_std(torch.ones(1, 4)) == 0


def std_after_training(predictor: bool) -> float:
    method = make("byol", momentum=0.9)
    if not predictor:
        method.predictor = nn.Identity()
    optimizer = torch.optim.SGD([p for p in method.parameters() if p.requires_grad], lr=0.1, momentum=0.9)
    for step in range(80):
        out = method(make_batch(method, 16, seed=step), Clock())
        optimizer.zero_grad()
        out["loss"].backward()
        optimizer.step()
        method.after_step(Clock(0, 80))
    return float(out["feature_std"])


@pytest.mark.slow
def test_without_predictor_it_collapses() -> None:
    kept, removed = std_after_training(True), std_after_training(False)
    assert kept > 0.65
    assert removed < 0.4
