"""Context encoder: cut holes into an image and paint what was there.

What lies in a large hole cannot be had by continuing its rim: the network has to understand the rest. An encoder turns
the image with holes into a feature map, a layer that connects all places of each channel carries information across
it, and a decoder of up-convolutions paints.

Pathak, Krähenbühl, Donahue, Darrell and Efros, 2016, "Context encoders: feature learning by inpainting"
(arXiv:1604.07379), section 3; equation 1 is the loss. The paper's adversarial loss (equation 2) is not here: its own
experiments on features went without, since it did not converge with their AlexNet, and a discriminator wants a second
optimizer. What differs besides:

- Any backbone with a feature map will do; the number of up-convolutions follows from it.
- The paper's features come from holes of arbitrary shape, which it found as good as random blocks; blocks are the
  default here. They are laid over a grid and hide exactly the same number of its cells in every image.
- The authors ask for a rim of visible pixels around the central hole and weigh it ten times as much, so that the
  painting fits; here all holes have that rim.
- The loss is the weighted mean over pixels, not the sum.
"""

from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from sslbook import distributed
from sslbook.data.loader import Batch
from sslbook.data.masks import block_mask
from sslbook.data.views import View
from sslbook.errors import UserError
from sslbook.methods.base import Method
from sslbook.nn import backbone_dim
from sslbook.nn.feature_map import UpConvolutions, feature_map, map_side
from sslbook.schedules import Clock

VIEW = View(crop=(0.2, 1.0))


def central_hole(size: int, overlap: int) -> Bool[Tensor, "{size} {size}"]:
    """A square of half the image's side, less the rim that is shown: `overlap` pixels on each side."""
    hole = torch.zeros(size, size, dtype=torch.bool)
    first, last = size // 4 + overlap, size // 4 + size // 2 - overlap
    hole[first:last, first:last] = True
    return hole


def pixel_weights(
    hidden: Bool[Tensor, "batch height width"], overlap: int, overlap_weight: float
) -> Float[Tensor, "batch height width"]:
    """1 where pixels are hidden, `overlap_weight` if visible but at most `overlap` from a hole, 0 beyond."""
    hole = hidden.float()[:, None]
    near = F.max_pool2d(hole, 2 * overlap + 1, stride=1, padding=overlap)
    return (hole + overlap_weight * (near - hole))[:, 0]


def reconstruction_loss(
    painted: Float[Tensor, "batch 3 height width"],
    images: Float[Tensor, "batch 3 height width"],
    weights: Float[Tensor, "batch height width"],
) -> Float[Tensor, ""]:
    """Equation 1: squared error, weighted pixel by pixel; the weights of the global batch have the mean 1."""
    error = (painted.float() - images.float()).square().mean(dim=1)
    return (weights * error).mean() / distributed.all_reduce_mean(weights.mean())


class ChannelwiseLinear(nn.Module):
    """From every place to every place, for each channel on its own (section 3.1); then a linear layer over channels.

    Args:
        dim: channels.
        side: rows and columns of the feature map.
    """

    def __init__(self, dim: int, side: int) -> None:
        super().__init__()
        self.weight = nn.Parameter((torch.rand(dim, side**2, side**2) * 2 - 1) / side)
        self.bias = nn.Parameter(torch.zeros(dim, 1, side**2))
        self.mix = nn.Conv2d(dim, dim, 1)

    def forward(self, x: Float[Tensor, "batch dim side side"]) -> Float[Tensor, "batch dim side side"]:
        places = x.flatten(2).transpose(0, 1)
        y = torch.baddbmm(self.bias, places, self.weight).transpose(0, 1)
        return self.mix(F.relu(y.unflatten(2, x.shape[2:])))


