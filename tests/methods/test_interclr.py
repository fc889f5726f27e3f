import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from sslbook import distributed, rng
from sslbook import nn as nets
from sslbook.data.loader import Batch, Data
from sslbook.data.views import View
from sslbook.errors import UserError
from sslbook.methods.interclr import InterCLR, inter_image_loss, sample_positives, sample_semihard
from sslbook.methods.moco import info_nce
from sslbook.nn import kmeans
from sslbook.schedules import Clock
from tests.methods.cases import CONVNET, NUM_IMAGES, SIZE, TINY_SHAPES, VIEW, Case, make, make_batch, transformer


def finds_keys(method: InterCLR, batch: Batch, out: dict[str, Tensor]) -> bool:
    """Every query's nearest key of the batch is its own; the queue is no measure, since it starts at random."""
    q = F.normalize(method.projector(method.backbone(batch.views[0])), dim=1)
    k = F.normalize(method.keys(batch.views[1], batch, Clock()), dim=1)
    return bool(((q @ k.T).argmax(dim=1) == torch.arange(len(q))).float().mean() > 0.95)


SMALL = {
    "cluster_resize": SIZE,
    "projector_dim": 16,
    "queue_size": 21,
    "batch_norm_groups": 2,
    "num_clusters": 6,
    "num_negatives": 9,
    "pool_size": 20,
    "min_cluster": 3,
    "centroids_every": 2,
}
CASE = Case(
    options={"view": VIEW, **SMALL},
    command={"method.backbone": CONVNET, "method.view.size": SIZE, **{f"method.{k}": v for k, v in SMALL.items()}},
    learned=finds_keys,
    overfit={"queue_size": 16, "momentum": 0.9, "batch_norm_groups": 1},
    lr=0.02,
    corners=[(2, 0.02, {}), (8, 0.02, {"batch_norm_groups": 1, "memory_momentum": 0.5}), (6, 0.02, {"pool_size": 64})],
    order_free={"batch_norm_groups": 1},
    other_backbones=[transformer],
)


@pytest.mark.parametrize(("n", "k", "temperature"), [(5, 7, 0.2), (1, 1, 0.1), (3, 4, 0.01)])
@pytest.mark.parametrize("margin", [-0.5, 0.0, 0.3])
def test_inter_image_loss_has_a_margin(n: int, k: int, temperature: float, margin: float) -> None:
    positive, negatives = 2 * torch.rand(n, dtype=torch.float64) - 1, 2 * torch.rand(n, k, dtype=torch.float64) - 1
    counted = torch.rand(n, k) < 0.5
    expected = 0.0
    for i in range(n):
        logits = [(float(positive[i]) - margin) / temperature]
        logits += [float(negatives[i, j]) / temperature for j in range(k) if counted[i, j]]
        expected += (max(logits) + math.log(sum(math.exp(v - max(logits)) for v in logits)) - logits[0]) / n
    loss = inter_image_loss(positive, negatives, counted, torch.ones(n, dtype=torch.bool), temperature, margin)
    assert float(loss) == pytest.approx(expected, rel=1e-9, abs=1e-12)


def test_negative_margin_lowers_the_gradient() -> None:
    """With equal similarities, a negative margin pulls the positive less, and a positive margin more."""
    similarity, yes = torch.full((1,), 0.4, requires_grad=True), torch.ones(1, 3, dtype=torch.bool)
    pulls = {}
    for margin in (-0.5, 0.0, 0.5):
        loss = inter_image_loss(similarity, torch.full((1, 3), 0.4), yes, yes[:, 0], 0.2, margin)
        (pulls[margin],) = torch.autograd.grad(loss, similarity)
    assert 0 < -pulls[-0.5] < -pulls[0.0] / 2 < -pulls[0.5] / 2


def test_positives_are_uniform_over_the_cluster() -> None:
    assignment = torch.tensor([2, 0, -1, 2, 0, 2, -1, 5])
    sizes = assignment[assignment >= 0].bincount(minlength=7)
    label = torch.tensor([2, 0, 5]).repeat_interleave(300)
    sampled = sample_positives(label, assignment, sizes, torch.rand(900))
    assert torch.equal(assignment[sampled], label)
    assert sampled[:300].unique().tolist() == [0, 3, 5]
    assert sampled[:300].bincount()[[0, 3, 5]].min() > 60
    ends = sample_positives(torch.tensor([2, 2]), assignment, sizes, torch.tensor([0.0, 1 - 2.0**-24]))
    assert ends.tolist() == [0, 5]


