"""A folder of images, labeled (one subfolder a class) or not, with or without `train/` and `test/`."""

import hashlib
import os
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Bool, Int
from torch import Tensor

from sslbook.data.datasets.base import FileList, ImageSource, Splits
from sslbook.data.images import EXTENSIONS
from sslbook.errors import UserError, explained

RUN_FILES = {"config.yaml", "initial.safetensors"}
TEST_FOLDERS = ("test", "val", "valid", "validation")


def scan(folder: Path, extensions: tuple[str, ...] = EXTENSIONS) -> list[str]:
    """The images under `folder`, as sorted relative paths with `/`.

    Hidden files and the folders of training runs are left out. Links are followed, but for a link back to a folder that
    contains it.

    Raises:
        UserError: a folder may not be read.
    """
    found: list[str] = []

    def walk(directory: str, prefix: str, above: frozenset[tuple[int, int]]) -> None:
        with explained(f"may not read the folder {directory}", PermissionError, cure="change its permissions"):
            entries = sorted(os.scandir(directory), key=lambda entry: entry.name)
        if prefix and {entry.name for entry in entries} >= RUN_FILES:
            warnings.warn(f"{directory} holds a training run: its plots are not used as images", stacklevel=2)
            return
        for entry in entries:
            if entry.name.startswith("."):  # macOS leaves a ._name beside every name
                continue
            try:
                status = entry.stat() if entry.is_dir() else None
                is_file = entry.is_file() or not os.path.exists(entry.path)  # a broken link, reported later; no pipes
            except OSError:  # a link to itself, or into a folder that may not be read
                continue
            if status is not None:
                identity = (status.st_dev, status.st_ino)
                if identity not in above:
                    walk(entry.path, f"{prefix}{entry.name}/", above | {identity})
            elif is_file and entry.name.lower().endswith(extensions):
                found.append(prefix + entry.name)

    status = os.stat(folder)
    walk(str(folder), "", frozenset({(status.st_dev, status.st_ino)}))
    return found


def load_folders(folders: Sequence[str | Path], extensions: tuple[str, ...] = EXTENSIONS) -> Splits:
    """The images of several folders, one after the other, each read as `load_folder` reads it.

    Classes of one name are one class. A folder without labels beside labeled ones holds unlabeled training images.

    Raises:
        UserError: one is missing, holds no image, or is given twice.
    """
    parts = [load_folder(folder, extensions) for folder in folders]
    if len(parts) == 1:
        return parts[0]
    roots = [os.path.abspath(Path(folder).expanduser()) for folder in folders]
    if len(set(roots)) < len(roots):
        raise UserError(f"data.folder names {max(roots, key=roots.count)} twice: give every folder once")
    names = tuple(sorted({name for part in parts for name in part.class_names}))

    def joined(sources: list[tuple[ImageSource, tuple[str, ...]]]) -> FileList:
        root = Path(os.path.commonpath(roots))
        paths, labels = [], []
        for source, own in sources:
            assert isinstance(source, FileList)
            paths += [os.fsencode(os.path.relpath(source.path(i), root)) for i in range(len(source))]
            labels += [names.index(own[label]) if label >= 0 else -1 for label in source.labels.tolist()]
        return FileList(root, np.array(paths), torch.tensor(labels, dtype=torch.int64))

    train = joined([(part.train, part.class_names) for part in parts])
    tests = [(part.test, part.class_names) for part in parts if part.test is not None]
    return Splits(train, train, joined(tests) if tests else None, names)


