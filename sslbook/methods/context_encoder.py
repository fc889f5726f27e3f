"""Context encoder: inpainting, reconstruct the masked regions of an image from what is visible.

A large region cannot be filled in by continuing the pixels at its border; the network has to recognize the rest of the
image. An encoder maps the masked image to a feature map, a layer that connects all positions of each channel passes
information across it, and a decoder of transposed convolutions reconstructs the pixels.

Pathak, Krähenbühl, Donahue, Darrell and Efros, 2016, "Context encoders: feature learning by inpainting"
(arXiv:1604.07379), section 3; equation 1 is the loss.

What differs from the paper:
- The adversarial loss (equation 2) is left out. The paper's own experiments on features were made without it, since it
  did not converge with their AlexNet, and a discriminator needs a second optimizer.
- Any backbone with a feature map will do; the number of transposed convolutions follows from it.
- The paper's features come from masks of arbitrary shape, which it found as good as random blocks; blocks are the
  default here. They lie on a grid and mask exactly the same number of its cells in every image.
- The authors reconstruct a border of visible pixels around the central mask with ten times the weight, for consistency
  with the surroundings; here all masks have that border.
- The loss is the weighted mean over pixels, not the sum.
"""

from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from sslbook import distributed
from sslbook.data.loader import Batch
from sslbook.data.masks import block_mask, require_mask
from sslbook.data.views import View
from sslbook.errors import UserError
from sslbook.methods.base import Method
from sslbook.nn import backbone_dim
from sslbook.nn.backbones import in_channels
from sslbook.nn.feature_map import UpConvolutions, feature_map, map_side
from sslbook.schedules import Clock
from sslbook.types import PositiveInt

VIEW = View(crop=(0.2, 1.0))


def central_mask(size: int, overlap: int) -> Bool[Tensor, "{size} {size}"]:
    """A square of half the image's side, less a visible border of `overlap` pixels on each side."""
    mask = torch.zeros(size, size, dtype=torch.bool)
    first, last = size // 4 + overlap, size // 4 + size // 2 - overlap
    mask[first:last, first:last] = True
    return mask


def pixel_weights(
    mask: Bool[Tensor, "batch height width"], overlap: int, overlap_weight: float
) -> Float[Tensor, "batch height width"]:
    """1 for masked pixels, `overlap_weight` for visible ones at most `overlap` from a masked one, 0 elsewhere."""
    masked = mask.float()[:, None]
    near = F.max_pool2d(masked, 2 * overlap + 1, stride=1, padding=overlap)
    return (masked + overlap_weight * (near - masked))[:, 0]


def reconstruction_loss(
    prediction: Float[Tensor, "batch channels height width"],
    images: Float[Tensor, "batch channels height width"],
    weights: Float[Tensor, "batch height width"],
) -> Float[Tensor, ""]:
    """Equation 1: squared error, weighted pixel by pixel; the weights of the global batch have the mean 1."""
    error = (prediction.float() - images.float()).square().mean(dim=1)
    return (weights * error).mean() / distributed.all_reduce_mean(weights.mean())


class ChannelwiseLinear(nn.Module):
    """A linear layer over all positions of each channel separately (section 3.1), then one over channels."""

    def __init__(self, dim: int, side: int) -> None:
        super().__init__()
        self.weight = nn.Parameter((torch.rand(dim, side**2, side**2) * 2 - 1) / side)
        self.bias = nn.Parameter(torch.zeros(dim, 1, side**2))
        self.mix = nn.Conv2d(dim, dim, 1)

    def forward(self, x: Float[Tensor, "batch dim side side"]) -> Float[Tensor, "batch dim side side"]:
        channels = x.flatten(2).transpose(0, 1)  # (dim, batch, positions): one matrix product per channel
        y = torch.baddbmm(self.bias, channels, self.weight).transpose(0, 1)
        return self.mix(F.relu(y.unflatten(2, x.shape[2:])))


