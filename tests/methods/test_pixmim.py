import cmath
import math

import pytest
import torch
from torch import Tensor

from sslbook import rng
from sslbook.data.views import View
from sslbook.errors import UserError
from sslbook.methods import pixmim
from sslbook.methods.mae import random_mask
from sslbook.methods.pixmim import PixMIM, low_pass, random_shift
from sslbook.nn import ResNet, VisionTransformer, vit_base
from sslbook.nn.mask_tokens import gather_tokens
from sslbook.nn.patches import patchify
from sslbook.schedules import Clock
from tests.methods.cases import SIZE, TRANSFORMER, VIEW, Case, make, make_batch, transformer

CASE = Case(
    options={"view": VIEW, "decoder_dim": 16, "decoder_depth": 1, "decoder_num_heads": 2, "shift": 14.0},
    command={"method.backbone": TRANSFORMER, "method.decoder_dim": 16, "method.decoder_num_heads": 2},
    learned=lambda method, batch, out: bool(out["loss"] < 0.7),  # 47/48 for a constant prediction: the images are noise
    backbone=transformer,
    full_scale="vit_base",
    overfit={"backbone": VisionTransformer(SIZE, 4, 64, 2, 4), "decoder_dim": 64, "decoder_num_heads": 4},
    overfit_lr=3e-3,
    corners=[(2, 0.05, {})],
)


