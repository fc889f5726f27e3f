"""Annotations of boxes: COCO's and VOC's files as they are meant, and malformed ones refused by file and entry."""

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from sslbook.data.datasets.coco import load_coco, read_coco
from sslbook.data.datasets.voc import CLASSES, load_voc
from sslbook.errors import UserError

pytestmark = pytest.mark.filterwarnings("ignore:__array__:DeprecationWarning")  # of pycocotools, with numpy 2

CATEGORIES = [{"id": 7, "name": "dog"}, {"id": 3, "name": "cat"}]
SQUARE = [[2, 2, 6, 2, 6, 6, 2, 6]]


def write_coco(folder: Path, change: Callable[[dict], Any] = lambda content: None, split: str = "train") -> Path:
    """Two images, the first with a dog and a crowd of cats, the second empty."""
    (folder / "annotations").mkdir(parents=True, exist_ok=True)
    (folder / f"{split}2017").mkdir(exist_ok=True)
    for name in ("a.jpg", "b.jpg"):
        Image.new("RGB", (10, 8)).save(folder / f"{split}2017" / name)
    content = {
        "images": [{"id": i, "file_name": n, "width": 10, "height": 8} for i, n in ((5, "a.jpg"), (9, "b.jpg"))],
        "annotations": [
            {"id": 1, "image_id": 5, "category_id": 7, "bbox": [2, 2, 4, 4], "area": 9, "segmentation": SQUARE},
            {
                "id": 2,
                "image_id": 5,
                "category_id": 3,
                "bbox": [0, 0, 10, 8],
                "iscrowd": 1,
                "segmentation": {"size": [8, 10], "counts": [0, 80]},
            },
        ],
        "categories": copy.deepcopy(CATEGORIES),
    }
    change(content)
    file = folder / "annotations" / f"instances_{split}2017.json"
    file.write_text(json.dumps(content))
    return file


def test_reads_coco(tmp_path: Path) -> None:
    file = write_coco(tmp_path)
    found = read_coco(file, tmp_path / "train2017", masks=True)
    assert (found.class_names, found.category_ids) == (("cat", "dog"), (3, 7))  # in the order of their ids
    assert found.rows.tolist() == [[2, 2, 6, 6, 1, 0], [0, 0, 10, 8, 0, 1]]
    assert found.areas.tolist() == [9, 80]
    assert (found.ends.tolist(), found.image_ids.tolist(), found.most) == ([2, 2], [5, 9], 1)
    image, position = found.open(0)
    assert (image.size, position) == ((10, 8), 0)
    second = found.subset(torch.tensor([1, 0]))
    assert (second.ends.tolist(), second.outlines) == ([0, 2], found.outlines)
    assert len(found.with_boxes()) == 1


MALFORMED: dict[str, tuple[Callable[[dict], Any], str]] = {
    "no list": (lambda c: c.pop("images"), "no list 'images'"),
    "no bbox": (lambda c: c["annotations"][1].pop("bbox"), r"annotations\[1\] \(id 2\): 'bbox' is missing"),
    "three numbers": (
        lambda c: c["annotations"][0].update(bbox=[1, 2, 3]),
        r"\(id 1\): bbox is \[1.0, 2.0, 3.0\], and not",
    ),
    "NaN": (
        lambda c: c["annotations"][0].update(bbox=[1, 2, 3, float("nan")]),
        r"\(id 1\): bbox is .*nan\], and not left",
    ),
    "text": (lambda c: c["annotations"][0].update(bbox=["a", 2, 3, 4]), r"annotations\[0\] \(id 1\): could not"),
    "unknown image": (lambda c: c["annotations"][0].update(image_id=4), r"\(id 1\): image_id 4 is not in the file"),
    "unknown category": (lambda c: c["annotations"][1].update(category_id=1), r"category_id 1 is not in the file"),
    "no name": (lambda c: c["categories"][1].pop("name"), r"categories\[1\] \(id 3\): 'name' is missing"),
    "no size": (lambda c: c["images"][0].pop("width"), r"images\[0\] \(id 5\): 'width' is missing"),
    "an entry that is none": (lambda c: c["annotations"].insert(0, 3), r"annotations\[0\]: is '3', and no object with"),
    "outline": (lambda c: c["annotations"][0].update(segmentation=[[1, 2]]), r"\(id 1\): segmentation is neither"),
    "runs of another image": (
        lambda c: c["annotations"][1]["segmentation"].update(size=[4, 4]),
        r"\(id 2\): segmentation is 4 pixels high and 4 wide, its image 8 and 10",
    ),
    "runs of another length": (
        lambda c: c["annotations"][1]["segmentation"].update(counts=[0, 16]),
        r"\(id 2\): segmentation has run lengths for 16 of 80 pixels",
    ),
    "runs that cannot be decoded": (
        lambda c: c["annotations"][1]["segmentation"].update(counts="zz\u00ff"),
        r"\(id 2\): Invalid RLE",
    ),
    "negative width": (
        lambda c: c["annotations"][0].update(bbox=[5, 2, -3, 4]),
        r"bbox is .*-3.0, 4.0\], and not left",
    ),
    "crowd in words": (lambda c: c["annotations"][1].update(iscrowd="yes"), r"\(id 2\): invalid literal"),
    "missing image": (lambda c: c["images"][1].update(file_name="z.jpg"), r"1 images are .* not there \(z.jpg\)"),
}