def load_folder(folder: str | Path, extensions: tuple[str, ...] = EXTENSIONS) -> Splits:
    """The splits of a folder of images.

    `train/` beside one of `test/`, `val/`, `valid/`, `validation/` is a split; whatever else the folder holds is left
    out. Within a split (or the folder as a whole) the subfolders are classes if every image lies in one and there are at
    least two. Of several test folders the first labeled one is used, that is one with classes of the training images.
    Of a labeled folder without a split, or whose test folders have other classes, a tenth of each class is held out for
    evaluation, chosen by a hash of the paths.

    Raises:
        UserError: there is no such folder, or no image in it.
    """
    folder = Path(folder).expanduser()
    paths = scan(folder, extensions) if folder.is_dir() else []
    if not paths:
        what = (
            f"holds no images ({' '.join(extensions)}{'' if '.npy' in extensions else '; .npy with data.channels'})"
            if folder.is_dir()
            else "does not exist"
        )
        raise UserError(f"the folder {folder} {'is a file' if folder.is_file() else what}: give a folder of images")

    by_lower = {top.lower(): top for top in _tops(paths)}
    tests = [name for name in TEST_FOLDERS if name in by_lower]
    if "train" not in by_lower or not (tests or set(by_lower) == {"train"}):
        names = _classes(paths)
        return held_out_split(file_list(folder, paths, map(_top, paths), names), names)

    def part(name: str) -> tuple[Path, list[str]]:
        prefix = by_lower[name] + "/"
        return folder / by_lower[name], [path.removeprefix(prefix) for path in paths if path.startswith(prefix)]

    train_root, train_paths = part("train")
    if not tests:
        return load_folder(train_root, extensions)
    names = _classes(train_paths)
    parts = [part(name) for name in tests]
    test_root, test_paths = next((one for one in parts if _shares_a_class(one[1], names)), parts[0])
    known = {"train", *(TEST_FOLDERS if names else [test_root.name.lower()])}  # of labeled test folders one is enough
    others = sorted(set(by_lower) - known)
    if others:
        what = ", ".join(f"{by_lower[name]}/" if name else "loose images" for name in others[:3])
        what += f" and {len(others) - 3} more" if len(others) > 3 else ""
        warnings.warn(
            f"{folder} is split into {train_root.name}/ and {test_root.name}/; not used: {what}", stacklevel=2
        )
    test_names: tuple[str, ...] = ()
    if _shares_a_class(test_paths, names):
        names = test_names = tuple(sorted({*names, *_tops(test_paths)}))
    elif names:
        what = f"the images in {test_root} are not sorted into the training classes"
        warnings.warn(f"{what}: a tenth of the training images is held out to evaluate on instead", stacklevel=2)
        return held_out_split(file_list(train_root, train_paths, map(_top, train_paths), names), names)
    train = file_list(train_root, train_paths, map(_top, train_paths), names)
    return Splits(train, train, file_list(test_root, test_paths, map(_top, test_paths), test_names), names)


def _top(path: str) -> str:
    """The outermost subfolder of a relative path, or an empty string."""
    return path.split("/", 1)[0] if "/" in path else ""


def _tops(paths: list[str]) -> set[str]:
    return set(map(_top, paths))


def _classes(paths: list[str]) -> tuple[str, ...]:
    names = _tops(paths)
    loose = [path for path in paths if "/" not in path]
    if len(names) > 2 and 0 < len(loose) < len(paths) / 2:
        what = f"{len(loose)} images lie beside the subfolders, such as {loose[0]}"
        warnings.warn(f"{what}: so the subfolders are not read as classes", stacklevel=3)
    return tuple(sorted(names)) if "" not in names and len(names) >= 2 else ()


def _shares_a_class(paths: list[str], names: tuple[str, ...]) -> bool:
    """Whether every image lies in a subfolder, and some in one of `names`."""
    return "" not in _tops(paths) and not _tops(paths).isdisjoint(names)


def file_list(root: Path, paths: list[str], labels: Iterable[str], names: tuple[str, ...]) -> FileList:
    """The files, whose labels are numbered by their place in `names`; a label that is not there becomes -1."""
    numbers = {name: i for i, name in enumerate(names)}
    values = torch.tensor([numbers.get(label, -1) for label in labels], dtype=torch.int64)
    return FileList(root, np.array([os.fsencode(path) for path in paths]), values)


def held_out_split(files: FileList, names: tuple[str, ...]) -> Splits:
    """Training and test images of labeled files; of unlabeled ones, all are training images.

    A tenth of each class is held out, or a tenth of all where an image has several classes or numbers.
    """
    if not names and files.targets is None:
        return Splits(files, files)
    held = held_out(files.paths, files.labels if files.targets is None else torch.zeros_like(files.labels))
    train = files.subset((~held).nonzero()[:, 0])
    return Splits(train, train, files.subset(held.nonzero()[:, 0]), names)


def held_out(paths: np.ndarray, labels: Int[Tensor, "images"]) -> Bool[Tensor, "images"]:
    """True for the tenth of each class whose paths hash lowest (at least one, where a class has two images or more)."""
    rank = [int.from_bytes(hashlib.blake2b(bytes(path), digest_size=7).digest(), "big") for path in paths]
    order = torch.tensor(rank).argsort()
    held = torch.zeros(len(paths), dtype=torch.bool)
    for label in labels.unique():
        members = order[labels[order] == label]
        if label >= 0 and len(members) >= 2:
            held[members[: max(1, round(len(members) / 10))]] = True
    return held
