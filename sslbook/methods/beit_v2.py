"""BEiT v2: predict semantic visual tokens of masked patches, and train the class token to summarize the image.

The masked patches are classified into the codes of a tokenizer trained by VQ-KD, which reconstructs a teacher's
features instead of pixels. A small head makes the same prediction from the class token of the last layer and the patch
tokens of an early one. What the early patch tokens do not contain yet, the class token has to provide.

Peng, Dong, Bao, Ye and Wei, 2022, "BEiT v2: masked image modeling with vector-quantized visual tokenizers"
(arXiv:2208.06366), sections 3.2 and 3.3, equations 2 and 3. As in the authors' code the two predictions share one
linear layer, and masks are BEiT's blocks filled up to exactly 75 of 196.

What differs from the authors' code (microsoft/unilm, 80d673a):
- The tokenizer is one of ours (`python -m sslbook.train vqkd`).
- The blocks' linear layers start from Xavier's distribution; theirs from a truncated normal of 0.02, divided by sqrt(2
  layer) where a branch ends.
- Keys have a bias, which changes no attention weight; theirs have none.
- Masks are counter-based random numbers of seed, epoch and image; theirs come from running generators.
"""

from dataclasses import replace

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from sslbook.data.loader import Batch
from sslbook.data.masks import block_mask, require_mask
from sslbook.data.views import BEIT, View
from sslbook.errors import UserError
from sslbook.methods.base import Method
from sslbook.nn.tokenizers import VQTokenizer
from sslbook.nn.vit import Block, VisionTransformer, init_transformer, patch_grid, require_transformer
from sslbook.schedules import Clock
from sslbook.weights.tokenizers import open_tokenizer

VIEW = replace(BEIT, crop=(0.2, 1.0))


class Aggregation(nn.Module):
    """Patch aggregation (section 3.3): blocks over the last layer's class token and an early layer's patch tokens.

    As in the authors' code they have the backbone's layer scale, and its drop path as if they followed the early layer.
    """

    def __init__(self, backbone: VisionTransformer, depth: int, early_layer: int) -> None:
        super().__init__()
        num_heads, scale = backbone.blocks[0].attn.num_heads, backbone.init_args["layer_scale"]  # pyrefly: ignore
        step = backbone.init_args["drop_path"] / (max(len(backbone.blocks), early_layer + depth) - 1)
        rates = [step * (early_layer + i) for i in range(depth)]
        self.blocks = nn.ModuleList([Block(backbone.dim, num_heads, 4.0, rate, scale) for rate in rates])
        init_transformer(self)

    def forward(
        self,
        early: Float[Tensor, "batch tokens dim"],
        last: Float[Tensor, "batch tokens dim"],
        bias: Float[Tensor, "heads tokens tokens"] | None,
    ) -> Float[Tensor, "batch tokens dim"]:
        # The bottleneck: of the last layer only the class token passes.
        x = torch.cat([last[:, :1], early[:, 1:]], dim=1)
        for block in self.blocks:
            x = block(x, bias)
        return x


class BEiTv2(Method):
    """BEiT with a vector-quantized tokenizer and patch aggregation (arXiv:2208.06366).

    Args:
        backbone: the vision transformer to train.
        tokenizer: the trained tokenizer whose codes are predicted: a run folder of `vqkd`, its exported tokenizer, or a
            sslbook.nn.VQTokenizer.
        view: augmentation of an image.
        num_masked: number of patches to mask in every image.
        min_block: the smallest area of a block of masked patches, in patches.
        early_layer: the block, counted from 1, whose patch tokens the aggregation gets.
        aggregation_depth: blocks of the aggregation; 0 leaves it out.

    Raises:
        UserError: the backbone is no vision transformer, there is no tokenizer or it has other patches, no patch or all
            would be masked, or the early layer is not before the last.
    """

    rgb_only = True

    backbone: VisionTransformer  # pyrefly: ignore[bad-override-mutable-attribute]

    def __init__(
        self,
        backbone: nn.Module,
        tokenizer: nn.Module | str | None = None,
        view: View = VIEW,
        num_masked: int = 75,
        min_block: int = 16,
        early_layer: int = 9,
        aggregation_depth: int = 2,
    ) -> None:
        super().__init__()
        self.backbone = require_transformer(backbone, "BEiT v2")
        depth = len(self.backbone.blocks)
        if aggregation_depth and not 1 <= early_layer < depth:
            raise UserError(
                f"early_layer {early_layer} is not before the last of {depth} blocks: use {max(1, depth * 3 // 4)}, "
                "or leave the aggregation out with aggregation_depth 0"
            )
        self.view, self.min_block, self.early_layer = view, min_block, early_layer
        self.grid = patch_grid(view.size, view.size, self.backbone.patch_size)
        self.num_masked = require_mask(num_masked, self.grid[0] * self.grid[1])
        self.tokenizer = open_tokenizer(tokenizer, VQTokenizer, "vqkd", view, self.grid[0])
        rows = self.tokenizer.encoder.grid[0]  # pyrefly: ignore
        if rows != self.grid[0]:
            raise UserError(
                f"the tokenizer has {rows}x{rows} codes and the backbone {self.grid[0]}x{self.grid[1]} patches: "
                f"use patch_size {view.size // rows}, or another tokenizer"
            )
        self.mask_token = nn.Parameter(nn.init.trunc_normal_(torch.empty(1, 1, self.backbone.dim), std=0.02))
        self.aggregation = Aggregation(self.backbone, aggregation_depth, early_layer) if aggregation_depth else None
        self.head = nn.Linear(self.backbone.dim, self.tokenizer.num_codes)
        nn.init.trunc_normal_(self.head.weight, std=0.02)
        nn.init.zeros_(self.head.bias)

    def views(self) -> tuple[View, ...]:
        return (self.view,)

    def predict(
        self, images: Float[Tensor, "batch 3 height width"], mask: Bool[Tensor, "batch patches"]
    ) -> list[Float[Tensor, "masked codes"]]:
        """Logits of the codes of the masked patches: from the last layer, and from the aggregation if there is one."""
        # The outputs of all blocks, each (n, 1 + patches, dim).
        layers = list(self.backbone.layers(self.backbone.embed(images, mask, self.mask_token)))
        outputs = layers[-1:]
        if self.aggregation is not None:
            bias = self.backbone.rel_pos_bias() if self.backbone.rel_pos_bias is not None else None
            outputs.append(self.aggregation(layers[self.early_layer - 1], layers[-1], bias))
        return [self.head(self.backbone.norm(x)[:, 1:][mask]) for x in outputs]  # norm and head are shared

    def forward(self, batch: Batch, clock: Clock) -> dict[str, Tensor]:
        (images,) = batch.views
        mask = block_mask(batch.index, self.grid, self.num_masked, clock, self.min_block, exact=True)
        codes = self.tokenizer(images)[mask]  # of the whole image: (n * num_masked,)
        logits = self.predict(images, mask)  # one or two times (n * num_masked, codes)
        # Equation 2 for the last layer, plus the same for the aggregation: equation 3.
        losses = [F.cross_entropy(x.float(), codes) for x in logits]
        accuracy = 100 * (logits[0].argmax(dim=1) == codes).float().mean()
        return {"loss": torch.stack(losses).sum(), "last_layer": losses[0].detach(), "token_accuracy": accuracy}
