"""data2vec: predict the averaged top layers of an EMA teacher at masked positions.

The student gets an image in which blocks of patches are replaced by a mask token. At each of these positions it
predicts the average of the outputs of the teacher's top blocks. The teacher is an exponential moving average (EMA) of
the student and sees the whole image, so that its features at a position describe more than the patch there.

Baevski, Hsu, Xu, Babu, Gu and Auli, 2022, "data2vec: A general framework for self-supervised learning in speech, vision
and language" (arXiv:2202.03555), section 3, for vision. The defaults are those of the authors' published commands for
ViT-B: targets are normalized twice (each block's output, and their average), and the EMA momentum stays at 0.9998. The
commands name a start of 0.999 as well, but no steps over which it would rise.

What differs from the authors' code (facebookresearch/fairseq, d871f61):
- Masks are counter-based random numbers of seed, epoch and image; theirs come from Python's generator.
- Colors are jittered after the crop; theirs before it.
- Attention has no dropout; theirs has.
- Keys have a bias, which changes no attention weight; theirs have none.
- Initialization is that of MAE; theirs is a truncated normal of 0.02, rescaled at the end of every branch.
"""

from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from sslbook import distributed
from sslbook.data.loader import Batch
from sslbook.data.masks import block_mask, require_mask
from sslbook.data.views import BEIT, View
from sslbook.errors import UserError
from sslbook.methods.base import Method
from sslbook.nn import EMA, VisionTransformer
from sslbook.nn.vit import init_transformer, patch_grid, require_transformer
from sslbook.schedules import Clock, Linear
from sslbook.types import PositiveFloat, PositiveInt


def average_of_layers(
    layers: Iterable[Float[Tensor, "*batch dim"]], normalize_layers: bool = True, normalize_average: bool = True
) -> Float[Tensor, "*batch dim"]:
    """The mean of the outputs of several blocks, each normalized before, and the mean after (section 3.3).

    Normalization keeps a block with large outputs from dominating, and the targets from becoming constant.
    """
    outputs = [x.float() for x in layers]
    if normalize_layers:
        outputs = [F.layer_norm(x, x.shape[-1:]) for x in outputs]
    average = torch.stack(outputs).mean(dim=0)
    return F.layer_norm(average, average.shape[-1:]) if normalize_average else average


def regression_loss(
    prediction: Float[Tensor, "masked dim"], target: Float[Tensor, "masked dim"], beta: float
) -> Float[Tensor, ""]:
    """Smooth L1 (section 3.4): squared error / (2 beta) up to an error of beta, linear beyond.

    The sum over this process's masked patches is divided by their mean number over processes: averaged over processes
    this is the mean over all masked patches, of which processes have different numbers.
    """
    number = distributed.all_reduce_mean(torch.tensor(float(len(target)), device=target.device))
    number = torch.where(number > 0, number, 1.0)
    return F.smooth_l1_loss(prediction.float(), target, beta=beta, reduction="sum") / (number * target.shape[1])


class Data2Vec(Method):
    """data2vec for images (arXiv:2202.03555).

    Args:
        backbone: the vision transformer to train.
        view: augmentation of an image.
        mask_ratio: greatest fraction of the patches that is masked.
        min_block: the smallest area of a block of masked patches, in patches.
        num_top_layers: over how many of the teacher's last blocks the targets are averaged (K in the paper).
        normalize_layers: whether every block's output is normalized before averaging.
        normalize_targets: whether the average is normalized.
        beta: the error at which the loss changes from quadratic to linear.
        momentum: EMA momentum of the teacher at the start.
        momentum_end: EMA momentum of the teacher at the end, reached linearly.

    Raises:
        UserError: the backbone is no `VisionTransformer` or has fewer blocks than are averaged, its patches do not fit
            the view, or the mask ratio masks no patch or all of them.
    """

    backbone: VisionTransformer  # pyrefly: ignore[bad-override-mutable-attribute]

    def __init__(
        self,
        backbone: nn.Module,
        view: View = BEIT,
        mask_ratio: float = 120 / 196,
        min_block: PositiveInt = 16,
        num_top_layers: int = 6,
        normalize_layers: bool = True,
        normalize_targets: bool = True,
        beta: PositiveFloat = 2.0,
        momentum: float = 0.9998,
        momentum_end: float = 0.9998,
    ) -> None:
        super().__init__()
        backbone = require_transformer(backbone, "data2vec")
        depth = len(backbone.blocks)
        if not 1 <= num_top_layers <= depth:
            raise UserError(f"num_top_layers {num_top_layers}: the backbone has {depth} blocks; use 1 to {depth}")
        self.view, self.min_block = view, min_block
        self.num_top_layers, self.beta = num_top_layers, beta
        self.normalize_layers, self.normalize_targets = normalize_layers, normalize_targets
        self.momentum, self.momentum_end = momentum, momentum_end
        self.grid = patch_grid(view.size, view.size, backbone.patch_size)
        num_patches = self.grid[0] * self.grid[1]
        self.num_masked = require_mask(int(num_patches * mask_ratio + 1e-6), num_patches)
        self.backbone = backbone
        self.mask_token = nn.Parameter(0.02 * torch.randn(1, 1, backbone.dim))
        self.predictor = nn.Linear(backbone.dim, backbone.dim)
        init_transformer(self.predictor)
        self.teacher = EMA(backbone)

    def views(self) -> tuple[View, ...]:
        return (self.view,)

    @torch.no_grad()
    def teacher_targets(
        self, images: Float[Tensor, "batch channels height width"]
    ) -> Float[Tensor, "batch patches dim"]:
        """The average of the teacher's top blocks at every patch of the whole image (section 3.3)."""
        teacher: Any = self.teacher.module
        layers = list(teacher.layers(teacher.embed(images)))[-self.num_top_layers :]
        return average_of_layers([x[:, 1:] for x in layers], self.normalize_layers, self.normalize_targets)

    def forward(self, batch: Batch, clock: Clock) -> dict[str, Tensor]:
        (images,) = batch.views
        mask = block_mask(batch.index, self.grid, self.num_masked, clock, self.min_block)  # (batch, patches)
        y = self.teacher_targets(images)  # contextualized targets, without gradient: (batch, patches, dim)
        tokens = self.backbone.forward_tokens(images, mask, self.mask_token)  # (batch, 1 + patches, dim)
        prediction = self.predictor(tokens[:, 1:][mask])  # f_t(x) at masked positions only: (masked, dim)
        # A collapsed teacher gives all images the same targets: their standard deviation falls to 0.
        target_std = distributed.all_reduce_std(y).mean()
        return {"loss": regression_loss(prediction, y[mask], self.beta), "target_std": target_std}

    def after_step(self, clock: Clock) -> None:
        self.teacher.update(self.backbone, Linear(self.momentum, self.momentum_end)(clock))  # section 3.2, tau
