"""data_scripts/cifar10.py on a release of forty images, from a loopback server."""

import hashlib
import io
import os
import pickle
import struct
import sys
import tarfile
from pathlib import Path

import cifar10
import numpy as np
import pytest
from _fetch import RemoteFile
from loopback import File, Server
from PIL import Image

from sslbook.errors import UserError

CLASSES = ["airplane", "automobile"]


class Python2Pickler(pickle._Pickler):
    """Writes strings and bytes as Python 2 did, in whose pickles CIFAR is published."""

    dispatch = dict(pickle._Pickler.dispatch)

    def save_string(self, text: str | bytes) -> None:
        data = text.encode("latin1") if isinstance(text, str) else text
        self.write(pickle.BINSTRING + struct.pack("<i", len(data)) + data)
        self.memoize(text)

    dispatch[str] = dispatch[bytes] = save_string


def python2_pickle(value: object) -> bytes:
    stream = io.BytesIO()
    Python2Pickler(stream, protocol=2).dump(value)
    return stream.getvalue()


@pytest.fixture(scope="module")
def batches() -> dict[str, bytes]:
    rng = np.random.default_rng(0)
    names = [f"data_batch_{i}" for i in range(1, 6)] + ["test_batch"]
    files = {
        name: python2_pickle({"data": rng.integers(0, 256, (4, 3072), dtype=np.uint8), "labels": [0, 1, 1, 0]})
        for name in names
    }
    return files | {"batches.meta": python2_pickle({"label_names": CLASSES})}


def release(server: Server, files: dict[str, bytes], **faults: object) -> cifar10.Release:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w:gz") as archive:
        for name, data in files.items():
            info = tarfile.TarInfo(f"cifar-10-batches-py/{name}")
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    data = stream.getvalue()
    url = server.put("/cifar-10-python.tar.gz", File(data, **faults))
    return cifar10.Release(
        RemoteFile("cifar-10-python.tar.gz", (url,), len(data), f"sha256:{hashlib.sha256(data).hexdigest()}"),
        "cifar-10-batches-py",
        {name: hashlib.md5(data).hexdigest() for name, data in files.items()},
    )


@pytest.mark.slow
def test_fetches_verifies_and_writes_images(
    server: Server, tmp_path: Path, batches: dict[str, bytes], capsys: pytest.CaptureFixture[str]
) -> None:
    small = release(server, batches, cuts=[5000])
    out = ["--out", str(tmp_path / "data")]
    cifar10.main([*out, "--folder"], small)
    assert sorted(os.listdir(tmp_path / "data")) == ["cifar-10-batches-py", "cifar-10-python.tar.gz", "cifar10-png"]
    images = sorted(str(p.relative_to(tmp_path / "data/cifar10-png")) for p in tmp_path.rglob("*.png"))
    assert len(images) == 24
    assert images[:3] == [f"test/airplane/0000{i}.png" for i in (0, 3)] + ["test/automobile/00001.png"]
    assert images[-1] == "train/automobile/00018.png"
    with Image.open(tmp_path / "data/cifar10-png/train/automobile/00005.png") as image:
        data = cifar10.read(tmp_path / "data/cifar-10-batches-py/data_batch_2")["data"]
        np.testing.assert_array_equal(np.asarray(image).transpose(2, 0, 1).ravel(), data[1])

    asked = len(server.files["/cifar-10-python.tar.gz"].asked)
    cifar10.main([*out, "--folder"], small)
    cifar10.main([*out, "--verify"], small)
    assert len(server.files["/cifar-10-python.tar.gz"].asked) == asked == 2
    assert capsys.readouterr().out.count("verified") == 3

    damaged = tmp_path / "data/cifar-10-batches-py/data_batch_3"
    damaged.write_bytes(damaged.read_bytes()[:-1])
    for extra in [], ["--verify"]:
        with pytest.raises(UserError, match="data_batch_3 has the wrong checksum"):
            cifar10.main([*out, *extra], small)
    damaged.unlink()
    with pytest.raises(UserError, match="data_batch_3 is missing"):
        cifar10.main([*out, "--verify"], small)


def test_tries_the_given_mirror_first(server: Server, tmp_path: Path, batches: dict[str, bytes]) -> None:
    small = release(server, batches)
    own = File(server.files["/cifar-10-python.tar.gz"].data)
    cifar10.main(["--out", str(tmp_path), "--mirror", server.put("/own", own)], small)
    assert (len(own.asked), len(server.files["/cifar-10-python.tar.gz"].asked)) == (1, 0)


def test_rejects_an_archive_with_another_batch(server: Server, tmp_path: Path, batches: dict[str, bytes]) -> None:
    small = release(server, batches)
    small.files["test_batch"] = hashlib.md5(b"other").hexdigest()
    with pytest.raises(UserError, match="test_batch has the wrong checksum"):
        cifar10.main(["--out", str(tmp_path)], small)
    assert os.listdir(tmp_path) == ["cifar-10-python.tar.gz"]


class Evil:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, ("touch evil",)


def test_rejects_a_batch_that_would_execute_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "batch").write_bytes(pickle.dumps({"data": Evil()}))
    with pytest.raises(UserError, match=r"asks for (posix|nt)\.system"):
        cifar10.read(tmp_path / "batch")
    assert os.listdir(tmp_path) == ["batch"]


def test_checksums_equal_torchvision() -> None:
    from torchvision.datasets import CIFAR10

    published = CIFAR10.train_list + CIFAR10.test_list + [[CIFAR10.meta["filename"], CIFAR10.meta["md5"]]]
    assert cifar10.CIFAR10.files == dict(published)
    assert CIFAR10.url in cifar10.CIFAR10.source.urls


def test_as_a_command(tmp_path: Path) -> None:
    import subprocess

    root = Path(cifar10.__file__).parents[1]
    done = subprocess.run(
        [sys.executable, "data_scripts/cifar10.py", "--out", str(tmp_path), "--verify"],
        cwd=root,
        env=os.environ | {"PYTHONPATH": str(root)},
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
