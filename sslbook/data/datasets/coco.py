"""Boxes and outlines of objects in the format of COCO: one JSON file for each split."""

import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from sslbook.data.datasets.boxes import Boxes, BoxList, box_list
from sslbook.errors import UserError, explained, first_line, import_extra
from sslbook.files import read_text


def load_coco(folder: Path, masks: bool = False, year: str = "2017") -> tuple[BoxList, BoxList]:
    """Training and test images of a folder laid out as COCO: `annotations/instances_val2017.json` beside `val2017/`.

    Args:
        folder: the folder.
        masks: also keep the outlines of objects.
        year: ends the names of the splits.

    Raises:
        UserError: a file is missing or malformed, or the two splits disagree about the classes.
    """
    folder = Path(folder).expanduser()
    files = [folder / "annotations" / f"instances_{split}{year}.json" for split in ("train", "val")]
    train, test = (read_coco(file, folder / f"{split}{year}", masks) for file, split in zip(files, ("train", "val")))
    names = dict(zip(train.category_ids, train.class_names))
    for number, name in zip(test.category_ids, test.class_names):
        if names.get(number) != name:
            other = f"named {names[number]!r}" if number in names else "unknown"
            raise UserError(f"category {number} is {name!r} in {files[1]} and {other} in {files[0]}: they must agree")
    position = {number: i for i, number in enumerate(train.category_ids)}  # a class may be missing from the test images
    numbers = [position[number] for number in test.category_ids]
    test.rows[:, 4] = test.rows.new_tensor(numbers)[test.rows[:, 4].long()] if len(test.rows) else test.rows[:, 4]
    test.class_names, test.category_ids = train.class_names, train.category_ids
    return train, test


def read_coco(file: Path, images: Path, masks: bool = False) -> BoxList:
    """The annotations of one file; classes are numbered in the order of the categories' ids.

    Args:
        file: the JSON file.
        images: the folder of its images.
        masks: also keep the outlines of objects.

    Raises:
        UserError: the file cannot be read, or an entry is malformed; names it.
    """
    unread = explained(f"{file}: cannot be read", OSError, cure="the layout of COCO needs it")
    with unread, explained(f"{file}: not valid JSON", ValueError, RecursionError):  # ValueError: UTF-8, too
        content = json.loads(read_text(file))
    lists = [content.get(key) if isinstance(content, dict) else None for key in ("categories", "images", "annotations")]
    for key, value in zip(("categories", "images", "annotations"), lists):
        if not isinstance(value, list) or (not value and key != "annotations"):
            raise UserError(f"{file}: no list {key!r}; give an instances file of COCO")
    with _entries(file, "categories", lists[0]) as entries:
        names = {int(entry["id"]): str(entry["name"]) for entry in entries}
    numbers = {category: i for i, category in enumerate(sorted(names))}
    found: dict[int, Boxes] = {}
    with _entries(file, "images", lists[1]) as entries:
        for entry in entries:
            size = (int(entry["width"]), int(entry["height"]))
            found[int(entry["id"])] = Boxes(str(entry["file_name"]), size, [], [], [], int(entry["id"]))
    with _entries(file, "annotations", lists[2]) as entries:
        for entry in entries:
            box = [float(value) for value in entry["bbox"]]
            if len(box) != 4 or not all(map(math.isfinite, box)) or min(box[2:]) < 0:
                raise ValueError(f"bbox is {box}, and not left, top, width and height")
            x, y, width, height = box
            if entry["image_id"] not in found or entry["category_id"] not in numbers:
                key = "image_id" if entry["image_id"] not in found else "category_id"
                raise ValueError(f"{key} {entry[key]} is not in the file")
            image = found[entry["image_id"]]
            image.boxes.append((x, y, x + width, y + height))
            image.classes.append(numbers[entry["category_id"]])
            image.ignored.append(int(entry.get("iscrowd", 0)) > 0)
            image.areas.append(float(entry.get("area", width * height)))
            if masks:
                image.outlines.append(_outline(entry.get("segmentation"), image.size))
    order = sorted(names)
    return box_list(images, list(found.values()), [names[number] for number in order], order)


def outline_mask(outline: Any, width: int, height: int) -> np.ndarray:
    """The mask `(height, width)` of one of COCO's outlines: a list of polygons, or run lengths.

    Raises:
        ValueError: the run lengths are not those of an image of this size.
        UserError: pycocotools is not installed.
    """
    coco = import_extra("pycocotools.mask", "detection")
    if isinstance(outline, list):
        return coco.decode(coco.merge(coco.frPyObjects(outline, height, width)))
    counts, size = outline["counts"], list(outline["size"])
    if size != [height, width]:
        raise ValueError(f"segmentation is {size[0]} pixels high and {size[-1]} wide, its image {height} and {width}")
    if not isinstance(counts, list):
        return coco.decode(outline)
    if sum(counts) != height * width or min(counts) < 0:
        raise ValueError(f"segmentation has run lengths for {sum(counts)} of {height * width} pixels")
    return coco.decode(coco.frPyObjects(outline, height, width))


def _outline(value: Any, size: tuple[int, int]) -> Any:
    polygons = isinstance(value, list) and value and all(isinstance(p, list) and len(p) >= 6 for p in value)
    if not polygons and not (isinstance(value, dict) and {"size", "counts"} <= set(value)):
        raise ValueError("segmentation is neither a list of polygons nor run lengths; without it give --masks false")
    if not polygons:
        outline_mask(value, *size)  # decoded to see that it can be
    return value


@contextmanager
def _entries(file: Path, name: str, entries: list[Any]) -> Iterator[Iterator[Any]]:
    """The entries of a list; what fails while one is read is reported with its number and id."""
    place = [0]

    def numbered() -> Iterator[Any]:
        for place[0], entry in enumerate(entries):
            yield entry

    try:
        yield numbered()
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        entry = entries[place[0]]
        known = f" (id {entry['id']})" if isinstance(entry, dict) and "id" in entry else ""
        what = f"{error.args[0]!r} is missing" if isinstance(error, KeyError) else first_line(error)
        what = what if isinstance(entry, dict) else f"is {str(entry)[:40]!r}, and no object with keys and values"
        raise UserError(f"{file}, {name}[{place[0]}]{known}: {what}") from None
