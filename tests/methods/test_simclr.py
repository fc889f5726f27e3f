import math

import pytest
import torch
from torch import Tensor

from sslbook import distributed
from sslbook.methods import simclr
from sslbook.methods.simclr import nt_xent
from sslbook.nn import MLP
from sslbook.schedules import Clock
from tests.methods.cases import CONVNET, VIEW, Case, make, make_batch, transformer

CASE = Case(
    options={"view": VIEW, "projector_dim": 16},
    command={"method.backbone": CONVNET, "method.projector_dim": 8},
    learned=lambda method, batch, out: bool(out["contrastive_accuracy"] > 95),
    # Steps of about equal length: SimCLR's gradient is a hundred times the others', and from too long a step on, the
    # rounding of a sum in another order grows tenfold at each step in any method.
    lr=5e-4,
    corners=[(6, 1e-5, {"temperature": 0.01})],
    other_backbones=[transformer],
)


def literal(z_1: Tensor, z_2: Tensor, temperature: float) -> float:
    """Equation 1 and algorithm 1, term by term, doubled since the authors' code sums over the two views."""
    z = [row.tolist() for pair in zip(z_1, z_2) for row in pair]  # 2k-1 and 2k belong together

    def similarity(i: int, j: int) -> float:
        dot = sum(a * b for a, b in zip(z[i], z[j]))
        return dot / math.sqrt(sum(a * a for a in z[i])) / math.sqrt(sum(b * b for b in z[j]))

    def term(i: int, j: int) -> float:
        logits = [similarity(i, k) / temperature for k in range(len(z)) if k != i]
        greatest = max(logits)
        log_sum = greatest + math.log(sum(math.exp(x - greatest) for x in logits))
        return log_sum - similarity(i, j) / temperature

    pairs = len(z) // 2
    paper = sum(term(2 * k, 2 * k + 1) + term(2 * k + 1, 2 * k) for k in range(pairs)) / (2 * pairs)
    return 2 * paper


CASES = [(5, 0.1), (1, 0.5), (2, 1.0), (7, 0.01), (3, 10.0)]


@pytest.mark.parametrize(("n", "temperature"), CASES)
def test_nt_xent_is_equation_1(n: int, temperature: float) -> None:
    z_1, z_2 = torch.randn(2, n, 4, dtype=torch.float64)
    assert float(nt_xent(z_1, z_2, temperature)) == pytest.approx(literal(z_1, z_2, temperature), rel=1e-10, abs=1e-12)


def test_nt_xent_of_repeated_images() -> None:
    z_1, z_2 = torch.randn(2, 2, 4, dtype=torch.float64).repeat(1, 3, 1)
    assert float(nt_xent(z_1, z_2, 0.01)) == pytest.approx(literal(z_1, z_2, 0.01), rel=1e-10)


def _loss(z: Tensor, temperature: float) -> tuple[float, Tensor]:
    r = distributed.rank()
    z_1, z_2 = (half.chunk(2)[r].clone().requires_grad_() for half in z)
    loss = nt_xent(z_1, z_2, temperature)
    loss.backward()
    return float(distributed.all_reduce_mean(loss.detach())), torch.stack([z_1.grad, z_2.grad]) / 2


@pytest.mark.parametrize(("n", "temperature"), [(2, 0.5), (6, 0.01)])  # the first: one image in each process
def test_nt_xent_over_processes(pool, n: int, temperature: float) -> None:
    z = torch.randn(2, n, 4, dtype=torch.float64, requires_grad=True)
    nt_xent(z[0], z[1], temperature).backward()
    two = pool.run(_loss, z.detach(), temperature)
    assert two[0][0] == pytest.approx(literal(*z.detach(), temperature), rel=1e-10)
    torch.testing.assert_close(torch.cat([grad for _, grad in two], dim=1), z.grad)


def test_logged_metrics() -> None:
    method = make("simclr")
    z_1, z_2 = torch.randn(2, 6, 3)
    out = method._measure(simclr.similarities(z_1, z_2)[0])
    u, v = (z / z.norm(dim=1, keepdim=True) for z in (z_1, z_2))
    correct = 0
    for i in range(6):
        others = [float(u[i] @ v[j]) for j in range(6)] + [float(u[i] @ u[j]) for j in range(6) if j != i]
        correct += max(others) == others[i]
    assert float(out["contrastive_accuracy"]) == pytest.approx(100 * correct / 6)
    assert float(out["alignment"]) == pytest.approx(float((u - v).square().sum(dim=1).mean()), rel=1e-5)
    pairs = [math.exp(-2 * float((u[i] - u[j]).square().sum())) for i in range(6) for j in range(6) if i != j]
    assert float(out["uniformity"]) == pytest.approx(math.log(sum(pairs) / 30), rel=1e-5)


def uniformity_after_training() -> float:
    method = make("simclr")
    method.projector = MLP(16, 16, 16, batch_norm=False)  # batch norm alone would hold the projections apart
    optimizer = torch.optim.AdamW(method.parameters(), lr=1e-2)
    for step in range(60):
        out = method(make_batch(method, 16, seed=step), Clock())
        optimizer.zero_grad()
        out["loss"].backward()
        optimizer.step()
    return float(out["uniformity"])


@pytest.mark.slow
def test_without_negatives_it_collapses(monkeypatch) -> None:
    assert uniformity_after_training() < -2
    # The positives of row i stand in column i; their squared distance is 2 - 2 cos.
    monkeypatch.setattr(simclr, "cross_entropies", lambda s_1, s_2, _: (2 - 2 * s_1.diagonal()).mean())
    assert uniformity_after_training() > -0.5


def test_projector_layers() -> None:
    method = make("simclr")
    linear = [m for m in method.projector if isinstance(m, torch.nn.Linear)]
    assert [(m.in_features, m.out_features) for m in linear] == [(16, 16), (16, 16), (16, 16)]
    assert len([m for m in method.projector if isinstance(m, torch.nn.BatchNorm1d)]) == 3
    assert len([m for m in make("simclr", projector_num_layers=2).projector if isinstance(m, torch.nn.Linear)]) == 2
