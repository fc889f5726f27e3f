"""A view is a description, not code.

Augmentation is half of self-supervised learning, and the slow half. A `View` only says what is done to an image; two
executors do it:

- `apply_one`: one image of any size, with torchvision's functions, in the processes that decode files;
- `apply_batch`: a whole batch of equal-sized images on the training device, every sample with its own parameters.

Both read their chance from one `draw`, which depends on `(seed, epoch, index, stream)` alone. They therefore give the
same image up to rounding, except that a bicubic resize may differ visibly at sharp edges and in noise: Pillow cuts
its overshoots off at 0 and 255 between rows and columns, the batched executor only at the end.

A crop with an antialiased resize is a linear layer that separates into rows and columns, so the batched executor writes
it as two matrices per sample and two batched matrix products; Gaussian blur is treated alike.
"""

import math
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Bool, Float, Int, UInt8
from torch import Tensor

from sslbook.errors import UserError
from sslbook.rng import uniform

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

ATTEMPTS = 10  # at a random resized crop, as in torchvision
# Which uniform number decides what. The columns are fixed, so that a new field never shifts the draws of the old ones.
_FLIP, _JITTER_P, _GRAYSCALE, _BLUR, _SIGMA, _SOLARIZE = range(6)
_FACTORS = slice(6, 10)
_ORDER = slice(10, 14)
_TOP, _LEFT = 14, 15
_AREA = slice(16, 16 + ATTEMPTS)
_RATIO = slice(16 + ATTEMPTS, 16 + 2 * ATTEMPTS)
_COLUMNS = 16 + 2 * ATTEMPTS  # the next field starts here

_BRIGHTNESS, _CONTRAST, _SATURATION, _HUE = range(4)
_GRAY = (0.2989, 0.587, 0.114)  # ITU-R 601, with torchvision's digits


