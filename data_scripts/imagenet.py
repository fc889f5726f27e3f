"""Unpack ImageNet-1k (ILSVRC 2012) from the archives that image-net.org gives to registered users.

    python data_scripts/imagenet.py --archives DOWNLOADS --out data/imagenet

DOWNLOADS holds ILSVRC2012_devkit_t12.tar.gz and one or both of ILSVRC2012_img_train.tar, ILSVRC2012_img_val.tar.
Result: train/<class>/*.JPEG, val/<class>/*.JPEG, meta.bin (so that torchvision opens the folder without the archives)
and lists of 1 % and 10 % of the training images, in the form <class>/<image>, one per line.

Running it again goes on with the first class that is missing; once everything is in place it only counts.
"""

import argparse
import hashlib
import io
import os
import re
import tarfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Literal

from _fetch import extract, has_checksum, members, reading, require_space, run, workspace
from tqdm import tqdm

from sslbook.errors import UserError

Part = Literal["devkit", "train", "val"]
IMAGE = re.compile(r"n\d{8}_\d+\.JPEG")


@dataclass(frozen=True)
class Edition:
    """What the archives of an ImageNet challenge are and hold.

    Args:
        archives: (file name, md5) of each part.
        classes: how many classes.
        train: how many training images.
        val: how many validation images.
    """

    archives: dict[Part, tuple[str, str]]
    classes: int
    train: int
    val: int


ILSVRC2012 = Edition(
    archives={
        "devkit": ("ILSVRC2012_devkit_t12.tar.gz", "fa75699e90414af021442c21a62c3abf"),
        "train": ("ILSVRC2012_img_train.tar", "1d675b47d978889d74fa0da5fadfb00e"),
        "val": ("ILSVRC2012_img_val.tar", "29b22e2961454d5413ddabcf34fc5622"),
    },
    classes=1000,
    train=1_281_167,
    val=50_000,
)


@dataclass(frozen=True)
class Devkit:
    """The content of the development kit.

    Args:
        names: the words of every class, by WordNet id.
        val_classes: the WordNet id of every validation image, in order.
        train_counts: the number of training images by WordNet id.
    """

    names: dict[str, tuple[str, ...]]
    val_classes: list[str]
    train_counts: dict[str, int]


def read_devkit(archive: Path, edition: Edition) -> Devkit:
    """Read the classes and the validation labels from the development kit, without unpacking it."""
    from scipy.io import loadmat

    found: dict[str, bytes] = {}
    with reading(str(archive)):
        for path, _, stream in members(archive, str(archive)):
            if stream is not None and path.name in ("meta.mat", "ILSVRC2012_validation_ground_truth.txt"):
                found[path.name] = stream.read()
    if len(found) != 2:
        raise UserError(f"{archive} lacks meta.mat or the validation ground truth: is it the Task 1 & 2 kit?")
    synsets = loadmat(io.BytesIO(found["meta.mat"]), squeeze_me=True)["synsets"]
    # The leaves of the hierarchy are the classes; the ids of the ground truth count from 1.
    leaves = [entry for entry in synsets if entry["num_children"] == 0]
    by_id = {int(entry["ILSVRC2012_ID"]): str(entry["WNID"]) for entry in leaves}
    truth = [by_id.get(int(number), "") for number in found["ILSVRC2012_validation_ground_truth.txt"].split()]
    if len(leaves) != edition.classes or len(truth) != edition.val or "" in truth:
        raise UserError(
            f"{archive} lists {len(leaves)} classes and {len(truth)} validation labels, "
            f"not {edition.classes} and {edition.val}: is it the 2012 kit?"
        )
    return Devkit(
        names={str(entry["WNID"]): tuple(str(entry["words"]).split(", ")) for entry in leaves},
        val_classes=truth,
        train_counts={str(entry["WNID"]): int(entry["num_train_images"]) for entry in leaves},
    )


