"""Pictures of any kind, and what holds them: memory, files, anybody's dataset.

Every source counts its pictures, knows their labels (-1 where there is none) and opens one by its position.
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


class UnreadablePicture(UserError):
    """A picture that is corrupt, truncated, missing or none at all; the message names it and says why."""

    def __init__(self, name: str, reason: str) -> None:
        super().__init__(f"cannot read the picture {name} ({reason}): mend or remove it")
        self.name = name
        self.reason = reason


# One picture ---------------------------------------------------------------------------------------------------------


def open_picture(path: str | Path) -> Any:
    """Any picture file as an upright PIL image in mode RGB, 8 bits a channel.

    Transparent pictures are laid on white. Gray of 16 bits is scaled to 8, not cut. Of an animation the first frame
    counts. The camera's orientation (EXIF) is applied.

    Raises:
        UnreadablePicture: the file is missing, corrupt, truncated or no picture.
    """
    from PIL import Image

    try:
        with Image.open(path) as picture:
            picture.load()
            return _upright(to_rgb(picture), picture)
    except Exception as error:  # decoders raise nearly everything: OSError, SyntaxError, struct.error, ...
        lines = str(error).splitlines()
        reason = lines[0].replace(f": {str(path)!r}", "").replace(f"image file {str(path)!r}", "it") if lines else ""
        raise UnreadablePicture(str(path), reason or type(error).__name__) from error


def to_rgb(picture: Any) -> Any:
    """A PIL image of any mode in mode RGB."""
    from PIL import Image

    if picture.mode == "RGB" and "transparency" not in picture.info:
        return picture
    if picture.mode in ("I", "F") or picture.mode.startswith("I;16"):
        return Image.fromarray(_to_bytes(np.asarray(picture))).convert("RGB")
    if picture.mode in ("LA", "La", "PA", "RGBA", "RGBa") or "transparency" in picture.info:
        picture = picture.convert("RGBA")
        white = Image.new("RGBA", picture.size, "white")
        return Image.alpha_composite(white, picture).convert("RGB")
    return picture.convert("RGB")


def _to_bytes(values: np.ndarray) -> np.ndarray:
    """Gray values of 16 or 32 bits in 8: by the range their format implies, or else by their own."""
    whole = np.issubdtype(values.dtype, np.integer)
    values = np.nan_to_num(values.astype(np.float64))
    low, high = values.min(), values.max()
    for ceiling in (65535,) if whole else (1, 255, 65535):
        if low >= 0 and high <= ceiling:
            low, high = 0, ceiling
            break
    return ((values - low) * (255 / max(high - low, 1e-12))).round().astype(np.uint8)


def _upright(rgb: Any, picture: Any) -> Any:
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
        method = methods.get(picture.getexif().get(ExifTags.Base.Orientation))
    except Exception:  # an unreadable note on the orientation spoils no picture
        return rgb
    return rgb if method is None else rgb.transpose(method)


# Sources -------------------------------------------------------------------------------------------------------------


class Source:
    """Pictures in a fixed order."""

    labels: Int[Tensor, "pictures"]
    """class of each, -1 where there is none"""

    def __len__(self) -> int:
        return len(self.labels)

    def open(self, position: int) -> Any:
        """One picture, as a PIL image in mode RGB or as a uint8 tensor; raises `UnreadablePicture`."""
        raise NotImplementedError

    def subset(self, positions: Int[Tensor, "some"]) -> "Source":
        """Only some of the pictures, in the order given."""
        raise NotImplementedError


@dataclass
class Resident(Source):
    """Pictures that lie in memory, all of one size."""

    images: UInt8[Tensor, "pictures channels height width"]
    labels: Int[Tensor, "pictures"]

    def open(self, position: int) -> UInt8[Tensor, "channels height width"]:
        return self.images[position]

    def subset(self, positions: Int[Tensor, "some"]) -> "Resident":
        return Resident(self.images[positions], self.labels[positions])


@dataclass
class Files(Source):
    """Pictures in files under one folder.

    The paths lie in one array of bytes: a list of strings would be copied into every loader worker, page by page.
    """

    root: Path
    paths: np.ndarray
    labels: Int[Tensor, "pictures"]

    def path(self, position: int) -> Path:
        return self.root / os.fsdecode(bytes(self.paths[position]))

    def open(self, position: int) -> Any:
        return open_picture(self.path(position))

    def subset(self, positions: Int[Tensor, "some"]) -> "Files":
        return Files(self.root, self.paths[positions.numpy()], self.labels[positions])


@dataclass
class Mapped(Source):
    """Somebody's map-style dataset: an item is a picture, or a tuple that begins with a picture and its label."""

    dataset: Any
    labels: Int[Tensor, "pictures"]
    positions: Int[Tensor, "pictures"]

    def open(self, position: int) -> Any:
        place = int(self.positions[position])
        try:
            item = self.dataset[place]
        except OSError as error:
            raise UnreadablePicture(f"number {place} of {type(self.dataset).__name__}", str(error)) from error
        return _as_picture(item[0] if isinstance(item, tuple | list) else item)

    def subset(self, positions: Int[Tensor, "some"]) -> "Mapped":
        return Mapped(self.dataset, self.labels[positions], self.positions[positions])


def _as_picture(picture: Any) -> Any:
    from PIL import Image

    if isinstance(picture, Image.Image):
        return to_rgb(picture)
    if isinstance(picture, np.ndarray):
        return to_rgb(Image.fromarray(picture))
    if isinstance(picture, Tensor) and picture.ndim == 3 and picture.shape[0] in (1, 3):
        return picture if picture.dtype == torch.uint8 else (picture.float() * 255).round().clamp(0, 255).byte()
    kind = f"tensor of shape {tuple(picture.shape)}" if isinstance(picture, Tensor) else type(picture).__name__
    raise UserError(f"the dataset yields a {kind}: it must yield a PIL image or a tensor (3, height, width)")