class ContextEncoder(Method):
    """Context encoder (arXiv:1604.07379).

    Args:
        backbone: the network to train, with a feature map.
        view: what an image becomes before holes are cut.
        mask: `blocks`: rectangles anywhere; `center`: the middle square of half the image's side.
        mask_ratio: part of the image that the blocks hide.
        mask_grid: rows and columns of the grid that the blocks fit into.
        overlap: width of the visible rim around a hole that is painted too, in pixels.
        overlap_weight: how much more a pixel of the rim counts than a hidden one.
        decoder_dim: width of the first up-convolution; it halves with each.
    """

    def __init__(
        self,
        backbone: nn.Module,
        view: View = VIEW,
        mask: Literal["blocks", "center"] = "blocks",
        mask_ratio: float = 0.25,
        mask_grid: int = 14,
        overlap: int = 7,
        overlap_weight: float = 10.0,
        decoder_dim: int = 128,
    ) -> None:
        super().__init__()
        self.view, self.mask, self.overlap, self.overlap_weight = view, mask, overlap, overlap_weight
        self.mask_grid, self.num_masked = mask_grid, int(mask_ratio * mask_grid**2 + 1e-6)
        if mask == "center" and not 0 <= 4 * overlap < view.size:
            raise UserError(
                f"an overlap of {overlap} pixels fills the hole in an image of {view.size}: "
                f"set overlap to at least 0 and at most {(view.size - 1) // 4}"
            )
        if mask == "blocks" and not 0 < self.num_masked < mask_grid**2:
            raise UserError(
                f"mask_ratio {mask_ratio} of {mask_grid}x{mask_grid} cells leaves nothing to "
                f"{'see' if self.num_masked else 'paint'}: use at least {1 / mask_grid**2:.3g} and less than 1"
            )
        if mask == "blocks" and (view.size % mask_grid or overlap < 0):
            raise UserError(
                f"{view.size} pixels do not fall into {mask_grid} cells, or overlap {overlap} is below 0: "
                "choose mask_grid to divide view.size and overlap to be at least 0"
            )
        side = map_side(backbone, view.size, "the context encoder")
        doublings = ((view.size - 1) // side).bit_length()
        self.backbone = backbone
        dim = backbone_dim(backbone)
        self.across = ChannelwiseLinear(dim, side)
        self.decoder = UpConvolutions(dim, [max(decoder_dim >> i, 4) for i in range(doublings)], 3)

    def views(self) -> tuple[View, ...]:
        return (self.view,)

    def holes(self, index: Int[Tensor, "batch"], clock: Clock) -> Bool[Tensor, "batch height width"]:
        """Which pixels of every image are hidden."""
        if self.mask == "center":
            return central_hole(self.view.size, self.overlap).to(index.device).expand(len(index), -1, -1)
        grid = (self.mask_grid, self.mask_grid)
        cells = block_mask(index, grid, self.num_masked, clock, min_block=min(4, self.num_masked), exact=True)
        cell_size = self.view.size // self.mask_grid
        return cells.unflatten(1, grid).repeat_interleave(cell_size, dim=1).repeat_interleave(cell_size, dim=2)

    def paint(
        self, images: Float[Tensor, "batch 3 height width"], hidden: Bool[Tensor, "batch height width"]
    ) -> Float[Tensor, "batch 3 height width"]:
        """The whole image as the decoder draws it from what is not hidden; holes are filled with the mean, zero."""
        seen = images.masked_fill(hidden[:, None], 0.0)
        painted = self.decoder(self.across(feature_map(self.backbone, seen)))
        if painted.shape[2:] != images.shape[2:]:
            painted = F.interpolate(painted.float(), images.shape[2:], mode="bilinear")
        return painted

    def forward(self, batch: Batch, clock: Clock) -> dict[str, Tensor]:
        (images,) = batch.views
        hidden = self.holes(batch.index, clock)
        weights = pixel_weights(hidden, self.overlap, self.overlap_weight)
        return {"loss": reconstruction_loss(self.paint(images, hidden), images, weights)}

    @torch.no_grad()
    def reconstruct(
        self,
        images: Float[Tensor, "batch 3 height width"],
        index: Int[Tensor, "batch"],
        clock: Clock = Clock(),
    ) -> tuple[Float[Tensor, "batch 3 height width"], Float[Tensor, "batch 3 height width"]]:
        """The images with holes (zero), and with the decoder's painting in their place."""
        hidden = self.holes(index, clock)[:, None]
        painted = self.paint(images, hidden[:, 0]).to(images.dtype)
        return images.masked_fill(hidden, 0.0), torch.where(hidden, painted, images)
