import math

import pytest
import torch
from torch import Tensor

from sslbook import distributed
from sslbook.data.masks import block_mask
from sslbook.data.views import View
from sslbook.errors import UserError
from sslbook.methods.data2vec import Data2Vec, average_of_layers, regression_loss
from sslbook.nn import ResNet, VisionTransformer, vit_base
from sslbook.schedules import Clock
from tests.methods.cases import SIZE, TRANSFORMER, VIEW, Case, apart, make, make_batch, transformer

CASE = Case(
    options={"view": VIEW, "min_block": 2, "num_top_layers": 2},
    command={"method.backbone": TRANSFORMER, "method.view.size": 16, "method.min_block": 2, "method.num_top_layers": 1},
    # Predicting 0 gives a loss of about 0.25; a collapsed teacher would give all images the same targets.
    learned=lambda method, batch, out: bool(out["loss"] < 0.1 and out["target_std"] > 0.3),
    backbone=transformer,
    full_scale="vit_base",
    overfit={"backbone": VisionTransformer(SIZE, 4, 32, 2, 4)},
    overfit_lr=3e-3,
    corners=[(2, 0.05, {})],
    other_backbones=[lambda: VisionTransformer(SIZE, 4, 16, 2, 2, positions="relative", layer_scale=0.1)],
)


def normalized(x: list[float]) -> list[float]:
    mean = sum(x) / len(x)
    variance = sum((v - mean) ** 2 for v in x) / len(x)
    return [(v - mean) / math.sqrt(variance + 1e-5) for v in x]


@pytest.mark.parametrize(("before", "after"), [(True, True), (True, False), (False, True), (False, False)])
def test_targets_are_normalized_before_and_after_averaging(before: bool, after: bool) -> None:
    layers = torch.randn(3, 2, 5) * torch.tensor([1.0, 10.0, 0.1])[:, None, None] + 1
    average = average_of_layers(list(layers), before, after)
    for i in range(2):
        rows = [normalized(layer[i].tolist()) if before else layer[i].tolist() for layer in layers]
        mean = [sum(values) / 3 for values in zip(*rows)]
        assert average[i].tolist() == pytest.approx(normalized(mean) if after else mean, rel=1e-4, abs=1e-5)


@pytest.mark.parametrize(("n", "beta"), [(3, 2.0), (1, 0.12)])
def test_loss_is_smooth_l1_with_beta(n: int, beta: float) -> None:
    prediction, target = 2 * torch.randn(2, n, 4)
    expected = 0.0
    for a, b in zip(prediction.flatten().tolist(), target.flatten().tolist()):
        error = abs(a - b)
        expected += (error**2 / (2 * beta) if error <= beta else error - beta / 2) / (4 * n)
    assert float(regression_loss(prediction, target, beta)) == pytest.approx(expected, rel=1e-5)


def _loss(counts: list[int]) -> float:
    rank, processes = distributed.rank(), distributed.world_size()
    x = torch.arange(float(sum(counts)))[:, None].expand(-1, 2)
    start = sum(counts[:rank]) if processes > 1 else 0
    own = x[start : start + counts[rank]] if processes > 1 else x
    return float(distributed.all_reduce_mean(regression_loss(own, torch.zeros_like(own), 2.0)))


@pytest.mark.parametrize("counts", [[3, 5], [0, 4]])
@pytest.mark.slow
def test_loss_averages_masked_patches_over_processes(counts: list[int], pool) -> None:
    assert pool.run(_loss, counts) == pytest.approx([_loss(counts)] * 2)


