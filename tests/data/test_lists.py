"""Lists of images: text, CSV, JSON; classes, several classes, numbers; and what a list can get wrong."""

import json
from pathlib import Path

import pytest
import torch
from PIL import Image

from sslbook.data.loader import Data
from sslbook.errors import UserError
from sslbook.evaluation.protocols.knn import KNN
from sslbook.nn import ConvNet


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Thirty images of 4x4 pixels; the gray value of each is its number."""
    (tmp_path / "images").mkdir()
    for i in range(30):
        Image.new("RGB", (4, 4), (i, i, i)).save(tmp_path / "images" / f"{i:02}.png")
    return tmp_path


def number(data: Data, split: str, position: int) -> int:
    return data.image(split, position).getpixel((0, 0))[0]


def listed(folder: Path, name: str, text: str, **options: object) -> Data:
    (folder / name).write_text(text, encoding="utf-8")
    return Data(list=folder / name, workers=0, **options)


def everything(data: Data) -> dict[int, object]:
    """What is to be predicted of every image, by its number."""
    found = {}
    for split in ("train", "test"):
        for position, target in enumerate(data.targets(split).tolist()):
            found[number(data, split, position)] = target
    return found


FORMS = {
    "a.txt": lambda rows: "\n".join(f"{path} {label}" for path, label in rows),
    "tabs.txt": lambda rows: "\n".join(f"{path}\t{label}" for path, label in rows),
    "a.csv": lambda rows: "image,label\n" + "\n".join(f"{path},{label}" for path, label in rows),
    "excel.csv": lambda rows: (
        "\ufeffNr; Filename ; Label\r\n\r\n" + "\r\n".join(f'1;"{p}";{c}' for p, c in rows) + "\r\n;;\r\n"
    ),
    "a.tsv": lambda rows: "path\tclass\n" + "\n".join(f"{path}\t{label}" for path, label in rows),
    "a.json": lambda rows: json.dumps([{"image": path, "label": label} for path, label in rows]),
    "a.jsonl": lambda rows: "\n".join(json.dumps({"file": path, "label": label}) for path, label in rows) + "\n\n",
}


@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize("labels", [("cat", "dog", "ant"), ("2", "10", "3")])
def test_every_form_of_a_list_says_the_same(folder: Path, name: str, labels: tuple[str, ...]) -> None:
    rows = [(f"images/{i:02}.png", labels[i % 3]) for i in range(30)]
    data = listed(folder, name, FORMS[name](rows))
    assert data.class_names == (("ant", "cat", "dog") if "cat" in labels else ("2", "3", "10"))
    assert (data.num_train, data.num_test, data.kind) == (27, 3, "classes")
    assert everything(data) == {i: data.class_names.index(labels[i % 3]) for i in range(30)}
    assert sorted(data.labels("test").tolist()) == [0, 1, 2]  # a tenth of each class


def test_several_classes_of_an_image(folder: Path) -> None:
    classes = [["cat"] if i % 2 else ["cat", "dog"] if i % 3 else [] for i in range(30)]
    forms = {
        "a.csv": "image,labels\n" + "\n".join(f'images/{i:02}.png,"{", ".join(c)}"' for i, c in enumerate(classes)),
        "b.csv": "image,labels\n" + "\n".join(f"images/{i:02}.png,{';'.join(c)}" for i, c in enumerate(classes)),
        "a.txt": "\n".join(f"images/{i:02}.png {','.join(c)}" for i, c in enumerate(classes)),
        "a.json": json.dumps([{"image": f"images/{i:02}.png", "labels": c} for i, c in enumerate(classes)]),
    }
    for name, text in forms.items():
        data = listed(folder, name, text)
        assert (data.class_names, data.kind) == (("cat", "dog"), "several classes"), name
        assert data.targets("train").dtype == torch.bool
        assert everything(data) == {i: ["cat" in c, "dog" in c] for i, c in enumerate(classes)}
        assert data.describe() == f"{name}: 27 training images, 2 classes (several an image), 3 test images"
        assert set(data.labels("train").tolist()) == {-1}  # no protocol takes one of several classes for the only one


def test_numbers_to_regress(folder: Path) -> None:
    ages = [20 + i / 2 for i in range(30)]
    whole = "image,target\n" + "\n".join(f"images/{i:02}.png,{i}" for i in range(30))
    data = listed(folder, "ages.txt", "\n".join(f"images/{i:02}.png {age}" for i, age in enumerate(ages)))
    assert (data.kind, data.num_classes, data.targets("train").dtype) == ("numbers", 0, torch.float32)
    assert everything(data) == dict(enumerate(ages))
    assert everything(listed(folder, "whole.csv", whole)) == {i: float(i) for i in range(30)}
    pairs = [{"image": f"images/{i:02}.png", "target": [i, -i / 2]} for i in range(30)]
    data = listed(folder, "pairs.json", json.dumps(pairs))
    assert everything(data) == {i: [i, -i / 2] for i in range(30)}
    assert "numbers to regress" in data.describe()


def test_classes_that_look_like_floats_are_classes(folder: Path) -> None:
    rows = [
        (f"images/{i:02}.png", "" if i == 5 else f"{i % 3}.0") for i in range(30)
    ]  # of pandas, where one is missing
    data = listed(folder, "a.csv", FORMS["a.csv"](rows))
    assert (data.class_names, data.kind) == (("0", "1", "2"), "classes")
    assert everything(data) == {i: -1 if i == 5 else i % 3 for i in range(30)}


def test_splits_by_a_column_and_by_a_second_list(folder: Path) -> None:
    rows = [f"images/{i:02}.png,{'ab'[i % 2]},{'val' if i >= 20 else 'Train'}" for i in range(30)]
    data = listed(folder, "a.csv", "image,label,split\n" + "\n".join(rows))
    assert (data.num_train, data.num_test) == (20, 10)
    assert sorted(number(data, "test", i) for i in range(10)) == list(range(20, 30))
    (folder / "lists").mkdir()
    lines = [f"images/{i:02}.png {'ab'[i % 2]}" for i in range(30)]
    (folder / "lists" / "test.txt").write_text("\n".join(lines[25:]))
    data = listed(folder, "train.txt", "\n".join(lines[:20]), test_list=folder / "lists" / "test.txt", root=folder)
    assert (data.num_train, data.num_test, data.class_names) == (20, 5, ("a", "b"))
    assert [number(data, "test", i) for i in range(5)] == list(range(25, 30))
    assert data.labels("test").tolist() == [1, 0, 1, 0, 1]


def test_one_percent_by_a_list_needs_no_moved_file(folder: Path) -> None:
    (folder / "lists").mkdir()
    data = listed(folder, "lists/one.txt", "images/03.png a\nimages/07.png b\n", root=folder)
    assert (data.num_train, data.num_test) == (2, 0)


@pytest.mark.parametrize(
    ("name", "text", "match"),
    [
        (
            "a.txt",
            "".join(f"images/{name}.png a\n" for name in ("00", "x", "y", "01", "z", "q")),
            r"names 4 of 6 images that are not in .*: images/x\.png, images/y\.png, images/z\.png, \.\.\.$",
        ),
        (
            "a.csv",
            "images/00.png,cat\nimages/01.png,dog\n",
            r"names no column image \(or path, file, filename\), but images",
        ),
        ("a.csv", "image,label\nimages/00.png,cat,7\n", "line 2 has 3 cells for 2 columns"),
        ("a.csv", 'image,label\n"images/00.png,cat\n', r"a\.csv: line 2: unexpected end of data"),
        ("a.csv", "image,label\n\n", "it is empty"),
        ("a.csv", "image,label,split\nimages/00.png,cat,later\n", "the split 'later' is neither train nor test"),
        ("a.csv", "image,label,split\nimages/00.png,cat,test\n", "no image to train on"),
        ("a.csv", "image,label\n,cat\n", "line or entry 2 names no image"),
        (
            "a.csv",
            "image,target\nimages/00.png,3\nimages/01.png,tall\n",
            "the target 'tall' of image number 1 is no number",
        ),
        (
            "a.csv",
            "image,target\nimages/00.png,3\nimages/01.png,nan\n",
            "the target 'nan' of image number 1 is no number",
        ),
        ("a.csv", "image,target\nimages/00.png,3\nimages/01.png,\n", "the target '' of image number 1 is no number"),
        ("a.txt", "images/00.png 1\nimages/01.png 01\n", "the classes 0?1 and 0?1 are one number in two spellings"),
        ("a.txt", "images/00.png a\nimages/00.png b\n", r"twice, and differently \(lines 1 and 2\): for several"),
        ("a.json", '{"image": "images/00.png"}', "holds no list"),
        ("a.json", "[1, 2]", "entry 1 is no object"),
        ("a.json", "[", "not valid JSON"),
        ("a.json", "[" * 100_000, "not valid JSON"),
        ("a.json", '[{"image": "images/00.png", "label": {"a": 1}}]', "is no class, list of classes or number"),
        ("a.json", '[{"image": "images/00.png", "labels": 3}]', "labels are 3: give a list of classes"),
        ("a.json", '[{"image": 7}]', "names no image"),
        ("a.jsonl", '{"image": "images/00.png"}\nnot\n', r"line 2: not valid JSON"),
        ("a.jsonl", '{"picture": "images/00.png"}\n', "entry 1 names no column image"),
    ],
)
def test_what_a_list_gets_wrong_is_one_line(folder: Path, name: str, text: str, match: str) -> None:
    with pytest.raises(UserError, match=match) as caught:
        listed(folder, name, text)
    assert "\n" not in str(caught.value)
    assert name in str(caught.value)


def test_what_is_odd_and_can_be_used_gives_a_warning(folder: Path) -> None:
    lines = [f"images/{i:02}.png {'ab'[i % 2]}" for i in range(20)]
    with pytest.warns(UserWarning, match=r"lists 2 images twice, such as images/00\.png: used once"):
        assert sum(listed(folder, "a.txt", "\n".join([*lines, *lines[:2]])).labels("train") >= 0) == 18
    (folder / "test.txt").write_text("images/19.png b\nimages/25.png c\n")
    both = pytest.warns(UserWarning, match=r"1 images are both in .* such as images/19\.png")
    with both, pytest.warns(UserWarning, match="classes of test images without a training image: c"):
        listed(folder, "a.txt", "\n".join(lines), test_list=folder / "test.txt")
    with pytest.raises(UserError, match=r"has a column split: leave out the list"):
        listed(folder, "b.csv", "image,split\nimages/00.png,train\n", test_list=folder / "test.txt")
    with pytest.raises(UserError, match=r"data\.test_list belongs to data\.list"):
        Data(folder=folder / "images", test_list=folder / "test.txt")


# Several folders -----------------------------------------------------------------------------------------------------


def test_folders_one_after_the_other(tmp_path: Path) -> None:
    for root, classes, count in (("one", ("cat", "dog"), 20), ("two", ("ant", "cat"), 10), ("bare", (".",), 4)):
        for name in classes:
            (tmp_path / root / name).mkdir(parents=True, exist_ok=True)
            for i in range(count):
                Image.new("RGB", (4, 4), (i, 0, 0)).save(tmp_path / root / name / f"{i}.png")
    one, two, bare = (tmp_path / name for name in ("one", "two", "bare"))
    data = Data(folder=[one, two, bare], workers=0)
    assert data.name == "one+two+bare"
    assert data.class_names == ("ant", "cat", "dog")
    assert data.num_train == 36 + 18 + 4
    counts = [int((data.labels("train") == c).sum()) for c in (-1, 0, 1, 2)]
    assert counts == [4, 9, 18 + 9, 18]
    assert data.num_test == 4 + 2
    for position in range(data.num_train):  # every image where its label says
        source = data._splits.train
        name = source.path(position).parent.name
        assert source.path(position).is_file()
        assert source.labels[position] == (data.class_names.index(name) if name in data.class_names else -1)
    with pytest.raises(UserError, match=r"names .*one twice: give every folder once"):
        Data(folder=[one, one])
    assert Data(folder=[one]).describe() == Data(folder=one).describe()


def test_protocols_for_one_class_say_what_these_images_have(folder: Path) -> None:
    rows = "\n".join(f"images/{i:02}.png {i / 2}" for i in range(30))
    for text, what in ((rows, "numbers"), (rows.replace(".", ",").replace(",png", ".png"), "several classes")):
        data = listed(folder, "a.txt", text)
        assert KNN().lacks(ConvNet(4), data) == f"one class of each image, and those of a.txt have {what}"
        assert not data.has_test_labels
