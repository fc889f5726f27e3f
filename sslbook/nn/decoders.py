"""What the descendants of MAE share: patches as rows of pixels, masks of single patches, and the small decoder.

He et al., 2022, "Masked autoencoders are scalable vision learners" (arXiv:2111.06377), section 3.
"""

import torch
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor, nn

from sslbook import rng
from sslbook.errors import UserError
from sslbook.nn.vit import Block, VisionTransformer, init_transformer, patch_grid, resample_positions, sincos_positions
from sslbook.schedules import Clock


def require_transformer(backbone: nn.Module, method: str) -> VisionTransformer:
    """The backbone itself, or a `UserError` that names the networks that will do."""
    if not isinstance(backbone, VisionTransformer):
        raise UserError(
            f"{method} hides patches from a vision transformer and cannot use a {type(backbone).__name__}: "
            "choose sslbook.nn.VisionTransformer or sslbook.nn.vit_tiny, vit_small, vit_base, vit_large, vit_huge"
        )
    return backbone


def patchify(images: Float[Tensor, "batch 3 height width"], patch_size: int) -> Float[Tensor, "batch patches values"]:
    """Images cut into patches, row by row; within a patch pixel by pixel, each with its three colors."""
    return rearrange(images, "b c (h p) (w q) -> b (h w) (p q c)", p=patch_size, q=patch_size)


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


class PixelDecoder(nn.Module):
    """Predicts the pixels of the hidden patches from the encoded visible ones (section 3, "MAE decoder")."""

    def __init__(self, backbone: VisionTransformer, image_size: int, dim: int, depth: int, num_heads: int) -> None:
        super().__init__()
        self.grid = patch_grid(image_size, image_size, backbone.patch_size)
        self.embed = nn.Linear(backbone.dim, dim)
        self.mask_token = nn.Parameter(0.02 * torch.randn(1, 1, dim))
        self.register_buffer("positions", sincos_positions(dim, *self.grid))
        self.blocks = nn.Sequential(*[Block(dim, num_heads) for _ in range(depth)])
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.predict = nn.Linear(dim, backbone.patch_size**2 * 3)
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
