"""Depth from one image: a linear head on frozen maps, as in DINOv2 (Oquab et al., 2023, section 7.4, "lin. 1").

The output of a linear layer on every cell, after batch norm, is a weight for each of 256 depths between `min_depth` and
`max_depth`; with the weights made positive and of sum one, their mean is the predicted depth (AdaBins' reading with
fixed bins). The loss is the scale-invariant log loss (Eigen et al., 2014) in the form of AdaBins and DINOv2,
sqrt(var(g) + 0.15 mean(g)^2) with g = log(predicted) - log(true), here of each image, and then their mean; DINOv2 has
that of the batch, and a second loss between gradients.

Predictions are resized to the depth maps. Errors are those of each test image over the pixels whose depth is known and
lies in range, and then their mean over images: RMSE in the unit of depth, the mean absolute error relative to the
depth, and the percentage of pixels within a factor of 1.25.
"""

import copy
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from sslbook import distributed
from sslbook.data.datasets.masks import pairs, read_depth
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
    resized,
)
from sslbook.evaluation.target_data import PairData
from sslbook.nn.backbones import backbone_dim
from sslbook.schedules import Cosine, Warmup
from sslbook.types import PositiveFloat, PositiveInt

BINS = 256


class Depth(Protocol):
    """Errors of depth predicted from frozen maps by a linear head.

    Args:
        images: folder of training images.
        depths: folder of their depth, files of the same names: 16-bit PNG or .npy; values of 0 are unknown.
        test_images: folder of test images.
        test_depths: folder of their depth.
        scale: values of a file are divided by this, such as 1000 for millimeters (NYU), 256 for KITTI.
        min_depth: smallest depth that counts.
        max_depth: largest depth that counts: 10 for rooms (NYU), 80 for streets (KITTI).
        size: side of the training crops, and the shorter side of a whole test image; by default that of the run.
        steps: optimizer steps.
        train_batch_size: crops in a step, over all processes.
        lrs: learning rates of AdamW, one head for each; the RMSE on a tenth of the training images chooses.
        weight_decay: of AdamW.
        precision: of training.
    """

    needs = "maps"
    uses_data = False
    labels = False
    title = "Depth: errors in its unit and relative to it, and percentage within a quarter"
    digits = 3
    cost = "minutes to hours"

    def __init__(
        self,
        images: Path | None = None,
        depths: Path | None = None,
        test_images: Path | None = None,
        test_depths: Path | None = None,
        scale: PositiveFloat = 1000.0,
        min_depth: PositiveFloat = 0.001,
        max_depth: PositiveFloat = 10.0,
        size: PositiveInt | None = None,
        steps: PositiveInt = 38_400,
        train_batch_size: PositiveInt = 16,
        lrs: list[PositiveFloat] = [1e-4, 3e-4, 1e-3, 3e-3],  # noqa: B006 (never changed)
        weight_decay: float = 0.01,
        precision: Literal["float32", "bf16"] = "float32",
    ) -> None:
        at_least_one(steps=steps, train_batch_size=train_batch_size)
        if not lrs:
            raise UserError("lrs is empty: give at least one value")
        if not 0 < min_depth < max_depth:
            raise UserError(f"min_depth {min_depth} and max_depth {max_depth}: give 0 < min_depth < max_depth")
        self.images, self.depths, self.test_images, self.test_depths = images, depths, test_images, test_depths
        self.scale, self.min_depth, self.max_depth = scale, min_depth, max_depth
        self.size, self.steps, self.train_batch_size = size, steps, train_batch_size
        self.lrs, self.weight_decay, self.precision = list(lrs), weight_decay, precision
        self._data: PairData | None = None
        self._known: dict[str, Float[Tensor, "pixels"]] = {}
        self._shown: list[Shown] = []

    @property
    def pairs(self) -> PairData:
        """The images and depths that the options name, found once; UserError if one is missing."""
        if self._data is None:
            if not (self.images and self.depths and self.test_images and self.test_depths):
                raise UserError("depth needs --images, --depths, --test_images and --test_depths")
            read = partial(read_depth, scale=self.scale)
            train, test = pairs(self.images, self.depths, read), pairs(self.test_images, self.test_depths, read)
            self._data = PairData(train, test, name=self.depths.name)
        return self._data

    def lacks(self, backbone: nn.Module, data: Data) -> str | None:
        for split in ("train", "test"):  # what is missing there is reported before anything is trained
            self.known(split)
        return super().lacks(backbone, data)

    def run(self, model: Representation, data: Data) -> Metrics:
        dense = Dense(model, self.pairs, self.size, crop=(0.2, 1.0))
        details: dict[str, Any] = {"data": self.pairs.describe(), "size": dense.view.size}
        with torch.random.fork_rng():
            torch.manual_seed(model.seed)
            backbone = copy.deepcopy(model.backbone)
            heads = [BinnedDepth(backbone_dim(backbone), self.min_depth, self.max_depth) for _ in self.lrs]
        loss = partial(scale_invariant_log_loss, limits=(self.min_depth, self.max_depth))
        task = DenseTask(backbone, heads, loss, dense.training_view)

        learned, held = dense.held_out() if len(self.lrs) > 1 else (self.pairs, self.pairs)
        _, losses = fit(
            task,
            learned,
            model,
            self,
            optimizer="adamw",
            lr=max(self.lrs),
            rules=learning_rates(self.lrs),
            weight_decay=self.weight_decay,
            schedule=Warmup("5 %", then=Cosine()),
            steps=self.steps,
            batch_size=self.train_batch_size,
            precision=self.precision,
        )
        details |= losses
        task.eval()
        best = 0
        if len(self.lrs) > 1:
            found = [self._errors(dense, held, lambda x, i=i: task.predict(x)[i])["RMSE"] for i in range(len(self.lrs))]
            best = min(range(len(found)), key=lambda i: found[i])
            details["chosen on a tenth of the training images"] = {"lr": self.lrs[best], "RMSE": found}
        model.details[self.name] = details
        return self._errors(dense, self.pairs, lambda x: task.predict(x)[best], show=True)

    def chance(self, data: Data) -> Metrics:
        """Of predicting the median of the training depths everywhere."""
        median = float(self.known("train").median())
        source = self.pairs._source("test")
        targets = (source.read(source.target_path(i)) for i in range(len(source)))  # pyrefly: ignore
        limits = (self.min_depth, self.max_depth)
        return mean_errors([errors(torch.full_like(target, median), target, limits) for target in targets])

    def figures(self) -> dict[str, Any]:
        """Test images, true and predicted depth, each image's on one scale."""
        if not self._shown:
            return {}
        limits = (self.min_depth, min(self.max_depth, max(float(one.target.max()) for one in self._shown)))

        def draw(axis: Any, depth: Tensor) -> None:
            axis.imshow(depth.masked_fill(depth == 0, torch.nan).numpy(), "viridis", vmin=limits[0], vmax=limits[1])

        return {"images": prediction_figure(self._shown, "depth", draw)}

    def known(self, split: Literal["train", "test"]) -> Float[Tensor, "pixels"]:
        """Depths that count, of about 1,000 pixels an image, read once; UserError if there are none."""
        if split in self._known:
            return self._known[split]
        source = self.pairs._source(split)
        found = []
        for i in range(len(source)):
            depth = source.read(source.target_path(i))  # pyrefly: ignore
            known = depth[(depth >= self.min_depth) & (depth <= self.max_depth)]
            found.append(known[:: max(1, len(known) // 1000)])
        known = torch.cat(found)
        if not len(known):
            limits = f"between {self.min_depth} and {self.max_depth}"
            folder = self.depths if split == "train" else self.test_depths
            raise UserError(f"no depth in {folder} lies {limits}: check --scale {self.scale} and --max_depth")
        self._known[split] = known
        return known

    def _errors(self, dense: Dense, data: PairData, predict: Callable[[Tensor], Tensor], show: bool = False) -> Metrics:
        found, shown, limits = [], [], (self.min_depth, self.max_depth)
        with torch.no_grad():
            for position, x, target, image in dense.images(data, "test"):
                depth = resized(predict(x).float(), target)[0, 0].cpu()
                found.append((position, errors(depth, target, limits)))
                if len(shown) < SHOWN:
                    shown.append(Shown(image, target, depth))
        if show:
            self._shown = shown if distributed.is_main() else []
        both = sorted(entry for part in distributed.all_gather_object(found) for entry in part)
        return mean_errors([one for _, one in both])


class BinnedDepth(nn.Module):
    """Batch norm and a linear layer whose outputs weigh fixed depths.

    Args:
        dim: channels of the map.
        low: the smallest depth.
        high: the largest.
    """

    depths: Tensor

    def __init__(self, dim: int, low: float, high: float) -> None:
        super().__init__()
        self.linear = nn.Sequential(frozen_norm(dim), nn.Conv2d(dim, BINS, 1))
        self.register_buffer("depths", torch.linspace(low, high, BINS))

    def forward(self, x: Float[Tensor, "batch dim rows columns"]) -> Float[Tensor, "batch 1 rows columns"]:
        weight = self.linear(x).float().relu() + 0.1  # DINOv2's: a depth is never without a weight
        weight = weight / weight.sum(dim=1, keepdim=True)
        return torch.einsum("bkhw,k->bhw", weight, self.depths)[:, None]


def scale_invariant_log_loss(
    output: Float[Tensor, "batch 1 height width"],
    target: Float[Tensor, "batch height width"],
    limits: tuple[float, float],
) -> Float[Tensor, ""]:
    """Mean over images of sqrt(var(g) + 0.15 mean(g)^2), g = log(output / target) where the depth is known."""
    known = (target >= limits[0]) & (target <= limits[1])
    count = known.sum((1, 2)).clamp(min=1)
    g = torch.where(known, output[:, 0].clamp(min=1e-6).log() - target.clamp(min=limits[0]).log(), 0.0)
    mean = g.sum((1, 2)) / count
    variance = (torch.where(known, g - mean[:, None, None], 0.0).square()).sum((1, 2)) / count
    return (variance + 0.15 * mean.square() + 1e-8).sqrt().mean()  # the gradient of a root at zero is infinite


def errors(
    depth: Float[Tensor, "height width"], target: Float[Tensor, "height width"], limits: tuple[float, float]
) -> list[float]:
    """RMSE, relative error and the percentage within a factor of 1.25, of the pixels that count; NaN without any."""
    known = (target >= limits[0]) & (target <= limits[1])
    p, t = depth[known].double().clamp(*limits), target[known].double()
    ratio = torch.maximum(p / t, t / p)
    return [
        (p - t).square().mean().sqrt().item(),
        ((p - t).abs() / t).mean().item(),
        100 * (ratio < 1.25).double().mean().item(),
    ]


def mean_errors(found: list[list[float]]) -> Metrics:
    """The mean over images that have a pixel that counts."""
    means = torch.tensor(found, dtype=torch.float64).nanmean(0).tolist()
    return dict(zip(("RMSE", "abs_rel", "delta < 1.25 (%)"), means))
