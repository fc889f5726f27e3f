"""The chapter's ablations of MoCo, and what they measure of queue and key encoder."""

import math

import pytest
import torch
import torch.nn.functional as F

from sslbook.book.chapters.experiments import train
from sslbook.book.chapters.moco import toy
from sslbook.book.chapters.moco.experiments import make, steps_down, warmed_up
from sslbook.book.chapters.moco.variants import InBatch, Lag, PushedFirst, agreement, fresh_queue, leak, positives_found
from sslbook.data.datasets.shapes import Shapes
from sslbook.data.loader import Batch, Data
from sslbook.data.views import View
from sslbook.methods.moco import MoCo
from sslbook.schedules import Clock

VIEW = View(size=16)


@pytest.fixture(scope="module")
def run() -> list[Batch]:
    data = Data(shapes=Shapes(num_train=48, num_test=1))
    return [batch for epoch in range(2) for batch in data.batches((VIEW, VIEW), 16, seed=0, epoch=epoch)]


def small(**options) -> MoCo:
    return make(0, **{"view": VIEW, "queue_size": 32, "batch_norm_groups": 4} | options)


def test_pushed_first_has_the_positive_twice(run: list[Batch]) -> None:
    torch.manual_seed(0)
    right, wrong = small(), small(kind=PushedFirst)
    wrong.load_state_dict(right.state_dict())
    batch = run[0]
    loss = wrong(batch, Clock(0, 6))["loss"]
    q = F.normalize(right.projector(right.backbone(batch.views[0])), dim=1)
    k = F.normalize(right.keys(batch.views[1], batch, Clock(0, 6)), dim=1)
    scores = q @ torch.cat([k, right.queue.rows[16:]]).T / right.temperature  # what the queue holds after the push
    own = scores.diag()[:, None]
    torch.testing.assert_close(loss, (torch.cat([own, scores], 1).logsumexp(1) - own[:, 0]).mean())
    assert loss > math.log(2)


def test_in_batch_has_no_negatives_but_those_of_the_batch(run: list[Batch]) -> None:
    method = small(kind=InBatch)
    start = method.queue.rows.clone()
    losses = [method(run[0], Clock(0, 6))["loss"]]
    method.queue.rows.zero_()
    losses.append(method(run[0], Clock(0, 6))["loss"])
    torch.testing.assert_close(*losses)
    assert start.norm() > 0


def test_keys_encoded_again_agree_where_the_key_encoder_stood_still(run: list[Batch]) -> None:
    found = {}
    for momentum in (1.0, 0.0):
        method = small(momentum=momentum)

        def watch(step: int, method, momentum: float = momentum) -> None:
            if step == 4:
                found[momentum] = [same for same, _ in agreement(method, run, step)]
                again = fresh_queue(method, run, step)
                stored = torch.cat([method.queue.rows[method.queue.pointer - 16 :], method.queue.rows[:16]])
                assert again.shape == method.queue.rows.shape
                assert (torch.allclose(again[:16], stored[:16], atol=1e-5)) == (momentum == 1.0)

        train(method, run, 1e-2, watch=watch)
    assert min(found[1.0]) > 1 - 1e-5 > max(found[0.0])


def test_the_leak_is_measured_on_the_same_weights(run: list[Batch]) -> None:
    method = small()
    before = {name: value.clone() for name, value in method.named_parameters()}
    for _ in range(2):
        method(run[0], Clock(0, 6))
    found = leak(method, run, batches=2)
    assert found["loss, same groups"] != found["loss, shuffled"]
    assert method.shuffles
    assert all(torch.equal(before[name], value) for name, value in method.named_parameters())
    only = small(batch_norm_groups=1)  # one group: there is nothing to shuffle
    values = leak(only, run, batches=1).values()
    assert max(values) - min(values) < 1e-5
    assert positives_found(only, run, 1, only.queue.rows)["loss"] > 0


def test_the_lag_lies_below_its_bounds_which_straight_steps_reach() -> None:
    method = small(momentum=0.8)
    follow = Lag(0.8)
    for step in range(12):
        follow(step, method)
        with torch.no_grad():
            for p in method.parameters():
                p.add_(0.01 if p.requires_grad else 0.0)
        method.after_step(Clock(step + 1, 12))
    for row in follow.rows:
        assert row["lag"] == pytest.approx(row["bound"], rel=1e-3)
        assert row["bound"] == pytest.approx(row["largest step everywhere"], rel=1e-3)
        assert row["random walk"] <= row["lag"] * 1.001


def test_batch_norm_over_groups_is_torchs(run: list[Batch]) -> None:
    x = torch.randn(8, 3, 5)
    found = toy.group_norm_over_images(x, 2)
    expected = [F.batch_norm(part.flatten(0, 1), None, None, training=True).view_as(part) for part in x.chunk(2)]
    torch.testing.assert_close(found, torch.cat(expected))


@pytest.mark.slow
def test_the_toy_leaks_in_small_groups_and_not_shuffled() -> None:
    own, shuffled = (toy.train(2, shuffle, 150, seed=0) for shuffle in (False, True))
    assert own["loss"] < shuffled["loss"] - 0.2
    assert own["kNN"] < shuffled["kNN"] + 5


def test_schedules() -> None:
    assert [steps_down(p) for p in (0.0, 0.59, 0.6, 0.8)] == pytest.approx([1, 1, 0.1, 0.01])
    assert warmed_up(0.0) < 0.02 < 0.9 < warmed_up(0.1)
