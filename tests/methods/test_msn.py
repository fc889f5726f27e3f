import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from sslbook import distributed
from sslbook.data.views import View
from sslbook.errors import UserError
from sslbook.methods.msn import MSN, assignment_loss, mean_entropy_loss, sharpen
from sslbook.nn import ResNet, VisionTransformer, vit_small
from sslbook.nn.sinkhorn import sinkhorn
from sslbook.schedules import Clock
from tests.methods.cases import SIZE, TRANSFORMER, VIEW, Case, apart, make, make_batch, transformer

CASE = Case(
    options={
        "large": VIEW,
        "focal": View(size=8),
        "num_focal": 2,
        "patch_drop": 0.25,
        "hidden_dim": 32,
        "output_dim": 16,
        "num_prototypes": 12,
    },
    command={
        "method.backbone": TRANSFORMER,
        "method.focal.size": 8,
        "method.num_focal": 1,
        "method.hidden_dim": 16,
        "method.output_dim": 8,
        "method.num_prototypes": 8,
    },
    learned=lambda method, batch, out: bool(out["assignment"] < 0.5 and out["marginal_entropy"] > 2.0),
    # Cls tokens hardly differ between images at first, and batch norm magnifies their rounding.
    backbone=lambda: VisionTransformer(SIZE, 4, 16, 2, 2, pool="mean"),
    full_scale="vit_small",
    overfit={"momentum": 0.9, "num_prototypes": 16},
    overfit_lr=3e-3,
    lr=1e-3,  # ... as sharpened targets do
    corners=[(4, 1e-3, {"sinkhorn_targets": False, "temperature": 1.0}), (8, 1e-3, {"num_large": 2, "num_focal": 0})],
    other_backbones=[transformer],
)


@pytest.mark.parametrize(("n", "anchors", "scale"), [(3, 2, 1.0), (1, 1, 1.0), (5, 3, 100.0)])
def test_loss_equals_equation_1(n: int, anchors: int, scale: float) -> None:
    log_p = (scale * torch.rand(anchors, n, 4, dtype=torch.float64)).log_softmax(dim=-1)
    target = torch.randn(n, 4, dtype=torch.float64).softmax(dim=-1)
    cross_entropy, mean = 0.0, [0.0] * 4
    for a in range(anchors):
        for i in range(n):
            for k in range(4):
                cross_entropy -= float(target[i, k] * log_p[a, i, k]) / (anchors * n)
                mean[k] += math.exp(float(log_p[a, i, k])) / (anchors * n)
    entropy = -sum(p * math.log(p) for p in mean)
    assert float(assignment_loss(log_p, target)) == pytest.approx(cross_entropy, rel=1e-9)
    assert float(mean_entropy_loss(log_p)) == pytest.approx(math.log(4) - entropy, rel=1e-9, abs=1e-12)


def test_mean_entropy_loss_is_zero_for_equally_frequent_prototypes() -> None:
    log_p = (1000 * torch.eye(6)).log_softmax(dim=1)[None]
    assert float(mean_entropy_loss(log_p)) == pytest.approx(0.0, abs=1e-6)
    assert float(mean_entropy_loss(log_p[:, :1])) == pytest.approx(math.log(6), rel=1e-6)


def _mean_entropy(x: Tensor) -> tuple[float, Tensor]:
    n = len(x) // distributed.world_size()
    own = x[distributed.rank() * n : (distributed.rank() + 1) * n].clone().requires_grad_()
    loss = mean_entropy_loss(own.log_softmax(dim=1)[None])
    loss.backward()
    assert own.grad is not None
    return float(loss.detach()), own.grad / distributed.world_size()


def test_mean_is_over_all_processes(pool) -> None:
    x = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
    loss, gradient = _mean_entropy(x)
    both = pool.run(_mean_entropy, x)
    assert [one[0] for one in both] == pytest.approx([loss, loss])
    torch.testing.assert_close(torch.cat([one[1] for one in both]), gradient)


def test_sharpening_is_a_power() -> None:
    p = torch.tensor([[0.5, 0.3, 0.2]])
    expected = p**4 / (p**4).sum()
    torch.testing.assert_close(sharpen(p.log(), 0.25).exp(), expected)
    torch.testing.assert_close(sharpen(p.log(), 1.0).exp(), p)


