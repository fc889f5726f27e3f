"""Sets of images: folders, torchvision's by name, the Shapes data set, anybody's dataset by import path."""

import hashlib
import importlib
import inspect
import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Int
from torch import Tensor

from sslbook.data.datasets.shapes import Shapes
from sslbook.data.images import DECODING_ERRORS, EXTENSIONS, DatasetSource, FileList, ImageSource, InMemory
from sslbook.errors import UserError, nearest

NAMES = ("shapes", "cifar10", "cifar100", "stl10", "fashion_mnist", "imagenette", "imagenet")
TEST_FOLDERS = ("test", "val", "valid", "validation")


@dataclass
class Splits:
    """What `Data` learns from and is judged on."""

    pretrain: ImageSource
    train: ImageSource
    """the labeled training images; nearly always the same object as `pretrain`"""
    test: ImageSource | None
    class_names: tuple[str, ...] = ()
    factors: dict[str, dict[str, Tensor]] = field(default_factory=dict)


# Folders -------------------------------------------------------------------------------------------------------------


def scan(folder: Path) -> list[str]:
    """The images under `folder`, as sorted relative paths with `/`; hidden files are passed over, loops are cut."""
    found: list[str] = []

    def walk(directory: str, prefix: str, above: frozenset[tuple[int, int]]) -> None:
        try:
            entries = sorted(os.scandir(directory), key=lambda entry: entry.name)
        except PermissionError as error:
            raise UserError(f"may not read the folder {directory}: change its permissions") from error
        for entry in entries:
            if entry.name.startswith("."):  # macOS leaves a ._name beside every name
                continue
            try:
                status = entry.stat() if entry.is_dir() else None
                is_file = entry.is_file() or entry.is_symlink()  # no pipes
            except OSError:  # a link to itself, or into what may not be looked at
                continue
            if status is not None:
                here = (status.st_dev, status.st_ino)
                if here not in above:  # a link to a folder that contains it
                    walk(entry.path, f"{prefix}{entry.name}/", above | {here})
            elif is_file and entry.name.lower().endswith(EXTENSIONS):
                found.append(prefix + entry.name)

    status = os.stat(folder)
    walk(str(folder), "", frozenset({(status.st_dev, status.st_ino)}))
    return found


def load_folder(folder: str | Path) -> Splits:
    """A folder of images, labeled or not.

    `train/` beside one of `test/`, `val/`, `valid/`, `validation/` is a split, and what else lies there is not used.
    Within a split (or the folder as a whole) the subfolders are classes if every image lies in one and there are at
    least two. Of several test folders the first labeled one counts, that is one with classes of the training images.
    A labeled folder without a split holds out a tenth of each class for evaluation, chosen by a hash of the paths.
    """
    folder = Path(folder).expanduser()
    if not folder.is_dir():
        what = "is a file" if folder.exists() else "does not exist"
        raise UserError(f"the folder {folder} {what}: give a folder that holds images")
    paths = scan(folder)
    if not paths:
        raise UserError(f"no images under {folder}: expected {' '.join(EXTENSIONS)}")

    tops = {path.split("/", 1)[0] if "/" in path else "" for path in paths}
    by_lower = {top.lower(): top for top in tops}
    tests = [name for name in TEST_FOLDERS if name in by_lower]
    if "train" not in by_lower or not (tests or set(by_lower) == {"train"}):
        names = _classes(paths)
        everything = _file_list(folder, paths, names)
        if not names:
            return Splits(everything, everything, None)
        test = _held_out(paths, everything.labels)
        train = everything.subset((~test).nonzero()[:, 0])
        return Splits(train, train, everything.subset(test.nonzero()[:, 0]), names)

    def part(name: str) -> tuple[Path, list[str]]:
        prefix = by_lower[name] + "/"
        return folder / by_lower[name], [path.removeprefix(prefix) for path in paths if path.startswith(prefix)]

    train_root, train_paths = part("train")
    names = _classes(train_paths)
    if not tests:
        return load_folder(train_root)
    parts = [part(name) for name in tests]
    test_root, test_paths = next((one for one in parts if _shares_a_class(one[1], names)), parts[0])
    others = sorted(set(by_lower) - {"train", *TEST_FOLDERS})
    if others:
        what = ", ".join(f"{by_lower[name]}/" if name else "loose images" for name in others[:3])
        what += f" and {len(others) - 3} more" if len(others) > 3 else ""
        warnings.warn(
            f"{folder} is split into {train_root.name}/ and {test_root.name}/; not used: {what}", stacklevel=2
        )
    test_names: tuple[str, ...] = ()
    if _shares_a_class(test_paths, names):
        names = test_names = tuple(sorted({*names, *_tops(test_paths)}))
    elif names and all("/" in path for path in test_paths):
        what = f"the folders in {test_root} are not the training classes"
        warnings.warn(f"{what}: its images count as unlabeled, unless you name its folders like these", stacklevel=2)
    train = _file_list(train_root, train_paths, names)
    return Splits(train, train, _file_list(test_root, test_paths, test_names), names)


