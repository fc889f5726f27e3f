"""The chapter on DeepCluster: what its ablations do, and its formulas against counting."""

import itertools
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from sslbook.book.chapters.deepcluster import exercises
from sslbook.book.chapters.deepcluster.variants import Partitions, Watched, lloyd, match, nmi, train, unit
from sslbook.data.datasets.shapes import Shapes
from sslbook.data.loader import Data
from sslbook.data.views import View
from sslbook.methods.deepcluster import DeepCluster
from sslbook.nn import ConvNet
from sslbook.schedules import Clock

VIEW = View(size=16)


@pytest.fixture(scope="module")
def data() -> Data:
    return Data(shapes=Shapes(num_train=64, num_test=1, size=16))


def make(kind: type[DeepCluster] = Watched, **options) -> DeepCluster:
    torch.manual_seed(0)
    return kind(ConvNet(4), VIEW, 16, num_clusters=6, pca_dim=8, **options)


def test_watching_changes_nothing(data: Data) -> None:
    watched, plain = make(), make(DeepCluster)
    found = [train(method, data, 2, 32, 1e-3, 0) for method in (watched, plain)]
    assert found[0] == found[1]
    assert torch.equal(watched.assignment, plain.assignment)
    assert len(watched.partitions.epochs) == 2
    assert watched.partitions.curves()["clusters"] == [6.0, 6.0]


def test_each_variant_does_what_its_name_says(data: Data) -> None:
    def after_two(**options) -> tuple[Watched, Tensor, Tensor, Tensor]:
        method = make(**options)
        method.setup(data)
        method.before_epoch(data, Clock(0, 6, 3))
        with torch.no_grad():
            method.classifier.weight.normal_(generator=torch.Generator().manual_seed(0))
        old, weight = method.assignment.clone(), method.classifier.weight.clone()
        method.before_epoch(data, Clock(3, 6, 3))
        return method, old, weight, method.classifier.weight.detach()

    method, old, before, after = after_two()
    assert not torch.equal(before, after)
    assert after.std() < 0.02  # reset
    assert torch.equal(*after_two(head="keep")[2:])
    method, old, before, after = after_two(head="matched")
    order = match(old, method.assignment, 6)[0]
    assert torch.equal(after, before[order])
    assert not torch.equal(order, torch.arange(6))
    assert make(uniform=False).sample_order(data, Clock()) is None
    method, old, *_ = after_two(labels="random")
    assert torch.equal(method.assignment, old)
    method, old, *_ = after_two(labels="own", head="keep")
    with torch.no_grad():
        images = torch.cat([b.views[0] for b in data.evaluation_batches("pretrain", method.cluster_view)])
        method.eval()
        assert torch.equal(method.assignment, method.classifier(method.backbone(images)).argmax(1))
    assert not torch.equal(after_two(prepare=unit)[0].assignment, after_two()[0].assignment)


def test_an_empty_cluster_stays_empty_without_the_cure() -> None:
    x = torch.tensor([[0.0, 0.0]] * 6 + [[1.0, 0.0]] * 6)
    _, found = lloyd(x, 4, 5, seed=0)  # four centroids, two places
    assert len(found.unique()) == 2


def test_matching_against_all_permutations_and_nmi_against_its_definition() -> None:
    generator = torch.Generator().manual_seed(0)
    a = torch.randint(4, (40,), generator=generator)
    b = torch.where(
        torch.rand(40, generator=generator) < 0.6, (a + 1) % 4, torch.randint(4, (40,), generator=generator)
    )
    best = max((torch.tensor(p)[b] == a).double().mean().item() for p in itertools.permutations(range(4)))
    order, fraction = match(a, b, 4)
    assert fraction == pytest.approx(best)
    assert (order[b] == a).double().mean().item() == pytest.approx(best)
    joint = np.histogram2d(a.numpy(), b.numpy(), bins=[np.arange(5) - 0.5] * 2)[0] / 40
    p, q = joint.sum(1), joint.sum(0)
    information = sum(
        joint[i, j] * math.log(joint[i, j] / p[i] / q[j]) for i in range(4) for j in range(4) if joint[i, j] > 0
    )
    assert nmi(a, b) == pytest.approx(information / math.sqrt((p * np.log(p)).sum() * (q * np.log(q)).sum()))
    assert nmi(torch.zeros(5, dtype=torch.long), torch.zeros(5, dtype=torch.long)) == 1
    notes = Partitions(a)
    notes(a, 4)
    notes((a + 1) % 4, 4)
    assert notes.epochs[1]["NMI to last"] == pytest.approx(1)
    assert notes.epochs[1]["same number"] == 0
    assert notes.epochs[1]["matched"] == 100


@pytest.mark.parametrize(("K", "m"), [(4, 1.3), (3, 5.0)])
def test_the_loss_of_an_old_classifier_is_the_mean_over_all_orders(K: int, m: float) -> None:
    logits = m * torch.eye(K, dtype=torch.float64)
    orders = [torch.tensor(p) for p in itertools.permutations(range(K))]
    mean = np.mean([F.cross_entropy(logits, order).item() for order in orders])
    assert exercises.stale.solution(K, m) == pytest.approx(mean)
    assert mean > math.log(K)


def test_unrelated_partitions_have_the_level_of_the_formula() -> None:
    generator = torch.Generator().manual_seed(0)
    found = [nmi(*torch.randint(10, (2, 4000), generator=generator)) for _ in range(40)]
    assert np.mean(found) == pytest.approx(exercises.unrelated.solution(10, 10, 4000), rel=0.08)