@pytest.mark.parametrize("name", MALFORMED)
def test_rejects_malformed_coco_by_file_and_entry(tmp_path: Path, name: str) -> None:
    change, message = MALFORMED[name]
    file = write_coco(tmp_path, change)
    with pytest.raises(UserError, match=message) as caught:
        read_coco(file, tmp_path / "train2017", masks=True)
    assert str(file) in str(caught.value) or str(tmp_path / "train2017") in str(caught.value)
    assert "\n" not in str(caught.value)


def test_rejects_what_is_no_json_and_files_that_are_not_there(tmp_path: Path) -> None:
    file = write_coco(tmp_path)
    for content in (b"{", b'{"images": "\xe9"}', b"[" * 100_000):  # cut, not UTF-8, nested too deep
        file.write_bytes(content)
        with pytest.raises(UserError, match="not valid JSON"):
            read_coco(file, tmp_path)
    with pytest.raises(UserError, match=r"nothing.json: cannot be read"):
        read_coco(tmp_path / "nothing.json", tmp_path)


def test_boxes_without_area_are_left_out_and_counted(tmp_path: Path) -> None:
    file = write_coco(tmp_path, lambda c: c["annotations"][0].update(bbox=[3, 3, 0, 2]))
    with pytest.warns(UserWarning, match=r"left out 1 boxes without area \(box 1 of a.jpg\)"):
        found = read_coco(file, tmp_path / "train2017", masks=True)
    assert len(found.rows) == len(found.outlines) == len(found.areas) == 1
    with pytest.raises(UserError, match="has a box that counts"):
        found.with_boxes()  # a crowd is not learned


def test_splits_of_coco_must_agree_about_classes(tmp_path: Path) -> None:
    write_coco(tmp_path)
    write_coco(tmp_path, lambda c: (c["categories"].pop(1), c["annotations"].pop(1)), split="val")
    train, test = load_coco(tmp_path)
    assert test.class_names == train.class_names
    assert test.rows[0, 4] == train.rows[0, 4] == 1  # the dog, although it is the only class in the file
    write_coco(tmp_path, lambda c: c["categories"][0].update(name="wolf"), split="val")
    with pytest.raises(UserError, match=r"category 7 is 'wolf' in .* and named 'dog' in"):
        load_coco(tmp_path)
    write_coco(tmp_path, lambda c: c["categories"].append({"id": 8, "name": "cow"}), split="val")
    with pytest.raises(UserError, match=r"category 8 is 'cow' in .* and unknown in"):
        load_coco(tmp_path)


def test_image_of_another_size_than_annotated_is_refused(tmp_path: Path) -> None:
    file = write_coco(tmp_path, lambda c: c["images"][0].update(width=11))
    with pytest.raises(UserError, match=r"a.jpg has 10x8 pixels, and 11x8 by its annotation"):
        read_coco(file, tmp_path / "train2017").open(0)


