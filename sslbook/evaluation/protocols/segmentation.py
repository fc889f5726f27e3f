"""Semantic segmentation: a class for every pixel, from the maps of a backbone; mean intersection over union (mIoU).

Three heads, of rising cost:

- `knn`: no training. Every cell of the map of a test image finds its nearest cells among those of the training images
  and takes the mean of their pixels' labels, weighted by exp(similarity / T) (Balazevic et al., 2023, "Towards
  in-context scene understanding", section 3, which has k = 30, T = 0.02).
- `linear`: batch norm and a 1x1 convolution on frozen maps, as in DINOv2 (Oquab et al., 2023, section 7.4) and DINOv3.
  One head for every learning rate, all of them trained at once, since they share the pass through the backbone; the one
  with the best mIoU on a tenth of the training images is measured on the test images.
- `fcn`: the whole network is trained with a fully convolutional head (Long et al., 2015), as in OpenSelfSup and
  MMSelfSup with mmsegmentation's FCN on VOC12aug: two 3x3 convolutions whose output joins their input, a third, and an
  auxiliary head on the last map but one. The last two stages of a ResNet are dilated, so that a cell is 8 pixels
  (R50-d8). Crops are random resized crops instead of a random scale of 0.5 to 2 with a crop of its own; they never need
  padding.

The mIoU is that of mmsegmentation: intersection and union of each class are summed over all test images, and the mean is
over the classes that occur in masks or predictions. A mask keeps its own resolution: what a head predicts is resized to
it. Resizing masks to the prediction instead raises the mIoU by points, since thin objects vanish.
"""

import copy
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from sslbook import distributed, rng
from sslbook.data.datasets.masks import IGNORED, find_layout, load_masks
from sslbook.data.loader import Data
from sslbook.errors import UserError, at_least_one
from sslbook.evaluation.base import Metrics, Protocol, Representation
from sslbook.evaluation.dense import (
    SHOWN,
    Dense,
    DenseTask,
    Shown,
    fit,
    frozen_norm,
    learning_rates,
    prediction_figure,
)
from sslbook.evaluation.features import frozen
from sslbook.evaluation.pixels import classified, iou, metrics
from sslbook.evaluation.target_data import PairData
from sslbook.nn.backbones import backbone_dim
from sslbook.nn.fcn import FCNHead, dilate
from sslbook.nn.feature_pyramid import stage_widths
from sslbook.schedules import Linear, Warmup
from sslbook.types import PositiveFloat, PositiveInt

Score = Callable[[Tensor], Tensor]  # an image (1, 3, height, width) to scores (1, classes, rows, columns)


