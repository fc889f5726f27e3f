import math

import pytest
import torch
from torch import Tensor

from sslbook import distributed
from sslbook import nn as nets
from sslbook.data.datasets.shapes import Shapes
from sslbook.data.loader import Batch, Data
from sslbook.errors import UserError
from sslbook.methods.exemplar import Exemplar, surrogate_loss
from sslbook.schedules import Clock
from tests.methods.cases import CONVNET, NUM_IMAGES, SIZE, TINY_SHAPES, VIEW, Case, make, transformer

CASE = Case(
    options={"view": VIEW, "num_exemplars": NUM_IMAGES},
    command={"method.backbone": CONVNET, "method.view.size": SIZE, "method.num_exemplars": 16},
    learned=lambda method, batch, out: bool(out["exemplar_accuracy"] > 75),  # some images share a number
    corners=[(2, 0.05, {}), (6, 0.05, {"num_exemplars": 40}), (2, 0.05, {"num_exemplars": 3})],
    other_backbones=[transformer],
)


@pytest.mark.parametrize("label", [[0, 2, 1, 2, 2], [1], [2, -1, 0, -1, -1]])
def test_loss_is_equation_2(label: list[int]) -> None:
    logits = torch.randn(len(label), 3, dtype=torch.float64)
    terms = []
    for row, own in zip(logits.tolist(), label):
        if own >= 0:
            terms.append(math.log(sum(math.exp(v) for v in row)) - row[own])
    loss = surrogate_loss(logits, torch.tensor(label))
    assert float(loss) == pytest.approx(sum(terms) / len(terms), rel=1e-10)


def test_batch_without_exemplars_has_zero_loss() -> None:
    logits = torch.randn(3, 4, requires_grad=True)
    loss = surrogate_loss(logits, torch.tensor([-1, -1, -1]))
    loss.backward()
    assert float(loss.detach()) == 0
    assert not logits.grad.any()


def _loss(logits: Tensor, label: Tensor) -> tuple[float, Tensor]:
    r, n = distributed.rank(), len(logits) // distributed.world_size()
    mine = logits[r * n : (r + 1) * n].clone().requires_grad_()
    loss = surrogate_loss(mine, label[r * n : (r + 1) * n])
    loss.backward()
    return float(distributed.all_reduce_mean(loss.detach())), mine.grad / distributed.world_size()


@pytest.mark.parametrize("label", [[0, -1, -1, 1, 2, 0], [-1, -1, -1, 1, -1, -1]])
def test_mean_is_over_exemplars_of_all_processes(label: list[int], pool) -> None:
    logits = torch.randn(6, 3)
    loss, gradient = _loss(logits, torch.tensor(label))
    got = pool.run(_loss, logits, torch.tensor(label))
    torch.testing.assert_close(torch.cat([g for _, g in got]), gradient)
    assert got[0][0] == pytest.approx(loss, rel=1e-5)


def test_epoch_repeats_the_exemplars_only() -> None:
    method, data = make("exemplar", num_exemplars=10), Data(shapes=TINY_SHAPES)
    exemplars = (method.label >= 0).nonzero()[:, 0]
    assert method.label[exemplars].tolist() == list(range(10))
    assert torch.equal(make("exemplar", seed=1, num_exemplars=10).label, method.label)
    assert exemplars.tolist() != list(range(10))
    order = method.sample_order(data, Clock(seed=3))
    assert order is not None
    assert len(order) == NUM_IMAGES
    for i in range(6):  # each once before any comes again
        assert torch.equal(order[10 * i : 10 * i + 10].sort().values, exemplars)
    assert not torch.equal(order[:10], order[10:20])
    assert not torch.equal(order, method.sample_order(data, Clock(5, steps_per_epoch=4, seed=3)))


def test_all_images_as_exemplars() -> None:
    method = make("exemplar", num_exemplars=0)
    assert method.classifier.out_features == NUM_IMAGES
    assert method.label.tolist() == list(range(NUM_IMAGES))
    assert sorted(method.sample_order(Data(shapes=TINY_SHAPES), Clock()).tolist()) == list(range(NUM_IMAGES))


def accuracy_on_new_augmentations(augmented: bool) -> float:
    """Accuracy in percent on new augmentations after training.

    Each image is a pattern, and augmentation adds a random color of larger variance.
    """
    method = make("exemplar", num_exemplars=0)
    method.setup(Data(shapes=Shapes(num_train=32, num_test=4, size=SIZE)))
    generator, index = torch.Generator().manual_seed(0), torch.arange(32)
    patterns = torch.randn(32, 3, 4, 4, generator=generator).repeat(1, 1, 4, 4)

    def augment() -> Batch:
        colors = 3 * torch.randn(32, 3, 1, 1, generator=generator)
        return Batch((patterns + colors,), index, torch.full((32,), -1))

    batch = augment()
    optimizer = torch.optim.AdamW(method.parameters(), lr=1e-2)
    for _ in range(80):
        batch = augment() if augmented else batch
        optimizer.zero_grad()
        method(batch, Clock())["loss"].backward()
        optimizer.step()
    with torch.no_grad():
        return sum(float(method(augment(), Clock())["exemplar_accuracy"]) for _ in range(8)) / 8


@pytest.mark.slow
def test_without_augmentation_features_are_not_invariant() -> None:
    assert accuracy_on_new_augmentations(True) > 80
    assert accuracy_on_new_augmentations(False) < 60


def test_rejects_invalid_options() -> None:
    with pytest.raises(UserError, match=r"65 exemplars of 64 images: set num_exemplars to 64 or 0"):
        make("exemplar", num_exemplars=65)


def test_full_scale_sizes() -> None:
    with torch.device("meta"):
        method = Exemplar(nets.resnet50())
    assert method.classifier.weight.shape == (32000, 2048)
