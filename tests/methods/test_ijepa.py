import pytest
import torch
from torch import Tensor

from sslbook.data.masks import multi_block_mask
from sslbook.errors import UserError
from sslbook.methods.ijepa import IJEPA, prediction_loss
from sslbook.nn import ResNet, VisionTransformer, vit_huge
from sslbook.schedules import Clock
from tests.methods.cases import SIZE, TRANSFORMER, VIEW, Case, apart, make, make_batch, transformer

CASE = Case(
    options={"view": VIEW, "num_targets": 2, "predictor_dim": 16, "predictor_depth": 1, "predictor_num_heads": 2},
    command={
        "method.backbone": TRANSFORMER,
        "method.num_targets": 2,
        "method.predictor_dim": 16,
        "method.predictor_depth": 1,
        "method.predictor_num_heads": 2,
    },
    # Predicting 0 gives a loss of about 0.4; a collapsed teacher would give all images the same targets.
    learned=lambda method, batch, out: bool(out["loss"] < 0.1 and out["target_std"] > 0.3),
    backbone=transformer,
    full_scale="vit_huge",
    overfit={"backbone": VisionTransformer(SIZE, 4, 32, 2, 4), "predictor_dim": 32, "predictor_num_heads": 4},
    overfit_lr=3e-3,
    corners=[(2, 0.05, {})],
)


@pytest.mark.parametrize("n", [1, 3])
def test_loss_is_smooth_l1(n: int) -> None:
    prediction, target = 2 * torch.randn(2, n, 5, 4)
    expected = 0.0
    for a, b in zip(prediction.flatten().tolist(), target.flatten().tolist()):
        error = abs(a - b)
        expected += (0.5 * error**2 if error < 1 else error - 0.5) / (20 * n)
    assert float(prediction_loss(prediction, target)) == pytest.approx(expected, rel=1e-5)


def literal(method: IJEPA, images: Tensor, index: Tensor, clock: Clock) -> float:
    """Image by image and block by block, with the targets normalized by hand."""
    context, targets = multi_block_mask(index, (4, 4), clock, method.num_targets)
    losses = []
    teacher = method.teacher.module
    for i in range(len(images)):
        tokens = method.backbone.embed(images[i : i + 1])
        encoded = method.backbone.encode(tokens[:, context[i]])[:, 1:]
        whole = teacher.encode(teacher.embed(images[i : i + 1]))[0, 1:]
        for block in targets[i]:
            prediction = method.predictor(encoded, context[i][None], block[None])[0]
            for row, patch in zip(prediction, block.tolist()):
                t = whole[patch]
                t = (t - t.mean()) / (t.var(correction=0) + 1e-5).sqrt()
                error = (row - t).abs()
                losses.append(float(torch.where(error < 1, error**2 / 2, error - 0.5).mean().detach()))
    return sum(losses) / len(losses)


def test_forward_matches_literal_computation() -> None:
    method, clock = apart(make("ijepa")), Clock(step=3, steps_per_epoch=2, seed=1)
    batch = make_batch(method, 3)
    out = method(batch, clock)
    assert float(out["loss"].detach()) == pytest.approx(literal(method, batch.views[0], batch.index, clock), rel=1e-4)
    out["loss"].backward()
    assert all(p.grad is None for p in method.teacher.parameters())


def test_encoder_sees_only_the_context() -> None:
    method, clock = make("ijepa"), Clock()
    batch = make_batch(method, 2)
    context, _ = multi_block_mask(batch.index, (4, 4), clock, method.num_targets)
    targets = method.teacher_targets(batch.views[0])
    method.teacher_targets = lambda images: targets  # the same targets for both batches of images
    visible = torch.zeros(2, 16).scatter(1, context, 1.0).unflatten(1, (4, 4))
    visible = visible.repeat_interleave(4, dim=1).repeat_interleave(4, dim=2)[:, None] > 0
    other = torch.where(visible, batch.views[0], 99.0)
    assert not visible.all()
    one, two = (method(batch._replace(views=(x,)), clock)["loss"] for x in (batch.views[0], other))
    torch.testing.assert_close(one, two)


