"""What happens in loader processes: decode images and crop them, a whole batch at a time."""

import contextlib
import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from jaxtyping import Int
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, get_worker_info

from sslbook.data.datasets.base import ImageSource
from sslbook.data.executors import apply_one, crop_one, sides
from sslbook.data.images import NOTE, UnreadableImage, as_pil
from sslbook.data.views import CropParams, View, sample_crop
from sslbook.errors import UserError, first_line

DECODED_AT_ONCE = 1 << 26  # pixels; an image of a camera has 12 million
MIN_PIXELS = 2  # of a reduced image, for each of the view: fewer, and what the decoder has averaged would show
CURE = (
    "for want of memory, of shared memory (docker run --shm-size 2g) or of open files (ulimit -n 4096): mend that, "
    "or set --data.workers 0"
)
MAX_UNREADABLE_IN_A_ROW = 100  # after so many, the folder is at fault, not an image
NO_IMAGES = torch.empty(0, dtype=torch.int64)


class CroppedBatch(NamedTuple):
    """A batch as a worker returns it."""

    index: Int[Tensor, "batch"] = NO_IMAGES
    """the images whose random parameters were used"""
    shown: Int[Tensor, "batch"] = NO_IMAGES
    """the images in the views: the same, except for those that replace unreadable ones"""
    views: tuple[Tensor, ...] = ()
    unreadable: tuple[tuple[str, str], ...] = ()
    """name and reason"""
    note: str = ""
    """what was left out of an image, such as bits beyond eight"""
    error: str = ""
    """why loading must stop; an exception would arrive as a traceback of many lines"""


@dataclass
class CropDataset(Dataset):
    """Turns `(epoch, positions of a batch)` into that batch of cropped or, if asked, fully augmented views.

    In training the next readable image replaces an unreadable one, wherever and whenever this happens; in evaluation
    an unreadable image is left out.
    """

    source: ImageSource
    views: tuple[View, ...]
    seed: int
    augment: bool
    """whether the photometric steps are applied too, image by image"""
    training: bool

    def __getitem__(self, key: tuple[int, Tensor]) -> CroppedBatch:
        epoch, positions = key
        index: list[int] = []
        shown: list[int] = []
        views: list[list[Tensor]] = [[] for _ in self.views]
        unreadable: list[tuple[str, str]] = []
        note = ""
        try:
            for found in self._chunks(epoch, positions, unreadable):
                kept, replaced, images = zip(*found)
                note = note or next((one.info[NOTE] for one in images if NOTE in getattr(one, "info", ())), "")
                index += kept
                shown += replaced
                for stream, view in enumerate(self.views):
                    views[stream] += self._augment(view, images, epoch, torch.tensor(kept), stream)
        except UserError as error:
            return CroppedBatch(unreadable=tuple(unreadable), error=str(error))
        if not index:
            return CroppedBatch(unreadable=tuple(unreadable))
        if any(len({crop.dtype for crop in one}) > 1 for one in views):
            cure = "store all with the same number of bits"
            return CroppedBatch(error=f"some images have 8 bits a channel, and others of the same batch more: {cure}")
        made = tuple(torch.stack(one) for one in views)
        if get_worker_info() is not None:
            try:  # here, for the queue to the main process would lose a batch that does not fit, and both would wait
                made = tuple(one.share_memory_() for one in made)
            except (RuntimeError, OSError) as error:
                return CroppedBatch(error=f"a loader worker cannot hand over its batch ({_reason(error)}), {CURE}")
        return CroppedBatch(torch.tensor(index), torch.tensor(shown), made, tuple(unreadable), note)

    def _chunks(
        self, epoch: int, positions: Tensor, unreadable: list[tuple[str, str]]
    ) -> Iterator[list[tuple[int, int, Any]]]:
        """Position, position of what is shown there, and decoded image, for as many at once as memory allows."""
        found, pixels = [], 0
        for position in positions.tolist():
            if opened := self._open(epoch, position, unreadable):
                found.append((position, *opened))
                height, width = sides(opened[1][0] if isinstance(opened[1], tuple) else opened[1])  # or with a target
                pixels += height * width
            if pixels > DECODED_AT_ONCE:
                yield found
                found, pixels = [], 0
        if found:
            yield found

    def _open(self, epoch: int, position: int, unreadable: list[tuple[str, str]]) -> tuple[int, Any] | None:
        """The image at `position` or, in training, the next readable one, with its position."""
        attempts = min(MAX_UNREADABLE_IN_A_ROW, len(self.source)) if self.training else 1
        reduction = partial(self._reduction, epoch, torch.tensor([position]))
        for candidate in range(position, position + attempts):
            try:
                image = self.source.open_reduced(candidate % len(self.source), reduction)
                return candidate % len(self.source), as_pil(image)
            except UnreadableImage as error:
                unreadable.append((error.name, error.reason))
        if self.training:
            name, reason = unreadable[-1]
            raise UserError(f"{attempts} images in a row cannot be read, the last is {name} ({reason}): mend them")
        return None

    def _reduction(self, epoch: int, index: Tensor, height: int, width: int) -> int:
        """How many times smaller the image may be decoded: so that every view is still made of more pixels than it has."""
        if min(height, width) < 2 * MIN_PIXELS * max(view.size for view in self.views):
            return 1
        finest = float("inf")
        for stream, view in enumerate(self.views):
            crop = sample_crop(view, self.seed, epoch, index, stream, *torch.tensor([[height], [width]]))
            finest = min(finest, (crop.box[0, 2:] / crop.grid[0, :2]).min().item())
        return next((factor for factor in (8, 4, 2) if finest >= MIN_PIXELS * factor), 1)

    def _augment(self, view: View, images: Sequence[Any], epoch: int, index: Tensor, stream: int) -> list[Tensor]:
        if self.augment:
            return [apply_one(view, image, self.seed, epoch, i, stream) for image, i in zip(images, index.tolist())]
        heights, widths = map(torch.tensor, zip(*map(sides, images)))
        crop = sample_crop(view, self.seed, epoch, index, stream, heights, widths)
        rows = [CropParams(*(values[i : i + 1] for values in crop)) for i in range(len(images))]
        return [crop_one(view, image, row) for image, row in zip(images, rows)]


