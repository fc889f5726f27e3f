"""Reading images, folders, lists and data sets; errors name what cannot be used."""

import os
import shutil
import sys
import types
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from sslbook.data.datasets.base import DatasetSource
from sslbook.data.datasets.folder import load_folder, scan
from sslbook.data.datasets.listed import load_list
from sslbook.data.images import UnreadableImage, open_image, to_rgb
from sslbook.data.loader import Data
from sslbook.data.views import View
from sslbook.errors import UserError


def save(path: Path, color: tuple[int, int, int] = (200, 100, 50), size: tuple[int, int] = (12, 10)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, color).save(path)
    return path


def pixel(path: Path) -> tuple[int, int, int]:
    image = open_image(path)
    assert image.mode == "RGB"
    return image.getpixel((0, 0))


# One image ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("extension", ["jpg", "JPEG", "png", "bmp", "gif", "webp", "tif", "TIFF", "ppm"])
def test_opens_every_format(tmp_path, extension) -> None:
    found = pixel(save(tmp_path / f"image.{extension}"))
    assert max(abs(a - b) for a, b in zip(found, (200, 100, 50))) < 12
    assert scan(tmp_path) == [f"image.{extension}"]


@pytest.mark.parametrize(
    ("mode", "value", "expected"),
    [
        ("1", 1, (255, 255, 255)),
        ("L", 77, (77, 77, 77)),
        ("LA", (0, 0), (255, 255, 255)),
        ("LA", (80, 255), (80, 80, 80)),
        ("RGBA", (10, 20, 30, 255), (10, 20, 30)),
        ("RGBA", (10, 20, 30, 0), (255, 255, 255)),
        ("RGBA", (0, 0, 0, 51), (204, 204, 204)),
        ("CMYK", (0, 255, 255, 0), (255, 0, 0)),
    ],
)
def test_modes(tmp_path, mode, value, expected) -> None:
    path = tmp_path / ("image.tif" if mode == "CMYK" else "image.png")
    Image.new(mode, (4, 4), value).save(path)
    assert pixel(path) == expected


def test_palettes(tmp_path) -> None:
    image = Image.new("RGB", (4, 4), (10, 200, 30)).convert("P", palette=Image.Palette.ADAPTIVE)
    image.save(tmp_path / "opaque.png")
    assert pixel(tmp_path / "opaque.png") == (10, 200, 30)
    image.save(tmp_path / "clear.png", transparency=image.getpixel((0, 0)))
    assert pixel(tmp_path / "clear.png") == (255, 255, 255)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (np.array([[0, 257, 32896, 65535]], np.uint16), [0, 1, 128, 255]),
        (np.array([[0, 70000, 140000]], np.int32), [0, 128, 255]),
        (np.array([[0.0, 0.5, 1.0]], np.float32), [0, 128, 255]),
        (np.array([[0.0, 128.0, 255.0]], np.float32), [0, 128, 255]),
        (np.array([[-1.0, 0.0, 1.0]], np.float32), [0, 128, 255]),
    ],
    ids=["uint16", "int32", "unit", "bytes as floats", "signed"],
)
def test_deep_images_are_scaled_not_clipped(tmp_path, values, expected) -> None:
    Image.fromarray(values).save(tmp_path / "deep.tif")
    assert np.asarray(open_image(tmp_path / "deep.tif"))[0, :, 0].tolist() == expected


def test_32_bit_gray_with_8_bit_values(tmp_path) -> None:
    image = Image.fromarray(np.array([[0, 128, 255]], np.int32))
    assert image.mode == "I"
    assert np.asarray(to_rgb(image))[0, :, 0].tolist() == [0, 128, 255]
    image.save(tmp_path / "shallow.tif")
    assert np.asarray(open_image(tmp_path / "shallow.tif"))[0, :, 0].tolist() == [0, 128, 255]


