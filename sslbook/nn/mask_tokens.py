"""Maps of images of which parts are replaced by a mask token: a vision transformer, or timm's Swin.

In both the token stands in place of the embedded patch before the first block, so that every layer sees it.
"""

from einops import rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from sslbook.errors import UserError
from sslbook.nn.backbones import backbone_dim
from sslbook.nn.vit import VisionTransformer, patch_grid


def gather_tokens(
    tokens: Float[Tensor, "batch tokens dim"], index: Int[Tensor, "batch some"]
) -> Float[Tensor, "batch some dim"]:
    """The tokens at the given positions, image by image."""
    return tokens.gather(1, index[:, :, None].expand(-1, -1, tokens.shape[2]))


def is_swin(backbone: nn.Module) -> bool:
    """Whether this is one of timm's Swin transformers; asked by name, since timm need not be there."""
    return type(backbone).__name__ in ("SwinTransformer", "SwinTransformerV2")


def require_maskable(backbone: nn.Module, method: str) -> None:
    """A `UserError` that names the networks that will do, if this is none of them."""
    if not isinstance(backbone, VisionTransformer) and not is_swin(backbone):
        raise UserError(
            f"{method} replaces patches of a vision transformer and cannot use a {type(backbone).__name__}: choose "
            "sslbook.nn.VisionTransformer, sslbook.nn.vit_base and the like, or timm/swin_base_patch4_window7_224"
        )


def patch_side(backbone: nn.Module) -> int:
    """Side in pixels of a patch that the mask token can replace."""
    if isinstance(backbone, VisionTransformer):
        return backbone.patch_size
    return int(backbone.patch_embed.patch_size[0])  # pyrefly: ignore


def cell_side(backbone: nn.Module) -> int:
    """Side in pixels of what one cell of the last map stands for."""
    if isinstance(backbone, VisionTransformer):
        return backbone.patch_size
    return patch_side(backbone) * 2 ** (int(backbone.num_layers) - 1)  # pyrefly: ignore


def token_dim(backbone: nn.Module) -> int:
    """Width of the mask token."""
    return backbone_dim(backbone) if isinstance(backbone, VisionTransformer) else int(backbone.embed_dim)  # pyrefly: ignore


def masked_map(
    backbone: nn.Module,
    images: Float[Tensor, "batch 3 height width"],
    mask: Bool[Tensor, "batch patches"],
    mask_token: Float[Tensor, "dim"],
) -> Float[Tensor, "batch channels rows columns"]:
    """The backbone's last map, normalized, with `mask_token` in place of the patches where `mask` is true."""
    if isinstance(backbone, VisionTransformer):
        rows, _ = patch_grid(images.shape[2], images.shape[3], backbone.patch_size)
        tokens = backbone.encode(backbone.embed(images, mask, mask_token))[:, 1:]
        return rearrange(tokens, "b (h w) c -> b c h w", h=rows)
    net: nn.Module = backbone
    tokens = net.patch_embed(images)  # pyrefly: ignore[not-callable]
    hidden = rearrange(mask, "b (h w) -> b h w 1", h=tokens.shape[1])
    tokens = tokens.where(~hidden, mask_token.to(tokens.dtype))
    return rearrange(net.norm(net.layers(tokens)), "b h w c -> b c h w")  # pyrefly: ignore[not-callable]
