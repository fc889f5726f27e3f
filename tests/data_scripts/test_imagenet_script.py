"""data_scripts/imagenet.py on a miniature of the ILSVRC 2012 archives: three classes, forty-one images."""

import hashlib
import io
import os
import shutil
import tarfile
from pathlib import Path

import imagenet
import numpy as np
import pytest
from PIL import Image
from scipy.io import savemat

from sslbook.errors import UserError

COUNTS = {"n01440764": 20, "n01443537": 10, "n02007558": 5}  # training images
TRUTH = [3, 1, 1, 2, 3, 2]  # in the kit's own numbers, which follow no order of the names
IDS = {1: "n02007558", 2: "n01440764", 3: "n01443537"}


def tar(members: dict[str, bytes], mode: str = "w") -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode=mode) as archive:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return stream.getvalue()


def image(shade: int) -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", (4, 4), (shade, 0, 0)).save(stream, "JPEG")
    return stream.getvalue()


def devkit(truth: list[int]) -> bytes:
    fields = [("ILSVRC2012_ID", "O"), ("WNID", "O"), ("words", "O"), ("num_children", "O"), ("num_train_images", "O")]
    rows = [(number, wnid, f"{wnid}, synonym", 0, COUNTS[wnid]) for number, wnid in IDS.items()]
    rows.append((4, "n00001740", "entity", 3, 0))  # an inner node of the hierarchy: no class
    meta = io.BytesIO()
    savemat(meta, {"synsets": np.array(rows, dtype=fields)})
    return tar(
        {
            "ILSVRC2012_devkit_t12/data/meta.mat": meta.getvalue(),
            "ILSVRC2012_devkit_t12/data/ILSVRC2012_validation_ground_truth.txt": "\n".join(map(str, truth)).encode(),
            "ILSVRC2012_devkit_t12/readme.txt": b"",
        },
        "w:gz",
    )


def edition(folder: Path, files: dict[str, bytes]) -> imagenet.Edition:
    folder.mkdir(exist_ok=True)
    archives = {}
    for part, data in files.items():
        name = imagenet.ILSVRC2012.archives[part][0]
        (folder / name).write_bytes(data)
        archives[part] = (name, hashlib.md5(data).hexdigest())
    return imagenet.Edition(archives, classes=3, train=sum(COUNTS.values()), val=len(TRUTH))


@pytest.fixture
def files() -> dict[str, bytes]:
    classes = {
        f"{wnid}.tar": tar({f"{wnid}_{7 * i}.JPEG": image(i) for i in range(count)}) for wnid, count in COUNTS.items()
    }
    val = {f"ILSVRC2012_val_{i:08d}.JPEG": image(i) for i in reversed(range(1, len(TRUTH) + 1))}
    return {"devkit": devkit(TRUTH), "train": tar(classes), "val": tar(val)}


def test_unpacks_sorts_and_lists(tmp_path: Path, files: dict[str, bytes], capsys: pytest.CaptureFixture[str]) -> None:
    mini = edition(tmp_path / "archives", files)
    out = tmp_path / "imagenet"
    call = ["--archives", str(tmp_path / "archives"), "--out", str(out)]
    imagenet.main(call, mini)
    lists = ["train_10percent_sslbook.txt", "train_1percent_sslbook.txt"]
    assert sorted(os.listdir(out)) == ["meta.bin", "train", *lists, "val"]
    assert {wnid: len(os.listdir(out / "train" / wnid)) for wnid in os.listdir(out / "train")} == COUNTS
    for number, label in enumerate(TRUTH, start=1):
        assert (out / "val" / IDS[label] / f"ILSVRC2012_val_{number:08d}.JPEG").read_bytes() == image(number)

    from torchvision.datasets import ImageNet

    for split, size in ("train", 35), ("val", 6):
        opened = ImageNet(out, split)
        assert len(opened) == size
        assert opened.classes[0] == ("n01440764", "synonym")

    # Nothing more to do: the archives are not even read.
    for name in "ILSVRC2012_img_train.tar", "ILSVRC2012_img_val.tar":
        (tmp_path / "archives" / name).unlink()
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    imagenet.main(call, mini)
    imagenet.main([*call, "--verify"], mini)
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == before
    assert capsys.readouterr().out.count("train: 3 classes, 35 images") == 3

    (out / "train/n01443537/n01443537_7.JPEG").unlink()
    with pytest.raises(UserError, match=r"34 images.*n01443537 holds 9, not 10"):
        imagenet.main(call, mini)


