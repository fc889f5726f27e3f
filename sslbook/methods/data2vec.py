"""data2vec: predict what a teacher that sees everything makes of the patches one does not see.

The student gets an image with blocks of patches replaced by a mask token. For each of these it predicts the average of
what the teacher's upper blocks say there; the teacher is a moving average of the student and sees the whole image, so
its answers hold more than the patch. Normalizing every block's output before averaging keeps one block from deciding
alone, and all of them from becoming constant.

Baevski, Hsu, Xu, Babu, Gu and Auli, 2022, "data2vec: A general framework for self-supervised learning in speech, vision
and language" (arXiv:2202.03555), section 3, for vision. The values are those of the authors' published commands for
ViT-B, with which targets are normalized twice (each block's, and their average) and the teacher's momentum stays at
0.9998: they name a start of 0.999 as well, but no steps for the way from there. What differs from the authors' code:
masks are keyed by image and epoch; attention has no dropout; initialization is that of MAE.
"""

from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from sslbook import distributed
from sslbook.data.loader import Batch
from sslbook.data.masks import block_mask
from sslbook.data.views import BEIT, View
from sslbook.errors import UserError
from sslbook.methods.base import Method
from sslbook.nn import EMA, VisionTransformer
from sslbook.nn.vit import init_transformer, patch_grid
from sslbook.schedules import Clock, Linear


def average_of_layers(
    layers: Iterable[Float[Tensor, "*batch dim"]], normalize_layers: bool = True, normalize_average: bool = True
) -> Float[Tensor, "*batch dim"]:
    """Section 3.3: the mean of what several blocks say, normalized before and after."""
    outputs = [x.float() for x in layers]
    if normalize_layers:
        outputs = [F.layer_norm(x, x.shape[-1:]) for x in outputs]
    average = torch.stack(outputs).mean(dim=0)
    return F.layer_norm(average, average.shape[-1:]) if normalize_average else average


def regression_loss(
    prediction: Float[Tensor, "hidden dim"], target: Float[Tensor, "hidden dim"], beta: float
) -> Float[Tensor, ""]:
    """Section 3.4, averaged over the hidden patches of all processes: squared error / (2 beta) up to an error of beta.

    Beyond it grows in a straight line. Its mean over processes is the mean over all hidden patches, however many are
    in which.
    """
    number = distributed.all_reduce_mean(torch.tensor(float(len(target)), device=target.device))
    number = torch.where(number > 0, number, 1.0)
    return F.smooth_l1_loss(prediction.float(), target, beta=beta, reduction="sum") / (number * target.shape[1])


class Data2Vec(Method):
    """data2vec for images (arXiv:2202.03555).

    Args:
        backbone: the vision transformer to train.
        view: what an image becomes.
        mask_ratio: greatest part of the patches that is hidden.
        min_block: the smallest area of a block of hidden patches.
        top_layers: over how many of the teacher's last blocks the targets are averaged.
        normalize_layers: normalize every block's output before averaging.
        normalize_targets: normalize the average.
        beta: the error at which the loss turns from a square to a straight line.
        momentum: how much of itself the teacher keeps at a step, in the beginning.
        momentum_end: how much in the end.
    """

    backbone: VisionTransformer  # pyrefly: ignore[bad-override-mutable-attribute]

    def __init__(
        self,
        backbone: nn.Module,
        view: View = BEIT,
        mask_ratio: float = 120 / 196,
        min_block: int = 16,
        top_layers: int = 6,
        normalize_layers: bool = True,
        normalize_targets: bool = True,
        beta: float = 2.0,
        momentum: float = 0.9998,
        momentum_end: float = 0.9998,
    ) -> None:
        super().__init__()
        if not isinstance(backbone, VisionTransformer):
            raise UserError(
                f"data2vec hides patches from a vision transformer and cannot use a {type(backbone).__name__}: "
                "choose sslbook.nn.VisionTransformer or sslbook.nn.vit_tiny, vit_small, vit_base, vit_large, vit_huge"
            )
        if not 1 <= top_layers <= len(backbone.blocks):
            raise UserError(
                f"top_layers {top_layers}: the backbone has {len(backbone.blocks)} blocks; "
                f"use 1 to {len(backbone.blocks)}"
            )
        self.view, self.min_block = view, min_block
        self.top_layers, self.beta = top_layers, beta
        self.normalize_layers, self.normalize_targets = normalize_layers, normalize_targets
        self.momentum, self.momentum_end = momentum, momentum_end
        rows, columns = patch_grid(view.size, view.size, backbone.patch_size)
        self.grid, self.num_masked = (rows, columns), int(rows * columns * mask_ratio + 1e-6)
        if not 0 < self.num_masked < rows * columns:
            what = "see" if self.num_masked else "predict"
            raise UserError(
                f"mask ratio {mask_ratio} of {rows * columns} patches leaves nothing to {what}: "
                f"use a ratio of at least {1 / (rows * columns):.3g} and less than 1"
            )
        self.backbone = backbone
        self.mask_token = nn.Parameter(0.02 * torch.randn(backbone.dim))
        self.predictor = nn.Linear(backbone.dim, backbone.dim)
        init_transformer(self.predictor)
        self.teacher = EMA(backbone)

    def views(self) -> tuple[View, ...]:
        return (self.view,)

    @torch.no_grad()
    def targets(self, images: Float[Tensor, "batch 3 height width"]) -> Float[Tensor, "batch patches dim"]:
        """What the teacher's upper blocks say of every patch of the whole image."""
        network: Any = self.teacher.module
        layers = list(network.layers(network.embed(images)))[-self.top_layers :]
        return average_of_layers([x[:, 1:] for x in layers], self.normalize_layers, self.normalize_targets)

    def forward(self, batch: Batch, clock: Clock) -> dict[str, Tensor]:
        (images,) = batch.views
        mask = block_mask(batch.index, self.grid, self.num_masked, clock, self.min_block)
        y = self.targets(images)
        tokens = self.backbone.encode(self.backbone.embed(images, mask, self.mask_token))
        prediction = self.predictor(tokens[:, 1:][mask])
        deviation = distributed.all_reduce_std(y).mean()
        return {"loss": regression_loss(prediction, y[mask], self.beta), "target_deviation": deviation}

    def after_step(self, clock: Clock) -> None:
        self.teacher.update(self.backbone, Linear(self.momentum, self.momentum_end)(clock))