class CropLoader:
    """A `DataLoader` over batches that are chosen anew for every pass; `persistent` keeps its workers in between."""

    def __init__(
        self, dataset: CropDataset, num_workers: int, start_method: str | None, pin_memory: bool, persistent: bool
    ) -> None:
        self._keys: list[tuple[int, Tensor]] = []
        self._loader = DataLoader(
            dataset,
            batch_size=None,
            sampler=self._keys,
            num_workers=num_workers,
            collate_fn=_identity,
            worker_init_fn=_leave_signals_to_parent,
            pin_memory=pin_memory,
            persistent_workers=persistent and num_workers > 0,
            multiprocessing_context=multiprocessing.get_context(start_method) if num_workers else None,
            generator=torch.Generator(),  # the default would consume a number of torch's own generator
        )

    def batches(self, epoch: int, positions: tuple[Tensor, ...]) -> Iterator[CroppedBatch]:
        """The batches of these images; a worker's death is the `error` of the last one."""
        self._keys[:] = [(epoch, one) for one in positions]
        iterator = None
        for _ in positions:
            try:
                if iterator is None:
                    with _starting_workers():
                        iterator = iter(self._loader)
                batch = next(iterator)
            except (RuntimeError, OSError, EOFError) as error:
                if not (self._loader.num_workers and _is_worker_death(error)):
                    raise
                batch = CroppedBatch(error=f"a loader worker died ({_reason(error)}), {CURE}")
            if batch.error:
                iterator = None
                del self._loader  # ends the other workers
                yield batch
                return
            yield batch


def _identity(item: Any) -> Any:
    return item


def _is_worker_death(error: Exception) -> bool:
    """Whether torch raises this because a worker has died, not because the dataset raised it in a worker."""
    broken_off = isinstance(error, OSError | EOFError)  # while a batch was handed over
    signs = ("DataLoader worker (pid", "Too many open files", "ancillary data", "DataLoader timed out")
    return any(sign in str(error) for sign in signs) or (broken_off and not str(error).startswith("Caught"))


def _reason(error: Exception) -> str:
    return first_line(error).rstrip(". ")[:160]


@contextlib.contextmanager
def _starting_workers() -> Iterator[None]:
    """Block SIGTERM, since a forked worker's first threads inherit that, and keep the handler of SIGCHLD.

    torch's handler raises wherever this process happens to be, in a training step or while a checkpoint is written.
    Without it, `next` notices a dead worker by itself, within five seconds.
    """
    if not hasattr(signal, "sigwaitinfo") or threading.current_thread() is not threading.main_thread():
        yield
        return
    handler = signal.getsignal(signal.SIGCHLD)
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        signal.signal(signal.SIGCHLD, handler)


def _leave_signals_to_parent(worker: int) -> None:
    """Called in a new worker: ignore Ctrl-C, and SIGTERM unless the main process sends it.

    A scheduler sends both to every process of a job. The main process then saves a checkpoint and ends its workers
    itself; a worker that died first would break its last step.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    if not hasattr(signal, "sigwaitinfo") or parent is None:  # macOS, Windows
        return
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})

    def wait(main: int) -> None:
        while signal.sigwaitinfo({signal.SIGTERM}).si_pid != main:
            pass
        os._exit(0)

    threading.Thread(target=wait, args=(parent.pid,), daemon=True).start()
