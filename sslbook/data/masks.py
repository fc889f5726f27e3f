"""Random masks over the patches of an image: uniform, in blocks (BEiT), and in several blocks (I-JEPA).

Every mask is a function of the run's seed, the epoch and the index of the image (`sslbook.rng`).
"""

import math

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from sslbook import distributed, rng
from sslbook.errors import UserError
from sslbook.schedules import Clock

STREAM = rng.METHOD + 500  # one row of random numbers for each attempt at a block; methods use rows from METHOD onwards
ATTEMPTS = 10  # in a row to place a block; after that an image keeps the mask it has


def require_mask(num_masked: int, num_patches: int) -> int:
    """`num_masked`, the number of patches to mask of an image.

    Raises:
        UserError: no patch would be masked, or all of them.
    """
    if not 0 < num_masked < num_patches:
        raise UserError(
            f"masking {num_masked} of {num_patches} patches leaves nothing to {'predict' if num_masked < 1 else 'see'}: "
            f"mask at least 1 and at most {num_patches - 1}, or use smaller patches"
        )
    return num_masked


def uniform_mask(
    index: Int[Tensor, "batch"], num_patches: int, count: int, clock: Clock
) -> Bool[Tensor, "batch {num_patches}"]:
    """True at `count` patches of every image, all subsets of that size being equally likely."""
    order = rng.uniform(clock.seed, clock.epoch, index, rng.METHOD, num_patches).argsort(dim=1, stable=True)
    return torch.zeros_like(order, dtype=torch.bool).scatter(1, order[:, :count], True)


def block_mask(
    index: Int[Tensor, "batch"],
    grid: tuple[int, int],
    num_masked: int | Int[Tensor, "batch"],
    clock: Clock,
    min_block: int = 16,
    min_aspect: float = 0.3,
    exact: bool = False,
    stream: int = STREAM,
) -> Bool[Tensor, "batch patches"]:
    """BEiT's blockwise masks (arXiv:2106.08254, algorithm 1, with the limits of the authors' code), true where masked.

    Rectangles of random area and aspect ratio are laid over the grid until `num_masked` patches are masked. A rectangle
    is rejected and sampled again if it would mask too many patches, does not fit, or masks no new patch. After ten
    rejections in a row the image is left as it is, so that some images have fewer masked patches.

    Args:
        index: of the images in the data set.
        grid: rows and columns of patches.
        num_masked: the greatest number of patches to mask in an image; or one number for each, which may be 0.
        clock: its seed and epoch are part of the key.
        min_block: the smallest area of a rectangle, in patches.
        min_aspect: the smallest ratio of height to width; the greatest is its inverse.
        exact: mask further patches, chosen uniformly, where the rectangles masked fewer than `num_masked`.
        stream: the first row of random numbers to use.

    Raises:
        UserError: no patch would be masked, or all of them.
    """
    height, width = grid
    if isinstance(num_masked, int):
        require_mask(num_masked, height * width)
    device = index.device
    row = torch.arange(height, device=device)[None, :, None]
    column = torch.arange(width, device=device)[None, None, :]
    mask = torch.zeros(len(index), height, width, dtype=torch.bool, device=device)
    failures = torch.zeros(len(index), dtype=torch.int64, device=device)
    attempt = 0
    while True:
        left = num_masked - mask.sum(dim=(1, 2))
        active = (left > 0) & (failures < ATTEMPTS)
        if not active.any():
            break
        u = rng.uniform(clock.seed, clock.epoch, index, stream + attempt, 4).double()
        area = min_block + (left - min_block) * u[:, 0]  # smaller than a smallest block if fewer patches are left
        aspect = torch.exp(math.log(min_aspect) * (1 - 2 * u[:, 1]))
        h, w = (area * aspect).sqrt().round().long(), (area / aspect).sqrt().round().long()
        fits = active & (h < height) & (w < width)
        top, start = ((height - h + 1) * u[:, 2]).long(), ((width - w + 1) * u[:, 3]).long()
        inside = (row >= top[:, None, None]) & (row < (top + h)[:, None, None])
        inside = inside & (column >= start[:, None, None]) & (column < (start + w)[:, None, None])
        num_new = (inside & ~mask).sum(dim=(1, 2))
        accepted = fits & (num_new > 0) & (num_new <= left)
        mask |= inside & accepted[:, None, None]
        failures = torch.where(accepted, 0, failures + 1)
        attempt += 1
    mask = mask.flatten(1)
    if exact:
        order = rng.uniform(clock.seed, clock.epoch, index, stream - 1, mask.shape[1])
        order = (order + mask).argsort(dim=1, descending=True, stable=True)  # masked ones first, then at random
        count = torch.as_tensor(num_masked, device=device).expand(len(index))
        mask = torch.zeros_like(mask).scatter(1, order, torch.arange(mask.shape[1], device=device) < count[:, None])
    return mask


