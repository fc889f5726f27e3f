"""What the chapter adds to the two methods, or takes away from them: preparations of patches, sets of permutations."""

import itertools
from collections.abc import Callable

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from sslbook.data.loader import Batch

Patches = Float[Tensor, "patches 3 height width"]


def normalized(x: Patches) -> Patches:
    """Every patch with mean 0 and standard deviation 1 in each channel (Noroozi and Favaro, 2016)."""
    mean, std = x.mean((2, 3), keepdim=True), x.std((2, 3), keepdim=True)
    return (x - mean) / (std + 1e-3)


def dropped(x: Patches) -> Patches:
    """Two of the three colors, chosen at random for every patch, become faint noise (Doersch et al., 2015)."""
    kept = torch.nn.functional.one_hot(torch.randint(3, (len(x),), device=x.device), 3)[:, :, None, None].to(x.dtype)
    std = (kept * x).sum(1, keepdim=True).std((2, 3), keepdim=True)
    return kept * x + (1 - kept) * 0.01 * std * torch.randn_like(x)


def projected(x: Patches) -> Patches:
    """Colors without their component from green to magenta (Doersch et al., 2015, section 3.1)."""
    a = torch.tensor([-1.0, 2.0, -1.0], device=x.device)
    B = torch.eye(3, device=x.device) - torch.outer(a, a) / (a @ a)
    return torch.einsum("ck,nkhw->nchw", B, x)


class Prepared(nn.Module):
    """A backbone that prepares its patches while it is trained; whole images are left as they are."""

    def __init__(self, backbone: nn.Module, prepare: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.backbone, self.prepare, self.dim = backbone, prepare, getattr(backbone, "dim", 0)

    def forward(self, x: Tensor) -> Tensor:
        return self.backbone(self.prepare(x))


class Blind(nn.Module):
    """A head of relative location that never sees the center: only the neighbor's half of its input."""

    def __init__(self, head: nn.Module) -> None:
        super().__init__()
        self.head = head

    def forward(self, pair: Float[Tensor, "pairs dims"]) -> Float[Tensor, "pairs 8"]:
        center, neighbor = pair.chunk(2, dim=1)
        return self.head(torch.cat([torch.zeros_like(center), neighbor], dim=1))


def without_jitter(batch: Batch, cell: int, patch: int) -> Batch:
    """The nine patches from the middles of their cells, pushed together: cut them with `cell_size=patch`."""
    (x,) = batch.views
    first = (x.shape[-1] - 3 * cell) // 2 + (cell - patch) // 2
    kept = torch.cat([torch.arange(patch) + first + cell * k for k in range(3)]).to(x.device)
    return batch._replace(views=(x[:, :, kept][:, :, :, kept],))


def near_permutations(size: int) -> Int[Tensor, "size 9"]:
    """The identity, then permutations that move two patches, then those that move three: as near as can be."""
    found = [tuple(range(9))]
    for moved in (2, 3):
        for places in itertools.combinations(range(9), moved):
            for order in itertools.permutations(places):
                if all(a != b for a, b in zip(places, order)):
                    one = list(range(9))
                    for place, value in zip(places, order):
                        one[place] = value
                    found.append(tuple(one))
    return torch.tensor(found[:size])
