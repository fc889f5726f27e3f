"""The data sets that torchvision downloads or reads: CIFAR, STL-10, Fashion-MNIST, Imagenette, ImageNet."""

from pathlib import Path
from typing import Any

import torch

from sslbook.data.datasets.base import InMemory, Splits
from sslbook.data.datasets.folder import load_folder
from sslbook.errors import UserError, explained

ARRAYS = {"cifar10": "CIFAR10", "cifar100": "CIFAR100", "stl10": "STL10", "fashion_mnist": "FashionMNIST"}
FOLDERS = {
    "imagenet": ("imagenet", "."),
    "imagenette": ("imagenette2", "imagenette2-320", "imagenette2-160", "imagenette", "."),
}


def load_torchvision(name: str, root: str | Path, download: bool) -> Splits:
    """The splits of one of the sets in `ARRAYS` or `FOLDERS`, which lies under `root` or is downloaded to it.

    Raises:
        UserError: it is not there and may not be, or cannot be, downloaded.
    """
    root = Path(root).expanduser()
    read = _read_arrays if name in ARRAYS else _read_folder
    try:
        return read(name, root, False)
    except (RuntimeError, FileNotFoundError) as error:
        if not download or name == "imagenet":
            cure = "run data_scripts/imagenet.py" if name == "imagenet" else "set data.download to true"
            raise UserError(f"no {name} under {root}: give its folder as data.root, or {cure}") from error
    cure = "download it yourself and give its folder as data.root"
    with explained(f"cannot download {name}", OSError, RuntimeError, cure=cure):  # urllib's errors are OSErrors
        return read(name, root, True)


def _read_arrays(name: str, root: Path, download: bool) -> Splits:
    """A set that torchvision reads into memory."""
    import torchvision.datasets

    dataset = getattr(torchvision.datasets, ARRAYS[name])
    if name == "stl10":
        parts = [dataset(root, split=split, download=download) for split in ("unlabeled", "train", "test")]
        sources = [_in_memory(part.data, part.labels) for part in parts]
    else:
        parts = [dataset(root, train=train, download=download) for train in (True, False)]
        sources = [_in_memory(part.data, part.targets) for part in parts]
    return Splits(sources[0], sources[-2], sources[-1], tuple(parts[-2].classes))


def _in_memory(images: Any, labels: Any) -> InMemory:
    """torchvision's arrays, whose axes come in several orders, as `(images, channels, height, width)`."""
    images = torch.as_tensor(images)
    if images.ndim == 3:
        images = images[:, None]
    elif images.shape[1] != 3:
        images = images.permute(0, 3, 1, 2)
    return InMemory(images.contiguous(), torch.as_tensor(labels).long())


def _read_folder(name: str, root: Path, download: bool) -> Splits:
    """ImageNet-1k or Imagenette as folders: `train/` and `val/`, one subfolder a class."""
    if download:
        from torchvision.datasets import Imagenette

        Imagenette(str(root), size="320px", download=True)
    for folder in (root / inside for inside in FOLDERS[name]):
        if (folder / "train").is_dir() and (folder / "val").is_dir():
            return load_folder(folder)
    raise FileNotFoundError(root)
