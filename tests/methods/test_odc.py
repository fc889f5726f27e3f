import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from sslbook import distributed, rng
from sslbook import nn as nets
from sslbook.data.loader import Data
from sslbook.errors import UserError
from sslbook.methods.odc import ODC, Neck, OnlineClusters, weighted_cross_entropy
from sslbook.nn import kmeans
from sslbook.schedules import Clock
from tests.methods.cases import CONVNET, NUM_IMAGES, SIZE, TINY_SHAPES, VIEW, Case, make, make_batch, transformer

CASE = Case(
    options={
        "view": VIEW,
        "cluster_resize": SIZE,
        "hidden_dim": 32,
        "feature_dim": 16,
        "num_clusters": 6,
        "min_cluster": 3,
        "centroids_every": 2,
    },
    command={
        "method.backbone": CONVNET,
        "method.view.size": SIZE,
        "method.cluster_resize": SIZE,
        "method.hidden_dim": 16,
        "method.feature_dim": 8,
        "method.num_clusters": 6,
        "method.min_cluster": 3,
        "method.centroids_every": 2,
    },
    learned=lambda method, batch, out: bool(out["cluster_accuracy"] > 80 and out["reassigned"] < 20),
    overfit={"hidden_dim": 256},
    lr=0.01,
    corners=[(2, 0.01, {}), (6, 0.01, {"min_cluster": 8, "centroids_every": 1})],
    other_backbones=[transformer],
)


@pytest.mark.parametrize("sizes", [[4, 25, 1], [1, 1, 1], [0, 9, 100]])
@pytest.mark.parametrize("n", [5, 1])
def test_loss_weighs_by_frequency_to_the_minus_one_half(n: int, sizes: list[int]) -> None:
    logits = torch.randn(n, 3, dtype=torch.float64)
    label = torch.randint(1, 3, (n,))
    terms, weights = [], []
    for row, own in zip(logits.tolist(), label.tolist()):
        terms.append(math.log(sum(math.exp(v) for v in row)) - row[own])
        weights.append(sizes[own] ** -0.5)
    expected = sum(w * t for w, t in zip(weights, terms)) / sum(weights)
    assert float(weighted_cross_entropy(logits, label, torch.tensor(sizes))) == pytest.approx(expected, rel=1e-6)


def _loss(logits: Tensor, label: Tensor) -> tuple[float, Tensor]:
    r, n = distributed.rank(), len(logits) // distributed.world_size()
    mine = logits[r * n : (r + 1) * n].clone().requires_grad_()
    loss = weighted_cross_entropy(mine, label[r * n : (r + 1) * n], torch.tensor([1, 10, 100]))
    loss.backward()
    return float(distributed.all_reduce_mean(loss.detach())), mine.grad / distributed.world_size()


def test_weights_are_summed_over_all_processes(pool) -> None:
    logits, label = torch.randn(6, 3), torch.tensor([0, 0, 0, 1, 2, 2])
    loss, gradient = _loss(logits, label)
    got = pool.run(_loss, logits, label)
    torch.testing.assert_close(torch.cat([g for _, g in got]), gradient)
    assert got[0][0] == pytest.approx(loss, rel=1e-5)


def test_images_of_no_cluster_do_not_count() -> None:
    logits, sizes = torch.randn(4, 3), torch.tensor([1, 10, 100])
    loss = weighted_cross_entropy(logits, torch.tensor([-1, 1, -1, 2]), sizes)
    torch.testing.assert_close(loss, weighted_cross_entropy(logits[[1, 3]], torch.tensor([1, 2]), sizes))
    logits.requires_grad_()
    loss = weighted_cross_entropy(logits, torch.full((4,), -1), sizes)
    loss.backward()
    assert float(loss.detach()) == 0
    assert not logits.grad.any()


