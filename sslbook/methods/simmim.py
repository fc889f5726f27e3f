"""SimMIM: hide large squares of an image behind a mask token and draw their pixels with one linear layer.

There is no decoder and no tokenizer: the mask token goes through the whole encoder, and a single linear layer turns
each token of the last map into the pixels it stands for. What makes the task worth while is the size of the squares,
which no neighboring pixel gives away.

Xie, Zhang, Cao, Lin, Bao, Yao, Dai and Hu, 2022, "SimMIM: a simple framework for masked image modeling"
(arXiv:2111.09886), section 3; the distance is l1 on the hidden pixels (section 3.4). Values are those of the authors'
code. Which squares are hidden is keyed by image and epoch. The number hidden is rounded up, as there. The linear layers
of our `VisionTransformer` start by Xavier, those of the authors' from a truncated normal of 0.02.
"""

import math

import torch
from einops import rearrange, repeat
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from sslbook import rng
from sslbook.data.loader import Batch
from sslbook.data.views import View
from sslbook.errors import UserError
from sslbook.methods.base import Method
from sslbook.nn import backbone_dim
from sslbook.nn.mask_tokens import cell_side, masked_map, patch_side, require_maskable, token_dim
from sslbook.schedules import Clock

VIEW = View(crop=(0.67, 1.0))


def num_hidden(num_units: int, mask_ratio: float) -> int:
    """How many squares are hidden; a `UserError` if that is none or all."""
    hidden = math.ceil(num_units * mask_ratio - 1e-6)
    if not 0 < hidden < num_units:
        what = "to see" if hidden > 0 else "to predict"
        ratio = f"use a ratio above 0 and at most {1 - 1 / num_units:.3g}, or " if num_units > 1 else "use "
        raise UserError(
            f"mask ratio {mask_ratio} of {num_units} squares leaves nothing {what}: {ratio}a smaller mask_size"
        )
    return hidden


def random_squares(
    index: Int[Tensor, "batch"], num_units: int, mask_ratio: float, clock: Clock
) -> Bool[Tensor, "batch {num_units}"]:
    """True for the squares of every image that are hidden, equally many in each (section 3.2, "Patch-aligned")."""
    order = rng.uniform(clock.seed, clock.epoch, index, rng.METHOD, num_units).argsort(dim=1, stable=True)
    mask = torch.zeros(order.shape, dtype=torch.bool, device=index.device)
    return mask.scatter(1, order[:, : num_hidden(num_units, mask_ratio)], True)


def enlarge(mask: Bool[Tensor, "batch units"], rows: int, by: int) -> Bool[Tensor, "batch height width"]:
    """The mask of squares on a grid that is finer by a whole factor: patches, or pixels."""
    return repeat(mask, "b (h w) -> b (h p) (w q)", h=rows, p=by, q=by)


def hidden_l1(
    drawn: Float[Tensor, "batch 3 height width"],
    images: Float[Tensor, "batch 3 height width"],
    hidden: Bool[Tensor, "batch height width"],
) -> Float[Tensor, ""]:
    """Mean distance of the colors of hidden pixels."""
    distance = (drawn.float() - images.float()).abs().sum(dim=1)
    return (distance * hidden).sum() / (3 * hidden.sum())


class SimMIM(Method):
    """Simple masked image modeling (arXiv:2111.09886).

    Args:
        backbone: the vision transformer, or Swin of timm, to train.
        view: what an image becomes.
        mask_size: side of the squares that are hidden, in pixels.
        mask_ratio: part of the squares that is hidden.
    """

    def __init__(self, backbone: nn.Module, view: View = VIEW, mask_size: int = 32, mask_ratio: float = 0.6) -> None:
        super().__init__()
        require_maskable(backbone, "SimMIM")
        self.patch, self.cell = patch_side(backbone), cell_side(backbone)
        if view.size % mask_size or view.size % self.cell:
            step = math.lcm(mask_size, self.cell)
            raise UserError(
                f"images of {view.size} pixels cannot be cut into squares of {mask_size} and cells of {self.cell}: "
                f"the nearest view.size that works is {max(1, round(view.size / step)) * step}, or change mask_size"
            )
        if mask_size % self.patch:
            near = max(1, round(mask_size / self.patch)) * self.patch
            raise UserError(f"squares of {mask_size} pixels do not consist of whole patches: use mask_size {near}")
        self.view, self.mask_size, self.mask_ratio = view, mask_size, mask_ratio
        self.rows = view.size // mask_size
        num_hidden(self.rows**2, mask_ratio)  # refuses a ratio that leaves nothing to do
        self.backbone = backbone
        self.mask_token = nn.Parameter(nn.init.trunc_normal_(torch.empty(token_dim(backbone)), std=0.02))
        self.head = nn.Linear(backbone_dim(backbone), 3 * self.cell**2)

    def views(self) -> tuple[View, ...]:
        return (self.view,)

    def draw(
        self, images: Float[Tensor, "batch 3 height width"], squares: Bool[Tensor, "batch units"]
    ) -> Float[Tensor, "batch 3 height width"]:
        """The pixels of the whole image, as the network sees them with these squares hidden."""
        mask = enlarge(squares, self.rows, self.mask_size // self.patch).flatten(1)
        cells = rearrange(masked_map(self.backbone, images, mask, self.mask_token), "b c h w -> b h w c")
        return rearrange(self.head(cells), "b h w (c p q) -> b c (h p) (w q)", p=self.cell, q=self.cell)

    def forward(self, batch: Batch, clock: Clock) -> dict[str, Tensor]:
        (images,) = batch.views
        squares = random_squares(batch.index, self.rows**2, self.mask_ratio, clock)
        return {"loss": hidden_l1(self.draw(images, squares), images, enlarge(squares, self.rows, self.mask_size))}
