import math
from copy import deepcopy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from sslbook import distributed
from sslbook.data.views import View
from sslbook.errors import UserError
from sslbook.methods.ibot import IBOT, cls_loss, koleo, patch_loss
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
def test_the_loss_on_patches_is_equation_2(n: int, temperature: float) -> None:
    mask = torch.rand(n, 7) < 0.5
    mask[0] = n == 1  # a crop without hidden patches
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


@pytest.mark.parametrize(("n", "crops"), [(3, 4), (1, 2)])
def test_the_loss_on_cls_tokens_is_equation_3(n: int, crops: int) -> None:
    student = torch.rand(crops, n, 6, dtype=torch.float64)
    teacher = torch.randn(2, n, 6, dtype=torch.float64).softmax(dim=-1)
    losses = [
        -sum(t * p for t, p in zip(teacher[i, k].tolist(), log_softmax(student[j, k].tolist(), 0.01)))
        for i in range(2)
        for j in range(crops)
        for k in range(n)
        if i != j
    ]
    assert float(cls_loss(student, teacher, 0.01)) == pytest.approx(sum(losses) / len(losses), rel=1e-9)


def test_koleo_is_equation_2() -> None:
    x = torch.randn(5, 3, dtype=torch.float64)
    unit = F.normalize(x, dim=1).tolist()
    expected = 0.0
    for i in range(5):
        expected -= math.log(min(math.dist(unit[i], unit[j]) for j in range(5) if j != i)) / 5
    assert float(koleo(x)) == pytest.approx(expected, rel=1e-5)


def _koleo(x: Tensor) -> tuple[float, Tensor]:
    n = len(x) // distributed.world_size()
    own = x[distributed.rank() * n : (distributed.rank() + 1) * n].clone().requires_grad_()
    loss = koleo(own)
    loss.backward()
    assert own.grad is not None
    return float(distributed.mean(loss.detach())), own.grad / distributed.world_size()


def test_koleo_looks_at_the_whole_batch(pool) -> None:
    x = torch.tensor([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.9, 0.1, 0.0], [0.0, 0.7, 0.7]])  # neighbors lie apart
    loss, gradient = _koleo(x)
    answers = pool.run(_koleo, x)
    assert [answer[0] for answer in answers] == pytest.approx([loss, loss])
    torch.testing.assert_close(torch.cat([answer[1] for answer in answers]), gradient)


def test_how_much_is_hidden() -> None:
    method = make("ibot")
    index = torch.arange(2000)
    first, second = (method.hidden(index, (14, 14), Clock(seed=1), crop) for crop in (0, 1))
    count = first.sum(dim=1)
    assert float((count > 0).float().mean()) == pytest.approx(0.5, abs=0.04)
    assert count.max() <= 98
    some = count[count > 0].float()
    assert float(some.mean()) == pytest.approx(0.3 * 196, rel=0.05)
    assert not torch.equal(first, second)
    assert torch.equal(method.hidden(index[7:9], (14, 14), Clock(seed=1), 1), second[7:9])


def test_nothing_hidden_is_no_loss_on_patches() -> None:
    for options in ({"mask_probability": 0.0}, {"mask_ratio": (0.0, 0.0)}):
        method = make("ibot", **options)
        out = method(make_batch(method, 4), Clock())
        assert out["patch_loss"] == 0
        assert out["loss"] == out["cls_loss"] > 0


def test_the_student_does_not_see_what_is_hidden() -> None:
    method = make("ibot", num_local=0, cls_weight=0.0, mask_probability=1.0)
    batch, clock = make_batch(method, 3), Clock()
    taught = []
    teach = method.teach
    method.teach = lambda *inputs: taught.append(teach(*inputs)) or taught[0]  # the same answers twice
    loss = method(batch, clock)["loss"]
    changed = []
    for crop, view in enumerate(batch.views):
        mask = method.hidden(batch.index, (4, 4), clock, crop).unflatten(1, (4, 4))
        pixels = mask.repeat_interleave(4, dim=1).repeat_interleave(4, dim=2)[:, None]
        assert pixels.any()
        changed.append(torch.where(pixels, 99.0, view))
    torch.testing.assert_close(method(batch._replace(views=tuple(changed)), clock)["loss"], loss)


def test_the_patches_center_is_of_all_patches_of_the_teacher() -> None:
    method = make("ibot", center_momentum=0.9)
    batch = make_batch(method, 3)
    network = method.teacher_backbone.module
    tokens = network.encode(network.embed(torch.cat(batch.views[:2])))
    scores = method.teacher_heads.module["cls"](tokens)
    with torch.no_grad():
        method(batch, Clock())
    torch.testing.assert_close(method.patch_center, 0.1 * scores[:, 1:].mean(dim=(0, 1)))
    torch.testing.assert_close(method.center, 0.1 * scores[:, 0].mean(dim=0))


def test_heads_shared_or_not() -> None:
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


def test_sinkhorn_uses_all_outputs_alike() -> None:
    method = make("ibot", centering="sinkhorn")
    scores = torch.rand(48, 24) + torch.linspace(0, 1, 24)  # the last outputs would win
    q = method.targets(scores, method.center, 0.1)
    torch.testing.assert_close(q.sum(dim=1), torch.ones(48))
    torch.testing.assert_close(q.sum(dim=0), torch.full((24,), 2.0), rtol=0.1, atol=0.0)


def closest(koleo_weight: float) -> float:
    """The distance of a picture's feature to the nearest other one, after training."""
    method = make("ibot", koleo_weight=koleo_weight, mask_probability=0.0, num_local=0)
    optimizer = torch.optim.AdamW([p for p in method.parameters() if p.requires_grad], lr=1e-3)
    for _ in range(20):
        optimizer.zero_grad()
        method(make_batch(method, 8), Clock())["loss"].backward()
        optimizer.step()
    z = F.normalize(method.backbone(make_batch(method, 8).views[0]), dim=1)
    return float((torch.cdist(z, z) + 9 * torch.eye(8)).min(dim=1).values.mean().detach())


def test_koleo_spreads_the_features() -> None:
    assert closest(1.0) > 1.5 * closest(0.0)


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(UserError, match=r"cannot use a ResNet: choose .*VisionTransformer"):
        make("ibot", backbone=ResNet(18, width=8))
    with pytest.raises(UserError, match="nearest size that works is 8x8"):
        make("ibot", local=View(size=9))
    with pytest.raises(UserError, match="must be an increasing pair"):
        make("ibot", mask_ratio=(0.5, 1.0))
    method = make("ibot", backbone=VisionTransformer(SIZE, 4, 16, 1, 2, positions="relative"))
    with pytest.raises(UserError, match="use positions sincos or learned"):
        method(make_batch(method, 2), Clock())


def test_full_scale() -> None:
    with torch.device("meta"):
        method = IBOT(vit_small())
        method_v2 = IBOT(vit_small(), separate_heads=True)
    head = 384 * 2048 + 2048 + 2048 * 2048 + 2048 + 2048 * 256 + 256 + 8192 * 256
    trained = sum(p.numel() for p in method.parameters() if p.requires_grad)
    assert trained == sum(p.numel() for p in method.backbone.parameters()) + head + 384
    assert sum(p.numel() for p in method_v2.parameters() if p.requires_grad) == trained + head
