"""Detectors around a backbone: torchvision's Faster and Mask R-CNN, trained by the loop of pre-training.

- `c4`: Faster R-CNN on the map of a ResNet's third stage, its fourth stage as the head of every box (Ren et al., 2015;
  He et al., 2020, "Momentum contrast", section 4.2, with a batch norm behind that head);
- `fpn`: feature pyramid of the stages (Lin et al., 2017);
- `simple`: simple feature pyramid of a plain vision transformer (Li et al., 2022, ViTDet).

Which anchors and boxes the losses sample is keyed by seed, epoch and image, as all random choices here, and losses are
weighted by what was sampled, so that two processes take the same step as one.
"""

from collections import OrderedDict
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torchvision.models.detection import FasterRCNN, MaskRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.mask_rcnn import MaskRCNNPredictor
from torchvision.models.detection.roi_heads import paste_masks_in_image
from torchvision.ops import MultiScaleRoIAlign

from sslbook import distributed, rng
from sslbook.data.loader import Batch
from sslbook.data.views import View
from sslbook.errors import UserError
from sslbook.evaluation.target_data import MASK
from sslbook.methods.base import Method
from sslbook.nn.feature_pyramid import FeaturePyramid, SimpleFeaturePyramid
from sslbook.schedules import Clock

Kind = Literal["c4", "fpn", "simple"]
ROW = 5  # numbers of a box in a batch: left, top, right, bottom, class


class C4(nn.Module):
    """A ResNet up to its third stage: one map of a sixteenth of the resolution.

    Args:
        backbone: has `conv1` to `layer3`.
    """

    def __init__(self, backbone: nn.Module) -> None:
        super().__init__()
        names = ("conv1", "bn1", "relu", "maxpool", "layer1", "layer2", "layer3")
        self.layers = nn.Sequential(OrderedDict((name, getattr(backbone, name)) for name in names))
        self.out_channels = width(backbone.layer3)  # pyrefly: ignore

    def forward(self, x: Float[Tensor, "batch 3 height width"]) -> Float[Tensor, "batch channels rows columns"]:
        return self.layers(x)


def width(stage: Any) -> int:
    """Channels that a ResNet's stage puts out."""
    block = stage[-1]
    return (block.bn3 if hasattr(block, "bn3") else block.bn2).num_features


def kind_of(backbone: nn.Module) -> Kind:
    """The detector that suits a backbone: `simple` for one map only, `fpn` for several."""
    if hasattr(backbone, "forward_stages"):
        return "fpn"
    return "simple"


