"""I-JEPA: say what is elsewhere in an image, in the teacher's words and not in pixels.

From the patches of one large block, the context, a narrow transformer predicts the features of several other blocks; it
is told only where these are. The features come from a teacher that sees the whole image, a moving average of the
encoder, and are normalized. There are no augmentations but the crop: masking is the only task.

Assran, Duval, Misra, Bojanowski, Vincent, Rabbat, LeCun and Ballas, 2023, "Self-supervised learning from images with a
joint-embedding predictive architecture" (arXiv:2301.08243), section 3. As in the authors' code the loss is smooth L1,
the targets are normalized by LayerNorm without parameters, each target block is predicted on its own, and masks are
those of `sslbook.data.masks.multi_block_mask`. What differs: random numbers are counter-based; contexts are cut to the shortest of the
global batch instead of one GPU's; the encoder has a cls token, which nothing predicts; initialization is that of MAE;
the teacher's momentum counts the step just taken, so that it reaches 1 at the last one.
"""

from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from jaxtyping import Float, Int
from torch import Tensor, nn

from sslbook import distributed
from sslbook.data.loader import Batch
from sslbook.data.masks import multi_block_mask
from sslbook.data.views import View
from sslbook.errors import UserError
from sslbook.methods.base import Method
from sslbook.nn import EMA, VisionTransformer
from sslbook.nn.vit import Block, init_transformer, patch_grid, resample_positions, sincos_positions
from sslbook.schedules import Clock, Linear

VIEW = View(crop=(0.3, 1.0), flip=0.0)


def take(x: Float[Tensor, "batch patches dim"], index: Int[Tensor, "batch some"]) -> Float[Tensor, "batch some dim"]:
    """The patches at the given places, image by image."""
    return x.gather(1, index[:, :, None].expand(-1, -1, x.shape[2]))


def prediction_loss(
    prediction: Float[Tensor, "batch patches dim"], target: Float[Tensor, "batch patches dim"]
) -> Float[Tensor, ""]:
    """Squared error where it is small, absolute error where it is large, averaged (smooth L1 with beta 1)."""
    return F.smooth_l1_loss(prediction.float(), target.float())


class Predictor(nn.Module):
    """A narrow transformer from the features of a context to those of the patches of one block."""

    positions: Tensor

    def __init__(self, encoder_dim: int, dim: int, depth: int, num_heads: int, grid: tuple[int, int]) -> None:
        super().__init__()
        self.grid = grid
        self.embed = nn.Linear(encoder_dim, dim)
        self.mask_token = nn.Parameter(0.02 * torch.randn(dim))
        self.register_buffer("positions", sincos_positions(dim, *grid))
        self.blocks = nn.Sequential(*[Block(dim, num_heads) for _ in range(depth)])
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.predict = nn.Linear(dim, encoder_dim)
        init_transformer(self)

    def forward(
        self,
        encoded: Float[Tensor, "batch context dim"],
        context: Int[Tensor, "batch context"],
        target: Int[Tensor, "batch patches"],
        grid: tuple[int, int],
    ) -> Float[Tensor, "batch patches dim"]:
        positions = resample_positions(self.positions, self.grid, grid)
        seen = self.embed(encoded) + positions[context]
        asked = self.mask_token + positions[target]  # all that tells one target from another
        tokens = self.blocks(torch.cat([seen, asked.to(seen.dtype)], dim=1))
        return self.predict(self.norm(tokens[:, -target.shape[1] :]))


class IJEPA(Method):
    """Image-based joint-embedding predictive architecture (arXiv:2301.08243).

    Args:
        backbone: the vision transformer to train.
        view: what an image becomes.
        num_targets: number of target blocks.
        target_scale: range of the part of an image that a target block covers.
        target_aspect: range of a target block's height divided by its width.
        context_scale: range of the part that the context covers, before the targets are taken away.
        predictor_dim: width of the predictor.
        predictor_depth: blocks of the predictor.
        predictor_num_heads: attention heads of the predictor.
        momentum: how much of itself the teacher keeps at a step, in the beginning; rises to 1 in a straight line.
    """

    backbone: VisionTransformer  # pyrefly: ignore[bad-override-mutable-attribute]

    def __init__(
        self,
        backbone: nn.Module,
        view: View = VIEW,
        num_targets: int = 4,
        target_scale: tuple[float, float] = (0.15, 0.2),
        target_aspect: tuple[float, float] = (0.75, 1.5),
        context_scale: tuple[float, float] = (0.85, 1.0),
        predictor_dim: int = 384,
        predictor_depth: int = 12,
        predictor_num_heads: int = 16,
        momentum: float = 0.996,
    ) -> None:
        super().__init__()
        if not isinstance(backbone, VisionTransformer):
            raise UserError(
                f"I-JEPA shows parts of an image to a vision transformer and cannot use a {type(backbone).__name__}: "
                "choose sslbook.nn.VisionTransformer or sslbook.nn.vit_tiny, vit_small, vit_base, vit_large, vit_huge"
            )
        self.view, self.num_targets, self.momentum = view, num_targets, momentum
        self.target_scale, self.target_aspect, self.context_scale = target_scale, target_aspect, context_scale
        grid = patch_grid(view.size, view.size, backbone.patch_size)
        self.backbone = backbone
        self.teacher = EMA(backbone)
        self.predictor = Predictor(backbone.dim, predictor_dim, predictor_depth, predictor_num_heads, grid)

    def views(self) -> tuple[View, ...]:
        return (self.view,)

    @torch.no_grad()
    def features(self, images: Float[Tensor, "batch 3 height width"]) -> Float[Tensor, "batch patches dim"]:
        """What the teacher says of every patch of the whole image, normalized."""
        network: Any = self.teacher.module
        tokens = network.encode(network.embed(images))[:, 1:].float()
        return F.layer_norm(tokens, tokens.shape[-1:])

    def forward(self, batch: Batch, clock: Clock) -> dict[str, Tensor]:
        (images,) = batch.views
        grid = patch_grid(images.shape[2], images.shape[3], self.backbone.patch_size)
        context, targets = multi_block_mask(
            batch.index, grid, clock, self.num_targets, self.target_scale, self.target_aspect, self.context_scale
        )
        h = self.features(images)
        target = take(h, rearrange(targets, "batch block patch -> batch (block patch)"))
        target = rearrange(target, "batch (block patch) dim -> (batch block) patch dim", block=self.num_targets)

        encoded = self.backbone.encode(take(self.backbone.embed(images), context))[:, 1:]
        prediction = self.predictor(
            repeat(encoded, "batch patch dim -> (batch block) patch dim", block=self.num_targets),
            repeat(context, "batch patch -> (batch block) patch", block=self.num_targets),
            rearrange(targets, "batch block patch -> (batch block) patch"),
            grid,
        )
        deviation = distributed.all_reduce_std(h).mean()
        return {"loss": prediction_loss(prediction, target), "target_deviation": deviation}

    def after_step(self, clock: Clock) -> None:
        self.teacher.update(self.backbone, Linear(self.momentum, 1.0)(clock))
