import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from sslbook.data.loader import Batch
from sslbook.errors import UserError
from sslbook.methods.densecl import DenseCL, correspondence, local_features
from sslbook.nn import ConvNet, resnet50
from sslbook.schedules import Clock
from tests.methods.cases import CONVNET, VIEW, Case, Convolutions, make, make_batch, transformer


def finds_keys(method: DenseCL, batch: Batch, out: dict[str, Tensor]) -> bool:
    """Every query's nearest key of the batch is its own; the queues are no measure, since they start at random."""
    q, dense_q = (F.normalize(x, dim=-1) for x in heads(method, batch.views[0], False))
    k, dense_k = (F.normalize(x, dim=-1) for x in heads(method, batch.views[1], True))
    own = torch.arange(len(q))
    dense = torch.einsum("npd,mpd->nm", dense_q, dense_k)
    return bool(((q @ k.T).argmax(1) == own).float().mean() > 0.95 and (dense.argmax(1) == own).float().mean() > 0.95)


def heads(method: DenseCL, x: Tensor, keys: bool) -> tuple[Tensor, Tensor]:
    if keys:
        f = local_features(method.key_backbone.module, x)
        return method.key_projector(f.mean(dim=1)), method.key_dense_projector(f)
    f = local_features(method.backbone, x)
    return method.projector(f.mean(dim=1)), method.dense_projector(f)


CASE = Case(
    options={"view": VIEW, "projector_dim": 16, "queue_size": 21, "batch_norm_groups": 2},
    command={"method.backbone": CONVNET, "method.queue_size": 32, "method.batch_norm_groups": 2},
    learned=finds_keys,
    backbone=lambda: ConvNet(4),
    overfit={"queue_size": 16, "momentum": 0.9, "batch_norm_groups": 1},
    lr=0.01,
    corners=[(2, 0.01, {}), (8, 0.01, {"batch_norm_groups": 1})],
    order_free={"batch_norm_groups": 1},
    other_backbones=[transformer],
)


def test_correspondence_is_equation_4() -> None:
    f_q, f_k = torch.randn(2, 3, 5, 4, dtype=torch.float64)
    for i, matches in enumerate(correspondence(f_q, f_k).tolist()):
        for a, match in zip(f_q[i], matches):
            cosines = [float(F.cosine_similarity(a, b, dim=0)) for b in f_k[i]]
            assert match == cosines.index(max(cosines))


def test_correspondence_finds_a_known_translation() -> None:
    """The second image is the first moved by two positions of the feature map."""
    torch.manual_seed(0)
    backbone = ConvNet(16).eval()
    image = torch.randn(2, 3, 48, 56)
    with torch.no_grad():
        f_q, f_k = (local_features(backbone, x) for x in (image[..., :48], image[..., 8:]))
    match = correspondence(f_q, f_k).view(2, 12, 12)[
        :, 3:9, 5:9
    ]  # far from the borders, where zero padding changes features
    expected = (torch.arange(144).view(12, 12) - 2)[3:9, 5:9].expand_as(match)
    assert (match == expected).float().mean() > 0.95


