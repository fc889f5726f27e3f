"""Batches of views.

Small data sets are stored on the training device as uint8 and augmented there, a batch at a time, without workers.
Image files are decoded and cropped by worker processes, and their colors augmented on the device. Either way a view is
a function of `(seed, epoch, index, stream)`: workers, processes and restarts change none.
"""

import copy
import hashlib
import os
import warnings
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor

from sslbook.data.datasets import load_named
from sslbook.data.datasets.base import FileList, ImageSource, InMemory, Splits
from sslbook.data.datasets.folder import load_folders
from sslbook.data.datasets.imported import splits_of
from sslbook.data.datasets.listed import load_list
from sslbook.data.datasets.shapes import Shapes, load_shapes
from sslbook.data.executors import apply_batch, apply_color, unit
from sslbook.data.images import EXTENSIONS, UnreadableImage, as_photograph
from sslbook.data.views import View
from sslbook.data.workers import CropDataset, CropLoader
from sslbook.errors import UserError
from sslbook.rng import permutation
from sslbook.types import Above, PositiveInt

MAX_BYTES_ON_DEVICE = 4 * 2**30  # a larger set in memory stays on the CPU
Split = Literal["pretrain", "train", "test"]


class Batch(NamedTuple):
    """What a method gets."""

    views: tuple[Tensor, ...]
    """one tensor `(batch, channels, size, size)` for each view"""
    index: Int[Tensor, "batch"]
    """positions of the images in their split"""
    label: Int[Tensor, "batch"]
    """their classes, -1 where unlabeled; for evaluation, no method reads them"""