def test_dark_16_bit_image_stays_dark(tmp_path) -> None:
    dark = np.array([[0, 128, 255]], np.uint16)
    Image.fromarray(dark).save(tmp_path / "dark.png")
    Image.fromarray(dark).save(tmp_path / "dark.tif")
    Image.fromarray(dark).save(tmp_path / "signed.tif", tiffinfo={339: 2})
    (tmp_path / "dark.ppm").write_bytes(b"P5 3 1 65535\n" + dark.astype(">u2").tobytes())  # opens in mode I
    for name in ("dark.png", "dark.tif", "signed.tif", "dark.ppm"):
        assert np.asarray(open_image(tmp_path / name))[0, :, 0].tolist() == [0, 0, 1], name


def test_16_bit_png(tmp_path) -> None:
    Image.fromarray(np.full((3, 3), 40000, np.uint16)).save(tmp_path / "deep.png")
    assert pixel(tmp_path / "deep.png") == (156, 156, 156)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_applies_exif_orientation(tmp_path, orientation) -> None:
    from PIL import ImageOps

    image = Image.fromarray(np.arange(6 * 4 * 3, dtype=np.uint8).reshape(6, 4, 3) * 3)
    exif = Image.Exif()
    exif[0x0112] = orientation
    image.save(tmp_path / "rotated.png", exif=exif)
    with Image.open(tmp_path / "rotated.png") as stored:
        expected = np.asarray(ImageOps.exif_transpose(stored))
    assert np.array_equal(np.asarray(open_image(tmp_path / "rotated.png")), expected)


def test_reads_the_first_frame_of_an_animation(tmp_path) -> None:
    frames = [Image.new("RGB", (4, 4), color) for color in ((255, 0, 0), (0, 255, 0))]
    frames[0].save(tmp_path / "moving.gif", save_all=True, append_images=frames[1:])
    assert pixel(tmp_path / "moving.gif") == (255, 0, 0)


@pytest.mark.parametrize("extension", ["jpg", "png", "bmp", "gif", "webp", "tif", "ppm"])
@pytest.mark.parametrize("kept", [0, 20, 0.6])
@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
def test_truncated_image_raises_with_its_name(tmp_path, extension, kept) -> None:
    path = tmp_path / f"broken.{extension}"
    noise = np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8)
    Image.fromarray(noise).save(path)
    data = path.read_bytes()
    path.write_bytes(data[: kept if isinstance(kept, int) else int(kept * len(data))])
    with pytest.raises(UnreadableImage, match=f"broken.{extension}") as caught:
        open_image(path)
    assert "\n" not in str(caught.value)


def test_file_that_is_no_image_raises_with_its_name(tmp_path) -> None:
    (tmp_path / "page.jpg").write_text("<html>404</html>")
    (tmp_path / "folder.png").mkdir()
    for name in ("page.jpg", "absent.jpg", "folder.png"):
        with pytest.raises(UnreadableImage, match=name):
            open_image(tmp_path / name)


# Folders -------------------------------------------------------------------------------------------------------------


def test_scan_is_sorted_and_skips_hidden_files(tmp_path) -> None:
    for name in ("b/2.jpg", "a/z.PNG", "a/10.jpg", "a/._10.jpg", ".cache/x.jpg", "top.webp", "a/deep/er/1.gif"):
        save(tmp_path / "good.png")
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(tmp_path / "good.png", tmp_path / name)
    (tmp_path / "a" / "notes.txt").write_text("no image")
    if hasattr(os, "mkfifo"):
        os.mkfifo(tmp_path / "pipe.png")  # whoever opened it would wait for ever
    assert scan(tmp_path) == ["a/10.jpg", "a/deep/er/1.gif", "a/z.PNG", "b/2.jpg", "good.png", "top.webp"]


def test_scan_ends_on_loops_of_links(tmp_path) -> None:
    save(tmp_path / "a" / "1.png")
    save(tmp_path / "b" / "2.png")
    (tmp_path / "a" / "up").symlink_to(tmp_path, target_is_directory=True)
    (tmp_path / "b" / "twin").symlink_to(tmp_path / "a", target_is_directory=True)
    (tmp_path / "b" / "dangling.png").symlink_to(tmp_path / "nowhere.png")
    assert "a/1.png" in scan(tmp_path)
    assert "b/twin/1.png" in scan(tmp_path)
    assert len(scan(tmp_path)) < 8


