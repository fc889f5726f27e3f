"""MaskFeat: predict histograms of oriented gradients where the image is hidden, instead of pixels.

Blocks of patches are replaced by a mask token, and a linear layer of the last layer predicts for every hidden patch what
the HOG descriptor of the whole image says there. HOG counts the directions of edges in small cells and divides by
their strength, so the network is not asked for brightness and contrast, which no neighbor tells for certain.

Wei, Fan, Xie, Wu, Yuille and Feichtenhofer, 2022, "Masked feature prediction for self-supervised visual pre-training"
(arXiv:2112.09133), sections 3 and 4; HOG is Dalal and Triggs (2005). As in the authors' code: Sobel gradients, nine
directions without sign, each pixel counted in one of them, every color for itself, each cell's counts normalized to
length 1, and no Gaussian window (a port has one). What differs: a cell without edges stays near zero, where rounding
errors would be blown up to a full histogram; masks are BEiT's blocks, filled up to the exact number by single patches,
keyed by image and epoch.
"""

import math

import torch
import torch.nn.functional as F
from einops import rearrange, reduce, repeat
from jaxtyping import Bool, Float
from torch import Tensor, nn

from sslbook.data.loader import Batch
from sslbook.data.masks import block_mask
from sslbook.data.views import View
from sslbook.errors import UserError
from sslbook.methods.base import Method
from sslbook.nn import backbone_dim
from sslbook.nn.mask_tokens import cell_side, masked_map, patch_side, require_maskable, token_dim
from sslbook.schedules import Clock

VIEW = View(crop=(0.5, 1.0), interpolation="bicubic")
BINS = 9
FLAT = 1e-3  # a cell whose counts are shorter has no edges: one gray level at one pixel makes some hundredths


def hog(images: Float[Tensor, "batch 3 height width"], cell_size: int) -> Float[Tensor, "batch rows columns 27"]:
    """For every cell the strengths of its edges by direction: 9 values of length 1 for each color (section 3.2).

    The gradient is Sobel's, of the image mirrored at its border. Its direction, from 0 to 180 degrees, falls into one
    of nine equal bins, to which its length is added.
    """
    sobel = torch.tensor([[1.0, 0.0, -1.0], [2.0, 0.0, -2.0], [1.0, 0.0, -1.0]], dtype=images.dtype)
    sobel = sobel.to(images.device).expand(3, 1, 3, 3)
    x = F.pad(images, (1, 1, 1, 1), mode="reflect")
    right, down = F.conv2d(x, sobel, groups=3), F.conv2d(x, sobel.mT, groups=3)
    bins = (torch.atan2(right, down) / math.pi * BINS).floor().long() % BINS
    counts = torch.zeros(*bins.shape, BINS, dtype=x.dtype, device=x.device)
    counts.scatter_(-1, bins[..., None], torch.hypot(right, down)[..., None])
    counts = reduce(counts, "b c (h p) (w q) k -> b h w c k", "sum", p=cell_size, q=cell_size)
    return rearrange(F.normalize(counts, dim=-1, eps=FLAT), "b h w c k -> b h w (c k)")


def hidden_mse(
    prediction: Float[Tensor, "batch rows columns values"],
    target: Float[Tensor, "batch rows columns values"],
    hidden: Bool[Tensor, "batch rows columns"],
) -> Float[Tensor, ""]:
    """Mean squared error over the hidden places."""
    return (prediction[hidden].float() - target[hidden].float()).square().mean()


class MaskFeat(Method):
    """Masked feature prediction (arXiv:2112.09133).

    Args:
        backbone: the vision transformer, or Swin of timm, to train.
        view: what an image becomes.
        mask_ratio: part of the patches that is hidden.
        min_block: the smallest area of a block of hidden patches, in patches.
        cell_size: side of a cell of HOG, in pixels.
    """

    def __init__(
        self,
        backbone: nn.Module,
        view: View = VIEW,
        mask_ratio: float = 0.4,
        min_block: int = 16,
        cell_size: int = 8,
    ) -> None:
        super().__init__()
        require_maskable(backbone, "MaskFeat")
        self.patch, self.side = patch_side(backbone), cell_side(backbone)
        if view.size % self.side:
            near = max(1, round(view.size / self.side)) * self.side
            raise UserError(
                f"images of {view.size} pixels cannot be cut into patches of {self.side}: the nearest view.size that "
                f"works is {near}"
            )
        if not 0 < cell_size <= self.side or self.side % cell_size:
            near = max(d for d in range(1, self.side + 1) if self.side % d == 0 and d <= max(1, cell_size))
            raise UserError(
                f"patches of {self.side} pixels do not hold whole cells of {cell_size}: use cell_size {near}"
            )
        self.view, self.cell_size, self.min_block = view, cell_size, min_block
        self.rows = view.size // self.side
        self.num_masked = round(mask_ratio * self.rows**2)
        if not 0 < self.num_masked < self.rows**2:
            what = "to predict" if self.num_masked < 1 else "to see"
            raise UserError(
                f"mask ratio {mask_ratio} of {self.rows**2} patches leaves nothing {what}: "
                f"use a ratio of at least {1 / self.rows**2:.3g} and at most {1 - 1 / self.rows**2:.3g}"
            )
        self.backbone = backbone
        self.mask_token = nn.Parameter(nn.init.trunc_normal_(torch.empty(token_dim(backbone)), std=0.02))
        self.head = nn.Linear(backbone_dim(backbone), 3 * BINS * (self.side // cell_size) ** 2)

    def views(self) -> tuple[View, ...]:
        return (self.view,)

    def target(self, images: Float[Tensor, "batch 3 height width"]) -> Float[Tensor, "batch rows columns values"]:
        """HOG of every patch: its cells row by row, in each its colors, in each the nine bins."""
        cells = hog(images.float(), self.cell_size)
        many = self.side // self.cell_size
        return rearrange(cells, "b (h p) (w q) k -> b h w (p q k)", p=many, q=many)

    def predict(
        self, images: Float[Tensor, "batch 3 height width"], hidden: Bool[Tensor, "batch rows columns"]
    ) -> Float[Tensor, "batch rows columns values"]:
        """What the network says of every patch when some are hidden from it."""
        many = self.side // self.patch
        mask = repeat(hidden, "b h w -> b (h p w q)", p=many, q=many)
        return self.head(rearrange(masked_map(self.backbone, images, mask, self.mask_token), "b c h w -> b h w c"))

    def forward(self, batch: Batch, clock: Clock) -> dict[str, Tensor]:
        (images,) = batch.views
        grid = (self.rows, self.rows)
        hidden = block_mask(batch.index, grid, self.num_masked, clock, self.min_block, exact=True)
        hidden = rearrange(hidden, "b (h w) -> b h w", h=self.rows)
        with torch.autocast(images.device.type, enabled=False):
            target = self.target(images)
        return {"loss": hidden_mse(self.predict(images, hidden), target, hidden)}
