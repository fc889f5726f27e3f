import math

import pytest
import torch
from torch import Tensor

from sslbook import nn as nets
from sslbook.data.datasets.shapes import NUISANCES, Shapes
from sslbook.data.loader import Data
from sslbook.data.views import View
from sslbook.errors import UserError
from sslbook.methods.deepcluster import DeepCluster, uniform_order
from sslbook.nn import ConvNet, kmeans
from sslbook.schedules import Clock
from tests.methods.cases import CONVNET, NUM_IMAGES, SIZE, TINY_SHAPES, VIEW, Case, make, make_batch, transformer

CENTER_CROP = View.center(SIZE)

CASE = Case(
    options={"view": VIEW, "cluster_resize": SIZE, "num_clusters": 6, "pca_dim": 8},
    command={
        "method.backbone": CONVNET,
        "method.view.size": SIZE,
        "method.cluster_resize": SIZE,
        "method.num_clusters": 6,
        "method.pca_dim": 8,
        "method.recluster_every": 1,
    },
    learned=lambda method, batch, out: bool(out["cluster_accuracy"] > 90),  # the first pseudo-labels are random
    overfit={"backbone": ConvNet(16), "sobel": False},
    corners=[(2, 0.05, {}), (6, 0.05, {"sobel": False})],
    other_backbones=[transformer],
)


def test_loss_equals_cross_entropy_of_the_clusters() -> None:
    method = make("deepcluster")
    batch = make_batch(method, 5)._replace(index=torch.tensor([3, 9, 3, 63, 0]))
    with torch.no_grad():
        logits = method.classifier(method.backbone(batch.views[0])).double().tolist()
        loss = method(batch, Clock())["loss"]
    expected = 0.0
    for row, image in zip(logits, batch.index.tolist()):
        expected += math.log(sum(math.exp(v) for v in row)) - row[int(method.assignment[image])]
    assert float(loss) == pytest.approx(expected / 5, rel=1e-5)


@pytest.mark.parametrize("sizes", [[1, 50, 7, 0, 2], [5, 5], [1], [0, 0, 3]])
def test_clusters_are_sampled_uniformly(sizes: list[int]) -> None:
    assignment = torch.cat([torch.full((size,), i) for i, size in enumerate(sizes)] + [torch.full((4,), -1)])
    assignment = assignment[torch.randperm(len(assignment))]
    filled = [i for i, size in enumerate(sizes) if size]
    order = uniform_order(assignment, len(sizes), 0, 3)
    assert len(order) == len(assignment)
    shown = assignment[order]
    assert shown.unique().tolist() == filled  # nothing of cluster -1
    share = len(assignment) // len(filled) + 1
    for i in filled:
        images = order[shown == i]
        assert share - len(filled) <= len(images) <= share  # the order is cut at the number of images
        if sizes[i] > share:
            assert len(images.unique()) == len(images)  # a large cluster repeats nothing
    assert torch.equal(order, uniform_order(assignment, len(sizes), 0, 3))
    if len(assignment) > 10:
        assert not torch.equal(order, uniform_order(assignment, len(sizes), 0, 4))


def test_before_epoch_clusters_whitened_features_of_center_crops() -> None:
    method, data, clock = make("deepcluster"), Data(shapes=TINY_SHAPES), Clock(4, 10, 2, seed=1)
    old = method.classifier.weight.detach().clone()
    method.before_epoch(data, clock)
    (batch,) = data.evaluation_batches("train", CENTER_CROP, NUM_IMAGES)
    with torch.no_grad():
        features = method.eval().backbone(batch.views[0])
    x = kmeans.pca_whiten(features, 8)
    _, expected = kmeans.kmeans(x, 6, 20, 100003 + 2)
    assert torch.equal(method.assignment, expected)
    assert not torch.allclose(method.classifier.weight, old)
    assert float(method.classifier.weight.detach().std()) == pytest.approx(0.01, rel=0.3)
    assert not method.classifier.bias.any()


def test_between_clusterings_nothing_changes() -> None:
    method, data = make("deepcluster", recluster_every=3), Data(shapes=TINY_SHAPES)
    method.before_epoch(data, Clock(6, 20, 2))
    before = {key: value.clone() for key, value in method.state_dict().items()}
    method.before_epoch(data, Clock(8, 20, 2))
    assert all(torch.equal(value, before[key]) for key, value in method.state_dict().items())


