"""Jigsaw puzzles: classify by which of a fixed set of permutations the nine patches of an image were shuffled.

The same network encodes each patch separately. Only the last layer sees the features of all nine, in shuffled order.
Similar permutations cannot be distinguished, so the set holds permutations that differ in as many positions as
possible.

Noroozi and Favaro, 2016, "Unsupervised learning of visual representations by solving jigsaw puzzles"
(arXiv:1603.09246), section 3. The authors trained AlexNet; the defaults are those of VISSL for ResNet-50 (Goyal et al.,
2019, "Scaling and benchmarking self-supervised visual representation learning", arXiv:1905.01235): patches of 64 pixels
in cells of 85, 2000 permutations, one layer per patch.

What differs from the paper and from VISSL's code (facebookresearch/vissl, 4bb5235):
- The paper's algorithm 1 repeatedly adds the permutation with the greatest *average* distance to those chosen, of all
  there are; some of its set then differ in two positions only (its table 5). Here the *nearest* of those chosen must be
  as far as possible, the average decides between equals, and the choice is among 20,000 random permutations. For 2000
  permutations the average distance comes out the same, 8.0 of 9, and the nearest two still differ in four positions.
- VISSL resizes to 256 pixels and takes a random crop of 255; the view here resizes to 255.
- A patch of 64 pixels has 22 possible offsets in its cell of 85, from 0 to 21; in VISSL 21, from 0 to 20.
- As in VISSL, patches are not normalized one by one, which the paper does.
"""

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor, nn

from sslbook import rng
from sslbook.data.loader import Batch
from sslbook.data.patch_grid import NUM_PATCHES, check_patches, cut_patches
from sslbook.data.views import View
from sslbook.errors import UserError
from sslbook.methods.base import Method
from sslbook.nn import backbone_dim
from sslbook.schedules import Clock
from sslbook.types import PositiveInt

VIEW = View(size=255, crop=None, grayscale=0.66)
CANDIDATES = 20_000


def permutation_set(size: int, candidates: int = CANDIDATES) -> Int[Tensor, "{size} 9"]:
    """Permutations of nine positions with large Hamming distances, chosen greedily; always the same.

    Raises:
        UserError: `size` is below 2 or above a quarter of the candidates.
    """
    if not 2 <= size <= candidates // 4:
        raise UserError(f"num_permutations is {size}: use at least 2 and at most {candidates // 4}")
    index = torch.arange(candidates, device="cpu")
    pool = rng.uniform(0, 0, index, rng.METHOD, NUM_PATCHES).argsort(dim=1, stable=True)
    columns = pool.T.to(torch.int8).contiguous()  # by position, and in bytes, since this is compared `size` times
    nearest = torch.full_like(index, NUM_PATCHES + 1, dtype=torch.int32)  # distance to the nearest of those chosen
    total = torch.zeros_like(nearest)  # sum of the distances to those chosen
    chosen = [0]
    while len(chosen) < size:
        distance = (columns != columns[:, chosen[-1], None]).sum(dim=0, dtype=torch.int32)
        nearest, total = torch.minimum(nearest, distance), total + distance
        chosen.append(int((nearest * (NUM_PATCHES * size + 1) + total).argmax()))
    return pool[torch.tensor(chosen, device="cpu")]


def shuffle(
    patches: Float[Tensor, "batch 9 channels height width"], order: Int[Tensor, "batch 9"]
) -> Float[Tensor, "batch 9 channels height width"]:
    """Position i of every image gets the patch that was at position `order[i]`."""
    return patches[torch.arange(len(patches), device=patches.device)[:, None], order]


class Jigsaw(Method):
    """Jigsaw puzzles (arXiv:1603.09246) in VISSL's version for residual networks (arXiv:1905.01235).

    Args:
        backbone: the network to train; its inputs are patches.
        view: augmentation of an image before patches are cut; at least three cells wide.
        cell_size: side of a cell of the 3x3 grid, in pixels.
        patch_size: side of the patch cut at a random position of a cell, in pixels.
        num_permutations: permutations to distinguish, the classes.
        patch_dim: output width of the layer behind the backbone, for each patch.

    Raises:
        UserError: patches, cells and view do not fit, or `num_permutations` is below 2 or above 5,000.
    """

    permutations: Tensor

    def __init__(
        self,
        backbone: nn.Module,
        view: View = VIEW,
        cell_size: PositiveInt = 85,
        patch_size: PositiveInt = 64,
        num_permutations: PositiveInt = 2000,
        patch_dim: PositiveInt = 1000,
    ) -> None:
        super().__init__()
        check_patches(view, cell_size, patch_size)
        self.view, self.cell_size, self.patch_size = view, cell_size, patch_size
        self.register_buffer("permutations", permutation_set(num_permutations))
        self.backbone = backbone
        dim = backbone_dim(backbone)
        self.patch_layer = nn.Sequential(nn.Linear(dim, patch_dim, bias=False), nn.BatchNorm1d(patch_dim), nn.ReLU())
        self.head = nn.Linear(NUM_PATCHES * patch_dim, num_permutations)

    def views(self) -> tuple[View, ...]:
        return (self.view,)

    def forward(self, batch: Batch, clock: Clock) -> dict[str, Tensor]:
        (images,) = batch.views
        # With gaps and jitter between patches, lines cannot be followed from one into the next.
        patches = cut_patches(images, batch.index, self.cell_size, self.patch_size, clock)  # (batch, 9, 3, h, w)
        # One permutation for every image and epoch: its number in the set is the class.
        u = rng.uniform(clock.seed, clock.epoch, batch.index, rng.METHOD, 1)[:, 0].double()
        y = (u * len(self.permutations)).long()
        patches = shuffle(patches, self.permutations[y])
        # Context-free network: each patch is encoded alone, all with the same weights (figure 3).
        x = self.patch_layer(self.backbone(rearrange(patches, "batch patch c h w -> (batch patch) c h w")))
        # The head is the first layer that sees all nine, in shuffled order.
        logits = self.head(rearrange(x, "(batch patch) dim -> batch (patch dim)", patch=NUM_PATCHES)).float()
        accuracy = 100 * (logits.argmax(dim=1) == y).float().mean()
        return {"loss": F.cross_entropy(logits, y), "jigsaw_accuracy": accuracy}
