"""Relative location: classify at which of eight positions around a center patch another patch of the image lies.

The center patch of a 3x3 grid and one of its eight neighbors are encoded separately by the same network. A small head
predicts the neighbor's position from both features. To know that the ear lies above the eye, the network has to
recognize ears and eyes.

Doersch, Gupta and Efros, 2015, "Unsupervised visual representation learning by context prediction" (arXiv:1505.05192),
section 3; gaps and jitter between patches against trivial shortcuts: section 3.1. The authors trained a network like
AlexNet on patches of 96 pixels with gaps of about half a patch. The defaults here are those of OpenMMLab for ResNet-50:
cells of 85 pixels in an image of 255, patches of 64, a head with one hidden layer, and all eight pairs of an image in
one batch.

What differs from OpenMMLab's code (open-mmlab/mmselfsup, 1887786):
- The center is encoded once for its eight pairs instead of eight times, so batch norm counts it once.
- Against chromatic aberration, which reveals where in the image a patch lies, the authors replace two of three color
  channels by noise. Here, as at OpenMMLab, two thirds of the images become gray.
- OpenMMLab's head has dropout, which is left out, and a momentum of 0.003 in batch norm's running statistics; here the
  momentum is 0.1.
- Theirs is a crop of 255 pixels after a resize to 292; the view here is a crop of 50 to 75 % of the area.
"""

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from jaxtyping import Float, Int
from torch import Tensor, nn

from sslbook.data.loader import Batch
from sslbook.data.patch_grid import NUM_PATCHES, check_patches, cut_patches
from sslbook.data.views import View
from sslbook.methods.base import Method
from sslbook.nn import MLP, backbone_dim
from sslbook.schedules import Clock
from sslbook.types import PositiveInt

VIEW = View(size=255, crop=(0.5, 0.75), ratio=(1.0, 1.0), flip=0.0, grayscale=0.66)
CENTER = NUM_PATCHES // 2


def pair_with_center(x: Float[Tensor, "batch 9 dim"]) -> Float[Tensor, "8*batch 2*dim"]:
    """The center's features concatenated with each neighbor's; the eight pairs of an image are consecutive rows."""
    neighbors = torch.cat([x[:, :CENTER], x[:, CENTER + 1 :]], dim=1)
    pairs = torch.cat([x[:, CENTER : CENTER + 1].expand_as(neighbors), neighbors], dim=2)
    return rearrange(pairs, "batch pair dim -> (batch pair) dim")


def targets(batch_size: int, device: torch.device) -> Int[Tensor, "8*{batch_size}"]:
    """The neighbor's position in each row of `pair_with_center`, from 0 (above left) to 7 (below right)."""
    return repeat(torch.arange(NUM_PATCHES - 1, device=device), "pair -> (batch pair)", batch=batch_size)


class RelativeLocation(Method):
    """Relative location of patches (arXiv:1505.05192).

    Args:
        backbone: the network to train; its inputs are patches.
        view: augmentation of an image before patches are cut; at least three cells wide.
        cell_size: side of a cell of the 3x3 grid, in pixels.
        patch_size: side of the patch cut at a random position of a cell, in pixels.
        hidden_dim: hidden width of the head.

    Raises:
        UserError: the cells do not fit into the view, or a patch not into a cell.
    """

    def __init__(
        self,
        backbone: nn.Module,
        view: View = VIEW,
        cell_size: PositiveInt = 85,
        patch_size: PositiveInt = 64,
        hidden_dim: PositiveInt = 4096,
    ) -> None:
        super().__init__()
        check_patches(view, cell_size, patch_size)
        self.view, self.cell_size, self.patch_size = view, cell_size, patch_size
        self.backbone = backbone
        self.head = MLP(2 * backbone_dim(backbone), hidden_dim, NUM_PATCHES - 1)

    def views(self) -> tuple[View, ...]:
        return (self.view,)

    def forward(self, batch: Batch, clock: Clock) -> dict[str, Tensor]:
        (images,) = batch.views
        # With gaps and jitter between patches, lines cannot be followed from one into the next (section 3.1).
        patches = cut_patches(images, batch.index, self.cell_size, self.patch_size, clock)  # (batch, 9, 3, h, w)
        # Siamese encoding: each patch alone, all with the same weights (figure 3).
        x = self.backbone(rearrange(patches, "batch patch c h w -> (batch patch) c h w"))
        x = rearrange(x, "(batch patch) dim -> batch patch dim", patch=NUM_PATCHES)
        # Only the head sees both features of a pair; it classifies one of eight positions (section 3).
        logits = self.head(pair_with_center(x)).float()  # (8 batch, 8)
        y = targets(len(images), images.device)
        accuracy = 100 * (logits.argmax(dim=1) == y).float().mean()
        return {"loss": F.cross_entropy(logits, y), "location_accuracy": accuracy}
