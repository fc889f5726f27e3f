"""The variants of the chapter on SimSiam: each differs from the method in the one thing that its name says."""

from functools import partial

import pytest
import torch
from torch import nn

from sslbook.book.chapters.simsiam.experiments import KEPT_FOR, VARIANTS, VIEW, make
from sslbook.book.chapters.simsiam.variants import MultiStep, NoStopGradient, WithEMA
from sslbook.data.datasets.shapes import Shapes
from sslbook.data.loader import Batch, Data
from sslbook.methods.simsiam import SimSiam
from sslbook.schedules import Clock


@pytest.fixture(scope="module")
def batch() -> Batch:
    return next(iter(Data(shapes=Shapes(num_train=32, num_test=1)).batches((VIEW, VIEW), 32, seed=0, epoch=0)))


def gradients(method: SimSiam, batch: Batch) -> torch.Tensor:
    method(batch, Clock())["loss"].backward()
    network = nn.Sequential(method.backbone, method.projector)
    return torch.cat([p.grad.flatten() for p in network.parameters()])


TRAINING = {name for name, options in VARIANTS.items() if {*options} & {"decay", "faster", "batch"}}  # same first step
OTHERS = [name for name in VARIANTS if name not in TRAINING | {"as it should be", "mean of 4 views, no predictor"}]


@pytest.mark.parametrize("name", OTHERS)
def test_every_variant_has_another_gradient(name: str, batch: Batch) -> None:
    whole, other = gradients(make(0), batch), gradients(make(0, **VARIANTS[name]), batch)
    assert whole.shape != other.shape or not torch.allclose(whole, other)


def test_without_a_predictor_the_stop_gradient_halves_the_gradient(batch: Batch) -> None:
    stopped, through = (
        gradients(make(0, kind=kind, predictor=nn.Identity), batch) for kind in (SimSiam, NoStopGradient)
    )
    torch.testing.assert_close(2 * stopped, through, rtol=1e-4, atol=1e-7)
    with_predictor = [gradients(make(0, kind=kind), batch) for kind in (SimSiam, NoStopGradient)]
    assert not torch.allclose(2 * with_predictor[0], with_predictor[1], rtol=0.1)


def test_targets_of_one_step_are_simsiams(batch: Batch) -> None:
    torch.testing.assert_close(gradients(make(0), batch), gradients(make(0, kind=MultiStep), batch))


def test_targets_stay_for_as_many_steps_as_asked_for(batch: Batch) -> None:
    method = make(0, **KEPT_FOR["3 steps"])
    seen = []
    for step in range(4):
        method(batch, Clock(step, 10))
        seen.append(method.old[1][-2].weight.clone())
        method.projector[-2].weight.data.add_(1)
    torch.testing.assert_close(seen[1:3], [seen[0]] * 2, rtol=0, atol=0)
    torch.testing.assert_close(seen[3], seen[0] + 3)


def test_an_ema_moves_by_its_momentum(batch: Batch) -> None:
    method = make(0, kind=partial(WithEMA, momentum=0.75))
    method(batch, Clock())
    before = method.old[1][0].weight.clone()
    method.projector[0].weight.data.add_(1)
    method.after_step(Clock(1, 10))
    torch.testing.assert_close(method.old[1][0].weight, before + 0.25)


def test_a_moving_average_keeps_what_an_image_had(batch: Batch) -> None:
    method = make(0, **VARIANTS["moving average, no predictor"])
    first = method(batch, Clock())["loss"]
    torch.testing.assert_close(first, make(0, predictor=nn.Identity)(batch, Clock())["loss"])  # nothing to keep yet
    before = method.eta[batch.index].clone()
    z = sum(method.projector(method.backbone(x)) for x in batch.views).detach() / 2
    torch.testing.assert_close(before, z)
    method.projector[-2].weight.data.neg_()
    method(batch, Clock())
    torch.testing.assert_close(method.eta[batch.index], 0.8 * z - 0.2 * z, rtol=1e-3, atol=1e-4)


def test_the_mean_of_many_views_has_one_more_view() -> None:
    method = make(0, **VARIANTS["mean of 4 views, no predictor"])
    assert len(method.views()) == 5