def test_scan_skips_links_to_themselves(tmp_path) -> None:
    save(tmp_path / "a.png")
    for name in ("loop", "loop.png"):
        (tmp_path / name).symlink_to(name)
    assert scan(tmp_path) == ["a.png"]


def test_classes_from_subfolders(tmp_path) -> None:
    for name in ("cat", "dog"):
        for i in range(20):
            save(tmp_path / name / f"{i}.png")
    sets = load_folder(tmp_path)
    assert sets.class_names == ("cat", "dog")
    assert sets.train is sets.pretrain
    assert sets.test is not None
    assert sets.test.labels.tolist() == [0, 0, 1, 1]  # a tenth of each
    assert sets.train.labels.bincount().tolist() == [18, 18]
    held = {str(sets.test.path(i)) for i in range(4)}
    assert not held & {str(sets.train.path(i)) for i in range(36)}
    again = load_folder(tmp_path)
    assert held == {str(again.test.path(i)) for i in range(4)}


def test_folders_without_class_subfolders_are_unlabeled(tmp_path) -> None:
    save(tmp_path / "flat" / "1.png")
    save(tmp_path / "ragged" / "a" / "1.png")
    save(tmp_path / "ragged" / "b" / "1.png")
    save(tmp_path / "ragged" / "2.png")
    save(tmp_path / "single" / "a" / "1.png")
    save(tmp_path / "ragged" / "b" / "2.png")
    for name in ("flat", "ragged", "single"):
        said = (
            pytest.warns(match=r"1 images lie beside the subfolders, such as 2.png")
            if name == "ragged"
            else nullcontext()
        )
        with said:
            sets = load_folder(tmp_path / name)
        assert sets.class_names == ()
        assert sets.test is None
        assert set(sets.train.labels.tolist()) == {-1}


@pytest.mark.parametrize("test", ["test", "val", "valid", "Validation"])
def test_splits(tmp_path, test) -> None:
    for name in ("train/ant", "train/cow", f"{test}/bee", f"{test}/cow"):
        save(tmp_path / name / "1.png")
    sets = load_folder(tmp_path)
    assert sets.class_names == ("ant", "bee", "cow")
    assert sets.train.labels.tolist() == [0, 2]
    assert sets.test is not None
    assert sets.test.labels.tolist() == [1, 2]


def test_class_named_train(tmp_path) -> None:
    for name in ("train", "bicycle", "car"):
        save(tmp_path / name / "1.png")
    assert load_folder(tmp_path).class_names == ("bicycle", "car", "train")


def test_uses_the_first_labeled_test_folder(tmp_path) -> None:
    for name in ("train/a/1", "train/b/1", "val/a/1", "val/b/1", "validation/a/1", "test/1"):  # test/ as in ImageNet
        save(tmp_path / f"{name}.png")
    sets = load_folder(tmp_path)
    assert sets.test is not None
    assert sets.test.root == tmp_path / "val"
    assert sets.test.labels.tolist() == [0, 1]
    shutil.rmtree(tmp_path / "train")
    save(tmp_path / "train" / "1.png")  # no classes: the first one
    with pytest.warns(UserWarning, match="not used: val/, validation/"):
        sets = load_folder(tmp_path)
    assert sets.test is not None
    assert sets.test.root == tmp_path / "test"


def test_warns_of_images_outside_the_split(tmp_path) -> None:
    for name in ("train/a/1", "train/b/1", "val/a/1", "val/b/1", "other/x/1", "stray"):
        save(tmp_path / f"{name}.png")
    with pytest.warns(UserWarning, match=r"split into train/ and val/; not used: loose images, other/$"):
        sets = load_folder(tmp_path)
    assert (len(sets.train), sets.class_names) == (2, ("a", "b"))
    with pytest.warns(UserWarning, match="not used"):
        data = Data("imagenet", root=tmp_path)
    assert (data.num_train, data.num_test, data.has_test_labels) == (2, 2, True)


