import math
from copy import deepcopy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from sslbook import distributed
from sslbook.data import masks
from sslbook.data.views import View
from sslbook.errors import UserError
from sslbook.methods.dino import dino_loss
from sslbook.methods.ibot import IBOT, koleo, patch_loss
from sslbook.nn import ResNet, VisionTransformer, vit_small
from sslbook.schedules import Clock
from tests.methods.cases import SIZE, TRANSFORMER, VIEW, Case, make, make_batch, transformer

CASE = Case(
    options={
        "global_1": VIEW,
        "global_2": VIEW,
        "local": View(size=8),
        "num_local": 2,
        "hidden_dim": 32,
        "bottleneck_dim": 16,
        "num_outputs": 24,
        "freeze_last_layer": 0,  # so that every parameter gets a gradient in the first epoch too
    },
    command={
        "method.backbone": TRANSFORMER,
        "method.local.size": 8,
        "method.num_local": 1,
        "method.hidden_dim": 16,
        "method.bottleneck_dim": 8,
        "method.num_outputs": 16,
    },
    learned=lambda method, batch, out: bool(out["cls_loss"] < 0.5 and out["patch_loss"] < 0.5),
    backbone=transformer,
    full_scale="vit_small",
    overfit={"momentum": 0.9, "teacher_temperature": 0.04},
    overfit_lr=3e-3,
    corners=[
        (2, 0.05, {"mask_probability": 1.0}),
        (8, 0.05, {"separate_heads": True, "centering": "sinkhorn", "koleo_weight": 0.1, "mask_probability": 1.0}),
    ],
)


def log_softmax(scores: list[float], temperature: float) -> list[float]:
    greatest = max(scores)
    total = math.log(sum(math.exp((x - greatest) / temperature) for x in scores))
    return [(x - greatest) / temperature - total for x in scores]


@pytest.mark.parametrize(("n", "temperature"), [(3, 0.1), (1, 0.01), (5, 0.04)])
def test_patch_loss_equals_equation_2(n: int, temperature: float) -> None:
    mask = torch.rand(n, 7) < 0.5
    mask[0] = n == 1  # a crop without masked patches
    student = torch.rand(n, 7, 5, dtype=torch.float64)
    teacher = torch.randn(n, 7, 5, dtype=torch.float64).softmax(dim=-1)
    expected = 0.0
    for i in range(n):
        losses = []
        for j in range(7):
            if mask[i, j]:
                log_p = log_softmax(student[i, j].tolist(), temperature)
                losses.append(-sum(t * p for t, p in zip(teacher[i, j].tolist(), log_p)))
        expected += sum(losses) / len(losses) / n if losses else 0.0
    assert float(patch_loss(student[mask], teacher[mask], mask, temperature)) == pytest.approx(expected, rel=1e-6)


def test_koleo_equals_equation_2() -> None:
    x = torch.randn(5, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    unit = F.normalize(x, dim=1).tolist()
    expected = 0.0
    for i in range(5):
        expected -= math.log(min(math.dist(unit[i], unit[j]) for j in range(5) if j != i)) / 5
    assert float(koleo(x)) == pytest.approx(expected, abs=1e-5)


def test_koleo_of_equal_images_is_finite() -> None:
    x = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))[[0, 1, 2, 2]].requires_grad_()
    loss = koleo(x)
    loss.backward()
    # Two of the distances are epsilon alone: 1e-8 in every coordinate and once more in the logarithm.
    z = F.normalize(x.detach(), dim=1)
    apart = [float((z[i] - torch.cat([z[:i], z[i + 1 :]])).norm(dim=1).min()) for i in (0, 1)]
    expected = -(sum(math.log(d) for d in apart) + 2 * math.log(3e-8)) / 4
    assert float(loss.detach()) == pytest.approx(expected, rel=1e-3)
    assert x.grad is not None
    assert x.grad.isfinite().all()


def _koleo(x: Tensor) -> tuple[float, Tensor]:
    n = len(x) // distributed.world_size()
    own = x[distributed.rank() * n : (distributed.rank() + 1) * n].clone().requires_grad_()
    loss = koleo(own)
    loss.backward()
    assert own.grad is not None
    return float(distributed.all_reduce_mean(loss.detach())), own.grad / distributed.world_size()


