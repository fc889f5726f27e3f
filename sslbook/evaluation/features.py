"""Features of a whole split, from a frozen backbone: what protocols start from.

Processes divide the images in whole batches, and each gets the features of all: the numbers do not depend on how many
processes there are. All of them must ask for the features.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Literal, NamedTuple

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor, nn
from tqdm.auto import tqdm

from sslbook import distributed
from sslbook.data.loader import Data
from sslbook.data.views import IMAGENET_MEAN, IMAGENET_STD, View
from sslbook.errors import UserError
from sslbook.nn.modes import in_mode
from sslbook.rng import permutation

Split = Literal["train", "test"]
ROWS = 2**13  # sent to the other processes at a time


class Features(NamedTuple):
    """Of every readable image of a split, in order, on the CPU."""

    x: Float[Tensor, "images dim"]
    y: Int[Tensor, "images"]
    """labels, -1 where unlabeled"""
    index: Int[Tensor, "images"]
    """positions in the split, in which unreadable images leave gaps"""


@contextmanager
def frozen(module: nn.Module) -> Iterator[nn.Module]:
    """Evaluation mode without gradients; afterwards every submodule is in exactly the mode it was in before."""
    with in_mode(module, False), torch.no_grad():
        yield module


def device_of(module: nn.Module) -> torch.device:
    """Where the module computes: the device of its first parameter or buffer, the CPU if it has none."""
    return next((tensor.device for tensor in (*module.parameters(), *module.buffers())), torch.device("cpu"))


def center_view(
    size: int,
    mean: tuple[float, ...] = IMAGENET_MEAN,
    std: tuple[float, ...] = IMAGENET_STD,
    *,
    resize: int | None = None,
) -> View:
    """The view for evaluation: the center of an image whose shorter side was resized to 8/7 of `size` (below 128: 1)."""
    if resize is None:
        resize = round(size * 8 / 7) if size >= 128 else size
    return View.center(size, resize=resize, mean=mean, std=std)


def evaluation_view(view: View) -> View:
    """The view for evaluation of a network that is trained with `view`."""
    return center_view(view.size, view.mean, view.std)


def extract_features(
    backbone: nn.Module, data: Data, split: Split, view: View, **options
) -> tuple[Float[Tensor, "images dim"], Int[Tensor, "images"]]:
    """Features and labels alone; see `extract_with_index`, which takes the options."""
    return extract_with_index(backbone, data, split, view, **options)[:2]


def extract_with_index(
    backbone: nn.Module,
    data: Data,
    split: Split,
    view: View,
    *,
    device: torch.device | str | None = None,
    batch_size: int = 256,
    progress: bool = True,
) -> Features:
    """Features, labels and positions of every readable image of a split, in order, on the CPU.

    Labels come with the images: one that cannot be read leaves neither a feature nor a label behind.

    Args:
        backbone: maps images to one vector each; it is left in the mode it came in.
        data: where the images come from.
        split: `train` or `test`.
        view: what becomes of an image, without randomness (`View.center`).
        device: where to compute; by default where the backbone is. The backbone is moved there.
        batch_size: images at a time.
        progress: show a bar.

    Raises:
        UserError: the backbone returns something else than one finite vector per image, or no image is readable.
    """
    desc = f"features of {split}" if progress else None
    rows, index = _collect(backbone, data, split, (view,), 0, device, batch_size, desc)
    return Features(rows[:, 0], data.labels(split)[index], index)


def extract_views(
    backbone: nn.Module,
    data: Data,
    views: tuple[View, ...],
    images: int,
    *,
    seed: int = 0,
    device: torch.device | str | None = None,
    batch_size: int = 256,
) -> Float[Tensor, "some views dim"]:
    """Features of several views, with or without randomness, of training images chosen at random, on the CPU.

    Args:
        backbone: maps images to one vector each; it is left in the mode it came in.
        data: where the images come from.
        views: what becomes of each image.
        images: how many at most.
        seed: key of the choice and of the views.
        device: where to compute; by default where the backbone is.
        batch_size: views at a time.
    """
    size = max(batch_size // len(views), 1)
    return _collect(backbone, some_of(data, images, seed), "train", views, seed, device, size, None)[0]


def _collect(
    backbone: nn.Module,
    data: Data,
    split: Split,
    views: tuple[View, ...],
    seed: int,
    device: torch.device | str | None,
    batch_size: int,
    desc: str | None,
) -> tuple[Float[Tensor, "images views dim"], Int[Tensor, "images"]]:
    """Features of the views of every readable image of a split, and its position; `desc` heads a progress bar."""
    device = device_of(backbone) if device is None else torch.device(device)
    backbone.to(device)
    total = len(data.labels(split))
    rows, shown = torch.empty(0, 0, 0), torch.zeros(total, dtype=torch.int64)
    rank, processes = distributed.rank(), distributed.world_size()
    batches = data.evaluation_batches(split, views, batch_size, device, seed=seed, rank=rank, world_size=processes)
    bar = tqdm(total=total, desc=desc, unit="image", leave=False, disable=desc is None or None)
    with frozen(backbone), bar, torch.autocast(device.type, enabled=False):
        for batch in batches:
            for i, view in enumerate(batch.views):
                output = backbone(view)
                _check(output, len(batch.index))
                if not len(rows):  # one block from the start: a list and its concatenation need twice the memory
                    rows = torch.zeros(total, len(views), output.shape[1])
                rows[batch.index.cpu(), i] = output.float().cpu()
            shown[batch.index.cpu()] = 1
            bar.update(len(batch.index) * processes)
    rows, shown = everywhere(rows, device), everywhere(shown, device)
    for part in distributed.all_gather_object(data.unreadable):
        data.unreadable.update(part)
    index = shown.nonzero()[:, 0]
    if not len(index):
        raise UserError(f"no readable image in the {split} split; check the folder and its files")
    return rows if len(index) == total else rows[index], index


def extract_files(
    backbone: nn.Module,
    count: int,
    load: Callable[[int], Tensor],
    *,
    device: torch.device | str | None = None,
    batch_size: int = 256,
    progress: bool = True,
) -> Float[Tensor, "{count} dim"]:
    """Features of images that a protocol loads itself, on the CPU.

    Args:
        backbone: maps images to one vector each; it is left in the mode it came in.
        count: number of images.
        load: the image of a number from 0 to `count` - 1, normalized, `(3, height, width)`; raises `UnreadableImage`.
        device: where to compute; by default where the backbone is.
        batch_size: images at a time; all of a batch must have one size.
        progress: show a bar.
    """
    device = device_of(backbone) if device is None else torch.device(device)
    backbone.to(device)
    rows, processes = torch.empty(0, 0), distributed.world_size()
    own = torch.arange(count).split(batch_size)[distributed.rank() :: processes]
    with frozen(backbone), torch.autocast(device.type, enabled=False):
        for index in tqdm(own, desc="features", unit="batch", leave=False, disable=not progress or None):
            output = backbone(torch.stack([load(int(i)) for i in index]).to(device))
            _check(output, len(index))
            rows = rows if len(rows) else torch.zeros(count, output.shape[1])
            rows[index] = output.float().cpu()
    return everywhere(rows, device)


def some_of(data: Data, images: int, seed: int) -> Data:
    """The data with at most so many training images, chosen at random by the seed."""
    if data.num_train <= images:
        return data
    return data.split(permutation(seed, 0, len(data.labels("train")))[:images].sort().values)


def everywhere(rows: Shaped[Tensor, "n *rest"], device: torch.device | str) -> Shaped[Tensor, "all *rest"]:
    """Rows of which each process computed some and left the others 0: all of them in every process, on the CPU.

    Args:
        rows: as many in every process, or none where a process had nothing to compute.
        device: where processes can exchange tensors.
    """
    if distributed.world_size() == 1:
        return rows
    shape = distributed.all_reduce_max(torch.tensor(rows.shape, device=device)).tolist()
    rows = rows if len(rows) else torch.zeros(shape, dtype=rows.dtype)
    return torch.cat([distributed.all_reduce_sum(part.to(device)).cpu() for part in rows.split(ROWS)])


def _check(output: object, images: int) -> None:
    if not isinstance(output, Tensor) or output.ndim != 2 or len(output) != images:
        found = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
        raise UserError(f"the backbone returned {found} for {images} images; it must return ({images}, dim)")
    if not torch.isfinite(output).all():
        raise UserError("the backbone's features hold NaN or Inf; its weights have diverged, use an earlier checkpoint")
