"""A list of images with the classes of their objects, from annotations of VOC or COCO."""

import json
import os
from pathlib import Path

from sslbook import checkpoint
from sslbook.cli.common import cli, run
from sslbook.data.datasets.boxes import BoxList, box_list
from sslbook.data.datasets.coco import load_coco
from sslbook.data.datasets.voc import CLASSES, read_split
from sslbook.errors import UserError


def list_objects(out: Path, voc: Path | None = None, coco: Path | None = None) -> int:
    """Write a list of images with several classes each, for `--data.list`: VOC07 classification, and the same of COCO.

    Crowds and difficult objects give their image no class. VOC's own evaluation leaves an image out of a class of which
    it shows difficult objects only; here it is a negative of it.

    Args:
        out: the list, a new file that ends in .jsonl.
        voc: a year's folder, such as VOCdevkit/VOC2007: `trainval` and `test`, or `train` and `val` without a test list.
        coco: a folder laid out as COCO: `annotations/instances_train2017.json`, `train2017/`, and the same of `val`.

    Returns:
        The number of images.

    Raises:
        UserError: not one of the two folders is given, or its annotations cannot be read.
    """
    if (voc is None) == (coco is None):
        raise UserError("list_objects needs --voc VOCdevkit/VOC2007 or --coco FOLDER")
    if out.suffix != ".jsonl" or out.exists():
        raise UserError(f"--out {out}: give a new name that ends in .jsonl")
    train, test = _load_year(voc) if voc is not None else load_coco(coco)  # pyrefly: ignore (one of them is given)
    lines = []
    for split, images in (("train", train), ("test", test)):
        for i in range(len(images)):
            rows = images.rows[images.slice(i)]
            classes = rows[rows[:, 5] == 0, 4].long().unique().tolist()
            path = os.path.relpath(images.path(i), out.expanduser().parent)
            lines.append({"image": path, "labels": [images.class_names[c] for c in classes], "split": split})
    text = "".join(json.dumps(line) + "\n" for line in lines)
    checkpoint.write_atomically(out.expanduser(), lambda part: Path(part).write_text(text, encoding="utf-8"))
    print(f"{len(train):,} training and {len(test):,} test images in {out}; --data.list {out}")
    return len(lines)


def _load_year(folder: Path) -> tuple[BoxList, BoxList]:
    folder = Path(os.path.abspath(folder.expanduser()))
    tested = (folder / "ImageSets" / "Main" / "test.txt").is_file()
    splits = ("trainval", "test") if tested else ("train", "val")
    train, test = (box_list(folder.parent, read_split(folder, split), CLASSES) for split in splits)
    return train, test


def main(argv: list[str] | None = None) -> None:
    """`python -m sslbook.tools list_objects --voc VOCdevkit/VOC2007 --out voc07.jsonl`."""
    cli(list_objects, argv, prog="python -m sslbook.tools list_objects")


if __name__ == "__main__":
    run(main)