def test_image_without_cluster_gets_one_when_it_is_shown() -> None:
    method = make("odc")
    batch = make_batch(method, 8)
    method.clusters.assignment[batch.index[:2]] = -1
    loss = method(batch, Clock())["loss"]
    loss.backward()
    assert loss.isfinite()
    assert (method.clusters.assignment[batch.index] >= 0).all()


def test_forward_weighs_by_the_memorys_cluster_sizes() -> None:
    method, clock = make("odc"), Clock(seed=3)
    method.clusters.assignment.copy_(torch.tensor([0] * 40 + [1] * 14 + [2] * 4 + [3] * 3 + [4] * 2 + [5]))
    batch = make_batch(method, 8)._replace(index=torch.tensor([0, 39, 41, 55, 58, 61, 62, 63]))
    kept = rng.uniform(clock.seed, clock.epoch, batch.index, rng.METHOD, 32) < 0.5
    with torch.no_grad():
        logits = method.classifier(method.neck(method.backbone(batch.views[0]), kept)).tolist()
        loss = float(method(batch, clock)["loss"])
    terms, weights = [], []
    for row, own, size in zip(logits, [0, 0, 1, 2, 3, 4, 4, 5], [40, 40, 14, 4, 3, 2, 2, 1]):
        terms.append(math.log(sum(math.exp(v) for v in row)) - row[own])
        weights.append(size**-0.5)
    assert loss == pytest.approx(sum(w * t for w, t in zip(weights, terms)) / sum(weights), rel=1e-5)
    assert loss != pytest.approx(sum(terms) / 8, rel=1e-3)


def test_neck_dropout_doubles_kept_values() -> None:
    neck = Neck(4, 6, 3).eval()
    x, kept = torch.randn(2, 4), torch.tensor([[True, False] * 3, [False] * 6])
    hidden = F.relu(neck.norm(neck.first(x)))
    torch.testing.assert_close(neck(x), F.relu(neck.second(hidden)))
    hidden[0, 1::2], hidden[1] = 0.0, 0.0
    torch.testing.assert_close(neck(x, kept), F.relu(neck.second(2 * hidden)))


def test_samples_are_updated_and_reassigned_to_the_nearest_centroid() -> None:
    method = make("odc", momentum=0.25)
    rows, labels = method.clusters.memory.rows.clone(), method.clusters.assignment.clone()
    index, x = torch.tensor([5, 60, 5]), 7 * torch.rand(3, 16)
    method.clusters.update_samples(index, x)
    for i, feature in ((60, x[1]), (5, x[2])):  # of a repeated image the last counts
        row = F.normalize(0.25 * rows[i] + 0.75 * F.normalize(feature, dim=0), dim=0)
        torch.testing.assert_close(method.clusters.memory.rows[i], row)
        scores = [float(row @ centroid) for centroid in method.clusters.centroids]
        assert int(method.clusters.assignment[i]) == scores.index(max(scores))
    others = [i for i in range(NUM_IMAGES) if i not in (5, 60)]
    assert torch.equal(method.clusters.assignment[others], labels[others])
    assert torch.equal(method.clusters.memory.rows[others], rows[others])


def test_centroids_are_means_of_their_features() -> None:
    method = make("odc")
    method.clusters.assignment.copy_(torch.arange(NUM_IMAGES) % 4)
    method.clusters.assignment[:8] = -1
    old = method.clusters.centroids.clone()
    method.clusters.update_centroids()
    for cluster in range(4):
        members = [i for i in range(8, NUM_IMAGES) if i % 4 == cluster]
        torch.testing.assert_close(method.clusters.centroids[cluster], method.clusters.memory.rows[members].mean(dim=0))
    assert torch.equal(method.clusters.centroids[4:], old[4:])


