"""BEiT: hide blocks of an image and say in words what was there.

A tokenizer, trained before and then frozen, turns the whole image into one code of its vocabulary for every patch. The
network sees the image with blocks of patches replaced by a mask token, and classifies each hidden patch: which of the
codes was it? A choice among codes leaves no room for the blurred average that pixels invite.

Bao, Dong, Piao and Wei, 2022, "BEiT: BERT pre-training of image transformers" (arXiv:2106.08254), sections 2.1 to 2.4 and
equation 1; masks are algorithm 1 as the authors' code runs it, at most 75 of 196 patches. What differs: the tokenizer is
one that we train (`python -m sslbook.train dvae`) instead of DALL-E's, and sees the same image made smaller, where the
authors resize the crop a second time from the file. Masks are keyed by image and epoch.
"""

from pathlib import Path

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from sslbook import distributed
from sslbook.data.loader import Batch, Data
from sslbook.data.masks import block_mask
from sslbook.data.views import BEIT, View
from sslbook.errors import UserError
from sslbook.methods.base import Method
from sslbook.nn.tokenizers import DiscreteEncoder, Tokenizer, load_tokenizer, small_encoder, train_discrete
from sslbook.nn.vit import VisionTransformer, patch_grid
from sslbook.schedules import Clock


def token_loss(
    scores: Float[Tensor, "hidden codes"], codes: Int[Tensor, "hidden"]
) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
    """Equation 1: cross-entropy with the codes of the hidden patches; and how many percent were right.

    Images have different numbers of hidden patches. The sum is divided by the number that a process has on average,
    so that the mean over processes is the mean over all their patches. Where blocks are large and images few, none may
    be hidden at all: the loss is 0 then.
    """
    count = distributed.all_reduce_mean(torch.tensor(float(len(codes)), device=codes.device))
    count = torch.where(count > 0, count, 1.0)
    loss = F.cross_entropy(scores.float(), codes, reduction="sum") / count
    return loss, 100 * (scores.argmax(dim=1) == codes).sum() / count


class BEiT(Method):
    """Bidirectional encoder representation from image transformers (arXiv:2106.08254).

    Args:
        backbone: the vision transformer to train.
        view: what an image becomes.
        tokenizer: a run of `dvae` or its exported encoder, whose codes are predicted; without one, a small one is
            trained on the same images before training begins.
        num_masked: the greatest number of patches to hide in an image.
        min_block: the smallest area of a block of hidden patches, in patches.
        num_codes: vocabulary of the tokenizer trained here.
        tokenizer_steps: steps for which it is trained, with 64 images each.
    """

    backbone: VisionTransformer  # pyrefly: ignore[bad-override-mutable-attribute]

    def __init__(
        self,
        backbone: nn.Module,
        view: View = BEIT,
        tokenizer: Path | None = None,
        num_masked: int = 75,
        min_block: int = 16,
        num_codes: int = 8192,
        tokenizer_steps: int = 2000,
    ) -> None:
        super().__init__()
        if not isinstance(backbone, VisionTransformer):
            raise UserError(
                f"BEiT hides patches from a vision transformer and cannot use a {type(backbone).__name__}: "
                "choose sslbook.nn.VisionTransformer or sslbook.nn.vit_tiny, vit_small, vit_base, vit_large, vit_huge"
            )
        self.view, self.num_masked, self.min_block = view, num_masked, min_block
        self.grid = patch_grid(view.size, view.size, backbone.patch_size)
        block_mask(
            torch.arange(1, device="cpu"), self.grid, num_masked, Clock(), min_block
        )  # refuses what leaves nothing to do
        self.tokenizer_steps = 0 if tokenizer is not None else tokenizer_steps
        if tokenizer is not None:
            encoder, normalization, _ = load_tokenizer(tokenizer, DiscreteEncoder, "dvae")
        else:
            encoder, normalization = small_encoder(backbone.patch_size, num_codes), None
        self.backbone = backbone
        self.tokenizer = Tokenizer(encoder, view, self.grid[0], normalization)
        self.mask_token = nn.Parameter(nn.init.trunc_normal_(torch.empty(backbone.dim), std=0.02))
        self.head = nn.Linear(backbone.dim, self.tokenizer.num_codes)
        nn.init.trunc_normal_(self.head.weight, std=0.02)
        nn.init.zeros_(self.head.bias)

    def views(self) -> tuple[View, ...]:
        return (self.view,)

    def on_weights_loaded(self, taken: list[str]) -> None:
        if any(name.startswith("tokenizer.") for name in taken):
            self.tokenizer_steps = 0  # it came with them

    def before_epoch(self, data: Data, clock: Clock) -> None:
        if self.tokenizer_steps and clock.step == 0:
            train_discrete(self.tokenizer, data, self.view, self.tokenizer_steps, "beit")

    def forward(self, batch: Batch, clock: Clock) -> dict[str, Tensor]:
        (images,) = batch.views
        hidden = block_mask(batch.index, self.grid, self.num_masked, clock, self.min_block)
        codes = self.tokenizer(images)
        tokens = self.backbone.encode(self.backbone.embed(images, hidden, self.mask_token))[:, 1:]
        loss, right = token_loss(self.head(tokens[hidden]), codes[hidden])
        return {"loss": loss, "token_accuracy": right}