@pytest.mark.slow
def test_without_positions_all_targets_get_one_prediction() -> None:
    method = make("ijepa")
    with torch.no_grad():
        method.predictor.mask_token.normal_()
    encoded, context = torch.randn(2, 5, 16), torch.arange(5).expand(2, -1)
    target = torch.arange(8, 14).expand(2, -1)
    with_positions = method.predictor(encoded, context, target)
    assert (with_positions - with_positions[:, :1]).abs().max() > 1e-2
    method.predictor.positions.zero_()
    without = method.predictor(encoded, context, target)
    torch.testing.assert_close(without, without[:, :1].expand_as(without), rtol=0, atol=1e-5)


def test_targets_cover_the_whole_image_and_are_normalized() -> None:
    method = make("ijepa")
    with torch.no_grad():
        method.teacher.module.norm.weight.mul_(3.0)  # at first the teacher's own last norm would do
    h = method.teacher_targets(torch.randn(3, 3, 16, 16))
    assert h.shape == (3, 16, 16)
    torch.testing.assert_close(h.mean(dim=-1), torch.zeros(3, 16), rtol=0, atol=1e-5)
    torch.testing.assert_close(h.var(dim=-1, correction=0), torch.ones(3, 16), rtol=1e-3, atol=1e-3)


def test_momentum_rises_to_1_linearly() -> None:
    method = make("ijepa", momentum=0.5)
    start = method.teacher.module.cls_token.clone()
    with torch.no_grad():
        method.backbone.cls_token += 1
    method.after_step(Clock(10, 10))
    assert torch.equal(method.teacher.module.cls_token, start)
    method.after_step(Clock(5, 10))
    torch.testing.assert_close(method.teacher.module.cls_token, start + 0.25)


def loss_after_training(positions: bool) -> float:
    """Images with alternating black and white rows of patches: only a target's position says which it is."""
    method = make("ijepa", momentum=1.0, num_targets=2)
    if not positions:
        method.predictor.positions.zero_()
    stripes = torch.tensor([1.0, -1.0, 1.0, -1.0]).repeat_interleave(4)[None, None, :, None].expand(16, 3, 16, 16)
    optimizer = torch.optim.AdamW([p for p in method.parameters() if p.requires_grad], lr=1e-2)
    loss = torch.zeros(())
    for step in range(60):
        batch = make_batch(method, 16, seed=step)
        loss = method(batch._replace(views=(stripes,)), Clock(step, 60))["loss"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return float(loss.detach())


@pytest.mark.slow
def test_without_positions_it_learns_less() -> None:
    assert loss_after_training(True) < 0.6 * loss_after_training(False)


def test_rejects_invalid_options() -> None:
    with pytest.raises(UserError, match=r"cannot use a ResNet: choose .*VisionTransformer"):
        make("ijepa", backbone=ResNet(18, width=8))
    method = make("ijepa", num_targets=30, target_scale=(0.4, 0.5))
    with pytest.raises(UserError, match="leave no context in 4x4 patches: use fewer or smaller targets"):
        method(make_batch(method, 8), Clock())
    with pytest.raises(UserError, match="use positions sincos or learned"):
        make("ijepa", backbone=VisionTransformer(SIZE, 4, 16, 1, 2, positions="relative"))


def test_paper_scale() -> None:
    with torch.device("meta"):
        method = IJEPA(vit_huge())
        dim, patches = 384, 16 * 16
    block = 12 * dim**2 + 13 * dim
    predictor = 1280 * dim + dim + dim + 12 * block + 2 * dim + dim * 1280 + 1280
    assert sum(p.numel() for p in method.predictor.parameters()) == predictor
    assert method.predictor.positions.shape == (patches, dim)