def test_test_folders_that_are_no_classes_are_replaced_by_held_out_images(tmp_path) -> None:
    for name in ("train/n1/images/1", "train/n2/images/1", "val/images/1", "test/images/1"):  # as Tiny ImageNet
        save(tmp_path / f"{name}.png")
    for name in ("train/n1/images/2", "train/n2/images/2"):
        save(tmp_path / f"{name}.png")
    with pytest.warns(UserWarning, match=r"the images in .*test are not sorted into the training classes: a tenth"):
        sets = load_folder(tmp_path)
    assert sets.class_names == ("n1", "n2")
    assert sets.train.labels.tolist() == [0, 1]
    assert sets.test is not None
    assert sets.test.labels.tolist() == [0, 1]


def test_unlabeled_training_images_with_a_labeled_test_folder(tmp_path) -> None:
    for name in ("train", "test/a", "test/b"):
        save(tmp_path / name / "1.png")
    sets = load_folder(tmp_path)
    assert sets.class_names == ()
    assert sets.test is not None
    assert sets.test.labels.tolist() == [-1, -1]


def test_linked_folder_keeps_the_name_of_the_link(tmp_path, monkeypatch) -> None:
    save(tmp_path / "stored" / "1.png")
    (tmp_path / "flowers").symlink_to(tmp_path / "stored", target_is_directory=True)
    assert Data(folder=tmp_path / "flowers").name == "flowers"
    monkeypatch.chdir(tmp_path / "stored")
    assert Data(folder=Path(".")).name == "stored"
    assert Data(folder=Path("../flowers/")).name == "flowers"


def test_rejects_folders_without_images(tmp_path) -> None:
    with pytest.raises(UserError, match="does not exist"):
        Data(folder=tmp_path / "absent")
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="is a file"):
        Data(folder=tmp_path / "file")
    (tmp_path / "empty" / "a").mkdir(parents=True)
    (tmp_path / "empty" / "a" / "notes.txt").write_text("")
    with pytest.raises(UserError, match=r"empty holds no images \(\.jpg"):
        Data(folder=tmp_path / "empty")


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may read everything")
def test_unreadable_folder_raises_with_its_name(tmp_path) -> None:
    save(tmp_path / "closed" / "1.png")
    (tmp_path / "closed").chmod(0)
    try:
        with pytest.raises(UserError, match="closed"):
            scan(tmp_path)
    finally:
        (tmp_path / "closed").chmod(0o700)


# Lists ---------------------------------------------------------------------------------------------------------------


def test_list_of_labeled_files(tmp_path) -> None:
    for i in range(20):
        save(tmp_path / "images" / f"a {i:02}.png")
    lines = [f"images/a {i:02}.png {'10' if i % 2 else '2'}" for i in range(20)]
    (tmp_path / "train.txt").write_text("\n".join(lines) + "\n\n")
    data = Data(list=tmp_path / "train.txt", workers=0)
    assert data.describe() == "train.txt: 18 training images, 2 classes, 2 test images"
    assert data.class_names == ("2", "10")
    splits = load_list(tmp_path / "train.txt", "elsewhere")
    for source in (splits.train, splits.test):
        for i, label in enumerate(source.labels.tolist()):
            assert label == int(source.path(i).stem[2:]) % 2
    assert sum(len(batch.index) for batch in data.evaluation_batches("train", View.center(8))) == 18


def test_list_of_unlabeled_files_relative_to_the_root(tmp_path) -> None:
    save(tmp_path / "root" / "b c.JPG")
    save(tmp_path / "root" / "d" / "1.png")
    (tmp_path / "all.txt").write_text("d/1.png\nb c.JPG\n")
    data = Data(list=tmp_path / "all.txt", root=tmp_path / "root")
    assert data.describe() == "all.txt: 2 training images, no labels, no test images"
    assert [data.image("train", i).size for i in range(2)] == [(12, 10), (12, 10)]


