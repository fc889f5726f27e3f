"""Batches of views.

Small sets lie on the training device as bytes and become views there, a batch at a time; no loader process is involved.
Images in files are decoded and cut by worker processes, and colored on the device. Either way a view is a function of
`(seed, epoch, index, stream)`: workers, processes and restarts change none.
"""

import multiprocessing
import os
import signal
import threading
import warnings
from collections.abc import Callable, Iterator
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Int
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from sslbook.data.datasets.shapes import Shapes
from sslbook.data.images import ImageSource, InMemory, UnreadableImage
from sslbook.data.sets import Splits, load_folder, load_named, load_shapes
from sslbook.data.views import CropParams, View, apply_batch, apply_color, apply_one, as_pil, crop_one, sample_params
from sslbook.errors import UserError
from sslbook.rng import permutation

RESIDENT_BYTES = 4 * 2**30  # a set up to this size lies on the training device
DECODED_AT_ONCE = 8  # images of a camera are 36 MB each once decoded
UNREADABLE_IN_A_ROW = 100  # so many, and the folder is at fault, not an image


class Batch(NamedTuple):
    """What a method gets."""

    views: tuple[Tensor, ...]
    """one tensor `(batch, 3, size, size)` for each view"""
    index: Int[Tensor, "batch"]
    """which images these are: their positions among the training images"""
    label: Int[Tensor, "batch"]
    """their classes, -1 where unlabeled; for evaluation, no method reads them"""


