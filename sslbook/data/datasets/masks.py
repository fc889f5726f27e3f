"""Images with a value for every pixel, in a file beside each image: masks of classes, or depth.

Masks are index images (PNG): the value of a pixel is its class. Depth is a PNG of 16 bits whose values are divided by a
scale, or an array in a `.npy` file; values that are not positive are unknown.
"""

import os
import re
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from sslbook.data.datasets.base import FileList
from sslbook.data.datasets.folder import scan
from sslbook.data.datasets.voc import CLASSES as VOC_CLASSES
from sslbook.errors import UserError, explained
from sslbook.files import read_text

IGNORED = -1  # the class of pixels that count neither in a loss nor in a metric
TARGETS = (".png", ".npy", ".tif", ".tiff", ".bmp", ".gif")
_SUFFIX = re.compile(r"_(leftImg8bit|gtFine_labelIds)$")  # what Cityscapes adds to the name of an image and of its mask


@dataclass(kw_only=True)
class PairList(FileList):
    """Image files under one folder, each with the file that holds a value for every pixel."""

    target_paths: np.ndarray
    read: Callable[[Path], Tensor]
    """reads one of them as `(height, width)`"""

    def target_path(self, position: int) -> Path:
        """Where the target of the image at `position` is stored."""
        return Path(os.fsdecode(bytes(self.target_paths[position])))

    def open(self, position: int) -> tuple[Any, Tensor]:
        """Image and target, which must have one size; UserError if they have not."""
        image, path = super().open(position), self.target_path(position)
        target = self.read(path)
        if tuple(target.shape) != (image.height, image.width):
            sizes = f"{target.shape[1]}x{target.shape[0]} and its image {image.width}x{image.height}"
            raise UserError(f"{path} has {sizes} pixels: both must have one size (the image is {self.path(position)})")
        return image, target

    def open_reduced(self, position: int, reduction: Callable[[int, int], int]) -> tuple[Any, Any]:
        """At full size, since the target counts in the pixels of the file."""
        return self.open(position)

    def subset(self, positions: Int[Tensor, "some"]) -> "PairList":
        chosen = positions.numpy()
        parts = {"target_paths": self.target_paths[chosen], "read": self.read}
        return PairList(self.root, self.paths[chosen], self.labels[positions], **parts)


class Masked(NamedTuple):
    """Training and test images with masks, and the names of the classes."""

    train: PairList
    test: PairList
    class_names: tuple[str, ...]


# -- files -------------------------------------------------------------------------------------------------------------


def read_indices(path: Path) -> np.ndarray:
    """The values of an index image, `(height, width)`.

    Raises:
        UserError: the file cannot be read, or holds colors.
    """
    from PIL import Image

    with explained(f"cannot read the mask {path}", Exception, cure="mend or remove it"):  # a decoder may raise anything
        with Image.open(path) as image:
            values = np.asarray(image)
    if values.ndim != 2 or values.dtype.kind not in "ub":
        raise UserError(f"the mask {path} holds colors: store the index of a class in each pixel (a gray PNG)")
    return values


def read_mask(path: Path, table: Int[Tensor, "values"]) -> Int[Tensor, "height width"]:
    """The class of every pixel: `table` gives that of each value, -1 for what is ignored.

    Raises:
        UserError: the file cannot be read, or holds a value beyond the table.
    """
    values = read_indices(path)
    if int(values.max()) >= len(table):
        raise UserError(f"the mask {path} holds the value {values.max()}: the highest known is {len(table) - 1}")
    return table[torch.from_numpy(values.astype(np.int64))]


def read_depth(path: Path, scale: float = 1.0) -> Float[Tensor, "height width"]:
    """Depth in the unit that dividing by `scale` gives; 0 where it is unknown.

    Raises:
        UserError: the file cannot be read, or is no image of one channel.
    """
    from PIL import Image

    with explained(f"cannot read the depth {path}", Exception, cure="give a 16-bit PNG or .npy"):
        if path.suffix == ".npy":
            values = np.load(path)
        else:
            with Image.open(path) as image:
                values = np.asarray(image)
        if values.ndim != 2:
            raise ValueError(f"it has the shape {values.shape}, not (height, width)")
        values = values.astype(np.float32) / scale
    return torch.from_numpy(np.where(np.isfinite(values) & (values > 0), values, np.float32(0)))


def pairs(
    images: Path,
    targets: Path,
    read: Callable[[Path], Tensor],
    *,
    names: Iterable[str] | None = None,
    ending: str | None = None,
) -> PairList:
    """The images of one folder with their targets in another, which have the same names but for the suffix.

    Args:
        images: folder of images.
        targets: folder of masks or depths.
        read: reads a target.
        names: only these, without suffixes; by default all. They must be there.
        ending: how the names of targets end, where the folder holds others too.

    Raises:
        UserError: a folder is missing or empty, a target has no image, or no image has a target.
    """
    images, targets = (Path(os.path.abspath(folder.expanduser())) for folder in (images, targets))
    for folder in (images, targets):
        if not folder.is_dir():
            raise UserError(
                f"the folder {folder} does not exist: give the folders of images and of their masks or depth"
            )
    by_name = {_name(path): path for path in scan(images)}
    files = sorted(p for p in targets.rglob("*") if p.suffix.lower() in TARGETS and p.name.endswith(ending or ""))
    found = {_name(path.relative_to(targets).as_posix()): path for path in files}
    if names is None:
        wanted = [name for name in by_name if name in found]
        _require_all(set(found) - set(by_name), targets, f"have no image in {images}")
        if missing := sorted(set(by_name) - set(found)):
            first = ", ".join(missing[:3])
            text = f"{len(missing)} of {len(by_name)} images have no file in {targets} and are left out ({first})"
            warnings.warn(text, stacklevel=2)
    else:
        wanted = list(names)
        _require_all(set(wanted) - set(by_name), images, "are listed and not there")
        _require_all(set(wanted) - set(found), targets, "are listed and not there")
    if not wanted:
        raise UserError(f"no image in {images} has a file of its name in {targets}")
    paths = np.array([os.fsencode(by_name[name]) for name in wanted])
    masks = np.array([os.fsencode(found[name]) for name in wanted])
    return PairList(images, paths, torch.full((len(paths),), -1), target_paths=masks, read=read)