def test_rejects_unusable_lists(tmp_path) -> None:
    (tmp_path / "empty.txt").write_text("\n")
    (tmp_path / "wrong.txt").write_text("nowhere/1.png 3\n")
    for name, match in (
        ("absent.txt", r"cannot read the list .*absent\.txt"),
        ("empty.txt", "it is empty"),
        ("wrong.txt", r"nowhere/1\.png is neither beside it nor in .*: set data\.root"),
    ):
        with pytest.raises(UserError, match=match) as caught:
            Data(list=tmp_path / name)
        assert "\n" not in str(caught.value)


# Sets by name --------------------------------------------------------------------------------------------------------


def test_unknown_name_suggests_the_nearest(tmp_path) -> None:
    with pytest.raises(UserError, match="did you mean cifar10"):
        Data("cifar_10", root=tmp_path)
    with pytest.raises(UserError, match="choose one of shapes"):
        Data("qqq", root=tmp_path)
    with pytest.raises(UserError, match="give one of them"):
        Data("cifar10", folder=tmp_path)


@pytest.mark.parametrize("name", ["cifar10", "cifar100", "stl10", "fashion_mnist", "imagenette", "imagenet"])
def test_missing_data_set_says_where_to_put_it(tmp_path, name) -> None:
    with pytest.raises(UserError, match=f"no {name} under .*data.root"):
        Data(name, root=tmp_path)


def test_download_without_network_raises_one_line(tmp_path, monkeypatch) -> None:
    import urllib.error
    import urllib.request

    def refuse(*_: object, **__: object) -> None:
        raise urllib.error.URLError("no route")

    monkeypatch.setattr(urllib.request, "urlopen", refuse)
    for name in ("cifar10", "fashion_mnist", "imagenette"):
        with pytest.raises(UserError, match=f"cannot download {name}") as caught:
            Data(name, root=tmp_path, download=True)
        assert "\n" not in str(caught.value)


def test_cifar10(tmp_path, monkeypatch) -> None:
    import pickle

    from torchvision.datasets import CIFAR10

    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    pixels = np.arange(2 * 3072, dtype=np.int64).reshape(2, 3072).astype(np.uint8)
    for name in [f"data_batch_{i}" for i in range(1, 6)] + ["test_batch"]:
        (folder / name).write_bytes(pickle.dumps({"data": pixels, "labels": [3, 9]}))
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": list("abcdefghij")}))
    monkeypatch.setattr(CIFAR10, "_check_integrity", lambda self: True)
    monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", lambda *_: True)
    data = Data("cifar10", root=tmp_path)
    assert (data.num_train, data.num_test, data.num_classes, data.size) == (10, 2, 10, 32)
    assert data.describe() == "cifar10: 10 training images, 10 classes, 2 test images"
    batch = next(data.evaluation_batches("test"))
    assert batch.label.tolist() == [3, 9]
    assert np.array_equal(np.asarray(data.image("test", 1)), pixels[1].reshape(3, 32, 32).transpose(1, 2, 0))


@pytest.mark.parametrize("name", ["imagenet", "imagenette2-320"])
def test_imagenet(tmp_path, name) -> None:
    for part in ("train/n1", "train/n2", "val/n1", "val/n2"):
        save(tmp_path / name / part / "1.JPEG")
    data = Data(name.removesuffix("2-320"), root=tmp_path)
    assert (data.num_train, data.num_test, data.class_names) == (2, 2, ("n1", "n2"))


def test_fashion_mnist(tmp_path, shared_data) -> None:
    shutil.copytree(shared_data / "FashionMNIST", tmp_path / "FashionMNIST", copy_function=shutil.copyfile)
    for folder in (tmp_path / "FashionMNIST", tmp_path / "FashionMNIST" / "raw"):
        folder.chmod(0o700)
    data = Data("fashion_mnist", root=tmp_path, download=True)  # unpacks what is there
    assert data.describe() == "fashion_mnist: 60,000 training images, 10 classes, 10,000 test images"
    batch = next(data.evaluation_batches("test", batch_size=10))
    assert batch.views[0].shape == (10, 3, 28, 28)
    assert batch.label.tolist() == [9, 2, 1, 1, 6, 1, 4, 6, 5, 7]