class Data:
    """Images to learn from and to be judged on.

    Args:
        name: `shapes` (embedded, needs nothing), cifar10, cifar100, stl10, fashion_mnist, imagenette, imagenet, or the
            import path of a map-style dataset class, such as `my.module.MyDataset`.
        folder: a folder of images instead, labeled (one subfolder a class) or not, with or without `train/` and
            `test/`.
        root: where the named sets lie.
        shapes: the Shapes data set's knobs.
        download: let torchvision fetch a named set that is not there.
        limit: learn from so many of the training images only, chosen at random, always the same.
        strict: stop at an image that cannot be read, instead of skipping and counting it.
        augment: `device` cuts in the workers and colors on the device, and keeps small sets on the device altogether;
            `workers` does everything per image in the workers.
        workers: processes that decode images; null means one for each core, at most 8.
        start_method: how these processes start; null means Python's choice.
    """

    def __init__(
        self,
        name: str = "shapes",
        folder: Path | None = None,
        root: Path = Path("data"),
        shapes: Shapes = Shapes(),
        download: bool = False,
        limit: int | None = None,
        strict: bool = False,
        augment: Literal["device", "workers"] = "device",
        workers: int | None = None,
        start_method: Literal["fork", "spawn", "forkserver"] | None = None,
    ) -> None:
        if folder is not None and name != "shapes":
            raise UserError(f"both data.name={name} and data.folder={folder}: give one of them")
        if limit is not None and limit < 1:
            raise UserError(f"data.limit is {limit}: ask for at least 1 image, or leave it out")
        if workers is not None and workers < 0:
            raise UserError(f"data.workers is {workers}: give 0 (decode in the main process) or more")
        self.name = name if folder is None else Path(folder).expanduser().resolve().name
        self.folder = folder
        self.root = root
        self.shapes = shapes
        self.download = download
        self.limit = limit
        self.strict = strict
        self.augment = augment
        self.workers = _default_workers() if workers is None else workers
        self.start_method = start_method
        self.unreadable: dict[str, str] = {}
        """images that could not be read so far in this process, and why"""
        self._on_device: dict[tuple[int, str], Tensor] = {}
        self._idle: tuple[Any, DataLoader, _Keys] | None = None
        if folder is not None or name != "shapes":
            _ = self._splits  # what is missing shows at once; Shapes always is there, and is drawn when it is needed

    @cached_property
    def _splits(self) -> Splits:
        if self.folder is not None:
            sets = load_folder(self.folder)
        elif self.name == "shapes":
            sets = load_shapes(self.shapes)
        else:
            sets = load_named(self.name, self.root, self.download)
        if self.limit is None:
            return sets

        def some(source: ImageSource) -> Tensor:
            return permutation(0, 0, len(source))[: self.limit].sort().values

        train = sets.train.subset(some(sets.train))
        pretrain = train if sets.pretrain is sets.train else sets.pretrain.subset(some(sets.pretrain))
        factors = dict(sets.factors)
        if "train" in factors:
            factors["train"] = {key: values[some(sets.train)] for key, values in factors["train"].items()}
        return Splits(pretrain, train, sets.test, sets.class_names, factors)

    @property
    def num_train(self) -> int:
        """Images to learn from."""
        return len(self._splits.pretrain)

    @property
    def num_test(self) -> int:
        """Images to be judged on; 0 if there are none."""
        return 0 if self._splits.test is None else len(self._splits.test)

    @property
    def class_names(self) -> tuple[str, ...]:
        """Names of the classes, in the order of their numbers; empty if unlabeled."""
        return self._splits.class_names

    @property
    def num_classes(self) -> int:
        """0 if unlabeled."""
        return len(self.class_names)

    @property
    def measurable(self) -> bool:
        """Whether there are classes to tell apart, and test images that are labeled."""
        return self.num_classes > 1 and self.num_test > 0 and bool((self.labels("test") >= 0).any())

    @property
    def skipped(self) -> int:
        """Different images that could not be read so far."""
        return len(self.unreadable)

    @property
    def size(self) -> int | None:
        """Shorter side of the images if they all have the same, else nothing."""
        source = self._splits.pretrain
        return min(source.images.shape[2:]) if isinstance(source, InMemory) else None

    def labels(self, split: Literal["pretrain", "train", "test"]) -> Int[Tensor, "images"]:
        """Classes of all images of a split; `Batch.index` of its evaluation batches points into it."""
        return self._source(split).labels

    def factors(self, split: Literal["train", "test"]) -> dict[str, Tensor]:
        """What the Shapes data set drew into each image; empty for other data."""
        return self._splits.factors.get(split, {})

    def image(self, split: Literal["train", "test"], position: int) -> Any:
        """One image as it is, as a PIL image in mode RGB."""
        return as_pil(self._source(split).open(position)).convert("RGB")

    def describe(self) -> str:
        """One line: `clothing-160: 3,068 training images, 10 classes, 372 test images`."""
        parts = [f"{self.num_train:,} training images"]
        if len(self._splits.train) != self.num_train:
            parts.append(f"{len(self._splits.train):,} of them labeled")
        parts.append(f"{self.num_classes} classes" if self.num_classes else "no labels")
        parts.append(f"{self.num_test:,} test images" if self.num_test else "no test images")
        return f"{self.name}: {', '.join(parts)}"

    def _source(self, split: str) -> ImageSource:
        if split not in ("pretrain", "train", "test"):
            raise UserError(f"there is no split {split!r}: choose train or test")
        source = {"pretrain": self._splits.pretrain, "train": self._splits.train, "test": self._splits.test}[split]
        if source is None:
            raise UserError(f"{self.name} has no test images: put some into a folder test/ beside train/")
        return source

    # Training ---------------------------------------------------------------------------------------------------------

    def steps_per_epoch(self, batch_size: int) -> int:
        """Batches in one pass; the last incomplete one is dropped."""
        if batch_size < 1:
            raise UserError(f"a batch of {batch_size} images: give at least 1")
        if batch_size > self.num_train:
            raise UserError(f"a batch of {batch_size} is more than the {self.num_train} images: use a smaller one")
        return self.num_train // batch_size

    def batches(
        self,
        views: tuple[View, ...],
        batch_size: int,
        *,
        seed: int,
        epoch: int,
        start: int = 0,
        stop: int | None = None,
        rank: int = 0,
        world_size: int = 1,
        device: str | torch.device = "cpu",
        order: Int[Tensor, "images"] | None = None,
    ) -> Iterator[Batch]:
        """One epoch of views, from batch number `start`.

        Args:
            views: what each image becomes.
            batch_size: images in a batch over all processes.
            seed: of the order and of the views.
            epoch: of the order and of the views.
            start: batches to pass over, after a restart.
            stop: how many batches the epoch has, those passed over included; by default all that can be filled.
            rank: which part of every batch this process takes.
            world_size: number of processes.
            device: where the views are wanted.
            order: which images to show, in order, at least as many as fill the epoch; by default each once, shuffled.
        """
        steps = self.steps_per_epoch(batch_size)
        if batch_size % world_size:
            raise UserError(f"a batch of {batch_size} does not divide among {world_size} processes: use a multiple")
        order = permutation(seed, epoch, self.num_train) if order is None else order.cpu()
        mine = list(order[: steps * batch_size].view(steps, world_size, -1)[start:stop, rank])
        return self._run(self._splits.pretrain, views, mine, seed, epoch, torch.device(device), training=True)

    def evaluation_batches(
        self,
        split: Literal["pretrain", "train", "test"],
        view: View | None = None,
        batch_size: int = 256,
        device: str | torch.device = "cpu",
        *,
        rank: int = 0,
        world_size: int = 1,
    ) -> Iterator[Batch]:
        """Every image of a split once, in order; unreadable ones are left out.

        Args:
            split: train or test, or pretrain: all that is learned from, which may be more than is labeled.
            view: what an image becomes; by default its center, at its own size or (files) at 224 of 256 pixels.
            batch_size: images in a batch.
            device: where the views are wanted.
            rank: which of the batches this process takes: every `world_size`-th from here on.
            world_size: processes that share the batches.
        """
        source = self._source(split)
        if view is None:
            view = View.center(self.size) if self.size else View.center(224, resize=256)
        parts = list(torch.arange(len(source)).split(batch_size))[rank::world_size]
        return self._run(source, (view,), parts, 0, 0, torch.device(device), training=False)

    def _run(
        self,
        source: ImageSource,
        views: tuple[View, ...],
        parts: list[Tensor],
        seed: int,
        epoch: int,
        device: torch.device,
        training: bool,
    ) -> Iterator[Batch]:
        if isinstance(source, InMemory) and self.augment == "device":
            return self._from_memory(source, views, parts, seed, epoch, device)
        return self._from_workers(source, views, parts, seed, epoch, device, training)

    def _from_memory(
        self,
        source: InMemory,
        views: tuple[View, ...],
        parts: list[Tensor],
        seed: int,
        epoch: int,
        device: torch.device,
    ) -> Iterator[Batch]:
        images = source.images
        if images.nbytes <= RESIDENT_BYTES:
            key = (id(source), str(device))
            if key not in self._on_device:
                self._on_device[key] = images.to(device)
            images = self._on_device[key]
        for index in parts:
            chosen = images[index.to(images.device)].to(device)
            made = tuple(apply_batch(view, chosen, seed, epoch, index, stream) for stream, view in enumerate(views))
            yield Batch(made, index.to(device), source.labels[index].to(device))

    def _from_workers(
        self,
        source: ImageSource,
        views: tuple[View, ...],
        parts: list[Tensor],
        seed: int,
        epoch: int,
        device: torch.device,
        training: bool,
    ) -> Iterator[Batch]:
        if not parts:
            return
        loader, keys, give_back = self._take_loader(
            _CropDataset(source, views, seed, self.augment, training), device, len(parts)
        )
        keys.refill(epoch, parts)
        cuts = _start(loader)
        for number in range(len(parts)):
            cut: _CroppedBatch | UserError
            try:
                cut = next(cuts)
            except (RuntimeError, OSError, EOFError) as error:
                died = worker_died(error) if loader.num_workers else None
                if died is None:
                    raise
                cut = died
            if isinstance(cut, UserError):
                del cuts, loader, give_back  # ends the other workers
                raise cut
            if number == len(parts) - 1:
                give_back()  # before the last yield: a caller that counts never comes back for the end
            self._note(cut.unreadable)
            if not len(cut.key):
                continue
            made = [view.to(device, non_blocking=True) for view in cut.views]
            if self.augment == "device":
                made = [
                    apply_color(v, pixels, seed, epoch, cut.key, i) for i, (v, pixels) in enumerate(zip(views, made))
                ]
            yield Batch(tuple(made), cut.shown.to(device), source.labels[cut.shown].to(device))

    def _take_loader(
        self, cutter: "_Cutter", device: torch.device, parts: int
    ) -> tuple[DataLoader, "_Keys", Callable[[], None]]:
        """A loader for the task, and what to call at the end. In training its processes live on to the next epoch."""
        training, pin = cutter.replace, device.type == "cuda"
        key = (id(cutter.source), cutter.views, cutter.seed, cutter.augment, pin)
        if training and self._idle is not None and self._idle[0] == key:
            _, loader, keys = self._idle
            self._idle = None  # not twice at once
        else:
            keys = _Keys()
            workers = min(self.workers, parts) if not training else self.workers
            loader = DataLoader(
                cutter,
                batch_size=None,
                sampler=keys,
                num_workers=workers,
                collate_fn=_same,
                worker_init_fn=_heed_only_parent,
                pin_memory=pin,
                persistent_workers=training and workers > 0,
                multiprocessing_context=multiprocessing.get_context(self.start_method) if workers else None,
                generator=torch.Generator(),  # else it takes a number from torch's own: a resumed run would differ
            )

        def give_back() -> None:
            if training:
                self._idle = (key, loader, keys)

        return loader, keys, give_back

    def _note(self, unreadable: list[tuple[str, str]]) -> None:
        for name, reason in unreadable:
            if self.strict or not name:
                raise UnreadableImage(name, reason) if name else UserError(reason)
            if not self.unreadable:
                warnings.warn(
                    f"skipped the unreadable image {name} ({reason}); further ones are counted silently",
                    stacklevel=2,
                )
            self.unreadable[name] = reason

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_on_device": {}, "_idle": None}