@dataclass(frozen=True)
class View:
    """What an image becomes before a network sees it.

    The steps come in the order of the arguments: crop and resize, flip, color jitter, grayscale, blur, solarize,
    normalize (SimCLR, appendix A; solarize from BYOL, appendix B).

    Args:
        size: side of the square result, in pixels.
        crop: range of the part of the image's area that a random crop keeps; null cuts the center instead.
        ratio: range of the random crop's width divided by its height.
        resize: only without a random crop: the shorter side is brought to this length before the center is cut;
            null means `size`.
        interpolation: filter of the resize; always antialiased.
        flip: probability of a mirror image.
        color_jitter: greatest change of brightness, contrast, saturation and hue, as in torchvision's ColorJitter.
        color_jitter_p: probability of the color jitter.
        grayscale: probability of losing all color.
        blur: probability of a Gaussian blur, whose kernel is a tenth of `size` (SimCLR, appendix A).
        blur_sigma: range of the blur's standard deviation, in pixels.
        solarize: probability of inverting every value above one half.
        mean: subtracted from red, green and blue.
        std: divides red, green and blue afterwards.
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
    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD

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
        require(min(self.std) > 0, "std", "positive")
        require(self.interpolation in ("bilinear", "bicubic"), "interpolation", "bilinear or bicubic")
        for field in ("flip", "color_jitter_p", "grayscale", "blur", "solarize"):
            require(0 <= getattr(self, field) <= 1, field, "a probability, from 0 to 1")

    @staticmethod
    def center(
        size: int,
        resize: int | None = None,
        mean: tuple[float, float, float] = IMAGENET_MEAN,
        std: tuple[float, float, float] = IMAGENET_STD,
        interpolation: Literal["bilinear", "bicubic"] = "bilinear",
    ) -> "View":
        """The view for evaluation, without any chance: resize the shorter side, cut the center."""
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
    """Where the pixels come from: the image inside `box` is resized to `grid`, of which a square is kept."""

    box: Int[Tensor, "batch 4"]
    """top, left, height, width"""
    grid: Int[Tensor, "batch 4"]
    """height, width, and the top and left of the square that is kept"""
    flip: Bool[Tensor, "batch"]


class ColorParams(NamedTuple):
    """What happens to the values."""

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
    """All the chance of one view."""

    cut: CropParams
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
    """All the chance of `view` for the images `index` of the given sizes.

    It is made on the CPU, in float64 where numbers are rounded to pixels, so that every device cuts the same boxes.
    """
    u = uniform(seed, epoch, index.cpu(), stream, _COLUMNS)
    return ViewParams(_sample_crop(view, u, heights, widths), _sample_color(view, u))


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

    # torchvision's RandomResizedCrop: draw area and ratio until the box fits, at most ten times.
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


def _kernel_size(size: int) -> int:
    """A tenth of the image, odd, and at least 3 (but a reflected border must lie within the image)."""
    return min(max(3, size // 10 // 2 * 2 + 1), 2 * size - 1)


# One image ---------------------------------------------------------------------------------------------------------


def apply_one(view: View, image: Any, seed: int, epoch: int, index: int, stream: int) -> Float[Tensor, "3 size size"]:
    """Executor 1: one image, with torchvision's functions.

    Args:
        view: what is to be done.
        image: a PIL image in mode RGB or L, or a uint8 tensor `(channels, height, width)`.
        seed: first part of the key.
        epoch: second part of the key.
        index: third part of the key: which image this is.
        stream: last part of the key: which view of the image this is.
    """
    from torchvision.transforms.v2 import functional as F

    image = as_pil(image)
    chance = sample_params_one(view, seed, epoch, index, stream, image.height, image.width)
    x = crop_one(view, image, chance.cut).float() / 255
    color = chance.color
    if color.jitter[0]:
        factors = color.factors[0].tolist()
        steps = (F.adjust_brightness, F.adjust_contrast, F.adjust_saturation, F.adjust_hue)
        for step in color.order[0].tolist():
            if view.color_jitter[step] > 0:
                x = steps[step](x, factors[step])
    if color.grayscale[0]:
        x = F.rgb_to_grayscale(x, num_output_channels=3)
    if color.blur[0]:
        x = F.gaussian_blur(x, [_kernel_size(view.size)] * 2, [color.sigma[0].item()] * 2)
    if color.solarize[0]:
        x = F.solarize(x, 0.5)
    return F.normalize(x, list(view.mean), list(view.std))


def sample_params_one(
    view: View, seed: int, epoch: int, index: int, stream: int, height: int, width: int
) -> ViewParams:
    """`draw` for one image."""
    return sample_params(
        view, seed, epoch, torch.tensor([index]), stream, torch.tensor([height]), torch.tensor([width])
    )


def crop_one(view: View, image: Any, cut: CropParams) -> UInt8[Tensor, "3 size size"]:
    """The geometric part of executor 1: crop, resize and flip one PIL image."""
    import numpy as np
    from PIL import Image

    filters = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}
    top, left, height, width = cut.box[0].tolist()
    grid_height, grid_width, y, x = cut.grid[0].tolist()
    size = view.size
    if (top, left, height, width) != (0, 0, image.height, image.width):
        image = image.crop((left, top, left + width, top + height))
    if (grid_height, grid_width) != (height, width):
        # The part that is kept, in the image's own pixels: only it is computed, however long the image is.
        scale_y, scale_x = height / grid_height, width / grid_width
        part = (x * scale_x, y * scale_y, min((x + size) * scale_x, width), min((y + size) * scale_y, height))
        image = image.resize((size, size), filters[view.interpolation], box=part)
    elif (height, width) != (size, size):
        image = image.crop((x, y, x + size, y + size))
    if cut.flip[0]:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    pixels = torch.from_numpy(np.array(image.convert("RGB")))
    return pixels.permute(2, 0, 1).contiguous()


def as_pil(image: Any) -> Any:
    """A uint8 tensor as a PIL image; a PIL image as it is."""
    from PIL import Image

    if isinstance(image, Tensor):
        array = image.cpu().numpy()
        return Image.fromarray(array[0] if len(array) == 1 else array.transpose(1, 2, 0).copy())
    return image


# A batch -------------------------------------------------------------------------------------------------------------


def apply_batch(
    view: View,
    images: UInt8[Tensor, "batch channels height width"],
    seed: int,
    epoch: int,
    index: Int[Tensor, "batch"],
    stream: int,
) -> Float[Tensor, "batch 3 size size"]:
    """Executor 2: a batch of equal-sized images on their own device, each with its own parameters.

    Args:
        view: what is to be done.
        images: the images; one channel is taken as gray.
        seed: first part of the key.
        epoch: second part of the key.
        index: third part of the key: which images these are.
        stream: last part of the key: which view of the images this is.
    """
    height, width = (torch.full((len(images),), side) for side in images.shape[2:])
    chance = sample_params(view, seed, epoch, index, stream, height, width)
    return color_batch(view, crop_batch(view, images, chance.cut), chance.color)


def apply_color(
    view: View,
    cuts: UInt8[Tensor, "batch 3 size size"],
    seed: int,
    epoch: int,
    index: Int[Tensor, "batch"],
    stream: int,
) -> Float[Tensor, "batch 3 size size"]:
    """The second half of executor 2, for images that `cut_one` has already cut with the same key."""
    color = _sample_color(view, uniform(seed, epoch, index.cpu(), stream, _COLUMNS))
    return color_batch(view, cuts.transpose(0, 1).contiguous().float().mul_(1 / 255), color)


def crop_batch(
    view: View, images: UInt8[Tensor, "batch channels height width"], cut: CropParams
) -> Float[Tensor, "3 batch size size"]:
    """Crop, resize and flip; returns values in [0, 1], color planes first, since the color steps work by plane."""
    batch, channels, height, width = images.shape
    size = view.size
    if view.crop is None and view.resize in (None, size) and (height, width) == (size, size):
        x = images.transpose(0, 1).float().mul_(1 / 255)
        mirrored = cut.flip.nonzero()[:, 0].to(images.device)
        if len(mirrored):
            x.index_copy_(1, mirrored, x.index_select(1, mirrored).flip(-1))
        x = x.contiguous()
    else:
        flip = cut.flip[:, None].to(images.device)
        box, grid = (part.to(images.device).float() for part in (cut.box, cut.grid))
        no_flip = torch.zeros_like(flip)
        rows = _resampling(size, height, box[:, 0], box[:, 2], grid[:, 0], grid[:, 2], no_flip, view.interpolation)
        columns = _resampling(size, width, box[:, 1], box[:, 3], grid[:, 1], grid[:, 3], flip, view.interpolation)
        rows = rows.mul_(1 / 255)
        columns = columns.transpose(1, 2)
        x = images.new_empty((channels, batch, size, size), dtype=torch.float32)
        for channel in range(channels):
            torch.bmm(torch.bmm(rows, images[:, channel].float()), columns, out=x[channel])
        if view.interpolation == "bicubic":
            x.clamp_(0, 1)  # its negative lobes overshoot
    return x.expand(3, -1, -1, -1).clone() if channels == 1 else x


def _resampling(
    size: int,
    source: int,
    start: Float[Tensor, "batch"],
    length: Float[Tensor, "batch"],
    grid: Float[Tensor, "batch"],
    offset: Float[Tensor, "batch"],
    flip: Bool[Tensor, "batch 1"],
    interpolation: str,
) -> Float[Tensor, "batch {size} {source}"]:
    """For every sample the matrix that resizes `[start, start + length)` to `grid` and keeps `size` from `offset`.

    A row is the filter laid around the point of the source that the output pixel falls on, stretched where the
    image shrinks, cut at the borders of the box and normalized: the antialiased resize of Pillow and torch.
    """
    scale = (length / grid)[:, None]
    stretch = scale.clamp(min=1)
    output = torch.arange(size, device=start.device) + 0.5
    output = torch.where(flip, size - output, output)
    center = start[:, None] + (output + offset[:, None]) * scale
    pixel = torch.arange(source, device=start.device) + 0.5
    x = (center / stretch)[:, :, None] - (pixel / stretch)[:, None, :]
    x = x.abs_()
    if interpolation == "bilinear":
        weight = x.neg_().add_(1).clamp_(min=0)
    else:  # Keys' cubic with a = -1/2
        near = (1.5 * x - 2.5) * x * x + 1
        far = ((-0.5 * x + 2.5) * x - 4) * x + 2
        weight = torch.where(x < 1, near, torch.where(x < 2, far, 0.0))
    inside = (pixel >= start[:, None]) & (pixel < (start + length)[:, None])
    weight = weight.mul_(inside[:, None, :])
    return weight.div_(weight.sum(2, keepdim=True))


def color_batch(
    view: View, x: Float[Tensor, "3 batch size size"], color: ColorParams
) -> Float[Tensor, "batch 3 size size"]:
    """Color jitter, grayscale, blur, solarize, normalize; overwrites `x`."""

    def chosen(mask: Bool[Tensor, "batch"]) -> Int[Tensor, "few"]:
        return mask.nonzero()[:, 0]  # on the CPU, where chance is made: the device never waits to count

    if any(view.color_jitter) and view.color_jitter_p > 0:
        factors = color.factors.to(x.device)
        for place in range(4):  # each sample has its own order: the first step of all, then the second, ...
            for step, change in enumerate((_brightness, _contrast, _saturation, _hue)):
                few = chosen(color.jitter & (color.order[:, place] == step))
                if view.color_jitter[step] > 0 and len(few):
                    few = few.to(x.device)
                    x.index_copy_(1, few, change(x.index_select(1, few), factors[few, step, None, None]))
    if view.grayscale > 0 and len(few := chosen(color.grayscale)):
        few = few.to(x.device)
        x.index_copy_(1, few, _gray(x.index_select(1, few)).expand(3, -1, -1, -1))
    if view.blur > 0 and len(few := chosen(color.blur)):
        sigma, few = color.sigma[few].to(x.device), few.to(x.device)
        x.index_copy_(1, few, _gaussian_blur(x.index_select(1, few), sigma))
    if view.solarize > 0 and len(few := chosen(color.solarize)):
        few = few.to(x.device)
        part = x.index_select(1, few)
        x.index_copy_(1, few, torch.minimum(part, 1 - part))  # above one half, 1 - x is the smaller

    result = x.new_empty((x.shape[1], 3, *x.shape[2:]))
    for channel, (mean, std) in enumerate(zip(view.mean, view.std)):
        torch.sub(x[channel] * (1 / std), mean / std, out=result[:, channel])
    return result


def _gray(x: Float[Tensor, "3 n h w"]) -> Float[Tensor, "n h w"]:
    return (x[0] * _GRAY[0]).add_(x[1], alpha=_GRAY[1]).add_(x[2], alpha=_GRAY[2])


def _brightness(x: Float[Tensor, "3 n h w"], factor: Float[Tensor, "n 1 1"]) -> Float[Tensor, "3 n h w"]:
    return x.mul_(factor).clamp_(0, 1)


def _contrast(x: Float[Tensor, "3 n h w"], factor: Float[Tensor, "n 1 1"]) -> Float[Tensor, "3 n h w"]:
    mean = sum(weight * plane.mean((1, 2), keepdim=True) for weight, plane in zip(_GRAY, x))
    return x.mul_(factor).add_(mean * (1 - factor)).clamp_(0, 1)


def _saturation(x: Float[Tensor, "3 n h w"], factor: Float[Tensor, "n 1 1"]) -> Float[Tensor, "3 n h w"]:
    gray = _gray(x)
    return x.mul_(factor).add_(gray.mul_(1 - factor)).clamp_(0, 1)


def _hue(x: Float[Tensor, "3 n h w"], shift: Float[Tensor, "n 1 1"]) -> Float[Tensor, "3 n h w"]:
    """Turn the hue by `shift` of a full circle.

    With the largest value V, the chroma C = V - smallest and the hue H in sixths of the circle, HSV leads back to RGB
    by V - C * clamp(2 - |d|, 0, 1), d being how far H stands from the channel's opposite hue (cyan, magenta, yellow).
    """
    red, green, blue = x
    value = torch.maximum(torch.maximum(red, green), blue)
    chroma = value - torch.minimum(torch.minimum(red, green), blue)
    scale = 1 / chroma.clamp(min=1e-12)  # a gray pixel has chroma 0 and keeps its value, whatever its hue
    hue = torch.where(
        value == red,
        (green - blue) * scale,
        torch.where(value == green, (blue - red) * scale + 2, (red - green) * scale + 4),
    )
    hue = hue + 6 * shift
    for channel, opposite in enumerate((3.0, 5.0, 1.0)):
        distance = hue - opposite
        distance = distance.sub_((distance / 6).round_().mul_(6)).abs_()
        torch.addcmul(value, distance.neg_().add_(2).clamp_(0, 1), chroma, value=-1, out=x[channel])
    return x


def _gaussian_blur(x: Float[Tensor, "3 n size size"], sigma: Float[Tensor, "n"]) -> Float[Tensor, "3 n size size"]:
    """Blur by a banded matrix for each sample: rows from the left, columns from the right, borders reflected."""
    size = x.shape[-1]
    half = _kernel_size(size) // 2
    offset = torch.arange(-half, half + 1, device=x.device)
    weight = torch.exp(-0.5 * (offset / sigma[:, None]) ** 2)
    weight = weight / weight.sum(1, keepdim=True)
    place = torch.arange(size, device=x.device)
    source = (place[:, None] + offset).abs()  # reflects at the first pixel ...
    source = (size - 1) - ((size - 1) - source).abs()  # ... and at the last
    hit = (source.T[:, :, None] == place).to(x.dtype)  # (offset, output, input)
    matrix = (weight @ hit.flatten(1)).unflatten(1, (size, size))
    for plane in x:
        torch.bmm(torch.bmm(matrix, plane), matrix.transpose(1, 2), out=plane)
    return x
