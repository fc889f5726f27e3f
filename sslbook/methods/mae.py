"""MAE: hide three quarters of an image's patches and draw them from the rest.

The encoder, a vision transformer, sees the visible patches only, which makes it quick and keeps mask tokens out of what
is learned. A small decoder gets the encoded patches and mask tokens, each with its position, and predicts the pixels.

He, Chen, Xie, Li, Dollár and Girshick, 2022, "Masked autoencoders are scalable vision learners" (arXiv:2111.06377),
section 3. Values, positions and initialization are those of the authors' code. Which patches are hidden is keyed by the
image and the epoch instead of drawn from a running generator.
"""

import torch
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor, nn

from sslbook import rng
from sslbook.data.loader import Batch
from sslbook.data.views import MAE_CROP, View
from sslbook.errors import UserError
from sslbook.methods.base import Method
from sslbook.nn.vit import Block, VisionTransformer, init_transformer, patch_grid, resample_positions, sincos_positions
from sslbook.schedules import Clock


def patchify(images: Float[Tensor, "batch 3 height width"], patch_size: int) -> Float[Tensor, "batch patches values"]:
    """Images cut into patches, row by row; within a patch pixel by pixel, each with its three colors."""
    return rearrange(images, "b c (h p) (w q) -> b (h w) (p q c)", p=patch_size, q=patch_size)


def unpatchify(
    patches: Float[Tensor, "batch patches values"], patch_size: int, grid: tuple[int, int]
) -> Float[Tensor, "batch 3 height width"]:
    """The inverse of `patchify` for a grid of so many rows and columns of patches."""
    return rearrange(patches, "b (h w) (p q c) -> b c (h p) (w q)", h=grid[0], p=patch_size, q=patch_size)


def num_visible(num_patches: int, mask_ratio: float) -> int:
    """How many patches the encoder sees; a `UserError` if that is none or all."""
    visible = int(num_patches * (1 - mask_ratio) + 1e-6)  # 0.9 of 10 hides 9, although 1 - 0.9 falls short of 0.1
    if not 0 < visible < num_patches:
        what = "to predict" if visible else "to see"
        raise UserError(
            f"mask ratio {mask_ratio} of {num_patches} patches leaves nothing {what}: "
            f"use a ratio of at least {1 / num_patches:.3g} and at most {1 - 1 / num_patches:.3g}"
        )
    return visible


def random_mask(
    index: Int[Tensor, "batch"], num_patches: int, mask_ratio: float, clock: Clock
) -> tuple[Int[Tensor, "batch visible"], Int[Tensor, "batch hidden"]]:
    """Which patches of every image are visible and which hidden, each in random order (section 3, "Masking")."""
    order = rng.uniform(clock.seed, clock.epoch, index, rng.METHOD, num_patches).argsort(dim=1, stable=True)
    visible = num_visible(num_patches, mask_ratio)
    return order[:, :visible], order[:, visible:]


def take(x: Float[Tensor, "batch patches dim"], index: Int[Tensor, "batch some"]) -> Float[Tensor, "batch some dim"]:
    """The patches at the given places, image by image."""
    return x.gather(1, index[:, :, None].expand(-1, -1, x.shape[2]))


def normalize_patches(patches: Float[Tensor, "batch some values"]) -> Float[Tensor, "batch some values"]:
    """Every patch with mean 0 and variance 1 (section 3, "Reconstruction target"; unbiased variance as in the code)."""
    variance, mean = torch.var_mean(patches, dim=-1, keepdim=True)
    return (patches - mean) / (variance + 1e-6).sqrt()


def reconstruction_loss(
    prediction: Float[Tensor, "batch hidden values"], target: Float[Tensor, "batch hidden values"]
) -> Float[Tensor, ""]:
    """Mean squared error over the hidden patches."""
    return (prediction.float() - target.float()).square().mean()


class Decoder(nn.Module):
    """Predicts the pixels of every patch from the encoded visible ones."""

    def __init__(
        self, encoder_dim: int, dim: int, depth: int, num_heads: int, patch_size: int, grid: tuple[int, int]
    ) -> None:
        super().__init__()
        self.grid = grid
        self.embed = nn.Linear(encoder_dim, dim)
        self.mask_token = nn.Parameter(0.02 * torch.randn(1, 1, dim))
        self.register_buffer("positions", sincos_positions(dim, *grid))
        self.blocks = nn.Sequential(*[Block(dim, num_heads) for _ in range(depth)])
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.predict = nn.Linear(dim, patch_size**2 * 3)
        init_transformer(self)

    def forward(
        self,
        tokens: Float[Tensor, "batch tokens dim"],
        visible: Int[Tensor, "batch visible"],
        hidden: Int[Tensor, "batch hidden"],
        grid: tuple[int, int],
    ) -> Float[Tensor, "batch hidden values"]:
        tokens = self.embed(tokens)
        masks = self.mask_token.to(tokens.dtype).expand(len(tokens), hidden.shape[1], -1)
        # The order of tokens means nothing to a transformer: only the positions added to them do.
        positions = resample_positions(self.positions, self.grid, grid)[torch.cat([visible, hidden], dim=1)]
        patches = torch.cat([tokens[:, 1:], masks], dim=1) + positions
        tokens = self.blocks(torch.cat([tokens[:, :1], patches], dim=1))
        return self.predict(self.norm(tokens[:, -hidden.shape[1] :]))


