"""CAE: a latent regressor behind the encoder predicts masked features, so the encoder only represents what it sees.

The encoder sees the visible patches only. A regressor of cross-attention blocks predicts from them the features of the
masked patches, and a decoder predicts a tokenizer's codes from these. An alignment loss keeps the predicted features in
the encoder's own feature space.

Chen, Ding, Wang, Xin, Mo, Wang, Han, Luo, Zeng and Wang, 2022, "Context autoencoder for self-supervised representation
learning" (arXiv:2202.03026), sections 3.1 and 3.2: four blocks each, alignment weight 2. As in the authors' code 98 of
196 patches are masked (75 in OpenMMLab's port), in BEiT's blocks, and the target of the alignment is the encoder itself
on the masked patches, without gradient.

What differs from the authors' code (Atten4Vis/CAE, a7fd162):
- The tokenizer is one of ours (`python -m sslbook.train dvae`) instead of DALL-E's.
- The regressor's blocks have no drop path.
- The patch embedding starts from Xavier's distribution and the head from a truncated normal; theirs the other way
  round.
- Masks are counter-based random numbers of seed, epoch and image; theirs come from running generators.
"""

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor, nn

from sslbook.data.loader import Batch
from sslbook.data.masks import block_mask, require_mask
from sslbook.data.views import RANDOM_CROP, View
from sslbook.methods.base import Method
from sslbook.nn.mask_tokens import gather_tokens
from sslbook.nn.tokenizers import DiscreteEncoder
from sslbook.nn.vit import (
    Block,
    FeedForward,
    LayerScale,
    VisionTransformer,
    init_transformer,
    patch_grid,
    require_heads,
    require_transformer,
    sincos_positions,
)
from sslbook.schedules import Clock
from sslbook.weights.tokenizers import open_tokenizer


class CrossBlock(nn.Module):
    """Cross-attention of queries to a context and to themselves, then an MLP.

    As in the authors' code queries and keys have positions and values have none, and the second norm is applied to the
    residual path itself, not only to the branch.
    """

    def __init__(self, dim: int, num_heads: int, layer_scale: float | None = None) -> None:
        super().__init__()
        require_heads(dim, num_heads)
        self.num_heads = num_heads
        self.norm_q, self.norm_k, self.norm_v, self.norm2 = (nn.LayerNorm(dim, eps=1e-6) for _ in range(4))
        self.q, self.k, self.v, self.proj = (nn.Linear(dim, dim) for _ in range(4))
        self.mlp = FeedForward(dim, 4 * dim)
        self.ls1 = LayerScale(dim, layer_scale) if layer_scale is not None else nn.Identity()
        self.ls2 = LayerScale(dim, layer_scale) if layer_scale is not None else nn.Identity()

    def forward(
        self,
        x: Float[Tensor, "batch masked dim"],
        positions: Float[Tensor, "batch masked dim"],
        context: Float[Tensor, "batch tokens dim"],
        context_positions: Float[Tensor, "batch tokens dim"],
    ) -> Float[Tensor, "batch masked dim"]:
        values = torch.cat([context, x], dim=1)  # (n, visible + masked, dim)
        keys = values + torch.cat([context_positions, positions], dim=1)
        qkv = self.q(self.norm_q(x + positions)), self.k(self.norm_k(keys)), self.v(self.norm_v(values))
        q, k, v = (rearrange(part, "b n (h d) -> b h n d", h=self.num_heads) for part in qkv)
        attended = rearrange(F.scaled_dot_product_attention(q, k, v), "b h n d -> b n (h d)")
        x = self.norm2(x + self.ls1(self.proj(attended)))
        return x + self.ls2(self.mlp(x))


class Regressor(nn.Module):
    """The latent contextual regressor (section 3.1): features of masked patches from those of the visible ones."""

    def __init__(self, dim: int, depth: int, num_heads: int, layer_scale: float | None = None) -> None:
        super().__init__()
        self.query = nn.Parameter(0.02 * torch.randn(1, 1, dim))
        self.blocks = nn.ModuleList([CrossBlock(dim, num_heads, layer_scale) for _ in range(depth)])
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        init_transformer(self)

    def forward(
        self,
        context: Float[Tensor, "batch tokens dim"],
        context_positions: Float[Tensor, "batch tokens dim"],
        positions: Float[Tensor, "batch masked dim"],
    ) -> Float[Tensor, "batch masked dim"]:
        x = self.query.to(context.dtype).expand(positions.shape)  # one learned mask query at every masked position
        for block in self.blocks:
            x = block(x, positions, context, context_positions)  # only the queries are updated
        return self.norm(x)