def literal_low_pass(image: Tensor, radius: float) -> Tensor:
    """The discrete Fourier transform and its inverse as sums, one frequency at a time."""
    height, width = image.shape
    result = torch.zeros(height, width, dtype=torch.float64)
    frequencies = [
        (k, m) for k in range(-(height // 2), (height + 1) // 2) for m in range(-(width // 2), (width + 1) // 2)
    ]
    points = [(y, x) for y in range(height) for x in range(width)]
    for k, m in frequencies:
        if math.hypot(k, m) > radius:
            continue
        wave = {(y, x): cmath.exp(2j * math.pi * (k * y / height + m * x / width)) for y, x in points}
        coefficient = sum(float(image[p]) / wave[p] for p in points) / (height * width)
        for p in points:
            result[p] += (coefficient * wave[p]).real
    return result


@pytest.mark.parametrize(("height", "width", "radius"), [(6, 6, 2.0), (5, 7, 1.5), (4, 6, 9.0), (4, 4, 0.5)])
def test_low_pass_matches_literal_fourier_sum(height: int, width: int, radius: float) -> None:
    images = torch.randn(1, 3, height, width, dtype=torch.float64)
    kept = low_pass(images, radius)
    for c in range(3):
        torch.testing.assert_close(kept[0, c], literal_low_pass(images[0, c], radius))


def test_low_pass_keeps_low_frequencies() -> None:
    x = torch.arange(32.0, dtype=torch.float64) / 32
    constant = torch.full((1, 3, 32, 32), 0.7, dtype=torch.float64)
    slow = torch.cos(2 * math.pi * (3 * x[:, None] + 4 * x)).expand(1, 3, 32, 32)  # 5 periods along the wave
    fast = torch.cos(2 * math.pi * (4 * x[:, None] + 4 * x)).expand(1, 3, 32, 32)  # 5.7
    torch.testing.assert_close(low_pass(constant + slow + fast, 5.0), constant + slow)
    torch.testing.assert_close(low_pass(slow, 4.9), torch.zeros_like(slow))
    torch.testing.assert_close(low_pass(fast, 100.0), fast)


def test_radius_and_shift_scale_with_the_image() -> None:
    assert make("pixmim", radius=28.0).radius == pytest.approx(2.0)  # 16 pixels instead of 224
    with torch.device("meta"):
        method = pixmim.PixMIM(vit_base())
    assert (method.radius, method.shift) == (40.0, 4)


def test_view_keeps_nearly_all_of_the_image() -> None:
    """MAE's random crop may miss the foreground."""
    (view,) = PixMIM(VisionTransformer(224, 16, 16, 1, 2), decoder_dim=16, decoder_depth=1).views()
    assert view.crop is None


def test_random_shift_reflects_at_the_border() -> None:
    index, clock = torch.arange(200), Clock(step=4, steps_per_epoch=2, seed=1)
    images = torch.randn(200, 3, 6, 7)
    moved = random_shift(images, 2, index, clock)
    u = rng.uniform(1, 2, index, rng.METHOD + 1, 2)
    seen = set()
    for i in range(200):
        down, right = int(u[i, 0] * 5) - 2, int(u[i, 1] * 5) - 2
        seen.add((down, right))
        for y in range(6):
            for x in range(7):
                row, column = 5 - abs(5 - abs(y + down)), 6 - abs(6 - abs(x + right))
                assert torch.equal(moved[i, :, y, x], images[i, :, row, column])
    assert len(seen) == 25
    assert torch.equal(random_shift(images, 0, index, clock), images)


@pytest.mark.parametrize("norm_pix_loss", [True, False])
@pytest.mark.parametrize("n", [3, 1])
def test_loss_matches_literal_formula(norm_pix_loss: bool, n: int) -> None:
    method = make("pixmim", norm_pix_loss=norm_pix_loss).double()
    batch = make_batch(method, n)
    clock = Clock(seed=2)
    images = random_shift(batch.views[0].double(), 1, batch.index, clock)
    visible, masked = random_mask(batch.index, 16, 0.75, clock)
    encoded = method.backbone.encode(gather_tokens(method.backbone.embed(images), visible))
    prediction = method.decoder(encoded, visible, masked)
    errors = []
    for i in range(n):
        smooth = torch.stack([literal_low_pass(plane, 40 * SIZE / 224) for plane in images[i]])
        patches = patchify(smooth[None], 4)[0]
        for j, patch in enumerate(masked[i].tolist()):
            target = patches[patch].tolist()
            if norm_pix_loss:
                mean = sum(target) / 48
                std = (sum((t - mean) ** 2 for t in target) / 47 + 1e-6) ** 0.5
                target = [(t - mean) / std for t in target]
            errors += [(a - b) ** 2 for a, b in zip(prediction[i, j].tolist(), target)]
    loss = method(batch._replace(views=(batch.views[0].double(),)), clock)["loss"]
    assert float(loss.detach()) == pytest.approx(sum(errors) / len(errors), rel=1e-4)


def test_target_ignores_high_frequencies(monkeypatch) -> None:
    """High-frequency noise in the images leaves the target unchanged; without the filter it does not."""
    method = make("pixmim", norm_pix_loss=False, radius=40.0, mask_ratio=0.5)
    images = torch.randn(4, 3, SIZE, SIZE)
    noise = torch.randn(4, 3, SIZE, SIZE)
    noise = noise - low_pass(noise, method.radius)
    torch.testing.assert_close(method.target(images + noise), method.target(images), rtol=1e-4, atol=1e-5)
    monkeypatch.setattr(pixmim, "low_pass", lambda x, radius: x)
    assert (method.target(images + noise) - method.target(images)).abs().max() > 1


@pytest.mark.slow
def test_without_filter_and_shift_it_is_mae(monkeypatch) -> None:
    method, parent = make("pixmim", shift=0.0), make("mae")
    batch = make_batch(method, 4)
    images = batch.views[0]
    assert not torch.allclose(method(batch, Clock())["loss"], parent(batch, Clock())["loss"])
    monkeypatch.setattr(pixmim, "low_pass", lambda x, radius: x)
    assert torch.equal(method(batch, Clock())["loss"], parent(batch, Clock())["loss"])
    assert torch.equal(method.reconstruct(images, batch.index)[1], parent.reconstruct(images, batch.index)[1])


def test_rejects_invalid_options() -> None:
    with pytest.raises(UserError, match=r"PixMIM .* cannot use a ResNet: choose .*VisionTransformer"):
        make("pixmim", backbone=ResNet(18, width=8))
    with pytest.raises(UserError, match="leaves nothing to predict"):
        make("pixmim", mask_ratio=0.0)
    with pytest.raises(UserError, match="leaves nothing to see"):
        make("pixmim", mask_ratio=0.99)
    with pytest.raises(UserError, match="nearest size that works is 20x20"):
        make("pixmim", view=View(size=19))


def test_paper_scale() -> None:
    with torch.device("meta"):
        method = PixMIM(VisionTransformer())
        tokens, visible, masked = torch.empty(2, 50, 768), torch.zeros(2, 49).long(), torch.zeros(2, 147).long()
        assert method.decoder(tokens, visible, masked).shape == (2, 147, 16 * 16 * 3)
    encoder = 12 * (12 * 768**2 + 13 * 768) + (16 * 16 * 3 * 768 + 768) + 768 + 2 * 768
    decoder = 8 * (12 * 512**2 + 13 * 512) + (768 * 512 + 512) + 512 + 2 * 512 + (512 * 768 + 768)
    assert sum(p.numel() for p in method.parameters()) == encoder + decoder
    # All is MAE's: its mae_vit_base_patch16, where the fixed positions of class token and patches count too.
    assert encoder + decoder + 197 * (768 + 512) == 111_907_840
