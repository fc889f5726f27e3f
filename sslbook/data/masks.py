"""Which patches of a picture are hidden, in blocks, by keyed chance."""

import math

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from sslbook import chance
from sslbook.errors import UserError
from sslbook.schedules import Clock

STREAM = chance.METHOD + 500  # one row of chance for each attempt at a block; methods draw from METHOD onwards
ATTEMPTS = 10  # at a block, after which a picture is left as it is


def block_mask(
    index: Int[Tensor, "batch"],
    grid: tuple[int, int],
    num_masked: int,
    clock: Clock,
    min_block: int = 16,
    min_aspect: float = 0.3,
    exact: bool = False,
    stream: int = STREAM,
) -> Bool[Tensor, "batch patches"]:
    """BEiT's blockwise masks (arXiv:2106.08254, algorithm 1, with the limits of the authors' code), true where hidden.

    Rectangles of random area and aspect ratio are laid over the grid until `num_masked` patches are hidden; one that
    would hide more, that does not fit or that hides nothing new is drawn again, and after ten failures in a row the
    picture is left as it is, so that some have fewer hidden patches.

    Args:
        index: which pictures.
        grid: rows and columns of patches.
        num_masked: the greatest number of patches to hide in a picture.
        clock: its seed and epoch are part of the key.
        min_block: the smallest area of a rectangle, in patches.
        min_aspect: the smallest ratio of height to width; the greatest is its inverse.
        exact: hide further patches by chance where the rectangles hid fewer.
        stream: the first row of chance to use.

    Raises:
        UserError: nothing would be hidden, or everything.
    """
    height, width = grid
    if not 0 < num_masked < height * width:
        raise UserError(
            f"hiding {num_masked} of {height * width} patches leaves nothing to "
            f"{'predict' if num_masked < 1 else 'see'}: hide at least 1 and at most {height * width - 1}"
        )
    device = index.device
    row = torch.arange(height, device=device)[None, :, None]
    column = torch.arange(width, device=device)[None, None, :]
    mask = torch.zeros(len(index), height, width, dtype=torch.bool, device=device)
    failures = torch.zeros(len(index), dtype=torch.int64, device=device)
    attempt = 0
    while True:
        left = num_masked - mask.sum(dim=(1, 2))
        trying = (left > 0) & (failures < ATTEMPTS)
        if not trying.any():
            break
        u = chance.uniform(clock.seed, clock.epoch, index, stream + attempt, 4).double()
        area = min_block + (left - min_block) * u[:, 0]  # below a smallest block too, where less is left to hide
        aspect = torch.exp(math.log(min_aspect) * (1 - 2 * u[:, 1]))
        h, w = (area * aspect).sqrt().round().long(), (area / aspect).sqrt().round().long()
        fits = trying & (h < height) & (w < width)
        top, start = ((height - h + 1) * u[:, 2]).long(), ((width - w + 1) * u[:, 3]).long()
        inside = (row >= top[:, None, None]) & (row < (top + h)[:, None, None])
        inside = inside & (column >= start[:, None, None]) & (column < (start + w)[:, None, None])
        new = (inside & ~mask).sum(dim=(1, 2))
        good = fits & (new > 0) & (new <= left)
        mask |= inside & good[:, None, None]
        failures = torch.where(good, 0, failures + 1)
        attempt += 1
    mask = mask.flatten(1)
    if exact:
        order = chance.uniform(clock.seed, clock.epoch, index, stream - 1, mask.shape[1])
        order = (order + mask).argsort(dim=1, descending=True, stable=True)  # hidden ones first, then by chance
        mask = torch.zeros_like(mask).scatter(1, order[:, :num_masked], True)
    return mask
