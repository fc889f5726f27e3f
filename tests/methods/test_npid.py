import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from sslbook import distributed, rng
from sslbook import nn as nets
from sslbook.data.loader import Batch
from sslbook.methods.npid import NPID, nce, sample_negatives
from sslbook.schedules import Clock
from tests.methods.cases import CONVNET, NUM_IMAGES, VIEW, Case, make, make_batch, transformer


def finds_itself(method: NPID, batch: Batch, out: dict[str, Tensor]) -> bool:
    """Of the rows of the batch's images, the nearest one is the image's own."""
    v = F.normalize(method.projector(method.backbone(batch.views[0])), dim=1)
    own = batch.index.unique()
    found = own[(v @ method.memory.rows[own].T).argmax(dim=1)]
    return bool((found == batch.index).float().mean() > 0.9)


CASE = Case(
    options={"view": VIEW, "projector_dim": 16, "num_negatives": 20},
    command={"method.backbone": CONVNET, "method.projector_dim": 8, "method.num_negatives": 16},
    learned=finds_itself,
    overfit={"num_negatives": 0},
    lr=1e-3,
    corners=[(2, 1e-3, {}), (6, 1e-3, {"num_negatives": 0}), (6, 1e-4, {"num_negatives": 0, "temperature": 0.02})],
    other_backbones=[transformer],
)


@pytest.mark.parametrize(("n", "negatives", "images"), [(5, 7, 64), (1, 1, 2), (3, 40, 10)])
def test_nce_is_equation_7(n: int, negatives: int, images: int) -> None:
    log_p = 3 * torch.randn(n, 1 + negatives, dtype=torch.float64) - 5
    expected = 0.0
    for row in log_p.tolist():
        noise = negatives / images
        h = [math.exp(v) / (math.exp(v) + noise) for v in row]
        expected -= (math.log(h[0]) + sum(math.log(1 - v) for v in h[1:])) / n
    assert float(nce(log_p, images)) == pytest.approx(expected, rel=1e-10)


def literal(method: NPID, v: Tensor, index: Tensor, columns: Tensor) -> list[list[float]]:
    """Similarities divided by the temperature, row by row."""
    rows = method.memory.rows.double().tolist()
    return [
        [sum(a * b for a, b in zip(query, rows[j])) / method.temperature for j in own]
        for query, own in zip(v.tolist(), columns.tolist())
    ]


@pytest.mark.parametrize("temperature", [0.07, 0.01])
def test_full_softmax_is_equation_2(temperature: float) -> None:
    method = make("npid", num_negatives=0, temperature=temperature)
    v, index = F.normalize(torch.randn(5, 16), dim=1), torch.tensor([3, 60, 3, 0, 3])  # an image thrice
    loss, _, _ = method.contrast(v, index, Clock())
    expected = 0.0
    for row, own in zip(literal(method, v.double(), index, torch.arange(NUM_IMAGES).expand(5, -1)), index.tolist()):
        expected += (max(row) + math.log(sum(math.exp(s - max(row)) for s in row)) - row[own]) / 5
    assert float(loss) == pytest.approx(expected, rel=1e-5)


def test_partition_is_estimated_from_the_first_batch() -> None:
    method = make("npid", temperature=0.3)
    clock = Clock(seed=2)
    v, index = F.normalize(torch.randn(5, 16), dim=1), torch.tensor([3, 60, 3, 0, 9])
    columns = torch.cat([index[:, None], sample_negatives(index, 20, NUM_IMAGES, clock)], dim=1)
    logits = literal(method, v.double(), index, columns)
    partition = NUM_IMAGES * sum(math.exp(s) for row in logits for s in row) / (5 * 21)  # equation 8
    loss, _, _ = method.contrast(v, index, clock)
    assert math.exp(method.log_partition) == pytest.approx(partition, rel=1e-5)
    expected = 0.0
    for row in logits:
        h = [(p := math.exp(s) / partition) / (p + 20 / NUM_IMAGES) for s in row]
        expected -= (math.log(h[0]) + sum(math.log(1 - x) for x in h[1:])) / 5
    assert float(loss) == pytest.approx(expected, rel=1e-5)
    method.contrast(-v, index, clock)
    assert math.exp(method.log_partition) == pytest.approx(partition, rel=1e-5)


def test_partition_may_exceed_float32() -> None:
    """Of directions in the plane some nearly agree, and at a temperature of 0.01 their exponential is near e^100."""
    method = make("npid", temperature=0.01, projector_dim=2)
    clock = Clock(seed=2)
    v, index = F.normalize(torch.randn(5, 2), dim=1), torch.tensor([3, 60, 3, 0, 9])
    columns = torch.cat([index[:, None], sample_negatives(index, 20, NUM_IMAGES, clock)], dim=1)
    logits = literal(method, v.double(), index, columns)
    log_partition = math.log(NUM_IMAGES * sum(math.exp(s) for row in logits for s in row) / (5 * 21))
    assert log_partition > 89  # e^89 is too much for float32
    loss, _, _ = method.contrast(v, index, clock)
    assert float(method.log_partition) == pytest.approx(log_partition, rel=1e-5)
    expected = 0.0
    for row in logits:
        odds = [s - log_partition - math.log(20 / NUM_IMAGES) for s in row]
        expected += (math.log1p(math.exp(-odds[0])) + sum(math.log1p(math.exp(o)) for o in odds[1:])) / 5
    assert float(loss) == pytest.approx(expected, rel=1e-4)


