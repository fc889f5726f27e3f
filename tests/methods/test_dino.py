import math
from copy import deepcopy
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from torch import Tensor

from sslbook.data.loader import Data
from sslbook.data.views import View
from sslbook.engine.loop import pretrain
from sslbook.errors import UserError
from sslbook.methods.dino import DINO, dino_loss, entropy, teacher_distribution
from sslbook.nn import VisionTransformer
from sslbook.schedules import Clock
from tests.methods.cases import CONVNET, SIZE, TINY_SHAPES, VIEW, Case, apart, make, make_batch, transformer

SMALL = View(size=8)
CASE = Case(
    options={
        "global_1": VIEW,
        "global_2": VIEW,
        "local": SMALL,
        "num_local": 2,
        "hidden_dim": 32,
        "bottleneck_dim": 16,
        "num_outputs": 24,
        "freeze_last_layer": 0,  # so that every parameter gets a gradient in the first epoch too
    },
    command={
        "method.backbone": CONVNET,
        "method.local.size": 8,
        "method.num_local": 1,
        "method.hidden_dim": 16,
        "method.bottleneck_dim": 8,
        "method.num_outputs": 16,
    },
    # All crops of an image agree on an output, and there is one for every few images.
    learned=lambda method, batch, out: bool(out["loss"] < 1.0 and out["marginal_entropy"] > 2.0),
    overfit={"momentum": 0.9, "num_outputs": 64, "teacher_temperature": 0.04, "head_batch_norm": True},
    overfit_lr=3e-3,
    corners=[(2, 0.05, {}), (8, 0.05, {"num_local": 0})],
    other_backbones=[transformer],
)


def softmax(scores: list[float], temperature: float) -> list[float]:
    greatest = max(scores)
    powers = [math.exp((x - greatest) / temperature) for x in scores]
    return [x / sum(powers) for x in powers]


@pytest.mark.parametrize(("n", "crops", "temperature"), [(3, 4, 0.1), (1, 2, 0.01), (5, 3, 0.04)])
def test_loss_equals_algorithm_1(n: int, crops: int, temperature: float) -> None:
    student = torch.rand(crops, n, 6, dtype=torch.float64) * 2 - 1
    scores = torch.rand(2, n, 6, dtype=torch.float64) * 2 - 1
    center = 0.1 * torch.randn(6, dtype=torch.float64)
    expected, terms = 0.0, 0
    for i in range(2):
        for j in range(crops):
            if i == j:
                continue
            for k in range(n):
                target = softmax((scores[i, k] - center).tolist(), temperature / 2)
                p = softmax(student[j, k].tolist(), temperature)
                expected -= sum(t * math.log(max(x, 1e-300)) for t, x in zip(target, p) if t > 1e-290)
                terms += 1
    teacher = teacher_distribution(scores, center, temperature / 2)
    assert float(dino_loss(student, teacher, temperature)) == pytest.approx(expected / terms, rel=1e-9)


def test_entropy_of_one_hot_and_uniform() -> None:
    assert entropy(torch.tensor([0.0, 1.0, 0.0])) == 0
    assert float(entropy(torch.full((8,), 1 / 8))) == pytest.approx(math.log(8))


def test_forward_centers_by_the_batches_before() -> None:
    method = apart(make("dino", center_momentum=0.9))
    method.center += torch.linspace(-0.1, 0.1, 24)
    before = method.center.clone()
    batch, clock = make_batch(method, 5), Clock(0, 10)
    scores = [method.teacher_head(method.teacher_backbone(torch.cat(batch.views[:2]))).chunk(2)][0]
    large = method.head(method.backbone(torch.cat(batch.views[:2]))).chunk(2)
    small = method.head(method.backbone(torch.cat(batch.views[2:]))).chunk(2)
    teacher = teacher_distribution(torch.stack(scores), before, 0.04)
    expected = dino_loss(torch.stack([*large, *small]), teacher, 0.1)
    torch.testing.assert_close(method(batch, clock)["loss"], expected)
    assert torch.equal(method.center, before)
    method.after_step(clock)
    torch.testing.assert_close(method.center, 0.9 * before + 0.1 * torch.cat(scores).mean(dim=0))


def test_accumulated_batch_moves_the_center_once() -> None:
    method = make("dino", backbone=transformer())  # without batch norm, whose statistics would differ between the parts
    method.center += torch.linspace(-0.1, 0.1, 24)
    other, batch, clock = deepcopy(method), make_batch(method, 6), Clock(0, 10)
    one, two = (
        batch._replace(views=tuple(view[part] for view in batch.views), index=batch.index[part])
        for part in (slice(3), slice(3, 6))
    )
    whole = float(method(batch, clock)["loss"].detach())
    halves = [float(other(part, clock)["loss"].detach()) for part in (one, two)]
    assert sum(halves) / 2 == pytest.approx(whole, rel=1e-5)  # the first half does not center the second
    for m in (method, other):
        m.after_step(clock)
        assert m.num_parts == 0
        assert not m.score_sum.any()
    torch.testing.assert_close(other.center, method.center)
    before = method.center.clone()
    method.eval()(batch, clock)
    method.after_step(clock)
    assert torch.equal(method.center, before)  # evaluation leaves no trace


