"""Dataset classes by import path: their arguments, splits, downloads and transforms, on files of torchvision's layouts."""

import json
import sys
import types
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.io import savemat

from sslbook.data.loader import Data
from sslbook.errors import UserError


def image(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 8)).save(path)


def write(path: Path, *lines: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines))


def pets(root: Path) -> None:
    base = root / "oxford-iiit-pet"
    for part, names in (("trainval", ("Abyssinian_1", "Pug_2", "Pug_3")), ("test", ("Pug_4", "Abyssinian_5"))):
        write(base / "annotations" / f"{part}.txt", *(f"{name} {1 + ('Pug' in name)} 1 1" for name in names))
        for name in names:
            image(base / "images" / f"{name}.jpg")


def places(root: Path) -> None:
    write(root / "categories_places365.txt", "/a/airfield 0", "/b/beach 1")
    write(root / "places365_train_standard.txt", "/a/airfield/1.jpg 0", "/b/beach/2.jpg 1", "/b/beach/3.jpg 1")
    write(root / "places365_val.txt", "1.jpg 1", "2.jpg 0")
    write(root / "places365_test.txt", "1.jpg", "2.jpg")
    for name in ("data_large_standard/a/airfield/1", "data_large_standard/b/beach/2", "data_large_standard/b/beach/3"):
        image(root / f"{name}.jpg")
    for name in ("val_large/1", "val_large/2", "test_large/1", "test_large/2"):
        image(root / f"{name}.jpg")


def food(root: Path) -> None:
    for part, names in (("train", ("1", "2")), ("test", ("3",))):
        lists = {food: [f"{food}/{name}" for name in names] for food in ("pie", "soup")}
        write(root / "food-101" / "meta" / f"{part}.json", json.dumps(lists))
        for name in lists["pie"] + lists["soup"]:
            image(root / "food-101" / "images" / f"{name}.jpg")


def numbers(root: Path) -> None:
    for part, labels in (("train", [1, 2, 10]), ("test", [2, 1]), ("extra", [1] * 4)):
        pixels = np.zeros((32, 32, 3, len(labels)), np.uint8)
        savemat(root / f"{part}_32x32.mat", {"X": pixels, "y": np.array(labels)[:, None]})


def flowers(root: Path) -> None:
    base = root / "flowers-102"
    for i in range(1, 7):
        image(base / "jpg" / f"image_{i:05}.jpg")
    savemat(base / "setid.mat", {"trnid": [1, 2, 3], "valid": [4, 6], "tstid": [5, 1]})
    savemat(base / "imagelabels.mat", {"labels": [1, 2, 2, 1, 2, 1]})


def satellite(root: Path) -> None:
    for place in ("Forest", "River"):
        for i in range(20):
            image(root / "eurosat" / "2750" / place / f"{place}_{i}.jpg")


def split(name: str) -> dict[str, str]:
    return {"split": name}


# Data set: who writes its files, numbers of images and first labels; other splits, and the numbers of images then.
SETS: dict[str, tuple[Callable[[Path], None], tuple[int, int], list[int], tuple[dict, dict], tuple[int, int]]] = {
    "OxfordIIITPet": (pets, (3, 2), [0, 1, 1], (split("test"), split("trainval")), (2, 3)),
    "Places365": (places, (3, 2), [0, 1, 1], (split("val"), split("test")), (2, 2)),
    "Food101": (food, (4, 2), [0, 0, 1], (split("test"), split("train")), (2, 4)),
    "SVHN": (numbers, (3, 2), [1, 2, 0], (split("extra"), {}), (4, 2)),
    "Flowers102": (flowers, (3, 2), [0, 1, 1], (split("val"), {}), (2, 2)),
    "EuroSAT": (satellite, (36, 4), [0, 0, 0], ({}, {}), (36, 4)),
}


@pytest.fixture
def unchecked(monkeypatch) -> None:
    """Files that a test made have other checksums than the real ones."""
    for module in ("places365", "svhn", "flowers102"):
        monkeypatch.setattr(
            f"torchvision.datasets.{module}.check_integrity", lambda path, md5=None: Path(path).exists()
        )


@pytest.mark.parametrize("name", SETS)
def test_data_sets_of_torchvision_by_import_path(name: str, tmp_path: Path, unchecked) -> None:
    make, counts, labels, (arguments, test_arguments), other_counts = SETS[name]
    make(tmp_path)
    data = Data(f"torchvision.datasets.{name}", root=tmp_path, workers=0)
    assert (data.num_train, data.num_test) == counts
    assert data.labels("train")[:3].tolist() == labels
    assert data.has_test_labels
    assert next(data.evaluation_batches("test", batch_size=8)).views[0].shape == (counts[1], 3, 224, 224)
    transform = {"class_path": "torchvision.transforms.Resize", "init_args": {"size": 6}}
    options = {"arguments": {**arguments, "transform": transform}, "test_arguments": test_arguments}
    data = Data(f"torchvision.datasets.{name}", root=tmp_path, workers=0, **options)
    assert (data.num_train, data.num_test) == other_counts
    assert data.image("train", 0).size == (6, 6)


