"""Images with two shapes, whose locations are known, and where the cells of one view lie in another."""

from dataclasses import dataclass
from functools import cached_property
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int, UInt8
from torch import Tensor

from sslbook import rng
from sslbook.data.datasets.shapes import BACKGROUNDS, Shapes
from sslbook.data.loader import Data
from sslbook.data.views import View, sample_crop

SIDE = 16  # of a quadrant, in pixels
SIZE = 2 * SIDE
CELL = 4  # pixels of an image to a cell of its map
STREAM = {"train": 4000, "test": 4010}  # rows of random numbers that nothing else uses
ALONE = {"size": 24, "position": 0.1, "lighting": 0.0, "background": 0.0, "noise": 0.0}


class Scene(NamedTuple):
    """Images with two shapes, and where these are."""

    images: UInt8[Tensor, "n 3 h w"]
    shapes: Int[Tensor, "n 2"]
    masks: UInt8[Tensor, "n h w"]
    """0 for the background, 1 plus the shape elsewhere"""
    centers: Float[Tensor, "n 2 2"]
    """row and column of the middle of each shape, in pixels"""


@dataclass(frozen=True)
class Scenes:
    """A data set of images of one color, with two shapes in two of the four quadrants.

    Args:
        num_train: number of training images.
        num_test: number of test images.
        seed: of all choices.
    """

    num_train: int = 2000
    num_test: int = 500
    seed: int = 0

    @cached_property
    def train(self) -> Scene:
        return self.render("train")

    @cached_property
    def test(self) -> Scene:
        return self.render("test")

    def data(self) -> Data:
        """For methods, which need images alone; the label is the first of the two shapes."""
        test = self.test.images, self.test.shapes[:, 0]
        return Data.from_images(
            self.train.images, self.train.shapes[:, 0], *test, Shapes.class_names, "scenes of two shapes"
        )

    def render(self, split: Literal["train", "test"]) -> Scene:
        """The images of a split."""
        n = self.num_train if split == "train" else self.num_test
        things = Shapes(num_train=2 * self.num_train, num_test=2 * self.num_test, seed=self.seed, **ALONE)
        pieces, factors = things.render(split)
        shapes = factors["shape"].view(n, 2)
        edge = (things.size - SIDE) // 2
        pieces = pieces[:, :, edge : edge + SIDE, edge : edge + SIDE].reshape(n, 2, 3, SIDE, SIDE)
        empty = (torch.tensor(next(iter(BACKGROUNDS.values()))) * 255 + 0.5).to(torch.uint8)
        covered = (pieces.int() - empty.int()[:, None, None]).abs().amax(2) > 6  # (n, 2, rows, columns)
        u = rng.uniform(self.seed, 0, torch.arange(n), STREAM[split], 4)
        quadrant = u.argsort(dim=1, stable=True)[:, :2]  # two different ones
        images = empty[:, None, None].repeat(n, 1, SIZE, SIZE)
        masks = torch.zeros(n, SIZE, SIZE, dtype=torch.uint8)
        image, pixel = torch.arange(n)[:, None, None], torch.arange(SIDE)
        for k in range(2):
            rows = (quadrant[:, k] // 2 * SIDE)[:, None, None] + pixel[:, None]
            columns = (quadrant[:, k] % 2 * SIDE)[:, None, None] + pixel
            images[image, :, rows, columns] = pieces[:, k].permute(0, 2, 3, 1)
            masks[image, rows, columns] = (covered[:, k] * (1 + shapes[:, k])[:, None, None]).to(torch.uint8)
        area = covered.sum((2, 3)).clamp(min=1)
        middle = torch.stack(
            [(covered.sum(3) * pixel).sum(2) / area, (covered.sum(2) * pixel).sum(2) / area], 2
        )  # within the quadrant
        corner = torch.stack([quadrant // 2, quadrant % 2], 2) * SIDE
        return Scene(images, shapes, masks, middle + corner + 0.5)


def cell_shapes(scene: Scene) -> Int[Tensor, "n s"]:
    """The most frequent value of the mask in each cell."""
    n, side = len(scene.masks), SIZE // CELL
    blocks = scene.masks.view(n, side, CELL, side, CELL).permute(0, 1, 3, 2, 4).reshape(n, side**2, CELL**2)
    return F.one_hot(blocks.long(), 11).sum(2).argmax(2)


def cell_centers(scene: Scene) -> Bool[Tensor, "n s"]:
    """Whether the middle of a shape lies in the cell."""
    row, column = (scene.centers / CELL).long().unbind(2)
    return F.one_hot(row * (SIZE // CELL) + column, (SIZE // CELL) ** 2).any(1)


# -- which cells of two views show the same location -----------------------------------------------------------------


def places(
    view: View, index: Int[Tensor, "n"], stream: int, side: int, size: int, seed: int = 0, epoch: int = 0
) -> tuple[Float[Tensor, "n s 2"], Int[Tensor, "n 4"]]:
    """Where the cells of a view's map have their middle in the image (row, column, in pixels), and the crop's box.

    Args:
        view: the augmentation.
        index: the images.
        stream: the number of the view, 0 or 1.
        side: rows of the map.
        size: side of the images, in pixels.
        seed: of the batches.
        epoch: of the batch.
    """
    whole = torch.full((len(index),), size)
    crop = sample_crop(view, seed, epoch, index.cpu(), stream, whole, whole)
    middle = (torch.arange(side) + 0.5) / side
    rows, columns = middle.repeat_interleave(side).expand(len(index), -1), middle.repeat(side).expand(len(index), -1)
    columns = torch.where(crop.flip[:, None], 1 - columns, columns)
    top, left, height, width = crop.box[:, :, None].unbind(1)
    return torch.stack([top + rows * height, left + columns * width], 2), crop.box


class Truth(NamedTuple):
    """Which cells of two views show the same location."""

    nearest: Int[Tensor, "n s"]
    """for each cell of the first view the nearest of the second"""
    seen: Bool[Tensor, "n s"]
    """whether the middle of the first view's cell lies in the second view at all"""
    near: Bool[Tensor, "n s t"]
    """whether the middles of two cells are less than a cell apart, in rows and in columns"""
    place: Float[Tensor, "n s 2"]
    """the middle of the first view's cells, in the image"""


def truth(view: View, index: Int[Tensor, "n"], side: int, size: int, seed: int = 0, epoch: int = 0) -> Truth:
    """What the crops of both views say, for methods that use the same view twice."""
    a, _ = places(view, index, 0, side, size, seed, epoch)
    b, box = places(view, index, 1, side, size, seed, epoch)
    low, extent = box[:, None, :2], box[:, None, 2:]
    apart = ((a[:, :, None] - b[:, None]) * side / extent[:, None]).abs().amax(3)
    seen = ((a >= low) & (a < low + extent)).all(2)
    return Truth(apart.argmin(2), seen, apart < 1, a)
