"""Read any image file: as RGB with 8 bits a channel, or its bands as they are stored.

Bands are uint8 where the file has 8 bits, and float32 otherwise: 16 bits without sign are divided by 65,535, other
values are left as they are. float32 holds all integers up to 2^24.
"""

import contextlib
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from sslbook.errors import UserError, import_extra

EXTENSIONS = (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm")
NOTE = "sslbook: what was left out"  # keys of an image's `info`
FULL_SIZE = "sslbook: height and width before it was reduced"
ORIENTATION = 0x0112  # the camera's, in EXIF; from 5 on the image is stored lying


class UnreadableImage(UserError):
    """A file or item that is missing, corrupt, truncated or no image; the message names it and says why."""

    def __init__(self, name: str, reason: str) -> None:
        super().__init__(f"cannot read the image {name} ({reason}): mend or remove it")
        self.name = name
        self.reason = reason


def open_image(path: str | Path, reduction: Callable[[int, int], int] | None = None) -> Any:
    """An image file as an upright PIL image in mode RGB.

    Transparent images are composed on white. 16 bits are scaled to 8, not clipped, which the entry `NOTE` of the
    image's `info` says. Of an animation the first frame is read. The orientation that a camera stored (EXIF) is applied.

    Args:
        path: the file.
        reduction: how many times smaller (1, 2, 4 or 8) an image of this height and width may be decoded. A JPEG is,
            which takes less time and memory; the entry `FULL_SIZE` of its `info` holds the height and width stored.

    Raises:
        UnreadableImage: the file is missing, corrupt, truncated or no image, or has bands besides red, green and blue.
    """
    from PIL import Image, ImageOps

    try:
        with Image.open(path) as image:
            note = _left_out(image)
            full_size = _reduce(image, reduction) if reduction and image.format == "JPEG" else None
            image.load()
            with contextlib.suppress(Exception):  # corrupt metadata does not make the pixels unreadable
                ImageOps.exif_transpose(image, in_place=True)
            rgb = to_rgb(image)
            if note:
                rgb.info[NOTE] = note
            if full_size:
                rgb.info[FULL_SIZE] = full_size
            return rgb
    except Exception as error:  # decoders raise nearly everything: OSError, SyntaxError, struct.error, ...
        raise _unreadable(path, error) from error


def _reduce(image: Any, reduction: Callable[[int, int], int]) -> tuple[int, int] | None:
    """Have an opened and not yet loaded JPEG decoded smaller; its upright height and width if it will be."""
    sides = image.height, image.width
    with contextlib.suppress(Exception):  # as above
        sides = sides[::-1] if image.getexif().get(ORIENTATION, 1) >= 5 else sides
    factor = reduction(*sides)
    if factor == 1:
        return None
    image.draft(None, (image.width // factor, image.height // factor))
    return sides


def _unreadable(path: str | Path, error: Exception) -> UnreadableImage:
    lines = str(error).splitlines()
    reason = lines[0].replace(f": {str(path)!r}", "").replace(f"image file {str(path)!r}", "it") if lines else ""
    if reason == "cannot identify it" and str(path).lower().endswith((".tif", ".tiff")):
        reason += " as a photograph; give the number of its bands as data.channels"
    return UnreadableImage(str(path), reason or type(error).__name__)


def _left_out(image: Any) -> str:
    """What of an opened and not yet loaded image does not go into RGB of 8 bits; ValueError if it is bands."""
    if image.format not in ("PNG", "TIFF", "PPM"):
        return ""
    stored = " ".join(str(part) for tile in image.tile[:1] for part in np.atleast_1d(np.array(tile[-1], dtype=object)))
    if image.format == "TIFF" and "X" in stored:  # Pillow's name for what it skips
        number = image.tag_v2.get(277)
        raise ValueError(f"{number} bands, more than a photograph has; give data.channels {number}")
    if ";16" in stored or ";32" in stored or "65535" in stored:
        return "images of more than 8 bits a channel, of which 8 are used; all are with data.channels"
    if image.format == "TIFF" and getattr(image, "n_frames", 1) > 1:
        return "files of several pages, of which the first is used; with data.channels pages are bands"
    return ""


def open_bands(path: str | Path, channels: int) -> Any:
    """An image file with all its bands and bits, as a tensor, or (8 bits, three channels) as a PIL image in mode RGB.

    `.npy` holds an array with the bands first or last (first, where both fit); TIFF is read by tifffile, and its pages
    are bands if it has several.

    Raises:
        UnreadableImage: the file cannot be read, has another number of bands, or holds NaN.
        UserError: tifffile is not installed.
    """
    try:
        suffix = Path(path).suffix.lower()
        if suffix == ".npy":
            return bands(np.load(path, allow_pickle=False), channels)
        if suffix in (".tif", ".tiff"):
            return bands(import_extra("tifffile", "bands").imread(path), channels)
        return _stored(path, channels)
    except Exception as error:
        if isinstance(error, UserError):
            raise
        raise _unreadable(path, error) from error


def _stored(path: str | Path, channels: int) -> Any:
    """The values of a file that Pillow reads, or torchvision where Pillow would keep 8 bits of 16."""
    from PIL import Image, ImageOps

    with Image.open(path) as image:
        deep_color = image.mode in ("RGB", "RGBA", "LA") and bool(_left_out(image))
        if not deep_color:
            image.load()
            with contextlib.suppress(Exception):
                ImageOps.exif_transpose(image, in_place=True)
            return _of_pil(image, channels)
    from torchvision.io import ImageReadMode, decode_image, read_file

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # torchcodec, its successor, needs ffmpeg
        return bands(decode_image(read_file(str(path)), ImageReadMode.UNCHANGED).numpy(), channels)


def _of_pil(image: Any, channels: int) -> Any:
    if image.mode == "P":
        image = image.convert("RGBA" if "transparency" in image.info else "RGB")
    shallow = image.mode not in ("I", "F") and not image.mode.startswith("I;16")
    if shallow and channels == 3:
        return to_rgb(image)
    return bands(np.asarray(image.convert("L") if image.mode == "1" else image), channels)


def bands(
    values: Any, channels: int
) -> UInt8[Tensor, "channels height width"] | Float[Tensor, "channels height width"]:
    """An array with the bands first or last, or a gray one, as a tensor with the bands first.

    Raises:
        ValueError: it has another number of bands, or values that float32 does not hold.
    """
    array = values.numpy() if isinstance(values, Tensor) else np.asarray(values)
    if array.dtype.kind not in "biuf" or array.ndim not in (2, 3) or not array.size:
        raise ValueError(f"an array {array.shape} of {array.dtype} is no image")
    array = array[None] if array.ndim == 2 else array
    if array.shape[0] != channels:
        array = array.transpose(2, 0, 1) if array.shape[2] in (1, channels) else array
    if array.shape[0] == 1 and channels == 3:
        array = array.repeat(3, axis=0)
    if array.shape[0] != channels:
        number = min(array.shape[0], values.shape[-1])
        raise ValueError(f"{number} bands (its shape is {tuple(values.shape)}), and data.channels is {channels}")
    if array.dtype != np.uint8:
        scale = 65535 if array.dtype.kind == "u" and array.dtype.itemsize == 2 else 1
        exact = array.dtype.kind == "b" or array.dtype.itemsize <= 2 or np.abs(array).max() <= 2**24
        if array.dtype.kind != "f" and not exact:
            raise ValueError("integers beyond 2^24, which float32 does not hold: scale them")
        array = array.astype(np.float32) / np.float32(scale)
        if not np.isfinite(array).all():
            raise ValueError("NaN or infinite values: fill them")
    return torch.from_numpy(np.ascontiguousarray(array))


def as_photograph(image: Any) -> Any:
    """Any opened image as a PIL image in mode RGB to look at: of bands the first three, or the first, scaled."""
    if isinstance(image, Tensor) and (len(image) not in (1, 3) or image.dtype != torch.uint8):
        shown = image[: 3 if len(image) >= 3 else 1].float()
        low, high = shown.amin(), shown.amax()
        image = ((shown - low) * (255 / (high - low).clamp_min(1e-12))).byte()
    return as_pil(image).convert("RGB")


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
    """A uint8 tensor `(1 or 3, height, width)` as a PIL image; PIL images and other bands as they are."""
    from PIL import Image

    if isinstance(image, Tensor) and image.dtype == torch.uint8 and len(image) in (1, 3):
        array = image.cpu().numpy()
        return Image.fromarray(array[0] if len(array) == 1 else array.transpose(1, 2, 0).copy())
    return image


def as_image(item: Any, channels: int | None = None) -> Any:
    """What a dataset yields as an image (PIL, array or tensor), as a PIL image in mode RGB or a uint8 tensor.

    With `channels`, all bands and bits are kept, as `open_bands` keeps them.

    Raises:
        UserError: it is no image, or its values lie outside 0..255 (integers) or 0..1 (floating point).
    """
    from PIL import Image

    if channels is not None:
        try:
            return _of_pil(item, channels) if isinstance(item, Image.Image) else bands(item, channels)
        except ValueError as error:
            raise UserError(f"the dataset yields {error}") from None
    if isinstance(item, Image.Image):
        return to_rgb(item)
    image = item
    if isinstance(image, np.ndarray):
        with contextlib.suppress(TypeError, ValueError):  # Pillow may have no mode for what a tensor can hold
            rgb = to_rgb(Image.fromarray(image))
            if image.ndim == 3 and image.shape[2] == 4:
                rgb.info[NOTE] = "arrays of four channels, taken as color with transparency; else give data.channels 4"
            elif image.itemsize > 1:
                rgb.info[NOTE] = "arrays of more than 8 bits, of which 8 are used; all are with data.channels"
            return rgb
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
