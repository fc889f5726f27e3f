"""The vision transformer. Its tokens can be dropped or replaced between the patch embedding and the blocks.

Dosovitskiy et al., 2021, "An image is worth 16x16 words" (arXiv:2010.11929). Parameter names are timm's, so weights go
in and out unchanged. Positions and initialization are those of MAE's code (He et al., 2022, arXiv:2111.06377): a fixed
two-dimensional sine-cosine table whose first half of channels encodes the column and second half the row, Xavier
initialization, LayerNorm with epsilon 1e-6.

BEiT, BEiT v2, data2vec and SimMIM's transformer have no bias of the keys. Ours has one, which changes nothing: it adds
the same number to all attention scores of a query. Their weights fit ours with key biases of zero.
"""

import math
from collections.abc import Callable, Iterator
from typing import Literal

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Bool, Float
from torch import Tensor, nn

from sslbook.errors import UserError
from sslbook.types import PositiveInt


def sincos_positions(dim: int, height: int, width: int) -> Float[Tensor, "tokens dim"]:
    """MAE's table for a grid of patches, row by row: sine and cosine of the column, then of the row.

    Raises:
        UserError: `dim` is not a multiple of 4.
    """
    if dim % 4:
        raise UserError(
            f"sine-cosine positions need a dimension that is a multiple of 4, not {dim}: use {dim // 4 * 4}"
        )
    frequency = 10000.0 ** -(torch.arange(dim // 4, dtype=torch.float64) / (dim // 4))
    row, column = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    angles = [p.reshape(-1, 1) * frequency for p in (column, row)]
    return torch.cat([f(angle) for angle in angles for f in (torch.sin, torch.cos)], dim=1).float()


def resample_positions(
    table: Float[Tensor, "tokens dim"], grid: tuple[int, int], to: tuple[int, int], offset: float = 0.0
) -> Float[Tensor, "new_tokens dim"]:
    """A table of positions of one grid, interpolated (bicubic) for another.

    With an `offset` it is resampled by the scale factor (side + offset) / old side, as DINO and DINOv2 do with 0.1.
    """
    if grid == to:
        return table
    planes = rearrange(table, "(h w) dim -> 1 dim h w", h=grid[0]).float()
    if offset:
        scale = ((to[0] + offset) / grid[0], (to[1] + offset) / grid[1])
        planes = F.interpolate(planes, scale_factor=scale, mode="bicubic")
    else:
        planes = F.interpolate(planes, size=to, mode="bicubic")
    return rearrange(planes, "1 dim h w -> (h w) dim").to(table.dtype)


def square_grid(count: int) -> tuple[int, int] | None:
    """The square grid of `count` patches, if there is one."""
    side = math.isqrt(max(0, count))
    return (side, side) if side and side**2 == count else None


def patch_grid(height: int, width: int, patch_size: int) -> tuple[int, int]:
    """Rows and columns of patches in an image.

    Raises:
        UserError: the image does not divide into patches; names the nearest size that does.
    """
    if height % patch_size or width % patch_size:
        near = [max(1, round(side / patch_size)) * patch_size for side in (height, width)]
        raise UserError(
            f"images of {height}x{width} pixels cannot be cut into patches of {patch_size}x{patch_size}: "
            f"the nearest size that works is {near[0]}x{near[1]}"
        )
    return height // patch_size, width // patch_size


def require_heads(dim: int, num_heads: int) -> None:
    """Check that the dimension divides into the attention heads.

    Raises:
        UserError: it does not.
    """
    if num_heads < 1 or dim % num_heads:
        raise UserError(
            f"a transformer of dimension {dim} cannot be split over {num_heads} heads: use a divisor of {dim}"
        )


def require_transformer(backbone: nn.Module, method: str, drops_patches: bool = False) -> "VisionTransformer":
    """The backbone itself, for methods that work between its embedding and its blocks.

    Args:
        backbone: the network.
        method: its name for the message.
        drops_patches: whether masked patches are left out of the sequence, for which relative positions are not made.

    Raises:
        UserError: it is no `VisionTransformer`, or its positions do not allow that patches are left out.
    """
    if not isinstance(backbone, VisionTransformer):
        raise UserError(
            f"{method} masks patches of a vision transformer and cannot use a {type(backbone).__name__}: "
            "choose sslbook.nn.VisionTransformer or sslbook.nn.vit_tiny, vit_small, vit_base, vit_large, vit_huge"
        )
    if drops_patches and backbone.rel_pos_bias is not None:
        raise UserError(
            f"{method} leaves patches out, for which relative positions are not made: use positions sincos or learned"
        )
    return backbone


class Attention(nn.Module):
    """Multi-head self-attention."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        require_heads(dim, num_heads)
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(
        self, x: Float[Tensor, "batch tokens dim"], bias: Float[Tensor, "*heads tokens tokens"] | None = None
    ) -> Float[Tensor, "batch tokens dim"]:
        q, k, v = rearrange(self.qkv(x), "b n (three h d) -> three b h n d", three=3, h=self.num_heads)
        x = F.scaled_dot_product_attention(q, k, v, None if bias is None else bias.to(q.dtype))
        return self.proj(rearrange(x, "b h n d -> b n (h d)"))

    def first_row(
        self, x: Float[Tensor, "batch tokens dim"], bias: Float[Tensor, "heads tokens tokens"] | None = None
    ) -> Float[Tensor, "batch tokens"]:
        """How much the first token attends to every token, averaged over heads."""
        q, k, _ = rearrange(self.qkv(x).float(), "b n (three h d) -> three b h n d", three=3, h=self.num_heads)
        scores = (q[:, :, :1] @ k.mT)[:, :, 0] / q.shape[-1] ** 0.5
        return (scores if bias is None else scores + bias[:, 0].float()).softmax(dim=-1).mean(dim=1)


class FeedForward(nn.Module):
    """The two-layer MLP applied to every token."""

    def __init__(self, dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden_dim)
        self.fc2 = nn.Linear(hidden_dim, dim)

    def forward(self, x: Float[Tensor, "batch tokens dim"]) -> Float[Tensor, "batch tokens dim"]:
        return self.fc2(F.gelu(self.fc1(x)))


class LayerScale(nn.Module):
    """A learned factor for every channel of a residual branch (Touvron et al., 2021, arXiv:2103.17239)."""

    def __init__(self, dim: int, start: float) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.full((dim,), start))

    def forward(self, x: Float[Tensor, "batch tokens dim"]) -> Float[Tensor, "batch tokens dim"]:
        return x * self.gamma


class RelativePositions(nn.Module):
    """A learned bias of attention for every offset between two patches and every head (BEiT, arXiv:2106.08254).

    The last three rows of the table stand for cls token to patch, patch to cls token, and cls token to itself, as in
    the authors' files.
    """

    index: Tensor

    def __init__(self, grid: tuple[int, int], num_heads: int) -> None:
        super().__init__()
        self.grid = grid
        height, width = grid
        offsets = (2 * height - 1) * (2 * width - 1)
        self.table = nn.Parameter(torch.zeros(offsets + 3, num_heads))
        row, column = (p.flatten() for p in torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij"))
        down, right = row[:, None] - row + height - 1, column[:, None] - column + width - 1
        index = torch.full((1 + len(row), 1 + len(row)), offsets)
        index[1:, 1:] = down * (2 * width - 1) + right
        index[0, 1:], index[1:, 0], index[0, 0] = offsets, offsets + 1, offsets + 2
        self.register_buffer("index", index, persistent=False)

    def forward(self) -> Float[Tensor, "heads tokens tokens"]:
        return rearrange(self.table[self.index], "n m heads -> heads n m")

    def resampled(self, name: str, value: Tensor) -> Tensor | None:
        """The weight `name` of another square grid, interpolated for this one; None if that is not possible."""
        grid = square_grid(len(value) - 3)
        if name != "table" or value.shape[1:] != self.table.shape[1:] or grid is None:
            return None
        to = (2 * self.grid[0] - 1, 2 * self.grid[1] - 1)
        return torch.cat([resample_positions(value[:-3], grid, to), value[-3:]])


class Block(nn.Module):
    """A pre-norm transformer block: attention and MLP, each behind a LayerNorm in a residual branch.

    Args:
        dim: width of a token.
        num_heads: attention heads.
        mlp_ratio: hidden width of the MLP in units of `dim`.
        drop_path: probability of dropping a branch for an image in training (stochastic depth, arXiv:1603.09382).
        layer_scale: initial value of the branches' learned factors; null for none.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        mlp_ratio: float = 4.0,
        drop_path: float = 0.0,
        layer_scale: float | None = None,
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = Attention(dim, num_heads)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = FeedForward(dim, round(dim * mlp_ratio))
        self.ls1 = LayerScale(dim, layer_scale) if layer_scale is not None else nn.Identity()
        self.ls2 = LayerScale(dim, layer_scale) if layer_scale is not None else nn.Identity()
        self.drop_path = drop_path

    def _drop(self, branch: Float[Tensor, "batch tokens dim"]) -> Float[Tensor, "batch tokens dim"]:
        if not self.training or self.drop_path == 0:
            return branch
        kept = branch.new_empty(len(branch), 1, 1).bernoulli_(1 - self.drop_path)
        return branch * kept / (1 - self.drop_path)  # so that the expectation is the branch itself

    def forward(
        self, x: Float[Tensor, "batch tokens dim"], bias: Float[Tensor, "*heads tokens tokens"] | None = None
    ) -> Float[Tensor, "batch tokens dim"]:
        x = x + self._drop(self.ls1(self.attn(self.norm1(x), bias)))
        return x + self._drop(self.ls2(self.mlp(self.norm2(x))))


class PatchEmbedding(nn.Module):
    """A linear layer of every patch: a convolution whose stride is its size."""

    def __init__(self, patch_size: int, dim: int, in_channels: int = 3) -> None:
        super().__init__()
        self.proj = nn.Conv2d(in_channels, dim, patch_size, stride=patch_size)

    def forward(self, x: Float[Tensor, "batch channels height width"]) -> Float[Tensor, "batch tokens dim"]:
        return rearrange(self.proj(x), "b dim h w -> b (h w) dim")


def init_transformer(module: nn.Module) -> None:
    """MAE's initialization: Xavier for linear layers (the patch embedding counts as one), biases at zero."""
    for part in module.modules():
        if isinstance(part, nn.Linear):
            nn.init.xavier_uniform_(part.weight)
            nn.init.zeros_(part.bias)
        elif isinstance(part, PatchEmbedding):
            nn.init.xavier_uniform_(part.proj.weight.view(len(part.proj.weight), -1))


class VisionTransformer(nn.Module):
    """A vision transformer without classifier: images to one feature each.

    Args:
        image_size: side of the images the table of positions is made for; others are interpolated.
        patch_size: side of a patch.
        dim: width of a token, and of the feature.
        depth: number of blocks.
        num_heads: number of attention heads.
        mlp_ratio: hidden width of the MLP in units of `dim`.
        positions: `sincos`: MAE's fixed table; `learned`: parameters; `relative`: none are added to the tokens, but
            attention has a learned bias for every offset between two patches, shared by all blocks (BEiT).
        pool: the feature after the last norm: the `cls` token, or the `mean` of the patch tokens.
        drop_path: probability of dropping a residual branch in the last block, rising linearly from 0 in the first.
        layer_scale: initial value of the learned factors of all branches, such as 0.1; null for none.
        drop_path_uniform: the same probability in every block, as DINOv2 has it.
        positions_offset: at other image sizes positions are resampled by the factor (side + offset) / old side; 0.1 in
            DINO and DINOv2, whose weights need it. 0 resamples to the new size.
        in_channels: channels of the images.
    """

    def __init__(
        self,
        image_size: PositiveInt = 224,
        patch_size: PositiveInt = 16,
        dim: PositiveInt = 768,
        depth: int = 12,
        num_heads: PositiveInt = 12,
        mlp_ratio: float = 4.0,
        positions: Literal["sincos", "learned", "relative"] = "sincos",
        pool: Literal["cls", "mean"] = "cls",
        drop_path: float = 0.0,
        layer_scale: float | None = None,
        drop_path_uniform: bool = False,
        positions_offset: float = 0.0,
        in_channels: PositiveInt = 3,
    ) -> None:
        init_args = {name: value for name, value in locals().items() if name not in ("self", "__class__")}
        super().__init__()
        self.init_args, self.in_channels = init_args, in_channels
        self.dim, self.patch_size, self.pool = dim, patch_size, pool
        self.positions_offset = positions_offset
        self.token_dim, self.stride, self.num_prefix_tokens = dim, patch_size, 1  # of the protocol TokenBackbone
        self.grid = patch_grid(image_size, image_size, patch_size)
        self.patch_embed = PatchEmbedding(patch_size, dim, in_channels)
        self.cls_token = nn.Parameter(0.02 * torch.randn(1, 1, dim))
        # The first row is the cls token's position.
        table = torch.zeros(1, 1 + self.grid[0] * self.grid[1], dim)
        self.rel_pos_bias = None
        if positions == "learned":
            self.pos_embed = nn.Parameter(nn.init.trunc_normal_(table, std=0.02))
        elif positions == "sincos":
            table[0, 1:] = sincos_positions(dim, *self.grid)
            self.register_buffer("pos_embed", table)
        else:
            self.register_buffer("pos_embed", table)  # zeros
            self.rel_pos_bias = RelativePositions(self.grid, num_heads)
        rates = [drop_path if drop_path_uniform else drop_path * i / max(1, depth - 1) for i in range(depth)]
        self.blocks = nn.ModuleList([Block(dim, num_heads, mlp_ratio, rate, layer_scale) for rate in rates])
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        init_transformer(self)

    def embed(
        self,
        x: Float[Tensor, "batch channels height width"],
        mask: Bool[Tensor, "batch tokens"] | None = None,
        mask_token: Float[Tensor, "... dim"] | None = None,
    ) -> Float[Tensor, "batch tokens dim"]:
        """Patch tokens with their positions, row by row, without the class token.

        Where `mask` is true, `mask_token` replaces the embedded patch, at the patch's position.

        Raises:
            UserError: the images do not divide into patches.
        """
        grid = patch_grid(x.shape[2], x.shape[3], self.patch_size)
        tokens = self.patch_embed(x)
        if mask is not None and mask_token is not None:
            tokens = torch.where(mask[:, :, None], mask_token.to(tokens.dtype), tokens)
        return tokens + resample_positions(self.pos_embed[0, 1:], self.grid, grid, self.positions_offset)

    def prepend_cls(self, tokens: Float[Tensor, "batch tokens dim"]) -> Float[Tensor, "batch 1+tokens dim"]:
        """The input of the first block: the class token, then any tokens."""
        cls = (self.cls_token + self.pos_embed[:, :1]).expand(len(tokens), -1, -1)
        return torch.cat([cls.to(tokens.dtype), tokens], dim=1)

    def layers(self, tokens: Float[Tensor, "batch tokens dim"]) -> Iterator[Float[Tensor, "batch 1+tokens dim"]]:
        """The output of every block, before the last norm, for any tokens; the class token is prepended.

        Raises:
            UserError: positions are relative and the tokens are not those of the whole grid.
        """
        bias = None
        if self.rel_pos_bias is not None:
            if tokens.shape[1] != self.grid[0] * self.grid[1]:
                raise UserError(
                    f"relative positions are for all {self.grid[0] * self.grid[1]} patches and {tokens.shape[1]} came: "
                    "give the backbone the images' image_size, or use positions sincos or learned"
                )
            bias = self.rel_pos_bias()
        x = self.prepend_cls(tokens)
        for block in self.blocks:
            x = block(x, bias)
            yield x

    def encode(self, tokens: Float[Tensor, "batch tokens dim"]) -> Float[Tensor, "batch 1+tokens dim"]:
        """The tokens after all blocks and the last norm; the class token is prepended."""
        for x in self.layers(tokens):  # noqa: B007 (the last is returned)
            pass
        return self.norm(x)

    def forward_tokens(
        self,
        x: Float[Tensor, "batch channels height width"],
        mask: Bool[Tensor, "batch patches"] | None = None,
        mask_token: Float[Tensor, "... dim"] | None = None,
    ) -> Float[Tensor, "batch tokens dim"]:
        """The class token and the patch tokens after the last norm; for the mask see `embed`."""
        return self.encode(self.embed(x, mask, mask_token))

    def forward_map(self, x: Float[Tensor, "batch channels height width"]) -> Float[Tensor, "batch dim rows columns"]:
        """The patch tokens after the last norm, as a feature map."""
        return rearrange(self.forward_tokens(x)[:, 1:], "b (h w) c -> b c h w", h=x.shape[2] // self.patch_size)

    def forward_attention(
        self, x: Float[Tensor, "batch channels height width"]
    ) -> tuple[Float[Tensor, "batch tokens dim"], Float[Tensor, "batch tokens"]]:
        """As `forward_tokens`, and how much the class token attends to each in the last block, the mean over heads."""
        tokens = self.embed(x)
        *_, before, last = [self.prepend_cls(tokens), *self.layers(tokens)]
        bias = self.rel_pos_bias() if self.rel_pos_bias is not None else None
        block = self.blocks[-1]
        return self.norm(last), block.attn.first_row(block.norm1(before), bias)  # pyrefly: ignore

    def resampled(self, name: str, value: Tensor) -> Tensor | None:
        """The weight `name` for another image size, interpolated for this one; None if that is not possible."""
        grid = square_grid(value.shape[1] - 1) if value.ndim == 3 else None
        if name != "pos_embed" or grid is None or value.shape[2] != self.dim:
            return None
        table = resample_positions(value[0, 1:], grid, self.grid, self.positions_offset)
        return torch.cat([value[:, :1], table[None]], dim=1)

    def forward(self, x: Float[Tensor, "batch channels height width"]) -> Float[Tensor, "batch dim"]:
        tokens = self.forward_tokens(x)
        return tokens[:, 0] if self.pool == "cls" else tokens[:, 1:].mean(dim=1)


def _named(
    name: str, size: str, dim: int, depth: int, num_heads: int, patch: int = 16, mlp_ratio: float = 4.0
) -> Callable[..., VisionTransformer]:
    """A function that makes a transformer of a known size; the command line reads its options from the signature."""

    def make(
        image_size: PositiveInt = 224,
        patch_size: PositiveInt = patch,
        positions: Literal["sincos", "learned", "relative"] = "sincos",
        pool: Literal["cls", "mean"] = "cls",
        drop_path: float = 0.0,
        layer_scale: float | None = None,
        drop_path_uniform: bool = False,
        positions_offset: float = 0.0,
        in_channels: PositiveInt = 3,
    ) -> VisionTransformer:
        shape = (image_size, patch_size, dim, depth, num_heads, mlp_ratio)
        options = (drop_path, layer_scale, drop_path_uniform, positions_offset, in_channels)
        return VisionTransformer(*shape, positions, pool, *options)

    make.__name__ = make.__qualname__ = name
    make.__doc__ = f"{size} parameters, {dim} features. For the arguments see `VisionTransformer`."
    return make


vit_tiny = _named("vit_tiny", "ViT-Ti: 5.5 million", 192, 12, 3)
vit_small = _named("vit_small", "ViT-S: 21.7 million", 384, 12, 6)
vit_base = _named("vit_base", "ViT-B: 85.8 million", 768, 12, 12)
vit_large = _named("vit_large", "ViT-L: 303 million", 1024, 24, 16)
vit_huge = _named("vit_huge", "ViT-H: 631 million", 1280, 32, 16, patch=14)
vit_giant = _named("vit_giant", "ViT-g (arXiv:2106.04560): 1,011 million", 1408, 40, 16, patch=14, mlp_ratio=48 / 11)
