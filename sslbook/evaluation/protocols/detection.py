"""Object detection: a backbone inside Faster or Mask R-CNN, all of it trained; average precision of boxes and masks.

The detectors are torchvision's (`sslbook.evaluation.detectors`), the metrics pycocotools' for COCO and those of its own
development kit for VOC. What pre-training is worth here depends on the length of training: after COCO's 3x schedule
random weights come close (He, Girshick and Dollar, 2019, "Rethinking ImageNet pre-training"), so random weights with the
same schedule belong beside every figure.
"""

import copy
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from sslbook import distributed
from sslbook.data.datasets.boxes import BoxList
from sslbook.data.datasets.coco import load_coco
from sslbook.data.datasets.voc import load_voc
from sslbook.data.loader import Data
from sslbook.data.views import View
from sslbook.errors import UserError, at_least_one, import_extra
from sslbook.evaluation.base import Metrics, Protocol, Representation
from sslbook.evaluation.boxes import Detections, coco_metrics, voc_metrics
from sslbook.evaluation.dense import fit
from sslbook.evaluation.detectors import DetectionTask, detector, kind_of
from sslbook.evaluation.target_data import BoxData
from sslbook.schedules import Duration, Step, Warmup
from sslbook.types import PositiveFloat, PositiveInt

SHOWN, SURE = 4, 0.5  # test images in a figure, and the least score of a box in it


class Detection(Protocol):
    """Average precision of a detector that is trained from the backbone's weights.

    Args:
        coco: a folder laid out as COCO: `annotations/instances_train2017.json`, `train2017/`, and the same of `val`.
        voc: a folder with VOC2007 (trained on `trainval`, measured on `test`) and, if it is there, VOC2012's `trainval`.
        detector: c4 and fpn for networks with stages, simple (ViTDet) for transformers; by default fpn, or simple for a
            backbone with one map only.
        masks: also outline objects (Mask R-CNN); the annotations of COCO then need `segmentation`.
        size: side of the square that an image is brought to.
        scale: range of the longer side in training, relative to `size`.
        channels: of the feature pyramid; its box head has four times as many.
        sampled_boxes: proposals of an image in the loss of the box head; fewer for small images on a CPU.
        steps: optimizer steps.
        train_batch_size: images in a step, over all processes.
        optimizer: sgd, or adamw for transformers.
        lr: learning rate.
        weight_decay: weight decay.
        milestones: where the learning rate falls to a tenth, such as '75 %'.
        warmup: duration of the linear warm-up.
        layer_decay: factor of the learning rate for every layer further from the backbone's end; ViTDet has 0.7 for B.
        clip_grad_norm: greatest norm of the whole gradient.
        precision: of training.
    """

    needs = "maps"
    uses_data = False
    labels = False
    trains = True
    title = "Average precision in %"
    cost = "hours"

    def __init__(
        self,
        coco: Path | None = None,
        voc: Path | None = None,
        detector: Literal["c4", "fpn", "simple"] | None = None,
        masks: bool = False,
        size: PositiveInt = 1024,
        scale: tuple[float, float] = (0.5, 1.25),
        channels: PositiveInt = 256,
        sampled_boxes: PositiveInt = 512,
        steps: PositiveInt = 90_000,
        train_batch_size: PositiveInt = 16,
        optimizer: Literal["sgd", "adamw"] = "sgd",
        lr: PositiveFloat = 0.02,
        weight_decay: float = 1e-4,
        milestones: list[Duration] = ["67 %", "89 %"],  # noqa: B006 (never changed)
        warmup: Duration = "1 %",
        layer_decay: PositiveFloat | None = None,
        clip_grad_norm: PositiveFloat | None = None,
        precision: Literal["float32", "bf16"] = "float32",
    ) -> None:
        at_least_one(steps=steps, train_batch_size=train_batch_size, size=size, sampled_boxes=sampled_boxes)
        if not 0 < scale[0] <= scale[1]:
            raise UserError(f"scale {scale}: give an increasing pair of positive numbers")
        self.coco, self.voc, self.detector, self.masks = coco, voc, detector, masks
        self.size, self.scale, self.channels, self.sampled_boxes = size, tuple(scale), channels, sampled_boxes
        self.steps, self.train_batch_size, self.optimizer = steps, train_batch_size, optimizer
        self.lr, self.weight_decay, self.milestones, self.warmup = lr, weight_decay, list(milestones), warmup
        self.layer_decay, self.clip_grad_norm, self.precision = layer_decay, clip_grad_norm, precision
        self._lists: tuple[BoxList, BoxList] | None = None
        self._shown: list[tuple[Any, Any, Detections]] = []

    @property
    def lists(self) -> tuple[BoxList, BoxList]:
        """Training and test images that the options name, read once; UserError if they name none."""
        if self._lists is None:
            if (self.coco is None) == (self.voc is None):
                raise UserError("detection needs --coco FOLDER or --voc FOLDER, one of them")
            if self.voc is not None and self.masks:
                raise UserError("masks true: VOC has no outlines for its boxes; give --coco")
            if self.coco is not None:
                import_extra("pycocotools", "detection")  # before the training, not after it
                self._lists = load_coco(self.coco, self.masks)
            else:
                self._lists = load_voc(self.voc)
            for images in self._lists:
                images.with_boxes()  # refuses images without any
        return self._lists

    def lacks(self, backbone: nn.Module, data: Data) -> str | None:
        if (lack := super().lacks(backbone, data)) is not None:
            return lack
        _ = self.lists  # what is missing there is reported before anything is trained
        if self.detector == "fpn" and not hasattr(backbone, "forward_stages"):
            return f"for fpn a backbone with forward_stages, which {type(backbone).__name__} lacks: take simple"
        if self.detector == "c4" and not (hasattr(backbone, "layer4") and hasattr(backbone, "maxpool")):
            return f"for c4 a ResNet, and {type(backbone).__name__} is none: take fpn or simple"
        patch = int(getattr(backbone, "patch_size", 1))
        return f"a size that is a multiple of {patch}, and {self.size} is not" if self.size % patch else None

    def run(self, model: Representation, data: Data) -> Metrics:
        name = (self.coco or self.voc or Path()).name
        boxes = BoxData(*self.lists, self.scale, self.masks, data.workers, name)
        boxes.unreadable = data.unreadable
        mean, std = model.view.mean, model.view.std
        view = View(self.size, crop=None, flip=0.5, mean=mean, std=std)
        kind = self.detector or kind_of(model.backbone)
        with torch.random.fork_rng():
            torch.manual_seed(model.seed)
            backbone = copy.deepcopy(model.backbone).cpu().requires_grad_(True)
            network = detector(backbone, kind, boxes.num_classes, self.size, masks=self.masks, channels=self.channels)
        task = DetectionTask(backbone, network, view, self.sampled_boxes)
        run, losses = fit(
            task,
            boxes,
            model,
            self,
            optimizer=self.optimizer,
            lr=self.lr,
            weight_decay=self.weight_decay,
            schedule=Warmup(self.warmup, then=Step(self.milestones)),
            steps=self.steps,
            batch_size=self.train_batch_size,
            precision=self.precision,
            layer_decay=self.layer_decay,
            clip_grad_norm=self.clip_grad_norm,
        )
        task.eval()
        found = detect(task, boxes, run.device, self.masks)
        truth: Any = boxes._splits.test
        if distributed.is_main():
            metrics = coco_metrics(truth, found) if self.coco is not None else voc_metrics(truth, found)
            self._shown = [
                (truth.open(one.position)[0], truth.rows[truth.slice(one.position)], one) for one in found[:4]
            ]
        else:
            metrics = {}
        last = {key: value for key, value in run.metrics.items() if key.startswith("loss")}
        model.details[self.name] = {"data": boxes.describe(), "detector": kind, **losses, "last losses": last}
        return distributed.broadcast(metrics)

    def figures(self) -> dict[str, Any]:
        """Test images with their true boxes, and with those found that the detector is sure of."""
        if not self._shown:
            return {}
        from sslbook.notebook.style import figure

        alt = f"{len(self._shown)} test images with true boxes, and beside them with those found"
        rows = len(self._shown)
        made, axes = figure(alt, rows, 2, width=7.0, height=2.6 * rows, caption=None, squeeze=False)
        names = self.lists[0].class_names
        for row, (image, truth, one) in zip(axes, self._shown):
            sure = one.scores >= SURE
            for axis, boxes, labels in (
                (row[0], truth[:, :4], truth[:, 4]),
                (row[1], one.boxes[sure], one.classes[sure]),
            ):
                axis.imshow(image)
                axis.set_axis_off()
                for (x1, y1, x2, y2), label in zip(boxes.tolist(), labels.long().tolist()):
                    axis.add_patch(_rectangle(x1, y1, x2, y2))
                    axis.text(x1, y1, names[label], color="white", fontsize=6, va="bottom")
        axes[0][0].set_title("annotated")
        axes[0][1].set_title(f"found, score at least {SURE}")
        return {"images": made}