def block_size(
    u: float, grid: tuple[int, int], scale: tuple[float, float], aspect: tuple[float, float]
) -> tuple[int, int]:
    """Height and width of I-JEPA's blocks: one number in [0, 1) sets both the area and the ratio of height to width."""
    area = int(grid[0] * grid[1] * (scale[0] + u * (scale[1] - scale[0])))
    ratio = aspect[0] + u * (aspect[1] - aspect[0])
    height, width = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
    return max(1, min(height, grid[0] - 1)), max(1, min(width, grid[1] - 1))


def multi_block_mask(
    index: Int[Tensor, "batch"],
    grid: tuple[int, int],
    clock: Clock,
    num_targets: int = 4,
    target_scale: tuple[float, float] = (0.15, 0.2),
    target_aspect: tuple[float, float] = (0.75, 1.5),
    context_scale: tuple[float, float] = (0.85, 1.0),
    stream: int = STREAM,
) -> tuple[Int[Tensor, "batch context"], Int[Tensor, "batch targets patches"]]:
    """I-JEPA's masks (arXiv:2301.08243, section 3): the patches of a context, and those of several target blocks.

    The patches of an image's targets are removed from its context block. All blocks of a step have the same size, and no
    block begins at the last row or column where it would fit; both are as in the authors' code. A batch needs contexts
    of one length, so each is cut to the shortest of all processes, and its first patches are kept. Where a context
    would be too short, the authors' code lets targets overlap it; here that is an error.

    Args:
        index: of the images in the data set.
        grid: rows and columns of patches.
        clock: seed and epoch key the positions of the blocks, the step their size.
        num_targets: number of target blocks, which may overlap.
        target_scale: range of a target block's area, as a fraction of the image.
        target_aspect: range of its height divided by its width.
        context_scale: range of the context block's area, as a fraction of the image.
        stream: the first row of random numbers to use.

    Raises:
        UserError: the targets of some image leave no context.
    """
    rows, columns = grid
    step = torch.tensor([clock.step], device=index.device)
    sizes = rng.uniform(clock.seed, clock.epoch, step, stream, 2)[0].tolist()
    height, width = block_size(sizes[0], grid, target_scale, target_aspect)
    context_height, context_width = block_size(sizes[1], grid, context_scale, (1.0, 1.0))
    u = rng.uniform(clock.seed, clock.epoch, index, stream + 1, 2 * num_targets + 2)

    top, left = (u[:, :-2:2] * (rows - height)).long(), (u[:, 1:-2:2] * (columns - width)).long()
    patch = torch.arange(height * width, device=index.device)
    patch = patch // width * columns + patch % width  # of a block in the upper left corner
    targets = (top * columns + left)[:, :, None] + patch

    top, left = (u[:, -2:-1] * (rows - context_height)).long(), (u[:, -1:] * (columns - context_width)).long()
    patch = torch.arange(rows * columns, device=index.device)
    row, column = patch // columns, patch % columns
    context = (row >= top) & (row < top + context_height) & (column >= left) & (column < left + context_width)
    context = context.scatter(1, targets.flatten(1), False)
    shortest = -int(distributed.all_reduce_max(-context.sum(dim=1).min()))
    if shortest < 1:
        raise UserError(
            f"{num_targets} target blocks of {height}x{width} leave no context in {rows}x{columns} patches: "
            "use fewer or smaller targets, or smaller patches"
        )
    order = (~context).long().argsort(dim=1, stable=True)  # the context's patches first, row by row
    return order[:, :shortest], targets
