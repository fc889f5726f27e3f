"""PIRL: an image and its jigsaw puzzle shall mean the same.

Rotation or jigsaw ask a network what was done to an image, so that its features must tell. Here they must *not* tell:
what is said of nine shuffled patches shall match what a memory bank holds of the whole image, and nobody else's row.

Misra and van der Maaten, 2020, "Self-supervised learning of pretext-invariant representations" (arXiv:1912.01991):
equation 5 is the loss, two terms of noise-contrastive estimation as in equation 4. Heads, views and values are those of
the authors' code (VISSL) for ResNet-50. What differs:

- Equation 4 divides by a sum over the negatives at hand. The authors' code, after Wu et al. (2018, arXiv:1805.01978),
  divides by a constant, this sum as the first batch has it. So do we, with a constant for each term.
- Negatives are drawn at random keyed by image and epoch, and an image is never its own negative.
- Views jitter colors as torchvision does; the authors jitter twice, by two implementations.
- The puzzle's view is colored and mirrored once and then cut; the authors cut first and do both to each patch alone.
"""

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor, nn

from sslbook import distributed, rng
from sslbook.data.loader import Batch, Data
from sslbook.data.patches import PLACES, check_patches, cut_patches
from sslbook.data.views import View
from sslbook.errors import UserError
from sslbook.methods.base import Method
from sslbook.nn import MemoryBank, backbone_dim
from sslbook.schedules import Clock

VIEW = View(crop=(0.08, 1.0), color_jitter=(0.4, 0.4, 0.4, 0.2), color_jitter_p=1.0, grayscale=0.2)
PUZZLE_VIEW = View(255, crop=(0.6, 1.0), color_jitter=(0.4, 0.4, 0.4, 0.2), color_jitter_p=1.0, grayscale=0.2)
ORDER, NEGATIVES = rng.METHOD, rng.METHOD + 1  # rows of random numbers


def nce(scores: Float[Tensor, "n rows"], log_sum: Float[Tensor, ""]) -> Float[Tensor, ""]:
    """Equation 4, averaged over the batch: -log h(positive) - sum of log(1 - h(negative)).

    `scores` are similarities divided by the temperature, the positive in column 0, and h = e^s / (e^s + e^log_sum).
    """
    odds = scores - log_sum
    return (F.softplus(-odds[:, 0]) + F.softplus(odds[:, 1:]).sum(dim=1)).mean()


def draw_negatives(index: Int[Tensor, "n"], count: int, num_images: int, clock: Clock) -> Int[Tensor, "n {count}"]:
    """For every image so many others, with repetition."""
    u = rng.uniform(clock.seed, clock.epoch, index, NEGATIVES, count)
    other = (u.double() * (num_images - 1)).long()
    return other + (other >= index[:, None])  # skips the image itself