@pytest.mark.slow
def test_koleo_is_of_the_global_batch(pool) -> None:
    x = torch.tensor([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.9, 0.1, 0.0], [0.0, 0.7, 0.7]])  # neighbors lie apart
    loss, gradient = _koleo(x)
    both = pool.run(_koleo, x)
    assert [one[0] for one in both] == pytest.approx([loss, loss])
    torch.testing.assert_close(torch.cat([one[1] for one in both]), gradient)


def test_mask_ratio_and_probability() -> None:
    method = make("ibot")
    index = torch.arange(2000)
    first, second = (method.sample_masks(index, (14, 14), Clock(seed=1), crop) for crop in (0, 1))
    count = first.sum(dim=1)
    assert float((count > 0).float().mean()) == pytest.approx(0.5, abs=0.04)
    assert count.max() <= 98
    some = count[count > 0].float()
    assert float(some.mean()) == pytest.approx(0.3 * 196, rel=0.05)
    assert not torch.equal(first, second)
    assert torch.equal(method.sample_masks(index[7:9], (14, 14), Clock(seed=1), 1), second[7:9])


def test_min_block(monkeypatch) -> None:
    asked, real = [], masks.block_mask
    monkeypatch.setattr(masks, "block_mask", lambda *a, min_block, **k: asked.append(min_block) or real(*a, **k))
    for min_block in (None, 4):
        make("ibot", min_block=min_block).sample_masks(torch.arange(2), (14, 14), Clock(), 0)
    assert asked == [16, 4]


def test_no_masked_patches_give_no_patch_loss() -> None:
    for options in ({"mask_probability": 0.0}, {"mask_ratio": (0.0, 0.0)}):
        method = make("ibot", **options)
        out = method(make_batch(method, 4), Clock())
        assert out["patch_loss"] == 0
        assert out["loss"] == out["cls_loss"] > 0


def test_student_does_not_see_masked_patches() -> None:
    method = make("ibot", num_local=0, cls_weight=0.0, mask_probability=1.0)
    batch, clock = make_batch(method, 3), Clock()
    found, teacher_targets = [], method.teacher_targets
    method.teacher_targets = lambda *inputs: found.append(teacher_targets(*inputs)) or found[0]  # the same both times
    loss = method(batch, clock)["loss"]
    changed = []
    for crop, view in enumerate(batch.views):
        mask = method.sample_masks(batch.index, (4, 4), clock, crop).unflatten(1, (4, 4))
        pixels = mask.repeat_interleave(4, dim=1).repeat_interleave(4, dim=2)[:, None]
        assert pixels.any()
        changed.append(torch.where(pixels, 99.0, view))
    torch.testing.assert_close(method(batch._replace(views=tuple(changed)), clock)["loss"], loss)


@pytest.mark.parametrize("separate_heads", [False, True])
def test_forward_centers_by_the_batches_before(separate_heads: bool) -> None:
    weights = {"cls_weight": 0.5, "patch_weight": 2.0, "koleo_weight": 0.3}
    method = make("ibot", **weights, mask_probability=1.0, separate_heads=separate_heads)
    method.center += torch.linspace(-0.1, 0.1, 24)
    method.patch_center += torch.linspace(0.2, -0.1, 24)
    with torch.no_grad():  # a teacher that differs from its student
        for p in (*method.teacher_backbone.parameters(), *method.teacher_heads.parameters()):
            p += 0.1 * torch.randn(p.shape)
    batch, clock = make_batch(method, 5), Clock(0, 10)
    large, small, net = torch.cat(batch.views[:2]), torch.cat(batch.views[2:]), method.backbone
    mask = torch.cat([method.sample_masks(batch.index, (4, 4), clock, crop) for crop in (0, 1)])
    assert mask.any()
    teacher_net, teacher_heads = method.teacher_backbone.module, method.teacher_heads.module
    tokens, head = teacher_net.encode(teacher_net.embed(large)), "patch" if separate_heads else "cls"
    scores, patch_scores = teacher_heads["cls"](tokens[:, 0]), teacher_heads[head](tokens[:, 1:][mask])
    teacher = ((scores - method.center) / 0.04).softmax(dim=1).unflatten(0, (2, 5))
    patch_teacher = ((patch_scores - method.patch_center) / 0.04).softmax(dim=1)
    tokens, local = net.encode(net.embed(large, mask, method.mask_token)), net.encode(net.embed(small))
    student = method.heads["cls"](torch.cat([tokens[:, 0], local[:, 0]])).unflatten(0, (4, 5))
    expected = 0.5 * dino_loss(student, teacher, 0.1)
    expected = expected + 2.0 * patch_loss(method.heads[head](tokens[:, 1:][mask]), patch_teacher, mask, 0.1)
    expected = expected + 0.3 * (koleo(tokens[:5, 0]) + koleo(tokens[5:, 0]))  # for each crop by itself
    torch.testing.assert_close(method(batch, clock)["loss"], expected)


