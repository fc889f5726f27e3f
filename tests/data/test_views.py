"""A view is one description, which both executors carry out with the same random parameters."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

from sslbook.data.executors import apply_batch, apply_color, apply_one, crop_one
from sslbook.data.views import View, sample_params
from sslbook.errors import UserError

PLAIN = {"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)}
STRONG = {"color_jitter": (0.8, 0.8, 0.8, 0.2), "grayscale": 0.2, "blur": 0.5, "solarize": 0.3}


def photographs(count: int, height: int, width: int) -> Tensor:
    """Smooth colors with some grain."""
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(count, 3, max(2, height // 8), max(2, width // 8), generator=generator)
    smooth = torch.nn.functional.interpolate(coarse, size=(height, width), mode="bilinear")
    grain = torch.rand(count, 3, height, width, generator=generator)
    return ((0.9 * smooth + 0.1 * grain) * 255).round().byte()


def sizes(count: int, height: int, width: int) -> tuple[Tensor, Tensor]:
    return torch.full((count,), height), torch.full((count,), width)


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize("shape", [(32, 32), (20, 25), (110, 90), (30, 300)], ids=str)
@pytest.mark.parametrize(
    "geometry", [{}, {"crop": None}, {"crop": None, "resize": 37}], ids=["crop", "center", "resize"]
)
def test_both_executors_give_the_same_image(interpolation, shape, geometry) -> None:
    view = View(size=32, interpolation=interpolation, **geometry, **PLAIN)
    images, index = photographs(12, *shape), torch.arange(12) + 5
    batched = apply_batch(view, images, 3, 2, index, 1)
    single = torch.stack([apply_one(view, image, 3, 2, int(i), 1) for image, i in zip(images, index)])
    assert batched.shape == (12, 3, 32, 32)
    # Pillow rounds to bytes after the columns and again after the rows.
    assert (batched - single).abs().max() * 255 < 1.6
    assert (batched - single).abs().mean() * 255 < 0.4


def test_both_executors_give_the_same_colors() -> None:
    """At the images' own size there is no rounding, so colors must agree to the last digits of a float."""
    view = View(size=32, crop=None, **STRONG)
    images, index = photographs(64, 32, 32), torch.arange(64)
    images[:4] = 0  # black, white and gray have no hue
    images[4:8] = 255
    images[8:12] = 128
    batched = apply_batch(view, images, 0, 0, index, 0)
    single = torch.stack([apply_one(view, image, 0, 0, int(i), 0) for image, i in zip(images, index)])
    torch.testing.assert_close(batched, single, atol=2e-4, rtol=0)


def test_cropping_then_coloring_equals_apply_one() -> None:
    view = View(size=24, **STRONG)
    images, index = photographs(16, 40, 50), torch.arange(16)
    crops = []
    for image, i in zip(images, index):
        params = sample_params(view, 1, 2, i[None], 3, *sizes(1, 40, 50))
        crops.append(crop_one(view, v2.functional.to_pil_image(image), params.crop))
    finished = apply_color(view, torch.stack(crops), 1, 2, index, 3)
    single = torch.stack([apply_one(view, image, 1, 2, int(i), 3) for image, i in zip(images, index)])
    torch.testing.assert_close(finished, single, atol=2e-4, rtol=0)


