import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from sslbook import nn as nets
from sslbook.data.views import View
from sslbook.errors import UserError
from sslbook.methods import swav
from sslbook.methods.swav import SwAV, prototype_perplexity, swapped_prediction
from sslbook.schedules import Clock
from tests.methods.cases import CONVNET, VIEW, Case, make, make_batch, transformer

CASE = Case(
    options={
        "view": VIEW,
        "small_view": View(size=8),
        "num_small": 1,
        "hidden_dim": 32,
        "projector_dim": 16,
        "num_prototypes": 12,
        "freeze_prototypes": 0,
    },
    command={
        "method.backbone": CONVNET,
        "method.view.size": 16,
        "method.small_view.size": 8,
        "method.num_small": 1,
        "method.hidden_dim": 16,
        "method.projector_dim": 8,
        "method.num_prototypes": 12,
        "method.freeze_prototypes": "2 steps",
        "method.queue_size": 16,
        "method.queue_start": "1 steps",
    },
    # The codes are predicted, and they differ between images (a uniform prediction has a loss of log 12 = 2.5).
    learned=lambda method, batch, out: bool(out["loss"] < 0.9 and out["prototype_perplexity"] > 8),
    lr=0.01,
    corners=[(2, 0.005, {}), (6, 0.005, {"num_small": 0, "queue_size": 6, "queue_start": 0})],
    other_backbones=[transformer],
)


@pytest.mark.parametrize(("n", "crops", "temperature"), [(5, 2, 0.1), (1, 5, 0.1), (3, 3, 0.01)])
def test_loss_equals_equation_2(n: int, crops: int, temperature: float) -> None:
    q = torch.rand(2, n, 4, dtype=torch.float64)
    q /= q.sum(dim=2, keepdim=True)
    scores = torch.randn(crops, n, 4, dtype=torch.float64)
    terms = []
    for s in range(2):
        for t in set(range(crops)) - {s}:
            for i in range(n):
                logits = [v / temperature for v in scores[t, i].tolist()]
                log_sum = max(logits) + math.log(sum(math.exp(v - max(logits)) for v in logits))
                terms.append(-sum(a * (v - log_sum) for a, v in zip(q[s, i].tolist(), logits)))
    expected = sum(terms) / len(terms)
    assert float(swapped_prediction(q, scores, temperature)) == pytest.approx(expected, rel=1e-10)


def test_forward_equals_its_parts() -> None:
    method = make("swav")
    batch = make_batch(method, 6)
    with torch.no_grad():
        features = [method.backbone(torch.cat(batch.views[:2])), method.backbone(batch.views[2])]
        z = F.normalize(method.projector(torch.cat(features)), dim=1)
        scores = (z @ method.prototypes.T).unflatten(0, (3, 6))
        q = torch.stack([swav.sinkhorn(scores[i], 0.05, 3) for i in range(2)])
        loss = method(batch, Clock())["loss"]
    torch.testing.assert_close(loss, swapped_prediction(q, scores, 0.1))


def test_codes_have_no_gradient() -> None:
    method = make("swav")
    batch = make_batch(method, 6)
    z = method.project(batch.views)
    assert not method.codes(z[:2]).requires_grad


def test_prototypes_are_normalized_after_every_step() -> None:
    method = make("swav")
    torch.testing.assert_close(method.prototypes.norm(dim=1), torch.ones(12))
    with torch.no_grad():
        method.prototypes.mul_(3)
    method.after_step(Clock(1, 10))
    torch.testing.assert_close(method.prototypes.norm(dim=1), torch.ones(12))


def test_frozen_prototypes_get_no_gradient() -> None:
    method = make("swav", freeze_prototypes="2 steps")
    start = method.prototypes.detach().clone()
    optimizer = torch.optim.SGD(method.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1)
    for step in range(3):
        optimizer.zero_grad()
        method(make_batch(method, 8, seed=step), Clock(step, 10))["loss"].backward()
        method.before_optimizer_step(Clock(step, 10))
        assert (method.prototypes.grad is None) == (step < 2)
        optimizer.step()
        method.after_step(Clock(step + 1, 10))
        moved = float((method.prototypes.detach() - start).abs().max())
        assert moved < 1e-6 if step < 2 else moved > 1e-4


def test_queue_fills_from_its_start_and_is_used_when_full() -> None:
    method = make("swav", queue_size=16, queue_start=1)
    clocks = [Clock(step, 10, steps_per_epoch=2) for step in range(6)]
    held = []
    for step, clock in enumerate(clocks):
        batch = make_batch(method, 8, seed=step)
        with torch.no_grad():
            z = method.project(batch.views)
            plain = torch.stack([swav.sinkhorn(z[i] @ method.prototypes.T, 0.05, 3) for i in range(2)])
            rows = [torch.cat([z[i], method.queues[i].rows]) for i in range(2)]
            queued = torch.stack([swav.sinkhorn(r @ method.prototypes.T, 0.05, 3)[:8] for r in rows])
            torch.testing.assert_close(method.codes(z[:2]), queued if step >= 4 else plain)
            assert not torch.allclose(queued, plain)
            method(batch, clock)
        held.append(int(method.queued))
        if step == 3:
            torch.testing.assert_close(method.queues[1].rows[8:], z[1], rtol=1e-4, atol=1e-5)
    assert held == [0, 0, 8, 16, 16, 16]


def test_rejects_a_queue_of_broken_batches() -> None:
    method = make("swav", queue_size=20)
    with pytest.raises(
        UserError, match=r"queue of 20 does not hold whole batches of 8: .* a multiple of 8, such as 16"
    ):
        method(make_batch(method, 8), Clock())


def test_prototype_perplexity() -> None:
    assert prototype_perplexity(torch.zeros(2, 3, 5), 0.1) == pytest.approx(5)
    assert prototype_perplexity(torch.eye(4)[None], 1e-3) == pytest.approx(4)
    assert prototype_perplexity(torch.eye(4)[:1].repeat(6, 1)[None], 1e-3) == pytest.approx(1)


def perplexity_after_training() -> float:
    method = make("swav", projector_dim=8)
    optimizer = torch.optim.SGD(method.parameters(), lr=0.1, momentum=0.9)
    out: dict[str, Tensor] = {}
    for step in range(40):
        out = method(make_batch(method, 16, seed=step), Clock(step, 40))
        optimizer.zero_grad()
        out["loss"].backward()
        optimizer.step()
        method.after_step(Clock(step + 1, 40))
    return float(out["prototype_perplexity"])


@pytest.mark.slow
def test_without_sinkhorn_it_collapses_to_one_prototype(monkeypatch) -> None:
    assert perplexity_after_training() > 6
    monkeypatch.setattr(swav, "sinkhorn", lambda scores, epsilon, iterations: F.softmax(scores / epsilon, dim=1))
    assert perplexity_after_training() < 1.5


def test_default_sizes() -> None:
    with torch.device("meta"):
        method = SwAV(nets.resnet50())
    assert len(method.views()) == 8
    assert sum(p.numel() for p in method.projector.parameters()) == 2048 * 2048 + 2 * 2048 + 2048 * 128 + 128
    assert method.prototypes.shape == (3000, 128)
