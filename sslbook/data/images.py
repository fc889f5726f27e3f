"""Images of any kind, and what holds them: memory, files, anybody's dataset.

Every source counts its images, knows their labels (-1 where there is none) and opens one by its position.
"""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Int, UInt8
from torch import Tensor

from sslbook.errors import UserError

EXTENSIONS = (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm")
DECODING_ERRORS = (OSError, ValueError, RuntimeError)  # what decoders raise within somebody's dataset


class UnreadableImage(UserError):
    """An image that is corrupt, truncated, missing or none at all; the message names it and says why."""

    def __init__(self, name: str, reason: str) -> None:
        super().__init__(f"cannot read the image {name} ({reason}): mend or remove it")
        self.name = name
        self.reason = reason


# One image ---------------------------------------------------------------------------------------------------------


def open_image(path: str | Path) -> Any:
    """Any image file as an upright PIL image in mode RGB, 8 bits a channel.

    Transparent images are laid on white. Gray of 16 bits is scaled to 8, not cut. Of an animation the first frame
    counts. The camera's orientation (EXIF) is applied.

    Raises:
        UnreadableImage: the file is missing, corrupt, truncated or no image.
    """
    from PIL import Image

    try:
        with Image.open(path) as image:
            image.load()
            return _upright(to_rgb(image), image)
    except Exception as error:  # decoders raise nearly everything: OSError, SyntaxError, struct.error, ...
        lines = str(error).splitlines()
        reason = lines[0].replace(f": {str(path)!r}", "").replace(f"image file {str(path)!r}", "it") if lines else ""
        raise UnreadableImage(str(path), reason or type(error).__name__) from error


def to_rgb(image: Any) -> Any:
    """A PIL image of any mode in mode RGB."""
    from PIL import Image

    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        return Image.fromarray(_to_bytes(np.asarray(image), _ceilings(image))).convert("RGB")
    if image.mode in ("LA", "La", "PA", "RGBA", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image).convert("RGB")
    return image.convert("RGB")


def _ceilings(image: Any) -> tuple[int, ...]:
    """What the greatest gray value may be by the format of an image of 16 or 32 bits, ascending."""
    if image.mode == "F":
        return 1, 255, 65535
    # Files of 16 bits may open in the mode of 32 too; in them small values are a dark image.
    bits = {"PNG": 16, "PPM": 16}.get(image.format, 32)
    if image.format == "TIFF":
        bits = max(image.tag_v2.get(258, (16,)))  # BitsPerSample
    return (255, 65535) if image.mode == "I" and bits == 32 else (65535,)


def _to_bytes(values: np.ndarray, ceilings: tuple[int, ...]) -> np.ndarray:
    """Gray values of 16 or 32 bits in 8: by the first of the ranges that holds them, or else by their own."""
    values = np.nan_to_num(values.astype(np.float64))
    low, high = values.min(), values.max()
    for ceiling in ceilings:
        if low >= 0 and high <= ceiling:
            low, high = 0, ceiling
            break
    return ((values - low) * (255 / max(high - low, 1e-12))).round().astype(np.uint8)


def _upright(rgb: Any, image: Any) -> Any:
    from PIL import ExifTags, Image

    turns = Image.Transpose
    methods = {
        2: turns.FLIP_LEFT_RIGHT,
        3: turns.ROTATE_180,
        4: turns.FLIP_TOP_BOTTOM,
        5: turns.TRANSPOSE,
        6: turns.ROTATE_270,
        7: turns.TRANSVERSE,
        8: turns.ROTATE_90,
    }
    try:
        method = methods.get(image.getexif().get(ExifTags.Base.Orientation))
    except Exception:  # an unreadable note on the orientation spoils no image
        return rgb
    return rgb if method is None else rgb.transpose(method)


# Sources -------------------------------------------------------------------------------------------------------------


class ImageSource:
    """Images in a fixed order."""

    labels: Int[Tensor, "images"]
    """class of each, -1 where there is none"""

    def __len__(self) -> int:
        return len(self.labels)

    def open(self, position: int) -> Any:
        """One image, as a PIL image in mode RGB or as a uint8 tensor; raises `UnreadableImage`."""
        raise NotImplementedError

    def subset(self, positions: Int[Tensor, "some"]) -> "Source":
        """Only some of the images, in the order given."""
        raise NotImplementedError


@dataclass
class InMemory(ImageSource):
    """Images that lie in memory, all of one size."""

    images: UInt8[Tensor, "images channels height width"]
    labels: Int[Tensor, "images"]

    def open(self, position: int) -> UInt8[Tensor, "channels height width"]:
        return self.images[position]

    def subset(self, positions: Int[Tensor, "some"]) -> "Resident":
        return InMemory(self.images[positions], self.labels[positions])


@dataclass
class FileList(ImageSource):
    """Images in files under one folder.

    The paths lie in one array of bytes: a list of strings would be copied into every loader worker, page by page.
    """

    root: Path
    paths: np.ndarray
    labels: Int[Tensor, "images"]

    def path(self, position: int) -> Path:
        return self.root / os.fsdecode(bytes(self.paths[position]))

    def open(self, position: int) -> Any:
        return open_image(self.path(position))

    def subset(self, positions: Int[Tensor, "some"]) -> "Files":
        return FileList(self.root, self.paths[positions.numpy()], self.labels[positions])


@dataclass
class DatasetSource(ImageSource):
    """Somebody's map-style dataset: an item is an image, or a tuple that begins with an image and its label."""

    dataset: Any
    labels: Int[Tensor, "images"]
    positions: Int[Tensor, "images"]

    def open(self, position: int) -> Any:
        place = int(self.positions[position])
        try:
            item = self.dataset[place]
        except UserError:  # says already what to do
            raise
        except DECODING_ERRORS as error:
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise UnreadableImage(f"number {place} of {type(self.dataset).__name__}", reason) from error
        return _as_image(item[0] if isinstance(item, tuple | list) else item)

    def subset(self, positions: Int[Tensor, "some"]) -> "Mapped":
        return DatasetSource(self.dataset, self.labels[positions], self.positions[positions])


def _as_image(image: Any) -> Any:
    from PIL import Image

    if isinstance(image, Image.Image):
        return to_rgb(image)
    if isinstance(image, np.ndarray):
        try:
            return to_rgb(Image.fromarray(image))
        except (TypeError, ValueError):  # Pillow has no mode for it; a tensor of the same values may do
            image = _as_tensor(image)
    if isinstance(image, Tensor) and image.ndim == 3 and image.shape[0] in (1, 3) and image.numel():
        return _levels(image)
    kind = type(image).__name__
    if isinstance(image, np.ndarray | Tensor):
        kind = "array" if isinstance(image, np.ndarray) else "tensor"
        kind += f" of shape {tuple(image.shape)} and type {image.dtype}"
    raise UserError(f"the dataset yields a {kind}: it must yield a PIL image or a tensor (3, height, width)")


def _as_tensor(image: np.ndarray) -> np.ndarray | Tensor:
    """An array of numbers as a tensor with the channels first; anything else as it is."""
    if image.dtype.kind not in "iuf" or image.ndim not in (2, 3):
        return image
    if image.ndim == 2:
        image = image[None]
    elif image.shape[2] in (1, 3):
        image = image.transpose(2, 0, 1)
    return torch.from_numpy(image.astype(np.float32 if image.dtype.kind == "f" else np.int64))


def _levels(image: Tensor) -> UInt8[Tensor, "channels height width"]:
    """Whole numbers as they are, fractions of 0..1 as 0..255; other ranges are refused, since they would turn white."""
    if image.dtype == torch.uint8:
        return image
    fractions = image.is_floating_point() or image.dtype == torch.bool
    values = image.float() if fractions else image.long()
    levels = (values * 255).round() if fractions else values
    if not (levels.min() >= 0 and levels.max() <= 255):  # nor is NaN let through
        found = f"a {image.dtype} image with values {values.min():g} to {values.max():g}"
        cure = "scale it to 0..1" if fractions else "scale it to 0..255"
        raise UserError(f"the dataset yields {found}: {cure}, or return uint8 (views normalize by themselves)")
    return levels.byte()
