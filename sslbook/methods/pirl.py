"""PIRL: features of an image and of its jigsaw puzzle must match, contrasted with a memory bank of other images.

Rotation and jigsaw prediction recover the transformation of an image, so their features must depend on it. Here
features must be *invariant* to it: nine shuffled patches must match the image's own row of the memory bank, and no
other row.

Misra and van der Maaten, 2020, "Self-supervised learning of pretext-invariant representations" (arXiv:1912.01991):
equation 5 is the loss, two terms of noise-contrastive estimation (NCE) as in equation 4. Heads, views and values are
those of the authors' code (VISSL) for ResNet-50.

What differs from the paper or the authors' code (facebookresearch/vissl, 4bb5235):
- Equation 4 divides by a sum over the sampled negatives. The authors' code, after Wu et al. (2018, arXiv:1805.01978),
  divides by a constant, estimated from the first batch: the mean over all its similarities, positives included, times
  the number of negatives. So do we, with a constant for each term.
- Negatives are a function of the image and the epoch, different for the two terms as in the authors' code, and an image
  is never its own negative.
- Views are jittered in color once, as by torchvision; the authors jitter twice, by two implementations.
- The recipe's cosine schedule moves the learning rate at every step instead of once per epoch.
- The puzzle's view is jittered and flipped once and then cut; the authors cut first and augment each patch alone.
"""

import math

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor, nn

from sslbook import distributed, rng
from sslbook.data.loader import Batch, Data
from sslbook.data.patch_grid import NUM_PATCHES, check_patches, cut_patches
from sslbook.data.views import View
from sslbook.methods.base import Method
from sslbook.nn import MemoryBank, backbone_dim
from sslbook.nn.precision import full_precision
from sslbook.schedules import Clock
from sslbook.types import PositiveFloat, PositiveInt

VIEW = View(crop=(0.08, 1.0), color_jitter=(0.4, 0.4, 0.4, 0.2), color_jitter_p=1.0, grayscale=0.2)
PUZZLE_VIEW = View(255, crop=(0.6, 1.0), color_jitter=(0.4, 0.4, 0.4, 0.2), color_jitter_p=1.0, grayscale=0.2)
ORDER = rng.METHOD  # streams of random numbers
PUZZLE_NEGATIVES, IMAGE_NEGATIVES = rng.METHOD + 1, rng.METHOD + 2


def nce(scores: Float[Tensor, "n rows"], log_sum: Float[Tensor, ""]) -> Float[Tensor, ""]:
    """Equation 4, averaged over the batch: -log h(positive) - sum of log(1 - h(negative)).

    `scores` are similarities divided by the temperature, the positive in column 0, and h = e^s / (e^s + e^log_sum).
    """
    log_odds = scores - log_sum
    return (F.softplus(-log_odds[:, 0]) + F.softplus(log_odds[:, 1:]).sum(dim=1)).mean()


def sample_negatives(
    index: Int[Tensor, "n"], count: int, num_images: int, clock: Clock, stream: int
) -> Int[Tensor, "n {count}"]:
    """For every image `count` others, uniformly, with replacement."""
    u = rng.uniform(clock.seed, clock.epoch, index, stream, count)
    other = (u.double() * (num_images - 1)).long()
    return other + (other >= index[:, None])  # skips the image itself