def test_teacher_temperature_and_momentum_follow_the_clock() -> None:
    method = make("dino", teacher_temperature_warmup=30, momentum=0.5)
    values = [method.current_teacher_temperature(Clock(step, 1000, steps_per_epoch=10)) for step in (0, 150, 300, 999)]
    assert values == pytest.approx([0.04, 0.055, 0.07, 0.07])
    start = method.teacher_head.module.prototypes.clone()
    with torch.no_grad():
        method.head.prototypes += 1
    method.after_step(Clock(10, 10))
    assert torch.equal(method.teacher_head.module.prototypes, start)  # the EMA momentum is 1 at the end
    method.after_step(Clock(0, 10))
    torch.testing.assert_close(method.teacher_head.module.prototypes, start + 0.5)


def test_frozen_last_layer_has_no_adam_state_and_thaws_with_a_fresh_step() -> None:
    """With a gradient of zero instead of none, the first step after ten frozen ones would be 0.48 times as large."""
    method = make("dino", freeze_last_layer=2)
    prototypes = method.head.prototypes
    optimizer = torch.optim.AdamW([p for p in method.parameters() if p.requires_grad], lr=1e-3, weight_decay=0.1)
    for step in range(11):
        clock, before = Clock(step, 20, steps_per_epoch=5), prototypes.detach().clone()
        method(make_batch(method, 4, seed=step), clock)["loss"].backward()
        assert prototypes.grad.abs().max() > 0
        assert all(p.grad.abs().max() > 0 for p in method.head.mlp.parameters())
        method.before_optimizer_step(clock)
        optimizer.step()
        if step < 10:
            assert torch.equal(prototypes, before)  # neither moved nor decayed
            assert prototypes not in optimizer.state
        optimizer.zero_grad()
    assert int(optimizer.state[prototypes]["step"]) == 1
    moved = prototypes.detach() - before * (1 - 1e-3 * 0.1)
    assert float(moved.abs().median()) == pytest.approx(1e-3, rel=0.01)  # the size of a first step is the rate


def test_engine_removes_the_frozen_gradient_before_clipping(tmp_path: Path) -> None:
    """The norm that is clipped is that of the trained parameters alone."""
    for freeze in (1, 0):
        method, counted = make("dino", freeze_last_layer=freeze), []
        prototypes, real = method.head.prototypes, torch.nn.utils.clip_grad_norm_
        before = prototypes.detach().clone()

        def clip(*args, prototypes=prototypes, counted=counted, real=real) -> Tensor:
            counted.append(prototypes.grad is not None)
            return real(*args)

        options = {"batch_size": 32, "epochs": 1, "clip_grad_norm": 3.0, "progress": False, "device": "cpu"}
        with patch.object(torch.nn.utils, "clip_grad_norm_", clip):
            pretrain(
                method, Data(shapes=TINY_SHAPES), torch.optim.AdamW, out_dir=str(tmp_path / str(freeze)), **options
            )
        assert counted == [not freeze] * 2
        assert torch.equal(prototypes, before) == bool(freeze)


def entropies(**options: object) -> tuple[float, float]:
    """Of one teacher distribution and of their mean, after training; 0 to log 24 = 3.18."""
    method = make("dino", momentum=0.9, head_batch_norm=True, **options)
    optimizer = torch.optim.AdamW([p for p in method.parameters() if p.requires_grad], lr=3e-3)
    out: dict[str, Tensor] = {}
    for step in range(100):
        out = method(make_batch(method, 32, seed=step % 4), Clock(step, 1000))
        optimizer.zero_grad()
        out["loss"].backward()
        optimizer.step()
        method.after_step(Clock(0, 1000))
    return float(out["teacher_entropy"]), float(out["marginal_entropy"])


@pytest.mark.slow
def test_without_centering_or_sharpening_it_collapses() -> None:
    """Figure 7: one output wins without centering, the distribution is uniform without sharpening."""
    sharp = {"teacher_temperature_start": 0.04, "teacher_temperature": 0.04}
    one, average = entropies(**sharp)
    assert average > 1.4
    assert one < 1.4
    assert average - one > 0.6  # mutual information of output and image, in nats
    _, average = entropies(**sharp, center_momentum=1.0)
    assert average < 1.0
    one, _ = entropies(teacher_temperature_start=0.1, teacher_temperature=0.1)  # the student's
    assert one > 2.6


def test_rejects_invalid_options() -> None:
    with pytest.raises(UserError, match="nearest size that works is 8x8"):
        make("dino", backbone=transformer(), local=View(size=9))
    method = make("dino", backbone=VisionTransformer(SIZE, 4, 16, 1, 2, positions="relative"))
    with pytest.raises(UserError, match="use positions sincos or learned"):
        method(make_batch(method, 2), Clock())


def test_default_sizes() -> None:
    with torch.device("meta"):
        method = DINO(VisionTransformer(224, 16, 384, 12, 6))
    assert [view.size for view in method.views()] == [224] * 2 + [96] * 8
    assert method.center.shape == (65536,)