def _partition(v: Tensor, index: Tensor) -> float:
    r, n = distributed.rank(), len(v) // distributed.world_size()
    mine = slice(r * n, (r + 1) * n)
    method = make("npid", temperature=0.3)
    method.contrast(v[mine], index[mine], Clock())
    return float(method.log_partition)


def test_partition_is_estimated_over_all_processes(pool) -> None:
    v, index = F.normalize(torch.randn(4, 16), dim=1), torch.tensor([3, 60, 0, 9])
    assert pool.run(_partition, v, index) == pytest.approx([_partition(v, index)] * 2, rel=1e-5)


def test_negatives_are_uniform_and_reproducible() -> None:
    clock = Clock(step=5, steps_per_epoch=2, seed=3)
    sampled = sample_negatives(torch.arange(500), 40, 10, clock)
    torch.testing.assert_close(sampled.flatten().bincount() / 20000, torch.full((10,), 0.1), rtol=0.1, atol=0)
    noise = rng.uniform(3, 2, torch.tensor([7]), rng.METHOD, 40)[0].tolist()
    assert sampled[7].tolist() == [int(10 * u) for u in noise]
    assert not torch.equal(sample_negatives(torch.arange(500), 40, 10, Clock(seed=3)), sampled)


def gradient_of_nce(negatives_of_each: int) -> tuple[Tensor, Tensor]:
    """For one query: by NCE with the true partition and equally many negatives of every row, and by the softmax."""
    torch.manual_seed(0)
    rows = F.normalize(torch.randn(6, 4, dtype=torch.float64), dim=1)
    gradients = []
    for whole in (False, True):
        v = torch.ones(4, dtype=torch.float64, requires_grad=True)
        logits = rows @ v / 0.5
        if whole:
            loss = F.cross_entropy(logits[None], torch.tensor([2]))
        else:
            log_p = logits - logits.detach().logsumexp(dim=0)
            loss = nce(torch.cat([log_p[2:3], log_p.repeat(negatives_of_each)])[None], 6)
        loss.backward()
        gradients.append(v.grad)
    return gradients[0], gradients[1]


def test_nce_gradient_converges_to_softmax_gradient() -> None:
    errors = []
    for negatives_of_each in (1, 10, 100, 1000):
        by_nce, by_softmax = gradient_of_nce(negatives_of_each)
        errors.append(float((by_nce - by_softmax).norm() / by_softmax.norm()))
    assert errors[0] > 0.1
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 1e-2


def test_memory_is_updated_after_the_loss() -> None:
    method = make("npid", momentum=0.25)
    batch = make_batch(method, 8)._replace(index=torch.tensor([1, 2, 3, 4, 5, 6, 7, 1]))
    before = method.memory.rows.clone()
    with torch.no_grad():
        v = F.normalize(method.projector(method.backbone(batch.views[0])), dim=1)
        loss = method(batch, Clock())["loss"]
    again = make("npid")
    torch.testing.assert_close(loss, again.contrast(v, batch.index, Clock())[0])
    torch.testing.assert_close(method.memory.rows[3], F.normalize(0.25 * before[3] + 0.75 * v[2], dim=0))
    torch.testing.assert_close(method.memory.rows[1], F.normalize(0.25 * before[1] + 0.75 * v[7], dim=0))
    assert torch.equal(method.memory.rows[8:], before[8:])


def similarity_of_images() -> float:
    """How alike the memory's rows are after training, 1 if all are the same."""
    method = make("npid", num_negatives=0)
    optimizer = torch.optim.SGD(method.parameters(), lr=0.01, momentum=0.9)
    everything = make_batch(method, NUM_IMAGES)
    for step in range(80):
        mine = torch.arange(16) + 16 * (step % 4)
        batch = Batch((everything.views[0][mine],), mine, everything.label[mine])
        optimizer.zero_grad()
        method(batch, Clock(step, 80, steps_per_epoch=4))["loss"].backward()
        optimizer.step()
    rows = method.memory.rows
    return float((rows @ rows.T).mean())


@pytest.mark.slow
def test_without_negatives_features_collapse(monkeypatch) -> None:
    assert similarity_of_images() < 0.5
    real = NPID.contrast

    def attract_only(self: NPID, v: Tensor, index: Tensor, clock: Clock) -> tuple[Tensor, Tensor, Tensor]:
        _, logits, positive = real(self, v, index, clock)
        return -logits.gather(1, positive[:, None]).mean(), logits, positive

    monkeypatch.setattr(NPID, "contrast", attract_only)
    assert similarity_of_images() > 0.75


def test_full_scale_sizes() -> None:
    with torch.device("meta"):
        method = NPID(nets.resnet50())
    assert sum(p.numel() for p in method.projector.parameters()) == 2048 * 128 + 128
    assert (method.num_negatives, method.temperature, method.momentum) == (4096, 0.07, 0.5)
