"""Read any image file, and bring any image to RGB with 8 bits a channel."""

import contextlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import UInt8
from torch import Tensor

from sslbook.errors import UserError

EXTENSIONS = (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm")


class UnreadableImage(UserError):
    """A file or item that is missing, corrupt, truncated or no image; the message names it and says why."""

    def __init__(self, name: str, reason: str) -> None:
        super().__init__(f"cannot read the image {name} ({reason}): mend or remove it")
        self.name = name
        self.reason = reason


def open_image(path: str | Path) -> Any:
    """An image file as an upright PIL image in mode RGB.

    Transparent images are composed on white. Gray of 16 bits is scaled to 8 bits, not clipped. Of an animation the
    first frame is read. The orientation that a camera stored (EXIF) is applied.

    Raises:
        UnreadableImage: the file is missing, corrupt, truncated or no image.
    """
    from PIL import Image, ImageOps

    try:
        with Image.open(path) as image:
            image.load()
            with contextlib.suppress(Exception):  # corrupt metadata does not make the pixels unreadable
                ImageOps.exif_transpose(image, in_place=True)
            return to_rgb(image)
    except Exception as error:  # decoders raise nearly everything: OSError, SyntaxError, struct.error, ...
        lines = str(error).splitlines()
        reason = lines[0].replace(f": {str(path)!r}", "").replace(f"image file {str(path)!r}", "it") if lines else ""
        raise UnreadableImage(str(path), reason or type(error).__name__) from error


def to_rgb(image: Any) -> Any:
    """A PIL image of any mode in mode RGB."""
    from PIL import Image

    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        return Image.fromarray(_to_bytes(np.asarray(image), _gray_ranges(image))).convert("RGB")
    if image.mode in ("LA", "La", "PA", "RGBA", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image if image.mode == "RGB" else image.convert("RGB")


def _gray_ranges(image: Any) -> tuple[int, ...]:
    """The greatest gray values that an image of 16 or 32 bits may have been stored with, ascending."""
    if image.mode == "F":
        return 1, 255, 65535
    # Pillow opens some files of 16 bits in its mode of 32 bits. In those, small values mean a dark image.
    bits = {"PNG": 16, "PPM": 16}.get(image.format, 32)
    if image.format == "TIFF":
        bits = max(image.tag_v2.get(258, (16,)))  # BitsPerSample
    return (255, 65535) if image.mode == "I" and bits == 32 else (65535,)


def _to_bytes(values: np.ndarray, ranges: tuple[int, ...]) -> np.ndarray:
    """Gray values scaled to 8 bits from the first range that holds them all, or else from their own minimum to maximum."""
    values = np.nan_to_num(values.astype(np.float64))
    low, high = values.min(), values.max()
    if low >= 0 and high <= ranges[-1]:
        low, high = 0, next(limit for limit in ranges if high <= limit)
    return ((values - low) * (255 / max(high - low, 1e-12))).round().astype(np.uint8)


def as_pil(image: Any) -> Any:
    """A uint8 tensor `(channels, height, width)` as a PIL image; a PIL image as it is."""
    from PIL import Image

    if isinstance(image, Tensor):
        array = image.cpu().numpy()
        return Image.fromarray(array[0] if len(array) == 1 else array.transpose(1, 2, 0).copy())
    return image


def as_image(item: Any) -> Any:
    """What a dataset yields as an image (PIL, array or tensor), as a PIL image in mode RGB or a uint8 tensor.

    Raises:
        UserError: it is no image, or its values lie outside 0..255 (integers) or 0..1 (floating point).
    """
    from PIL import Image

    if isinstance(item, Image.Image):
        return to_rgb(item)
    image = item
    if isinstance(image, np.ndarray):
        with contextlib.suppress(TypeError, ValueError):  # Pillow may have no mode for what a tensor can hold
            return to_rgb(Image.fromarray(image))
    if isinstance(image, np.ndarray) and image.dtype.kind in "biuf" and image.ndim in (2, 3):
        image = image[:, :, None] if image.ndim == 2 else image
        image = image.transpose(2, 0, 1) if image.shape[2] in (1, 3) else image
        image = torch.from_numpy(np.ascontiguousarray(image))
    if isinstance(image, Tensor) and image.ndim == 3 and image.shape[0] in (1, 3) and image.numel():
        return _as_uint8(image)
    what = f"{type(item).__name__} {getattr(item, 'shape', '')} {getattr(item, 'dtype', '')}".strip()
    raise UserError(f"the dataset yields a {what}: it must yield a PIL image or a tensor (3, height, width)")


def _as_uint8(image: Tensor) -> UInt8[Tensor, "channels height width"]:
    """Integers as they are and floating point from 0..1; other ranges are refused, since they would turn white."""
    if image.dtype == torch.uint8:
        return image
    floating = image.is_floating_point() or image.dtype == torch.bool
    values = image.float() if floating else image.long()
    levels = (values * 255).round() if floating else values
    if not (levels.min() >= 0 and levels.max() <= 255):  # NaN fails both
        found = f"a {image.dtype} image with values {values.min():g} to {values.max():g}"
        cure = f"scale it to {'0..1' if floating else '0..255'}"
        raise UserError(f"the dataset yields {found}: {cure}, or return uint8 (views normalize by themselves)")
    return levels.byte()