def test_accumulated_batch_moves_the_centers_once() -> None:
    method = make("ibot", mask_probability=1.0)
    method.center += torch.linspace(-0.1, 0.1, 24)
    method.patch_center += torch.linspace(0.2, -0.1, 24)
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
        assert not m.score_sums.any()
    torch.testing.assert_close(other.center, method.center)
    torch.testing.assert_close(other.patch_center, method.patch_center)
    before = method.center.clone()
    method.eval()(batch, clock)
    method.after_step(clock)
    assert torch.equal(method.center, before)  # evaluation leaves no trace


def test_teacher_temperature_and_momentum_follow_the_clock() -> None:
    method = make("ibot", teacher_temperature_warmup=30, momentum=0.5, separate_heads=True)
    batch, asked, distributions = make_batch(method, 2), [], method.distributions
    method.distributions = lambda scores, center, temperature: (
        asked.append(temperature) or distributions(scores, center, temperature)
    )
    for step in (0, 150, 300, 999):
        method(batch, Clock(step, 1000, steps_per_epoch=10))
    assert asked == pytest.approx([0.04, 0.04, 0.055, 0.055, 0.07, 0.07, 0.07, 0.07])
    pairs = [(method.teacher_backbone.module.cls_token, method.backbone.cls_token)]
    pairs += [(method.teacher_heads.module[name].prototypes, method.heads[name].prototypes) for name in method.heads]
    starts = [teacher.clone() for teacher, _ in pairs]
    with torch.no_grad():
        for _, student in pairs:
            student += 1
    method.after_step(Clock(10, 10))
    assert all(
        torch.equal(teacher, start) for (teacher, _), start in zip(pairs, starts)
    )  # the EMA momentum is 1 at the end
    method.after_step(Clock(0, 10))
    for (teacher, _), start in zip(pairs, starts):
        torch.testing.assert_close(teacher, start + 0.5)


def test_frozen_last_layers_get_no_gradient() -> None:
    method = make("ibot", freeze_last_layer=1, separate_heads=True, mask_probability=1.0)
    for step, moves in ((0, False), (4, False), (5, True)):
        clock = Clock(step, 10, steps_per_epoch=5)
        method.zero_grad()
        method(make_batch(method, 4), clock)["loss"].backward()
        method.before_optimizer_step(clock)
        for head in method.heads.values():
            assert (head.prototypes.grad is not None) == moves
            assert all(p.grad.abs().max() > 0 for p in head.mlp.parameters())


def test_patch_center_averages_all_patches_of_the_teacher() -> None:
    method = make("ibot", center_momentum=0.9)
    batch = make_batch(method, 3)
    network = method.teacher_backbone.module
    tokens = network.encode(network.embed(torch.cat(batch.views[:2])))
    scores = method.teacher_heads.module["cls"](tokens)
    with torch.no_grad():
        method(batch, Clock())
    method.after_step(Clock(0, 10))
    torch.testing.assert_close(method.patch_center, 0.1 * scores[:, 1:].mean(dim=(0, 1)))
    torch.testing.assert_close(method.center, 0.1 * scores[:, 0].mean(dim=0))


def test_separate_heads() -> None:
    assert list(make("ibot").heads) == ["cls"]
    method = make("ibot", separate_heads=True, mask_probability=1.0)
    method(make_batch(method, 4), Clock())["patch_loss"]
    other = deepcopy(method)
    with torch.no_grad():
        other.heads["patch"].prototypes.neg_()
    batch = make_batch(method, 4)
    one, two = method(batch, Clock()), other(batch, Clock())
    assert one["cls_loss"] == two["cls_loss"]
    assert one["patch_loss"] != two["patch_loss"]


