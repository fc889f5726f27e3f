import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from sslbook import distributed
from sslbook import nn as nets
from sslbook.data.datasets.shapes import Shapes
from sslbook.data.loader import Data
from sslbook.data.views import View
from sslbook.errors import UserError
from sslbook.methods.deepcluster_v2 import DeepClusterV2, cluster_loss
from sslbook.nn import convert_batch_norm, kmeans
from sslbook.schedules import Clock
from tests.methods.cases import CONVNET, NUM_IMAGES, SIZE, TINY_SHAPES, VIEW, Case, make, transformer

CASE = Case(
    options={
        "view": VIEW,
        "small_view": View(size=8),
        "num_small": 1,
        "hidden_dim": 32,
        "projector_dim": 16,
        "num_prototypes": 6,
        "num_heads": 2,
    },
    command={
        "method.backbone": CONVNET,
        "method.view.size": SIZE,
        "method.small_view.size": 8,
        "method.num_small": 1,
        "method.hidden_dim": 16,
        "method.projector_dim": 8,
        "method.num_prototypes": 6,
        "method.num_heads": 2,
    },
    learned=lambda method, batch, out: bool(out["cluster_accuracy"] > 90),  # the first pseudo-labels are random
    overfit={"hidden_dim": 64},
    lr=0.01,
    corners=[(2, 0.005, {"num_small": 0}), (6, 0.005, {"temperature": 0.05})],
    other_backbones=[transformer],
)


@pytest.mark.parametrize(("crops", "n", "temperature"), [(3, 5, 0.1), (2, 1, 0.1), (2, 4, 0.01)])
def test_loss_equals_literal_sum(crops: int, n: int, temperature: float) -> None:
    z = F.normalize(torch.randn(crops, n, 4, dtype=torch.float64), dim=2)
    prototypes = F.normalize(torch.randn(2, 3, 4, dtype=torch.float64), dim=2)
    label = torch.randint(3, (2, n))
    label[:, 0] = label[:, 0] if n == 1 else -1
    terms = []
    for c in range(crops):
        for h in range(2):
            for i in range(n):
                if label[h, i] >= 0:
                    logits = [float(z[c, i] @ p) / temperature for p in prototypes[h]]
                    log_sum = max(logits) + math.log(sum(math.exp(v - max(logits)) for v in logits))
                    terms.append(log_sum - logits[label[h, i]])
    expected = sum(terms) / len(terms)
    assert float(cluster_loss(z, prototypes, label, temperature)) == pytest.approx(expected, rel=1e-10)


def test_images_without_cluster_have_no_loss() -> None:
    z = torch.randn(2, 3, 4, requires_grad=True)
    loss = cluster_loss(z, torch.randn(1, 5, 4), torch.full((1, 3), -1), 0.1)
    loss.backward()
    assert float(loss.detach()) == 0
    assert not z.grad.any()


def _loss(z: Tensor, label: Tensor) -> tuple[float, Tensor]:
    r, n = distributed.rank(), z.shape[1] // distributed.world_size()
    mine = z[:, r * n : (r + 1) * n].clone().requires_grad_()
    prototypes = torch.eye(4)[None]
    loss = cluster_loss(mine, prototypes, label[:, r * n : (r + 1) * n], 0.1)
    loss.backward()
    return float(distributed.all_reduce_mean(loss.detach())), mine.grad / distributed.world_size()


def test_counted_images_are_summed_over_all_processes(pool) -> None:
    z, label = torch.randn(2, 6, 4), torch.tensor([[1, -1, -1, 2, 3, 0]])
    loss, gradient = _loss(z, label)
    got = pool.run(_loss, z, label)
    torch.testing.assert_close(torch.cat([g for _, g in got], dim=1), gradient)
    assert got[0][0] == pytest.approx(loss, rel=1e-5)