def detector(
    backbone: nn.Module,
    kind: Kind,
    num_classes: int,
    size: int,
    *,
    masks: bool = False,
    channels: int = 256,
) -> FasterRCNN:
    """torchvision's detector with this backbone in it.

    Args:
        backbone: what is transferred; it becomes a part of the detector.
        kind: c4, fpn or simple.
        num_classes: without the background.
        size: side of the square images.
        masks: a Mask R-CNN, which also outlines objects.
        channels: of the pyramid; its box head has four times as many.

    Raises:
        UserError: the backbone lacks what this kind needs.
    """
    options: dict[str, Any] = {"min_size": size, "max_size": size}
    if kind == "c4":
        if not hasattr(backbone, "layer4") or not hasattr(backbone, "maxpool"):
            raise UserError(
                f"c4 splits a ResNet before its last stage, and {type(backbone).__name__} is none: take fpn"
            )
        network: Any = C4(backbone)
        last: Any = backbone.layer4
        dim = width(last)
        pool = MultiScaleRoIAlign(["0"], output_size=14, sampling_ratio=2)
        anchors = AnchorGenerator(((32, 64, 128, 256, 512),), ((0.5, 1.0, 2.0),))
        head: nn.Module = nn.Sequential(last, nn.BatchNorm2d(dim), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        options["box_predictor"] = FastRCNNPredictor(dim, num_classes + 1)
        if masks:  # the same stage again, as in Mask R-CNN with C4
            options |= {"mask_roi_pool": pool, "mask_head": last}
            options["mask_predictor"] = MaskRCNNPredictor(dim, channels, num_classes + 1)
    else:
        network = (FeaturePyramid if kind == "fpn" else SimpleFeaturePyramid)(backbone, channels)
        with torch.no_grad():
            weight = next(backbone.parameters())
            network.eval()
            maps = network(torch.zeros(1, 3, size, size, device=weight.device))
        strides = [size / level.shape[-1] for level in maps.values()]
        pool = MultiScaleRoIAlign([name for name in maps if name != "pool"], output_size=7, sampling_ratio=2)
        anchors = AnchorGenerator(tuple((round(8 * s),) for s in strides), ((0.5, 1.0, 2.0),) * len(strides))
        head = TwoMLPHead(channels * 7**2, 4 * channels)
        options["box_predictor"] = FastRCNNPredictor(4 * channels, num_classes + 1)
        if masks:
            names = [name for name in maps if name != "pool"]
            options["mask_roi_pool"] = MultiScaleRoIAlign(names, output_size=14, sampling_ratio=2)
            options["mask_predictor"] = MaskRCNNPredictor(channels, channels, num_classes + 1)
            from torchvision.models.detection.mask_rcnn import MaskRCNNHeads

            options["mask_head"] = MaskRCNNHeads(channels, (channels,) * 4, 1)
    make = MaskRCNN if masks else FasterRCNN
    return make(network, rpn_anchor_generator=anchors, box_roi_pool=pool, box_head=head, **options)


class KeyedSampler:
    """Chooses anchors or boxes for a loss at random, keyed by the image; torchvision's would consume a generator.

    Args:
        count: how many of an image.
        positive: the largest fraction of those that hold an object.
        stream: of the random numbers.
    """

    def __init__(self, count: int, positive: float, stream: int) -> None:
        self.count, self.positive, self.stream = count, positive, stream
        self.key: tuple[int, int, Tensor] = (0, 0, torch.zeros(0, dtype=torch.int64))
        self.sampled = self.positives = 0
        """how many the last call chose in all, and how many of them hold an object"""

    def __call__(self, matched: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        seed, epoch, index = self.key
        chosen: tuple[list[Tensor], list[Tensor]] = ([], [])
        for labels, i in zip(matched, index):
            u = rng.uniform(seed, epoch, i[None].to(labels.device), self.stream, len(labels))[0]
            positive = _lowest(u, labels >= 1, int(self.count * self.positive))
            negative = _lowest(u, labels == 0, self.count - int(positive.sum()))
            for part, mask in zip(chosen, (positive, negative)):
                part.append(mask)
        self.positives, negatives = (int(sum(mask.sum() for mask in part)) for part in chosen)
        self.sampled = self.positives + negatives
        return chosen


def _lowest(u: Float[Tensor, "n"], among: Tensor, count: int) -> Tensor:
    """A mask of the `count` entries of `among` with the lowest u."""
    mask = torch.zeros_like(among, dtype=torch.bool)
    candidates = among.nonzero()[:, 0]
    mask[candidates[u[candidates].argsort()[:count]]] = True
    return mask


class DetectionTask(Method):
    """A detector, trained with torchvision's losses.

    Args:
        backbone: what is transferred.
        detector: it is a part of this.
        view: size, mean and standard deviation of the images, and how often they are mirrored.
        sampled_boxes: proposals of an image in the loss of the box head.
    """

    def __init__(self, backbone: nn.Module, detector: FasterRCNN, view: View, sampled_boxes: int = 512) -> None:
        super().__init__()
        self.backbone, self.detector, self.view = backbone, detector, view
        rpn, heads = detector.rpn, detector.roi_heads
        rpn.fg_bg_sampler = KeyedSampler(256, 0.5, rng.METHOD)  # pyrefly: ignore
        heads.fg_bg_sampler = KeyedSampler(sampled_boxes, 0.25, rng.METHOD + 1)  # pyrefly: ignore

    def views(self) -> tuple[View, ...]:
        return (self.view,)

    def forward(self, batch: Batch, clock: Clock) -> dict[str, Tensor]:
        x, rows = batch.views[0], batch.label
        targets = [target(one[one[:, 4] >= 0], x.shape[-1]) for one in rows]
        samplers: list[Any] = [self.detector.rpn.fg_bg_sampler, self.detector.roi_heads.fg_bg_sampler]
        for sampler in samplers:
            sampler.key = (clock.seed, clock.epoch, batch.index)
        sizes = [tuple(x.shape[-2:])] * len(x)
        features = self.features(x)
        proposals, first = self.detector.rpn(ImageList(x, sizes), features, targets)
        _, second = self.detector.roi_heads(features, proposals, sizes, targets)
        losses = {**first, **second}
        counts = {name: samplers[name in second].sampled for name in losses}
        if "loss_mask" in losses:
            counts["loss_mask"] = samplers[1].positives
        # Means over what each process has sampled, weighted so that their mean is that over all processes.
        names = list(losses)
        own = torch.tensor([float(counts[name]) for name in names], device=x.device)
        weight = own / distributed.all_reduce_mean(own).clamp(min=1e-6)
        losses = {name: losses[name] * w for name, w in zip(names, weight)}
        return {"loss": torch.stack(list(losses.values())).sum(), **{k: v.detach() for k, v in losses.items()}}

    def features(self, x: Float[Tensor, "batch 3 size size"]) -> OrderedDict[str, Tensor]:
        """The maps on which boxes are proposed."""
        found = self.detector.backbone(x)
        return OrderedDict([("0", found)]) if isinstance(found, Tensor) else found

    @torch.no_grad()
    def detect(self, x: Float[Tensor, "batch 3 size size"], sizes: list[tuple[int, int]]) -> list[dict[str, Tensor]]:
        """Boxes, labels from 1 and scores of each image, whose own part of the square has the given sides."""
        features = self.features(x)
        proposals, _ = self.detector.rpn(ImageList(x, sizes), features)
        found, _ = self.detector.roi_heads(features, proposals, sizes)
        return found


def target(rows: Float[Tensor, "n numbers"], size: int) -> dict[str, Tensor]:
    """What torchvision's losses want of one image: boxes, labels from 1 and, if rows have them, masks of its size."""
    found = {"boxes": rows[:, :4], "labels": rows[:, 4].long() + 1}
    if rows.shape[1] > ROW:
        masks = rows[:, ROW:].reshape(-1, 1, MASK, MASK)
        empty = rows.new_zeros(0, size, size)
        found["masks"] = paste_masks_in_image(masks, rows[:, :4], (size, size))[:, 0] if len(rows) else empty
    return found
