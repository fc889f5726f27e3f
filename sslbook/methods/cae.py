"""CAE: keep the encoder to its own business, features, and leave the filling in to others.

The encoder sees the visible patches only. A regressor, a stack of cross-attention, guesses from them the features that
the encoder would give to the hidden patches, and a decoder turns the guesses into the codes of a tokenizer. An alignment
term holds the guesses in the space of the encoder's own features, so that its features have to carry what is predicted.

Chen, Ding, Wang, Xin, Mo, Wang, Han, Luo, Zeng and Wang, 2022, "Context autoencoder for self-supervised representation
learning" (arXiv:2202.03026), sections 3.1 and 3.2: four blocks each, alignment weight 2. As in the authors' code 98 of
196 patches are hidden (75 in OpenMMLab's port), in BEiT's blocks, and the target of the alignment is the encoder itself
on the hidden patches, without gradient. What differs: the tokenizer is one that we train (`sslbook.train dvae`) instead
of DALL-E's; the regressor's blocks have no drop path; the patch embedding starts by Xavier
and the last map from a truncated normal, the other way round than there. Masks are keyed by image and epoch.
"""

from pathlib import Path

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor, nn

from sslbook.data.loader import Batch, Data
from sslbook.data.masks import block_mask
from sslbook.data.views import RANDOM_CROP, View
from sslbook.errors import UserError
from sslbook.methods.base import Method
from sslbook.nn.tokenizers import DiscreteEncoder, Tokenizer, load_tokenizer, small_encoder, train_discrete
from sslbook.nn.vit import (
    Block,
    FeedForward,
    LayerScale,
    VisionTransformer,
    init_transformer,
    patch_grid,
    require_heads,
    sincos_positions,
)
from sslbook.schedules import Clock