class CAE(Method):
    """Context autoencoder (arXiv:2202.03026).

    Args:
        backbone: the vision transformer to train, with positions `sincos` or `learned`.
        tokenizer: the trained tokenizer whose codes are predicted: a run folder of `dvae`, its exported encoder, or a
            sslbook.nn.DiscreteEncoder.
        view: augmentation of an image.
        num_masked: number of patches to mask in every image.
        min_block: the smallest area of a block of masked patches, in patches.
        alignment_weight: weight of the alignment loss.
        regressor_depth: blocks of the regressor.
        decoder_depth: blocks of the decoder.

    Raises:
        UserError: the backbone is no vision transformer or has relative positions, there is no tokenizer, or no patch
            or all would be masked.
    """

    rgb_only = True

    backbone: VisionTransformer  # pyrefly: ignore[bad-override-mutable-attribute]
    positions: Tensor

    def __init__(
        self,
        backbone: nn.Module,
        tokenizer: nn.Module | str | None = None,
        view: View = RANDOM_CROP,
        num_masked: int = 98,
        min_block: int = 16,
        alignment_weight: float = 2.0,
        regressor_depth: int = 4,
        decoder_depth: int = 4,
    ) -> None:
        super().__init__()
        self.backbone = require_transformer(backbone, "CAE", drops_patches=True)
        self.view, self.min_block, self.alignment_weight = view, min_block, alignment_weight
        self.grid = patch_grid(view.size, view.size, self.backbone.patch_size)
        self.num_masked = require_mask(num_masked, self.grid[0] * self.grid[1])
        self.tokenizer = open_tokenizer(tokenizer, DiscreteEncoder, "dvae", view, self.grid[0])
        dim, num_heads = self.backbone.dim, self.backbone.blocks[0].attn.num_heads  # pyrefly: ignore
        self.register_buffer("positions", sincos_positions(dim, *self.grid))
        # As in the authors' code: layer scale as in the backbone, drop path rising from 0 again.
        scale, drop_path = self.backbone.init_args["layer_scale"], self.backbone.init_args["drop_path"]
        self.regressor = Regressor(dim, regressor_depth, num_heads, scale)
        rates = [drop_path * i / max(1, decoder_depth - 1) for i in range(decoder_depth)]
        self.decoder = nn.ModuleList([Block(dim, num_heads, drop_path=rate, layer_scale=scale) for rate in rates])
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.head = nn.Linear(dim, self.tokenizer.num_codes)
        init_transformer(self.decoder)
        nn.init.trunc_normal_(self.head.weight, std=0.02)
        nn.init.zeros_(self.head.bias)

    def views(self) -> tuple[View, ...]:
        return (self.view,)

    def sample_masks(
        self, index: Int[Tensor, "batch"], clock: Clock
    ) -> tuple[Int[Tensor, "batch visible"], Int[Tensor, "batch masked"]]:
        """The visible and the masked patches of every image, row by row."""
        mask = block_mask(index, self.grid, self.num_masked, clock, self.min_block, exact=True)
        order = mask.long().argsort(dim=1, stable=True)
        return order[:, : -self.num_masked], order[:, -self.num_masked :]

    def predict(
        self,
        tokens: Float[Tensor, "batch patches dim"],
        visible: Int[Tensor, "batch visible"],
        masked: Int[Tensor, "batch masked"],
    ) -> tuple[Float[Tensor, "batch masked dim"], Float[Tensor, "batch masked codes"]]:
        """The predicted features of the masked patches, and the logits that the decoder makes of them."""
        # Encoder: z of the visible patches alone, without the class token, as in the authors' code.
        z_visible = self.backbone.encode(gather_tokens(tokens, visible))[:, 1:]
        # Regressor: the predicted features of the masked patches, from their positions and z of the visible ones.
        positions = self.positions[masked]  # (n, masked, dim)
        z_masked = self.regressor(z_visible, self.positions[visible], positions)
        # Decoder: sees the predicted features only, so that they must contain what the codes need.
        x = z_masked + positions
        for block in self.decoder:
            x = block(x)
        return z_masked, self.head(self.norm(x))

    def forward(self, batch: Batch, clock: Clock) -> dict[str, Tensor]:
        (images,) = batch.views
        visible, masked = self.sample_masks(batch.index, clock)
        tokens = self.backbone.embed(images)
        z_masked, logits = self.predict(tokens, visible, masked)
        with torch.no_grad():  # the alignment's target is a constant, or encoder and regressor could agree on zero
            target = self.backbone.encode(gather_tokens(tokens, masked))[:, 1:]
        codes = self.tokenizer(images).gather(1, masked)  # of the whole image: (n, masked)
        decoding_loss = F.cross_entropy(logits.flatten(0, 1).float(), codes.flatten())
        alignment_loss = (z_masked.float() - target.float()).square().mean()
        accuracy = 100 * (logits.argmax(dim=2) == codes).float().mean()
        return {
            "loss": decoding_loss + self.alignment_weight * alignment_loss,  # section 3.2
            "alignment_loss": alignment_loss.detach(),
            "token_accuracy": accuracy,
        }