def test_forward_matches_literal_computation() -> None:
    method, clock = apart(make("data2vec", num_top_layers=1)), Clock(step=3, steps_per_epoch=2, seed=1)
    batch = make_batch(method, 3)
    mask = block_mask(batch.index, (4, 4), 9, clock, min_block=2)
    teacher, errors = method.teacher.module, []
    for i in range(3):
        image = batch.views[0][i : i + 1]
        layers = [x[0, 1:] for x in teacher.layers(teacher.embed(image))][-1:]  # of two blocks
        target = average_of_layers(layers)
        tokens = method.backbone.patch_embed(image)
        tokens = torch.where(mask[i][None, :, None], method.mask_token, tokens) + method.backbone.pos_embed[:, 1:]
        prediction = method.predictor(method.backbone.encode(tokens)[0, 1:])
        errors.append((prediction - target)[mask[i]].abs())
    error = torch.cat(errors)
    out = method(batch, clock)
    expected = torch.where(error < 2, error**2 / 4, error - 1).mean()
    torch.testing.assert_close(out["loss"], expected, rtol=1e-4, atol=1e-5)
    out["loss"].backward()
    assert all(p.grad is None for p in method.teacher.parameters())


def test_momentum_rises_linearly() -> None:
    method = make("data2vec", momentum=0.5, momentum_end=0.9)
    start = method.teacher.module.cls_token.clone()
    with torch.no_grad():
        method.backbone.cls_token += 1
    method.after_step(Clock(5, 10))
    torch.testing.assert_close(method.teacher.module.cls_token, start + 0.3)


@pytest.mark.slow
def test_without_normalization_one_layer_dominates() -> None:
    """The outputs of a residual network grow with depth, so that the last block would dominate the average."""
    layers = [torch.randn(200, 8) * scale for scale in (1.0, 30.0)]

    def similarities(normalize: bool) -> list[float]:
        average = average_of_layers(layers, normalize_layers=normalize)
        return [float(torch.cosine_similarity(average, average_of_layers([x]), dim=1).mean()) for x in layers]

    small, large = similarities(False)
    assert large > 0.98
    assert small < 0.2
    small, large = similarities(True)
    assert small == pytest.approx(large, abs=0.1)


def loss_after_training() -> float:
    """On images with independent patches: the teacher's features of a patch can be predicted only if it is visible."""
    backbone = VisionTransformer(SIZE, 4, 32, 1, 4)
    method = make("data2vec", backbone=backbone, num_top_layers=1, momentum=1.0, momentum_end=1.0)
    optimizer = torch.optim.AdamW([p for p in method.parameters() if p.requires_grad], lr=1e-2)
    generator = torch.Generator().manual_seed(0)
    losses = []
    for step in range(50):
        patches = torch.randn(16, 3, 4, 4, generator=generator).repeat_interleave(4, dim=2).repeat_interleave(4, dim=3)
        loss = method(make_batch(method, 16, seed=step)._replace(views=(patches,)), Clock(step, 50))["loss"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return sum(losses[-10:]) / 10


@pytest.mark.slow
def test_without_masking_it_copies_the_teacher(monkeypatch) -> None:
    assert loss_after_training() > 0.1
    embed = VisionTransformer.embed

    def embed_unmasked(self: VisionTransformer, x: Tensor, mask: Tensor | None = None, token: Tensor | None = None):
        return embed(self, x) if token is None else embed(self, x) + 0 * token

    monkeypatch.setattr(VisionTransformer, "embed", embed_unmasked)
    assert loss_after_training() < 0.05


def test_rejects_invalid_options() -> None:
    with pytest.raises(UserError, match=r"cannot use a ResNet: choose .*VisionTransformer"):
        make("data2vec", backbone=ResNet(18, width=8))
    with pytest.raises(UserError, match="the backbone has 2 blocks; use 1 to 2"):
        make("data2vec", num_top_layers=3)
    with pytest.raises(UserError, match="leaves nothing to predict"):
        make("data2vec", mask_ratio=0.01)
    with pytest.raises(UserError, match="leaves nothing to see"):
        make("data2vec", mask_ratio=1.0)
    with pytest.raises(UserError, match="nearest size that works is 20x20"):
        make("data2vec", view=View(size=19))


def test_paper_scale() -> None:
    with torch.device("meta"):
        method = Data2Vec(vit_base())
    assert (method.num_masked, method.grid) == (120, (14, 14))
    trained = sum(p.numel() for p in method.parameters() if p.requires_grad)
    assert trained == sum(p.numel() for p in method.backbone.parameters()) + 768**2 + 768 + 768