def _start(loader: DataLoader) -> Iterator[Any]:
    """`iter(loader)`, such that a dead worker is reported by `next`.

    torch installs a handler of SIGCHLD that raises wherever the main process happens to be, in a training step or in
    the writing of a checkpoint, and again at the end of any other child. Without it, `next` finds the death out by
    itself, within five seconds.
    """
    if not hasattr(signal, "SIGCHLD") or threading.current_thread() is not threading.main_thread():
        return iter(loader)
    handler = signal.getsignal(signal.SIGCHLD)
    # Workers are born with SIGTERM blocked: a thread of theirs that began before `_heed_only_parent` would not have it.
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM} if hasattr(signal, "sigwaitinfo") else ())
    try:
        return iter(loader)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        signal.signal(signal.SIGCHLD, handler)


def worker_died(error: Exception) -> UserError | None:
    """The message for a user if `error` is what torch raises when a loader worker has died; else nothing."""
    reported = isinstance(error, RuntimeError) and "DataLoader worker (pid" in str(error)
    broken_off = isinstance(error, ConnectionError | FileNotFoundError | EOFError)  # while a batch was handed over
    if not reported and (
        not broken_off or str(error).startswith("Caught")
    ):  # torch's word for the dataset's own errors
        return None
    return UserError(
        "a loader worker died (often for want of memory, or of /dev/shm): try a lower --data.workers, or 0"
    )


