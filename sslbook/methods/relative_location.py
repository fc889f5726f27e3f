"""Relative location: given two patches of an image, on which of eight sides of the first does the second lie?

One patch is the center of a 3x3 grid, the other one of its eight neighbors; the same network looks at each alone, and a
small head compares what it says of the two. To know that the ear lies above the eye, one has to know ears and eyes.

Doersch, Gupta and Efros, 2015, "Unsupervised visual representation learning by context prediction" (arXiv:1505.05192),
section 3; gaps and jitter between patches against trivial shortcuts: section 3.1. The authors trained a network like
AlexNet on patches of 96 pixels with gaps of about half a patch. The defaults here are those that later work used for
ResNet-50: a grid of 85-pixel cells in 255 pixels, patches of 64, a head with one hidden layer. As there, all eight pairs
of an image are in one batch. What differs:

- The center is encoded once for its eight pairs instead of eight times, so batch norm counts it once.
- The authors keep two colors of three for noise, since lenses bend colors differently and the fringes tell a patch's
  place in the image; here, as in the later work, most images lose their color.
- The head of the later work has dropout, which is left out, and batch norm whose running statistics take 0.003 of each
  batch; here they take 0.1.
- The view is a crop of about the size that theirs has after a resize to 292 pixels.
"""

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from jaxtyping import Float, Int
from torch import Tensor, nn

from sslbook.data.loader import Batch
from sslbook.data.patches import PLACES, check_patches, cut_patches
from sslbook.data.views import View
from sslbook.methods.base import Method
from sslbook.nn import MLP, backbone_dim
from sslbook.schedules import Clock

VIEW = View(size=255, crop=(0.5, 0.75), ratio=(1.0, 1.0), flip=0.0, grayscale=0.66)
CENTER = PLACES // 2


def pair_with_center(x: Float[Tensor, "batch 9 dim"]) -> Float[Tensor, "8*batch 2*dim"]:
    """Every neighbor's features behind the center's; the eight pairs of an image follow each other, row by row."""
    neighbors = torch.cat([x[:, :CENTER], x[:, CENTER + 1 :]], dim=1)
    pairs = torch.cat([x[:, CENTER : CENTER + 1].expand_as(neighbors), neighbors], dim=2)
    return rearrange(pairs, "batch pair dim -> (batch pair) dim")


def targets(batch_size: int, device: torch.device) -> Int[Tensor, "8*{batch_size}"]:
    """On which side of the center each row of `pair_with_center` lies, from 0 (above left) to 7 (below right)."""
    return repeat(torch.arange(PLACES - 1, device=device), "pair -> (batch pair)", batch=batch_size)


class RelativeLocation(Method):
    """Relative location of patches (arXiv:1505.05192).

    Args:
        backbone: the network to train; it sees patches.
        view: what an image becomes before it is cut; it must hold three cells in a row.
        cell_size: side of a cell of the 3x3 grid, in pixels.
        patch_size: side of the patch that is cut from a cell, at a random place.
        hidden_dim: hidden width of the head.
    """

    def __init__(
        self,
        backbone: nn.Module,
        view: View = VIEW,
        cell_size: int = 85,
        patch_size: int = 64,
        hidden_dim: int = 4096,
    ) -> None:
        super().__init__()
        check_patches(view, cell_size, patch_size)
        self.view, self.cell_size, self.patch_size = view, cell_size, patch_size
        self.backbone = backbone
        self.head = MLP(2 * backbone_dim(backbone), hidden_dim, PLACES - 1)

    def views(self) -> tuple[View, ...]:
        return (self.view,)

    def forward(self, batch: Batch, clock: Clock) -> dict[str, Tensor]:
        (images,) = batch.views
        patches = cut_patches(images, batch.index, self.cell_size, self.patch_size, clock)
        x = self.backbone(rearrange(patches, "batch place c h w -> (batch place) c h w"))
        x = rearrange(x, "(batch place) dim -> batch place dim", place=PLACES)
        logits = self.head(pair_with_center(x)).float()
        y = targets(len(images), images.device)
        accuracy = 100 * (logits.argmax(dim=1) == y).float().mean()
        return {"loss": F.cross_entropy(logits, y), "location_accuracy": accuracy}