def test_targets_are_sharpened_then_balanced() -> None:
    method = make("msn")
    x = make_batch(method, 6).views[0]
    z = F.normalize(method.teacher_head(method.teacher_backbone(x)), dim=1)
    p = (z @ F.normalize(method.prototypes, dim=1).T / 0.1).softmax(dim=1)
    torch.testing.assert_close(method.teacher_targets(x), sinkhorn(sharpen(p.log(), 0.25), 1.0), rtol=1e-4, atol=1e-6)
    assert not method.teacher_targets(x).requires_grad
    method.sinkhorn_targets = False
    torch.testing.assert_close(method.teacher_targets(x), sharpen(p.log(), 0.25).exp().detach(), rtol=1e-4, atol=1e-6)


def test_forward_equals_its_parts() -> None:
    method, clock = apart(make("msn")), Clock()
    batch = make_batch(method, 5)
    whole, large, *focal = batch.views
    kept = method.drop_patches(method.backbone.embed(large), batch.index, clock, 0)
    assert kept.shape[1] == 12
    small = torch.cat([method.backbone(x) for x in focal])
    # The head is called once for every size, so that its batch norm does not mix them.
    z = [method.head(method.backbone.encode(kept)[:, 1:].mean(dim=1)), method.head(small)]
    log_p = method.log_assignments(torch.cat(z)).unflatten(0, (3, 5))
    expected = assignment_loss(log_p, method.teacher_targets(whole)) + mean_entropy_loss(log_p)
    torch.testing.assert_close(method(batch, clock)["loss"], expected)


def test_dropped_patches_differ_between_images_and_epochs() -> None:
    method = make("msn", patch_drop=0.5)
    tokens = torch.arange(16.0)[None, :, None].expand(300, -1, 2)
    index = torch.arange(300)
    kept = method.drop_patches(tokens, index, Clock(), 0)[:, :, 0].long()
    assert kept.shape == (300, 8)
    assert all(len(set(row)) == 8 for row in kept.tolist())
    fraction = kept.flatten().bincount(minlength=16) / 300
    torch.testing.assert_close(fraction, torch.full((16,), 0.5), rtol=0, atol=0.12)
    assert torch.equal(method.drop_patches(tokens[:1], index[7:8], Clock(), 0)[0, :, 0].long(), kept[7])
    assert not torch.equal(method.drop_patches(tokens, index, Clock(step=1), 0)[:, :, 0].long(), kept)
    assert not torch.equal(method.drop_patches(tokens, index, Clock(), 1)[:, :, 0].long(), kept)


def test_momentum_rises_linearly() -> None:
    method = make("msn", momentum=0.5)
    start = method.teacher_backbone.module.cls_token.clone()
    with torch.no_grad():
        method.backbone.cls_token += 1
    method.after_step(Clock(10, 10))  # 0.5 + 0.8 * 0.5
    torch.testing.assert_close(method.teacher_backbone.module.cls_token, start + 0.1)


def entropy_of_the_mean(**options: object) -> float:
    """Entropy of the mean target after training: 0 if all images have one prototype; at most log 12 = 2.48."""
    method = make("msn", momentum=0.9, **options)
    optimizer = torch.optim.AdamW([p for p in method.parameters() if p.requires_grad], lr=3e-3)
    out: dict[str, Tensor] = {}
    for step in range(60):
        out = method(make_batch(method, 32, seed=step % 4), Clock(step, 1000))
        optimizer.zero_grad()
        out["loss"].backward()
        optimizer.step()
        method.after_step(Clock(0, 1000))
    return float(out["marginal_entropy"])


@pytest.mark.slow
def test_without_mean_entropy_and_sinkhorn_it_collapses() -> None:
    assert entropy_of_the_mean(sinkhorn_targets=False) > 1.6
    assert entropy_of_the_mean(sinkhorn_targets=False, mean_entropy_weight=0.0) < 1.2


def test_rejects_invalid_options() -> None:
    with pytest.raises(UserError, match=r"cannot use a ResNet: choose .*VisionTransformer"):
        make("msn", backbone=ResNet(18, width=8))
    with pytest.raises(UserError, match="nearest size that works is 8x8"):
        make("msn", focal=View(size=9))
    with pytest.raises(UserError, match=r"leaves none of 16 patches: use 0\.938 or less"):
        make("msn", patch_drop=0.99)
    with pytest.raises(UserError, match="use positions sincos or learned"):
        make("msn", backbone=VisionTransformer(SIZE, 4, 16, 1, 2, positions="relative"))


def test_default_sizes() -> None:
    with torch.device("meta"):
        method = MSN(vit_small())
    assert [view.size for view in method.views()] == [224] * 2 + [96] * 10
    head = 384 * 2048 + 2048 * 2048 + 4 * 2048 + 2048 * 256 + 256
    assert sum(p.numel() for p in method.head.parameters()) == head
    assert method.prototypes.shape == (1024, 256)
