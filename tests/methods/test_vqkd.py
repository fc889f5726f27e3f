import json
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from sslbook.data.views import View
from sslbook.errors import UserError
from sslbook.methods.vqkd import cosine_loss, moved_codes
from sslbook.nn import ConvNet, ResNet, VisionTransformer, VQTokenizer
from sslbook.schedules import Clock
from sslbook.weights.load import load_weights
from tests.methods.cases import SIZE, VIEW, Case, make, make_batch


def seeded_teacher() -> VisionTransformer:
    """The same in every process that imports this file."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return VisionTransformer(SIZE, 4, 12, 1, 2)


SMALL = {"image_size": SIZE, "patch_size": 4, "dim": 16, "depth": 2, "num_heads": 2, "num_codes": 8, "code_dim": 4}
CASE = Case(
    options={"view": VIEW, "teacher": seeded_teacher(), "decoder_depth": 1, "decoder_dim": 16, "decoder_num_heads": 2},
    command={
        "method.backbone": json.dumps(
            {"class_path": "sslbook.nn.VQTokenizer", "init_args": {**SMALL, "image_size": 24}}
        ),
        "method.teacher": json.dumps({"class_path": "sslbook.nn.ConvNet", "init_args": {"width": 4}}),
        "method.decoder_depth": 1,
        "method.decoder_dim": 16,
        "method.decoder_num_heads": 2,
    },
    learned=lambda method, batch, out: bool(out["cosine_loss"] < 0.12),
    backbone=lambda: VQTokenizer(**SMALL),
    full_scale="VQTokenizer",
    full_options=lambda: {"teacher": VisionTransformer()},
    overfit={
        "backbone": VQTokenizer(**{**SMALL, "dim": 64, "num_codes": 128, "code_dim": 8}),
        "teacher": ConvNet(8),
        "momentum": 0.9,
        "decoder_dim": 64,
    },
    overfit_lr=3e-3,
    corners=[(2, 0.05, {"dead_below": 0.9})],
)


def test_cosine_loss_against_loops() -> None:
    p, t = torch.randn(7, 5).double(), torch.randn(7, 5).double()
    total = 0.0
    for a, b in zip(p.tolist(), t.tolist()):
        total += 1 - sum(x * y for x, y in zip(a, b)) / (sum(x * x for x in a) * sum(y * y for y in b)) ** 0.5
    assert float(cosine_loss(p, t)) == pytest.approx(total / 7, rel=1e-5)


@pytest.mark.parametrize("n", [3, 1])
def test_loss_against_literal_version(n: int) -> None:
    method = make("vqkd", commitment_weight=0.3)
    batch = make_batch(method, n)
    (images,) = batch.views
    latents = method.backbone.latents(images)
    torch.testing.assert_close(latents.norm(dim=2), torch.ones(n, 16))
    codes = torch.zeros_like(latents)
    for i in range(n):
        for j in range(16):
            distances = [float((latents[i, j] - code).square().sum()) for code in method.backbone.codebook]
            codes[i, j] = method.backbone.codebook[distances.index(min(distances))]
    prediction, target = method.decoder(codes), method.teacher(images).patches
    expected = cosine_loss(prediction.flatten(0, 1), target.flatten(0, 1)) + 0.3 * (latents - codes).square().mean()
    torch.testing.assert_close(method(batch, Clock())["loss"], expected)


def test_codes_are_moving_averages_on_the_sphere() -> None:
    codes = F.normalize(torch.randn(3, 4), dim=1)
    assigned = F.normalize(torch.randn(5, 4), dim=1)  # four patches for the first code, one for the second
    counts = torch.tensor([4.0, 1.0, 0.0])
    sums = torch.stack([assigned[:4].sum(dim=0), assigned[4], torch.zeros(4)])
    moved = moved_codes(codes, counts, sums, 0.9)
    for k, mine in enumerate([assigned[:4], assigned[4:]]):
        mean = mine.mean(dim=0) / mine.mean(dim=0).norm()
        expected = 0.9 * codes[k] + 0.1 * mean
        torch.testing.assert_close(moved[k], expected / expected.norm())
    assert torch.equal(moved[2], codes[2])


def test_straight_through_gradient() -> None:
    method = make("vqkd", commitment_weight=0.3)
    batch = make_batch(method, 4)
    latents = method.backbone.latents(batch.views[0])
    codes = method.backbone.codebook[method.backbone.nearest(latents)].requires_grad_()
    loss = cosine_loss(method.decoder(codes).flatten(0, 1), method.teacher(batch.views[0]).patches.flatten(0, 1))
    passed = torch.autograd.grad(loss, codes)[0] + 0.3 * 2 * (latents - codes).detach() / latents.numel()
    weights = list(method.backbone.vit.blocks.parameters())
    expected = torch.autograd.grad(latents, weights, passed)
    torch.testing.assert_close(torch.autograd.grad(method(batch, Clock())["loss"], weights), expected)
    assert "codebook" not in dict(method.backbone.named_parameters())


@pytest.mark.parametrize("parts", [1, 2])
def test_codes_follow_assigned_patches(parts: int) -> None:
    """Step by step, whether a batch comes at once or in parts."""
    method = make("vqkd", momentum=0.9, dead_below=0.0)
    method.started.fill_(1)
    for step in (1, 2):
        batch = make_batch(method, 4, seed=step)
        latents = method.backbone.latents(batch.views[0]).detach().flatten(0, 1)
        tokens, expected = method.backbone.tokens(batch.views[0]).flatten(), method.backbone.codebook.clone()
        for k in tokens.unique().tolist():
            mine = latents[tokens == k].mean(dim=0)
            expected[k] = F.normalize(0.9 * expected[k] + 0.1 * mine / mine.norm(), dim=0)
        for part in range(parts):
            own = slice(part * 4 // parts, (part + 1) * 4 // parts)
            method(batch._replace(views=(batch.views[0][own],), index=batch.index[own]), Clock(step, 10))
        method.after_step(Clock(step, 10))
        torch.testing.assert_close(method.backbone.codebook, expected)


def test_code_perplexity() -> None:
    method = make("vqkd")
    for step in (1, 2):  # by the latest batch
        batch = make_batch(method, 4, seed=step)
        shares = method.backbone.tokens(batch.views[0]).flatten().bincount(minlength=8).double() / 64
        expected = math.exp(-sum(p * math.log(p) for p in shares.tolist() if p > 0))
        assert float(method(batch, Clock(step))["code_perplexity"]) == pytest.approx(expected, rel=1e-4)
        method.after_step(Clock(step, 10))


@pytest.mark.parametrize("dead_below", [0.03, 0.0])
def test_dead_codes_restart_at_patches(dead_below: float) -> None:
    """Only the first code is ever assigned; the others move to patches of the batch, unless that is switched off."""
    method = make("vqkd", dead_below=dead_below, momentum=0.5)
    method.started.fill_(1)
    start = method.backbone.codebook.clone()
    for step in range(2, 9):
        method.counts[0] = 16.0
        method.sums[0] = 16.0 * start[0]
        method.spare.copy_(F.normalize(torch.randn(8, 4), dim=1))
        method.after_step(Clock(step, 10))
    moved = (method.backbone.codebook - start).norm(dim=1) > 1e-4
    assert moved.tolist() == [False] + [dead_below > 0] * 7
    torch.testing.assert_close(method.backbone.codebook.norm(dim=1), torch.ones(8))


def test_code_is_dead_below_fraction_of_average() -> None:
    """The average is 750, of which 3% are 22. A restarted code is left alone until it had time to be assigned."""
    method = make("vqkd", momentum=0.0)
    method.started.fill_(1)
    start, counts = method.backbone.codebook.clone(), torch.tensor([1000.0] * 5 + [960.0, 10.0, 30.0])
    for step, spare in ((1, -start), (2, start.flip(1))):
        method.counts.copy_(counts)
        method.sums.copy_(start)
        method.spare.copy_(spare)
        method.after_step(Clock(step, 10))
        torch.testing.assert_close(method.backbone.codebook, torch.cat([start[:6], -start[6:7], start[7:]]))
        counts[6], method.momentum = 0.0, 0.5


def codes_used(restart: bool) -> int:
    """How many of 32 codes are assigned for new images after training; if not restarted, they start at random."""
    torch.manual_seed(1)
    backbone = VQTokenizer(**{**SMALL, "num_codes": 32})
    method = make("vqkd", seed=1, backbone=backbone, momentum=0.9, dead_below=0.03 if restart else 0.0)
    method.started.fill_(not restart)
    optimizer = torch.optim.AdamW([p for p in method.parameters() if p.requires_grad], lr=3e-3)
    for step in range(60):
        optimizer.zero_grad()
        method(make_batch(method, 16, seed=1000 + step), Clock(step, 60))["loss"].backward()
        optimizer.step()
        method.after_step(Clock(step + 1, 60))
    return len(method.backbone.tokens(make_batch(method, 64, seed=99).views[0]).unique())


@pytest.mark.slow
def test_codes_without_restarts_stay_unused() -> None:
    assert codes_used(restart=True) > 24
    assert codes_used(restart=False) < 20


def test_codes_start_at_patches() -> None:
    method = make("vqkd")
    batch = make_batch(method, 4)
    latents = method.backbone.latents(batch.views[0]).flatten(0, 1)
    method(batch, Clock())
    method.after_step(Clock(1, 10))
    distance = (method.backbone.codebook[:, None] - latents).norm(dim=2)
    assert distance.amin(dim=1).max() < 1e-5
    assert len(method.backbone.codebook.unique(dim=0)) > 5  # 8 sampled from 64: not all the same
    method(batch, Clock(1))
    method.after_step(Clock(2, 10))
    assert (method.backbone.codebook[:, None] - latents).norm(dim=2).amin(dim=1).max() > 1e-4  # means from now on


def test_loaded_codes_are_kept(tmp_path: Path) -> None:
    source, target = make("vqkd"), make("vqkd", seed=1)
    torch.save(source.backbone.state_dict(), tmp_path / "tokenizer.pt")
    target.on_weights_loaded(load_weights(target, tmp_path / "tokenizer.pt").taken)
    target(make_batch(target, 4), Clock())
    target.after_step(Clock(1, 10))
    cosine = (target.backbone.codebook * source.backbone.codebook).sum(dim=1)
    assert cosine.min() > 0.99  # moved, not replaced


def test_paper_scale() -> None:
    with torch.device("meta"):
        tokenizer = VQTokenizer()
        assert tokenizer.codebook.shape == (8192, 32)
        assert tokenizer.tokens(torch.empty(2, 3, 224, 224)).shape == (2, 196)
    assert sum(p.numel() for p in tokenizer.vit.parameters()) == 85_798_656 - 197 * 768  # ViT-B with fixed positions


def test_rejects_invalid_options() -> None:
    with pytest.raises(UserError, match=r"cannot use a ResNet: choose sslbook.nn.VQTokenizer"):
        make("vqkd", backbone=ResNet(18, width=8))
    with pytest.raises(UserError, match="there is no teacher"):
        make("vqkd", teacher=None)
    with pytest.raises(UserError, match="grid of 2x2 patches and the student one of 4x4"):
        make("vqkd", teacher=VisionTransformer(SIZE, 8, 12, 1, 2))
    with pytest.raises(UserError, match="made for images of 16 pixels and the view gives 24"):
        make("vqkd", view=View(size=24))
