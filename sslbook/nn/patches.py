"""Images as sequences of patches, and patches as regression targets (MAE, arXiv:2111.06377, section 3)."""

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor


def patchify(
    images: Float[Tensor, "batch channels height width"], patch_size: int
) -> Float[Tensor, "batch patches values"]:
    """The patches of every image, row by row; the values of a patch pixel by pixel, its channels together."""
    return rearrange(images, "b c (h p) (w q) -> b (h w) (p q c)", p=patch_size, q=patch_size)


def unpatchify(
    patches: Float[Tensor, "batch patches values"], patch_size: int, grid: tuple[int, int]
) -> Float[Tensor, "batch channels height width"]:
    """The inverse of `patchify`, for a grid of rows and columns of patches."""
    return rearrange(patches, "b (h w) (p q c) -> b c (h p) (w q)", h=grid[0], p=patch_size, q=patch_size)


def normalize_patches(patches: Float[Tensor, "*batch values"]) -> Float[Tensor, "*batch values"]:
    """Every patch with mean 0 and variance 1 ("Reconstruction target"; unbiased variance as in the authors' code)."""
    variance, mean = torch.var_mean(patches, dim=-1, keepdim=True)
    return (patches - mean) / (variance + 1e-6).sqrt()