def _default_workers() -> int:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(8, max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))))


def _heed_only_parent(worker: int) -> None:
    """Called in a new worker: let Ctrl-C and a SIGTERM to the whole process group reach the main process alone.

    It then saves and ends the workers itself; a worker that died first would break the last step.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if not hasattr(signal, "sigwaitinfo"):  # macOS, Windows
        return
    parent = os.getppid()
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})

    def wait() -> None:
        while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent:
            pass
        os._exit(0)

    threading.Thread(target=wait, daemon=True).start()


class _Keys:
    """The sampler: which images of which epoch come next. It is refilled before every epoch."""

    def __init__(self) -> None:
        self.keys: list[tuple[int, Tensor]] = []

    def refill(self, epoch: int, parts: list[Tensor]) -> None:
        self.keys = [(epoch, index) for index in parts]

    def __iter__(self) -> Iterator[tuple[int, Tensor]]:
        return iter(self.keys)

    def __len__(self) -> int:
        return len(self.keys)


def _same(item: Any) -> Any:
    return item


class _CroppedBatch(NamedTuple):
    """What a worker hands over."""

    key: Int[Tensor, "batch"]
    """the indices that the views were drawn with"""
    shown: Int[Tensor, "batch"]
    """the images they show: the same, but for those put in the place of unreadable ones"""
    views: list[Tensor]
    unreadable: list[tuple[str, str]]
    """name and reason; an empty name means that there is no going on"""


class _CropDataset(Dataset):
    """What a worker does, a whole batch at a time: decode, cut and, if asked, color.

    In training the next readable image takes the place of an unreadable one, wherever and whenever this happens;
    in evaluation its place stays empty.
    """

    def __init__(
        self,
        source: ImageSource,
        views: tuple[View, ...],
        seed: int,
        augment: Literal["device", "workers"],
        replace: bool,
    ) -> None:
        self.source = source
        self.views = views
        self.seed = seed
        self.augment = augment
        self.replace = replace

    def __getitem__(self, index: tuple[int, Tensor]) -> _CroppedBatch:
        epoch, positions = index
        key: list[int] = []
        shown: list[int] = []
        made: list[list[Tensor]] = [[] for _ in self.views]
        unreadable: list[tuple[str, str]] = []
        for part in positions.split(DECODED_AT_ONCE):
            kept, images = [], []
            for position in part.tolist():
                found = self._open(position, unreadable)
                if found is not None:
                    kept.append(position)
                    shown.append(found[0])
                    images.append(found[1])
            key += kept
            for stream, view in enumerate(self.views if kept else ()):
                made[stream] += self._make(view, images, epoch, torch.tensor(kept), stream)
        views = [torch.stack(one) for one in made] if key else []
        return _CroppedBatch(
            torch.tensor(key, dtype=torch.int64), torch.tensor(shown, dtype=torch.int64), views, unreadable
        )

    def _open(self, position: int, unreadable: list[tuple[str, str]]) -> tuple[int, Any] | None:
        attempts = min(UNREADABLE_IN_A_ROW, len(self.source)) if self.replace else 1
        for attempt in range(attempts):
            place = (position + attempt) % len(self.source)
            try:
                return place, as_pil(self.source.open(place))
            except UnreadableImage as error:
                unreadable.append((error.name, error.reason))
            except UserError as error:
                unreadable.append(("", str(error)))
                return None
        if self.replace:
            name, reason = unreadable[-1]
            unreadable.append(
                ("", f"{attempts} images in a row cannot be read, the last is {name} ({reason}): mend them")
            )
        return None

    def _make(self, view: View, images: list[Any], epoch: int, index: Tensor, stream: int) -> list[Tensor]:
        if self.augment == "workers":
            return [apply_one(view, p, self.seed, epoch, i, stream) for p, i in zip(images, index.tolist())]
        heights, widths = (torch.tensor([getattr(p, side) for p in images]) for side in ("height", "width"))
        cut = sample_params(view, self.seed, epoch, index, stream, heights, widths).cut
        return [crop_one(view, image, CropParams(*(part[i : i + 1] for part in cut))) for i, image in enumerate(images)]