def _round() -> tuple[Tensor, Tensor, Tensor]:
    method, data = make("deepcluster"), Data(shapes=TINY_SHAPES)
    method.before_epoch(data, Clock(seed=4))
    order = method.sample_order(data, Clock(seed=4))
    assert order is not None
    return method.assignment, method.classifier.weight.detach(), order


@pytest.mark.slow
def test_processes_agree_about_clusters_classifier_and_order(pool) -> None:
    one = _round()
    for got in pool.run(_round):
        for a, b in zip(got, one):
            assert torch.equal(a, b)


def num_clusters_found() -> int:
    """The sum over five rounds of clustering and training, at most 40; there are ten distinct images, twelve times each."""
    off = dict.fromkeys(NUISANCES, 0.0)
    data = Data(shapes=Shapes(num_train=120, num_test=4, size=SIZE, **off))
    method = make("deepcluster", view=CENTER_CROP, sobel=False, num_clusters=8)
    method.setup(data)
    optimizer = torch.optim.SGD(method.parameters(), lr=0.1, momentum=0.9)
    found = 0
    for epoch in range(5):
        clock = Clock(3 * epoch, 15, 3, seed=3)
        method.before_epoch(data, clock)
        found += len(method.assignment.unique())
        for batch in data.batches(method.views(), 40, seed=0, epoch=epoch, order=method.sample_order(data, clock)):
            optimizer.zero_grad()
            method(batch, clock)["loss"].backward()
            optimizer.step()
    return found


@pytest.mark.slow
def test_without_filling_empty_clusters_there_are_fewer(monkeypatch) -> None:
    assert num_clusters_found() > 38
    monkeypatch.setattr(kmeans, "split_largest", lambda centroids, sizes: centroids)
    assert num_clusters_found() < 35


def train_on_unbalanced_clusters(epochs: int = 16) -> tuple[float, int]:
    """With nearly all images in one of six clusters: the accuracy on the others, and the number of classes predicted."""
    data = Data(shapes=Shapes(num_train=160, num_test=4, size=SIZE))
    method = make("deepcluster", view=CENTER_CROP, sobel=False)
    method.setup(data)
    method.assignment.copy_((torch.arange(160) - 135).clamp(min=0) // 5)  # 140 images, and five times 5 or less
    optimizer = torch.optim.SGD(method.parameters(), lr=0.1, momentum=0.9)
    for epoch in range(epochs):
        clock = Clock(5 * epoch, 5 * epochs, 5)
        for batch in data.batches(method.views(), 32, seed=0, epoch=epoch, order=method.sample_order(data, clock)):
            optimizer.zero_grad()
            method(batch, clock)["loss"].backward()
            optimizer.step()
    (batch,) = data.evaluation_batches("train", CENTER_CROP, 160)
    with torch.no_grad():
        predicted = method.eval().classifier(method.backbone(batch.views[0])).argmax(dim=1)
    return float((predicted == method.assignment)[method.assignment > 0].float().mean()), len(predicted.unique())


@pytest.mark.slow
def test_without_uniform_sampling_the_largest_cluster_absorbs_all(monkeypatch) -> None:
    accuracy, num_predicted = train_on_unbalanced_clusters()
    assert accuracy > 0.4
    assert num_predicted > 3
    monkeypatch.setattr(DeepCluster, "sample_order", lambda self, data, clock: None)
    accuracy, num_predicted = train_on_unbalanced_clusters()
    assert accuracy < 0.2
    assert num_predicted < 3


def test_rejects_invalid_options() -> None:
    with pytest.raises(UserError, match=r"17 principal components of 16 features: set --method.pca_dim to 16 or less"):
        make("deepcluster", pca_dim=17)
    with pytest.raises(UserError, match="65 clusters of 64 images: ask for at most 64"):
        make("deepcluster", num_clusters=65)


def test_default_sizes() -> None:
    with torch.device("meta"):
        method = DeepCluster(nets.resnet50())
    assert method.classifier.weight.shape == (10000, 2048)