def _name(path: str) -> str:
    return _SUFFIX.sub("", path.rpartition(".")[0])


def _require_all(missing: set[str], folder: Path, what: str) -> None:
    if missing:
        raise UserError(f"{folder}: {len(missing)} files {what} ({', '.join(sorted(missing)[:3])})")


# -- layouts -----------------------------------------------------------------------------------------------------------


def load_masks(train: tuple[Path, Path], test: tuple[Path, Path], ignore: Sequence[int] = (255,)) -> Masked:
    """Any folders of images and of their masks. The classes are the values of all masks, in order, but for `ignore`.

    Raises:
        UserError: as `pairs`; or the masks hold fewer than two classes.
    """
    nothing = partial(read_mask, table=torch.zeros(0, dtype=torch.int64))  # until the values are known
    parts = [pairs(*folders, nothing) for folders in (train, test)]
    values: set[int] = set()
    for part, (_, folder) in zip(parts, (train, test)):
        found = {int(v) for i in range(len(part)) for v in np.unique(read_indices(part.target_path(i)))}
        if found <= set(ignore):
            raise UserError(f"the masks in {folder} hold only values to ignore, {sorted(found)}: check --ignore")
        values |= found
    classes = sorted(values - set(ignore))
    if len(classes) < 2:
        raise UserError(f"the masks in {train[1]} hold {len(classes)} class(es) beside those to ignore: {classes}")
    table = torch.full((max(values) + 1,), IGNORED)
    table[torch.tensor(classes)] = torch.arange(len(classes))
    for part in parts:
        part.read = partial(read_mask, table=table)
    return Masked(*parts, tuple(map(str, classes)))


def find_layout(folder: Path) -> Masked:
    """VOC 2012 (with the masks of SBD if they are there), ADE20K or Cityscapes, recognized by their folders.

    Raises:
        UserError: the folder is none of them, or a file is missing.
    """
    folder = Path(folder).expanduser()
    for layout in (_voc, _ade20k, _cityscapes):
        for top in (folder, folder / "VOC2012", folder / "VOCdevkit" / "VOC2012"):
            if (found := layout(top)) is not None:
                return found
    raise UserError(
        f"{folder} is not laid out as VOC (JPEGImages, SegmentationClass), ADE20K (images, annotations) or Cityscapes "
        "(leftImg8bit, gtFine): name the folders by --images, --masks, --test_images and --test_masks"
    )


def _voc(top: Path) -> Masked | None:
    lists = top / "ImageSets" / "Segmentation"
    if not lists.is_dir():
        return None
    table = torch.full((256,), IGNORED)
    table[:21] = torch.arange(21)
    augmented = [lists / name for name in ("train_aug.txt", "trainaug.txt") if (lists / name).is_file()]
    more = top / "SegmentationClassAug"
    train, masks = (augmented[0], more) if augmented and more.is_dir() else (lists / "train.txt", None)
    own = top / "SegmentationClass"
    read = partial(read_mask, table=table)
    parts = [
        pairs(top / "JPEGImages", where, read, names=_lines(file))
        for file, where in ((train, masks or own), (lists / "val.txt", own if own.is_dir() else more))
    ]
    return Masked(*parts, ("background", *VOC_CLASSES))


def _lines(file: Path) -> list[str]:
    """Names of a list; the augmented one of mmsegmentation holds names, that of others paths of image and mask."""
    with explained(f"{file}: cannot be read", OSError, ValueError, cure="the layout of VOC needs it"):
        lines = read_text(file).split("\n")
    return [Path(line.split()[0]).stem for line in lines if line.strip()]


def _ade20k(top: Path) -> Masked | None:
    if not (top / "annotations" / "training").is_dir():
        return None
    table = torch.arange(151) - 1  # 0 is what belongs to none of the 150 classes
    splits = ("training", "validation")
    read = partial(read_mask, table=table)
    parts = [pairs(top / "images" / name, top / "annotations" / name, read) for name in splits]
    return Masked(*parts, tuple(map(str, range(1, 151))))


def _cityscapes(top: Path) -> Masked | None:
    if not (top / "gtFine" / "train").is_dir():
        return None
    from torchvision.datasets import Cityscapes

    classes = [c for c in Cityscapes.classes if c.id >= 0]
    table = torch.tensor([c.train_id if c.train_id < 255 else IGNORED for c in classes])
    read, ending = partial(read_mask, table=table), "_gtFine_labelIds.png"
    parts = [pairs(top / "leftImg8bit" / s, top / "gtFine" / s, read, ending=ending) for s in ("train", "val")]
    return Masked(*parts, tuple(c.name for c in classes if 0 <= c.train_id < 255))
