"""Memory bank: one feature vector for every training image, updated when the image is seen (NPID, PIRL, ODC)."""

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from sslbook import distributed


class MemoryBank(nn.Module):
    """A unit vector for every training image, in float32: a moving average of the image's features.

    It starts as random directions, the same in every process. `allocate` sets its size, once the number of images is
    known (`Method.setup`).

    Wu, Xiong, Yu and Lin, 2018 (arXiv:1805.01978), section 3.1.

    Args:
        dim: width of a row.
    """

    rows: Tensor

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.register_buffer("rows", torch.empty(0, dim))

    def allocate(self, size: int) -> None:
        """Makes the bank as long as the data: `size` rows."""
        start = torch.randn(size, self.rows.shape[1], generator=torch.Generator().manual_seed(0))
        self.rows = F.normalize(start, dim=1).to(self.rows.device)

    @torch.no_grad()
    def update(self, index: Int[Tensor, "n"], x: Float[Tensor, "n dim"], momentum: float) -> None:
        """Row i becomes `momentum * row + (1 - momentum) * x`, normalized, for the images of all processes.

        Where an image occurs more than once in the global batch, its last occurrence counts.
        """
        index, x = distributed.all_gather(index), distributed.all_gather(x.float())
        index, occurrence = index.unique(return_inverse=True)
        positions = torch.arange(len(x), device=x.device)
        last = torch.zeros_like(index).scatter_reduce(0, occurrence, positions, "amax", include_self=False)
        self.rows[index] = F.normalize(momentum * self.rows[index] + (1 - momentum) * x[last], dim=1)