# A user's dataset -----------------------------------------------------------------------------------------------------


class Labeled:
    """Yields tensors and labels, and takes torchvision's `train`."""

    def __init__(self, root: Path, train: bool) -> None:
        self.root, self.train = root, train

    def __len__(self) -> int:
        return 6 if self.train else 4

    def __getitem__(self, i: int) -> tuple[torch.Tensor, int]:
        return torch.full((3, 8, 8), i, dtype=torch.uint8), i % 2


class Bare:
    """Yields PIL images of several modes, and no labels."""

    def __len__(self) -> int:
        return 5

    def __getitem__(self, i: int) -> Image.Image:
        return Image.new(("RGB", "L", "RGBA", "P", "1")[i], (9 + i, 9))


class Named(Labeled):
    """Has names for targets; one of them is only in the test."""

    @property
    def targets(self) -> list[str | None]:
        return ["dog", "cat"] * 3 if self.train else ["dog", "ant", None, "cat"]


class Holey(Labeled):
    """Some items have no label, or fail like a decoder."""

    def __getitem__(self, i: int) -> tuple[torch.Tensor, int | None]:
        if i == 1:
            raise RuntimeError("bad header\nand so on")
        return super().__getitem__(i)[0], None if i == 2 else i


class Failing(Bare):
    def __getitem__(self, i: int) -> Image.Image:
        raise ValueError


class Captioned(Labeled):
    def __getitem__(self, i: int) -> tuple[torch.Tensor, str]:
        return super().__getitem__(i)[0], "a cat"


class Uneven(Labeled):
    targets = (0, 1)


class Paired(Labeled):
    targets = property(lambda self: [object()] * len(self))


class Wrong(Bare):
    def __getitem__(self, i: int) -> str:
        return "not an image"


class Greedy(Bare):
    def __init__(self, year: int) -> None:
        self.year = year


@pytest.fixture
def module(monkeypatch) -> str:
    made = types.ModuleType("a_users_module")
    for kind in (Labeled, Bare, Wrong, Greedy, Named, Holey, Failing, Captioned, Uneven, Paired):
        setattr(made, kind.__name__, kind)
    made.Number = object
    monkeypatch.setitem(sys.modules, made.__name__, made)
    return made.__name__


def test_imported_dataset(module, tmp_path) -> None:
    data = Data(f"{module}.Labeled", root=tmp_path, workers=0)
    assert (data.num_train, data.num_test, data.class_names) == (6, 4, ("0", "1"))
    batch = next(data.evaluation_batches("train"))
    assert batch.label.tolist() == [0, 1, 0, 1, 0, 1]
    bare = Data(f"{module}.Bare", workers=0)
    assert (bare.num_train, bare.num_test, bare.num_classes) == (5, 0, 0)
    assert next(bare.evaluation_batches("train")).label.tolist() == [-1] * 5
    with pytest.raises(UserError, match="no test images"):
        bare.labels("test")


def test_rejects_invalid_imports(module) -> None:
    with pytest.raises(UserError, match=r"data set nowhere\.Set: cannot be imported"):
        Data("nowhere.Set")
    with pytest.raises(UserError, match="no __len__"):
        Data(f"{module}.Number")
    with pytest.raises(UserError, match="missing a required argument: 'year'"):
        Data(f"{module}.Greedy")
    with pytest.raises(UserError, match="yields a str"):
        next(Data(f"{module}.Wrong", workers=0).evaluation_batches("train"))


def test_labels_as_names(module, tmp_path) -> None:
    data = Data(f"{module}.Named", root=tmp_path, workers=0)
    assert data.class_names == ("ant", "cat", "dog")
    assert data.labels("train").tolist() == [2, 1] * 3
    assert data.labels("test").tolist() == [2, 0, -1, 1]