class Data:
    """Images to train on and to evaluate on.

    Args:
        name: `shapes` (rendered, needs no files), cifar10, cifar100, stl10, fashion_mnist, imagenette, imagenet, or the
            import path of a map-style dataset class, such as `my.module.MyDataset`.
        folder: a folder of images instead, labeled (one subfolder a class) or not, with or without `train/` and
            `test/`; or a list of such folders, `[A, B]`, whose images come one after the other.
        list: a list of images instead, as text (a path and optionally its class on each line), CSV or JSON; see
            `sslbook.data.datasets.listed`. Paths are relative to the file or to `root`.
        test_list: the list of the images to evaluate on; without it a tenth is held out, or what `split` says.
        root: the folder of the named sets.
        arguments: of the dataset class that `name` imports, such as `--data.arguments.split trainval`; a class path
            makes an object, such as a transform.
        test_arguments: those that differ for the images to evaluate on, such as `--data.test_arguments.split val`.
        shapes: options of the Shapes data set.
        download: let torchvision, or the imported class, download a set that is not there.
        channels: number of bands, such as 1 or 13: images keep all their bands and bits, of files (TIFF, `.npy`, PNG),
            of a dataset class or of tensors; null makes red, green and blue of 8 bits of every image.
        mean: of each channel, in place of the views'; `python -m sslbook.tools measure_mean_std` measures it.
        std: likewise.
        limit: train on so many of the training images only, chosen at random, always the same.
        strict: stop at an image that cannot be read, instead of skipping and counting it.
        augment: `device` crops in the workers and augments colors on the device, and keeps small sets on the device
            altogether; `workers` does everything per image in the workers.
        workers: number of processes that decode images; null means one for each core, at most 8.
        start_method: how these processes start; null means Python's default.
        train: from Python, a map-style dataset of images, or of images with labels (PIL, arrays or tensors).
        test: likewise, to evaluate on.

    Raises:
        UserError: options contradict each other, or the images are not found or not readable.

    >>> Data(train=torchvision.datasets.CIFAR10("data"), test=torchvision.datasets.CIFAR10("data", train=False))
    """

    def __init__(
        self,
        name: str = "shapes",
        folder: list[Path] | Path | None = None,
        list: Path | None = None,
        test_list: Path | None = None,
        root: Path = Path("data"),
        arguments: dict[str, Any] | None = None,
        test_arguments: dict[str, Any] | None = None,
        shapes: Shapes = Shapes(),
        download: bool = False,
        channels: PositiveInt | None = None,
        mean: tuple[float, ...] | None = None,
        std: tuple[float, ...] | None = None,
        limit: PositiveInt | None = None,
        strict: bool = False,
        augment: Literal["device", "workers"] = "device",
        workers: Annotated[int, Above(-1)] | None = None,
        start_method: Literal["fork", "spawn", "forkserver"] | None = None,
        train: Any = None,
        test: Any = None,
    ) -> None:
        if not isinstance(name, str):
            raise UserError("a data set is named by a text; write Data(train=DATASET), or Data(folder=FOLDER)")
        if (name != "shapes") + (folder is not None) + (list is not None) > 1:
            raise UserError(f"data.name={name}, data.folder={folder}, data.list={list}: give one of them")
        if test_list is not None and list is None:
            raise UserError("data.test_list belongs to data.list: give both")
        if (arguments or test_arguments) and "." not in name:
            raise UserError(
                f"data.arguments are those of a dataset class, and data.name is {name}: give its import path"
            )
        several = isinstance(folder, Sequence) and not isinstance(folder, str)
        self.folders = tuple(map(Path, folder if several else [folder])) if folder is not None else ()
        list, test_list = (None if path is None else Path(path) for path in (list, test_list))
        paths = self.folders or (() if list is None else (list,))
        names = [Path(os.path.abspath(path.expanduser())).name for path in paths]  # links keep theirs
        self.name = "+".join(names) or name
        self.folder = self.folders[0] if len(self.folders) == 1 else None
        self.list = list
        self.test_list = test_list
        self.root = root
        self.arguments = (arguments or {}, test_arguments or {})
        self.shapes = shapes
        self.download = download
        self.channels, self.mean, self.std = channels, mean and tuple(mean), std and tuple(std)
        if (mean is None) != (std is None) or (mean and std and not len(mean) == len(std) == (channels or 3)):
            raise UserError(f"data.mean {mean} and data.std {std}: give both, {channels or 3} numbers each, or none")
        if std and min(std) <= 0:
            raise UserError(f"data.std {std}: give positive numbers")
        self.limit = limit
        self.strict = strict
        self.augment = augment
        self.workers = _default_workers() if workers is None else workers
        self.start_method = start_method
        self.unreadable: dict[str, str] = {}
        """images that could not be read so far in this process, and why"""
        self._on_device: dict[tuple[int, str], Tensor] = {}
        self._idle: tuple[Any, CropLoader] | None = None
        self._told: set[str] = set()
        if train is not None:
            self.name, self._splits = (
                type(train).__name__,
                self._as_wanted(splits_of([train] if test is None else [train, test])),
            )
        elif paths or name != "shapes":
            _ = self._splits  # what is missing is reported at once; Shapes is rendered when it is needed

    @classmethod
    def from_images(
        cls,
        train: UInt8[Tensor, "train channels height width"] | Float[Tensor, "train channels height width"],
        train_labels: Int[Tensor, "train"],
        test: UInt8[Tensor, "test channels height width"] | Float[Tensor, "test channels height width"] | None = None,
        test_labels: Int[Tensor, "test"] | None = None,
        class_names: Sequence[str] = (),
        name: str = "images",
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
    ) -> "Data":
        """Images that are in memory already, all of one size; those that are not gray or RGB of 8 bits keep their bands.

        Args:
            train: the images to learn from.
            train_labels: their classes, -1 where unlabeled.
            test: the images to evaluate on.
            test_labels: their classes.
            class_names: names of the classes, in the order of their numbers.
            name: of the data, for tables.
            mean: of each channel, in place of the views'.
            std: likewise.
        """
        channels = None if train.dtype == torch.uint8 and train.shape[1] in (1, 3) else train.shape[1]
        data = cls(channels=channels, mean=mean and tuple(mean), std=std and tuple(std))
        source = InMemory(train, train_labels)
        held = None if test is None or test_labels is None else InMemory(test, test_labels)
        data.name, data._splits = name, data._as_wanted(Splits(source, source, held, tuple(class_names)))
        return data

    @cached_property
    def _splits(self) -> Splits:
        if self.folders:
            splits = load_folders(self.folders, EXTENSIONS if self.channels is None else (*EXTENSIONS, ".npy"))
        elif self.list is not None:
            splits = load_list(self.list, self.root, self.test_list)
        elif self.name == "shapes":
            splits = load_shapes(self.shapes)
        else:
            splits = load_named(self.name, self.root, self.download, *self.arguments)
        return self._as_wanted(splits)

    def _as_wanted(self, splits: Splits) -> Splits:
        """The splits with `limit` and `channels`."""
        for source in (splits.pretrain, splits.train, splits.test):
            if isinstance(source, InMemory):
                found, wanted = source.images.shape[1], self.channels or 3
                if found != wanted and not (found == 1 and wanted == 3):
                    raise UserError(f"the images of {self.name} have {found} channels, and data.channels is {wanted}")
            if source is not None:
                source.channels = self.channels
        return splits if self.limit is None else splits.limited(self.limit)

    def adapted(self, view: View) -> View:
        """The view as these images can have it: normalized by their `mean` and `std`, without steps that make no sense.

        Saturation, hue and grayscale are of red, green and blue, solarize of 8 bits; they are left out of others' views.

        Raises:
            UserError: the images have other channels, and nothing says their mean and standard deviation.
        """
        if self.mean is not None and self.std is not None:
            view = replace(view, mean=self.mean, std=self.std)
        channels = self.channels or 3
        if len(view.mean) != channels:
            tool = "python -m sslbook.tools measure_mean_std --data..."
            raise UserError(
                f"{channels} channels are normalized by {channels} numbers: set data.mean and data.std; {tool} prints them"
            )
        if self.channels is None:
            return view
        kept = replace(view)
        if channels != 3 and (any(view.color_jitter[2:]) or view.grayscale):
            kept = replace(view, color_jitter=(*view.color_jitter[:2], 0.0, 0.0), grayscale=0.0)
            self._tell(f"images of {channels} channels have no saturation, hue and grayscale: left out of their views")
        if view.solarize and not self._has_8_bits:
            kept = replace(kept, solarize=0.0)
            self._tell("solarize inverts values of 8 bits, and these images have more: left out of their views")
        return kept

    @cached_property
    def _has_8_bits(self) -> bool:
        """Whether the first readable image to train on has 8 bits a channel."""
        source = self._splits.pretrain
        for position in range(min(100, len(source))):
            with suppress(UnreadableImage):
                image = source.open(position)
                return not isinstance(image, Tensor) or image.dtype == torch.uint8
        return True

    def _tell(self, what: str) -> None:
        """Warn of something once."""
        if what not in self._told:
            self._told.add(what)
            warnings.warn(f"{self.name}: {what}", stacklevel=3)

    @property
    def num_train(self) -> int:
        """Number of images to train on."""
        return len(self._splits.pretrain)

    @property
    def num_test(self) -> int:
        """Number of images to evaluate on; 0 if there are none."""
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
    def has_test_labels(self) -> bool:
        """Whether a classifier can be evaluated: at least two classes, and labeled test images."""
        return self.num_classes > 1 and self.num_test > 0 and bool((self.labels("test") >= 0).any())

    @property
    def skipped(self) -> int:
        """Number of different images that could not be read so far."""
        return len(self.unreadable)

    @property
    def size(self) -> int | None:
        """Shorter side of the images in memory, which all have one size; None for files."""
        source = self._splits.pretrain
        return min(source.images.shape[2:]) if isinstance(source, InMemory) else None

    def labels(self, split: Split) -> Int[Tensor, "images"]:
        """Classes of all images of a split; `Batch.index` of its evaluation batches refers to it."""
        return self._source(split).labels

    def targets(self, split: Split) -> Tensor:
        """What there is to predict of all images of a split.

        Classes, int64 `(images,)`, -1 where unlabeled; where images have several classes, bool `(images, classes)`; where
        they have numbers to regress, float32 `(images,)` or `(images, numbers)`.
        """
        source = self._source(split)
        return source.labels if source.targets is None else source.targets

    @property
    def kind(self) -> Literal["none", "classes", "several classes", "numbers"]:
        """What the training images are labeled with."""
        values = self._splits.train.targets
        if values is not None:
            return "several classes" if values.dtype == torch.bool else "numbers"
        return "classes" if self.num_classes else "none"

    def factors(self, split: Literal["train", "test"]) -> dict[str, Tensor]:
        """The factors that each image of the Shapes data set was rendered from; empty for other data."""
        return self._splits.factors.get(split, {})

    def image(self, split: Literal["train", "test"], position: int) -> Any:
        """One image without augmentation, as a PIL image in mode RGB; of other channels the first three."""
        return as_photograph(self._source(split).open(position))

    def values(self, split: Split, position: int) -> Float[Tensor, "channels height width"]:
        """One image's values before any view: 8 bits in [0, 1], others as they are.

        Raises:
            UnreadableImage: it cannot be read.
        """
        image = self._source(split).open(position)
        if not isinstance(image, Tensor):
            image = torch.from_numpy(np.array(image)).movedim(-1, 0)
        return unit(image)

    def describe(self) -> str:
        """One line: `clothing-160: 3,068 training images, 10 classes, 372 test images`."""
        parts = [f"{self.num_train:,} training images"]
        if len(self._splits.train) != self.num_train:
            parts.append(f"{len(self._splits.train):,} of them labeled")
        kinds = {"none": "no labels", "numbers": "numbers to regress"}
        several = " (several an image)" if self.kind == "several classes" else ""
        parts.append(kinds.get(self.kind, f"{self.num_classes} classes{several}"))
        if self.channels is not None:
            parts.append(f"{self.channels} channels")
        parts.append(f"{self.num_test:,} test images" if self.num_test else "no test images")
        return f"{self.name}: {', '.join(parts)}"

    def fingerprint(self) -> str:
        """A hash of the names of the files to train on, or the number of images; a run that goes on compares it."""
        source = self._splits.pretrain
        if not isinstance(source, FileList):
            return str(len(source))
        return hashlib.blake2b(source.paths.tobytes(), digest_size=16).hexdigest()

    def split(self, train: Int[Tensor, "some"], test: Int[Tensor, "others"] | None = None) -> "Data":
        """The same data with only some of the labeled training images.

        Args:
            train: their positions.
            test: positions of those labeled training images that stand in for the test images; without, these stay.
        """
        source = self._splits.train
        chosen = source.subset(train)
        held = self._splits.test if test is None else source.subset(test)
        data = copy.copy(self)
        data._splits = replace(self._splits, pretrain=chosen, train=chosen, test=held, factors={})
        data._on_device, data._idle = {}, None
        return data

    def file_names(self) -> list[str] | None:
        """The name of every labeled training image's file, without its folder; None where images are no files."""
        source = self._splits.train
        return [source.path(i).name for i in range(len(source))] if isinstance(source, FileList) else None

    def _source(self, split: Split) -> ImageSource:
        source = getattr(self._splits, split)
        if source is None:
            raise UserError(f"{self.name} has no test images: put some into a folder test/ beside train/")
        return source

    # -- batches -------------------------------------------------------------------------------------------------------

    def steps_per_epoch(self, batch_size: int) -> int:
        """Number of batches in an epoch; the last incomplete one is dropped.

        Raises:
            UserError: not one batch can be filled.
        """
        if not 1 <= batch_size <= self.num_train:
            raise UserError(f"a batch of {batch_size} of {self.num_train} images: use a smaller one, of at least 1")
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
            batch_size: images in a batch over all processes, a multiple of their number.
            seed: of the order and of the views.
            epoch: of the order and of the views.
            start: number of batches to skip, after a restart.
            stop: number of batches in the epoch, those skipped included; by default all that can be filled.
            rank: which share of every batch this process gets.
            world_size: number of processes.
            device: where the views are wanted.
            order: which images to show, in order, at least as many as fill the epoch; by default each once, shuffled.

        Raises:
            UserError: no batch can be filled, or its images cannot be read.
        """
        steps = self.steps_per_epoch(batch_size)
        order = permutation(seed, epoch, self.num_train) if order is None else order.cpu()
        positions = order[: steps * batch_size].view(steps, world_size, -1)[start:stop, rank].unbind()
        return self._load(self._splits.pretrain, views, positions, seed, epoch, torch.device(device), training=True)

    def evaluation_batches(
        self,
        split: Split,
        view: View | tuple[View, ...] | None = None,
        batch_size: int = 256,
        device: str | torch.device = "cpu",
        *,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
    ) -> Iterator[Batch]:
        """Every image of a split once, in order; unreadable ones are left out.

        Args:
            split: train or test, or pretrain: all training images, of which only some may be labeled.
            view: what an image becomes, or several of these; by default its center, at its own size or (files) at 224
                of 256 pixels.
            batch_size: images in a batch.
            device: where the views are wanted.
            seed: of views with randomness.
            rank: which of the batches this process gets: every `world_size`-th from here on.
            world_size: number of processes that share the batches.

        Raises:
            UserError: there are no test images, or loading must stop.
        """
        source = self._source(split)
        if view is None:
            view = View.center(self.size) if self.size else View.center(224, resize=256)
        positions = torch.arange(len(source)).split(batch_size)[rank::world_size]
        views = (view,) if isinstance(view, View) else view
        return self._load(source, views, positions, seed, 0, torch.device(device), training=False)

    def _load(
        self,
        source: ImageSource,
        views: tuple[View, ...],
        positions: tuple[Tensor, ...],
        seed: int,
        epoch: int,
        device: torch.device,
        training: bool,
    ) -> Iterator[Batch]:
        """The batches of images at `positions`: augmented on the device, or with the help of workers."""
        views = tuple(map(self.adapted, views))
        if isinstance(source, InMemory) and self.augment == "device":
            images = self._on_device.get((id(source), str(device)), source.images)
            if images.nbytes <= MAX_BYTES_ON_DEVICE:
                images = self._on_device[id(source), str(device)] = images.to(device)
            for index in positions:
                chosen = images[index.to(images.device)].to(device)
                made = tuple(apply_batch(view, chosen, seed, epoch, index, i) for i, view in enumerate(views))
                yield Batch(made, index.to(device), source.labels[index].to(device))
            return

        key = (id(source), views, seed, self.augment, device.type)
        if training and self._idle is not None and self._idle[0] == key:
            loader = self._idle[1]
            self._idle = None  # a second pass at the same time must not use it
        else:
            dataset = self._dataset(source, views, seed, training)
            workers = self.workers if training else min(self.workers, len(positions))
            loader = CropLoader(dataset, workers, self.start_method, device.type == "cuda", persistent=training)
        for number, crops in enumerate(loader.batches(epoch, positions), start=1):
            self._note_unreadable(crops.unreadable)
            if crops.note:
                self._tell(f"holds {crops.note}")
            if crops.error:
                raise UserError(crops.error)
            if training and number == len(positions):
                self._idle = (key, loader)  # before the last yield: a caller that counts batches never resumes after it
            if len(crops.index):
                made = tuple(view.to(device, non_blocking=True) for view in crops.views)
                if self.augment == "device":
                    made = tuple(
                        apply_color(view, pixels, seed, epoch, crops.index, i)
                        for i, (view, pixels) in enumerate(zip(views, made))
                    )
                yield Batch(made, crops.shown.to(device), source.labels[crops.shown].to(device))

    def _dataset(self, source: ImageSource, views: tuple[View, ...], seed: int, training: bool) -> CropDataset:
        """What the workers do with a batch of images; data with masks or boxes do more."""
        return CropDataset(source, views, seed, self.augment == "workers", training)

    def _note_unreadable(self, unreadable: tuple[tuple[str, str], ...]) -> None:
        for name, reason in unreadable:
            if self.strict:
                raise UnreadableImage(name, reason)
            if not self.unreadable:
                warnings.warn(
                    f"skipped the unreadable image {name} ({reason}); further ones are counted silently",
                    stacklevel=2,
                )
            self.unreadable[name] = reason

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_on_device": {}, "_idle": None}


def _default_workers() -> int:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(8, max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))))


def relocated(options: dict[str, Any], cwd: str) -> dict[str, Any]:
    """Options of data whose relative paths are found from the folder `cwd`, where a run began, if not from this one."""

    def found(value: Any) -> Any:
        if isinstance(value, (list, tuple)):
            return [found(one) for one in value]
        elsewhere = os.path.join(cwd, str(value))
        return elsewhere if cwd and not os.path.exists(str(value)) and os.path.exists(elsewhere) else value

    return {
        key: found(value) if key in ("folder", "list", "test_list", "root") else value for key, value in options.items()
    }
