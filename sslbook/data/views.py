"""A view describes how an image is augmented; `executors` carries it out.

Augmentation is half of self-supervised learning, and the slow half. A `View` only says what is done to an image. Its
random parameters are sampled here, once for both executors, as a function of `(seed, epoch, index, stream)` alone.
"""

import math
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from sslbook.errors import UserError
from sslbook.rng import uniform

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

ATTEMPTS = 10  # at a random resized crop, as in torchvision
# Which uniform number decides what. The columns are fixed, so that a new field never changes the numbers of the others.
_FLIP, _JITTER_P, _GRAYSCALE, _BLUR, _SIGMA, _SOLARIZE = range(6)
_FACTORS = slice(6, 10)
_ORDER = slice(10, 14)
_TOP, _LEFT = 14, 15
_AREA = slice(16, 16 + ATTEMPTS)
_RATIO = slice(16 + ATTEMPTS, 16 + 2 * ATTEMPTS)
_COLUMNS = 16 + 2 * ATTEMPTS  # the next field starts here


@dataclass(frozen=True)
class View:
    """The augmentation of one view of an image: random crop, flip, color distortion, blur, normalization.

    The steps come in the order of the arguments: crop and resize, flip, color jitter, grayscale, blur, solarize,
    normalize (SimCLR, appendix A; solarize from BYOL, appendix B). In the authors' code of BEiT, BEiT v2, data2vec and
    W-MSE the color jitter comes before the crop, so that its contrast refers to the mean of the whole image, and in
    that of MoCo v1 grayscale comes before the jitter; here the order is the same for all methods.

    Args:
        size: side of the square result, in pixels.
        crop: range of the fraction of the image's area that a random crop keeps; null crops the center instead.
        ratio: range of the random crop's width divided by its height.
        resize: only without a random crop: the shorter side is brought to this length before the center is cropped;
            null means `size`.
        interpolation: filter of the resize; always antialiased.
        flip: probability of a horizontal flip.
        color_jitter: greatest change of brightness, contrast, saturation and hue, as in torchvision's ColorJitter.
        color_jitter_p: probability of the color jitter.
        grayscale: probability of conversion to grayscale.
        blur: probability of a Gaussian blur, whose kernel is a tenth of `size` (SimCLR, appendix A).
        blur_sigma: range of the blur kernel's standard deviation, in pixels.
        solarize: probability of inverting every value above one half.
        mean: subtracted from red, green and blue; of other images, from every channel.
        std: divides the channels afterwards.
    """

    size: int = 224
    crop: tuple[float, float] | None = (0.08, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    resize: int | None = None
    interpolation: Literal["bilinear", "bicubic"] = "bilinear"
    flip: float = 0.5
    color_jitter: tuple[float, float, float, float] = (0.0, 0.0, 0.0, 0.0)
    color_jitter_p: float = 0.8
    grayscale: float = 0.0
    blur: float = 0.0
    blur_sigma: tuple[float, float] = (0.1, 2.0)
    solarize: float = 0.0
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD

    def __post_init__(self) -> None:
        def require(fine: bool, field: str, rule: str) -> None:
            if not fine:
                raise UserError(f"view.{field} = {getattr(self, field)}: it must be {rule}")

        require(self.size >= 1, "size", "at least 1")
        if self.crop is not None:
            require(0 < self.crop[0] <= self.crop[1] <= 1, "crop", "an increasing pair between 0 and 1, or null")
            require(self.resize is None, "resize", "left out beside a random crop (set crop to null)")
        require(0 < self.ratio[0] <= self.ratio[1], "ratio", "an increasing pair of positive numbers")
        require(self.resize is None or self.resize >= self.size, "resize", f"at least size = {self.size}")
        require(min(self.color_jitter) >= 0 and self.color_jitter[3] <= 0.5, "color_jitter", "positive, hue <= 0.5")
        require(0 < self.blur_sigma[0] <= self.blur_sigma[1], "blur_sigma", "an increasing pair of positive numbers")
        require(min(self.std) > 0 and len(self.std) == len(self.mean), "std", "positive, as many numbers as mean has")
        require(self.interpolation in ("bilinear", "bicubic"), "interpolation", "bilinear or bicubic")
        for field in ("flip", "color_jitter_p", "grayscale", "blur", "solarize"):
            require(0 <= getattr(self, field) <= 1, field, "a probability, from 0 to 1")

    @staticmethod
    def center(
        size: int,
        resize: int | None = None,
        mean: tuple[float, ...] = IMAGENET_MEAN,
        std: tuple[float, ...] = IMAGENET_STD,
        interpolation: Literal["bilinear", "bicubic"] = "bilinear",
    ) -> "View":
        """The view for evaluation, without randomness: resize the shorter side, crop the center."""
        return View(size, crop=None, resize=resize, flip=0.0, mean=mean, std=std, interpolation=interpolation)


# -- presets: the views of the papers, where several methods share them -----------------------------------------------

SIMCLR = View(  # SimCLR, appendix A
    interpolation="bicubic", color_jitter=(0.8, 0.8, 0.8, 0.2), color_jitter_p=0.8, grayscale=0.2, blur=0.5
)
MOCO_V2 = View(crop=(0.2, 1.0), color_jitter=(0.4, 0.4, 0.4, 0.1), color_jitter_p=0.8, grayscale=0.2, blur=0.5)
BYOL_1 = View(  # BYOL, table 6: the two views differ in blur and solarization
    interpolation="bicubic", color_jitter=(0.4, 0.4, 0.2, 0.1), color_jitter_p=0.8, grayscale=0.2, blur=1.0
)
BYOL_2 = replace(BYOL_1, blur=0.1, solarize=0.2)
SWAV_GLOBAL = View(
    crop=(0.14, 1.0),
    color_jitter=(0.8, 0.8, 0.8, 0.2),
    color_jitter_p=0.8,
    grayscale=0.2,
    blur=0.5,
    std=(0.228, 0.224, 0.225),  # the authors' code has 0.228 for red
)
SWAV_LOCAL = replace(SWAV_GLOBAL, size=96, crop=(0.05, 0.14))
RANDOM_CROP = View(interpolation="bicubic")  # crop and flip alone
MAE_CROP = View(crop=(0.2, 1.0), interpolation="bicubic")
BEIT = View(interpolation="bicubic", color_jitter=(0.4, 0.4, 0.4, 0.0), color_jitter_p=1.0)


class CropParams(NamedTuple):
    """The geometric parameters: the image inside `box` is resized to `grid`, of which a square is kept."""

    box: Int[Tensor, "batch 4"]
    """top, left, height, width"""
    grid: Int[Tensor, "batch 4"]
    """height, width, and the top and left of the square that is kept"""
    flip: Bool[Tensor, "batch"]


class ColorParams(NamedTuple):
    """The photometric parameters."""

    jitter: Bool[Tensor, "batch"]
    factors: Float[Tensor, "batch 4"]
    """brightness, contrast, saturation, hue"""
    order: Int[Tensor, "batch 4"]
    """the order in which these four are applied"""
    grayscale: Bool[Tensor, "batch"]
    blur: Bool[Tensor, "batch"]
    sigma: Float[Tensor, "batch"]
    solarize: Bool[Tensor, "batch"]


class ViewParams(NamedTuple):
    """All random parameters of one view."""

    crop: CropParams
    color: ColorParams


def sample_params(
    view: View,
    seed: int,
    epoch: int,
    index: Int[Tensor, "batch"],
    stream: int,
    heights: Int[Tensor, "batch"],
    widths: Int[Tensor, "batch"],
) -> ViewParams:
    """All random parameters of `view` for the images `index` of the given sizes.

    They are computed on the CPU, in float64 where numbers are rounded to pixels, so that every device crops the same
    boxes.
    """
    u = uniform(seed, epoch, index.cpu(), stream, _COLUMNS)
    return ViewParams(_sample_crop(view, u, heights, widths), _sample_color(view, u))


def sample_crop(
    view: View,
    seed: int,
    epoch: int,
    index: Int[Tensor, "batch"],
    stream: int,
    heights: Int[Tensor, "batch"],
    widths: Int[Tensor, "batch"],
) -> CropParams:
    """The geometric half of `sample_params`."""
    return _sample_crop(view, uniform(seed, epoch, index.cpu(), stream, _COLUMNS), heights, widths)


def _sample_crop(
    view: View, u: Float[Tensor, "batch columns"], heights: Int[Tensor, "batch"], widths: Int[Tensor, "batch"]
) -> CropParams:
    flip = u[:, _FLIP] < view.flip
    if view.crop is None:
        short = torch.minimum(heights, widths)
        resize = view.resize or view.size
        grid = torch.stack([resize * heights // short, resize * widths // short], 1)
        offset = ((grid - view.size).double() / 2).round().long()
        zero = torch.zeros_like(heights)
        return CropParams(torch.stack([zero, zero, heights, widths], 1), torch.cat([grid, offset], 1), flip)

    # torchvision's RandomResizedCrop: area and ratio are sampled until the box fits, at most ten times.
    area_low, area_high = view.crop
    ratio_low, ratio_high = math.log(view.ratio[0]), math.log(view.ratio[1])
    area = (heights * widths)[:, None] * (area_low + (area_high - area_low) * u[:, _AREA].double())
    ratio = torch.exp(ratio_low + (ratio_high - ratio_low) * u[:, _RATIO].double())
    width, height = (area * ratio).sqrt().round().long(), (area / ratio).sqrt().round().long()
    fits = (width > 0) & (width <= widths[:, None]) & (height > 0) & (height <= heights[:, None])
    first = fits.int().argmax(1, keepdim=True)  # the first that fits
    width, height = width.gather(1, first)[:, 0], height.gather(1, first)[:, 0]
    top = (u[:, _TOP].double() * (heights - height + 1)).long()
    left = (u[:, _LEFT].double() * (widths - width + 1)).long()

    found = fits.any(1)
    if not found.all():  # the largest box of an allowed ratio, in the center
        w = torch.minimum(widths, (heights * view.ratio[1]).double().round().long()).clamp(min=1)
        h = torch.minimum(heights, (widths / view.ratio[0]).double().round().long()).clamp(min=1)
        height, width = torch.where(found, height, h), torch.where(found, width, w)
        top = torch.where(found, top, (heights - h) // 2)
        left = torch.where(found, left, (widths - w) // 2)
    size, zero = torch.full_like(top, view.size), torch.zeros_like(top)
    return CropParams(torch.stack([top, left, height, width], 1), torch.stack([size, size, zero, zero], 1), flip)


def _sample_color(view: View, u: Float[Tensor, "batch columns"]) -> ColorParams:
    amount = torch.tensor(view.color_jitter)
    low = torch.cat([(1 - amount[:3]).clamp(min=0), -amount[3:]])
    high = torch.cat([1 + amount[:3], amount[3:]])
    sigma_low, sigma_high = view.blur_sigma
    return ColorParams(
        jitter=(u[:, _JITTER_P] < view.color_jitter_p) & bool(amount.any()),
        factors=low + (high - low) * u[:, _FACTORS],
        order=u[:, _ORDER].argsort(dim=1, stable=True),
        grayscale=u[:, _GRAYSCALE] < view.grayscale,
        blur=u[:, _BLUR] < view.blur,
        sigma=sigma_low + (sigma_high - sigma_low) * u[:, _SIGMA],
        solarize=u[:, _SOLARIZE] < view.solarize,
    )
