"""Queue of the latest features: first in, first out (MoCo, NNCLR)."""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from sslbook import distributed


class Queue(nn.Module):
    """A ring buffer of the last `size` rows pushed by all processes together, in float32.

    It starts as random unit vectors, the same in every process.

    Args:
        size: rows kept.
        dim: width of a row.
    """

    rows: Tensor
    pointer: Tensor

    def __init__(self, size: int, dim: int) -> None:
        super().__init__()
        start = torch.randn(size, dim, generator=torch.Generator().manual_seed(0))
        self.register_buffer("rows", F.normalize(start, dim=1))
        self.register_buffer("pointer", torch.zeros((), dtype=torch.int64))

    @torch.no_grad()
    def push(self, x: Float[Tensor, "n dim"]) -> None:
        """Replaces the oldest rows by those of all processes; wraps around where they do not fit evenly."""
        x = distributed.all_gather(x.float())
        size = len(self.rows)
        position = (self.pointer + torch.arange(len(x), device=x.device)) % size
        # Of more rows than the ring holds only the last remain: two writes to one position would race.
        self.rows[position[-size:]] = x[-size:]
        self.pointer.add_(len(x)).remainder_(size)
