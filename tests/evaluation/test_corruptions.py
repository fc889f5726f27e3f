"""Corruptions: their definitions, their strength, and randomness that belongs to the image."""

import colorsys

import numpy as np
import pytest
import torch
from torch import Tensor

from sslbook.errors import UserError
from sslbook.evaluation.corruptions import NAMES, _fractal, _gaussian_blur, _streaks, corrupt
from sslbook.rng import uniform


def photographs(n: int = 4, side: int = 32) -> Tensor:
    """Smooth color gradients with a sharp square."""
    y, x = torch.meshgrid(torch.linspace(0, 1, side), torch.linspace(0, 1, side), indexing="ij")
    images = torch.stack([torch.stack([x, y * (i + 1) / n, (x + y) / 2]) for i in range(n)])
    images[:, :, side // 4 : side // 2, side // 4 : side // 2] = torch.tensor([0.9, 0.2, 0.1])[:, None, None]
    return images


INDEX = torch.arange(4)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("side", [32, 64])
def test_each_damages_the_image_and_belongs_to_it(name: str, side: int) -> None:
    images = photographs(side=side)
    damaged = [corrupt(images, name, severity, INDEX) for severity in (1, 3, 5)]
    for changed in damaged:
        assert changed.shape == images.shape
        assert 0 <= changed.min() <= changed.max() <= 1
        torch.testing.assert_close(changed * 255, (changed * 255).round())  # 8 bits
    distance = [(changed - images).abs().mean().item() for changed in damaged]
    assert min(distance) > 0.001
    # The others change in more than their strength from one severity to the next.
    if name not in ("elastic", "glass blur", "snow", "frost", "fog", "pixelate"):
        assert distance[0] < distance[1] < distance[2]
    # Whatever batch an image is in, it is damaged in one way.
    alone = torch.cat([corrupt(images[i : i + 1], name, 3, INDEX[i : i + 1]) for i in (2, 0)])
    torch.testing.assert_close(alone, damaged[1][[2, 0]], atol=1 / 254, rtol=0)
    if name in ("gaussian noise", "shot noise", "impulse noise", "glass blur", "motion blur", "snow", "frost", "fog"):
        assert not torch.equal(corrupt(images, name, 5, INDEX + 7), damaged[2])
        assert not torch.equal(corrupt(images, name, 5, INDEX, seed=1), damaged[2])


@pytest.mark.parametrize("name", [n for n in NAMES if "blur" in n or n in ("pixelate", "elastic", "contrast")])
def test_a_uniform_image_stays_as_it_is(name: str) -> None:
    for side in (32, 64):
        gray = torch.full((2, 3, side, side), 102 / 255)
        torch.testing.assert_close(corrupt(gray, name, 4, INDEX[:2]), gray, atol=1 / 254, rtol=0)


def test_noise_has_the_stated_strength() -> None:
    gray = torch.full((4, 3, 64, 64), 0.5)
    for severity, std in ((1, 0.08), (3, 0.18)):
        assert corrupt(gray, "gaussian noise", severity, INDEX).std().item() == pytest.approx(std, rel=0.03)
    shot = corrupt(gray, "shot noise", 2, INDEX)
    assert shot.mean().item() == pytest.approx(0.5 - 0.5 / 255, abs=0.005)
    assert shot.std().item() == pytest.approx((0.5 / 25) ** 0.5, rel=0.05)  # Poisson: variance = mean / photons
    salt = corrupt(gray, "impulse noise", 4, INDEX)
    assert (salt == 1).float().mean().item() == pytest.approx(0.17 / 2, abs=0.005)
    assert (salt == 0).float().mean().item() == pytest.approx(0.17 / 2, abs=0.005)
    small = torch.full((4, 3, 32, 32), 0.5)  # weaker, as in CIFAR-10-C
    assert corrupt(small, "gaussian noise", 3, INDEX).std().item() == pytest.approx(0.08, rel=0.05)


def test_brightness_and_contrast_are_literal() -> None:
    images = photographs()
    brighter = corrupt(images, "brightness", 3, INDEX)
    for y, x in ((0, 0), (3, 17), (9, 9), (31, 31)):
        h, s, v = colorsys.rgb_to_hsv(*images[1, :, y, x].tolist())
        expected = colorsys.hsv_to_rgb(h, s, min(1, v + 0.15))
        assert brighter[1, :, y, x].tolist() == pytest.approx(expected, abs=1 / 254)
    flat = corrupt(images, "contrast", 5, INDEX)
    mean = images.mean((2, 3), keepdim=True)
    torch.testing.assert_close(flat, 0.15 * images + 0.85 * mean, atol=1 / 254, rtol=0)


def test_gaussian_blur_equals_scipy() -> None:
    from scipy.ndimage import gaussian_filter

    x = torch.rand(2, 3, 20, 24)
    for mode, truncate in (("nearest", 4.0), ("reflect", 3.0)):
        expected = gaussian_filter(x[1, 2].double().numpy(), 2.5, mode=mode, truncate=truncate)
        np.testing.assert_allclose(_gaussian_blur(x, 2.5, mode, truncate)[1, 2], expected, atol=1e-5)


def test_streaks_run_along_their_angle() -> None:
    dot = torch.zeros(2, 1, 15, 15)
    dot[:, :, 7, 7] = 1
    streaks = _streaks(dot, 3, 2, torch.tensor([0.0, torch.pi / 2]))
    assert streaks[0, 0].nonzero()[:, 0].unique().tolist() == [7]
    assert streaks[1, 0].nonzero()[:, 1].unique().tolist() == [7]
    assert streaks.sum((1, 2, 3)).tolist() == pytest.approx([1, 1])


def test_fractals_are_rougher_where_the_wobble_decays_slowly() -> None:
    def numbers(*shape: int) -> Tensor:
        calls.append(0)
        return uniform(0, len(calls), INDEX, 0, int(np.prod(shape))).view(4, *shape)

    roughness = []
    for decay in (1.4, 3.0):
        calls: list[int] = []
        noise = _fractal(numbers, 32, decay)
        assert noise.amin() == 0
        assert noise.amax() == 1
        assert not torch.allclose(noise[0], noise[1])
        roughness.append((noise[:, 1:] - noise[:, :-1]).abs().mean().item() / noise.std().item())
    assert roughness[0] > 2 * roughness[1]


def test_unknown_names_and_severities() -> None:
    with pytest.raises(UserError, match="did you mean frost"):
        corrupt(photographs(), "forst", 1, INDEX)
    for severity in (0, 6):
        with pytest.raises(UserError, match="from 1 to 5"):
            corrupt(photographs(), "fog", severity, INDEX)
