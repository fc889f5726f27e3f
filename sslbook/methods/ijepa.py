"""I-JEPA: predict the EMA teacher's features of masked blocks from a context block.

The encoder sees the patches of one large block, the context. From its features a narrow transformer, the predictor,
predicts the features of several target blocks, given their positions. The target encoder, an exponential moving average
(EMA) of the encoder, computes these features from the whole image. There are no augmentations but the crop.

Assran, Duval, Misra, Bojanowski, Vincent, Rabbat, LeCun and Ballas, 2023, "Self-supervised learning from images with a
joint-embedding predictive architecture" (arXiv:2301.08243), section 3. As in the authors' code the loss is smooth L1,
the targets are normalized by LayerNorm without parameters, and each target block is predicted on its own. The masks are
those of `sslbook.data.masks.multi_block_mask`.

What differs from the authors' code (facebookresearch/ijepa, 52c1ae9):
- Masks are counter-based random numbers of seed, epoch, step and image; theirs come from torch's generator.
- Contexts are cut to the shortest of the global batch; theirs to the shortest of one GPU.
- Targets never overlap the context; theirs may where a context would otherwise be too short.
- The encoder has a class token, which is not predicted; theirs has none.
- Initialization is that of MAE; theirs is a truncated normal of 0.02, rescaled at the end of every branch.
- The EMA momentum counts the step just taken, so that it reaches 1 at the last one; theirs is one step behind.
- Learning rate and weight decay are one step behind theirs, whose schedules advance before the first step.
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
from sslbook.methods.base import Method
from sslbook.nn import EMA, VisionTransformer
from sslbook.nn.mask_tokens import gather_tokens
from sslbook.nn.vit import Block, init_transformer, patch_grid, require_transformer, sincos_positions
from sslbook.schedules import Clock, Linear
from sslbook.types import PositiveInt

VIEW = View(crop=(0.3, 1.0), flip=0.0)


def prediction_loss(
    prediction: Float[Tensor, "blocks patches dim"], target: Float[Tensor, "blocks patches dim"]
) -> Float[Tensor, ""]:
    """Smooth L1 with beta 1, averaged over all values (the paper's section 3, "Loss", has a squared error)."""
    return F.smooth_l1_loss(prediction.float(), target.float())


class Predictor(nn.Module):
    """A narrow transformer that predicts the features of one block's patches from those of a context."""

    positions: Tensor

    def __init__(self, encoder_dim: int, dim: int, depth: int, num_heads: int, grid: tuple[int, int]) -> None:
        super().__init__()
        self.embed = nn.Linear(encoder_dim, dim)
        self.mask_token = nn.Parameter(0.02 * torch.randn(1, 1, dim))
        self.register_buffer("positions", sincos_positions(dim, *grid))
        self.blocks = nn.Sequential(*[Block(dim, num_heads) for _ in range(depth)])
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.predict = nn.Linear(dim, encoder_dim)
        init_transformer(self)

    def forward(
        self,
        encoded: Float[Tensor, "blocks context encoder_dim"],
        context: Int[Tensor, "blocks context"],
        target: Int[Tensor, "blocks patches"],
    ) -> Float[Tensor, "blocks patches encoder_dim"]:
        context_tokens = self.embed(encoded) + self.positions[context]
        mask_tokens = self.mask_token + self.positions[target]  # {m_j}: only the positions distinguish the targets
        tokens = self.blocks(torch.cat([context_tokens, mask_tokens.to(context_tokens.dtype)], dim=1))
        return self.predict(self.norm(tokens[:, -target.shape[1] :]))  # the mask tokens come last


class IJEPA(Method):
    """Image-based joint-embedding predictive architecture (arXiv:2301.08243).

    Args:
        backbone: the vision transformer to train.
        view: augmentation of an image.
        num_targets: number of target blocks.
        target_scale: range of a target block's area, as a fraction of the image.
        target_aspect: range of a target block's height divided by its width.
        context_scale: range of the context block's area, as a fraction of the image, before targets are removed.
        predictor_dim: width of the predictor.
        predictor_depth: number of blocks of the predictor.
        predictor_num_heads: attention heads of the predictor.
        momentum: EMA momentum of the target encoder at the start; rises linearly to 1.

    Raises:
        UserError: the backbone is no `VisionTransformer` with absolute positions, or its patches do not fit the view.
    """

    backbone: VisionTransformer  # pyrefly: ignore[bad-override-mutable-attribute]

    def __init__(
        self,
        backbone: nn.Module,
        view: View = VIEW,
        num_targets: PositiveInt = 4,
        target_scale: tuple[float, float] = (0.15, 0.2),
        target_aspect: tuple[float, float] = (0.75, 1.5),
        context_scale: tuple[float, float] = (0.85, 1.0),
        predictor_dim: PositiveInt = 384,
        predictor_depth: int = 12,
        predictor_num_heads: PositiveInt = 16,
        momentum: float = 0.996,
    ) -> None:
        super().__init__()
        backbone = require_transformer(backbone, "I-JEPA", drops_patches=True)
        self.view, self.num_targets, self.momentum = view, num_targets, momentum
        self.target_scale, self.target_aspect, self.context_scale = target_scale, target_aspect, context_scale
        self.grid = patch_grid(view.size, view.size, backbone.patch_size)
        self.backbone = backbone
        self.teacher = EMA(backbone)
        self.predictor = Predictor(backbone.dim, predictor_dim, predictor_depth, predictor_num_heads, self.grid)

    def views(self) -> tuple[View, ...]:
        return (self.view,)

    @torch.no_grad()
    def teacher_targets(
        self, images: Float[Tensor, "batch channels height width"]
    ) -> Float[Tensor, "batch patches dim"]:
        """The target encoder's features of every patch of the whole image, each normalized."""
        teacher: Any = self.teacher.module
        tokens = teacher.forward_tokens(images)[:, 1:].float()
        return F.layer_norm(tokens, tokens.shape[-1:])

    def forward(self, batch: Batch, clock: Clock) -> dict[str, Tensor]:
        (images,) = batch.views
        context, targets = multi_block_mask(  # B_x: (batch, context), B_i: (batch, num_targets, patches)
            batch.index, self.grid, clock, self.num_targets, self.target_scale, self.target_aspect, self.context_scale
        )
        # Targets: masked in the output of the target encoder and not in its input, so that they are of a high level.
        s_y = self.teacher_targets(images)  # without gradient: (batch, grid, dim)
        target = gather_tokens(s_y, rearrange(targets, "batch block patch -> batch (block patch)"))
        target = rearrange(target, "batch (block patch) dim -> (batch block) patch dim", block=self.num_targets)

        # Context: only its patches enter the encoder; the class token is dropped.
        s_x = self.backbone.encode(gather_tokens(self.backbone.embed(images), context))[:, 1:]  # (batch, context, dim)

        # Prediction: the predictor runs once for each target block, with the same context.
        prediction = self.predictor(
            repeat(s_x, "batch patch dim -> (batch block) patch dim", block=self.num_targets),
            repeat(context, "batch patch -> (batch block) patch", block=self.num_targets),
            rearrange(targets, "batch block patch -> (batch block) patch"),
        )
        # A collapsed target encoder gives all images the same targets: their standard deviation falls to 0.
        return {"loss": prediction_loss(prediction, target), "target_std": distributed.all_reduce_std(s_y).mean()}

    def after_step(self, clock: Clock) -> None:
        self.teacher.update(self.backbone, Linear(self.momentum, 1.0)(clock))