class CrossBlock(nn.Module):
    """Queries attend to a context and to themselves, then a feed-forward network.

    As in the authors' code what is attended with has positions and what is gathered has none, and the second norm lies
    on the path itself, not only on the branch.
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
        x: Float[Tensor, "batch hidden dim"],
        x_place: Float[Tensor, "batch hidden dim"],
        context: Float[Tensor, "batch tokens dim"],
        context_place: Float[Tensor, "batch tokens dim"],
    ) -> Float[Tensor, "batch hidden dim"]:
        everything = torch.cat([context, x], dim=1)
        place = torch.cat([context_place, x_place], dim=1)
        parts = (
            self.q(self.norm_q(x + x_place)),
            self.k(self.norm_k(everything + place)),
            self.v(self.norm_v(everything)),
        )
        q, k, v = (rearrange(part, "b n (h d) -> b h n d", h=self.num_heads) for part in parts)
        attended = rearrange(F.scaled_dot_product_attention(q, k, v), "b h n d -> b n (h d)")
        x = self.norm2(x + self.ls1(self.proj(attended)))
        return x + self.ls2(self.mlp(x))


class Regressor(nn.Module):
    """Guesses the features of hidden patches from those of the visible ones (section 3.1)."""

    def __init__(self, dim: int, depth: int, num_heads: int, layer_scale: float | None = None) -> None:
        super().__init__()
        self.query = nn.Parameter(0.02 * torch.randn(dim))
        self.blocks = nn.ModuleList([CrossBlock(dim, num_heads, layer_scale) for _ in range(depth)])
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        init_transformer(self)

    def forward(
        self,
        context: Float[Tensor, "batch tokens dim"],
        context_place: Float[Tensor, "batch tokens dim"],
        place: Float[Tensor, "batch hidden dim"],
    ) -> Float[Tensor, "batch hidden dim"]:
        x = self.query.to(context.dtype).expand(place.shape)
        for block in self.blocks:
            x = block(x, place, context, context_place)
        return self.norm(x)


class CAE(Method):
    """Context autoencoder (arXiv:2202.03026).

    Args:
        backbone: the vision transformer to train, with positions `sincos` or `learned`.
        view: what an image becomes.
        tokenizer: a run of `dvae` or its exported encoder, whose codes are predicted; without one, a small one is
            trained on the same images before training begins.
        num_masked: how many patches to hide in every image.
        min_block: the smallest area of a block of hidden patches, in patches.
        alignment: how much the distance of guesses from the encoder's own features counts.
        regressor_depth: blocks of the regressor.
        decoder_depth: blocks of the decoder.
        num_codes: vocabulary of the tokenizer trained here.
        tokenizer_steps: steps for which it is trained, with 64 images each.
    """

    backbone: VisionTransformer  # pyrefly: ignore[bad-override-mutable-attribute]
    positions: Tensor

    def __init__(
        self,
        backbone: nn.Module,
        view: View = RANDOM_CROP,
        tokenizer: Path | None = None,
        num_masked: int = 98,
        min_block: int = 16,
        alignment: float = 2.0,
        regressor_depth: int = 4,
        decoder_depth: int = 4,
        num_codes: int = 8192,
        tokenizer_steps: int = 2000,
    ) -> None:
        super().__init__()
        if not isinstance(backbone, VisionTransformer):
            raise UserError(
                f"CAE leaves patches out of a vision transformer and cannot use a {type(backbone).__name__}: "
                "choose sslbook.nn.VisionTransformer or sslbook.nn.vit_tiny, vit_small, vit_base, vit_large, vit_huge"
            )
        if backbone.rel_pos_bias is not None:
            raise UserError("CAE leaves patches out, for which relative positions are not made: use sincos or learned")
        self.view, self.num_masked, self.min_block, self.alignment = view, num_masked, min_block, alignment
        self.grid = patch_grid(view.size, view.size, backbone.patch_size)
        block_mask(torch.arange(1, device="cpu"), self.grid, num_masked, Clock(), min_block)  # refuses the impossible
        self.tokenizer_steps = 0 if tokenizer is not None else tokenizer_steps
        if tokenizer is not None:
            encoder, normalization, _ = load_tokenizer(tokenizer, DiscreteEncoder, "dvae")
        else:
            encoder, normalization = small_encoder(backbone.patch_size, num_codes), None
        dim, num_heads = backbone.dim, backbone.blocks[0].attn.num_heads  # pyrefly: ignore
        self.backbone = backbone
        self.tokenizer = Tokenizer(encoder, view, self.grid[0], normalization)
        self.register_buffer("positions", sincos_positions(dim, *self.grid))
        # As in the authors' code: layer scale as in the backbone, drop path rising from 0 again.
        scale, drop_path = backbone.init_args["layer_scale"], backbone.init_args["drop_path"]
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

    def on_weights_loaded(self, taken: list[str]) -> None:
        if any(name.startswith("tokenizer.") for name in taken):
            self.tokenizer_steps = 0  # it came with them

    def before_epoch(self, data: Data, clock: Clock) -> None:
        if self.tokenizer_steps and clock.step == 0:
            train_discrete(self.tokenizer, data, self.view, self.tokenizer_steps, "cae")

    def split(
        self, index: Int[Tensor, "batch"], clock: Clock
    ) -> tuple[Int[Tensor, "batch visible"], Int[Tensor, "batch hidden"]]:
        """Which patches of every image are visible and which hidden, in order."""
        mask = block_mask(index, self.grid, self.num_masked, clock, self.min_block, exact=True)
        order = mask.long().argsort(dim=1, stable=True)
        return order[:, : -self.num_masked], order[:, -self.num_masked :]

    def guess(
        self,
        tokens: Float[Tensor, "batch patches dim"],
        visible: Int[Tensor, "batch visible"],
        hidden: Int[Tensor, "batch hidden"],
    ) -> tuple[Float[Tensor, "batch hidden dim"], Float[Tensor, "batch hidden codes"]]:
        """The guessed features of the hidden patches, and the scores that the decoder makes of them."""
        encoded = self.backbone.encode(take(tokens, visible))[:, 1:]  # without the class token, as in the authors' code
        place = self.positions[hidden]
        guessed = self.regressor(encoded, self.positions[visible], place)
        x = guessed + place
        for block in self.decoder:
            x = block(x)
        return guessed, self.head(self.norm(x))

    def forward(self, batch: Batch, clock: Clock) -> dict[str, Tensor]:
        (images,) = batch.views
        visible, hidden = self.split(batch.index, clock)
        tokens = self.backbone.embed(images)
        guessed, scores = self.guess(tokens, visible, hidden)
        with torch.no_grad():
            features = self.backbone.encode(take(tokens, hidden))[:, 1:]
        codes = self.tokenizer(images).gather(1, hidden)
        said = F.cross_entropy(scores.flatten(0, 1).float(), codes.flatten())
        distance = (guessed.float() - features.float()).square().mean()
        right = (scores.argmax(dim=2) == codes).float().mean()
        return {
            "loss": said + self.alignment * distance,
            "distance": distance.detach(),
            "token_accuracy": 100 * right,
        }


def take(x: Float[Tensor, "batch patches dim"], index: Int[Tensor, "batch some"]) -> Float[Tensor, "batch some dim"]:
    """The patches at the given places, image by image."""
    return x.gather(1, index[:, :, None].expand(-1, -1, x.shape[2]))
