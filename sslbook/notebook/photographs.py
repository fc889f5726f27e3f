"""CIFAR-10 for the chapters' sections on photographs, from wherever it lies; None where there is none.

>>> data = cifar10(10_000, 2_000)
>>> if data is not None:
...     print(data.name, data.train.shape)
"""

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Int, UInt8
from torch import Tensor

from sslbook import results
from sslbook.errors import first_line

CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
Split = tuple[UInt8[Tensor, "n 3 32 32"], Int[Tensor, "n"]]


@dataclass(frozen=True)
class Photographs:
    """Labeled images for training and for testing.

    The classes take turns: images 0 to 9 are one of each, so that any first part of a split is balanced.

    Args:
        name: which data they are, as a table's caption should say it.
        classes: the names of the classes, by label.
    """

    name: str
    train: UInt8[Tensor, "train 3 32 32"]
    train_labels: Int[Tensor, "train"]
    test: UInt8[Tensor, "test 3 32 32"]
    test_labels: Int[Tensor, "test"]
    classes: tuple[str, ...] = CLASSES


def cifar10(num_train: int | None = None, num_test: int | None = None) -> Photographs | None:
    """The first `num_train` and `num_test` images of CIFAR-10, or all; None, after one line, where there are none.

    Looked for in the folder `SSLBOOK_DATA`, else in `data/` here or in the checkout: a folder
    `cifar10-jpeg/{train,test}/CLASS/` of images, or torchvision's `cifar-10-batches-py/`. Otherwise torchvision downloads
    it there, except in the smoke profile. Never raises, so that "Run all" goes on.

    Args:
        num_train: how many images to train on; without it, all 50,000.
        num_test: how many images to test on; without it, all 10,000.
    """
    try:
        for place in roots():
            if (place / "cifar10-jpeg" / "train").is_dir():
                return _read("CIFAR-10 (JPEG)", place / "cifar10-jpeg", _from_folder, num_train, num_test)
            if (place / "cifar-10-batches-py").is_dir():
                return _read("CIFAR-10", place / "cifar-10-batches-py", _from_batches, num_train, num_test)
        if results.profile() == "smoke":
            print("no CIFAR-10 here and no download in the smoke profile: the photographs are left out")
            return None
        from torchvision.datasets import CIFAR10

        CIFAR10(str(roots()[0]), download=True)
        return _read("CIFAR-10", roots()[0] / "cifar-10-batches-py", _from_batches, num_train, num_test)
    except Exception as error:
        print(f"no CIFAR-10 ({first_line(error)}): the photographs are left out; SSLBOOK_DATA=FOLDER says where it is")
        return None


def roots() -> list[Path]:
    """The folders that are searched; a download goes to the first."""
    if given := os.environ.get("SSLBOOK_DATA"):
        return [Path(given).expanduser()]
    return list(dict.fromkeys([Path.cwd() / "data", results.book().parent / "data"]))


def _read(
    name: str, place: Path, read: Callable[[Path, str, int | None], Split], num_train: int | None, num_test: int | None
) -> Photographs:
    return Photographs(name, *read(place, "train", num_train), *read(place, "test", num_test))


def _from_folder(place: Path, split: str, count: int | None) -> Split:
    from PIL import Image

    files = [sorted((place / split / name).glob("*.*")) for name in CLASSES]
    labels = torch.tensor([label for label, found in enumerate(files) for _ in found])
    paths = [path for found in files for path in found]
    order = _turns(labels)[:count]
    images = [np.asarray(Image.open(paths[i]).convert("RGB")) for i in order.tolist()]
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).contiguous(), labels[order]


def _from_batches(place: Path, split: str, count: int | None) -> Split:
    from torchvision.datasets import CIFAR10  # compares the files' checksums before it unpickles them

    found = CIFAR10(str(place.parent), train=split == "train")
    labels = torch.tensor(found.targets)
    order = _turns(labels)[:count]
    return torch.from_numpy(found.data[order.numpy()]).permute(0, 3, 1, 2).contiguous(), labels[order]


def _turns(labels: Int[Tensor, "n"]) -> Int[Tensor, "n"]:
    """The order in which the classes take turns, each class's images in the order they have."""
    one_hot = torch.nn.functional.one_hot(labels, len(CLASSES))
    turn = (one_hot.cumsum(0) * one_hot).sum(1)  # 1 for the first image of a class, 2 for its second
    return torch.argsort(turn * len(CLASSES) + labels)
