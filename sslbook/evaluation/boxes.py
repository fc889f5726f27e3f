"""Metrics of detected boxes: COCO's by pycocotools, and the average precision of PASCAL VOC.

VOC's differs from COCO's at IoU 0.5 in what happens to difficult objects (neither found nor missed, by ordinary IoU) and
in the curve: VOC2007 averages the precision at 11 recalls, later years take the area below the whole curve, COCO 101
recalls.
"""

import contextlib
import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from torchvision.ops import box_iou

from sslbook.data.datasets.boxes import BoxList
from sslbook.errors import import_extra

NAMES = ("AP", "AP50", "AP75", "AP small", "AP medium", "AP large")


@dataclass
class Detections:
    """What was found in one image, in its own pixels."""

    position: int
    """of the image in its split"""
    boxes: Float[Tensor, "n 4"]
    """left, top, right, bottom"""
    classes: Int[Tensor, "n"]
    scores: Float[Tensor, "n"]
    masks: list[Any] | None = None
    """run lengths of COCO"""


def coco_metrics(truth: BoxList, found: Sequence[Detections]) -> dict[str, float]:
    """AP (mean over IoU 0.5 to 0.95), AP50, AP75 and AP by size of boxes in percent; of masks likewise, if found.

    Raises:
        UserError: pycocotools is not installed.
    """
    coco = import_extra("pycocotools.coco", "detection").COCO
    make = import_extra("pycocotools.cocoeval", "detection").COCOeval
    metrics: dict[str, float] = {}
    with contextlib.redirect_stdout(io.StringIO()):  # it prints as it goes
        gt = coco()
        gt.dataset = as_coco(truth)
        gt.createIndex()
        entries = [entry for one in found for entry in _entries(truth, one)]
        kinds = {"bbox": ""} | ({"segm": "mask "} if any(one.masks is not None for one in found) else {})
        for kind, prefix in kinds.items():
            if not entries:
                metrics |= {prefix + name: 0.0 for name in NAMES}
                continue
            evaluation = make(gt, gt.loadRes(entries), kind)
            evaluation.evaluate()
            evaluation.accumulate()
            evaluation.summarize()
            # -1 where no object has this size
            values = [100 * float(value) if value >= 0 else float("nan") for value in evaluation.stats[:6]]
            metrics |= {prefix + name: value for name, value in zip(NAMES, values)}
    return {name: value for name, value in metrics.items() if value == value}


def as_coco(truth: BoxList) -> dict[str, Any]:
    """The annotations in the form of COCO's files, of exactly the images and boxes of the list."""
    images, annotations = [], []
    for position in range(len(truth)):
        height, width = truth.sizes[position].tolist()
        images.append({"id": position, "width": width, "height": height})
        where = truth.slice(position)
        for i, row in enumerate(truth.rows[where].double().tolist(), start=where.start):
            x1, y1, x2, y2, label, ignored = row
            box = [x1, y1, x2 - x1, y2 - y1]
            entry = {"id": i + 1, "image_id": position, "category_id": int(label), "bbox": box}
            entry |= {"area": float(truth.areas[i]), "iscrowd": int(ignored)}
            if truth.outlines:
                entry["segmentation"] = truth.outlines[i]
            annotations.append(entry)
    categories = [{"id": i, "name": name} for i, name in enumerate(truth.class_names)]
    return {"info": {}, "images": images, "annotations": annotations, "categories": categories}


def _entries(truth: BoxList, found: Detections) -> list[dict[str, Any]]:
    made = []
    for i, (box, label, score) in enumerate(zip(found.boxes.double().tolist(), found.classes, found.scores)):
        x1, y1, x2, y2 = box
        entry = {"image_id": found.position, "category_id": int(label), "score": float(score)}
        entry["bbox"] = [x1, y1, x2 - x1, y2 - y1]
        if found.masks is not None:
            entry["segmentation"] = found.masks[i]
        made.append(entry)
    return made


def voc_metrics(truth: BoxList, found: Sequence[Detections], points: bool = True) -> dict[str, float]:
    """Mean over classes of VOC's average precision at IoU 0.5, in percent, and of it at 0.5, 0.55, ..., 0.95.

    Args:
        truth: the annotations.
        found: what was found in each image.
        points: the curve of VOC2007, at 11 recalls; else the area below it.
    """
    thresholds = [0.5 + 0.05 * i for i in range(10)]
    values = np.array(
        [[_voc_ap(truth, found, c, t, points) for c in range(len(truth.class_names))] for t in thresholds]
    )
    means = 100 * np.nanmean(values, axis=1)  # a class without an object has no precision
    return {"AP": float(means.mean()), "AP50": float(means[0]), "AP75": float(means[5])}


def _voc_ap(truth: BoxList, found: Sequence[Detections], label: int, threshold: float, points: bool) -> float:
    """Detections claim objects in the order of their scores; one of an object that is claimed already is wrong."""
    objects, difficult = {}, {}
    for position in range(len(truth)):
        rows = truth.rows[truth.slice(position)]
        rows = rows[rows[:, 4] == label]
        objects[position], difficult[position] = rows[:, :4], rows[:, 5] > 0
    total = sum(int((~hard).sum()) for hard in difficult.values())
    if total == 0:
        return float("nan")
    claimed = {position: torch.zeros(len(hard), dtype=torch.bool) for position, hard in difficult.items()}
    entries = [
        (float(score), one.position, box)
        for one in found
        for score, box in zip(one.scores[one.classes == label], one.boxes[one.classes == label])
    ]
    right = []
    for _, position, box in sorted(entries, key=lambda entry: -entry[0]):
        overlap = box_iou(box[None], objects[position])[0]
        best = int(overlap.argmax()) if len(overlap) else 0
        if len(overlap) and overlap[best] >= threshold:
            if difficult[position][best]:
                continue
            right.append(not claimed[position][best])
            claimed[position][best] = True
        else:
            right.append(False)
    hits = np.cumsum(right)
    recall, precision = hits / total, hits / np.arange(1, len(hits) + 1)
    if points:
        above = [precision[recall >= r].max(initial=0.0) for r in np.linspace(0, 1, 11)]
        return float(np.mean(above))
    falling = np.maximum.accumulate(precision[::-1])[::-1]  # the highest precision at this recall or above
    return float(np.sum(np.diff(recall, prepend=0.0) * falling))
