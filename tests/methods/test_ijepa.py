import pytest
import torch
from torch import Tensor

from sslbook.data.masks import multi_block_mask
from sslbook.errors import UserError
from sslbook.methods.ijepa import IJEPA, prediction_loss
from sslbook.nn import ResNet, VisionTransformer, vit_huge
from sslbook.schedules import Clock
from tests.methods.cases import SIZE, TRANSFORMER, VIEW, Case, make, make_batch, transformer

CASE = Case(
    options={"view": VIEW, "num_targets": 2, "predictor_dim": 16, "predictor_depth": 1, "predictor_num_heads": 2},
    command={
        "method.backbone": TRANSFORMER,
        "method.num_targets": 2,
        "method.predictor_dim": 16,
        "method.predictor_depth": 1,
        "method.predictor_num_heads": 2,
    },
    # The loss of who predicts 0 is about 0.4; a teacher that has collapsed would say the same of all images.
    learned=lambda method, batch, out: bool(out["loss"] < 0.1 and out["target_deviation"] > 0.3),
    backbone=transformer,
    full_scale="vit_huge",
    overfit={"backbone": VisionTransformer(SIZE, 4, 32, 2, 4), "predictor_dim": 32, "predictor_num_heads": 4},
    overfit_lr=3e-3,
    corners=[(2, 0.05, {})],
)


@pytest.mark.parametrize("n", [1, 3])
def test_the_loss_is_smooth_l1(n: int) -> None:
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
            prediction = method.predictor(encoded, context[i][None], block[None], (4, 4))[0]
            for row, patch in zip(prediction, block.tolist()):
                t = whole[patch]
                t = (t - t.mean()) / (t.var(correction=0) + 1e-5).sqrt()
                error = (row - t).abs()
                losses.append(float(torch.where(error < 1, error**2 / 2, error - 0.5).mean().detach()))
    return sum(losses) / len(losses)


def test_forward_block_by_block() -> None:
    method, clock = make("ijepa"), Clock(step=3, steps_per_epoch=2, seed=1)
    batch = make_batch(method, 3)
    out = method(batch, clock)
    assert float(out["loss"].detach()) == pytest.approx(literal(method, batch.views[0], batch.index, clock), rel=1e-4)
    out["loss"].backward()
    assert all(p.grad is None for p in method.teacher.parameters())


def test_the_encoder_sees_the_context_only() -> None:
    method, clock = make("ijepa"), Clock()
    batch = make_batch(method, 2)
    context, _ = multi_block_mask(batch.index, (4, 4), clock, method.num_targets)
    features = method.features(batch.views[0])
    method.features = lambda images: features  # the same targets, whatever becomes of the images
    seen = torch.zeros(2, 16).scatter(1, context, 1.0).unflatten(1, (4, 4))
    seen = seen.repeat_interleave(4, dim=1).repeat_interleave(4, dim=2)[:, None] > 0
    blind = torch.where(seen, batch.views[0], 99.0)
    assert not seen.all()
    one, two = (method(batch._replace(views=(x,)), clock)["loss"] for x in (batch.views[0], blind))
    torch.testing.assert_close(one, two)


def test_without_positions_all_targets_get_one_answer() -> None:
    method = make("ijepa")
    with torch.no_grad():
        method.predictor.mask_token.normal_()
    encoded, context = torch.randn(2, 5, 16), torch.arange(5).expand(2, -1)
    target = torch.arange(8, 14).expand(2, -1)
    told = method.predictor(encoded, context, target, (4, 4))
    assert (told - told[:, :1]).abs().max() > 1e-2
    method.predictor.positions.zero_()
    untold = method.predictor(encoded, context, target, (4, 4))
    torch.testing.assert_close(untold, untold[:, :1].expand_as(untold), rtol=0, atol=1e-5)


def test_targets_are_normalized_and_of_the_whole_image() -> None:
    method = make("ijepa")
    h = method.features(torch.randn(3, 3, 16, 16))
    assert h.shape == (3, 16, 16)
    torch.testing.assert_close(h.mean(dim=-1), torch.zeros(3, 16), rtol=0, atol=1e-5)
    torch.testing.assert_close(h.var(dim=-1, correction=0), torch.ones(3, 16), rtol=1e-3, atol=1e-3)


def test_the_teacher_follows_in_a_straight_line() -> None:
    method = make("ijepa", momentum=0.5)
    start = method.teacher.module.cls_token.clone()
    with torch.no_grad():
        method.backbone.cls_token += 1
    method.after_step(Clock(10, 10))
    assert torch.equal(method.teacher.module.cls_token, start)
    method.after_step(Clock(5, 10))
    torch.testing.assert_close(method.teacher.module.cls_token, start + 0.25)


def loss_after_training(positions: bool) -> float:
    """Images whose patches are black or white by row: only who knows where a target is can say which it is."""
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


def test_the_predictor_must_know_where() -> None:
    assert loss_after_training(True) < 0.6 * loss_after_training(False)


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(UserError, match=r"cannot use a ResNet: choose .*VisionTransformer"):
        make("ijepa", backbone=ResNet(18, width=8))
    method = make("ijepa", num_targets=30, target_scale=(0.4, 0.5))
    with pytest.raises(UserError, match="leave no context in 4x4 patches: use fewer or smaller targets"):
        method(make_batch(method, 8), Clock())
    method = make("ijepa", backbone=VisionTransformer(SIZE, 4, 16, 1, 2, positions="relative"))
    with pytest.raises(UserError, match="use positions sincos or learned"):
        method(make_batch(method, 2), Clock())


def test_full_scale() -> None:
    with torch.device("meta"):
        method = IJEPA(vit_huge())
        dim, patches = 384, 16 * 16
    block = 12 * dim**2 + 13 * dim
    predictor = 1280 * dim + dim + dim + 12 * block + 2 * dim + dim * 1280 + 1280
    assert sum(p.numel() for p in method.predictor.parameters()) == predictor
    assert method.predictor.positions.shape == (patches, dim)
