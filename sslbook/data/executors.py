"""Carry out a view: on one image, or on a batch with each sample's own parameters.

- `apply_one`: one image of any size, with torchvision's functions, in the processes that decode files;
- `apply_batch`: a batch of equal-sized images on the training device.

Both take their random parameters from `views.sample_params`. They therefore give the same image up to rounding, except
that a bicubic resize may differ visibly at sharp edges and in noise: Pillow clips its overshoots at 0 and 255 between
rows and columns, the batched executor only at the end.

Images have as many channels as the view's `mean`. Those of 8 bits come as uint8 and are scaled to 0..1, to which colors
are clamped; others come as float32 and stay as they are.

A crop with an antialiased resize is a linear function that separates into rows and columns, so the batched executor
writes it as two matrices per sample and two batched matrix products. Gaussian blur is treated alike.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int, UInt8
from torch import Tensor

from sslbook.data.images import FULL_SIZE, as_pil
from sslbook.data.views import ColorParams, CropParams, View, sample_params

_GRAY = (0.2989, 0.587, 0.114)  # ITU-R 601, with torchvision's digits


def _kernel_size(size: int) -> int:
    """A tenth of the image, odd, and at least 3 (but a reflected border must lie within the image)."""
    return min(max(3, size // 10 // 2 * 2 + 1), 2 * size - 1)


# One image ---------------------------------------------------------------------------------------------------------


def apply_one(
    view: View, image: Any, seed: int, epoch: int, index: int, stream: int
) -> Float[Tensor, "channels size size"]:
    """Augment one image with torchvision's functions, whose colors are red, green and blue; others as in a batch.

    Args:
        view: the augmentation.
        image: a PIL image in mode RGB or L, or a tensor `(channels, height, width)`.
        seed, epoch, index, stream: the key of the random numbers; `index` is the image's position, `stream` the view's.
    """
    from torchvision.transforms.v2 import functional as F

    image = as_pil(image)
    height, width = (torch.tensor([side]) for side in sides(image))
    crop, color = sample_params(view, seed, epoch, torch.tensor([index]), stream, height, width)
    x = crop_one(view, image, crop)
    if x.dtype != torch.uint8 or len(x) != 3:
        return color_batch(view, unit(x)[:, None], color, bounded=x.dtype == torch.uint8)[0]
    x = x.float() / 255
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


def sides(image: Any) -> tuple[int, int]:
    """Height and width of a tensor or a PIL image, before it was reduced."""
    if isinstance(image, Tensor):
        return tuple(image.shape[1:])
    return image.info.get(FULL_SIZE, (image.height, image.width))


def unit(x: Tensor) -> Tensor:
    """8 bits as numbers in [0, 1]; other values as they are."""
    return x.float().mul_(1 / 255) if x.dtype == torch.uint8 else x


def crop_one(view: View, image: Any, crop: CropParams) -> Tensor:
    """The geometric half of `apply_one`: crop, resize and flip one PIL image, or a tensor band by band."""
    from PIL import Image

    if isinstance(image, Tensor):
        return torch.stack([_crop_pil(view, Image.fromarray(band.numpy()), crop) for band in image])
    return _crop_pil(view, image, crop, "RGB" if len(view.mean) == 3 else "L")


def _crop_pil(view: View, image: Any, crop: CropParams, mode: str | None = None) -> Tensor:
    """One PIL image, cropped; `mode` is that of the result, without a channel axis if there is none."""
    from PIL import Image

    top, left, height, width = crop.box[0].tolist()
    grid_height, grid_width, y, x = crop.grid[0].tolist()
    size, resampling = view.size, Image.Resampling[view.interpolation.upper()]
    # The square that is kept, in the box's own pixels: only it is resized, however long the image is.
    scale_y, scale_x = height / grid_height, width / grid_width
    kept = (x * scale_x, y * scale_y, min((x + size) * scale_x, width), min((y + size) * scale_y, height))
    if FULL_SIZE in image.info:  # the box is not cut out: its sides need not be whole pixels of the reduced image
        per_y, per_x = (reduced / full for reduced, full in zip((image.height, image.width), sides(image)))
        there = [(start + side) * per for start, side, per in zip((left, top) * 2, kept, (per_x, per_y) * 2)]
        image = image.resize((size, size), resampling, box=tuple(map(min, there, image.size * 2)))
    else:
        if (top, left, height, width) != (0, 0, image.height, image.width):
            image = image.crop((left, top, left + width, top + height))
        if (grid_height, grid_width) != (height, width):
            image = image.resize((size, size), resampling, box=kept)
        elif (height, width) != (size, size):
            image = image.crop((x, y, x + size, y + size))
    if crop.flip[0]:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    pixels = torch.from_numpy(np.array(image if mode in (None, image.mode) else image.convert(mode)))
    return pixels if mode is None else pixels.view(size, size, -1).permute(2, 0, 1).contiguous()


# A batch -------------------------------------------------------------------------------------------------------------


def apply_batch(
    view: View,
    images: UInt8[Tensor, "batch channels height width"] | Float[Tensor, "batch channels height width"],
    seed: int,
    epoch: int,
    index: Int[Tensor, "batch"],
    stream: int,
) -> Float[Tensor, "batch out_channels size size"]:
    """Augment a batch of equal-sized images on their own device, each with its own parameters.

    Args:
        view: the augmentation.
        images: the images; one channel is taken as gray, unless the view has one too.
        seed, epoch, index, stream: the key of the random numbers; `index` is each image's position, `stream` the view's.
    """
    height, width = (torch.full((len(images),), side) for side in images.shape[2:])
    crop, color = sample_params(view, seed, epoch, index, stream, height, width)
    return color_batch(view, crop_batch(view, images, crop), color, bounded=images.dtype == torch.uint8)


def apply_color(
    view: View,
    crops: UInt8[Tensor, "batch channels size size"] | Float[Tensor, "batch channels size size"],
    seed: int,
    epoch: int,
    index: Int[Tensor, "batch"],
    stream: int,
) -> Float[Tensor, "batch channels size size"]:
    """The photometric half of `apply_batch`, for images that `crop_one` has cropped with the same key."""
    size = torch.full((len(crops),), view.size)  # the colors do not depend on it
    color = sample_params(view, seed, epoch, index, stream, size, size).color
    return color_batch(view, unit(crops.transpose(0, 1).contiguous()), color, bounded=crops.dtype == torch.uint8)


def crop_batch(
    view: View,
    images: UInt8[Tensor, "batch channels height width"] | Float[Tensor, "batch channels height width"],
    crop: CropParams,
) -> Float[Tensor, "out_channels batch size size"]:
    """Crop, resize and flip; 8 bits become values in [0, 1]; channels first, since the color steps work by channel."""
    batch, channels, height, width = images.shape
    size, bounded = view.size, images.dtype == torch.uint8
    if view.crop is None and view.resize in (None, size) and (height, width) == (size, size):
        x = images.transpose(0, 1).clone() if not bounded else images.transpose(0, 1).float().mul_(1 / 255)
        mirrored = crop.flip.nonzero()[:, 0].to(images.device)
        if len(mirrored):
            x.index_copy_(1, mirrored, x.index_select(1, mirrored).flip(-1))
        x = x.contiguous()
    else:
        flip = crop.flip[:, None].to(images.device)
        box, grid = (rows.to(images.device).float() for rows in (crop.box, crop.grid))
        no_flip = torch.zeros_like(flip)
        rows = _resampling(size, height, box[:, 0], box[:, 2], grid[:, 0], grid[:, 2], no_flip, view.interpolation)
        columns = _resampling(size, width, box[:, 1], box[:, 3], grid[:, 1], grid[:, 3], flip, view.interpolation)
        if bounded:
            rows.mul_(1 / 255)
        x = images.new_empty((channels, batch, size, size), dtype=torch.float32)
        for channel in range(channels):
            torch.bmm(torch.bmm(rows, images[:, channel].float()), columns.transpose(1, 2), out=x[channel])
        if view.interpolation == "bicubic" and bounded:
            x.clamp_(0, 1)  # its negative lobes overshoot
    return x.expand(3, -1, -1, -1).clone() if channels == 1 and len(view.mean) == 3 else x


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

    A row is the filter centered at the point of the source that the output pixel corresponds to, stretched where the
    image shrinks, truncated at the borders of the box and normalized: the antialiased resize of Pillow and torch.
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
    view: View, x: Float[Tensor, "channels batch size size"], color: ColorParams, bounded: bool = True
) -> Float[Tensor, "batch channels size size"]:
    """Color jitter, grayscale, blur, solarize, normalize; overwrites `x`.

    Saturation, hue and grayscale are of three channels, solarize is of values in [0, 1], to which brightness and
    contrast clamp where the images are `bounded`. `Data.adapted` leaves out what does not suit.
    """

    def change(which: Bool[Tensor, "batch"], function: Callable[..., Tensor], *parameters: Tensor) -> None:
        """Apply `function` to some samples, counted on the CPU, so that the device never waits."""
        few = which.nonzero()[:, 0]
        if len(few):
            few = few.to(x.device)
            made = function(x.index_select(1, few), *(values[few] for values in parameters))
            x.index_copy_(1, few, made.clamp_(0, 1) if bounded and function in _CLAMPED else made)

    if any(view.color_jitter) and view.color_jitter_p > 0:
        factors = color.factors.to(x.device)[:, :, None, None]
        for turn in range(4):  # each sample has its own order: the first step of all, then the second, ...
            for step, function in enumerate((_brightness, _contrast, _saturation, _hue)):
                if view.color_jitter[step] > 0:
                    change(color.jitter & (color.order[:, turn] == step), function, factors[:, step])
    if view.grayscale > 0:
        change(color.grayscale, lambda some: _gray(some).expand(3, -1, -1, -1))
    if view.blur > 0:
        change(color.blur, _gaussian_blur, color.sigma.to(x.device))
    if view.solarize > 0:
        change(color.solarize, lambda some: torch.minimum(some, 1 - some))  # above one half, 1 - x is the smaller

    result = x.new_empty((x.shape[1], len(x), *x.shape[2:]))
    for channel, (mean, std) in enumerate(zip(view.mean, view.std)):
        torch.sub(x[channel] * (1 / std), mean / std, out=result[:, channel])
    return result


def _gray(x: Float[Tensor, "3 n h w"]) -> Float[Tensor, "n h w"]:
    return (x[0] * _GRAY[0]).add_(x[1], alpha=_GRAY[1]).add_(x[2], alpha=_GRAY[2])


def _brightness(x: Float[Tensor, "channels n h w"], factor: Float[Tensor, "n 1 1"]) -> Float[Tensor, "channels n h w"]:
    return x.mul_(factor)


def _contrast(x: Float[Tensor, "channels n h w"], factor: Float[Tensor, "n 1 1"]) -> Float[Tensor, "channels n h w"]:
    weights = _GRAY if len(x) == 3 else [1 / len(x)] * len(x)
    mean = sum(weight * plane.mean((1, 2), keepdim=True) for weight, plane in zip(weights, x))
    return x.mul_(factor).add_(mean * (1 - factor))


def _saturation(x: Float[Tensor, "3 n h w"], factor: Float[Tensor, "n 1 1"]) -> Float[Tensor, "3 n h w"]:
    gray = _gray(x)
    return x.mul_(factor).add_(gray.mul_(1 - factor))


_CLAMPED = (_brightness, _contrast, _saturation)


def _hue(x: Float[Tensor, "3 n h w"], shift: Float[Tensor, "n 1 1"]) -> Float[Tensor, "3 n h w"]:
    """Rotate the hue by `shift` of a full circle.

    With the largest value V, the chroma C = V - smallest and the hue H in sixths of the circle, HSV leads back to RGB
    by V - C * clamp(2 - |d|, 0, 1), d being the distance of H from the channel's opposite hue (cyan, magenta, yellow).
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


def _gaussian_blur(
    x: Float[Tensor, "channels n size size"], sigma: Float[Tensor, "n"]
) -> Float[Tensor, "channels n size size"]:
    """Blur by a banded matrix for each sample: rows from the left, columns from the right, borders reflected."""
    size = x.shape[-1]
    half = _kernel_size(size) // 2
    offset = torch.arange(-half, half + 1, device=x.device)
    weight = torch.exp(-0.5 * (offset / sigma[:, None]) ** 2)
    weight = weight / weight.sum(1, keepdim=True)
    pixel = torch.arange(size, device=x.device)
    source = (pixel[:, None] + offset).abs()  # reflects at the first pixel ...
    source = (size - 1) - ((size - 1) - source).abs()  # ... and at the last
    hit = (source.T[:, :, None] == pixel).to(x.dtype)  # (offset, output, input)
    matrix = (weight @ hit.flatten(1)).unflatten(1, (size, size))
    for plane in x:
        torch.bmm(torch.bmm(matrix, plane), matrix.transpose(1, 2), out=plane)
    return x
