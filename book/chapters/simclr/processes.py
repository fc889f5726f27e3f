"""What the chapter *SimCLR* runs in two processes."""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from sslbook import distributed
from sslbook.methods import simclr


def shard_gradients(
    z_1: Float[Tensor, "n dim"], z_2: Float[Tensor, "n dim"], temperature: float
) -> dict[str, tuple[float, Tensor]]:
    """Loss and gradient for this process's rows of `z_1`, with and without gradient through the gathered rows.

    For `distributed.launch`: every process gets all rows and works on its own, as if its network had just computed
    them. The gradient is the one of data-parallel training, which divides by the number of processes.
    """
    processes, rank = distributed.world_size(), distributed.rank()
    own = slice(rank * len(z_1) // processes, (rank + 1) * len(z_1) // processes)
    found = {}
    for name, loss_fn in (("gather_with_grad", simclr.nt_xent), ("gather", nt_xent_detached)):
        mine_1, mine_2 = (z[own].clone().requires_grad_() for z in (z_1, z_2))
        loss = loss_fn(mine_1, mine_2, temperature)
        (gradient,) = torch.autograd.grad(loss, mine_1)
        found[name] = distributed.all_reduce_mean(loss.detach()).item(), gradient / processes
    return found


def nt_xent_detached(z_1: Float[Tensor, "n dim"], z_2: Float[Tensor, "n dim"], temperature: float) -> Float[Tensor, ""]:
    """The mistake: candidates are gathered as constants, so that a row learns as an anchor only."""
    first = distributed.rank() * len(z_1)
    positive = first + torch.arange(len(z_1))
    z_1, z_2 = F.normalize(z_1, dim=1), F.normalize(z_2, dim=1)
    loss = z_1.new_zeros(())
    for anchor, other in ((z_1, z_2), (z_2, z_1)):
        s_same = anchor @ distributed.all_gather(anchor.detach()).T
        s_same = s_same.diagonal_scatter(torch.full_like(s_same[:, 0], -torch.inf), offset=first)
        s_other = anchor @ distributed.all_gather(other.detach()).T
        loss = loss + F.cross_entropy(torch.cat([s_other, s_same], dim=1) / temperature, positive)
    return loss
