"""An image as nine patches: one from each cell of a 3x3 grid, at a random place inside it."""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sslbook import rng
from sslbook.data.views import View
from sslbook.errors import UserError
from sslbook.schedules import Clock

SIDE = 3  # cells in a row of the grid
PLACES = SIDE**2
STREAM = rng.METHOD + 600  # methods draw from METHOD onwards


def check_patches(view: View, cell_size: int, patch_size: int) -> None:
    """A `UserError` unless nine cells fit into the view and a patch into a cell."""
    if not 1 <= patch_size <= cell_size:
        raise UserError(
            f"a patch of {patch_size} pixels does not fit into a cell of {cell_size}: "
            f"set patch_size to at least 1 and at most {cell_size}"
        )
    if SIDE * cell_size > view.size:
        raise UserError(
            f"{SIDE}x{SIDE} cells of {cell_size} pixels do not fit into a view of {view.size}: "
            f"set view.size to at least {SIDE * cell_size} or cell_size to at most {view.size // SIDE}"
        )


def cut_patches(
    images: Float[Tensor, "batch channels height width"],
    index: Int[Tensor, "batch"],
    cell_size: int,
    patch_size: int,
    clock: Clock,
    stream: int = STREAM,
) -> Float[Tensor, "batch 9 channels patch patch"]:
    """One patch from every cell, row by row; the grid lies in the middle of the image.

    A patch smaller than its cell leaves a gap to its neighbors, and its random place makes the gap's width unknown:
    lines that go on across the border do not tell who lies beside whom.

    Args:
        images: images.
        index: which images these are, for the key.
        cell_size: side of a cell, in pixels.
        patch_size: side of a patch.
        clock: its seed and epoch are part of the key.
        stream: the row of random numbers to use.
    """
    batch, _, height, width = images.shape
    u = rng.uniform(clock.seed, clock.epoch, index, stream, 2 * PLACES).double()
    jitter = (u * (cell_size - patch_size + 1)).long().view(batch, 2, PLACES)
    place, pixel = torch.arange(PLACES, device=images.device), torch.arange(patch_size, device=images.device)
    top = (height - SIDE * cell_size) // 2 + place // SIDE * cell_size + jitter[:, 0]
    left = (width - SIDE * cell_size) // 2 + place % SIDE * cell_size + jitter[:, 1]
    rows = (top[:, :, None] + pixel)[:, :, :, None]
    columns = (left[:, :, None] + pixel)[:, :, None, :]
    image = torch.arange(batch, device=images.device)[:, None, None, None]
    return images[image, :, rows, columns].permute(0, 1, 4, 2, 3)
