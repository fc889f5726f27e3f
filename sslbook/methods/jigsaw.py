"""Jigsaw: nine patches of an image are shuffled, and the network says by which of many permutations.

The same network looks at each patch alone; only the last layer sees what it says of all nine, side by side. Some
permutations are so much alike that no image tells them apart, so the set to choose from holds only such that put most
patches in different places.

Noroozi and Favaro, 2016, "Unsupervised learning of visual representations by solving jigsaw puzzles"
(arXiv:1603.09246), section 3. The authors trained AlexNet; the defaults are those of VISSL for ResNet-50 (Goyal et al.,
2019, "Scaling and benchmarking self-supervised visual representation learning", arXiv:1905.01235): patches of 64 pixels
in cells of 85, 2000 permutations, one layer per patch. What differs:

- The paper's algorithm 1 adds the permutation whose *average* distance from those chosen is the greatest, of all there
  are; some of its set then differ in two places only (its table 5). Here the *nearest* of those chosen must be as far
  as possible, the average decides between equals, and the choice is among 20,000 random permutations. The average comes
  out the same, 8.0 of 9, and the nearest two still differ in four places (2000 permutations).
- VISSL resizes to 256 pixels and cuts a random 255 out of them; the view here resizes to 255.
- As in VISSL, patches are not normalized one by one, which the paper does.
"""

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor, nn

from sslbook import rng
from sslbook.data.loader import Batch
from sslbook.data.patches import PLACES, check_patches, cut_patches
from sslbook.data.views import View
from sslbook.errors import UserError
from sslbook.methods.base import Method
from sslbook.nn import backbone_dim
from sslbook.schedules import Clock

VIEW = View(size=255, crop=None, grayscale=0.66)
CANDIDATES = 20_000


def permutation_set(size: int, candidates: int = CANDIDATES) -> Int[Tensor, "{size} 9"]:
    """Permutations of the nine places that differ in many of them, always the same; each is chosen in turn.

    Raises:
        UserError: there are no two, or more than a quarter of the candidates.
    """
    if not 2 <= size <= candidates // 4:
        raise UserError(f"num_permutations is {size}: use at least 2 and at most {candidates // 4}")
    index = torch.arange(candidates, device="cpu")
    pool = rng.uniform(0, 0, index, rng.METHOD, PLACES).argsort(dim=1, stable=True)
    columns = pool.T.to(torch.int8).contiguous()  # by place, and in bytes, since this is compared `size` times
    nearest = torch.full_like(index, PLACES + 1, dtype=torch.int32)  # of those chosen, how far away
    total = torch.zeros_like(nearest)
    chosen = [0]
    while len(chosen) < size:
        distance = (columns != columns[:, chosen[-1], None]).sum(dim=0, dtype=torch.int32)
        nearest, total = torch.minimum(nearest, distance), total + distance
        chosen.append(int((nearest * (PLACES * size + 1) + total).argmax()))
    return pool[torch.tensor(chosen, device="cpu")]


def shuffle(
    patches: Float[Tensor, "batch 9 channels height width"], order: Int[Tensor, "batch 9"]
) -> Float[Tensor, "batch 9 channels height width"]:
    """Place i gets the patch of place `order[i]`, image by image."""
    return patches[torch.arange(len(patches), device=patches.device)[:, None], order]


class Jigsaw(Method):
    """Jigsaw puzzles (arXiv:1603.09246) in VISSL's version for residual networks (arXiv:1905.01235).

    Args:
        backbone: the network to train; it sees patches.
        view: what an image becomes before it is cut; it must hold three cells in a row.
        cell_size: side of a cell of the 3x3 grid, in pixels.
        patch_size: side of the patch that is cut from a cell, at a random place.
        num_permutations: how many shuffles to tell apart.
        patch_dim: values that a patch's own layer passes on.
    """

    permutations: Tensor

    def __init__(
        self,
        backbone: nn.Module,
        view: View = VIEW,
        cell_size: int = 85,
        patch_size: int = 64,
        num_permutations: int = 2000,
        patch_dim: int = 1000,
    ) -> None:
        super().__init__()
        check_patches(view, cell_size, patch_size)
        self.view, self.cell_size, self.patch_size = view, cell_size, patch_size
        self.register_buffer("permutations", permutation_set(num_permutations))
        self.backbone = backbone
        dim = backbone_dim(backbone)
        self.patch_layer = nn.Sequential(nn.Linear(dim, patch_dim, bias=False), nn.BatchNorm1d(patch_dim), nn.ReLU())
        self.head = nn.Linear(PLACES * patch_dim, num_permutations)

    def views(self) -> tuple[View, ...]:
        return (self.view,)

    def forward(self, batch: Batch, clock: Clock) -> dict[str, Tensor]:
        (images,) = batch.views
        patches = cut_patches(images, batch.index, self.cell_size, self.patch_size, clock)
        u = rng.uniform(clock.seed, clock.epoch, batch.index, rng.METHOD, 1)[:, 0].double()
        y = (u * len(self.permutations)).long()
        patches = shuffle(patches, self.permutations[y])
        x = self.patch_layer(self.backbone(rearrange(patches, "batch place c h w -> (batch place) c h w")))
        logits = self.head(rearrange(x, "(batch place) dim -> batch (place dim)", place=PLACES)).float()
        accuracy = 100 * (logits.argmax(dim=1) == y).float().mean()
        return {"loss": F.cross_entropy(logits, y), "jigsaw_accuracy": accuracy}
