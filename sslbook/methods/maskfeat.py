"""MaskFeat: predict histograms of oriented gradients (HOG) of masked patches instead of their pixels.

Blocks of patches are replaced by a mask token. From the tokens of the last layer a linear layer predicts the HOG
descriptor of every masked patch. HOG counts the directions of edges in small cells and normalizes the counts, so that
the network need not predict brightness and contrast, which the visible patches do not determine.

Wei, Fan, Xie, Wu, Yuille and Feichtenhofer, 2022, "Masked feature prediction for self-supervised visual pre-training"
(arXiv:2112.09133), sections 3 and 4; HOG is that of Dalal and Triggs (2005). As in the authors' code: Sobel gradients,
nine unsigned directions, each pixel counted in one of them, every color channel separately, the counts of a cell
normalized to length 1, and no Gaussian window (a port has one).

What differs from the authors' code (facebookresearch/SlowFast, adc55ca):
- The descriptor of a cell without edges stays near zero; theirs is rounding errors, normalized to length 1.
- Masks are BEiT's blocks, filled up to the exact number by single patches; they are counter-based random numbers of
  seed, epoch and image; theirs come from Python's generator.
- Initialization is that of MAE; theirs of weights and biases is a truncated normal of 0.02.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange, reduce, repeat
from jaxtyping import Bool, Float
from torch import Tensor, nn

from sslbook.data.loader import Batch
from sslbook.data.masks import block_mask, require_mask
from sslbook.data.views import View
from sslbook.errors import UserError
from sslbook.methods.base import Method
from sslbook.nn import backbone_dim
from sslbook.nn.backbones import require
from sslbook.nn.precision import full_precision
from sslbook.nn.vit import patch_grid
from sslbook.schedules import Clock
from sslbook.types import PositiveInt

VIEW = View(crop=(0.5, 1.0), interpolation="bicubic")
NUM_BINS = 9
MIN_LENGTH = 1e-3  # cells with shorter counts have no edges: one gray level at one pixel gives some hundredths


def hog(images: Float[Tensor, "batch 3 height width"], cell_size: int) -> Float[Tensor, "batch rows columns 27"]:
    """Histograms of oriented gradients: for every cell and color channel, 9 values of length 1 (section 3.2).

    The gradient is Sobel's, of the image reflected at its border. Its direction, from 0 to 180 degrees, falls into one
    of nine equal bins, to which its magnitude is added.
    """
    sobel = torch.tensor([[1.0, 0.0, -1.0], [2.0, 0.0, -2.0], [1.0, 0.0, -1.0]], dtype=images.dtype)
    sobel = sobel.to(images.device).expand(3, 1, 3, 3)
    x = F.pad(images, (1, 1, 1, 1), mode="reflect")
    dx, dy = F.conv2d(x, sobel, groups=3), F.conv2d(x, sobel.mT, groups=3)
    bins = (torch.atan2(dx, dy) / math.pi * NUM_BINS).floor().long() % NUM_BINS  # unsigned: modulo 180 degrees
    counts = torch.zeros(*bins.shape, NUM_BINS, dtype=x.dtype, device=x.device)
    counts.scatter_(-1, bins[..., None], torch.hypot(dx, dy)[..., None])
    counts = reduce(counts, "b c (h p) (w q) k -> b h w c k", "sum", p=cell_size, q=cell_size)
    return rearrange(F.normalize(counts, dim=-1, eps=MIN_LENGTH), "b h w c k -> b h w (c k)")


def masked_mse(
    prediction: Float[Tensor, "batch rows columns values"],
    target: Float[Tensor, "batch rows columns values"],
    mask: Bool[Tensor, "batch rows columns"],
) -> Float[Tensor, ""]:
    """Mean squared error over the masked patches (section 3.1)."""
    return (prediction[mask].float() - target[mask].float()).square().mean()


class MaskFeat(Method):
    """Masked feature prediction (arXiv:2112.09133).

    Args:
        backbone: the vision transformer, or Swin of timm, to train.
        view: augmentation of an image.
        mask_ratio: fraction of the patches that is masked.
        min_block: the smallest area of a block of masked patches, in patches.
        cell_size: side of a cell of HOG, in pixels.

    Raises:
        UserError: the backbone takes no mask token, the view cannot be cut into its patches, these do not hold whole
            cells, or the mask ratio masks no patch or all of them.
    """

    rgb_only = True

    def __init__(
        self,
        backbone: nn.Module,
        view: View = VIEW,
        mask_ratio: float = 0.4,
        min_block: PositiveInt = 15,
        cell_size: PositiveInt = 8,
    ) -> None:
        super().__init__()
        require(backbone, "forward_tokens", "MaskFeat")
        net: Any = backbone  # a TokenBackbone
        self.patch_size, self.stride, self.num_prefix_tokens = net.patch_size, net.stride, net.num_prefix_tokens
        if self.stride % cell_size:
            near = max(d for d in range(1, self.stride + 1) if self.stride % d == 0 and d <= cell_size)
            raise UserError(
                f"patches of {self.stride} pixels do not hold whole cells of {cell_size}: use cell_size {near}"
            )
        self.view, self.cell_size, self.min_block = view, cell_size, min_block
        self.rows, _ = patch_grid(view.size, view.size, self.stride)
        self.num_masked = require_mask(round(mask_ratio * self.rows**2), self.rows**2)
        self.backbone = backbone
        self.mask_token = nn.Parameter(nn.init.trunc_normal_(torch.empty(1, 1, net.token_dim), std=0.02))
        self.head = nn.Linear(backbone_dim(backbone), 3 * NUM_BINS * (self.stride // cell_size) ** 2)

    def views(self) -> tuple[View, ...]:
        return (self.view,)

    def target(self, images: Float[Tensor, "batch 3 height width"]) -> Float[Tensor, "batch rows columns values"]:
        """HOG of every patch: its cells row by row, in each its color channels, in each the nine bins."""
        cells = hog(images.float(), self.cell_size)
        per_side = self.stride // self.cell_size
        return rearrange(cells, "b (h p) (w q) k -> b h w (p q k)", p=per_side, q=per_side)

    def predict(
        self, images: Float[Tensor, "batch 3 height width"], mask: Bool[Tensor, "batch rows columns"]
    ) -> Float[Tensor, "batch rows columns values"]:
        """The prediction for every patch, from those that are not masked."""
        factor = self.stride // self.patch_size  # Swin merges its patches: a mask token replaces the small ones
        patches = repeat(mask, "b h w -> b (h p w q)", p=factor, q=factor)
        net: Any = self.backbone
        tokens = net.forward_tokens(images, patches, self.mask_token)[:, self.num_prefix_tokens :]
        return rearrange(self.head(tokens), "b (h w) k -> b h w k", h=mask.shape[1])

    def forward(self, batch: Batch, clock: Clock) -> dict[str, Tensor]:
        (images,) = batch.views
        mask = block_mask(batch.index, (self.rows, self.rows), self.num_masked, clock, self.min_block, exact=True)
        mask = rearrange(mask, "b (h w) -> b h w", h=self.rows)
        with full_precision(images):  # directions of weak gradients need all bits
            target = self.target(images)  # of the whole image, so that cells at a mask's border see across it
        return {"loss": masked_mse(self.predict(images, mask), target, mask)}  # visible patches do not count
