"""Classifiers on a backbone: what they read from it, and many of them at once on one forward pass.

What is read is a list of parts, each a tensor `(batch, dim)` or `(batch, tokens, dim)`: the feature, the tokens of the
last blocks, the map of every stage. A head is a linear layer or an attentive probe on one part.
"""

import copy
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from sslbook.errors import UserError
from sslbook.nn.modes import in_mode
from sslbook.nn.vit import Block, FeedForward, require_heads

Parts = list[Tensor]
Reading = Callable[[nn.Module, Tensor], Parts]
Pool = Literal["backbone", "cls", "mean", "cls+mean"]
STAGE_SIZE = 9216  # numbers of a stage's pooled map at most, as in OpenSelfSup (and Goyal et al., 2019)


# -- what is read ------------------------------------------------------------------------------------------------------


def feature(backbone: nn.Module, x: Tensor) -> Parts:
    """The feature that the backbone itself gives."""
    return [backbone(x)]


def tokens(backbone: Any, x: Tensor) -> Parts:
    """The last layer's tokens."""
    return [backbone.forward_tokens(x)]


def blocks(backbone: Any, x: Tensor, count: int = 1, pool: Pool = "cls", norm: bool = True) -> Parts:
    """One vector of the last `count` blocks, side by side: class tokens, and the mean of the last one's patches.

    DINO (Caron et al., 2021, appendix F.1): four class tokens for ViT-S; one and the mean of the patches for ViT-B.

    Args:
        backbone: a transformer with `blocks`.
        x: images.
        count: how many blocks.
        pool: `cls`, the `mean` of the patch tokens, or both.
        norm: apply the backbone's last norm to each block's output.
    """
    with _outputs(backbone.blocks[-count:]) as outputs:
        backbone.forward_tokens(x)
    last = [backbone.norm(t) if norm else t for t in outputs]
    means = last if pool == "mean" else last[-1:]
    prefix = backbone.num_prefix_tokens
    cls = [t[:, 0] for t in last] if "cls" in pool else []
    mean = [t[:, prefix:].mean(1) for t in means] if "mean" in pool else []
    return [torch.cat([*cls, *mean], dim=1)]