class ContextEncoder(Method):
    """Context encoder (arXiv:1604.07379).

    Args:
        backbone: the network to train, with a feature map.
        view: augmentation of an image before it is masked.
        mask: `blocks`: random rectangles; `center`: the middle square of half the image's side.
        mask_ratio: fraction of the image that the blocks mask.
        mask_grid: rows and columns of the grid on which the blocks lie.
        overlap: width of the visible border around a mask that is reconstructed too, in pixels.
        overlap_weight: weight of a pixel of the border; a masked pixel has weight 1.
        decoder_dim: channels after the first transposed convolution; each further one halves them.

    Raises:
        UserError: the mask covers nothing or everything or does not fit into the view, or the backbone has no feature
            map.
    """

    def __init__(
        self,
        backbone: nn.Module,
        view: View = VIEW,
        mask: Literal["blocks", "center"] = "blocks",
        mask_ratio: float = 0.25,
        mask_grid: PositiveInt = 14,
        overlap: int = 7,
        overlap_weight: float = 10.0,
        decoder_dim: PositiveInt = 128,
    ) -> None:
        super().__init__()
        self.view, self.mask, self.mask_grid = view, mask, mask_grid
        self.overlap, self.overlap_weight = overlap, overlap_weight
        if mask == "center" and not 0 <= 4 * overlap < view.size:
            raise UserError(
                f"an overlap of {overlap} pixels leaves nothing to mask in an image of {view.size}: "
                f"set overlap to at least 0 and at most {(view.size - 1) // 4}"
            )
        if mask == "blocks":
            if view.size % mask_grid:
                raise UserError(f"mask_grid {mask_grid} does not divide {view.size} pixels: change it or view.size")
            self.num_masked = require_mask(int(mask_ratio * mask_grid**2 + 1e-6), mask_grid**2)
        side = map_side(backbone, view.size, "the context encoder")
        doublings = ((view.size - 1) // side).bit_length()
        self.backbone = backbone
        dim = backbone_dim(backbone)
        self.across = ChannelwiseLinear(dim, side)
        self.decoder = UpConvolutions(dim, [max(decoder_dim >> i, 4) for i in range(doublings)], in_channels(backbone))

    def views(self) -> tuple[View, ...]:
        return (self.view,)

    def sample_masks(self, index: Int[Tensor, "batch"], clock: Clock) -> Bool[Tensor, "batch height width"]:
        """The masked pixels of every image."""
        if self.mask == "center":
            return central_mask(self.view.size, self.overlap).to(index.device).expand(len(index), -1, -1)
        grid = (self.mask_grid, self.mask_grid)
        cells = block_mask(index, grid, self.num_masked, clock, min_block=min(4, self.num_masked), exact=True)
        cell_size = self.view.size // self.mask_grid
        return cells.unflatten(1, grid).repeat_interleave(cell_size, dim=1).repeat_interleave(cell_size, dim=2)

    def predict(
        self, images: Float[Tensor, "batch channels height width"], mask: Bool[Tensor, "batch height width"]
    ) -> Float[Tensor, "batch channels height width"]:
        """The whole image, reconstructed from its visible pixels; masked ones are set to the mean, 0."""
        visible = images.masked_fill(mask[:, None], 0.0)
        prediction = self.decoder(self.across(feature_map(self.backbone, visible)))
        if prediction.shape[2:] != images.shape[2:]:
            prediction = F.interpolate(prediction.float(), images.shape[2:], mode="bilinear")
        return prediction

    def forward(self, batch: Batch, clock: Clock) -> dict[str, Tensor]:
        (images,) = batch.views
        mask = self.sample_masks(batch.index, clock)  # M of equation 1, (batch, height, width)
        prediction = self.predict(images, mask)  # F((1 - M) * x): the encoder's input has no masked pixel
        # The error counts where pixels are masked, and in the border that makes the filling consistent (section 3.2).
        weights = pixel_weights(mask, self.overlap, self.overlap_weight)
        return {"loss": reconstruction_loss(prediction, images, weights)}

    @torch.no_grad()
    def reconstruct(
        self, images: Float[Tensor, "batch channels height width"], index: Int[Tensor, "batch"], clock: Clock = Clock()
    ) -> tuple[Float[Tensor, "batch channels height width"], Float[Tensor, "batch channels height width"]]:
        """The masked images, and the same with the masked pixels predicted."""
        mask = self.sample_masks(index, clock)
        prediction = self.predict(images, mask).to(images.dtype)
        return images.masked_fill(mask[:, None], 0.0), torch.where(mask[:, None], prediction, images)