# -- VOC ---------------------------------------------------------------------------------------------------------------

OBJECT = """<object><name>{name}</name>{difficult}
<bndbox><xmin>{x}</xmin><ymin>2</ymin><xmax>6</xmax><ymax>7</ymax></bndbox></object>"""


def write_voc(folder: Path, year: str, split: str, names: str, x: str = "3", label: str = "dog") -> Path:
    """Images of a dog and a difficult cat."""
    top = folder / year
    for part in ("Annotations", "JPEGImages", "ImageSets/Main"):
        (top / part).mkdir(parents=True, exist_ok=True)
    for name in names:
        Image.new("RGB", (10, 8)).save(top / "JPEGImages" / f"{name}.jpg")
        things = OBJECT.format(name=label, x=x, difficult="")
        things += OBJECT.format(name="cat", x=1, difficult="<difficult>1</difficult>")
        size = "<size><width>10</width><height>8</height><depth>3</depth></size>"
        (top / "Annotations" / f"{name}.xml").write_text(f"<annotation>{size}{things}</annotation>")
    (top / "ImageSets" / "Main" / f"{split}.txt").write_text("".join(f"{name}\n" for name in names))
    return top


def test_reads_voc_07_and_12(tmp_path: Path) -> None:
    write_voc(tmp_path / "VOCdevkit", "VOC2007", "trainval", "ab")
    write_voc(tmp_path / "VOCdevkit", "VOC2007", "test", "c")
    train, test = load_voc(tmp_path)
    assert (len(train), len(test)) == (2, 1)
    write_voc(tmp_path / "VOCdevkit", "VOC2012", "trainval", "def")
    train, test = load_voc(tmp_path)
    assert (len(train), len(test)) == (5, 1)
    # Pixels are counted from 1, and the last one lies inside.
    assert test.rows.tolist() == [[2, 1, 6, 7, CLASSES.index("dog"), 0], [0, 1, 6, 7, CLASSES.index("cat"), 1]]
    assert train.open(4)[0].size == (10, 8)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"x": "left"}, r"Annotations/c.xml, object 1: could not convert"),
        ({"x": "7"}, r"c.xml, object 1: its box ends at \(6, 7\) and begins at \(7, 2\)"),
        ({"label": "dogg"}, r"c.xml, object 1: unknown class 'dogg'; did you mean dog\?"),
    ],
)
def test_rejects_malformed_voc_by_file_and_entry(tmp_path: Path, options: dict[str, str], message: str) -> None:
    write_voc(tmp_path, "VOC2007", "trainval", "a")
    write_voc(tmp_path, "VOC2007", "test", "c", **options)
    with pytest.raises(UserError, match=message):
        load_voc(tmp_path)


def test_rejects_voc_with_broken_or_missing_files(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds neither VOC2007 nor VOC2012"):
        load_voc(tmp_path)
    top = write_voc(tmp_path, "VOC2007", "trainval", "ab")
    with pytest.raises(UserError, match=r"Main/test.txt: cannot be read"):
        load_voc(tmp_path)
    (top / "ImageSets" / "Main" / "test.txt").write_bytes(b"caf\xe9\n")
    with pytest.raises(UserError, match=r"Main/test.txt: cannot be read .*utf-8"):
        load_voc(tmp_path)
    write_voc(tmp_path, "VOC2007", "test", "c")
    (top / "JPEGImages" / "a.jpg").unlink()
    with pytest.raises(UserError, match=r"1 images are annotated and not there \(VOC2007/JPEGImages/a.jpg\)"):
        load_voc(tmp_path)
    (top / "Annotations" / "b.xml").write_text("<annotation>")
    with pytest.raises(UserError, match=r"b.xml, size: no element found"):
        load_voc(tmp_path)


def test_reads_photographs_of_coco(shared_data: Path) -> None:
    train, test = load_coco(shared_data / "coco-mini")
    assert (len(train), len(train.rows), len(test), len(test.rows)) == (128, 929, 128, 898)
    assert train.most == 42
    assert (train.class_names[0], len(train.class_names)) == ("person", 80)