def stages(backbone: Any, x: Tensor) -> Parts:
    """Every stage: the maps of stem and stages pooled to about 9,000 numbers, or the blocks' mean patch token.

    The sides 12, 6, 4, 3, 2 of a ResNet-50's stem and stages are those of OpenSelfSup's pooling.
    """
    if hasattr(backbone, "blocks") and hasattr(backbone, "forward_tokens"):
        with _outputs(backbone.blocks) as outputs:
            backbone.forward_tokens(x)
        return [t[:, backbone.num_prefix_tokens :].mean(1) for t in outputs]
    maps: list[Tensor] = []
    hook = None
    if isinstance(pool := getattr(backbone, "maxpool", None), nn.Module):  # after the stem of a ResNet
        hook = pool.register_forward_pre_hook(lambda _, inputs: maps.append(inputs[0]))
    try:
        maps += backbone.forward_stages(x)
    finally:
        if hook is not None:
            hook.remove()
    sides = [min(math.isqrt(max(1, STAGE_SIZE // m.shape[1])), *m.shape[2:]) for m in maps]
    return [F.adaptive_avg_pool2d(m, side).flatten(1) for m, side in zip(maps, sides)]


@contextmanager
def _outputs(modules: Any) -> Iterator[list[Tensor]]:
    """Collects what modules return during a forward pass."""
    found: list[Tensor] = []
    hooks = [module.register_forward_hook(lambda _, __, output: found.append(output)) for module in modules]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()


def reading_of(pool: Pool, num_blocks: int) -> Reading:
    """The reading for these options; UserError for several blocks of a whole backbone."""
    if pool == "backbone":
        if num_blocks != 1:
            raise UserError(f"num_blocks {num_blocks} needs pool cls, mean or cls+mean, of a vision transformer")
        return feature
    return lambda backbone, x: blocks(backbone, x, num_blocks, pool)


def lacks_blocks(backbone: Any, num_blocks: int = 1) -> str | None:
    """What a backbone lacks for `blocks`; ends a sentence that names the protocol."""
    if not all(hasattr(backbone, name) for name in ("blocks", "forward_tokens", "norm")):
        return f"a vision transformer for this pool, which {type(backbone).__name__} is not: leave pool at backbone"
    if num_blocks > len(backbone.blocks):
        return f"{num_blocks} blocks, and the backbone has {len(backbone.blocks)}: lower num_blocks"
    return None


def shapes(
    reading: Reading, backbone: nn.Module, images: Float[Tensor, "batch channels height width"]
) -> list[torch.Size]:
    """The shape of each part of an image."""
    with torch.no_grad(), in_mode(backbone, False):
        return [part.shape[1:] for part in reading(backbone, images)]


# -- heads -------------------------------------------------------------------------------------------------------------


def linear(dim: int, num_classes: int, std: float = 0.01) -> nn.Linear:
    """A linear layer with small normal weights and no bias at the start, as MoCo, MAE and DINO begin."""
    layer = nn.Linear(dim, num_classes)
    nn.init.trunc_normal_(layer.weight, std=std)
    nn.init.zeros_(layer.bias)
    return layer


class CrossAttention(nn.Module):
    """A learned query attends to the tokens, then an MLP: V-JEPA's attentive pooling (arXiv:2404.08471, section 5).

    Args:
        dim: width of a token.
        num_heads: attention heads.
    """

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        require_heads(dim, num_heads)
        self.num_heads = num_heads
        self.query = nn.Parameter(nn.init.trunc_normal_(torch.zeros(1, 1, dim), std=0.02))
        self.norm1, self.norm2 = nn.LayerNorm(dim, eps=1e-6), nn.LayerNorm(dim, eps=1e-6)
        self.q, self.kv, self.proj = nn.Linear(dim, dim), nn.Linear(dim, 2 * dim), nn.Linear(dim, dim)
        self.mlp = FeedForward(dim, 4 * dim)

    def forward(self, x: Float[Tensor, "batch tokens dim"]) -> Float[Tensor, "batch dim"]:
        query = self.query.expand(len(x), -1, -1)
        q = rearrange(self.q(query), "b n (h d) -> b h n d", h=self.num_heads)
        k, v = rearrange(self.kv(self.norm1(x)), "b n (two h d) -> two b h n d", two=2, h=self.num_heads)
        pooled = rearrange(F.scaled_dot_product_attention(q, k, v), "b h n d -> b n (h d)")
        y = query + self.proj(pooled)
        return (y + self.mlp(self.norm2(y)))[:, 0]


class QueryPooling(nn.Module):
    """A learned query attends to the tokens' keys and values, and nothing else: CAPI's probe (arXiv:2502.08769).

    Args:
        dim: width of a token.
        num_heads: attention heads.
    """

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        require_heads(dim, num_heads)
        self.num_heads = num_heads
        self.query = nn.Parameter(nn.init.trunc_normal_(torch.zeros(dim), std=0.02))
        self.kv = nn.Linear(dim, 2 * dim)

    def forward(self, x: Float[Tensor, "batch tokens dim"]) -> Float[Tensor, "batch dim"]:
        q = rearrange(self.query, "(h d) -> h 1 d", h=self.num_heads).expand(len(x), -1, -1, -1)
        k, v = rearrange(self.kv(x), "b n (two h d) -> two b h n d", two=2, h=self.num_heads)
        return rearrange(F.scaled_dot_product_attention(q, k, v), "b h 1 d -> b (h d)")


class Attentive(nn.Module):
    """An attentive probe: blocks of self-attention (V-JEPA 2 has three), a learned query, a linear layer.

    Args:
        dim: width of a token.
        num_classes: width of the output.
        num_heads: attention heads.
        num_blocks: blocks in all, of which the last is the cross-attention; 0 for CAPI's pooling alone.
    """

    def __init__(self, dim: int, num_classes: int, num_heads: int = 16, num_blocks: int = 1) -> None:
        super().__init__()
        self.blocks = nn.Sequential(*(Block(dim, num_heads) for _ in range(num_blocks - 1)))
        self.pool = CrossAttention(dim, num_heads) if num_blocks else QueryPooling(dim, num_heads)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)
        self.linear = linear(dim, num_classes, std=0.02)

    def forward(self, x: Float[Tensor, "batch tokens dim"]) -> Float[Tensor, "batch classes"]:
        return self.linear(self.pool(self.blocks(x)))


class Heads(nn.Module):
    """Heads side by side. Those on one part begin with the same weights, so that only their settings differ.

    Args:
        each: one head for every part.
        parts: which part each of the heads is for.
        batch_norm: of every part, batch norm without learned scale and shift comes first (MAE, appendix A.1).
        dims: widths of the parts.
    """

    def __init__(self, each: list[nn.Module], parts: list[int], batch_norm: bool, dims: list[int]) -> None:
        super().__init__()
        self.parts = parts
        self.normalize = nn.ModuleList(
            [nn.BatchNorm1d(dim, affine=False, eps=1e-6) if batch_norm else nn.Identity() for dim in dims]
        )
        self.each = nn.ModuleList([copy.deepcopy(each[part]) for part in parts])

    def forward(self, parts: Parts) -> Float[Tensor, "heads batch classes"]:
        """What every head says; linear heads on one part are one matrix product."""
        parts = [norm(part) for norm, part in zip(self.normalize, parts, strict=True)]
        outputs: list[Tensor | None] = [None] * len(self.parts)
        for part, x in enumerate(parts):
            own = [i for i, p in enumerate(self.parts) if p == part]
            heads = [self.each[i] for i in own]
            if all(isinstance(head, nn.Linear) for head in heads):
                weight, bias = (torch.cat([getattr(head, name) for head in heads]) for name in ("weight", "bias"))
                given = F.linear(x, weight, bias).unflatten(1, (len(own), -1)).unbind(1)
            else:
                given = [head(x) for head in heads]
            for i, output in zip(own, given):
                outputs[i] = output
        return torch.stack([output for output in outputs if output is not None])
