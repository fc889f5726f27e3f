import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sslbook import distributed
from sslbook.data.loader import Batch
from sslbook.methods.nnclr import NNCLR, info_nce, nearest_neighbors
from sslbook.nn import resnet50
from sslbook.schedules import Clock
from tests.methods.cases import CONVNET, VIEW, Case, make, make_batch, transformer

SMALL = {
    "view_1": VIEW,
    "view_2": VIEW,
    "hidden_dim": 32,
    "projector_dim": 16,
    "predictor_dim": 32,
    "queue_size": 21,
}
CASE = Case(
    options=SMALL,
    command={"method.backbone": CONVNET, "method.hidden_dim": 16, "method.projector_dim": 8, "method.queue_size": 32},
    learned=lambda method, batch, out: bool(out["contrastive_accuracy"] > 95 and out["neighbor_similarity"] > 0.9),
    overfit={"queue_size": 64},
    lr=1e-3,
    corners=[(6, 1e-5, {"temperature": 0.01})],
    other_backbones=[transformer],
)


def literal(neighbors: Tensor, p: Tensor, temperature: float) -> float:
    """Equation 3, term by term."""
    loss = 0.0
    for i in range(len(p)):
        logits = [sum(a * b for a, b in zip(neighbors[i].tolist(), row)) / temperature for row in p.tolist()]
        greatest = max(logits)
        loss += greatest + math.log(sum(math.exp(x - greatest) for x in logits)) - logits[i]
    return loss / len(p)


@pytest.mark.parametrize(("n", "temperature"), [(5, 0.1), (1, 0.2), (7, 0.01)])
def test_info_nce_is_equation_3(n: int, temperature: float) -> None:
    neighbors, p = F.normalize(torch.randn(2, n, 4, dtype=torch.float64), dim=2)
    loss, logits = info_nce(neighbors, p, temperature)
    assert float(loss) == pytest.approx(literal(neighbors, p, temperature), rel=1e-10, abs=1e-12)
    assert logits.shape == (n, n)


def test_info_nce_of_repeated_images() -> None:
    neighbors, p = F.normalize(torch.randn(2, 2, 4, dtype=torch.float64), dim=2).repeat(1, 3, 1)
    assert float(info_nce(neighbors, p, 0.01)[0]) == pytest.approx(literal(neighbors, p, 0.01), rel=1e-10)


def test_nearest_neighbors_are_equation_4() -> None:
    z, support = torch.randn(5, 3), F.normalize(torch.randn(9, 3), dim=1)
    z = F.normalize(z, dim=1)
    for row, got in zip(z, nearest_neighbors(z, support)):
        distances = [math.dist(row.tolist(), other.tolist()) for other in support]
        assert torch.equal(got, support[distances.index(min(distances))])


def _loss(x: Tensor) -> float:
    n = x.shape[1] // distributed.world_size()
    return float(distributed.all_reduce_mean(info_nce(*x[:, distributed.rank() * n :][:, :n], 0.1)[0]))


def test_loss_with_one_image_per_process(pool) -> None:
    x = F.normalize(torch.randn(2, 2, 4), dim=2)
    assert pool.run(_loss, x) == pytest.approx([_loss(x)] * 2)


class OwnView(NNCLR):
    def positives(self, z: Tensor) -> Tensor:
        return z.detach()


def test_with_its_own_view_it_is_info_nce_with_a_predictor() -> None:
    torch.manual_seed(0)
    method = OwnView(CASE.backbone(), **SMALL)
    batch = make_batch(method, 5)
    z = [method.projector(method.backbone(x)) for x in batch.views]
    expected = 0.0
    for a, b in ((0, 1), (1, 0)):
        keys, p = F.normalize(z[a], dim=1).detach(), F.normalize(method.predictor(z[b]), dim=1)
        expected = expected + F.cross_entropy(keys @ p.T / method.temperature, torch.arange(5)) / 2
    torch.testing.assert_close(method(batch, Clock())["loss"], expected)


def test_queue_is_updated_after_the_loss() -> None:
    method = make("nnclr")
    batch = make_batch(method, 8)
    before = method.queue.rows.clone()
    with torch.no_grad():
        z = F.normalize(method.projector(method.backbone(batch.views[0])), dim=1)
        out = method(batch, Clock())
    torch.testing.assert_close(out["neighbor_similarity"], (z @ before.T).amax(dim=1).mean())
    torch.testing.assert_close(method.queue.rows[:8], z)
    assert torch.equal(method.queue.rows[8:], before[8:])


def closeness(cls: type[NNCLR]) -> float:
    """The cosine of predictions to the neighbors of the other view, after training with a queue that stays."""
    torch.manual_seed(0)
    method = cls(CASE.backbone(), **SMALL)
    rows = method.queue.rows.clone()
    batch = make_batch(method, 8)
    optimizer = torch.optim.AdamW(method.parameters(), lr=1e-2)
    for _ in range(60):
        optimizer.zero_grad()
        method(batch, Clock())["loss"].backward()
        optimizer.step()
        method.queue.rows.copy_(rows)
    with torch.no_grad():
        z_1, z_2 = [method.projector(method.backbone(x)) for x in batch.views]
        p = F.normalize(method.predictor(z_2), dim=1)
    return float((p * nearest_neighbors(F.normalize(z_1, dim=1), rows)).sum(dim=1).mean())


def test_prediction_matches_the_neighbor() -> None:
    assert closeness(NNCLR) > closeness(OwnView) + 0.08


def distance_within_classes(cls: type[NNCLR]) -> float:
    """Mean cosine distance of two images of a class, after training on new images of eight classes."""
    torch.manual_seed(0)
    method = cls(CASE.backbone(), **{**SMALL, "queue_size": 64})
    generator = torch.Generator().manual_seed(0)
    classes = torch.randn(8, 3, 16, 16, generator=generator)
    optimizer = torch.optim.AdamW(method.parameters(), lr=1e-2)

    def shown(n: int) -> Batch:
        index = torch.arange(n)
        images = classes[index % 8] + 0.7 * torch.randn(n, 3, 16, 16, generator=generator)
        views = [images + 0.3 * torch.randn(images.shape, generator=generator) for _ in range(2)]
        return Batch(tuple(views), index, torch.full((n,), -1))

    for step in range(60):
        optimizer.zero_grad()
        method(shown(16), Clock(step, 60))["loss"].backward()
        optimizer.step()
    with torch.no_grad():
        z = F.normalize(method.projector(method.backbone(shown(128).views[0])), dim=1)
    same = (torch.arange(128)[:, None] - torch.arange(128)) % 8 == 0
    return float(1 - (z @ z.T)[same & ~torch.eye(128, dtype=torch.bool)].mean())


@pytest.mark.slow
def test_neighbors_reduce_within_class_distance() -> None:
    assert distance_within_classes(NNCLR) < 0.75 * distance_within_classes(OwnView)


def test_full_scale_sizes() -> None:
    """Section 4.1: a projector of 2048, 2048 and 256 with batch norm everywhere, a predictor of 4096 and 256."""
    with torch.device("meta"):
        method = NNCLR(resnet50())
        z = method.projector(method.backbone(torch.zeros(2, 3, 224, 224)))
        assert method.predictor(z).shape == (2, 256)
    assert [m.out_features for m in method.projector if isinstance(m, nn.Linear)] == [2048, 2048, 256]
    assert sum(isinstance(m, nn.BatchNorm1d) for m in method.projector) == 3
    assert [m.out_features for m in method.predictor if isinstance(m, nn.Linear)] == [4096, 256]
    assert method.queue.rows.shape == (98304, 256)
