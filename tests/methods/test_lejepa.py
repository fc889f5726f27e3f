import cmath
import math
from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn

from sslbook import distributed
from sslbook.data.views import View
from sslbook.methods.lejepa import LeJEPA, directions, epps_pulley, prediction_loss
from sslbook.nn import resnet50
from sslbook.schedules import Clock
from tests.methods.cases import CONVNET, VIEW, Case, make, make_batch, transformer

SMALL = {
    "global_view": VIEW,
    "local_view": View(size=8, crop=(0.05, 0.3)),
    "num_local": 2,
    "num_slices": 64,
    "hidden_dim": 32,
    "projector_dim": 8,
}
CASE = Case(
    options=SMALL,
    command={
        "method.backbone": CONVNET,
        "method.num_local": 2,
        "method.num_slices": 32,
        "method.hidden_dim": 16,
        "method.projector_dim": 8,
    },
    learned=lambda method, batch, out: bool(out["prediction"] < 0.15 and out["feature_std"] > 0.7),
    lr=5e-3,
    corners=[(6, 1e-3, {"lambda_": 0.9, "num_local": 0})],
    other_backbones=[transformer],
)


def literal(column: list[float]) -> float:
    """N times the integral over [-3, 3] of |empirical - exp(-t^2/2)|^2 exp(-t^2/2), by the trapezoidal rule."""
    width = 3 / 16
    knots = [width * i for i in range(-16, 17)]
    values = []
    for t in knots:
        empirical = sum(cmath.exp(1j * t * x) for x in column) / len(column)
        values.append(abs(empirical - math.exp(-(t**2) / 2)) ** 2 * math.exp(-(t**2) / 2))
    return len(column) * sum(width * (a + b) / 2 for a, b in pairwise(values))


@pytest.mark.parametrize(("views", "n", "count"), [(2, 5, 3), (1, 1, 2), (3, 8, 1)])
def test_epps_pulley_equals_literal_integral(views: int, n: int, count: int) -> None:
    x = 2 * torch.randn(views, n, count, dtype=torch.float64) + 0.5
    expected = [[literal(column.tolist()) for column in view.T] for view in x]
    torch.testing.assert_close(epps_pulley(x), torch.tensor(expected, dtype=torch.float64))


def test_epps_pulley_is_small_for_the_standard_normal_alone() -> None:
    generator = torch.Generator().manual_seed(0)
    normal = torch.randn(2000, 1, generator=generator)
    small = float(epps_pulley(normal))
    assert small < 4  # about 1.05 on average, from 1 - exp(-t^2) under the integral
    signs = normal.sign()
    for other in (normal + 0.3, 1.4 * normal, signs, torch.zeros_like(normal)):
        assert float(epps_pulley(other)) > 10 * small


def test_directions_are_uniform_and_depend_on_seed_and_step_alone() -> None:
    device = torch.device("cpu")
    a = directions(3, 5000, Clock(step=7, seed=5), device)
    torch.manual_seed(1)
    assert torch.equal(a, directions(3, 5000, Clock(step=7, seed=5), device))
    for other in (Clock(step=8, seed=5), Clock(step=7, seed=6)):
        assert (a - directions(3, 5000, other, device)).abs().max() > 0.1
    torch.testing.assert_close(a.norm(dim=0), torch.ones(5000))
    torch.testing.assert_close(a @ a.T / 5000, torch.eye(3) / 3, rtol=0, atol=0.02)
    torch.testing.assert_close(a.mean(dim=1), torch.zeros(3), rtol=0, atol=0.03)
    fourth = a.pow(4).mean(dim=1)  # 3 / (d (d + 2)) on the sphere, more in its corners
    torch.testing.assert_close(fourth, torch.full((3,), 0.2), rtol=0, atol=0.02)


def _statistic(x: Tensor) -> tuple[Tensor, Tensor]:
    """The statistic, and its gradient for all rows, gathered."""
    n = x.shape[1] // distributed.world_size()
    mine = x[:, distributed.rank() * n :][:, :n].clone().requires_grad_()
    value = epps_pulley(mine)
    value.sum().backward()
    gradient = distributed.all_gather(mine.grad.transpose(0, 1)) / distributed.world_size()
    return value.detach(), gradient


@pytest.mark.parametrize("n", [6, 2])
def test_statistic_is_of_the_global_batch(n: int, pool) -> None:
    x = torch.randn(2, n, 3)
    value, gradient = _statistic(x)
    for got_value, got_gradient in pool.run(_statistic, x):
        torch.testing.assert_close(got_value, value)
        torch.testing.assert_close(got_gradient, gradient)


@pytest.mark.parametrize(("views", "num_global", "n"), [(5, 2, 3), (2, 1, 1), (3, 3, 2)])
def test_prediction_loss_is_the_distance_from_the_global_mean(views: int, num_global: int, n: int) -> None:
    z = torch.randn(views, n, 4, dtype=torch.float64)
    errors = []
    for i in range(n):
        for d in range(4):
            center = sum(float(z[v, i, d]) for v in range(num_global)) / num_global
            errors += [(center - float(z[v, i, d])) ** 2 for v in range(views)]
    assert float(prediction_loss(z, num_global)) == pytest.approx(sum(errors) / len(errors), rel=1e-10)


def test_lambda_weighs_the_two_terms() -> None:
    method = make("lejepa", lambda_=0.3)
    out = method(make_batch(method, 5), Clock())
    torch.testing.assert_close(out["loss"].detach(), 0.7 * out["prediction"] + 0.3 * out["sigreg"])
    assert [view.size for view in method.views()] == [16, 16, 8, 8]


def test_forward_and_its_gradient() -> None:
    """SIGReg is of every view by itself, along the step's directions; there is no stop-gradient."""
    method = make("lejepa", lambda_=0.3)
    batch, clock = make_batch(method, 5), Clock(step=7, seed=5)
    f = [method.backbone(torch.cat(views)) for views in (batch.views[:2], batch.views[2:])]
    z = method.projector(torch.cat(f)).unflatten(0, (4, 5))
    along = directions(8, 64, clock, torch.device("cpu"))
    sigreg = torch.stack([epps_pulley(view @ along).mean() for view in z]).mean()
    literal = 0.7 * ((z[0] + z[1]) / 2 - z).square().mean() + 0.3 * sigreg
    loss, weights = method(batch, clock)["loss"], list(method.parameters())
    torch.testing.assert_close(loss, literal)
    expected = torch.autograd.grad(literal, weights)
    torch.testing.assert_close(torch.autograd.grad(loss, weights), expected, rtol=1e-3, atol=1e-4)


def std_after_training(lambda_: float) -> float:
    method = make("lejepa", lambda_=lambda_)
    optimizer = torch.optim.AdamW(method.parameters(), lr=1e-2)
    for step in range(60):
        batch = make_batch(method, 32, seed=step)
        optimizer.zero_grad()
        method(batch, Clock(step, 60))["loss"].backward()
        optimizer.step()
    return float(method.features(batch)[0].std(dim=0).mean().detach())


@pytest.mark.slow
def test_without_sigreg_it_collapses() -> None:
    assert std_after_training(0.2) > 0.4
    assert std_after_training(0.0) < 0.1


def test_default_sizes() -> None:
    with torch.device("meta"):
        method = LeJEPA(resnet50())
        assert method.projector(method.backbone(torch.zeros(2, 3, 98, 98))).shape == (2, 128)
    assert [view.size for view in method.views()] == [224, 224] + [98] * 6
    assert [m.out_features for m in method.projector if isinstance(m, nn.Linear)] == [2048, 2048, 128]