def unpack_train(archive: Path, out: Path, devkit: Devkit) -> None:
    """Unpack the archive of class archives into ``out/train``, a class at a time; classes that are there are kept."""
    folder = out / "train"
    folder.mkdir(parents=True, exist_ok=True)
    missing = {wnid for wnid in devkit.names if not (folder / wnid).is_dir()}
    if not missing:
        return
    with reading(str(archive)), tarfile.open(archive, "r:") as outer:
        classes = [info for info in outer if info.isreg() and PurePosixPath(info.name).stem in missing]
        require_space(out, sum(info.size for info in classes), "unpacking the training images")
        for info in tqdm(classes, desc="classes", leave=False, disable=None):
            wnid = PurePosixPath(info.name).stem
            stream = outer.extractfile(info)
            assert stream is not None  # a regular file
            # The workspace lies beside train/, where no reader of class folders can mistake it for a class.
            with workspace(out / wnid) as fresh:
                extract(stream, fresh, f"{archive}: {info.name}")
                os.rename(fresh, folder / wnid)


def unpack_val(archive: Path, out: Path, devkit: Devkit) -> None:
    """Unpack the validation images into ``out/val``, each into the folder of its class."""
    if (out / "val").exists():
        return
    require_space(out, archive.stat().st_size, "unpacking the validation images")
    with workspace(out / "val") as flat, workspace(out / "val-sorted") as folder:
        extract(archive, flat)
        images = sorted(flat.rglob("*.JPEG"))
        if len(images) != len(devkit.val_classes):
            raise UserError(f"{archive} holds {len(images)} images, not {len(devkit.val_classes)}: fetch it again")
        for wnid in devkit.names:
            (folder / wnid).mkdir()
        # The names carry the numbers, zero-padded, by which the ground truth is ordered.
        for image, wnid in zip(images, devkit.val_classes):
            os.rename(image, folder / wnid / image.name)
        os.rename(folder, out / "val")


def write_meta(out: Path, devkit: Devkit) -> None:
    """``meta.bin`` as `torchvision.datasets.ImageNet` writes it, so that it opens ``out`` without the archives."""
    import torch

    if not (out / "meta.bin").exists():
        torch.save((devkit.names, devkit.val_classes), out / "meta.bin.new")
        os.replace(out / "meta.bin.new", out / "meta.bin")


def images_by_class(folder: Path) -> dict[str, list[str]]:
    """The sorted image names of every class folder, in the order of the classes."""
    classes = sorted(entry.name for entry in os.scandir(folder) if entry.is_dir())
    return {wnid: sorted(name for name in os.listdir(folder / wnid) if name.endswith(".JPEG")) for wnid in classes}


def verify(out: Path, part: Literal["train", "val"], edition: Edition, devkit: Devkit | None = None) -> None:
    """Count the classes and images of a split; name a class that falls short, whose size the kit lists."""
    if not (out / part).is_dir():
        raise UserError(f"{out / part} is missing: run without --verify, with its archive in --archives")
    found = {wnid: len(names) for wnid, names in images_by_class(out / part).items()}
    expected = edition.train if part == "train" else edition.val
    if len(found) == edition.classes and sum(found.values()) == expected:
        print(f"{out / part}: {len(found)} classes, {expected} images")
        return
    wanted = devkit.train_counts if devkit and part == "train" else {}
    short = next((w for w, n in wanted.items() if found.get(w) != n), None)
    where = f" ({short} holds {found.get(short, 0)}, not {wanted[short]})" if short else ""
    raise UserError(
        f"{out / part} holds {len(found)} classes and {sum(found.values())} images, not {edition.classes} and "
        f"{expected}{where}: move away what is incomplete and run again"
    )


