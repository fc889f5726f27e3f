"""The vector-quantized tokenizer of BEiT v2: a vision transformer with a codebook of unit vectors.

Peng et al., 2022, "BEiT v2: masked image modeling with vector-quantized visual tokenizers" (arXiv:2208.06366), section
3.1. `sslbook.methods.vqkd` trains it.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from sslbook.errors import UserError
from sslbook.nn.vit import VisionTransformer
from sslbook.types import PositiveInt


class VQTokenizer(nn.Module):
    """A vision transformer whose patch tokens, projected and l2-normalized, are quantized to the nearest code.

    Args:
        image_size: side of the images.
        patch_size: side of a patch.
        dim: width of a token, and of the feature.
        depth: number of blocks.
        num_heads: number of attention heads.
        num_codes: size of the codebook.
        code_dim: width of a code.

    Raises:
        UserError: there is only one code.
    """

    codebook: Tensor

    def __init__(
        self,
        image_size: PositiveInt = 224,
        patch_size: PositiveInt = 16,
        dim: PositiveInt = 768,
        depth: int = 12,
        num_heads: PositiveInt = 12,
        num_codes: int = 8192,
        code_dim: PositiveInt = 32,
    ) -> None:
        init_args = {name: value for name, value in locals().items() if name not in ("self", "__class__")}
        super().__init__()
        if num_codes < 2:
            raise UserError(f"num_codes {num_codes} leaves nothing to predict: use at least 2, such as 8192")
        self.init_args = init_args
        self.patch_size, self.num_codes, self.dim, self.code_dim = patch_size, num_codes, dim, code_dim
        self.vit = VisionTransformer(image_size, patch_size, dim, depth, num_heads, pool="mean")
        self.grid = self.vit.grid
        self.project = nn.Sequential(nn.Linear(dim, dim), nn.Tanh(), nn.Linear(dim, code_dim))
        self.register_buffer("codebook", F.normalize(torch.randn(num_codes, code_dim), dim=1))

    def latents(self, x: Float[Tensor, "batch 3 height width"]) -> Float[Tensor, "batch patches code_dim"]:
        """The l2-normalized projection of every patch, row by row."""
        tokens = self.vit.forward_tokens(x)[:, 1:]
        return F.normalize(self.project(tokens).float(), dim=2)

    def nearest(self, latents: Float[Tensor, "batch patches code_dim"]) -> Int[Tensor, "batch patches"]:
        """The code nearest to each latent: for unit vectors the one of the greatest dot product."""
        return (latents @ self.codebook.T).argmax(dim=2)

    def tokens(self, x: Float[Tensor, "batch 3 height width"]) -> Int[Tensor, "batch patches"]:
        """The code of every patch."""
        return self.nearest(self.latents(x))

    def forward(self, x: Float[Tensor, "batch 3 height width"]) -> Float[Tensor, "batch dim"]:
        return self.vit(x)

    def forward_map(self, x: Float[Tensor, "batch 3 height width"]) -> Float[Tensor, "batch dim rows columns"]:
        """The features of all patches."""
        return self.vit.forward_map(x)
