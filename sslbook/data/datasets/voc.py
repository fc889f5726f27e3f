"""Boxes of PASCAL VOC: an XML file for each image, a list of names for each split."""

import xml.etree.ElementTree as ElementTree
from pathlib import Path

from sslbook.data.datasets.boxes import Boxes, BoxList, box_list
from sslbook.errors import UserError, explained, first_line, nearest
from sslbook.files import read_text

CLASSES = (
    *("aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow"),
    *("diningtable", "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor"),
)


def load_voc(folder: Path) -> tuple[BoxList, BoxList]:
    """VOC07+12: training images of VOC2007 and, if it is there, VOC2012 (`trainval`), test images of VOC2007.

    Without VOC2007 the test images are those of VOC2012's `val`, and training uses its `train`.

    Raises:
        UserError: neither is in the folder, or a list or annotation cannot be read.
    """
    folder = Path(folder).expanduser()
    folder = folder / "VOCdevkit" if (folder / "VOCdevkit").is_dir() else folder
    years = [folder / year for year in ("VOC2007", "VOC2012") if (folder / year / "Annotations").is_dir()]
    if not years:
        raise UserError(f"{folder} holds neither VOC2007 nor VOC2012 with their Annotations: give the folder VOCdevkit")
    both = years[0].name == "VOC2007"
    train = [one for year in years for one in read_split(year, "trainval" if both else "train")]
    test = read_split(years[0], "test" if both else "val")
    return box_list(folder, train, CLASSES), box_list(folder, test, CLASSES)


def read_split(year: Path, split: str) -> list[Boxes]:
    """The annotations of a split of one year's folder; UserError where its list or one of them cannot be read."""
    file = year / "ImageSets" / "Main" / f"{split}.txt"
    with explained(f"{file}: cannot be read", OSError, ValueError, cure="it lists the images of the split"):
        names = [line.split()[0] for line in read_text(file).split("\n") if line.strip()]
    return [_read(year, name) for name in names]


def _read(year: Path, name: str) -> Boxes:
    """One annotation. VOC counts pixels from 1, and its right and lower borders are the last pixels inside."""
    path = year / "Annotations" / f"{name}.xml"
    entry = "size"
    try:
        root = ElementTree.parse(path).getroot()
        size = [int(root.findtext(f"size/{side}", "")) for side in ("width", "height")]
        boxes, classes, difficult = [], [], []
        for number, thing in enumerate(root.iter("object"), start=1):
            entry = f"object {number}"
            label = thing.findtext("name", "").strip()
            if label not in CLASSES:
                raise ValueError(f"unknown class {label!r}{nearest(label, list(CLASSES))}")
            x1, y1, x2, y2 = (float(thing.findtext(f"bndbox/{k}", "")) for k in ("xmin", "ymin", "xmax", "ymax"))
            if x2 < x1 or y2 < y1:
                raise ValueError(f"its box ends at ({x2:g}, {y2:g}) and begins at ({x1:g}, {y1:g})")
            boxes.append((x1 - 1, y1 - 1, x2, y2))
            classes.append(CLASSES.index(label))
            difficult.append(thing.findtext("difficult", "0").strip() == "1")
    except (OSError, ElementTree.ParseError, ValueError) as error:
        raise UserError(f"{path}, {entry}: {first_line(error)}; mend this annotation of VOC") from None
    file = f"{year.name}/JPEGImages/{name}.jpg"
    return Boxes(file, (size[0], size[1]), boxes, classes, difficult)