def test_small_clusters_are_dissolved_and_the_largest_split() -> None:
    method = make("odc")
    assignment = torch.tensor([0] * 30 + [1] * 20 + [2] * 11 + [3] * 2 + [5])  # cluster 4 is empty
    method.clusters.assignment.copy_(assignment)
    method.clusters.update_centroids()
    centroids, rows = method.clusters.centroids.clone(), method.clusters.memory.rows
    method.clusters.replace_small_clusters()
    assert method.clusters.sizes().sum() == NUM_IMAGES
    assert (method.clusters.sizes() > 0).all()
    for i in range(61, 64):  # these went to the nearest of the large ones, or to a half of it
        nearest = int((centroids[:3] @ rows[i]).argmax())
        assert int(method.clusters.assignment[i]) in (nearest, 3, 4, 5)
    for cluster in range(3):
        mine = method.clusters.assignment[assignment == cluster].unique().tolist()
        assert set(mine) <= {cluster, 3, 4, 5}
    for cluster in range(3, 6):
        members = (method.clusters.assignment == cluster).nonzero()[:, 0]
        torch.testing.assert_close(method.clusters.centroids[cluster], rows[members].mean(dim=0))


def test_cluster_of_equal_rows_is_split_too() -> None:
    method = make("odc")
    method.clusters.memory.rows.fill_(0.25)
    method.clusters.assignment.fill_(2)
    method.clusters.replace_small_clusters()
    assert (method.clusters.sizes() > 0).all()
    assert method.clusters.centroids.isfinite().all()


def test_updates_follow_the_steps() -> None:
    """All centroids move every `centroids_every` steps, and small clusters are dealt with after each."""
    method = make("odc", centroids_every=3)
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


def test_first_epoch_starts_with_kmeans_of_all_images() -> None:
    method, data = make("odc"), Data(shapes=TINY_SHAPES)
    method.before_epoch(data, Clock(seed=4))
    features, _ = kmeans.embed(torch.nn.Sequential(method.backbone, method.neck), data, method.cluster_view)
    torch.testing.assert_close(method.clusters.memory.rows, F.normalize(features, dim=1))
    before = {key: value.clone() for key, value in method.state_dict().items()}
    method.before_epoch(data, Clock(2, 4, 2, seed=4))  # later epochs leave the clusters alone
    assert all(torch.equal(value, before[key]) for key, value in method.state_dict().items())


def num_clusters_after_drifting() -> int:
    """Number of non-empty clusters after the features of all images have drifted for some epochs."""
    generator = torch.Generator().manual_seed(0)
    clusters = OnlineClusters(32, 4, momentum=0.5, min_cluster=2)
    clusters.allocate(128)
    clusters.initialize(torch.randn(128, 4, generator=generator), torch.arange(128), seed=0)
    for step in range(80):
        x = torch.randn(16, 4, generator=generator) + torch.tensor([1.0, 0.0, 0.0, 0.0])
        clusters.update_samples((torch.arange(16) + 16 * step) % 128, x)
        clusters.update_centroids()
        clusters.replace_small_clusters()
    return int((clusters.sizes() > 0).sum())


@pytest.mark.slow
def test_without_replacing_small_clusters_they_are_lost(monkeypatch) -> None:
    assert num_clusters_after_drifting() == 32
    monkeypatch.setattr(OnlineClusters, "replace_small_clusters", lambda self: None)
    assert num_clusters_after_drifting() < 30


def test_rejects_invalid_options() -> None:
    with pytest.raises(UserError, match="65 clusters of 64 images: ask for at most 64"):
        make("odc", num_clusters=65)
    with pytest.raises(UserError, match="6 clusters of at least 11 images need more than 64: lower"):
        make("odc", min_cluster=11)


def test_default_sizes() -> None:
    with torch.device("meta"):
        method = ODC(nets.resnet50())
    assert method.classifier.weight.shape == (10000, 256)
    assert sum(p.numel() for p in method.neck.parameters()) == 2048 * 512 + 512 * 256 + 256
    assert (method.neck.norm.affine, method.neck.norm.momentum) == (False, 0.001)