def _tops(paths: list[str]) -> set[str]:
    return {path.split("/", 1)[0] for path in paths}


def _classes(paths: list[str]) -> tuple[str, ...]:
    names = _tops(paths)
    return tuple(sorted(names)) if all("/" in path for path in paths) and len(names) >= 2 else ()


def _shares_a_class(paths: list[str], names: tuple[str, ...]) -> bool:
    """Whether every one of the images lies in a folder, and some in one of `names`."""
    return all("/" in path for path in paths) and not _tops(paths).isdisjoint(names)


def _file_list(root: Path, paths: list[str], names: tuple[str, ...]) -> FileList:
    number = {name: i for i, name in enumerate(names)}
    labels = [number[path.split("/", 1)[0]] if names else -1 for path in paths]
    return FileList(root, np.array([os.fsencode(path) for path in paths]), torch.tensor(labels, dtype=torch.int64))


def _held_out(paths: list[str], labels: Int[Tensor, "images"]) -> Bool[Tensor, "images"]:
    """Of each class the tenth whose paths hash lowest (at least one, where a class has two images or more)."""
    rank = [int.from_bytes(hashlib.blake2b(os.fsencode(path), digest_size=7).digest(), "big") for path in paths]
    order = torch.tensor(rank).argsort()
    held = torch.zeros(len(paths), dtype=torch.bool)
    for label in labels.unique():
        members = order[labels[order] == label]
        if len(members) >= 2:
            held[members[: max(1, round(len(members) / 10))]] = True
    return held


# Sets by name --------------------------------------------------------------------------------------------------------


def load_shapes(shapes: Shapes) -> Splits:
    """The Shapes data set, drawn."""
    sources, factors = {}, {}
    for split in ("train", "test"):
        images, factors[split] = shapes.render(split)
        sources[split] = InMemory(images, factors[split]["shape"])
    return Splits(sources["train"], sources["train"], sources["test"], tuple(shapes.class_names), factors)


def load_named(name: str, root: str | Path, download: bool) -> Splits:
    """One of torchvision's sets, or a dataset class by its import path."""
    if name in ("imagenet", "imagenette"):
        return _load_imagenet(Path(root).expanduser(), name, download)
    kinds = {"cifar10": "CIFAR10", "cifar100": "CIFAR100", "stl10": "STL10", "fashion_mnist": "FashionMNIST"}
    if name in kinds:
        return _load_small(Path(root).expanduser(), name, kinds[name], download)
    if "." in name:
        return _load_imported(name, root)
    hint = nearest(name, list(NAMES)) or f": choose one of {', '.join(NAMES)}"
    raise UserError(f"unknown data set {name!r}{hint} (or name a class by its import path, or give data.folder)")


def _load_small(root: Path, name: str, kind: str, download: bool) -> Splits:
    """A set that torchvision reads into memory."""
    import torchvision.datasets

    def get(**split: Any) -> Any:
        dataset = getattr(torchvision.datasets, kind)
        try:
            return dataset(root, **split)
        except (RuntimeError, FileNotFoundError) as error:
            if not download:
                raise UserError(_absent(name, root)) from error
        return _download(name, root, lambda: dataset(root, download=True, **split))

    if name == "stl10":
        unlabeled, train, test = (get(split=split) for split in ("unlabeled", "train", "test"))
        sources = [_in_memory(part.data, part.labels) for part in (unlabeled, train, test)]
        return Splits(sources[0], sources[1], sources[2], tuple(train.classes))
    train, test = (get(train=train) for train in (True, False))
    sources = [_in_memory(part.data, part.targets) for part in (train, test)]
    return Splits(sources[0], sources[0], sources[1], tuple(train.classes))


def _in_memory(images: Any, labels: Any) -> InMemory:
    """torchvision's arrays, in whatever order their axes come."""
    images = torch.as_tensor(images)
    if images.ndim == 3:
        images = images[:, None]
    elif images.shape[1] != 3:
        images = images.permute(0, 3, 1, 2)
    return InMemory(images.contiguous(), torch.as_tensor(labels).long())


