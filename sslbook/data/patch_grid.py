"""Nine patches of an image: one from each cell of a 3x3 grid, at a random position inside the cell."""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sslbook import rng
from sslbook.data.views import View
from sslbook.errors import UserError
from sslbook.schedules import Clock

GRID = 3  # rows and columns of cells
NUM_PATCHES = GRID**2
STREAM = rng.METHOD + 600  # methods use the streams from METHOD on


def check_patches(view: View, cell_size: int, patch_size: int) -> None:
    """Checks that nine cells fit into the view and a patch into a cell.

    Raises:
        UserError: one of them does not fit.
    """
    if not 1 <= patch_size <= cell_size:
        raise UserError(
            f"a patch of {patch_size} pixels does not fit into a cell of {cell_size}: "
            f"set patch_size to at least 1 and at most {cell_size}"
        )
    if GRID * cell_size > view.size:
        raise UserError(
            f"{GRID}x{GRID} cells of {cell_size} pixels do not fit into a view of {view.size}: "
            f"set view.size to at least {GRID * cell_size} or cell_size to at most {view.size // GRID}"
        )


def cut_patches(
    images: Float[Tensor, "batch channels height width"],
    index: Int[Tensor, "batch"],
    cell_size: int,
    patch_size: int,
    clock: Clock,
    stream: int = STREAM,
) -> Float[Tensor, "batch 9 channels patch patch"]:
    """One patch from every cell, row by row; the grid is centered on the image.

    A patch smaller than its cell leaves a gap to its neighbors. Its random position makes the width of the gap unknown,
    so that lines continued across the border do not reveal which patches are neighbors (Doersch et al., 2015,
    arXiv:1505.05192, section 3.1).

    Args:
        images: images.
        index: which images these are, for the key.
        cell_size: side of a cell, in pixels.
        patch_size: side of a patch, in pixels.
        clock: its seed and epoch are part of the key.
        stream: the stream of random numbers to use.
    """
    batch, _, height, width = images.shape
    u = rng.uniform(clock.seed, clock.epoch, index, stream, 2 * NUM_PATCHES).double()
    jitter = (u * (cell_size - patch_size + 1)).long().view(batch, 2, NUM_PATCHES)
    cell, pixel = torch.arange(NUM_PATCHES, device=images.device), torch.arange(patch_size, device=images.device)
    top = (height - GRID * cell_size) // 2 + cell // GRID * cell_size + jitter[:, 0]
    left = (width - GRID * cell_size) // 2 + cell % GRID * cell_size + jitter[:, 1]
    rows = (top[:, :, None] + pixel)[:, :, :, None]
    columns = (left[:, :, None] + pixel)[:, :, None, :]
    image = torch.arange(batch, device=images.device)[:, None, None, None]
    return images[image, :, rows, columns].permute(0, 1, 4, 2, 3)