class Segmentation(Protocol):
    """Mean intersection over union of predicted and true masks.

    Args:
        folder: a data set laid out as VOC 2012 (with SBD's masks in SegmentationClassAug if there are any), ADE20K or
            Cityscapes.
        images: a folder of training images instead, with index masks of the same names in `masks`.
        masks: the folder of their masks.
        test_images: the folder of test images.
        test_masks: the folder of their masks.
        ignore: values in masks that count neither in the loss nor in the metric, where no layout says it; often 0, too.
        head: knn and linear measure frozen maps, fcn trains the whole network.
        size: side of the training crops, and the shorter side of a whole test image; by default that of the run.
        steps: optimizer steps.
        train_batch_size: crops in a step, over all processes.
        lrs: learning rates: for linear, heads among which a tenth of the training images chooses; fcn takes one. By
            default 1e-4 to 1e-2 for linear (AdamW), 0.01 for fcn (SGD).
        weight_decay: by default 1e-3 for linear, 5e-4 for fcn.
        precision: of training.
        k: neighbors of a cell, for knn.
        temperature: of their votes.
        bank: the most cells of training images that are compared; as many from each image.
    """

    needs = "maps"
    uses_data = False
    labels = False
    cost = "minutes (knn) to hours"

    def __init__(
        self,
        folder: Path | None = None,
        images: Path | None = None,
        masks: Path | None = None,
        test_images: Path | None = None,
        test_masks: Path | None = None,
        ignore: Sequence[int] = (255,),
        head: Literal["linear", "knn", "fcn"] = "linear",
        size: PositiveInt | None = None,
        steps: PositiveInt = 20_000,
        train_batch_size: PositiveInt = 16,
        lrs: Sequence[PositiveFloat] | None = None,
        weight_decay: float | None = None,
        precision: Literal["float32", "bf16"] = "float32",
        k: PositiveInt = 30,
        temperature: PositiveFloat = 0.02,
        bank: PositiveInt = 200_000,
    ) -> None:
        at_least_one(steps=steps, train_batch_size=train_batch_size, k=k, bank=bank)
        self.folder, self.images, self.masks = folder, images, masks
        self.test_images, self.test_masks, self.ignore = test_images, test_masks, tuple(ignore)
        self.head, self.size, self.steps, self.train_batch_size = head, size, steps, train_batch_size
        if lrs is not None and not lrs:
            raise UserError("lrs is empty: give at least one value")
        self.lrs = list(lrs or {"linear": (1e-4, 3e-4, 1e-3, 3e-3, 1e-2), "fcn": (0.01,)}.get(head, ()))
        self.weight_decay = {"fcn": 5e-4}.get(head, 1e-3) if weight_decay is None else weight_decay
        self.precision, self.k, self.temperature, self.bank = precision, k, temperature, bank
        if head == "fcn" and len(self.lrs) != 1:
            raise UserError(f"lrs {self.lrs}: fcn trains one network, so give one learning rate")
        self._data: PairData | None = None
        self._shown: list[Shown] = []

    @property
    def pairs(self) -> PairData:
        """The images and masks that the options name, found once; UserError if one is missing."""
        if self._data is None:
            four = (self.images, self.masks, self.test_images, self.test_masks)
            if self.folder is not None and not any(four):
                found, name = find_layout(self.folder), self.folder.name
            elif self.folder is None and self.images and self.masks and self.test_images and self.test_masks:
                found = load_masks((self.images, self.masks), (self.test_images, self.test_masks), self.ignore)
                name = self.masks.name
            else:
                raise UserError("segmentation needs --folder, or --images, --masks, --test_images and --test_masks")
            self._data = PairData(found.train, found.test, found.class_names, name)
        return self._data

    def lacks(self, backbone: nn.Module, data: Data) -> str | None:
        _ = self.pairs  # what is missing there is reported before anything is trained
        return super().lacks(backbone, data)

    def run(self, model: Representation, data: Data) -> Metrics:
        pairs = self.pairs
        dense = Dense(model, pairs, self.size, crop=(0.2, 1.0))
        details: dict[str, Any] = {"data": pairs.describe(), "size": dense.view.size}
        if self.head == "knn":
            with frozen(model.backbone.to(dense.device)):
                counts = confusion(dense, pairs, self._nearest(dense), self._show)
        else:
            counts = confusion(dense, pairs, self._trained(dense, details), self._show)
        details["classes"] = dict(zip(pairs.class_names, iou(counts).mul(100).tolist()))
        details["classes"] = {name: value for name, value in details["classes"].items() if value == value}
        model.details[self.name] = details
        return metrics(counts)

    def chance(self, data: Data) -> Metrics:
        """Of predicting the class with the most pixels in the training masks everywhere."""
        totals = [self._pixels(split) for split in ("train", "test")]
        counts = torch.zeros(len(totals[0]), len(totals[0]), dtype=torch.int64)
        counts[:, totals[0].argmax()] = totals[1]
        return metrics(counts)

    def figures(self) -> dict[str, Any]:
        """Test images, masks and predictions."""
        classes = self.pairs.num_classes

        def draw(axis: Any, mask: Tensor) -> None:
            axis.imshow(mask.masked_fill(mask == IGNORED, classes).numpy(), "tab20", vmin=0, vmax=classes)

        return {"images": prediction_figure(self._shown, "mask", draw)} if self._shown else {}

    def _show(self, position: int, shown: Shown) -> None:
        if position == 0:
            self._shown = []
        if distributed.is_main() and len(self._shown) < SHOWN:
            self._shown.append(shown)

    def _pixels(self, split: Literal["train", "test"]) -> Int[Tensor, "classes"]:
        """How many pixels each class has."""
        source = self.pairs._source(split)
        masks = (source.read(source.target_path(i)) for i in range(len(source)))  # pyrefly: ignore
        return torch.stack([mask[mask >= 0].bincount(minlength=self.pairs.num_classes) for mask in masks]).sum(0)

    # -- kNN -----------------------------------------------------------------------------------------------------------

    def _nearest(self, dense: Dense) -> Score:
        """The scores of a test image by the nearest cells of the training images."""
        model: Any = dense.model.backbone
        classes, share = dense.data.num_classes, max(1, self.bank // len(dense.data._splits.train))
        own = {}
        for position, x, mask, _ in dense.images(dense.data, "train"):
            features = model.forward_map(x)[0].float().cpu()
            labels = cell_labels(mask, features.shape[1], features.shape[2], classes)
            known = (labels.sum(1) > 0).nonzero()[:, 0]
            u = rng.uniform(dense.model.seed, 0, torch.tensor([position]), rng.METHOD, len(known))[0]
            chosen = known[u.argsort()[:share]]
            own[position] = (features.flatten(1).T[chosen], labels[chosen])
        parts = {position: part for some in distributed.all_gather_object(own) for position, part in some.items()}
        cells, labels = (torch.cat(part) for part in zip(*(parts[position] for position in sorted(parts))))
        if not len(cells):
            raise UserError("no training mask holds a class that is not ignored: check --ignore")

        cells, labels = F.normalize(cells, dim=1).to(dense.device), labels.to(dense.device)
        k = min(self.k, len(cells))

        def score(x: Tensor) -> Tensor:
            features = model.forward_map(x)[0].float()
            queries = F.normalize(features.flatten(1).T, dim=1)
            # A part at a time: the similarities of 1,000 cells to a bank of 200,000 are 800 MB.
            best = [(part @ cells.T).topk(k, dim=1) for part in queries.split(128)]
            votes = [torch.einsum("nk,nkc->cn", (s / self.temperature).softmax(1), labels[index]) for s, index in best]
            return torch.cat(votes, dim=1).view(1, classes, *features.shape[1:])

        return score

    # -- heads ---------------------------------------------------------------------------------------------------------

    def _trained(self, dense: Dense, details: dict[str, Any]) -> Score:
        """The scores of a head after training, and for linear of the one that was chosen."""
        task, choose = self._task(dense), self.head == "linear" and len(self.lrs) > 1
        learned, held = dense.held_out() if choose else (dense.data, dense.data)
        _, losses = fit(
            task,
            learned,
            dense.model,
            self,
            optimizer="sgd" if self.head == "fcn" else "adamw",
            lr=max(self.lrs),
            rules=learning_rates(self.lrs) if self.head == "linear" else [],
            weight_decay=self.weight_decay,
            schedule=Linear() if self.head == "fcn" else Warmup("4 %", then=Linear()),
            steps=self.steps,
            batch_size=self.train_batch_size,
            precision=self.precision,
        )
        details |= losses
        task.eval()
        best = 0
        if choose:
            found = [
                metrics(confusion(dense, held, lambda x, i=i: task.predict(x)[i]))["mIoU"] for i in range(len(self.lrs))
            ]
            best = max(range(len(found)), key=lambda i: found[i])
            details["chosen on a tenth of the training images"] = {"lr": self.lrs[best], "mIoU": found}
        return lambda x: task.predict(x)[best]

    def _task(self, dense: Dense) -> DenseTask:
        classes, loss = dense.data.num_classes, pixel_cross_entropy
        with torch.random.fork_rng():
            torch.manual_seed(dense.model.seed)
            backbone = copy.deepcopy(dense.model.backbone)
            dim = backbone_dim(backbone)
            if self.head == "linear":
                heads = [nn.Sequential(frozen_norm(dim), nn.Conv2d(dim, classes, 1)) for _ in self.lrs]
                return DenseTask(backbone, heads, loss, dense.training_view)
            backbone.requires_grad_(True)
            auxiliary = None
            if hasattr(backbone, "forward_stages"):
                before = stage_widths(backbone)[-2]
                auxiliary = FCNHead(before, classes, convolutions=1, width=256, joins=False)
            dilate(backbone)
            heads = [FCNHead(dim, classes)]
            return DenseTask(backbone, heads, loss, dense.training_view, frozen=False, auxiliary=auxiliary)


def pixel_cross_entropy(
    scores: Float[Tensor, "batch classes height width"], mask: Int[Tensor, "batch height width"]
) -> Float[Tensor, ""]:
    """Summed over known pixels and divided by the number of all, so that every process weighs its images alike."""
    return F.cross_entropy(scores, mask, ignore_index=IGNORED, reduction="sum") / mask.numel()


def cell_labels(
    mask: Int[Tensor, "height width"], rows: int, columns: int, classes: int
) -> Float[Tensor, "cells {classes}"]:
    """The fraction of each class among the known pixels of every cell of a map; zeros where none is known."""
    height, width = mask.shape
    row, column = torch.arange(height) * rows // height, torch.arange(width) * columns // width
    cell = row[:, None] * columns + column
    known = mask >= 0
    counts = (cell[known] * classes + mask[known]).bincount(minlength=rows * columns * classes)
    counts = counts.view(-1, classes).float()
    return counts / counts.sum(1, keepdim=True).clamp(min=1)


def confusion(
    dense: Dense,
    data: PairData,
    score: Score,
    show: Callable[[int, Shown], None] | None = None,
) -> Int[Tensor, "classes classes"]:
    """Pixels of all test images by their class (row) and the predicted one (column), over all processes."""
    classes = data.num_classes
    counts = torch.zeros(classes * classes, dtype=torch.int64)
    with torch.no_grad():
        for position, x, mask, image in dense.images(data, "test"):
            predicted = classified(score(x).float(), mask).cpu()
            known = mask >= 0
            counts += (mask[known] * classes + predicted[known]).bincount(minlength=classes**2)
            if show is not None:
                show(position, Shown(image, mask, predicted))
    return distributed.all_reduce_sum(counts.to(dense.device)).cpu().view(classes, classes)