def _load_imagenet(root: Path, name: str, download: bool) -> Splits:
    """ImageNet-1k or Imagenette as folders: `train/` and `val/`, one subfolder a class."""
    folders = [root / name, root]
    if name == "imagenette":
        folders = [root / folder for folder in ("imagenette2", "imagenette2-320", "imagenette2-160", name)] + [root]
    for folder in folders:
        if (folder / "train").is_dir() and (folder / "val").is_dir():
            return load_folder(folder)
    if name == "imagenet" or not download:
        raise UserError(_absent(name, root))
    from torchvision.datasets import Imagenette

    _download(name, root, lambda: Imagenette(str(root), size="320px", download=True))
    return load_folder(root / "imagenette2-320")


def _absent(name: str, root: Path) -> str:
    cure = "give its place as data.root"
    if name == "imagenet":
        return f"no {name} under {root} (train/ and val/): {cure}, or run data_scripts/imagenet.py"
    script = ", run data_scripts/cifar10.py" if name == "cifar10" else ""
    return f"no {name} under {root}: {cure}{script}, or set data.download to true"


def _download(name: str, root: Path, get: Callable[[], Any]) -> Any:
    try:
        return get()
    except (OSError, RuntimeError) as error:  # urllib's errors are OSErrors
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        cure = "fetch it yourself and give its place as data.root"
        raise UserError(f"cannot download {name} ({reason}): {cure}") from error


def _load_imported(name: str, root: str | Path) -> Splits:
    """A map-style dataset by import path.

    Of the arguments `root`, `train` and `split` it is given those that it names; with one of the last two it is made
    twice, for training and for the test.
    """
    module, _, attribute = name.rpartition(".")
    try:
        make = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise UserError(f"cannot import the data set {name} ({error}): check the path, or set PYTHONPATH") from error
    try:
        signature = inspect.signature(make)
        known = signature.parameters
        options: dict[str, Any] = {"root": root} if "root" in known else {}
        splits: list[dict[str, Any]] = [{}]
        if "train" in known:
            splits = [{"train": True}, {"train": False}]
        elif "split" in known:
            splits = [{"split": "train"}, {"split": "test"}]
        signature.bind(**options, **splits[0])
    except (TypeError, ValueError) as error:
        raise UserError(f"cannot make the data set {name} ({error}): it gets root, train and split only") from error
    datasets = [make(**options, **split) for split in splits]
    labels = [_labels(dataset) for dataset in datasets]
    texts = sorted({label for some in labels for label in some if isinstance(label, str)})
    numbers = {text: i for i, text in enumerate(texts)}
    sources = [_dataset_source(dataset, some, numbers) for dataset, some in zip(datasets, labels)]
    classes = texts or getattr(datasets[0], "classes", None)
    count = int(max(source.labels.max() for source in sources)) + 1
    names = tuple(map(str, classes)) if classes is not None and count > 0 else tuple(map(str, range(count)))
    return Splits(sources[0], sources[0], sources[1] if len(sources) > 1 else None, names)


def _labels(dataset: Any) -> list[Any]:
    """What a dataset gives as labels: its `targets` or `labels`, or else what its items say; None where there is none."""
    if not (hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__")):
        raise UserError(f"{type(dataset).__name__} has no __len__ and __getitem__: a map-style dataset is needed")
    if len(dataset) == 0:
        raise UserError(f"{type(dataset).__name__} holds no images: check its arguments")
    labels = getattr(dataset, "targets", getattr(dataset, "labels", None))
    if labels is not None:
        return labels.tolist() if hasattr(labels, "tolist") else list(labels)
    labels = []
    for i in range(len(dataset)):
        try:
            item = dataset[i]
        except DECODING_ERRORS:  # whoever opens it will hear of it
            labels.append(None)
            continue
        if not (isinstance(item, tuple | list) and len(item) > 1):  # so are the others: they need not be decoded
            return [None] * len(dataset)
        if isinstance(item[1], str):  # a class or a caption
            cure = "number the classes, list their names as `targets`, or yield the image alone"
            raise UserError(f"{type(dataset).__name__} yields the label {item[1]!r}: {cure}")
        labels.append(item[1])
    return labels


def _dataset_source(dataset: Any, labels: list[Any], numbers: dict[str, int]) -> DatasetSource:
    """Wrap a dataset; `numbers` are those of its classes if the labels are names."""
    try:
        values = [-1 if label is None else numbers[label] if numbers else int(label) for label in labels]
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        cure = "give each image one number, name or None"
        raise UserError(f"{type(dataset).__name__} has labels that are no classes: {cure}") from error
    if len(values) != len(dataset):
        cure = "give one for each image"
        raise UserError(f"{type(dataset).__name__} has {len(values)} labels for {len(dataset)} images: {cure}")
    return DatasetSource(dataset, torch.tensor(values, dtype=torch.int64), torch.arange(len(dataset)))
