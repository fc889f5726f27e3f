import pickle

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.datasets import CIFAR10

from sslbook.notebook import photographs


@pytest.fixture
def data(tmp_path, monkeypatch):
    monkeypatch.setenv("SSLBOOK_DATA", str(tmp_path))
    monkeypatch.setenv("SSLBOOK_PROFILE", "smoke")
    return tmp_path


def folder(root, count):
    """A folder of images whose gray value is 10 * class + number."""
    for split in ("train", "test"):
        for label, name in enumerate(photographs.CLASSES):
            (root / "cifar10-jpeg" / split / name).mkdir(parents=True)
            for i in range(count):
                image = Image.fromarray(np.full((32, 32, 3), 10 * label + i, dtype=np.uint8))
                image.save(root / "cifar10-jpeg" / split / name / f"{i:04}.jpg", quality=100)


def test_the_classes_of_a_folder_take_turns(data):
    folder(data, 3)
    found = photographs.cifar10(25, 10)
    assert found.name == "CIFAR-10 (JPEG)"
    assert found.train.shape == (25, 3, 32, 32)
    assert found.train.dtype == torch.uint8
    assert found.train_labels.tolist() == [*range(10), *range(10), *range(5)]
    values = found.train.float().mean((1, 2, 3))
    expected = 10 * found.train_labels + torch.arange(25) // 10
    torch.testing.assert_close(values, expected.float(), atol=1.5, rtol=0)
    assert found.test_labels.tolist() == list(range(10))
    assert found.classes[3] == "cat"


def test_without_counts_all_are_read(data):
    folder(data, 2)
    assert [len(split) for split in (photographs.cifar10().train, photographs.cifar10().test)] == [20, 20]


def batches(root, first=None):
    """torchvision's files, the first of them replaced by `first`."""
    place = root / "cifar-10-batches-py"
    place.mkdir()
    for i, name in enumerate([*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]):
        images = np.full((20, 3072), i, dtype=np.uint8)
        images[:, 1024:2048] = 200  # green
        content = {"data": images, "labels": sorted(list(range(10)) * 2)}
        (place / name).write_bytes(pickle.dumps(content if i or first is None else first))


class Evil:
    def __reduce__(self):
        return (exec, ("import pathlib; pathlib.Path('ran').touch()",))


def test_a_file_that_is_not_the_original_is_never_unpickled(data, monkeypatch, capsys):
    monkeypatch.chdir(data)
    batches(data, first=Evil())
    assert photographs.cifar10(10, 10) is None
    assert "left out" in capsys.readouterr().out
    assert not (data / "ran").exists()


def test_torchvisions_files_are_read(data, monkeypatch):
    batches(data)
    monkeypatch.setattr(CIFAR10, "_check_integrity", lambda self: True)  # these are none of the original files
    monkeypatch.setattr(CIFAR10, "_load_meta", lambda self: None)
    found = photographs.cifar10(30, None)
    assert found.name == "CIFAR-10"
    assert found.train_labels.tolist() == [*range(10)] * 3
    assert (
        found.train[:, 0].float().mean((1, 2)).tolist() == [0.0] * 20 + [1.0] * 10
    )  # the first file holds 2 of a class
    assert found.train[0, 1].unique().tolist() == [200]
    assert found.test.shape == (20, 3, 32, 32)
    assert found.test[0, 0, 0, 0] == 5


def test_where_there_are_none_one_line_is_printed(data, capsys):
    assert photographs.cifar10(10, 10) is None
    assert len(capsys.readouterr().out.splitlines()) == 1


def test_a_failed_download_is_one_line_and_no_error(data, monkeypatch, capsys):
    import torchvision.datasets

    def fail(root, download):
        raise OSError("no network\nat all")

    monkeypatch.setattr(torchvision.datasets, "CIFAR10", fail)
    monkeypatch.setenv("SSLBOOK_PROFILE", "colab")
    assert photographs.cifar10(10, 10) is None
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith("no CIFAR-10 (no network): the photographs are left out")


def test_a_broken_folder_is_no_error(data, capsys):
    (data / "cifar10-jpeg" / "train").mkdir(parents=True)
    assert photographs.cifar10(10, 10) is None
    assert capsys.readouterr().out.startswith("no CIFAR-10 (")


def test_the_folder_here_comes_before_the_checkouts(tmp_path, monkeypatch):
    monkeypatch.delenv("SSLBOOK_DATA", raising=False)
    (tmp_path / "book" / "results").mkdir(parents=True)
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    assert photographs.roots() == [tmp_path / "work" / "data", tmp_path / "data"]
