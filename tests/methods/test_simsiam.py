import math

import pytest
import torch
from torch import Tensor

from sslbook.cli.recipes import RECIPES
from sslbook.methods.simsiam import SimSiam, distance
from sslbook.nn import MLP, resnet50
from sslbook.schedules import Clock
from tests.methods.cases import CONVNET, VIEW, Case, make, make_batch, transformer

SMALL = {"view": VIEW, "hidden_dim": 32, "projector_dim": 16, "predictor_dim": 8}
CASE = Case(
    options=SMALL,
    command={"method.backbone": CONVNET, "method.hidden_dim": 16, "method.projector_dim": 8},
    learned=lambda method, batch, out: bool(out["loss"] < -0.9 and out["feature_std"] > 0.5),
    lr=0.01,
    corners=[(6, 1e-3, {})],
    other_backbones=[transformer],
)


@pytest.mark.parametrize("n", [1, 5])
def test_distance_equals_equation_1(n: int) -> None:
    p, z = torch.randn(2, n, 4, dtype=torch.float64)
    expected = 0.0
    for a, b in zip(p.tolist(), z.tolist()):
        expected -= sum(x * y for x, y in zip(a, b)) / math.hypot(*a) / math.hypot(*b) / n
    assert float(distance(p, z)) == pytest.approx(expected, rel=1e-12)


def test_loss_is_symmetric_with_one_pass_per_view() -> None:
    method = make("simsiam")
    batch = make_batch(method, 5)
    z = [method.projector(method.backbone(x)) for x in batch.views]
    expected = (distance(method.predictor(z[0]), z[1]) + distance(method.predictor(z[1]), z[0])) / 2
    torch.testing.assert_close(method(batch, Clock())["loss"], expected)


def test_no_gradient_through_the_target() -> None:
    """If the predictor passes no gradient back, the backbone gets none."""
    method = make("simsiam")
    for module in method.predictor:
        if isinstance(module, torch.nn.Linear):
            torch.nn.init.zeros_(module.weight)
    method.predictor[-1].bias.data.normal_()
    method(make_batch(method, 5), Clock())["loss"].backward()
    assert float(method.predictor[-1].bias.grad.abs().max()) > 0
    assert all(float(p.grad.abs().max()) == 0 for p in method.backbone.parameters())


class WithoutStopGradient(SimSiam):
    def target(self, z: Tensor) -> Tensor:
        return z


def std_after_training(cls: type[SimSiam]) -> float:
    torch.manual_seed(0)
    # Without batch norm at the end of the projector, which would keep the features' std up (paper, table 3).
    method = cls(CASE.backbone(), **SMALL, projector=MLP(16, 32, 16, num_layers=3))
    optimizer = torch.optim.SGD(method.parameters(), lr=0.1, momentum=0.9)
    for step in range(100):
        out = method(make_batch(method, 16, seed=step), Clock())
        optimizer.zero_grad()
        out["loss"].backward()
        optimizer.step()
    return float(out["feature_std"])


@pytest.mark.slow
def test_without_stop_gradient_it_collapses() -> None:
    assert std_after_training(SimSiam) > 0.6
    assert std_after_training(WithoutStopGradient) < 0.3


def test_default_sizes() -> None:
    """Section 3: the projector 2048-2048-2048-2048, the predictor 2048-512-2048, the predictor's output plain."""
    with torch.device("meta"):
        method = SimSiam(resnet50())
        z = method.projector(method.backbone(torch.zeros(2, 3, 224, 224)))
        assert method.predictor(z).shape == (2, 2048)
    assert [m.out_features for m in method.projector if isinstance(m, torch.nn.Linear)] == [2048] * 3
    assert [m.out_features for m in method.predictor if isinstance(m, torch.nn.Linear)] == [512, 2048]
    assert not method.projector[-1].affine


def test_recipes_keep_the_predictors_learning_rate_constant() -> None:
    files = sorted((RECIPES / "simsiam").glob("*.yaml"))
    assert len(files) == 4
    for file in files:
        text = file.read_text(encoding="utf-8")
        assert "{pattern: ^predictor, schedule: {class_path: sslbook.schedules.Constant}}" in text, file
