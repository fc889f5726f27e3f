"""The class of every pixel, and how well it agrees with masks: intersection over union as in mmsegmentation."""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sslbook.evaluation.base import Metrics
from sslbook.evaluation.dense import resized


def classified(
    scores: Float[Tensor, "1 classes rows columns"], mask: Int[Tensor, "height width"], chunk: int = 8
) -> Int[Tensor, "height width"]:
    """The class with the highest score at every pixel of the mask, the lower one of equals.

    Scores are resized a few classes at a time: those of 150 classes at once are slower, and 184 MB for 640x480 pixels.
    """
    best, found = None, torch.zeros(mask.shape, dtype=torch.int64, device=scores.device)
    for start in range(0, scores.shape[1], chunk):
        values, index = resized(scores[:, start : start + chunk], mask)[0].max(dim=0)
        better = values > best if best is not None else torch.ones_like(index, dtype=torch.bool)
        found = torch.where(better, start + index, found)
        best = values if best is None else torch.maximum(values, best)
    return found


def iou(counts: Int[Tensor, "classes classes"]) -> Float[Tensor, "classes"]:
    """Intersection over union of each class; NaN for one that occurs nowhere."""
    both = counts.diagonal().double()
    return both / (counts.sum(0) + counts.sum(1) - both)


def metrics(counts: Int[Tensor, "classes classes"]) -> Metrics:
    """Mean IoU, mean accuracy of the classes and accuracy of the pixels, in percent."""
    right, pixels = counts.diagonal().double(), counts.sum(1)
    return {
        "mIoU": 100 * iou(counts).nanmean().item(),
        "class accuracy": 100 * (right / pixels).nanmean().item(),
        "pixel accuracy": 100 * (right.sum() / pixels.sum()).item(),
    }
