"""Checks for the chapter *MAE*."""

from collections.abc import Callable

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor

from sslbook.nn.patches import normalize_patches
from sslbook.notebook.exercises import Check, exercise


@exercise
def patchify(check: Check, answer: Callable) -> None:
    """`answer(x, P) -> patches`, row by row, within a patch pixel by pixel with its colors last."""
    x = check.random(2, 3, 8, 12)
    patches = check.call(answer, x, 4)
    check.shape(patches, (2, 6, 48), "8 x 12 pixels hold 2 x 3 patches of 4 * 4 * 3 values")

    def cut(pattern: str) -> Tensor:
        return rearrange(x, f"n c (h p) (w q) -> n {pattern}", p=4, q=4)

    check.close(
        patches,
        cut("(h w) (p q c)"),
        mistakes={
            "reshape alone cuts strips of numbers, not squares: permute before the last reshape": x.reshape(2, 6, 48),
            "the colors come first within a patch: move their axis to the very end": cut("(h w) (c p q)"),
            "patches are counted column by column: rows of patches come first": cut("(w h) (p q c)"),
            "the pixels of a patch are transposed: its rows come before its columns": cut("(h w) (q p c)"),
        },
        what="values",
    )


@exercise
def mask(check: Check, answer: Callable) -> None:
    """`answer(u, keep) -> (visible, restore)`."""
    u = check.random(4, 9).sigmoid()
    order = u.argsort(dim=1)
    returned = check.call(answer, u, 3)
    check.that(isinstance(returned, tuple) and len(returned) == 2, "return two tensors: visible, restore")
    visible, restore = returned
    check.shape(visible, (4, 3), "exactly `keep` indices for every image")
    check.shape(restore, (4, 9), "one position for every patch")
    check.dtype(visible, torch.int64, "indices of patches")
    check.close(
        visible,
        order[:, :3],
        mistakes={
            "these are ranks, not indices: sort once for the visible patches": order.argsort(dim=1)[:, :3],
            "these are the indices of the largest numbers: take the first of the sorted order": order[:, -3:],
            "these are the indices of the largest numbers, largest first: take the smallest": order.flip(1)[:, :3],
        },
        what="visible indices",
    )
    check.close(
        restore,
        order.argsort(dim=1),
        mistakes={"this is the sorting order itself; its inverse is its own argsort": order},
        what="inverse permutation",
    )


@exercise
def loss(check: Check, answer: Callable) -> None:
    """`answer(prediction, patches, mask) -> scalar`."""
    prediction, patches = check.random(3, 8, 12), 2 * check.random(3, 8, 12) + 1
    masked = torch.zeros(3, 8)
    masked[:, [0, 2, 3, 5, 6, 7]] = 1
    value = check.call(answer, prediction, patches, masked)
    check.shape(value, (), "one number for the batch")

    def mean(target: Float[Tensor, "n l v"], weight: Float[Tensor, "n l"]) -> Tensor:
        return ((prediction - target).square().mean(2) * weight).sum() / weight.sum()

    variance, center = torch.var_mean(patches, dim=2, correction=0, keepdim=True)
    target = normalize_patches(patches)
    over_batch = (patches - patches.mean()) / patches.std()
    check.close(
        value,
        mean(target, masked),
        mistakes={
            "divided by all patches: divide by the number of masked ones, mask.sum()": mean(target, masked) * 6 / 8,
            "averaged over all patches: multiply by the mask": mean(target, torch.ones(3, 8)),
            "the visible patches are scored: 1 means masked": mean(target, 1 - masked),
            "the target is not normalized": mean(patches, masked),
            "normalized over the whole batch: each patch has its own mean and variance": mean(over_batch, masked),
            "biased variance: torch.var_mean divides by the number of values less one": mean(
                (patches - center) / (variance + 1e-6).sqrt(), masked
            ),
            "divided by the variance: take its root": mean(
                (patches - center) / (patches.var(2, keepdim=True) + 1e-6), masked
            ),
            "summed over the values of a patch: take their mean": mean(target, masked) * 12,
        },
        what="loss",
    )


@exercise
def block(check: Check, answer: Callable) -> None:
    """`answer(top, left, height, width, grid) -> mask`."""
    top, left = check.integers(3, 5), check.integers(2, 5)
    top[0], left[0] = 2, 0
    masks = check.call(answer, top, left, 3, 2, 5)
    check.shape(masks, (5, 25), "one number for each of grid * grid patches, row by row")

    def inside(top: Tensor, left: Tensor, height: int, width: int) -> Tensor:
        i = torch.arange(5)
        rows = (i >= top[:, None]) & (i < top[:, None] + height)
        columns = (i >= left[:, None]) & (i < left[:, None] + width)
        return (rows[:, :, None] & columns[:, None]).flatten(1).float()

    expected = inside(top, left, 3, 2)
    check.close(
        masks,
        expected,
        mistakes={
            "1 means masked: the rectangle itself, not what is around it": 1 - expected,
            "rows and columns are swapped": expected.reshape(5, 5, 5).transpose(1, 2).flatten(1),
            "one row and one column too many: the end is not included": inside(top, left, 4, 3),
            "height and width are swapped": inside(top, left, 2, 3),
        },
        what="mask",
    )
