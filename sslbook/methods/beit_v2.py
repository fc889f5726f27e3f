"""BEiT v2: BEiT with words that mean something, and a class token that is made to sum up the image.

The hidden patches are classified into the codes of a tokenizer trained by VQ-KD, which say what a teacher sees instead
of which colors there are. The same is asked a second time of a small head that gets the class token of the last layer
but patch tokens of an early one: what these do not know yet, the class token has to tell.

Peng, Dong, Bao, Ye and Wei, 2022, "BEiT v2: masked image modeling with vector-quantized visual tokenizers"
(arXiv:2208.06366), sections 3.2 and 3.3, equations 2 and 3. As in the authors' code the two predictions share one linear
map, and masks are BEiT's blocks filled up to exactly 75 of 196. The tokenizer is one that we train
(`python -m sslbook.train vqkd`). Masks are keyed by image and epoch. The blocks' linear layers start by Xavier, the
authors' from a truncated normal of 0.02, and smaller in later blocks where a branch ends.
"""

from dataclasses import replace

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from sslbook.data.loader import Batch
from sslbook.data.masks import block_mask
from sslbook.data.views import BEIT, View
from sslbook.errors import UserError
from sslbook.methods.base import Method
from sslbook.nn.tokenizers import Tokenizer, VQTokenizer, load_tokenizer
from sslbook.nn.vit import Block, VisionTransformer, init_transformer, patch_grid
from sslbook.schedules import Clock

VIEW = replace(BEIT, crop=(0.2, 1.0))


class Aggregation(nn.Module):
    """Blocks over the last layer's class token and an early layer's patch tokens (section 3.3).

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
        x = torch.cat([last[:, :1], early[:, 1:]], dim=1)
        for block in self.blocks:
            x = block(x, bias)
        return x


class BEiTv2(Method):
    """BEiT with a vector-quantized tokenizer and patch aggregation (arXiv:2208.06366).

    Args:
        backbone: the vision transformer to train.
        tokenizer: a run of `vqkd` or its exported tokenizer, whose codes are predicted.
        view: what an image becomes.
        num_masked: how many patches to hide in every image.
        min_block: the smallest area of a block of hidden patches, in patches.
        early_layer: after which block the patch tokens for the aggregation are taken, counted from 1.
        aggregation_depth: blocks of the aggregation; 0 leaves it out.
    """

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
        if not isinstance(backbone, VisionTransformer):
            raise UserError(
                f"BEiT v2 hides patches from a vision transformer and cannot use a {type(backbone).__name__}: "
                "choose sslbook.nn.VisionTransformer or sslbook.nn.vit_tiny, vit_small, vit_base, vit_large, vit_huge"
            )
        depth = len(backbone.blocks)
        if aggregation_depth and not 1 <= early_layer < depth:
            raise UserError(
                f"early_layer {early_layer} does not lie before the last of {depth} blocks: use {max(1, depth * 3 // 4)}, "
                "or leave the aggregation out with aggregation_depth 0"
            )
        self.view, self.num_masked, self.min_block, self.early_layer = view, num_masked, min_block, early_layer
        self.grid = patch_grid(view.size, view.size, backbone.patch_size)
        block_mask(torch.arange(1, device="cpu"), self.grid, num_masked, Clock(), min_block)  # refuses the impossible
        encoder, normalization = _open(tokenizer)
        if encoder.grid != self.grid:
            raise UserError(
                f"the tokenizer has codes for {encoder.grid[0]}x{encoder.grid[1]} patches and the backbone sees "
                f"{self.grid[0]}x{self.grid[1]}: use patch_size {view.size // encoder.grid[0]}, or another tokenizer"
            )
        self.backbone = backbone
        self.tokenizer = Tokenizer(encoder, view, self.grid[0], normalization)
        self.mask_token = nn.Parameter(nn.init.trunc_normal_(torch.empty(backbone.dim), std=0.02))
        self.aggregation = Aggregation(backbone, aggregation_depth, early_layer) if aggregation_depth else None
        self.head = nn.Linear(backbone.dim, self.tokenizer.num_codes)
        nn.init.trunc_normal_(self.head.weight, std=0.02)
        nn.init.zeros_(self.head.bias)

    def views(self) -> tuple[View, ...]:
        return (self.view,)

    def predict(
        self, images: Float[Tensor, "batch 3 height width"], hidden: Bool[Tensor, "batch patches"]
    ) -> list[Float[Tensor, "hidden codes"]]:
        """Scores of the codes of the hidden patches: by the last layer, and by the aggregation if there is one."""
        layers = list(self.backbone.layers(self.backbone.embed(images, hidden, self.mask_token)))
        outputs = layers[-1:]
        if self.aggregation is not None:
            bias = self.backbone.rel_pos_bias() if self.backbone.rel_pos_bias is not None else None
            outputs.append(self.aggregation(layers[self.early_layer - 1], layers[-1], bias))
        return [self.head(self.backbone.norm(x)[:, 1:][hidden]) for x in outputs]

    def forward(self, batch: Batch, clock: Clock) -> dict[str, Tensor]:
        (images,) = batch.views
        hidden = block_mask(batch.index, self.grid, self.num_masked, clock, self.min_block, exact=True)
        codes = self.tokenizer(images)[hidden]
        scores = self.predict(images, hidden)
        losses = [F.cross_entropy(s.float(), codes) for s in scores]
        right = (scores[0].argmax(dim=1) == codes).float().mean()
        return {"loss": torch.stack(losses).sum(), "last_layer": losses[0].detach(), "token_accuracy": 100 * right}


def _open(tokenizer: nn.Module | str | None) -> tuple[VQTokenizer, tuple | None]:
    """The trained tokenizer, and the normalization that it wants if that is known."""
    if tokenizer is None:
        raise UserError("there is no tokenizer: set --method.tokenizer to a run folder of python -m sslbook.train vqkd")
    normalization = None
    if isinstance(tokenizer, str):
        tokenizer, normalization, _ = load_tokenizer(tokenizer, VQTokenizer, "vqkd")
    if not isinstance(tokenizer, VQTokenizer):
        raise UserError(f"a {type(tokenizer).__name__} has no codebook: give a sslbook.nn.VQTokenizer as tokenizer")
    return tokenizer, normalization