@pytest.mark.parametrize("shape", [(32, 32), (60, 45), (300, 40)], ids=str)
def test_center_equals_torchvision(shape) -> None:
    image = photographs(1, *shape)
    expected = F.center_crop(F.resize(image.float() / 255, 40, antialias=True), [32, 32])
    made = apply_batch(View.center(32, 40, **PLAIN), image, 0, 0, torch.tensor([0]), 0)
    torch.testing.assert_close(made, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_crop_equals_torchvision(interpolation) -> None:
    view = View(size=32, interpolation=interpolation, flip=0.0, **PLAIN)
    images, index = photographs(8, 70, 50), torch.arange(8)
    boxes = sample_params(view, 0, 0, index, 0, *sizes(8, 70, 50)).crop.box.tolist()
    mode = v2.InterpolationMode(interpolation)
    expected = [
        F.resized_crop(image.float() / 255, *box, [32, 32], interpolation=mode, antialias=True).clamp(0, 1)
        for image, box in zip(images, boxes)
    ]
    torch.testing.assert_close(apply_batch(view, images, 0, 0, index, 0), torch.stack(expected), atol=1e-4, rtol=0)


@pytest.mark.parametrize(("interpolation", "contrast"), [("bilinear", 256), ("bicubic", 128)])
def test_both_executors_agree_on_noise_without_overshoot(interpolation, contrast) -> None:
    noise = torch.randint(0, contrast, (4, 3, 64, 64), generator=torch.Generator().manual_seed(0)) + 128 - contrast // 2
    images, index = noise.byte(), torch.arange(4)
    view = View(size=32, interpolation=interpolation, **PLAIN)
    batch = apply_batch(view, images, 0, 0, index, 0)
    single = [apply_one(view, v2.functional.to_pil_image(image), 0, 0, i, 0) for i, image in enumerate(images)]
    torch.testing.assert_close(batch, torch.stack(single), atol=2 / 255, rtol=0)  # Pillow rounds twice


def distance(ours: Tensor, theirs: Tensor) -> float:
    """Kolmogorov-Smirnov: the greatest gap between two empirical distributions."""
    points = torch.cat([ours, theirs]).unique()
    parts = [torch.searchsorted(x.sort().values, points, right=True) / len(x) for x in (ours, theirs)]
    return (parts[0] - parts[1]).abs().max().item()


@pytest.mark.parametrize("shape", [(64, 64), (50, 80), (20, 200)], ids=str)
def test_distribution_of_boxes_equals_torchvision(shape) -> None:
    count = 4000
    view = View(size=32, crop=(0.2, 0.9))
    ours = sample_params(view, 0, 0, torch.arange(count), 0, *sizes(count, *shape)).crop.box
    image = torch.empty(3, *shape)
    torch.manual_seed(0)
    crop = v2.RandomResizedCrop(32, scale=(0.2, 0.9))
    theirs = torch.tensor([list(crop.make_params([image]).values()) for _ in range(count)])
    assert ours[:, :2].min() >= 0
    assert (ours[:, 0] + ours[:, 2]).max() <= shape[0]
    assert (ours[:, 1] + ours[:, 3]).max() <= shape[1]
    for column in range(4):  # 2 sqrt(2 / count) = 0.045 happens at random once in a thousand
        assert distance(ours[:, column].float(), theirs[:, column].float()) < 0.045


def test_distribution_of_color_factors_equals_torchvision() -> None:
    count, amounts = 4000, (0.4, 0.6, 1.5, 0.1)
    view = View(color_jitter=amounts, color_jitter_p=0.7)
    ours = sample_params(view, 0, 0, torch.arange(count), 0, *sizes(count, 9, 9)).color
    torch.manual_seed(0)
    jitter = v2.ColorJitter(*amounts)
    sampled = [jitter.make_params([]) for _ in range(count)]
    names = ("brightness_factor", "contrast_factor", "saturation_factor", "hue_factor")
    for step, name in enumerate(names):
        theirs = torch.tensor([float(one[name]) for one in sampled])
        assert distance(ours.factors[:, step], theirs) < 0.045
    assert abs(ours.jitter.float().mean().item() - 0.7) < 0.03
    orders = ours.order @ torch.tensor([1000, 100, 10, 1])
    counts = orders.unique(return_counts=True)[1]
    assert len(counts) == 24
    assert counts.min() > 100  # of 167 expected


def test_probabilities() -> None:
    count = 20000
    view = View(flip=0.3, grayscale=0.2, blur=0.6, solarize=0.1, blur_sigma=(0.5, 1.5))
    crop, color = sample_params(view, 1, 0, torch.arange(count), 0, *sizes(count, 32, 32))
    for mask, expected in ((crop.flip, 0.3), (color.grayscale, 0.2), (color.blur, 0.6), (color.solarize, 0.1)):
        assert abs(mask.float().mean().item() - expected) < 0.015
    assert not color.jitter.any()
    assert 0.5 <= color.sigma.min() < 0.51
    assert 1.49 < color.sigma.max() <= 1.5


def test_view_depends_on_its_key_alone() -> None:
    view = View(size=16, **STRONG)
    images = photographs(12, 16, 16)
    index = torch.arange(12)
    whole = apply_batch(view, images, 0, 0, index, 0)
    order = torch.tensor([7, 2, 11])
    assert torch.equal(apply_batch(view, images[order], 0, 0, order, 0), whole[order])
    for other in ((1, 0, index, 0), (0, 1, index, 0), (0, 0, index, 1), (0, 0, index + 12, 0)):
        assert not torch.equal(apply_batch(view, images, *other), whole)


def test_other_fields_do_not_change_the_crop() -> None:
    view = View(size=16)
    more = replace(view, **STRONG)
    index = torch.arange(50)
    assert torch.equal(
        sample_params(view, 0, 0, index, 0, *sizes(50, 20, 20)).crop.box,
        sample_params(more, 0, 0, index, 0, *sizes(50, 20, 20)).crop.box,
    )


def test_stored_parameters() -> None:
    """A resumed run, and a figure printed in the book, rely on it."""
    view = View(size=16, **STRONG)
    crop, color = sample_params(view, 0, 0, torch.arange(3), 0, *sizes(3, 40, 60))
    assert crop.box.tolist() == [[3, 23, 31, 28], [4, 14, 20, 23], [16, 26, 20, 18]]
    assert color.order.tolist() == [[2, 1, 0, 3], [3, 2, 1, 0], [2, 3, 0, 1]]


def test_input_is_unchanged_and_gray_becomes_three_channels() -> None:
    view = View(size=16, **STRONG)
    images = photographs(8, 16, 16)
    before = images.clone()
    apply_batch(view, images, 0, 0, torch.arange(8), 0)
    apply_batch(View.center(16), images, 0, 0, torch.arange(8), 0)
    assert torch.equal(images, before)
    gray = images[:, :1]
    expanded = apply_batch(view, gray.expand(-1, 3, -1, -1).contiguous(), 0, 0, torch.arange(8), 0)
    torch.testing.assert_close(apply_batch(view, gray, 0, 0, torch.arange(8), 0), expanded)


def test_normalize() -> None:
    view = View.center(4, mean=(0.1, 0.2, 0.3), std=(0.5, 0.6, 0.7))
    made = apply_batch(view, torch.full((1, 3, 4, 4), 255, dtype=torch.uint8), 0, 0, torch.tensor([0]), 0)
    expected = torch.tensor([0.9 / 0.5, 0.8 / 0.6, 0.7 / 0.7])
    torch.testing.assert_close(made[0, :, 2, 2], expected)


@pytest.mark.parametrize("shape", [(1, 1), (1, 50), (500, 2)], ids=str)
def test_odd_shapes(shape) -> None:
    for view in (View(size=12, **STRONG), View.center(12, 14)):
        images = photographs(3, *shape)
        batched = apply_batch(view, images, 0, 0, torch.arange(3), 0)
        single = torch.stack([apply_one(view, image, 0, 0, i, 0) for i, image in enumerate(images)])
        assert batched.isfinite().all()
        assert (batched - single).abs().max() < 0.2


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("size", 0),
        ("crop", (0.9, 0.2)),
        ("ratio", (0.0, 1.0)),
        ("resize", 300),
        ("flip", 1.5),
        ("color_jitter", (0.1, 0.1, 0.1, 0.6)),
        ("blur_sigma", (0.0, 1.0)),
        ("std", (0.0, 1.0, 1.0)),
    ],
)
def test_rejects_invalid_fields(field, value) -> None:
    with pytest.raises(UserError, match=f"view.{field} = "):
        View(**{field: value})