@pytest.mark.parametrize("name", SETS)
def test_a_set_that_is_not_there_says_how_to_get_it(name: str, tmp_path: Path, monkeypatch) -> None:
    with pytest.raises(UserError, match=r"set data\.root to its folder, or set data\.download true") as caught:
        Data(f"torchvision.datasets.{name}", root=tmp_path)
    assert "\n" not in str(caught.value)

    def refuse(*_: object, **__: object) -> None:
        raise OSError("no route")

    for place in ("urlopen", "build_opener"):
        monkeypatch.setattr(f"urllib.request.{place}", refuse)
    with pytest.raises(UserError, match=r"set data\.root to its folder") as caught:
        Data(f"torchvision.datasets.{name}", root=tmp_path, download=True)
    assert "\n" not in str(caught.value)
    assert "set data.download" not in str(caught.value)


# A class of one's own ------------------------------------------------------------------------------------------------


class Own:
    """Its split has names of its own, and it may be downloaded."""

    downloads: list[bool] = []

    def __init__(self, root: str, split: str, bands: int = 3, download: bool = False, targets: object = None) -> None:
        if split not in ("fit", "judge"):
            raise ValueError(f"Unknown value '{split}' for argument split. Valid values are fit, judge.")
        self.downloads.append(download)
        self.bands, self.count = bands, 12 if split == "fit" else 4
        if targets == "hot":
            self.targets = torch.eye(3).repeat(4, 1)[: self.count]
        elif targets == "floats":
            self.targets = np.linspace(0, 1, self.count)
        elif targets == "lists":
            self.targets = [[i % 3, 2] if i % 2 else [] for i in range(self.count)]
        else:
            self.targets = [i % 2 for i in range(self.count)]

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, i: int) -> tuple[torch.Tensor, int]:
        return torch.full((self.bands, 8, 8), i, dtype=torch.uint8), 0


@pytest.fixture
def own(monkeypatch) -> str:
    module = types.ModuleType("a_module_of_ones_own")
    module.Own = Own
    monkeypatch.setitem(sys.modules, module.__name__, module)
    Own.downloads.clear()
    return "a_module_of_ones_own.Own"


FIT, JUDGE = {"split": "fit"}, {"split": "judge"}


def test_arguments_reach_the_class(own: str) -> None:
    data = Data(own, arguments=FIT, test_arguments=JUDGE, download=True, workers=0)
    assert (data.num_train, data.num_test) == (12, 4)
    assert Own.downloads == [True, True]


def test_arguments_on_the_command_line(own: str, tmp_path: Path) -> None:
    from sslbook.cli.recipes import resolve
    from sslbook.engine.loop import pretrain

    words = ["simclr", f"--data.name={own}", "--data.arguments.split=fit", '--data.test_arguments={"split": "judge"}']
    for more, bands in (
        ([], 3),
        (["--data.arguments.bands=3"], 3),
        (['--data.arguments={"split": "fit", "bands": 3}'], 3),
    ):
        parser, config, resolved = resolve([*words, *more], pretrain)
        data = parser.construct(config).data
        assert (data.num_train, data.num_test, data._splits.train.dataset.bands) == (12, 4, bands)
        assert resolved["data"]["arguments"]["split"] == "fit"


def test_wrong_arguments_are_one_line(own: str) -> None:
    for options, match in (
        ({}, r"Unknown value 'train' for argument split\. Valid values are fit, judge; .*set data\.arguments\.split"),
        ({"arguments": {"spilt": "fit"}}, r"takes no argument 'spilt'; did you mean split\?"),
        ({"arguments": FIT, "test_arguments": {"year": 1}}, "takes no argument 'year'"),
        ({"arguments": {**FIT, "targets": {"class_path": "nowhere.Thing"}}}, r"nowhere\.Thing: cannot be imported"),
    ):
        with pytest.raises(UserError, match=match) as caught:
            Data(own, **options)
        assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match=r"arguments are those of a dataset class, and data\.name is cifar10"):
        Data("cifar10", arguments=FIT)


def test_labels_of_every_kind(own: str) -> None:
    def made(kind: str) -> Data:
        return Data(own, arguments={**FIT, "targets": kind}, test_arguments={**JUDGE, "targets": kind}, workers=0)

    hot, floats, lists = made("hot"), made("floats"), made("lists")
    assert (hot.kind, hot.class_names) == ("several classes", ("0", "1", "2"))
    assert torch.equal(hot.targets("train"), torch.eye(3).repeat(4, 1).bool())
    assert (floats.kind, floats.num_classes) == ("numbers", 0)
    torch.testing.assert_close(floats.targets("test"), torch.linspace(0, 1, 4))
    assert lists.kind == "several classes"
    assert lists.targets("train")[:4].tolist() == [[False] * 3, [False, True, True], [False] * 3, [True, False, True]]
    assert set(hot.labels("train").tolist()) == {-1}
