import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from sslbook import distributed
from sslbook.data.loader import Batch
from sslbook.methods.moco import MoCo, info_nce
from sslbook.schedules import Clock
from tests.methods.cases import CONVNET, VIEW, Case, make, make_batch, transformer


def finds_keys(method: MoCo, batch: Batch, out: dict[str, Tensor]) -> bool:
    """Every query's nearest key of the batch is its own; the queue is no measure, since it starts at random."""
    q = F.normalize(method.projector(method.backbone(batch.views[0])), dim=1)
    k = F.normalize(method.keys(batch.views[1], batch, Clock()), dim=1)
    return bool(((q @ k.T).argmax(dim=1) == torch.arange(len(q))).float().mean() > 0.95)


CASE = Case(
    options={"view": VIEW, "projector_dim": 16, "queue_size": 21, "batch_norm_groups": 2},
    command={"method.backbone": CONVNET, "method.queue_size": 32, "method.batch_norm_groups": 2},
    learned=finds_keys,
    overfit={"queue_size": 16, "momentum": 0.9, "batch_norm_groups": 1},
    corners=[(2, 0.05, {}), (8, 0.05, {"batch_norm_groups": 1}), (8, 0.05, {"batch_norm_groups": 4})],
    order_free={"batch_norm_groups": 1},
    other_backbones=[transformer],
)


@pytest.mark.parametrize(("n", "size", "temperature"), [(5, 7, 0.2), (1, 1, 0.07), (3, 2, 0.01)])
def test_info_nce_is_equation_1(n: int, size: int, temperature: float) -> None:
    q, k = F.normalize(torch.randn(2, n, 4, dtype=torch.float64), dim=2)
    queue = F.normalize(torch.randn(size, 4, dtype=torch.float64), dim=1)
    expected = 0.0
    for i in range(n):
        logits = [float(q[i] @ k[i]) / temperature] + [float(q[i] @ row) / temperature for row in queue]
        greatest = max(logits)
        log_sum = greatest + math.log(sum(math.exp(x - greatest) for x in logits))
        expected += (log_sum - logits[0]) / n
    loss, logits = info_nce(q, k, queue, temperature)
    assert float(loss) == pytest.approx(expected, rel=1e-10, abs=1e-12)
    assert logits.shape == (n, 1 + size)


def test_key_encoder_is_an_ema_without_gradient() -> None:
    method = make("moco", momentum=0.9)
    batch = make_batch(method, 8)
    start = method.key_backbone.module.layers[0].weight.clone()
    torch.testing.assert_close(start, method.backbone.layers[0].weight)  # both encoders start equal
    method(batch, Clock())["loss"].backward()
    assert all(p.grad is None for p in method.key_backbone.parameters())
    with torch.no_grad():
        method.backbone.layers[0].weight += 1
    method.after_step(Clock(1, 10))
    torch.testing.assert_close(method.key_backbone.module.layers[0].weight, start + 0.1)


def test_queue_is_updated_after_the_loss() -> None:
    method = make("moco")
    batch = make_batch(method, 8)
    before = method.queue.rows.clone()
    with torch.no_grad():
        keys = F.normalize(method.keys(batch.views[1], batch, Clock()), dim=1)
        q = F.normalize(method.projector(method.backbone(batch.views[0])), dim=1)
        loss = method(batch, Clock())["loss"]
    torch.testing.assert_close(loss, info_nce(q, keys, before, method.temperature)[0])
    torch.testing.assert_close(method.queue.rows[:8], keys)
    assert torch.equal(method.queue.rows[8:], before[8:])


def _keys(evaluating: bool) -> tuple[Tensor, Tensor]:
    method = make("moco")
    batch = make_batch(method, 8)
    if evaluating:
        method.key_backbone.eval()
    r, n = distributed.rank(), 8 // distributed.world_size()
    x = batch.views[1][r * n : (r + 1) * n]
    mine = batch._replace(index=batch.index[r * n : (r + 1) * n])
    return method.keys(x, mine, Clock()), method.key_projector(method.key_backbone(x))


def test_shuffling_changes_batch_statistics_and_not_the_order(pool) -> None:
    for answers in ([_keys(True)], pool.run(_keys, True)):
        for shuffled, plain in answers:
            torch.testing.assert_close(shuffled, plain)  # without batch statistics groups do not matter
    shuffled, plain = _keys(False)
    assert (shuffled - plain).abs().max() > 1e-3
    for r, (over_two, _) in enumerate(pool.run(_keys, False)):
        torch.testing.assert_close(over_two, shuffled.chunk(2)[r])


def test_version_1_has_a_linear_projector() -> None:
    assert [type(m) for m in make("moco", mlp=False).projector] == [torch.nn.Linear]
    assert not any(isinstance(m, torch.nn.BatchNorm1d) for m in make("moco").projector)


def similarity_of_queue_to_current_keys(momentum: float) -> float:
    """How similar the keys in the queue are to those the key encoder makes of the same images now."""
    method = make("moco", momentum=momentum, queue_size=80, batch_norm_groups=1)
    optimizer = torch.optim.AdamW([p for p in method.parameters() if p.requires_grad], lr=1e-2)
    for step in range(10):
        optimizer.zero_grad()
        method(make_batch(method, 8, seed=step), Clock())["loss"].backward()
        optimizer.step()
        method.after_step(Clock(step + 1, 10))
    agreements = []
    for step in range(10):
        batch = make_batch(method, 8, seed=step)
        keys = F.normalize(method.keys(batch.views[1], batch, Clock()), dim=1)
        agreements.append((keys * method.queue.rows[8 * step : 8 * step + 8]).sum(dim=1).mean())
    return float(torch.stack(agreements).mean())


@pytest.mark.slow
def test_without_momentum_queued_keys_are_stale() -> None:
    assert similarity_of_queue_to_current_keys(0.999) > 0.995
    assert similarity_of_queue_to_current_keys(0.0) < 0.9
