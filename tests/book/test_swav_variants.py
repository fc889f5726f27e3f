"""The variants of the chapter on SwAV: each differs from the method in the one thing that its name says."""

import pytest
import torch
import torch.nn.functional as F

from sslbook.book.chapters.swav.experiments import VARIANTS, VIEW, make
from sslbook.book.chapters.swav.variants import SoftmaxCodes, sinkhorn
from sslbook.data.datasets.shapes import Shapes
from sslbook.data.loader import Batch, Data
from sslbook.methods.swav import SwAV
from sslbook.nn import sinkhorn as package
from sslbook.schedules import Clock


@pytest.fixture(scope="module")
def batch() -> Batch:
    return next(iter(Data(shapes=Shapes(num_train=32, num_test=1)).batches((VIEW, VIEW), 32, seed=0, epoch=0)))


def gradients(method: SwAV, batch: Batch) -> torch.Tensor:
    method(batch, Clock())["loss"].backward()
    return torch.cat([p.grad.flatten() for p in method.parameters() if p.grad is not None])


def test_the_chapters_sinkhorn_is_the_packages() -> None:
    scores = F.normalize(torch.randn(20, 8), dim=1) @ F.normalize(torch.randn(6, 8), dim=1).T
    torch.testing.assert_close(sinkhorn(scores, 0.02, 3), package.sinkhorn(scores, 0.02, 3))


@pytest.mark.parametrize("name", [name for name in VARIANTS if name != "as it should be"])
def test_every_variant_differs(name: str, batch: Batch) -> None:
    whole, other = make(0), make(0, **VARIANTS[name])
    torch.testing.assert_close(whole.prototypes, other.prototypes)
    if "prototypes" in name:  # what happens around the optimizer's step differs
        for method in (whole, other):
            gradients(method, batch)
            method.before_optimizer_step(Clock(0, 100))
            method.prototypes.data.mul_(2)
            method.after_step(Clock(1, 100))
        same = (whole.prototypes.grad is None) == (other.prototypes.grad is None)
        assert not same or not torch.allclose(whole.prototypes, other.prototypes)
    else:
        assert not torch.allclose(gradients(whole, batch), gradients(other, batch))


def test_one_prototype_for_all_satisfies_a_softmax_and_not_sinkhorn() -> None:
    z = F.normalize(torch.ones(2, 8, 64), dim=2)
    collapsed, whole = make(0, kind=SoftmaxCodes).codes(z), make(0).codes(z)
    assert collapsed.amax(2).min() > 10 * whole.amax(2).max()
    torch.testing.assert_close(whole, torch.full_like(whole, 1 / whole.shape[2]))
