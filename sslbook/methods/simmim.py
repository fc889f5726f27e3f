"""SimMIM: replace large squares of an image by a mask token and predict their pixels with one linear layer.

There is no decoder and no tokenizer. Mask tokens pass the whole encoder, and a linear layer predicts from each token of
the last layer the pixels of its cell. The squares are large, so that most masked pixels have no visible neighbors.

Xie, Zhang, Cao, Lin, Bao, Yao, Dai and Hu, 2022, "SimMIM: a simple framework for masked image modeling"
(arXiv:2111.09886), section 3; the loss is l1 on the masked pixels (section 3.4). Values are those of the authors' code;
the number of masked squares is rounded up, as there.

What differs from the authors' code (microsoft/SimMIM, 0e71746):
- Masks are counter-based random numbers of seed, epoch and image; theirs come from numpy's generator.
- Our `VisionTransformer` is initialized as in MAE; theirs from a truncated normal of 0.02, rescaled at the end of every
  branch.
- Its keys have a bias, which changes no attention weight; theirs have none.
"""

import math
from typing import Any

import torch
from einops import rearrange, repeat
from jaxtyping import Bool, Float
from torch import Tensor, nn

from sslbook.data.loader import Batch
from sslbook.data.masks import require_mask, uniform_mask
from sslbook.data.views import View
from sslbook.errors import UserError
from sslbook.methods.base import Method
from sslbook.nn import backbone_dim
from sslbook.nn.backbones import in_channels, require
from sslbook.schedules import Clock
from sslbook.types import PositiveInt

VIEW = View(crop=(0.67, 1.0))


def num_masked(num_squares: int, mask_ratio: float) -> int:
    """How many squares are masked.

    Raises:
        UserError: none, or all of them.
    """
    return require_mask(math.ceil(num_squares * mask_ratio - 1e-6), num_squares)


def upsample_mask(mask: Bool[Tensor, "batch squares"], rows: int, factor: int) -> Bool[Tensor, "batch height width"]:
    """A mask of `rows` rows of squares on a grid that is finer by a whole factor: of patches, or of pixels."""
    return repeat(mask, "b (h w) -> b (h p) (w q)", h=rows, p=factor, q=factor)


def masked_l1(
    prediction: Float[Tensor, "batch channels height width"],
    images: Float[Tensor, "batch channels height width"],
    mask: Bool[Tensor, "batch height width"],
) -> Float[Tensor, ""]:
    """Mean absolute error over the values of masked pixels (section 3.4, equation 1)."""
    error = (prediction.float() - images.float()).abs().sum(dim=1)
    return (error * mask).sum() / (prediction.shape[1] * mask.sum())


class SimMIM(Method):
    """Simple masked image modeling (arXiv:2111.09886).

    Args:
        backbone: the vision transformer, or Swin of timm, to train.
        view: augmentation of an image.
        mask_size: side of a masked square, in pixels ("masked patch size" in the paper).
        mask_ratio: fraction of the squares that is masked.

    Raises:
        UserError: the backbone takes no mask token, the view cannot be cut into squares and cells, a square does not
            consist of whole patches, or the mask ratio masks no square or all of them.
    """

    def __init__(
        self, backbone: nn.Module, view: View = VIEW, mask_size: PositiveInt = 32, mask_ratio: float = 0.6
    ) -> None:
        super().__init__()
        require(backbone, "forward_tokens", "SimMIM")
        net: Any = backbone  # a TokenBackbone
        self.patch_size, self.stride, self.num_prefix_tokens = net.patch_size, net.stride, net.num_prefix_tokens
        side = max(1, round(mask_size / self.patch_size)) * self.patch_size
        step = math.lcm(side, self.stride)
        if side != mask_size or view.size % step:
            raise UserError(
                f"images of {view.size} pixels cannot be cut into squares of {mask_size} and cells of {self.stride}, "
                f"or squares into patches of {self.patch_size}: the nearest sizes that work are mask_size {side} and "
                f"view.size {max(1, round(view.size / step)) * step}"
            )
        self.view, self.mask_size = view, mask_size
        self.rows = view.size // mask_size
        self.num_masked = num_masked(self.rows**2, mask_ratio)
        self.backbone = backbone
        self.mask_token = nn.Parameter(nn.init.trunc_normal_(torch.empty(1, 1, net.token_dim), std=0.02))
        self.head = nn.Linear(backbone_dim(backbone), in_channels(backbone) * self.stride**2)

    def views(self) -> tuple[View, ...]:
        return (self.view,)

    def predict(
        self, images: Float[Tensor, "batch channels height width"], squares: Bool[Tensor, "batch squares"]
    ) -> Float[Tensor, "batch channels height width"]:
        """The pixels of the whole image, predicted from the patches outside the masked squares."""
        mask = upsample_mask(squares, self.rows, self.mask_size // self.patch_size).flatten(1)  # (batch, patches)
        net: Any = self.backbone
        tokens = net.forward_tokens(images, mask, self.mask_token)[:, self.num_prefix_tokens :]  # (batch, cells, dim)
        pixels = self.head(tokens)  # the one-layer prediction head (section 3.3): each cell its own pixels
        rows = images.shape[2] // self.stride
        return rearrange(pixels, "b (h w) (c p q) -> b c (h p) (w q)", h=rows, p=self.stride, q=self.stride)

    def forward(self, batch: Batch, clock: Clock) -> dict[str, Tensor]:
        (images,) = batch.views
        squares = uniform_mask(batch.index, self.rows**2, self.num_masked, clock)  # patch-aligned (section 3.2)
        prediction = self.predict(images, squares)  # (batch, 3, height, width)
        mask = upsample_mask(squares, self.rows, self.mask_size)
        return {"loss": masked_l1(prediction, images, mask)}  # prediction, not reconstruction: masked pixels only