def own_subset(train: dict[str, list[str]], percent: int) -> list[str]:
    """A class-balanced share of the training images, the same on every machine.

    Of each class those `percent` in a hundred (rounded, at least one) are taken whose names hash lowest. A smaller
    list is therefore contained in a larger one. This is not the list of the SimCLR paper.
    """
    chosen = []
    for wnid, names in train.items():
        ranked = sorted(names, key=lambda name: hashlib.sha256(f"sslbook subset {name}".encode()).digest())
        chosen += [f"{wnid}/{name}" for name in sorted(ranked[: max(1, round(len(names) * percent / 100))])]
    return chosen


def published_subset(file: Path, train: dict[str, list[str]]) -> list[str]:
    """A published list of image names, checked against the training images; its order is kept."""
    known = {wnid: set(names) for wnid, names in train.items()}
    chosen = []
    for number, line in enumerate(file.read_text(encoding="utf-8", errors="replace").splitlines(), start=1):
        name = line.strip()
        if not name:
            continue
        wnid = name.partition("_")[0]
        if not IMAGE.fullmatch(name) or name not in known.get(wnid, ()):
            raise UserError(f"{file}, line {number}: {name[:40]!r} is no training image; expected n01440764_10026.JPEG")
        chosen.append(f"{wnid}/{name}")
    if not chosen or len(set(chosen)) != len(chosen):
        raise UserError(f"{file} is empty or names an image twice: fetch it again")
    return chosen


def write_list(path: Path, images: list[str]) -> None:
    """Write a list once; refuse to replace a different one."""
    text = "\n".join(images) + "\n"
    if path.exists():
        if path.read_text() != text:
            raise UserError(f"{path} exists with other contents: move it away and run again")
    else:
        path.with_name(path.name + ".new").write_text(text)
        os.replace(path.with_name(path.name + ".new"), path)
    print(f"{path}: {len(images)} images")


def main(arguments: Sequence[str] | None = None, edition: Edition = ILSVRC2012) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--archives", type=Path, default=Path("."), help="where the archives are (default: here)")
    parser.add_argument("--out", type=Path, default=Path("data/imagenet"), help="default: data/imagenet")
    parser.add_argument("--parts", nargs="+", choices=["train", "val"], default=["train", "val"], help="default: both")
    parser.add_argument(
        "--subset-list",
        nargs="+",
        type=Path,
        default=[],
        metavar="FILE",
        help="published lists of image names (SimCLR's 1percent.txt, 10percent.txt) to check and convert",
    )
    parser.add_argument(
        "--verify", action="store_true", help="only count what is unpacked; the archives are not needed"
    )
    options = parser.parse_args(arguments)
    out: Path = options.out

    if options.verify:
        for part in options.parts:
            verify(out, part, edition)
        return

    devkit = read_devkit(checked(options.archives, "devkit", edition), edition)
    out.mkdir(parents=True, exist_ok=True)
    write_meta(out, devkit)
    for part, unpack in ("val", unpack_val), ("train", unpack_train):
        if part in options.parts:
            folder = out / part
            if not folder.is_dir() or len(images_by_class(folder)) < edition.classes:
                unpack(checked(options.archives, part, edition), out, devkit)
            verify(out, part, edition, devkit)
    if "train" in options.parts:
        train = images_by_class(out / "train")
        for percent in (1, 10):
            write_list(out / f"train_{percent}percent_sslbook.txt", own_subset(train, percent))
        for file in options.subset_list:
            write_list(out / f"train_{file.stem}.txt", published_subset(file, train))


def checked(folder: Path, part: Part, edition: Edition) -> Path:
    """The path of an archive whose checksum is right."""
    name, md5 = edition.archives[part]
    if not (folder / name).is_file():
        raise UserError(f"{folder / name} is missing: get it from https://image-net.org/download (after registering)")
    if not has_checksum(folder / name, f"md5:{md5}"):
        raise UserError(f"{folder / name} has the wrong checksum (not md5 {md5}): it was cut short or changed")
    return folder / name


if __name__ == "__main__":
    run(main)