def test_goes_on_with_the_missing_classes(
    tmp_path: Path, files: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    mini = edition(tmp_path / "archives", files)
    out = tmp_path / "imagenet"
    call = ["--archives", str(tmp_path / "archives"), "--out", str(out)]
    copy, left = shutil.copyfileobj, 6 + 20 + 4

    def interrupted(*arguments: object) -> None:
        nonlocal left
        left -= 1
        if left < 0:
            raise KeyboardInterrupt
        copy(*arguments)

    monkeypatch.setattr(shutil, "copyfileobj", interrupted)
    with pytest.raises(KeyboardInterrupt):
        imagenet.main(call, mini)
    assert os.listdir(out / "train") == ["n01440764"]
    assert sorted(os.listdir(out)) == ["meta.bin", "train", "val"]

    left = 10 + 5  # enough for the two classes that are missing, not for the one that is there
    imagenet.main(call, mini)
    assert left == 0
    assert sorted(os.listdir(out / "train")) == sorted(COUNTS)


def test_lists_are_balanced_nested_and_always_the_same() -> None:
    train = {wnid: [f"{wnid}_{i}.JPEG" for i in range(1300)] for wnid in COUNTS} | {"n09999999": ["n09999999_1.JPEG"]}
    one, ten = imagenet.own_subset(train, 1), imagenet.own_subset(train, 10)
    assert [sum(name.startswith(wnid) for name in one) for wnid in train] == [13, 13, 13, 1]
    assert len(ten) == 391
    assert set(one) < set(ten)
    # A stored value: these lists must not change from one release to the next.
    assert [name.split("_")[1] for name in one[:3]] == ["1146.JPEG", "1214.JPEG", "1226.JPEG"]


def test_published_list(tmp_path: Path, files: dict[str, bytes]) -> None:
    mini = edition(tmp_path / "archives", files)
    listed = tmp_path / "1percent.txt"
    listed.write_text("n02007558_7.JPEG\nn01440764_21.JPEG\n")
    call = ["--archives", str(tmp_path / "archives"), "--out", str(tmp_path / "out"), "--subset-list", str(listed)]
    imagenet.main(call, mini)
    written = tmp_path / "out/train_1percent.txt"
    assert written.read_text() == "n02007558/n02007558_7.JPEG\nn01440764/n01440764_21.JPEG\n"
    for text, message in (
        ("n02007558_7.JPEG\n", "other contents"),
        ("n02007558_7.JPEG\nn02007558_8.JPEG\n", "line 2: 'n02007558_8.JPEG' is no training image"),
        ("../../etc/passwd\n", "line 1"),
        ("n02007558_7.JPEG\n" * 2, "twice"),
        ("\n", "empty"),
    ):
        listed.write_text(text)
        with pytest.raises(UserError, match=message):
            imagenet.main(call, mini)
    assert written.read_text().startswith("n02007558/n02007558_7.JPEG\n")


def test_bad_archives(tmp_path: Path, files: dict[str, bytes]) -> None:
    archives, out = tmp_path / "archives", tmp_path / "out"
    call = ["--archives", str(archives), "--out", str(out)]
    mini = edition(archives, files)
    for part in "devkit", "val", "train":  # the order in which they are read
        name = mini.archives[part][0]
        whole = (archives / name).read_bytes()
        (archives / name).write_bytes(whole[:-1])
        with pytest.raises(UserError, match=f"{name} has the wrong checksum"):
            imagenet.main(call, mini)
        (archives / name).unlink()
        with pytest.raises(UserError, match=f"{name} is missing"):
            imagenet.main(call, mini)
        assert not (out / part).exists()
        (archives / name).write_bytes(whole)
    with pytest.raises(UserError, match="train is missing"):
        imagenet.main([*call, "--verify"], mini)


@pytest.mark.parametrize("truth", [TRUTH[:-1], [*TRUTH[:-1], 4]])
def test_devkit_of_another_year(tmp_path: Path, files: dict[str, bytes], truth: list[int]) -> None:
    mini = edition(tmp_path / "archives", files | {"devkit": devkit(truth)})
    with pytest.raises(UserError, match="is it the 2012 kit"):
        imagenet.main(["--archives", str(tmp_path / "archives"), "--out", str(tmp_path / "out")], mini)


def test_evil_class_archive_writes_nothing_outside(tmp_path: Path, files: dict[str, bytes]) -> None:
    evil = tar({f"{wnid}.tar": tar({"n_1.JPEG": b"x", "../../evil": b"x"}) for wnid in COUNTS})
    mini = edition(tmp_path / "archives", files | {"train": evil})
    with pytest.raises(UserError, match=r"n01440764\.tar holds '\.\./\.\./evil'"):
        imagenet.main(["--archives", str(tmp_path / "archives"), "--out", str(tmp_path / "out")], mini)
    assert not list(tmp_path.rglob("evil"))
    assert os.listdir(tmp_path / "out/train") == []
