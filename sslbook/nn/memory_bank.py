"""One row for every image of the data."""

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from sslbook import distributed


class MemoryBank(nn.Module):
    """A unit vector for every training image, in float32: what a network said of it when it was last seen.

    It is sized by `allocate`, once the number of images is known (`Method.setup`), with random directions that are
    the same in every process.

    Args:
        dim: width of a row.
    """

    rows: Tensor

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.register_buffer("rows", torch.empty(0, dim))

    def allocate(self, size: int) -> None:
        """Makes room for so many images."""
        start = torch.randn(size, self.rows.shape[1], generator=torch.Generator().manual_seed(0))
        self.rows = F.normalize(start, dim=1).to(self.rows.device)

    @torch.no_grad()
    def update(self, index: Int[Tensor, "n"], x: Float[Tensor, "n dim"], momentum: float) -> None:
        """The rows of the images that all processes saw become `momentum` times themselves plus the rest of `x`.

        They are normalized again. Of an image that occurs more than once, the last occurrence counts.
        """
        index, x = distributed.all_gather(index), distributed.all_gather(x.float())
        index, occurrence = index.unique(return_inverse=True)
        places = torch.arange(len(x), device=x.device)
        last = torch.zeros_like(index).scatter_reduce(0, occurrence, places, "amax", include_self=False)
        self.rows[index] = F.normalize(momentum * self.rows[index] + (1 - momentum) * x[last], dim=1)
