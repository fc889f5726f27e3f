"""EVA: say of hidden patches what a frozen CLIP says of them.

Part of the patches, in blocks, is replaced by a mask token before the first layer, and a linear layer of the last layer's
tokens predicts the teacher's features there. There is no decoder, no tokenizer and no second view: masked prediction at
its plainest, whose target already means something.

Fang et al., 2022, "EVA: Exploring the limits of masked visual representation learning at scale" (arXiv:2211.07636),
section 2.1: the transformer sees the full sequence with mask tokens, as here. With an option of the authors' code, and
in OpenMMLab's port, MAE's encoder and decoder get the same target instead; `milan` is near to that. What differs: any
frozen network can teach (`sslbook.nn.teachers`); the targets are its features after the last norm, without CLIP's
projection, where the authors predict the projected ones; the loss is 2 - 2 cos instead of -cos, which has the same
minimum; every image has exactly the same number of hidden patches, where BEiT's blocks, which the authors use, may
leave some with fewer; and the backbone's linear layers start by Xavier, theirs from a truncated normal.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from sslbook import rng
from sslbook.data.loader import Batch
from sslbook.data.masks import block_mask
from sslbook.data.views import MAE_CROP, View
from sslbook.errors import UserError
from sslbook.methods.base import Method
from sslbook.nn.teachers import Teacher
from sslbook.nn.vit import VisionTransformer, patch_grid
from sslbook.schedules import Clock


def cosine_loss(prediction: Float[Tensor, "rows dim"], target: Float[Tensor, "rows dim"]) -> Float[Tensor, ""]:
    """Squared distance of the normalized features, 2 - 2 cos, averaged over rows."""
    return (2 - 2 * F.cosine_similarity(prediction.float(), target.float(), dim=1)).mean()


class EVA(Method):
    """Masked prediction of a frozen teacher's features (arXiv:2211.07636).

    Args:
        backbone: the vision transformer to train.
        teacher: the frozen network whose features are predicted: a run folder or exported backbone, timm/NAME,
            open_clip/NAME:WEIGHTS, transformers/NAME, or a module. The paper's is open_clip/ViT-L-14:openai.
        view: what an image becomes.
        mask_ratio: part of the patches that is hidden: 105 of 256 in the authors' code.
        min_block: smallest area of a hidden block, in patches.
        teacher_size: side of the images that the teacher gets, where its patches must be brought to the student's
            grid; null leaves them as they are.
    """

    backbone: VisionTransformer  # pyrefly: ignore[bad-override-mutable-attribute]

    def __init__(
        self,
        backbone: nn.Module,
        teacher: nn.Module | str | None = None,
        view: View = MAE_CROP,
        mask_ratio: float = 0.41,
        min_block: int = 16,
        teacher_size: int | None = None,
    ) -> None:
        super().__init__()
        if not isinstance(backbone, VisionTransformer):
            raise UserError(
                f"EVA hides patches from a vision transformer and cannot use a {type(backbone).__name__}: "
                "choose sslbook.nn.VisionTransformer or sslbook.nn.vit_tiny, vit_small, vit_base, vit_large, vit_giant"
            )
        self.view, self.mask_ratio, self.min_block = view, mask_ratio, min_block
        grid = patch_grid(view.size, view.size, backbone.patch_size)
        self.mask(
            torch.zeros(1, dtype=torch.int64, device="cpu"), grid, Clock()
        )  # refuses a ratio that leaves nothing to do
        self.backbone = backbone
        self.teacher = Teacher(teacher, view, teacher_size)
        self.teacher.require_grid(grid)
        self.mask_token = nn.Parameter(0.02 * torch.randn(backbone.dim))
        self.head = nn.Linear(backbone.dim, self.teacher.dim)
        nn.init.trunc_normal_(self.head.weight, std=0.02)
        nn.init.zeros_(self.head.bias)

    def views(self) -> tuple[View, ...]:
        return (self.view,)

    def mask(self, index: Int[Tensor, "batch"], grid: tuple[int, int], clock: Clock) -> Bool[Tensor, "batch patches"]:
        """Which patches are hidden."""
        count = round(self.mask_ratio * grid[0] * grid[1])
        return block_mask(index, grid, count, clock, self.min_block, exact=True, stream=rng.METHOD + 1)

    def forward(self, batch: Batch, clock: Clock) -> dict[str, Tensor]:
        (images,) = batch.views
        seen = self.teacher(images)
        mask = self.mask(batch.index, seen.grid, clock)
        tokens = self.backbone.encode(self.backbone.embed(images, mask, self.mask_token))
        prediction = self.head(tokens[:, 1:][mask])
        return {"loss": cosine_loss(prediction, seen.patches[mask])}