class PIRL(Method):
    """Pretext-invariant representation learning with jigsaw puzzles (arXiv:1912.01991).

    Args:
        backbone: the network to train; its inputs are whole images and patches.
        view: augmentation of the whole image.
        puzzle_view: augmentation of the image before patches are cut; at least three cells wide.
        cell_size: side of a cell of the 3x3 grid, in pixels.
        patch_size: side of the patch cut at a random position of a cell, in pixels.
        projector_dim: width of the features that are compared.
        temperature: divides the cosine similarities.
        puzzle_weight: lambda of equation 5, weight of the puzzle's term; the image's term has weight 1 - lambda.
        num_negatives: rows of the memory bank that are an image's negatives in each term.
        momentum: momentum of the memory bank: a row becomes momentum times itself plus the rest of the new feature.

    Raises:
        UserError: patches, cells and view do not fit.
    """

    log_sums: Tensor

    def __init__(
        self,
        backbone: nn.Module,
        view: View = VIEW,
        puzzle_view: View = PUZZLE_VIEW,
        cell_size: PositiveInt = 85,
        patch_size: PositiveInt = 64,
        projector_dim: PositiveInt = 128,
        temperature: PositiveFloat = 0.07,
        puzzle_weight: float = 0.5,
        num_negatives: PositiveInt = 32000,
        momentum: float = 0.5,
    ) -> None:
        super().__init__()
        check_patches(puzzle_view, cell_size, patch_size)
        self.view, self.puzzle_view, self.cell_size, self.patch_size = view, puzzle_view, cell_size, patch_size
        self.temperature, self.puzzle_weight = temperature, puzzle_weight
        self.num_negatives, self.momentum = num_negatives, momentum
        self.backbone = backbone
        dim = backbone_dim(backbone)
        self.projector = nn.Linear(dim, projector_dim)  # f
        self.patch_projector = nn.Linear(dim, projector_dim)  # the first layer of g, for each patch
        self.puzzle_projector = nn.Linear(NUM_PATCHES * projector_dim, projector_dim)  # the second, for all nine
        self.memory = MemoryBank(projector_dim)
        self.register_buffer("log_sums", torch.full((2,), -torch.inf))  # of both terms; -inf before the first batch

    def views(self) -> tuple[View, ...]:
        return (self.view, self.puzzle_view)

    def setup(self, data: Data) -> None:
        self.memory.allocate(data.num_train)

    def puzzle(
        self, images: Float[Tensor, "n channels h w"], index: Int[Tensor, "n"], clock: Clock
    ) -> Float[Tensor, "n dim"]:
        """g(v) of the transformed image: nine patches encoded separately, concatenated in random order, projected."""
        patches = cut_patches(images, index, self.cell_size, self.patch_size, clock)  # (n, 9, 3, h, w)
        order = rng.uniform(clock.seed, clock.epoch, index, ORDER, NUM_PATCHES).argsort(dim=1, stable=True)
        patches = patches[torch.arange(len(patches), device=patches.device)[:, None], order]
        x = self.patch_projector(self.backbone(rearrange(patches, "n patch c h w -> (n patch) c h w")))
        return self.puzzle_projector(rearrange(x, "(n patch) dim -> n (patch dim)", patch=NUM_PATCHES))

    def scores(
        self, v: Float[Tensor, "n dim"], index: Int[Tensor, "n"], clock: Clock, stream: int
    ) -> Float[Tensor, "n rows"]:
        """Similarities to the image's own row (column 0) and to negatives, divided by the temperature."""
        negatives = sample_negatives(index, self.num_negatives, len(self.memory.rows), clock, stream)
        rows = torch.cat([index[:, None], negatives], dim=1)
        return torch.einsum("nd,nrd->nr", v, self.memory.rows[rows]) / self.temperature

    @torch.no_grad()
    def estimate_partition(self, *scores: Float[Tensor, "n rows"]) -> None:
        """From the first batch of all processes: the mean exponential times the number of negatives, in logarithms."""
        if self.log_sums.isinf().any():
            log_sums = distributed.all_gather(torch.stack([s.logsumexp(dim=(0, 1)) for s in scores])[None])
            log_mean = log_sums.logsumexp(dim=0) - math.log(len(log_sums) * scores[0].numel())
            self.log_sums.copy_(log_mean + math.log(self.num_negatives))

    def forward(self, batch: Batch, clock: Clock) -> dict[str, Tensor]:
        x, x_puzzle = batch.views
        f = self.projector(self.backbone(x))  # f(v_I), (n, dim)
        g = self.puzzle(x_puzzle, batch.index, clock)  # g(v_It), (n, dim)
        with full_precision(f):  # a temperature of 0.07 amplifies rounding errors
            f, g = F.normalize(f.float(), dim=1), F.normalize(g.float(), dim=1)
            # Both are compared with the memory bank, which has no gradient, and not with each other (section 2.2).
            s_puzzle = self.scores(g, batch.index, clock, PUZZLE_NEGATIVES)
            s_image = self.scores(f, batch.index, clock, IMAGE_NEGATIVES)
            self.estimate_partition(s_puzzle, s_image)
            puzzle, image = nce(s_puzzle, self.log_sums[0]), nce(s_image, self.log_sums[1])
            loss = self.puzzle_weight * puzzle + (1 - self.puzzle_weight) * image  # equation 5
        self.memory.update(batch.index, f.detach(), self.momentum)  # rows are moving averages of f alone
        accuracy = 100 * (s_puzzle.argmax(dim=1) == 0).float().mean()
        alignment = (f.detach() - g.detach()).square().sum(dim=1).mean()
        return {"loss": loss, "puzzle_accuracy": accuracy, "alignment": alignment}