def _rectangle(x1: float, y1: float, x2: float, y2: float) -> Any:
    from matplotlib.patches import Rectangle

    return Rectangle((x1, y1), x2 - x1, y2 - y1, fill=False, edgecolor="white", linewidth=1.5)


def detect(task: DetectionTask, data: BoxData, device: torch.device, masks: bool) -> list[Detections]:
    """What the detector finds in every test image, over all processes, in order and in the images' own pixels."""
    truth: Any = data._splits.test
    own: list[Detections] = []
    batches = data.evaluation_batches(
        "test", task.view, 8, device, rank=distributed.rank(), world_size=distributed.world_size()
    )
    for batch in batches:
        positions = batch.index.tolist()
        sides = [tuple(truth.sizes[i].tolist()) for i in positions]
        shown = [content(*side, task.view.size) for side in sides]
        for position, side, (height, width), one in zip(positions, sides, shown, task.detect(batch.views[0], shown)):
            scale = torch.tensor([side[1] / width, side[0] / height] * 2)
            boxes = one["boxes"].float().cpu() * scale
            runs = run_lengths(one["masks"].cpu(), boxes, side) if masks else None
            own.append(Detections(position, boxes, one["labels"].cpu() - 1, one["scores"].float().cpu(), runs))
    parts = distributed.all_gather_object(own)
    return sorted((one for part in parts for one in part), key=lambda one: one.position)


def content(height: int, width: int, size: int) -> tuple[int, int]:
    """The sides of an image whose longer one was brought to `size`."""
    factor = size / max(height, width)
    return max(1, round(height * factor)), max(1, round(width * factor))


def run_lengths(masks: Tensor, boxes: Tensor, side: tuple[int, int]) -> list[Any]:
    """Masks within their boxes as COCO's run lengths in the whole image."""
    from torchvision.models.detection.roi_heads import paste_masks_in_image

    coco = import_extra("pycocotools.mask", "detection")
    whole = paste_masks_in_image(masks, boxes, side)[:, 0] > 0.5
    return [coco.encode(one.T.contiguous().T.numpy().astype("uint8", order="F")) for one in whole]
