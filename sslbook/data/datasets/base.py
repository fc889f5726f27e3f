"""What every data set is turned into: sources of images, and the splits made of them."""

import os
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, Int, UInt8
from torch import Tensor

from sslbook.data.images import UnreadableImage, as_image, open_bands, open_image
from sslbook.errors import UserError, first_line
from sslbook.rng import permutation

DECODING_ERRORS = (OSError, ValueError, RuntimeError)  # what decoders raise within a user's dataset


class ImageSource(ABC):
    """Images in a fixed order, and their labels."""

    labels: Int[Tensor, "images"]
    """class of each image, -1 if unlabeled"""
    targets: Tensor | None = None
    """where an image has several classes, bool (images, classes); where it has numbers to regress, float32"""
    channels: int | None = None
    """bands to keep as they are stored; None makes RGB of 8 bits of every image"""

    def __len__(self) -> int:
        return len(self.labels)

    @abstractmethod
    def open(self, position: int) -> Any:
        """One image, as a PIL image in mode RGB or as a uint8 tensor; raises `UnreadableImage`."""

    def open_reduced(self, position: int, reduction: Callable[[int, int], int]) -> Any:
        """The same, decoded up to `reduction(height, width)` times smaller where that saves time."""
        return self.open(position)

    @abstractmethod
    def subset(self, positions: Int[Tensor, "some"]) -> "ImageSource":
        """The images at these positions, in the order given."""


@dataclass
class InMemory(ImageSource):
    """Images in memory, all of one size."""

    images: UInt8[Tensor, "images channels height width"] | Float[Tensor, "images channels height width"]
    labels: Int[Tensor, "images"]
    channels: int | None = None

    def open(self, position: int) -> Tensor:
        return self.images[position]

    def subset(self, positions: Int[Tensor, "some"]) -> "InMemory":
        return InMemory(self.images[positions], self.labels[positions], self.channels)


@dataclass
class FileList(ImageSource):
    """Image files under one folder.

    The paths are stored in one array of bytes: the pages of a list of strings would be copied into every worker.
    """

    root: Path
    paths: np.ndarray
    labels: Int[Tensor, "images"]
    targets: Tensor | None = None
    channels: int | None = None

    def path(self, position: int) -> Path:
        """Where the image at `position` is stored."""
        return self.root / os.fsdecode(bytes(self.paths[position]))

    def open(self, position: int) -> Any:
        path = self.path(position)
        return open_image(path) if self.channels is None else open_bands(path, self.channels)

    def open_reduced(self, position: int, reduction: Callable[[int, int], int]) -> Any:
        return open_image(self.path(position), reduction) if self.channels is None else self.open(position)

    def subset(self, positions: Int[Tensor, "some"]) -> "FileList":
        chosen = self.paths[positions.numpy()], self.labels[positions], _of(self.targets, positions)
        return FileList(self.root, *chosen, self.channels)


@dataclass
class DatasetSource(ImageSource):
    """A user's map-style dataset: an item is an image, or a tuple that begins with an image and its label."""

    dataset: Any
    labels: Int[Tensor, "images"]
    positions: Int[Tensor, "images"]
    targets: Tensor | None = None
    channels: int | None = None

    def open(self, position: int) -> Any:
        """What the dataset yields, as an image; `UnreadableImage` if it yields none."""
        index = int(self.positions[position])
        try:
            item = self.dataset[index]
        except UserError:  # a `ValueError` too, whose message already says what to do
            raise
        except DECODING_ERRORS as error:
            raise UnreadableImage(f"number {index} of {type(self.dataset).__name__}", first_line(error)) from error
        return as_image(item[0] if isinstance(item, tuple | list) else item, self.channels)

    def subset(self, positions: Int[Tensor, "some"]) -> "DatasetSource":
        chosen = self.labels[positions], self.positions[positions], _of(self.targets, positions)
        return DatasetSource(self.dataset, *chosen, self.channels)


def _of(targets: Tensor | None, positions: Int[Tensor, "some"]) -> Tensor | None:
    return None if targets is None else targets[positions]


@dataclass
class Splits:
    """The images to train on and those to evaluate on."""

    pretrain: ImageSource
    train: ImageSource
    """the labeled training images; nearly always the same object as `pretrain`"""
    test: ImageSource | None = None
    class_names: tuple[str, ...] = ()
    factors: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    """known factors of the images of a split, by the split's name; empty for most data sets"""

    def limited(self, limit: int) -> "Splits":
        """Only `limit` of the training images, chosen at random; the same ones every time."""

        def chosen(source: ImageSource) -> Int[Tensor, "some"]:
            return permutation(0, 0, len(source))[:limit].sort().values

        train = self.train.subset(chosen(self.train))
        pretrain = train if self.pretrain is self.train else self.pretrain.subset(chosen(self.pretrain))
        factors = dict(self.factors)
        if "train" in factors:
            factors["train"] = {name: values[chosen(self.train)] for name, values in factors["train"].items()}
        return replace(self, pretrain=pretrain, train=train, factors=factors)