def test_negatives_are_uniform_over_the_pool() -> None:
    similarity = torch.randn(3, 50)
    sampled = sample_semihard(similarity, 5, torch.rand(3, 400))
    for row, own in zip(similarity, sampled):
        nearest = sorted(range(50), key=lambda i: -float(row[i]))[:5]
        assert sorted(own.unique().tolist()) == sorted(nearest)
        assert own.bincount()[nearest].min() > 40


def test_inter_image_loss_term_by_term() -> None:
    method, clock = make("interclr"), Clock(3, 10, 2, seed=1)
    method.clusters.assignment[10:30] = 4
    q, index = F.normalize(torch.randn(4, 16), dim=1).requires_grad_(), torch.tensor([12, 50, 12, 0])
    rows, assignment = method.clusters.memory.rows.double(), method.clusters.assignment
    u = rng.uniform(clock.seed, clock.epoch, index, rng.METHOD + 1, 10)
    positive = sample_positives(assignment[index], assignment, method.clusters.sizes(), u[:, 0])
    negative = sample_semihard(q @ rows.float().T, 20, u[:, 1:])
    expected, rows = torch.zeros(()), rows.float()
    for i in range(4):
        logits = [(q[i] @ rows[positive[i]] + 0.5) / 0.2]
        logits += [q[i] @ rows[j] / 0.2 for j in negative[i] if assignment[j] != assignment[index[i]]]
        expected = expected + (torch.stack(logits).logsumexp(0) - logits[0]) / 4
    loss = method.inter(q, index, clock)
    torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(torch.autograd.grad(loss, q), torch.autograd.grad(expected, q), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("groups", [1, 2])
def test_key_encoder_is_an_ema_without_gradient(groups: int) -> None:
    method = make("interclr", momentum=0.9, batch_norm_groups=groups)
    batch, pairs = make_batch(method, 8), []
    method(batch, Clock())["loss"].backward()
    for key, online in ((method.key_backbone, method.backbone), (method.key_projector, method.projector)):
        assert all(p.grad is None for p in key.parameters())
        pairs += list(zip(key.module.parameters(), online.parameters()))
    starts = [key.detach().clone() for key, _ in pairs]
    with torch.no_grad():
        for _, online in pairs:
            online += 1
    method.after_step(Clock(1, 10))
    for (key, _), start in zip(pairs, starts):
        torch.testing.assert_close(key, start + 0.1)
    method.key_backbone.eval()  # then the groups do not matter
    expected = method.key_projector(method.key_backbone(batch.views[1]))
    torch.testing.assert_close(method.keys(batch.views[1], batch, Clock()), expected)


def test_images_without_a_cluster_are_ignored() -> None:
    """An image that could not be read at the first clustering has no positive; the others are unaffected."""
    method, clock = make("interclr"), Clock(3, 10, 2, seed=1)
    q, index = F.normalize(torch.randn(4, 16), dim=1), torch.tensor([12, 50, 13, 0])
    method.clusters.assignment[[12, 13]] = -1
    torch.testing.assert_close(method.inter(q, index, clock), method.inter(q[[1, 3]], index[[1, 3]], clock))
    q.requires_grad_()
    loss = method.inter(q[[0, 2]], index[[0, 2]], clock)
    loss.backward()
    assert float(loss.detach()) == 0
    assert not q.grad.any()
    batch = make_batch(method, 8)
    method.clusters.assignment[batch.index] = -1
    assert method(batch, clock)["loss"].isfinite()
    assert (method.clusters.assignment[batch.index] >= 0).all()


def _inter(positive: Tensor, negatives: Tensor, known: Tensor) -> float:
    r, n = distributed.rank(), len(positive) // distributed.world_size()
    mine = slice(r * n, (r + 1) * n)
    counted = torch.ones_like(negatives[mine], dtype=torch.bool)
    loss = inter_image_loss(positive[mine], negatives[mine], counted, known[mine], 0.2, 0.0)
    return float(distributed.all_reduce_mean(loss))


def test_mean_is_over_images_of_all_processes_with_a_cluster(pool) -> None:
    args = torch.randn(6), torch.randn(6, 3), torch.tensor([True, False, False, True, True, True])
    assert pool.run(_inter, *args) == pytest.approx([_inter(*args)] * 2, rel=1e-5)


def test_centroids_and_small_clusters_are_updated() -> None:
    """All centroids move every `centroids_every` steps, and small clusters are dissolved after each."""
    method = make("interclr", centroids_every=3)
    clusters = method.clusters
    clusters.assignment.copy_(torch.arange(NUM_IMAGES) % 6)
    old = clusters.centroids.clone()
    for step in (1, 2):
        method.after_step(Clock(step, 10))
        assert torch.equal(clusters.centroids, old)
    method.after_step(Clock(3, 10))
    for cluster in range(6):
        torch.testing.assert_close(clusters.centroids[cluster], clusters.memory.rows[cluster::6].mean(dim=0))
    clusters.assignment.copy_(torch.tensor([0] * 40 + [1] * 20 + [2] * 3 + [3]))
    method.after_step(Clock(4, 10))
    assert clusters.sizes().min() >= 3


def test_loss_is_the_weighted_sum() -> None:
    method = make("interclr")
    batch = make_batch(method, 8)
    with torch.no_grad():
        queue = method.queue.rows.clone()
        k = F.normalize(method.keys(batch.views[1], batch, Clock()), dim=1)
        q = F.normalize(method.projector(method.backbone(batch.views[0])), dim=1)
        intra, _ = info_nce(q, k, queue, 0.2)
        inter = method.inter(q, batch.index, Clock())
        out = method(batch, Clock())
    torch.testing.assert_close(out["loss"], 0.75 * intra + 0.25 * inter)
    torch.testing.assert_close(method.queue.rows[:8], k, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(method.clusters.memory.rows[batch.index[7]], k[7], rtol=1e-4, atol=1e-5)


def similarity_within_clusters(inter_weight: float) -> float:
    """Mean similarity within a cluster minus that between clusters, after training on fixed clusters."""
    method = make("interclr", inter_weight=inter_weight, momentum=0.9, batch_norm_groups=1, min_cluster=0)
    images = make_batch(method, NUM_IMAGES)
    clusters = torch.arange(NUM_IMAGES) % 6
    shared = images.views[0][:6][clusters]
    images = images._replace(views=tuple(view + 0.5 * shared for view in images.views))
    method.clusters.update_samples = lambda index, x: (  # pyrefly: ignore
        method.clusters.memory.update(index, x, 0.0) or torch.zeros(())
    )
    method.clusters.assignment.copy_(clusters)
    optimizer = torch.optim.AdamW([p for p in method.parameters() if p.requires_grad], lr=1e-2)
    for step in range(40):
        mine = torch.arange(16) + 16 * (step % 4)
        batch = Batch(tuple(view[mine] for view in images.views), mine, images.label[mine])
        optimizer.zero_grad()
        method(batch, Clock(step, 40, steps_per_epoch=4))["loss"].backward()
        optimizer.step()
        method.after_step(Clock(step + 1, 40, steps_per_epoch=4))
    rows = method.clusters.memory.rows
    similarity, same = rows @ rows.T, clusters[:, None] == clusters
    other = ~torch.eye(NUM_IMAGES, dtype=torch.bool)
    return float(similarity[same & other].mean() - similarity[~same].mean())


@pytest.mark.slow
def test_without_the_inter_image_loss_clusters_do_not_tighten() -> None:
    assert similarity_within_clusters(1.0) > similarity_within_clusters(0.0) + 0.1


def test_first_clustering_is_kmeans_of_all_images() -> None:
    method, data = make("interclr", cluster_resize=20), Data(shapes=TINY_SHAPES)
    network = torch.nn.Sequential(method.backbone, method.projector)
    features, _ = kmeans.embed(network, data, View.center(SIZE, 20))
    method.before_epoch(data, Clock(seed=4))
    torch.testing.assert_close(method.clusters.memory.rows, F.normalize(features, dim=1))
    assert (method.clusters.sizes() > 0).all()


def test_rejects_invalid_options() -> None:
    with pytest.raises(UserError, match=r"the 65 most similar of 64 images: set pool_size to 6"):
        make("interclr", pool_size=65)
    with pytest.raises(UserError, match="65 clusters of 64 images: ask for at most 64"):
        make("interclr", num_clusters=65)


def test_full_scale_sizes() -> None:
    with torch.device("meta"):
        method = InterCLR(nets.resnet50())
    assert sum(p.numel() for p in method.projector.parameters()) == 2048 * 2048 + 2048 + 2048 * 128 + 128
    assert method.clusters.centroids.shape == (10000, 128)
