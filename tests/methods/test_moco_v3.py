import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sslbook import distributed
from sslbook.methods import moco_v3
from sslbook.methods.moco_v3 import MoCoV3, contrastive_loss
from sslbook.nn import VisionTransformer, resnet50
from sslbook.schedules import Clock
from tests.methods.cases import CONVNET, VIEW, Case, apart, make, make_batch, transformer

SMALL = {"view_1": VIEW, "view_2": VIEW, "hidden_dim": 32, "projector_dim": 16, "temperature": 0.2}
CASE = Case(
    options=SMALL,
    command={"method.backbone": CONVNET, "method.hidden_dim": 16, "method.projector_dim": 8},
    learned=lambda method, batch, out: bool(out["contrastive_accuracy"] > 95),
    overfit={"momentum": 0.9},
    lr=5e-3,
    corners=[(6, 1e-4, {"temperature": 0.01}), (6, 1e-3, {"projector_num_layers": 3, "predictor_batch_norm": True})],
    other_backbones=[transformer],
)


@pytest.mark.parametrize(("n", "temperature"), [(5, 0.2), (1, 1.0), (7, 0.01)])
def test_loss_is_equation_1(n: int, temperature: float) -> None:
    q, k = torch.randn(2, n, 4, dtype=torch.float64)
    expected = 0.0
    for i, a in enumerate(q.tolist()):
        logits = [sum(x * y for x, y in zip(a, b)) / math.hypot(*a) / math.hypot(*b) / temperature for b in k.tolist()]
        greatest = max(logits)
        expected += greatest + math.log(sum(math.exp(x - greatest) for x in logits)) - logits[i]
    loss, logits = contrastive_loss(q, k, temperature)
    assert float(loss) == pytest.approx(2 * temperature * expected / n, rel=1e-10, abs=1e-12)
    assert logits.shape == (n, n)


def _loss(x: Tensor) -> float:
    n = x.shape[1] // distributed.world_size()
    return float(distributed.all_reduce_mean(contrastive_loss(*x[:, distributed.rank() * n :][:, :n], 0.2)[0]))


def test_loss_with_one_image_per_process(pool) -> None:
    x = torch.randn(2, 2, 4)
    assert pool.run(_loss, x) == pytest.approx([_loss(x)] * 2)


def test_loss_of_repeated_images() -> None:
    q = torch.randn(1, 4).repeat(3, 1)
    assert float(contrastive_loss(q, q, 0.5)[0]) == pytest.approx(math.log(3), rel=1e-5)


def test_loss_is_symmetrized_and_keys_have_no_gradient() -> None:
    method = apart(make("moco_v3"))
    batch = make_batch(method, 5)
    q = [method.predictor(method.projector(method.backbone(x))) for x in batch.views]
    k = [method.key_projector(method.key_backbone(x)) for x in batch.views]
    expected = contrastive_loss(q[0], k[1], 0.2)[0] + contrastive_loss(q[1], k[0], 0.2)[0]
    loss = method(batch, Clock())["loss"]
    torch.testing.assert_close(loss, expected)
    loss.backward()
    assert all(p.grad is None for p in method.key_backbone.parameters())


def test_ema_momentum_rises_to_1() -> None:
    method = make("moco_v3", momentum=0.9)
    momenta = [method.momentum(Clock(step, 10)) for step in (0, 5, 10)]
    assert momenta == pytest.approx([0.9, 0.95, 1.0])
    method = make("moco_v3", momentum=0.5)
    for key, online in ((method.key_backbone, method.backbone), (method.key_projector, method.projector)):
        start = next(key.module.parameters()).clone()
        with torch.no_grad():
            next(online.parameters()).add_(1)
        method.after_step(Clock(0, 10))
        torch.testing.assert_close(next(key.module.parameters()), start + 0.5)
        method.after_step(Clock(10, 10))  # the momentum is 1
        torch.testing.assert_close(next(key.module.parameters()), start + 0.5)


@pytest.mark.parametrize("frozen", [True, False])
def test_patch_embedding_is_frozen(frozen: bool) -> None:
    method = make("moco_v3", backbone=transformer(), freeze_patch_embedding=frozen)
    before = method.backbone.patch_embed.proj.weight.clone()
    optimizer = torch.optim.SGD([p for p in method.parameters() if p.requires_grad], lr=0.1)
    method(make_batch(method, 8), Clock())["loss"].backward()
    optimizer.step()
    assert torch.equal(method.backbone.patch_embed.proj.weight, before) == frozen
    assert method.backbone.blocks[0].attn.qkv.weight.grad.abs().max() > 0


def positives_only(q: Tensor, k: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    q, k = F.normalize(q, dim=1), F.normalize(k, dim=1)
    return -2 * (q * k).sum(dim=1).mean(), q @ k.T


def feature_std_after_training() -> float:
    method = make("moco_v3", momentum=0.9, predictor=nn.Identity(), projector=nn.Linear(16, 16))
    optimizer = torch.optim.SGD([p for p in method.parameters() if p.requires_grad], lr=0.1, momentum=0.9)
    for step in range(100):
        out = method(make_batch(method, 16, seed=step), Clock())
        optimizer.zero_grad()
        out["loss"].backward()
        optimizer.step()
        method.after_step(Clock(0, 100))
    return float(out["feature_std"])


@pytest.mark.slow
def test_without_negatives_it_collapses(monkeypatch) -> None:
    assert feature_std_after_training() > 0.5
    monkeypatch.setattr(moco_v3, "contrastive_loss", positives_only)
    assert feature_std_after_training() < 0.3


def test_full_scale_sizes() -> None:
    """The authors' code: heads 4096-256 for ResNet-50; one more layer and a last batch norm for transformers."""
    with torch.device("meta"):
        method = MoCoV3(resnet50())
        z = method.projector(method.backbone(torch.zeros(2, 3, 224, 224)))
        assert method.predictor(z).shape == (2, 256)
        vit = VisionTransformer(dim=384, num_heads=12)
        method_vit = MoCoV3(vit, projector_num_layers=3, predictor_batch_norm=True)
    widths = [
        [m.out_features for m in head if isinstance(m, nn.Linear)] for head in (method.projector, method.predictor)
    ]
    assert widths == [[4096, 256], [4096, 256]]
    assert isinstance(method.predictor[-1], nn.Linear)
    assert [m.out_features for m in method_vit.projector if isinstance(m, nn.Linear)] == [4096, 4096, 256]
    assert isinstance(method_vit.predictor[-1], nn.BatchNorm1d)
    assert not method_vit.predictor[-1].affine
    assert sum(p.numel() for p in vit.parameters()) == pytest.approx(21.6e6, rel=0.01)