class MAE(Method):
    """Masked autoencoder (arXiv:2111.06377).

    Args:
        backbone: the vision transformer to train.
        view: what an image becomes.
        mask_ratio: part of the patches that is hidden.
        norm_pix_loss: predict every patch normalized by its own mean and deviation.
        decoder_dim: width of the decoder.
        decoder_depth: blocks of the decoder.
        decoder_num_heads: attention heads of the decoder.
    """

    backbone: VisionTransformer  # pyrefly: ignore[bad-override-mutable-attribute]

    def __init__(
        self,
        backbone: nn.Module,
        view: View = MAE_CROP,
        mask_ratio: float = 0.75,
        norm_pix_loss: bool = True,
        decoder_dim: int = 512,
        decoder_depth: int = 8,
        decoder_num_heads: int = 16,
    ) -> None:
        super().__init__()
        if not isinstance(backbone, VisionTransformer):
            raise UserError(
                f"MAE hides patches from a vision transformer and cannot use a {type(backbone).__name__}: "
                "choose sslbook.nn.VisionTransformer or sslbook.nn.vit_tiny, vit_small, vit_base, vit_large, vit_huge"
            )
        self.view, self.mask_ratio, self.norm_pix_loss = view, mask_ratio, norm_pix_loss
        grid = patch_grid(view.size, view.size, backbone.patch_size)
        num_visible(grid[0] * grid[1], mask_ratio)  # refuses a ratio that leaves nothing to do
        self.backbone = backbone
        self.decoder = Decoder(backbone.dim, decoder_dim, decoder_depth, decoder_num_heads, backbone.patch_size, grid)

    def views(self) -> tuple[View, ...]:
        return (self.view,)

    def predict(
        self, images: Float[Tensor, "batch 3 height width"], index: Int[Tensor, "batch"], clock: Clock
    ) -> tuple[Float[Tensor, "batch hidden values"], Int[Tensor, "batch hidden"]]:
        """What the decoder draws on the hidden patches, and which these are."""
        tokens = self.backbone.embed(images)
        visible, hidden = random_mask(index, tokens.shape[1], self.mask_ratio, clock)
        encoded = self.backbone.encode(take(tokens, visible))
        grid = patch_grid(images.shape[2], images.shape[3], self.backbone.patch_size)
        return self.decoder(encoded, visible, hidden, grid), hidden

    def forward(self, batch: Batch, clock: Clock) -> dict[str, Tensor]:
        (images,) = batch.views
        prediction, hidden = self.predict(images, batch.index, clock)
        target = take(patchify(images, self.backbone.patch_size), hidden)
        if self.norm_pix_loss:
            target = normalize_patches(target)
        return {"loss": reconstruction_loss(prediction, target)}

    @torch.no_grad()
    def reconstruct(
        self,
        images: Float[Tensor, "batch 3 height width"],
        index: Int[Tensor, "batch"],
        clock: Clock = Clock(),
    ) -> tuple[Float[Tensor, "batch 3 height width"], Float[Tensor, "batch 3 height width"]]:
        """The images with their hidden patches blank (zero), and with the decoder's drawing in their place.

        With `norm_pix_loss` the decoder predicts a patch up to its mean and deviation, which the image provides.
        """
        size = self.backbone.patch_size
        prediction, hidden = self.predict(images, index, clock)
        prediction = prediction.to(images.dtype)
        patches = patchify(images, size)
        if self.norm_pix_loss:
            variance, mean = torch.var_mean(take(patches, hidden), dim=-1, keepdim=True)
            prediction = prediction * (variance + 1e-6).sqrt() + mean
        place = hidden[:, :, None].expand_as(prediction)
        grid = patch_grid(images.shape[2], images.shape[3], size)
        masked, drawn = (patches.scatter(1, place, x) for x in (torch.zeros_like(prediction), prediction))
        return unpatchify(masked, size, grid), unpatchify(drawn, size, grid)
