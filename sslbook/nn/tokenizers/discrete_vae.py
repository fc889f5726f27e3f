"""The discrete variational autoencoder: an encoder of logits over codes for every patch, and the decoder back to pixels.

Ramesh et al., 2021, "Zero-shot text-to-image generation" (DALL-E, arXiv:2102.12092), section 2.1 and appendix A, with
smaller networks. `sslbook.methods.dvae` trains it.
"""

import math

from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor, nn

from sslbook.errors import UserError
from sslbook.types import PositiveInt


class Residual(nn.Module):
    """A residual block of two convolutions."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.ReLU(), nn.Conv2d(dim, dim, 3, padding=1), nn.ReLU(), nn.Conv2d(dim, dim, 1))

    def forward(self, x: Float[Tensor, "batch dim rows columns"]) -> Float[Tensor, "batch dim rows columns"]:
        return x + self.layers(x)


class DiscreteEncoder(nn.Module):
    """The encoder: logits of all codes for every patch.

    Args:
        patch_size: side of a patch, a power of two.
        num_codes: size of the codebook.
        dim: channels of the network.
        depth: residual blocks at the resolution of the patches.

    Raises:
        UserError: the patch size is no power of two, or there is only one code.
    """

    def __init__(
        self, patch_size: PositiveInt = 8, num_codes: int = 8192, dim: PositiveInt = 256, depth: int = 2
    ) -> None:
        super().__init__()
        if patch_size < 2 or patch_size & (patch_size - 1):
            near = 2 ** max(1, round(math.log2(max(2, patch_size))))
            raise UserError(f"patches of {patch_size} pixels are not made by halving: use patch_size {near}")
        if num_codes < 2:
            raise UserError(f"num_codes {num_codes} leaves nothing to predict: use at least 2, such as 8192")
        self.init_args = {"patch_size": patch_size, "num_codes": num_codes, "dim": dim, "depth": depth}
        self.patch_size, self.num_codes, self.dim = patch_size, num_codes, dim
        halvings = round(math.log2(patch_size))
        layers: list[nn.Module] = []
        for i in range(halvings):
            layers += [nn.Conv2d(3 if i == 0 else dim, dim, 4, stride=2, padding=1)]
            layers += [nn.ReLU()] if i < halvings - 1 else []
        self.layers = nn.Sequential(*layers, *[Residual(dim) for _ in range(depth)], nn.ReLU())
        self.head = nn.Conv2d(dim, num_codes, 1)

    def logits(self, x: Float[Tensor, "batch 3 height width"]) -> Float[Tensor, "batch patches codes"]:
        """Logits of the codes, patch by patch, row by row."""
        return rearrange(self.head(self.layers(x)), "b k h w -> b (h w) k")

    def tokens(self, x: Float[Tensor, "batch 3 height width"]) -> Int[Tensor, "batch patches"]:
        """The most probable code of every patch."""
        return self.logits(x).argmax(dim=2)

    def forward(self, x: Float[Tensor, "batch 3 height width"]) -> Float[Tensor, "batch dim"]:
        return self.forward_map(x).mean(dim=(2, 3))

    def forward_map(self, x: Float[Tensor, "batch 3 height width"]) -> Float[Tensor, "batch dim rows columns"]:
        """The features of all patches."""
        return self.layers(x)


class DiscreteDecoder(nn.Module):
    """The decoder: codes, or mixtures of codes, to pixels; the encoder in reverse."""

    def __init__(self, patch_size: int, num_codes: int, dim: int, depth: int) -> None:
        super().__init__()
        self.codebook = nn.Linear(num_codes, dim, bias=False)
        nn.init.normal_(self.codebook.weight)  # so that a mixture of codes is no smaller than one code
        layers: list[nn.Module] = [Residual(dim) for _ in range(depth)]
        for _ in range(round(math.log2(patch_size))):
            layers += [nn.ReLU(), nn.ConvTranspose2d(dim, dim, 4, stride=2, padding=1)]
        self.layers = nn.Sequential(*layers, nn.ReLU(), nn.Conv2d(dim, 3, 1))

    def forward(
        self, mixtures: Float[Tensor, "batch patches codes"], rows: int
    ) -> Float[Tensor, "batch 3 height width"]:
        return self.layers(rearrange(self.codebook(mixtures), "b (h w) d -> b d h w", h=rows))
