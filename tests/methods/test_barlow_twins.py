import math
import re

import pytest
import torch
import yaml
from torch import Tensor, nn

from sslbook import distributed
from sslbook.cli.recipes import RECIPES
from sslbook.methods.barlow_twins import BarlowTwins, cross_correlation, redundancy_loss
from sslbook.nn import resnet18, resnet50
from sslbook.schedules import Clock
from tests.methods.cases import CONVNET, VIEW, Case, make, make_batch, transformer

CASE = Case(
    options={"view_1": VIEW, "view_2": VIEW, "hidden_dim": 32, "projector_dim": 16},
    command={"method.backbone": CONVNET, "method.hidden_dim": 16, "method.projector_dim": 8},
    learned=lambda method, batch, out: bool(out["invariance"] < 0.16 and out["redundancy"] < 0.16),
    overfit={"lambda_": 0.05},
    lr=1e-3,
    corners=[(6, 1e-4, {"lambda_": 1.0})],
    other_backbones=[transformer],
)


def literal(z_1: Tensor, z_2: Tensor, lambda_: float) -> tuple[float, float]:
    """Equations 1 and 2, entry by entry, for columns with mean 0 and variance 1 (and batch norm's epsilon)."""

    def columns(z: Tensor) -> list[list[float]]:
        out = []
        for column in z.T.tolist():
            mean = sum(column) / len(column)
            variance = sum((x - mean) ** 2 for x in column) / len(column)
            out.append([(x - mean) / math.sqrt(variance + 1e-5) for x in column])
        return out

    a, b = columns(z_1), columns(z_2)
    invariance = redundancy = 0.0
    for i in range(len(a)):
        for j in range(len(b)):
            c = sum(x * y for x, y in zip(a[i], b[j])) / len(z_1)
            if i == j:
                invariance += (1 - c) ** 2
            else:
                redundancy += lambda_ * c**2
    return invariance, redundancy


@pytest.mark.parametrize(("n", "dim", "lambda_"), [(5, 3, 0.0051), (2, 7, 1.0), (7, 1, 0.5)])
def test_loss_equals_equation_1(n: int, dim: int, lambda_: float) -> None:
    z_1, z_2 = torch.randn(2, n, dim, dtype=torch.float64) * 3 + 1
    got = redundancy_loss(cross_correlation(z_1, z_2), lambda_)
    assert [float(x) for x in got] == pytest.approx(literal(z_1, z_2, lambda_), rel=1e-9, abs=1e-12)


def test_normalization_equals_batch_norm() -> None:
    z_1, z_2 = torch.randn(2, 6, 4)
    norm = nn.BatchNorm1d(4, affine=False)
    torch.testing.assert_close(cross_correlation(z_1, z_2), norm(z_1).T @ norm(z_2) / 6)


def _correlation(z: Tensor) -> Tensor:
    n = z.shape[1] // distributed.world_size()
    return cross_correlation(*z[:, distributed.rank() * n :][:, :n])


@pytest.mark.slow
def test_correlation_is_of_the_global_batch(pool) -> None:
    for z in (torch.randn(2, 6, 3), torch.randn(2, 2, 3)):  # the second: one image in each process
        for got in pool.run(_correlation, z):
            torch.testing.assert_close(got, _correlation(z))


def redundancy_after_training(lambda_: float) -> tuple[float, float]:
    """The mean correlation of a dimension between views, and of different dimensions."""
    method = make("barlow_twins", lambda_=lambda_)
    optimizer = torch.optim.AdamW(method.parameters(), lr=5e-3)
    batch = make_batch(method, 64)
    for _ in range(50):
        optimizer.zero_grad()
        method(batch, Clock())["loss"].backward()
        optimizer.step()
    z_1, z_2 = [method.projector(method.backbone(x)).detach() for x in batch.views]
    c = cross_correlation(z_1, z_2)
    return float(c.diagonal().mean()), float((c - c.diag().diag()).abs().sum() / (16 * 15))


@pytest.mark.slow
def test_without_redundancy_term_dimensions_are_correlated() -> None:
    agreement, redundancy = redundancy_after_training(0.05)
    assert agreement > 0.7
    assert redundancy < 0.15
    agreement, redundancy = redundancy_after_training(0.0)
    assert agreement > 0.7
    assert redundancy > 0.25


def test_default_sizes() -> None:
    """The authors' code: 8192-8192-8192 without biases; ResNet-50 has 23.5 million parameters."""
    with torch.device("meta"):
        method = BarlowTwins(resnet50())
        assert method.projector(method.backbone(torch.zeros(2, 3, 224, 224))).shape == (2, 8192)
    linear = 2048 * 8192 + 8192 * 8192 * 2
    assert sum(p.numel() for p in method.projector.parameters()) == linear + 4 * 8192
    assert sum(p.numel() for p in method.backbone.parameters()) == 23_508_032


@pytest.mark.parametrize(("recipe", "backbone"), [("imagenet", resnet50), ("cifar10", resnet18)])
def test_the_rule_of_the_recipe_finds_the_vectors(recipe: str, backbone) -> None:
    file = RECIPES / "barlow_twins" / f"{recipe}.yaml"
    (rule,) = yaml.safe_load(file.read_text(encoding="utf-8"))["rules"]
    with torch.device("meta"):
        method = BarlowTwins(backbone())
    for name, parameter in method.named_parameters():
        assert bool(re.search(rule["pattern"], name)) == (parameter.ndim == 1), name
    if recipe == "imagenet":
        assert 0.2 * rule["lr_scale"] == pytest.approx(
            0.0048 / 16
        )  # what the authors' 16 averaging GPUs make of their 0.0048