def test_loss_position_by_position() -> None:
    method = make("densecl", dense_weight=0.3, batch_norm_groups=1)
    batch = make_batch(method, 3)
    whole, dense = method.queue.rows.clone(), torch.randn(21, 16)
    dense = F.normalize(dense, dim=1)
    method.dense_queue.rows.copy_(dense)
    with torch.no_grad():  # keys of an encoder that is no longer that of the queries
        for p in (*method.key_projector.parameters(), *method.key_dense_projector.parameters()):
            p += 0.1 * torch.randn(p.shape)
        for p in method.key_backbone.parameters():
            p += 0.1 * torch.randn(p.shape)
    f_q = local_features(method.backbone, batch.views[0])
    f_k = local_features(method.key_backbone.module, batch.views[1])
    q, dense_q = heads(method, batch.views[0], False)
    k, dense_k = (key.detach() for key in heads(method, batch.views[1], True))
    loss, weights = method(batch, Clock())["loss"], [p for p in method.parameters() if p.requires_grad]

    def term(a: Tensor, b: Tensor, queue: Tensor) -> Tensor:
        cosines = F.cosine_similarity(a[None], torch.cat([b[None], queue]))
        return (cosines / 0.2).logsumexp(0) - cosines[0] / 0.2

    terms = []
    for i in range(3):
        for position in range(16):
            cosines = [float(F.cosine_similarity(f_q[i, position].detach(), f, dim=0)) for f in f_k[i]]
            terms.append(term(dense_q[i, position], dense_k[i, cosines.index(max(cosines))], dense))
    expected = 0.7 * sum(term(q[i], k[i], whole) for i in range(3)) / 3 + 0.3 * sum(terms) / len(terms)
    torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-5)
    passed = torch.autograd.grad(expected, weights)
    torch.testing.assert_close(torch.autograd.grad(loss, weights), passed, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(method.queue.rows[:3], F.normalize(k, dim=1))
    torch.testing.assert_close(method.dense_queue.rows[:3], F.normalize(dense_k.mean(dim=1), dim=1))


def test_shuffling_changes_batch_statistics_and_not_the_order() -> None:
    method = make("densecl")
    batch = make_batch(method, 8)
    with torch.no_grad():
        moved = method.key_features(batch.views[1], batch, Clock())
        plain = local_features(method.key_backbone.module, batch.views[1])
    assert (moved - plain).abs().max() > 1e-3
    method.key_backbone.eval()
    with torch.no_grad():  # without batch statistics groups do not matter
        moved = method.key_features(batch.views[1], batch, Clock())
        plain = local_features(method.key_backbone.module, batch.views[1])
    torch.testing.assert_close(moved, plain)


def test_key_encoder_is_an_ema_without_gradient() -> None:
    method = make("densecl", momentum=0.9)
    method(make_batch(method, 8), Clock())["loss"].backward()
    for key, online in (
        (method.key_backbone, method.backbone),
        (method.key_projector, method.projector),
        (method.key_dense_projector, method.dense_projector),
    ):
        assert all(p.grad is None for p in key.parameters())
        start = next(key.module.parameters()).clone()
        with torch.no_grad():
            next(online.parameters()).add_(1)
        method.after_step(Clock(1, 10))
        torch.testing.assert_close(next(key.module.parameters()), start + 0.1)
        with torch.no_grad():
            next(online.parameters()).sub_(1)


def positions_matched(dense_weight: float) -> float:
    """Fraction of positions whose dense projection is nearest to that of the same position in another view."""
    method = make("densecl", dense_weight=dense_weight, momentum=0.9, queue_size=256, batch_norm_groups=1)
    optimizer = torch.optim.AdamW([p for p in method.parameters() if p.requires_grad], lr=1e-2)
    for step in range(60):
        optimizer.zero_grad()
        method(make_batch(method, 16, seed=step), Clock())["loss"].backward()
        optimizer.step()
        method.after_step(Clock(step + 1, 60))
    batch = make_batch(method, 16, seed=1000)
    with torch.no_grad():
        f_q, f_k = (local_features(method.backbone, x) for x in batch.views)
        match = correspondence(method.dense_projector(f_q), method.dense_projector(f_k))
    return float((match == torch.arange(16)).float().mean())


@pytest.mark.slow
def test_without_the_dense_loss_positions_are_confused() -> None:
    assert positions_matched(0.5) > positions_matched(0.0) + 0.1


def test_rejects_invalid_options() -> None:
    with pytest.raises(
        UserError, match=r"DenseCL needs a feature map and cannot use a Convolutions: choose sslbook.nn.ResNet"
    ):
        make("densecl", backbone=Convolutions())


def test_full_scale_sizes() -> None:
    """Section 3.4: heads of 2048, 2048 and 128, one of them at each of 7 x 7 positions; two queues of 65,536."""
    with torch.device("meta"):
        method = DenseCL(resnet50(), batch_norm_groups=1)
        f = local_features(method.backbone, torch.zeros(2, 3, 224, 224))
        assert method.projector(f.mean(dim=1)).shape == (2, 128)
        assert method.dense_projector(f).shape == (2, 49, 128)
    head = 2048 * 2048 + 2048 + 2048 * 128 + 128
    assert [sum(p.numel() for p in m.parameters()) for m in (method.projector, method.dense_projector)] == [head, head]
    assert method.dense_queue.rows.shape == (65536, 128)