class PIRL(Method):
    """Pretext-invariant representation learning with jigsaw puzzles (arXiv:1912.01991).

    Args:
        backbone: the network to train; it sees whole images and patches.
        view: what an image becomes as a whole.
        puzzle_view: what it becomes before it is cut into patches; it must hold three cells in a row.
        cell_size: side of a cell of the 3x3 grid, in pixels.
        patch_size: side of the patch that is cut from a cell, at a random place.
        projector_dim: width of the features that are compared.
        temperature: divides the similarities.
        puzzle_weight: lambda of equation 5, the weight of the puzzle's term; the rest is the whole image's.
        num_negatives: rows of the memory that an image is compared with.
        momentum: how much of itself a row keeps when its image is seen.
    """

    log_sums: Tensor

    def __init__(
        self,
        backbone: nn.Module,
        view: View = VIEW,
        puzzle_view: View = PUZZLE_VIEW,
        cell_size: int = 85,
        patch_size: int = 64,
        projector_dim: int = 128,
        temperature: float = 0.07,
        puzzle_weight: float = 0.5,
        num_negatives: int = 32000,
        momentum: float = 0.5,
    ) -> None:
        super().__init__()
        check_patches(puzzle_view, cell_size, patch_size)
        if not 0 <= puzzle_weight <= 1 or num_negatives < 1:
            raise UserError(
                f"puzzle_weight is {puzzle_weight} and num_negatives {num_negatives}: "
                "give a weight from 0 to 1 and at least one negative"
            )
        self.view, self.puzzle_view, self.cell_size, self.patch_size = view, puzzle_view, cell_size, patch_size
        self.temperature, self.puzzle_weight = temperature, puzzle_weight
        self.num_negatives, self.momentum = num_negatives, momentum
        self.backbone = backbone
        dim = backbone_dim(backbone)
        self.projector = nn.Linear(dim, projector_dim)  # f
        self.patch_projector = nn.Linear(dim, projector_dim)  # the first layer of g, for each patch
        self.puzzle_projector = nn.Linear(PLACES * projector_dim, projector_dim)  # the second, for all nine
        self.memory = MemoryBank(projector_dim)
        self.register_buffer("log_sums", torch.full((2,), -torch.inf))  # of both terms; -inf: no batch seen yet

    def views(self) -> tuple[View, ...]:
        return (self.view, self.puzzle_view)

    def setup(self, data: Data) -> None:
        if data.num_train < 2:
            raise UserError("PIRL compares an image with others: give it at least 2 images")
        self.memory.allocate(data.num_train)

    def puzzle(self, images: Float[Tensor, "n 3 h w"], index: Int[Tensor, "n"], clock: Clock) -> Float[Tensor, "n dim"]:
        """g(v): what is said of the nine patches, in random order."""
        patches = cut_patches(images, index, self.cell_size, self.patch_size, clock)
        order = rng.uniform(clock.seed, clock.epoch, index, ORDER, PLACES).argsort(dim=1, stable=True)
        patches = patches[torch.arange(len(patches), device=patches.device)[:, None], order]
        x = self.patch_projector(self.backbone(rearrange(patches, "n place c h w -> (n place) c h w")))
        return self.puzzle_projector(rearrange(x, "(n place) dim -> n (place dim)", place=PLACES))

    def scores(self, v: Float[Tensor, "n dim"], rows: Int[Tensor, "n rows"]) -> Float[Tensor, "n rows"]:
        """Similarities with rows of the memory, divided by the temperature."""
        return torch.einsum("nd,nrd->nr", v, self.memory.rows[rows]) / self.temperature

    @torch.no_grad()
    def fix_log_sums(self, *scores: Float[Tensor, "n rows"]) -> None:
        """The first batch says what similarities are divided by: its mean exponential times the number of negatives."""
        if self.log_sums.isinf().any():
            greatest = 1 / self.temperature  # keeps the exponentials in range
            means = torch.stack([(s[:, 1:] - greatest).exp().mean() for s in scores])
            self.log_sums.copy_((distributed.all_reduce_mean(means) * self.num_negatives).log() + greatest)

    def forward(self, batch: Batch, clock: Clock) -> dict[str, Tensor]:
        x, x_puzzle = batch.views
        f = self.projector(self.backbone(x))
        g = self.puzzle(x_puzzle, batch.index, clock)
        negatives = draw_negatives(batch.index, self.num_negatives, len(self.memory.rows), clock)
        rows = torch.cat([batch.index[:, None], negatives], dim=1)
        with torch.autocast(f.device.type, enabled=False):  # a temperature of 0.07 magnifies rounding
            f, g = F.normalize(f.float(), dim=1), F.normalize(g.float(), dim=1)
            s_puzzle, s_image = self.scores(g, rows), self.scores(f, rows)
            self.fix_log_sums(s_puzzle, s_image)
            puzzle, image = nce(s_puzzle, self.log_sums[0]), nce(s_image, self.log_sums[1])
            loss = self.puzzle_weight * puzzle + (1 - self.puzzle_weight) * image
        self.memory.update(batch.index, f.detach(), self.momentum)
        accuracy = 100 * (s_puzzle.argmax(dim=1) == 0).float().mean()
        agreement = (f.detach() * g.detach()).sum(dim=1).mean()
        return {"loss": loss, "puzzle_accuracy": accuracy, "agreement": agreement}