def test_missing_labels_and_images(module, tmp_path) -> None:
    data = Data(f"{module}.Holey", root=tmp_path, workers=0)
    assert data.labels("train").tolist() == [0, -1, -1, 3, 4, 5]
    with pytest.warns(UserWarning, match=r"number 1 of Holey \(bad header\)"):
        batch = next(data.evaluation_batches("train"))
    assert batch.index.tolist() == [0, 2, 3, 4, 5]


def test_dataset_without_a_readable_image_raises_one_line(module) -> None:
    data = Data(f"{module}.Failing", workers=0)
    message = r"5 images in a row cannot be read.*Failing \(ValueError\)"
    with pytest.warns(UserWarning, match="unreadable"), pytest.raises(UserError, match=message) as caught:
        list(data.batches((View(size=8),), 2, seed=0, epoch=0))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "match"),
    [
        ("Captioned", "yields the label 'a cat': number the classes"),
        ("Uneven", "2 labels for 6 images.*: give each image one"),
        ("Paired", r"labels that are no classes .*: give each image one"),
    ],
)
def test_rejects_invalid_labels(module, tmp_path, name, match) -> None:
    with pytest.raises(UserError, match=match):
        Data(f"{module}.{name}", root=tmp_path)


def opened(image: object) -> torch.Tensor | Image.Image:
    return DatasetSource([image], torch.tensor([-1]), torch.tensor([0])).open(0)


RAMP = torch.tensor([0, 128, 255]).view(1, 1, 3).expand(3, 2, 3)


@pytest.mark.parametrize(
    "image",
    [
        RAMP.byte(),
        RAMP.long(),
        RAMP.to(torch.uint16),
        RAMP.short()[:1],
        RAMP / 255,
        (RAMP / 255).half(),
        RAMP / 255 * 1.0005 - 1e-4,  # rounding
        RAMP.byte().permute(1, 2, 0).numpy(),
        RAMP.byte()[0].numpy(),
        RAMP.permute(1, 2, 0).numpy(),
        RAMP[0].numpy(),
        RAMP.permute(1, 2, 0).numpy().astype(np.uint16),
        (RAMP / 255).permute(1, 2, 0).numpy(),
        (RAMP[:1] / 255).permute(1, 2, 0).double().numpy(),
        (RAMP / 255)[0].numpy(),
    ],
    ids=lambda image: f"{type(image).__name__}-{image.dtype}-{tuple(image.shape)}",
)
def test_every_dtype_gives_the_same_image(image) -> None:
    made = opened(image)
    made = made.numpy() if isinstance(made, torch.Tensor) else np.asarray(made).transpose(2, 0, 1)
    assert made.dtype == np.uint8
    assert np.array_equal(made, np.broadcast_to(RAMP[: len(made)].numpy(), made.shape))


def test_arrays_with_16_bits_or_transparency() -> None:
    assert opened(np.full((2, 2), 40000, np.uint16)).getpixel((0, 0)) == (156, 156, 156)
    assert opened(np.zeros((2, 2, 4), np.uint8)).getpixel((0, 0)) == (255, 255, 255)


@pytest.mark.parametrize(
    ("image", "match"),
    [
        (RAMP.float(), "float32 image with values 0 to 255: scale it to 0..1, or return uint8"),
        (RAMP / 128 - 1, "values -1 to 0.99"),
        (RAMP / 255 * float("nan"), "values nan to nan"),
        (RAMP * 257, "int64 image with values 0 to 65535: scale it to 0..255"),
        (RAMP - 1, "values -1 to 254"),
        (RAMP.float().permute(1, 2, 0).numpy(), "values 0 to 255: scale it to 0..1"),
        (torch.zeros(3, 0, 5), r"Tensor torch.Size\(\[3, 0, 5\]\) torch.float32"),
        (np.zeros((2, 2, 5), np.float32), r"ndarray \(2, 2, 5\) float32"),
        (np.array(["a"]), r"ndarray \(1,\) <U1"),
    ],
)
def test_rejects_values_out_of_range(image, match) -> None:
    with pytest.raises(UserError, match=match) as caught:
        opened(image)
    assert not isinstance(caught.value, UnreadableImage)
    assert "\n" not in str(caught.value)
