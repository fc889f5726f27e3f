"""The chapter on ODC: its variants switch off what they say, and nothing else."""

import copy

import pytest
import torch

from sslbook.book.chapters.odc.experiments import make
from sslbook.book.chapters.odc.variants import Watched, Work, weights
from sslbook.data.datasets.shapes import Shapes
from sslbook.data.loader import Data
from sslbook.data.views import View
from sslbook.methods.odc import ODC
from sslbook.nn import ConvNet
from sslbook.schedules import Clock

DATA = Data(shapes=Shapes(num_train=96, num_test=8))
VIEW = View(size=16)
OPTIONS = {"hidden_dim": 16, "feature_dim": 8, "num_clusters": 6, "min_cluster": 4, "centroids_every": 1}


def built(kind: type[ODC] = Watched, **options) -> ODC:
    torch.manual_seed(0)
    return kind(ConvNet(4), VIEW, 16, **OPTIONS | options)


def trained(method: ODC, steps: int = 3) -> list[dict[str, torch.Tensor]]:
    optimizer, found = torch.optim.SGD(method.parameters(), 0.1), []
    method.setup(DATA)
    method.before_epoch(DATA, Clock(0, steps, steps, 0))
    for step, batch in zip(range(steps), DATA.batches(method.views(), 32, seed=0, epoch=0)):
        out = method(batch, Clock(step, steps, steps, 0))
        optimizer.zero_grad()
        out["loss"].backward()
        optimizer.step()
        method.after_step(Clock(step + 1, steps, steps, 0))
        found.append(out)
    return found


def test_as_it_should_be_is_the_package() -> None:
    ours, package = built(), built(ODC)
    for a, b in zip(trained(ours), trained(package), strict=True):
        for name in b:
            torch.testing.assert_close(a[name], b[name])
    assert torch.equal(ours.clusters.assignment, package.clusters.assignment)


@pytest.mark.parametrize(
    "options", [{"power": 0.0}, {"power": 1.0}, {"dropout": False}, {"start": "random"}], ids=lambda o: str(o)
)
def test_a_variant_has_another_loss(options: dict) -> None:
    assert trained(built(**options))[0]["loss"] != trained(built())[0]["loss"]


def test_labels_that_never_move() -> None:
    still = built(moving=False)
    still.setup(DATA)
    still.before_epoch(DATA, Clock(0, 3, 3, 0))
    first = still.clusters.assignment.clone()
    assert all(out["reassigned"] == 0 for out in trained(still))
    assert torch.equal(still.clusters.assignment, first)
    moved = trained(built())
    assert any(out["reassigned"] > 0 for out in moved)


def test_distance_finds_the_nearest() -> None:
    method = built(distance=True, care=False)
    method.setup(DATA)
    generator = torch.Generator().manual_seed(0)
    method.clusters.centroids = 0.5 * torch.rand(6, 8, generator=generator)
    index, x = torch.arange(32), torch.randn(32, 8, generator=generator)
    other = copy.deepcopy(method)
    other.distance = False
    for one in (method, other):
        one.assign(index, x)
    rows = method.clusters.memory.rows[index]
    nearest = torch.cdist(rows, method.clusters.centroids).argmin(dim=1)
    assert torch.equal(method.clusters.assignment[index], nearest)
    assert not torch.equal(other.clusters.assignment[index], nearest)


def test_without_care_small_clusters_stay() -> None:
    method, careless = built(), built(care=False)
    for one in (method, careless):
        one.setup(DATA)
        one.clusters.assignment[:] = 0
        one.after_step(Clock(1, 3, 3, 0))
    assert method.clusters.sizes().min() >= 4
    assert (careless.clusters.sizes() > 0).sum() == 1


def test_reset_renews_the_classifier() -> None:
    method = built(reset=True)
    method.setup(DATA)
    before = method.classifier.weight.clone()
    method.before_epoch(DATA, Clock(0, 3, 3, 0))
    assert not torch.equal(before, method.classifier.weight)
    assert (method.classifier.bias == 0).all()


def test_weights_interpolate() -> None:
    label, sizes = torch.tensor([0, 0, 1]), torch.tensor([9, 4])
    torch.testing.assert_close(weights(label, sizes, 0.0), torch.full((3,), 1 / 3))
    torch.testing.assert_close(weights(label, sizes, 0.5) * 7 / 6, torch.tensor([1 / 3, 1 / 3, 1 / 2]))


def test_work_counts_images() -> None:
    method = built()
    work = Work(method.backbone)
    trained(method)
    assert (work.trained, work.embedded) == (96, 96)
    assert work.passes() == 4 * 96


def test_many_clusters_have_a_smallest_size_that_fits() -> None:
    assert make(0, num_clusters=400).clusters.min_cluster == 5
    assert make(0, num_clusters=1000).clusters.min_cluster == 2
