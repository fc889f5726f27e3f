"""Images with a target for each, a map of values or boxes, as data: crops of both, and whole images.

A batch has its targets in the place of labels; what becomes of an image becomes of its target.

Images with boxes are brought to squares: in training of a random scale, cropped or padded (the large-scale jitter of
Ghiasi et al., 2021, which ViTDet uses, for all detectors here), in evaluation with their longer side of that length, padded.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Shaped
from torch import Tensor
from torchvision.ops import roi_align

from sslbook import rng
from sslbook.data.datasets.base import ImageSource, Splits
from sslbook.data.datasets.boxes import BoxList
from sslbook.data.datasets.coco import outline_mask
from sslbook.data.datasets.masks import PairList
from sslbook.data.executors import apply_one
from sslbook.data.loader import Batch, Data
from sslbook.data.views import CropParams, View, sample_params
from sslbook.data.workers import CropDataset

MASK = 28  # side of the masks that a batch carries, each within its box: what the mask head predicts


class TargetData(Data):
    """Images with targets, of which a dataset makes two views: the image, and its target.

    Args:
        splits: whose sources open an image with its target.
        name: of the data, for folders and tables.
        workers: processes that decode images.
    """

    def __init__(self, splits: Splits, name: str, workers: int | None) -> None:
        super().__init__(augment="workers", workers=workers)
        self.name, self._splits = name, splits

    def _load(self, source: ImageSource, views: tuple[View, ...], *rest: Any, **options: Any) -> Iterator[Batch]:
        for batch in super()._load(source, (views[0], views[0]), *rest, **options):
            yield Batch(batch.views[:1], batch.index, batch.views[1])


# -- a value for every pixel -------------------------------------------------------------------------------------------


def crop_target(target: Shaped[Tensor, "height width"], crop: CropParams, size: int) -> Shaped[Tensor, "{size} {size}"]:
    """The values that belong to the pixels of a cropped, resized and flipped image: the nearest of each."""
    top, left, height, width = crop.box[0].tolist()
    grid_height, grid_width, y, x = crop.grid[0].tolist()
    pixel = torch.arange(size) + 0.5
    rows = top + ((pixel + y) * (height / grid_height)).long().clamp(max=height - 1)
    columns = left + ((pixel + x) * (width / grid_width)).long().clamp(max=width - 1)
    return target[rows][:, columns.flip(0) if crop.flip[0] else columns]


class PairDataset(CropDataset):
    """Crops of pairs: the first of its two views is the image, the second the target, cropped by the same parameters."""

    def _augment(self, view: View, images: Sequence[Any], epoch: int, index: Tensor, stream: int) -> list[Tensor]:
        made = []
        for (image, target), i in zip(images, index.tolist()):
            if stream == 0:
                made.append(apply_one(view, image, self.seed, epoch, i, 0))
            else:
                sides = (torch.tensor([side]) for side in target.shape)
                crop = sample_params(view, self.seed, epoch, torch.tensor([i]), 0, *sides).crop
                made.append(crop_target(target, crop, view.size))
        return made


class PairData(TargetData):
    """Images with targets; a batch has the targets of its crops, `(batch, size, size)`, in the place of labels.

    Args:
        train: pairs to train on.
        test: pairs to evaluate on.
        class_names: names of the classes, if there are any.
        name: of the data, for folders and tables.
        workers: processes that decode images.
    """

    def __init__(
        self,
        train: PairList,
        test: PairList | None = None,
        class_names: tuple[str, ...] = (),
        name: str = "pairs",
        workers: int | None = None,
    ) -> None:
        super().__init__(Splits(train, train, test, class_names), name, workers)

    def _dataset(self, source: ImageSource, views: tuple[View, ...], seed: int, training: bool) -> CropDataset:
        return PairDataset(source, views, seed, True, training)


# -- boxes -------------------------------------------------------------------------------------------------------------


class BoxDataset(CropDataset):
    """Square images and, as the second of two views, their boxes, in rows of `(most, 5)` that -1 fills up.

    Args:
        scale: range of the longer side, relative to that of the square.
        masks: a row goes on with the object's mask within its box.
    """

    source: BoxList
    scale: tuple[float, float] = (1.0, 1.0)
    masks: bool = False

    def _augment(self, view: View, images: Sequence[Any], epoch: int, index: Tensor, stream: int) -> list[Tensor]:
        made = []
        for (image, position), i in zip(images, index.tolist()):
            scale, left, top, flip = rng.uniform(self.seed, epoch, torch.tensor([i]), 0, 4)[0].tolist()
            size, (low, high) = view.size, self.scale
            factor = (low + (high - low) * scale) * size / max(image.height, image.width)
            height, width = (max(1, round(side * factor)) for side in (image.height, image.width))
            top, left = int(top * (max(0, height - size) + 1)), int(left * (max(0, width - size) + 1))
            place = (height / image.height, width / image.width, top, left)  # as rounded to whole pixels
            mirrored = self.training and flip < view.flip
            if stream == 0:
                made.append(square(image, view, (height, width), (top, left), mirrored))
            else:
                made.append(self._rows(position, size, place, mirrored))
        return made

    def _rows(
        self, position: int, size: int, place: tuple[float, float, int, int], mirrored: bool
    ) -> Float[Tensor, "most numbers"]:
        """The boxes of an image as they lie in its square; those that the crop leaves less than a pixel are dropped."""
        tall, wide, top, left = place
        where = self.source.slice(position)
        rows = self.source.rows[where]
        learned = rows[:, 5] == 0
        offset, stretch = torch.tensor([left, top] * 2), torch.tensor([wide, tall] * 2)
        boxes = (rows[:, :4] * stretch - offset).clamp(0, size)
        kept = learned & ((boxes[:, 2:] - boxes[:, :2]) >= 1).all(1)
        parts = [boxes[kept], rows[kept, 4:5]]
        if self.masks:
            inside = ((boxes + offset) / stretch)[kept]
            chosen = [self.source.outlines[where.start + i] for i in kept.nonzero()[:, 0].tolist()]
            parts.append(self._masks(chosen, inside, self.source.sizes[position].tolist(), mirrored))
        found = torch.cat(parts, dim=1)
        if mirrored:
            found[:, [0, 2]] = size - found[:, [2, 0]]
        return F.pad(found, (0, 0, 0, self.source.most - len(found)), value=-1.0)

    def _masks(
        self, outlines: list[Any], boxes: Float[Tensor, "n 4"], size: list[int], mirrored: bool
    ) -> Float[Tensor, "n pixels"]:
        """The mask of each object within its box, as fractions of `MASK` x `MASK` cells."""
        made = torch.zeros(len(boxes), MASK, MASK)
        for i, (outline, box) in enumerate(zip(outlines, boxes)):
            mask = torch.from_numpy(outline_mask(outline, size[1], size[0])).float()[None, None]
            made[i] = roi_align(mask, [box[None]], MASK, aligned=True)[0, 0]
        return (made.flip(-1) if mirrored else made).flatten(1)


def square(image: Any, view: View, sides: tuple[int, int], corner: tuple[int, int], mirrored: bool) -> Tensor:
    """A PIL image resized to `sides`, cropped from `corner` on and padded with the mean color to a square."""
    from torchvision.transforms.v2 import functional as T

    (height, width), (top, left), size = sides, corner, view.size
    x = T.pil_to_tensor(image).float() / 255
    x = T.resize(x, [height, width], antialias=True)[:, top : top + size, left : left + size]
    x = T.normalize(x, list(view.mean), list(view.std))
    x = F.pad(x, (0, size - x.shape[2], 0, size - x.shape[1]))
    return x.flip(-1) if mirrored else x


class BoxData(TargetData):
    """Images with boxes; a batch has its boxes in the place of labels: `(batch, most, 5)`, filled up by -1.

    Args:
        train: images to train on; those without a box to learn from are left out.
        test: images to evaluate on.
        scale: range of the longer side in training, relative to that of the square.
        masks: rows of boxes go on with masks.
        workers: processes that decode images.
        name: of the data, for folders and tables.
    """

    def __init__(
        self, train: BoxList, test: BoxList, scale: tuple[float, float], masks: bool, workers: int, name: str
    ) -> None:
        train = train.with_boxes()
        super().__init__(Splits(train, train, test, train.class_names), name, workers)
        self.scale, self.masks = scale, masks

    def _dataset(self, source: ImageSource, views: tuple[View, ...], seed: int, training: bool) -> CropDataset:
        made = BoxDataset(source, views, seed, True, training)
        made.masks, made.scale = self.masks and training, self.scale if training else (1.0, 1.0)
        return made