def test_sinkhorn_balances_the_outputs() -> None:
    method = make("ibot", centering="sinkhorn")
    scores = torch.rand(48, 24) + torch.linspace(0, 1, 24)  # the last outputs would win
    q = method.distributions(scores, method.center, 0.1)
    torch.testing.assert_close(q.sum(dim=1), torch.ones(48))
    torch.testing.assert_close(q.sum(dim=0), torch.full((24,), 2.0), rtol=0.1, atol=0.0)


def entropies(**options: float) -> list[tuple[float, float]]:
    """Of one teacher distribution and of their mean, of 0 to log 24 = 3.18: for cls tokens and for masked patches.

    After training on images of one color and noise each.
    """
    method = make("ibot", momentum=0.9, mask_probability=1.0, num_local=0, **options)
    found, distributions = [], method.distributions
    method.distributions = lambda *inputs: found.append(distributions(*inputs)) or found[-1]
    optimizer = torch.optim.AdamW([p for p in method.parameters() if p.requires_grad], lr=1e-3)
    generator = torch.Generator().manual_seed(0)
    colors = torch.randn(16, 3, 1, 1, generator=generator)
    for step in range(30):
        views = tuple(colors + 0.3 * torch.randn(16, 3, SIZE, SIZE, generator=generator) for _ in range(2))
        optimizer.zero_grad()
        method(make_batch(method, 16, seed=step)._replace(views=views), Clock(step, 1000))["loss"].backward()
        optimizer.step()
        method.after_step(Clock(0, 1000))
    entropy = torch.special.entr
    return [(float(entropy(q).sum(dim=1).mean()), float(entropy(q.mean(dim=0)).sum())) for q in found[-2:]]


@pytest.mark.slow
def test_without_centering_or_sharpening_it_collapses() -> None:
    """One output wins without centering, the distribution is uniform without sharpening."""
    sharp = {"teacher_temperature_start": 0.04, "teacher_temperature": 0.04}
    for one, average in entropies(**sharp):
        assert average > 1.0
        assert average - one > 0.3  # mutual information of output and image, in nats
    for _, average in entropies(**sharp, center_momentum=1.0):
        assert average < 0.8
    flat = {"teacher_temperature_start": 0.3, "teacher_temperature": 0.3}  # softer than the student's 0.1
    for one, average in entropies(**flat):
        assert one > 3.0  # of ln 24 = 3.18
        assert average - one < 0.05


def nearest_distance(koleo_weight: float) -> float:
    """The distance of an image's feature to the nearest other one, after training."""
    method = make("ibot", koleo_weight=koleo_weight, mask_probability=0.0, num_local=0)
    optimizer = torch.optim.AdamW([p for p in method.parameters() if p.requires_grad], lr=1e-3)
    for _ in range(20):
        optimizer.zero_grad()
        method(make_batch(method, 8), Clock())["loss"].backward()
        optimizer.step()
    z = F.normalize(method.backbone(make_batch(method, 8).views[0]), dim=1)
    return float((torch.cdist(z, z) + 9 * torch.eye(8)).min(dim=1).values.mean().detach())


def test_koleo_increases_the_distance_between_features() -> None:
    assert nearest_distance(1.0) > 1.5 * nearest_distance(0.0)


def test_rejects_invalid_options() -> None:
    with pytest.raises(UserError, match=r"cannot use a ResNet: choose .*VisionTransformer"):
        make("ibot", backbone=ResNet(18, width=8))
    with pytest.raises(UserError, match="nearest size that works is 8x8"):
        make("ibot", local=View(size=9))
    method = make("ibot", backbone=VisionTransformer(SIZE, 4, 16, 1, 2, positions="relative"))
    with pytest.raises(UserError, match="use positions sincos or learned"):
        method(make_batch(method, 2), Clock())


def test_default_sizes() -> None:
    with torch.device("meta"):
        method = IBOT(vit_small())
        method_v2 = IBOT(vit_small(), separate_heads=True)
    head = 384 * 2048 + 2048 + 2048 * 2048 + 2048 + 2048 * 256 + 256 + 8192 * 256
    trained = sum(p.numel() for p in method.parameters() if p.requires_grad)
    assert trained == sum(p.numel() for p in method.backbone.parameters()) + head + 384
    assert sum(p.numel() for p in method_v2.parameters() if p.requires_grad) == trained + head
