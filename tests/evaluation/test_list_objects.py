"""`tools list_objects`: annotations of VOC and COCO as a list with several classes an image."""

import json
from pathlib import Path

import pytest
from PIL import Image

from sslbook.data.loader import Data
from sslbook.errors import UserError
from sslbook.tools.list_objects import list_objects


def write_voc(year: Path, splits: dict[str, list[list[tuple[str, int]]]]) -> None:
    """A year's folder; of each image of a split, the names of its objects and whether they are difficult."""
    for name in ("Annotations", "JPEGImages", "ImageSets/Main"):
        (year / name).mkdir(parents=True, exist_ok=True)
    for split, images in splits.items():
        names = [f"{split}{i}" for i in range(len(images))]
        (year / "ImageSets" / "Main" / f"{split}.txt").write_text("\n".join(names))
        for name, objects in zip(names, images):
            Image.new("RGB", (8, 6)).save(year / "JPEGImages" / f"{name}.jpg")
            box = "<bndbox><xmin>1</xmin><ymin>1</ymin><xmax>4</xmax><ymax>4</ymax></bndbox>"
            inner = "".join(f"<object><name>{n}</name><difficult>{d}</difficult>{box}</object>" for n, d in objects)
            size = "<size><width>8</width><height>6</height></size>"
            (year / "Annotations" / f"{name}.xml").write_text(f"<annotation>{size}{inner}</annotation>")


def test_voc_becomes_a_list_with_several_classes(tmp_path: Path) -> None:
    train = [[("cat", 0), ("dog", 0), ("cat", 0)], [("dog", 0), ("sofa", 1)]]
    write_voc(tmp_path / "VOCdevkit" / "VOC2007", {"trainval": train, "test": [[("cat", 0)], []]})
    out = tmp_path / "lists" / "voc.jsonl"
    out.parent.mkdir()
    assert list_objects(out, voc=tmp_path / "VOCdevkit" / "VOC2007") == 4
    data = Data(list=out, workers=0)
    assert (data.kind, data.class_names) == ("several classes", ("cat", "dog"))  # a difficult sofa alone is no class
    assert data.targets("train").tolist() == [[True, True], [False, True]]
    assert data.targets("test").tolist() == [[True, False], [False, False]]
    assert data.image("train", 0).size == (8, 6)


def test_without_a_test_list_train_and_val_are_used(tmp_path: Path) -> None:
    write_voc(tmp_path / "VOC2012", {"train": [[("cat", 0)]], "val": [[("cat", 0)]], "trainval": [[("dog", 0)]]})
    list_objects(tmp_path / "voc.jsonl", voc=tmp_path / "VOC2012")
    lines = [json.loads(line) for line in (tmp_path / "voc.jsonl").read_text().splitlines()]
    assert [(line["image"], line["labels"], line["split"]) for line in lines] == [
        ("VOC2012/JPEGImages/train0.jpg", ["cat"], "train"),
        ("VOC2012/JPEGImages/val0.jpg", ["cat"], "test"),
    ]


def test_what_is_missing_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="needs --voc VOCdevkit/VOC2007 or --coco FOLDER"):
        list_objects(tmp_path / "a.jsonl")
    with pytest.raises(UserError, match=r"ends in \.jsonl"):
        list_objects(tmp_path / "a.csv", voc=tmp_path)
    with pytest.raises(UserError, match=r"train\.txt: cannot be read"):
        list_objects(tmp_path / "a.jsonl", voc=tmp_path)
