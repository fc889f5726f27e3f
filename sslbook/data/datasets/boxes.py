"""Images with boxes of objects: what annotations of COCO and VOC become."""

import os
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from sslbook.data.datasets.base import FileList
from sslbook.errors import UserError


@dataclass
class Boxes:
    """The objects in one image, as an annotation has them."""

    file: str
    """path of the image, relative to the folder of all"""
    size: tuple[int, int]
    """width, height"""
    boxes: list[tuple[float, float, float, float]]
    """left, top, right, bottom in pixels, from the image's corner"""
    classes: list[int]
    ignored: list[bool]
    """crowds in COCO, difficult objects in VOC: neither learned nor counted as missed"""
    image_id: int = 0
    areas: list[float] = field(default_factory=list)
    """COCO's `area` of each object, which is that of its outline"""
    outlines: list[Any] = field(default_factory=list)
    """COCO's `segmentation` of each object, where they are wanted"""


@dataclass(kw_only=True)
class BoxList(FileList):
    """Image files under one folder, with boxes."""

    rows: Float[Tensor, "boxes 6"]
    """left, top, right, bottom, class, whether ignored: of all images, one after another"""
    areas: Float[Tensor, "boxes"]
    """of the objects in pixels, by which COCO calls them small or large"""
    ends: Int[Tensor, "images"]
    """where the rows of each image end"""
    sizes: Int[Tensor, "images 2"]
    """height, width"""
    image_ids: Int[Tensor, "images"]
    class_names: tuple[str, ...]
    category_ids: tuple[int, ...]
    """the annotations' own number of each class"""
    outlines: list[Any]
    """COCO's `segmentation` of each row; empty if masks are not wanted"""

    def slice(self, position: int) -> slice:
        """Which rows are those of an image."""
        return slice(int(self.ends[position - 1]) if position else 0, int(self.ends[position]))

    @cached_property
    def most(self) -> int:
        """The largest number of boxes in an image that are not ignored."""
        return max(int((self.rows[self.slice(i), 5] == 0).sum()) for i in range(len(self)))

    def open(self, position: int) -> tuple[Any, int]:
        """Image and position, by which its boxes are found; UserError if the annotation has another size."""
        image = super().open(position)
        height, width = self.sizes[position].tolist()
        if (image.height, image.width) != (height, width):
            what = f"{image.width}x{image.height} pixels, and {width}x{height} by its annotation"
            raise UserError(f"{self.path(position)} has {what}: mend the annotation's width and height")
        return image, position

    def open_reduced(self, position: int, reduction: Callable[[int, int], int]) -> tuple[Any, Any]:
        """At full size, since the target counts in the pixels of the file."""
        return self.open(position)

    def subset(self, positions: Int[Tensor, "some"]) -> "BoxList":
        chosen = [self.slice(i) for i in positions.tolist()]
        which = torch.cat([torch.arange(one.start, one.stop) for one in chosen]) if chosen else torch.arange(0)
        outlines = [outline for one in chosen for outline in self.outlines[one]]
        counts = torch.tensor([one.stop - one.start for one in chosen], dtype=torch.int64)
        return BoxList(
            self.root,
            self.paths[positions.numpy()],
            self.labels[positions],
            rows=self.rows[which],
            areas=self.areas[which],
            ends=counts.cumsum(0),
            sizes=self.sizes[positions],
            image_ids=self.image_ids[positions],
            class_names=self.class_names,
            category_ids=self.category_ids,
            outlines=outlines,
        )

    def with_boxes(self) -> "BoxList":
        """Only the images in which there is something to learn, or to find.

        Raises:
            UserError: there are none.
        """
        counts = torch.tensor([int((self.rows[self.slice(i), 5] == 0).sum()) for i in range(len(self))])
        if not counts.any():
            raise UserError(f"no image of {self.root} has a box that counts: check the annotations")
        return self.subset(counts.nonzero()[:, 0])


def box_list(
    root: Path, images: Sequence[Boxes], class_names: Sequence[str], category_ids: Sequence[int] | None = None
) -> BoxList:
    """The images in one list. Boxes without area are left out, with a warning that counts them.

    Raises:
        UserError: an image file is missing.
    """
    rows: list[list[float]] = []
    areas, outlines, ends, empty = [], [], [], []
    for image in images:
        width, height = image.size
        for i, (x1, y1, x2, y2) in enumerate(image.boxes):
            box = [max(x1, 0.0), max(y1, 0.0), min(x2, width), min(y2, height)]
            if box[2] <= box[0] or box[3] <= box[1]:
                empty.append(f"box {i + 1} of {image.file}")
                continue
            rows.append([*box, image.classes[i], image.ignored[i]])
            areas += image.areas[i : i + 1] or [(box[2] - box[0]) * (box[3] - box[1])]
            outlines += image.outlines[i : i + 1]
        ends.append(len(rows))
    if empty:
        warnings.warn(f"{root}: left out {len(empty)} boxes without area ({', '.join(empty[:3])})", stacklevel=2)
    missing = [image.file for image in images if not (root / image.file).is_file()]
    if missing or not images:
        what = f"{len(missing)} images are annotated and not there ({', '.join(missing[:3])})"
        raise UserError(f"{root}: {what if missing else 'no images are annotated'}")
    return BoxList(
        root,
        np.array([os.fsencode(image.file) for image in images]),
        torch.full((len(images),), -1),
        rows=torch.tensor(rows, dtype=torch.float32).view(-1, 6),
        areas=torch.tensor(areas, dtype=torch.float32),
        ends=torch.tensor(ends),
        sizes=torch.tensor([image.size[::-1] for image in images]),
        image_ids=torch.tensor([image.image_id for image in images]),
        class_names=tuple(class_names),
        category_ids=tuple(range(len(class_names)) if category_ids is None else category_ids),
        outlines=outlines,
    )
