"""PixMIM: MAE that need not draw fine detail, and that sees most of the image.

Two changes of MAE's pre-training and nothing else. The target is the image without its high frequencies, so that
capacity is not spent on texture; and images are cut by a simple resized crop, which keeps what is in the foreground.

Liu, Zhang, Chen, Chen and Lin, 2023, "PixMIM: rethinking pixel reconstruction in masked image modeling"
(arXiv:2303.02416), section 4, equations 2 to 5: an ideal low-pass filter with a radius of 40 periods at 224 pixels. Here
the radius scales with the image, and the filter's center is the frequency zero as in the equations, half a step from
where the authors' code has it. The paper's crop lies anywhere along the longer side and moves by up to four pixels into
a mirrored border; here the view cuts the middle of the longer side, and the image is moved in `forward`. Masks and
shifts are keyed by image and epoch.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from sslbook import rng
from sslbook.data.loader import Batch
from sslbook.data.views import View
from sslbook.errors import UserError
from sslbook.methods.base import Method
from sslbook.nn.decoders import (
    PixelDecoder,
    normalize_patches,
    num_visible,
    patchify,
    random_mask,
    require_transformer,
    take,
)
from sslbook.nn.vit import VisionTransformer, patch_grid
from sslbook.schedules import Clock

VIEW = View(crop=None, interpolation="bicubic")
FULL_SIZE = 224  # what radius and shift are given for


def low_pass(images: Float[Tensor, "batch 3 height width"], radius: float) -> Float[Tensor, "batch 3 height width"]:
    """The images without waves of more than `radius` periods, counted along the wave (equations 2 to 4)."""
    height, width = images.shape[2:]
    down = torch.fft.fftfreq(height, 1 / height, device=images.device)[:, None]
    right = torch.fft.rfftfreq(width, 1 / width, device=images.device)
    kept = down.square() + right.square() <= radius**2
    return torch.fft.irfft2(torch.fft.rfft2(images) * kept, s=(height, width))


def shifted(
    images: Float[Tensor, "batch 3 height width"], by: int, index: Int[Tensor, "batch"], clock: Clock
) -> Float[Tensor, "batch 3 height width"]:
    """Every image moved by up to so many pixels each way; what comes in at the border is its mirror image."""
    if by == 0:
        return images
    height, width = images.shape[2:]
    u = rng.uniform(clock.seed, clock.epoch, index, rng.METHOD + 1, 2)
    start = (u * (2 * by + 1)).long()
    row = start[:, :1] + torch.arange(height, device=images.device)
    column = start[:, 1:] + torch.arange(width, device=images.device)
    image = torch.arange(len(images), device=images.device)[:, None, None]
    padded = F.pad(images, (by, by, by, by), mode="reflect")
    return padded[image, :, row[:, :, None], column[:, None, :]].permute(0, 3, 1, 2).contiguous()


class PixMIM(Method):
    """Masked autoencoder with a low-frequency target (arXiv:2303.02416).

    Args:
        backbone: the vision transformer to train.
        view: what an image becomes.
        mask_ratio: part of the patches that is hidden.
        radius: periods that the target keeps, across an image of 224 pixels.
        shift: how far an image may be moved each way, in pixels of an image of 224.
        norm_pix_loss: predict every patch normalized by its own mean and deviation.
        decoder_dim: width of the decoder.
        decoder_depth: blocks of the decoder.
        decoder_num_heads: attention heads of the decoder.
    """

    backbone: VisionTransformer  # pyrefly: ignore[bad-override-mutable-attribute]

    def __init__(
        self,
        backbone: nn.Module,
        view: View = VIEW,
        mask_ratio: float = 0.75,
        radius: float = 40.0,
        shift: float = 4.0,
        norm_pix_loss: bool = True,
        decoder_dim: int = 512,
        decoder_depth: int = 8,
        decoder_num_heads: int = 16,
    ) -> None:
        super().__init__()
        backbone = require_transformer(backbone, "PixMIM")
        if radius <= 0:
            raise UserError(f"radius {radius} leaves nothing of the image: use 40, or another positive number")
        self.shift = round(shift * view.size / FULL_SIZE)
        if not 0 <= self.shift < view.size:
            raise UserError(f"shift {shift} moves an image by more than its size: use 4, or less than {FULL_SIZE}")
        self.view, self.mask_ratio, self.norm_pix_loss = view, mask_ratio, norm_pix_loss
        self.radius = radius * view.size / FULL_SIZE
        grid = patch_grid(view.size, view.size, backbone.patch_size)
        num_visible(grid[0] * grid[1], mask_ratio)  # refuses a ratio that leaves nothing to do
        self.backbone = backbone
        self.decoder = PixelDecoder(backbone, view.size, decoder_dim, decoder_depth, decoder_num_heads)

    def views(self) -> tuple[View, ...]:
        return (self.view,)

    def target(self, images: Float[Tensor, "batch 3 height width"]) -> Float[Tensor, "batch patches values"]:
        """What is to be drawn on every patch (equation 5)."""
        with torch.autocast(images.device.type, enabled=False):
            patches = patchify(low_pass(images.float(), self.radius), self.backbone.patch_size)
        return normalize_patches(patches) if self.norm_pix_loss else patches

    def forward(self, batch: Batch, clock: Clock) -> dict[str, Tensor]:
        images = shifted(batch.views[0], self.shift, batch.index, clock)
        tokens = self.backbone.embed(images)
        visible, hidden = random_mask(batch.index, tokens.shape[1], self.mask_ratio, clock)
        encoded = self.backbone.encode(take(tokens, visible))
        prediction = self.decoder(encoded, visible, hidden, self.decoder.grid).float()
        return {"loss": (prediction - take(self.target(images), hidden)).square().mean()}
