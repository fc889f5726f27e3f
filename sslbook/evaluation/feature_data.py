"""Features that were extracted once as data to train on, and labels that suit a classifier."""

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from sslbook.data.datasets.base import ImageSource, Splits
from sslbook.data.loader import Batch, Data
from sslbook.data.views import View
from sslbook.errors import UserError
from sslbook.evaluation.base import Representation
from sslbook.evaluation.features import extract_with_index
from sslbook.evaluation.heads import Parts, Reading


@dataclass
class FeatureSource(ImageSource):
    """Features that were extracted once, in place of images."""

    x: Float[Tensor, "images numbers"]
    labels: Int[Tensor, "images"]

    def open(self, position: int) -> Any:
        """Raises UserError."""
        raise UserError("these are features, not images")

    def subset(self, positions: Int[Tensor, "some"]) -> "FeatureSource":
        return FeatureSource(self.x[positions], self.labels[positions])


class FeatureData(Data):
    """Features of training and test images as data, whose only view is the feature.

    Args:
        train: of the training images.
        test: of the test images.
        like: the data whose classes these are.
    """

    def __init__(self, train: FeatureSource, test: FeatureSource, like: Data) -> None:
        super().__init__()
        self.name, self._splits = like.name, Splits(train, train, test, like.class_names)

    def adapted(self, view: View) -> View:
        return view

    def _load(self, source: Any, views: Any, positions: Any, seed: int, epoch: int, device: Any, training: bool) -> Any:
        for index in positions:
            yield Batch((source.x[index].to(device),), index.to(device), source.labels[index].to(device))


class _Packed(nn.Module):
    """All parts of a reading as one vector for each image, as extraction wants it."""

    def __init__(self, backbone: nn.Module, reading: Reading) -> None:
        super().__init__()
        self.backbone, self.reading = backbone, reading

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([part.flatten(1) for part in self.reading(self.backbone, x)], dim=1)


def unpack(dims: list[torch.Size], _: nn.Module, x: Tensor) -> Parts:
    parts = x.split([shape.numel() for shape in dims], dim=1)
    return [part.unflatten(1, shape) for part, shape in zip(parts, dims)]


def read_once(model: Representation, data: Data, reading: Reading) -> tuple[FeatureData, Tensor]:
    """What a reading gives for the evaluation view of all images, as data; and their positions among the training images."""
    packed = _Packed(model.backbone, reading)
    options = {"device": model.device, "batch_size": model.batch_size, "progress": model.progress}
    train, test = (extract_with_index(packed, data, split, model.view, **options) for split in ("train", "test"))
    sources = (FeatureSource(part.x, part.y) for part in (train, test))
    return FeatureData(*sources, like=data), train.index


def require_labels(data: Data, positions: Int[Tensor, "some"], batch_size: int) -> None:
    """UserError if labels do not suit: not one class each, more than there are classes, a class without images."""
    labels, test = data.labels("train"), data.labels("test")
    names = data.class_names
    if labels.ndim != 1 or labels.is_floating_point():
        raise UserError(f"{data.name} has several labels for an image, or numbers: this protocol needs one class each")
    train, test = labels[positions], test[test >= 0]
    if (most := int(torch.cat([train, test]).max())) >= len(names):
        raise UserError(f"{data.name} has a label {most} and {len(names)} classes: mend its labels, which begin at 0")
    if len(train) < len(names):
        raise UserError(f"{len(train)} training images of {len(names)} classes: give at least one of each")
    absent = [names[i] for i in test.unique().tolist() if not bool((train == i).any())]
    if absent:
        shown = ", ".join(absent[:3]) + (f", ... ({len(absent)})" if len(absent) > 3 else "")
        raise UserError(f"test images of classes without any training image: {shown}; add some, or leave these out")
    if batch_size > len(train):
        raise UserError(
            f"a batch of {batch_size} of {len(train)} training images: lower --training.batch_size"
            " (of a choice, a part is set aside)"
        )
