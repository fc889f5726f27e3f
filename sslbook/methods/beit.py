"""BEiT: predict the visual tokens of masked blocks of patches.

A tokenizer, trained before and then frozen, assigns to every patch of the whole image one of a fixed number of codes.
The network sees the image with blocks of patches replaced by a mask token, and classifies the code of each masked
patch. A choice among codes leaves no room for the blurred average that regression of pixels favors.

Bao, Dong, Piao and Wei, 2022, "BEiT: BERT pre-training of image transformers" (arXiv:2106.08254), sections 2.1 to 2.4
and equation 1; masks are algorithm 1 as the authors' code runs it, at most 75 of 196 patches.

What differs from the authors' code (microsoft/unilm, 806a6fd):
- The tokenizer is one of ours (`python -m sslbook.train dvae`) instead of DALL-E's.
- It sees the same crop, resized, where the authors resize the crop a second time from the file.
- The blocks' linear layers start from Xavier's distribution; theirs from a truncated normal of 0.02, divided by sqrt(2
  layer) where a branch ends, for the stability of large models (the paper's section 2.5).
- Keys have a bias, which changes no attention weight; theirs have none.
- Masks are counter-based random numbers of seed, epoch and image; theirs come from running generators.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from sslbook import distributed
from sslbook.data.loader import Batch
from sslbook.data.masks import block_mask, require_mask
from sslbook.data.views import BEIT, View
from sslbook.methods.base import Method
from sslbook.nn.tokenizers import DiscreteEncoder
from sslbook.nn.vit import VisionTransformer, patch_grid, require_transformer
from sslbook.schedules import Clock
from sslbook.weights.tokenizers import open_tokenizer


def token_loss(
    logits: Float[Tensor, "masked codes"], codes: Int[Tensor, "masked"]
) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
    """Equation 1: cross-entropy with the codes of the masked patches; and the accuracy in percent.

    The sum is divided by the number of masked patches that a process has on average, so that the mean over processes is
    the mean over all their patches. It is 0 where no patch is masked, as with few images and large blocks.
    """
    count = distributed.all_reduce_mean(torch.tensor(float(len(codes)), device=codes.device))
    count = torch.where(count > 0, count, 1.0)
    loss = F.cross_entropy(logits.float(), codes, reduction="sum") / count
    return loss, 100 * (logits.argmax(dim=1) == codes).sum() / count


class BEiT(Method):
    """Bidirectional encoder representation from image transformers (arXiv:2106.08254).

    Args:
        backbone: the vision transformer to train.
        tokenizer: the trained tokenizer whose codes are predicted: a run folder of `dvae`, its exported encoder, or a
            sslbook.nn.DiscreteEncoder.
        view: augmentation of an image.
        num_masked: the greatest number of patches to mask in an image.
        min_block: the smallest area of a block of masked patches, in patches.

    Raises:
        UserError: the backbone is no vision transformer, there is no tokenizer, or no patch or all would be masked.
    """

    rgb_only = True

    backbone: VisionTransformer  # pyrefly: ignore[bad-override-mutable-attribute]

    def __init__(
        self,
        backbone: nn.Module,
        tokenizer: nn.Module | str | None = None,
        view: View = BEIT,
        num_masked: int = 75,
        min_block: int = 16,
    ) -> None:
        super().__init__()
        self.backbone = require_transformer(backbone, "BEiT")
        self.view, self.min_block = view, min_block
        self.grid = patch_grid(view.size, view.size, self.backbone.patch_size)
        self.num_masked = require_mask(num_masked, self.grid[0] * self.grid[1])
        self.tokenizer = open_tokenizer(tokenizer, DiscreteEncoder, "dvae", view, self.grid[0])
        self.mask_token = nn.Parameter(nn.init.trunc_normal_(torch.empty(1, 1, self.backbone.dim), std=0.02))
        self.head = nn.Linear(self.backbone.dim, self.tokenizer.num_codes)
        nn.init.trunc_normal_(self.head.weight, std=0.02)
        nn.init.zeros_(self.head.bias)

    def views(self) -> tuple[View, ...]:
        return (self.view,)

    def forward(self, batch: Batch, clock: Clock) -> dict[str, Tensor]:
        (images,) = batch.views
        codes = self.tokenizer(images)  # z of the whole image, section 2.1.2: (n, patches)
        mask = block_mask(batch.index, self.grid, self.num_masked, clock, self.min_block)  # M, algorithm 1
        # The corrupted image, section 2.3: mask tokens replace masked patches and keep their positions.
        tokens = self.backbone.forward_tokens(images, mask, self.mask_token)[:, 1:]  # without the class token
        loss, accuracy = token_loss(self.head(tokens[mask]), codes[mask])  # visible patches are not predicted
        return {"loss": loss, "token_accuracy": accuracy}