def test_centroids_of_the_last_epochs_projections_are_the_prototypes() -> None:
    method, data = make("deepcluster_v2"), Data(shapes=TINY_SHAPES)
    first = Clock(0, 4, 2, seed=3)
    views, index = kmeans.embed_views(torch.nn.Sequential(method.backbone, method.projector), data, (VIEW, VIEW), first)
    assert index.tolist() == list(range(NUM_IMAGES))
    method = make("deepcluster_v2")
    method.before_epoch(data, first)
    torch.testing.assert_close(method.memory_1.rows, F.normalize(views[0], dim=1))
    torch.testing.assert_close(method.memory_2.rows, F.normalize(views[1], dim=1))
    for step, batch in enumerate(data.batches(method.views(), 32, seed=3, epoch=0)):
        with torch.no_grad():
            z = method.project(batch.views)
            method(batch, Clock(step, 4, 2, seed=3))
        torch.testing.assert_close(method.memory_1.rows[batch.index], z[0], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(method.memory_2.rows[batch.index], z[1], rtol=1e-4, atol=1e-5)
    rows = [method.memory_1.rows.clone(), method.memory_2.rows.clone()]
    method.before_epoch(data, Clock(2, 4, 2, seed=3))  # no further pass: the memory alone
    for head in range(2):
        seed = (100003 * 3 + 1) * 2 + head
        prototypes, assignment = kmeans.kmeans(rows[head], 6, 10, seed, spherical=True)
        assert torch.equal(method.prototypes[head], prototypes)
        assert torch.equal(method.assignment[head], assignment)
        torch.testing.assert_close(prototypes.norm(dim=1), torch.ones(6))


def test_images_never_shown_have_no_cluster() -> None:
    data = Data(shapes=Shapes(num_train=70, num_test=4, size=SIZE))
    method = make("deepcluster_v2")
    method.setup(data)
    method.before_epoch(data, Clock(1, 4, 2))
    assert (method.assignment >= 0).all()  # 70 are a batch
    method.setup(data)
    method.memory_1.rows[:20], method.memory_2.rows[:20] = 1.0, 1.0
    method.before_epoch(data, Clock(2, 4, 2))
    assert (method.assignment[:, :20] >= 0).all()
    assert (method.assignment[:, 20:] == -1).all()


def _round() -> tuple[Tensor, Tensor]:
    method = make("deepcluster_v2")
    convert_batch_norm(method)
    method.before_epoch(Data(shapes=TINY_SHAPES), Clock(seed=4))
    return method.prototypes, method.assignment


def test_processes_agree_about_prototypes(pool) -> None:
    prototypes, assignment = _round()
    for got_prototypes, got_assignment in pool.run(_round):
        torch.testing.assert_close(got_prototypes, prototypes, rtol=1e-3, atol=1e-4)
        assert (got_assignment == assignment).float().mean() > 0.97  # rounding may decide between two centroids


def agreement_of_crops(clustered: bool) -> float:
    """Cosine of two crops of an image minus that of crops of different images, after training."""
    data = Data(shapes=Shapes(num_train=96, num_test=4, size=SIZE))
    method = make("deepcluster_v2", num_prototypes=24)
    method.setup(data)
    optimizer = torch.optim.SGD(method.parameters(), lr=0.1, momentum=0.9)
    for epoch in range(6):
        if clustered:
            method.before_epoch(data, Clock(3 * epoch, 18, 3))
        for batch in data.batches(method.views(), 32, seed=0, epoch=epoch):
            optimizer.zero_grad()
            method(batch, Clock(3 * epoch, 18, 3))["loss"].backward()
            optimizer.step()
    (batch,) = data.batches((VIEW, VIEW), 96, seed=1, epoch=9)
    with torch.no_grad():
        z = method.project(batch.views)
    similarity = z[0] @ z[1].T
    return float(similarity.diagonal().mean() - similarity.mean())


@pytest.mark.slow
def test_without_clustering_the_features_it_learns_less() -> None:
    assert agreement_of_crops(True) > 2 * agreement_of_crops(False)


def test_rejects_invalid_options() -> None:
    with pytest.raises(UserError, match="65 clusters of 64 images: ask for at most 64"):
        make("deepcluster_v2", num_prototypes=65)


def test_default_sizes() -> None:
    with torch.device("meta"):
        method = DeepClusterV2(nets.resnet50())
    assert method.prototypes.shape == (3, 3000, 128)
    assert len(method.views()) == 8
