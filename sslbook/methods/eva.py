"""EVA: predict a frozen CLIP's features of masked patches.

Blocks of patches are replaced by a mask token before the first layer, and a linear layer on the last layer's tokens
predicts the teacher's features there. There is no decoder, no tokenizer and no second view.

Fang et al., 2022, "EVA: Exploring the limits of masked visual representation learning at scale" (arXiv:2211.07636),
section 2.1: the transformer sees the full sequence with mask tokens, as here. With an option of the authors' code, and
in OpenMMLab's port, MAE's encoder and decoder get the same target instead; `milan` is near to that.

What differs from the authors' code (baaivision/EVA, aeb2f9a):
- The targets are CLIP's features after the last norm, where the authors predict those after CLIP's projection; any
  frozen network can be the teacher.
- The loss is 2 - 2 cos instead of -cos, which has the same minimum.
- Every image has exactly the same number of masked patches, while BEiT's blocks, which the authors use, may mask fewer
  in some.
- The backbone's linear layers start from Xavier's distribution; theirs from a truncated normal.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from sslbook import rng
from sslbook.data.loader import Batch
from sslbook.data.masks import block_mask, require_mask
from sslbook.data.views import MAE_CROP, View
from sslbook.methods.base import Method
from sslbook.nn.vit import VisionTransformer, patch_grid, require_transformer
from sslbook.schedules import Clock
from sslbook.types import PositiveInt
from sslbook.weights.teachers import open_teacher


def cosine_loss(prediction: Float[Tensor, "rows dim"], target: Float[Tensor, "rows dim"]) -> Float[Tensor, ""]:
    """Squared distance of the normalized features, 2 - 2 cos, the mean over rows."""
    return (2 - 2 * F.cosine_similarity(prediction.float(), target.float(), dim=1)).mean()


class EVA(Method):
    """Masked prediction of a frozen teacher's features (arXiv:2211.07636).

    Args:
        backbone: the vision transformer to train.
        teacher: the frozen network whose features are predicted: a run folder or exported backbone, timm/NAME, or a
            module. The paper's first is timm/vit_large_patch14_clip_quickgelu_224.openai.
        view: augmentation of an image.
        mask_ratio: fraction of the patches that is masked: 105 of 256 in the authors' code.
        min_block: the smallest area of a block of masked patches, in patches.
        teacher_size: side in pixels of the teacher's images, so that its grid of patches is the student's; null leaves
            them as they are.

    Raises:
        UserError: the backbone is no vision transformer, no patch or all would be masked, there is no teacher, or its
            grid is another.
    """

    rgb_only = True

    backbone: VisionTransformer  # pyrefly: ignore[bad-override-mutable-attribute]

    def __init__(
        self,
        backbone: nn.Module,
        teacher: nn.Module | str | None = None,
        view: View = MAE_CROP,
        mask_ratio: float = 0.41,
        min_block: int = 16,
        teacher_size: PositiveInt | None = None,
    ) -> None:
        super().__init__()
        self.backbone = require_transformer(backbone, "EVA")
        self.view, self.mask_ratio, self.min_block = view, mask_ratio, min_block
        grid = patch_grid(view.size, view.size, self.backbone.patch_size)
        require_mask(round(mask_ratio * grid[0] * grid[1]), grid[0] * grid[1])
        self.teacher = open_teacher(teacher, view, teacher_size)
        self.teacher.require_grid(grid)
        self.mask_token = nn.Parameter(0.02 * torch.randn(1, 1, self.backbone.dim))
        self.head = nn.Linear(self.backbone.dim, self.teacher.dim)
        nn.init.trunc_normal_(self.head.weight, std=0.02)
        nn.init.zeros_(self.head.bias)

    def views(self) -> tuple[View, ...]:
        return (self.view,)

    def sample_masks(
        self, index: Int[Tensor, "batch"], grid: tuple[int, int], clock: Clock
    ) -> Bool[Tensor, "batch patches"]:
        """True at the masked patches of every image, equally many in each."""
        num_masked = round(self.mask_ratio * grid[0] * grid[1])
        return block_mask(index, grid, num_masked, clock, self.min_block, exact=True, stream=rng.METHOD + 1)

    def forward(self, batch: Batch, clock: Clock) -> dict[str, Tensor]:
        (images,) = batch.views
        features = self.teacher(images)  # of the whole image, without gradient
        mask = self.sample_masks(batch.index, features.grid, clock)
        tokens = self.backbone.forward_tokens(images, mask, self.mask_token)  # (n, 1 + patches, dim)
        prediction = self.head(tokens[:, 1:][mask])  # of masked patches alone: (n * num_masked, teacher_dim)
        return {"loss": cosine_loss(prediction, features.patches[mask])}