def test_decisions_about_an_image_are_independent() -> None:
    view = View(flip=0.5, color_jitter=(0.4, 0.4, 0.4, 0.1), color_jitter_p=0.5, grayscale=0.5, blur=0.5, solarize=0.5)
    n = 4000
    crop, color = sample_params(view, 0, 0, torch.arange(n), 0, torch.full((n,), 40), torch.full((n,), 50))
    decided = [crop.flip, color.jitter, color.grayscale, color.blur, color.solarize]
    values = [*decided, *color.factors.T, color.sigma]
    correlation = torch.corrcoef(torch.stack([value.float() for value in values]))
    assert (correlation - torch.eye(len(values))).abs().max() < 0.08  # five standard deviations


@pytest.mark.parametrize(("size", "width"), [(16, 3), (40, 5), (100, 11)])
def test_the_blur_is_a_gaussian_as_wide_as_a_tenth_of_the_image(size: int, width: int) -> None:
    """SimCLR, appendix A. One white pixel becomes the kernel itself."""
    view = View(size, crop=None, flip=0.0, blur=1.0, blur_sigma=(1.5, 1.5), **PLAIN)
    image = torch.zeros(1, 3, size, size, dtype=torch.uint8)
    image[:, :, size // 2, size // 2] = 255
    offset = torch.arange(size) - size // 2
    weight = torch.exp(-(offset**2) / (2 * 1.5**2)) * (offset.abs() <= width // 2)
    kernel = torch.outer(weight, weight) / weight.sum() ** 2
    batch = apply_batch(view, image, 0, 0, torch.tensor([0]), 0)[0]
    single = apply_one(view, F.to_pil_image(image[0]), 0, 0, 0, 0)
    for blurred in (batch, single):
        torch.testing.assert_close(blurred, kernel.expand(3, -1, -1), rtol=0, atol=1e-5)
