"""Workers, processes and restarts change no view; unreadable images are skipped, or stop everything if asked."""

import multiprocessing
import os
import pickle
import signal
import subprocess
import sys
import types
import warnings
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from sslbook import train
from sslbook.data.datasets.shapes import Shapes
from sslbook.data.loader import Batch, Data
from sslbook.data.views import View
from sslbook.errors import UserError

VIEWS = (
    View(size=16, color_jitter=(0.8, 0.8, 0.8, 0.2), grayscale=0.2, blur=0.5),
    View(size=12, crop=(0.3, 0.6), solarize=0.5),
)
SMALL = Shapes(num_train=50, num_test=13, size=16)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """46 images of three classes and many sizes: 40 training images, 6 test images."""
    folder = tmp_path_factory.mktemp("images")
    generator = np.random.default_rng(0)
    for i in range(46):
        path = folder / "abc"[i % 3] / f"{i:02}.png"
        path.parent.mkdir(exist_ok=True)
        height, width = generator.integers(10, 40, 2)
        Image.fromarray(generator.integers(0, 256, (height, width, 3), dtype=np.uint8)).save(path)
    return folder


def epoch(data: Data, **options: object) -> list[Batch]:
    settings = {"seed": 0, "epoch": 1} | options
    return list(data.batches(VIEWS, 8, **settings))


def assert_same(found: Iterable[Batch], expected: Iterable[Batch]) -> None:
    found, expected = list(found), list(expected)
    assert len(found) == len(expected) > 0
    for a, b in zip(found, expected):
        assert a.index.tolist() == b.index.tolist()
        assert a.label.tolist() == b.label.tolist()
        for x, y in zip(a.views, b.views):
            assert torch.equal(x, y)


def children() -> set[multiprocessing.Process]:
    return set(multiprocessing.active_children())


def make(kind: str, folder: Path, **options: object) -> Data:
    return Data(shapes=SMALL, **options) if kind == "shapes" else Data(folder=folder, **{"workers": 0} | options)


@pytest.mark.parametrize("kind", ["shapes", "files"])
def test_epoch_shows_every_image_once(kind, folder) -> None:
    data = make(kind, folder)
    batches = epoch(data)
    assert len(batches) == data.steps_per_epoch(8) == data.num_train // 8
    shown = torch.cat([batch.index for batch in batches])
    assert len(shown.unique()) == len(shown) == 8 * len(batches)
    assert torch.equal(torch.cat([batch.label for batch in batches]), data.labels("train")[shown])
    assert [view.shape for view in batches[0].views] == [(8, 3, 16, 16), (8, 3, 12, 12)]
    assert all(view.dtype == torch.float32 for view in batches[0].views)
    assert not torch.equal(shown, torch.cat([batch.index for batch in epoch(data, epoch=2)]))
    assert not torch.equal(shown, torch.cat([batch.index for batch in epoch(data, seed=1)]))


@pytest.mark.parametrize("augment", ["device", "workers"])
@pytest.mark.slow
def test_workers_change_no_view(folder, augment) -> None:
    alone = epoch(Data(folder=folder, workers=0, augment=augment))
    several = Data(folder=folder, workers=2, augment=augment)
    assert_same(epoch(several), alone)
    assert_same(epoch(several, epoch=2), epoch(Data(folder=folder, workers=0, augment=augment), epoch=2))
    assert_same(epoch(several), alone)  # the same processes again


@pytest.mark.slow
def test_spawned_workers_change_no_view(folder) -> None:
    assert_same(epoch(Data(folder=folder, workers=1, start_method="spawn")), epoch(Data(folder=folder, workers=0)))


@pytest.mark.parametrize("stop", [None, 1])  # 1: the rest of the epoch fills no step of several parts
def test_workers_are_kept_for_the_next_epoch(folder, stop) -> None:
    data, others = Data(folder=folder, workers=1), children()
    workers = []
    for number in range(2):
        batches = data.batches(VIEWS, 8, seed=0, epoch=number, stop=stop)
        for _ in range(stop or data.steps_per_epoch(8)):
            next(batches)
        workers.append(children() - others)
    assert len(workers[0]) == 1
    assert workers[0] == workers[1]


def test_two_passes_at_the_same_time(folder) -> None:
    data = Data(folder=folder, workers=1)
    epoch(data)
    first, second = (data.batches(VIEWS, 8, seed=0, epoch=number) for number in (1, 2))
    pairs = list(zip(first, second))
    alone = Data(folder=folder, workers=0)
    assert_same([pair[0] for pair in pairs], epoch(alone, epoch=1))
    assert_same([pair[1] for pair in pairs], epoch(alone, epoch=2))


@pytest.mark.parametrize("kind", ["shapes", "files"])
def test_processes_change_no_view(kind, folder) -> None:
    data = make(kind, folder)
    parts = [epoch(data, rank=rank, world_size=2) for rank in range(2)]

    def join(a: Batch, b: Batch) -> Batch:
        views = tuple(torch.cat(pair) for pair in zip(a.views, b.views))
        return Batch(views, torch.cat([a.index, b.index]), torch.cat([a.label, b.label]))

    whole = epoch(data)
    joined = [join(*pair) for pair in zip(*parts)]
    for a, b in zip(joined, whole):
        assert a.index.tolist() == b.index.tolist()
        for x, y in zip(a.views, b.views):  # a matrix product may round otherwise in another batch size
            torch.testing.assert_close(x, y, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", ["shapes", "files"])
@pytest.mark.parametrize("start", [1, 4])
def test_restart_changes_no_view(kind, folder, start) -> None:
    data = make(kind, folder)
    assert_same(epoch(data, start=start), epoch(data)[start:])


def test_consumes_no_number_of_torchs_generator(folder) -> None:
    for data in (make("shapes", folder), make("files", folder), make("files", folder, workers=1)):
        before = torch.get_rng_state()
        epoch(data)
        list(data.evaluation_batches("test"))
        assert torch.equal(torch.get_rng_state(), before)


def test_images_in_memory_with_and_without_workers() -> None:
    """The views agree up to the rounding to bytes."""
    here = epoch(Data(shapes=SMALL))
    workers = epoch(Data(shapes=SMALL, augment="workers", workers=1))
    for a, b in zip(here, workers):
        assert a.index.tolist() == b.index.tolist()
        assert (a.views[1] - b.views[1]).abs().max() < 0.05


@pytest.mark.parametrize("kind", ["shapes", "files"])
def test_evaluation_shows_every_image_in_order(kind, folder) -> None:
    data = make(kind, folder, workers=2)
    for split, count in (("train", data.num_train), ("test", data.num_test)):
        batches = list(data.evaluation_batches(split, View.center(16), batch_size=6))
        assert torch.cat([batch.index for batch in batches]).tolist() == list(range(count))
        assert torch.equal(torch.cat([batch.label for batch in batches]), data.labels(split))
    assert batches[0].views[0].shape == (min(6, count), 3, 16, 16)


def test_evaluation_shows_images_without_augmentation() -> None:
    data = Data(shapes=SMALL)
    view = View.center(16, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))
    images, factors = SMALL.render("test")
    shown = torch.cat([batch.views[0] for batch in data.evaluation_batches("test", view, 4)])
    torch.testing.assert_close(shown, images / 255)
    assert data.factors("test").keys() == factors.keys()
    assert torch.equal(data.labels("test"), factors["shape"])
    assert data.size == 16
    assert np.array_equal(np.asarray(data.image("test", 3)), images[3].permute(1, 2, 0).numpy())


def test_data_from_images_in_memory() -> None:
    images, factors = SMALL.render("train")
    test, known = SMALL.render("test")
    data = Data.from_images(images, factors["shape"], test, known["shape"], Shapes.class_names, "mine")
    assert data.describe() == "mine: 50 training images, 10 classes, 13 test images"
    assert data.size == 16
    for batch, expected in zip(data.evaluation_batches("test", None), Data(shapes=SMALL).evaluation_batches("test")):
        assert torch.equal(batch.views[0], expected.views[0])
        assert torch.equal(batch.label, expected.label)
    unlabeled = Data.from_images(images, torch.full((50,), -1))
    assert unlabeled.describe() == "images: 50 training images, no labels, no test images"


def test_limit_selects_the_same_images_every_time() -> None:
    data, whole = Data(shapes=SMALL, limit=20), Data(shapes=SMALL)
    assert (data.num_train, data.num_test) == (20, 13)
    kept = data.factors("train")["x"]
    assert torch.equal(kept, Data(shapes=SMALL, limit=20).factors("train")["x"])
    assert torch.isin(kept, whole.factors("train")["x"]).all()
    assert torch.equal(data.factors("train")["shape"], data.labels("train"))
    assert len(data.labels("train").unique()) > 3
    assert Data(shapes=SMALL, limit=99).num_train == 50
    assert sum(len(batch.index) for batch in epoch(data)) == 16


def test_describe(folder) -> None:
    assert Data(shapes=SMALL).describe() == "shapes: 50 training images, 10 classes, 13 test images"
    data = make("files", folder)
    assert data.describe() == f"{folder.name}: 40 training images, 3 classes, 6 test images"
    assert make("files", folder / "a").describe() == "a: 16 training images, no labels, no test images"


def test_data_can_be_pickled(folder) -> None:
    data = make("files", folder, workers=1)
    expected = epoch(data)
    assert_same(epoch(pickle.loads(pickle.dumps(data))), expected)


# Broken images -----------------------------------------------------------------------------------------------------


@pytest.fixture
def broken(tmp_path) -> Path:
    """16 images, each of one color, of which 3, 8 and 9 are truncated."""
    for i in range(16):
        path = tmp_path / "train" / "ab"[i // 8] / f"{i:02}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (16, 16), (16 * i, 0, 0)).save(path)
        if i in (3, 8, 9):
            path.write_bytes(path.read_bytes()[:40])
    (tmp_path / "test").symlink_to(tmp_path / "train")
    return tmp_path


PLAIN = View(size=8, flip=0.0, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))


def colors(batch: Batch) -> Tensor:
    return (batch.views[0][:, 0].mean((1, 2)) * 255 / 16).round().long()


@pytest.mark.parametrize("workers", [0, 2])
def test_next_readable_image_replaces_an_unreadable_one(broken, workers) -> None:
    data = Data(folder=broken, workers=workers)
    with pytest.warns(UserWarning, match=r"skipped the unreadable image .*\.png") as caught:
        batches = list(data.batches((PLAIN,), 4, seed=0, epoch=0))
    assert len([w for w in caught if "unreadable" in str(w.message)]) == 1
    shown = torch.cat([batch.index for batch in batches])
    assert sorted(shown.tolist()) == sorted([0, 1, 2, 4, 4, 5, 6, 7, 10, 10, 10, 11, 12, 13, 14, 15])
    for batch in batches:
        assert torch.equal(colors(batch), batch.index)
        assert torch.equal(batch.label, batch.index // 8)
    assert data.skipped == 3
    assert {Path(name).name for name in data.unreadable} == {"03.png", "08.png", "09.png"}

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again = list(data.batches((PLAIN,), 4, seed=0, epoch=0, start=2))
    assert_same(again, batches[2:])
    assert data.skipped == 3


@pytest.mark.parametrize("workers", [0, 1])
def test_evaluation_leaves_unreadable_images_out(broken, workers) -> None:
    data = Data(folder=broken, workers=workers)
    with pytest.warns(UserWarning, match="unreadable"):
        batches = list(data.evaluation_batches("test", View.center(8, mean=(0.0,) * 3, std=(1.0,) * 3), 2))
    shown = torch.cat([batch.index for batch in batches])
    assert shown.tolist() == [i for i in range(16) if i not in (3, 8, 9)]
    assert torch.equal(torch.cat([batch.label for batch in batches]), data.labels("test")[shown])
    assert torch.equal(torch.cat([colors(batch) for batch in batches]), shown)


@pytest.mark.parametrize("workers", [0, 2])
def test_strict_raises_with_the_images_name(broken, workers) -> None:
    data = Data(folder=broken, workers=workers, strict=True)
    with pytest.raises(UserError, match=r"cannot read the image .*(03|08|09)\.png \(.+\)") as caught:
        list(data.batches((PLAIN,), 4, seed=0, epoch=0))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("workers", [0, 1])
def test_folder_without_a_readable_image_raises(tmp_path, workers) -> None:
    for i in range(5):
        (tmp_path / f"{i}.jpg").write_text("no image")
    data = Data(folder=tmp_path, workers=workers)
    with (
        pytest.warns(UserWarning, match="no image|identify"),
        pytest.raises(UserError, match="5 images in a row cannot be read, the last is"),
    ):
        list(data.batches((PLAIN,), 2, seed=0, epoch=0))


# Errors and signals -------------------------------------------------------------------------------------------------------


def test_rejects_invalid_options() -> None:
    data = Data(shapes=SMALL)
    for batch_size in (51, 0):
        with pytest.raises(UserError, match=f"a batch of {batch_size} of 50 images: use a smaller one, of at least 1"):
            data.steps_per_epoch(batch_size)


@pytest.mark.parametrize(
    ("option", "cure"),
    [("limit=0", "give 1 or more"), ("workers=-1", "give 0 or more"), ("shapes.num_test=-3", "give 1 or more")],
)
@pytest.mark.slow
def test_command_line_rejects_counts_out_of_range(option, cure) -> None:
    with pytest.raises(UserError, match=f"data.{option.replace('=', ' is ')}: {cure}"):
        train.main(["simclr", f"--data.{option}"])


class Deadly:
    """Kills the process that opens image 11."""

    def __len__(self) -> int:
        return 16

    def __getitem__(self, i: int) -> Image.Image:
        if i == 11:
            os.kill(os.getpid(), signal.SIGKILL)
        return Image.new("RGB", (9, 9))


@pytest.fixture
def deadly(monkeypatch) -> str:
    module = types.ModuleType("a_deadly_module")
    module.Deadly = Deadly
    monkeypatch.setitem(sys.modules, module.__name__, module)
    return "a_deadly_module.Deadly"


def test_dead_worker_raises_one_line(deadly) -> None:
    data = Data(deadly, workers=1)
    with pytest.raises(UserError, match=r"a loader worker died .*--data\.workers") as caught:
        list(data.batches((PLAIN,), 4, seed=0, epoch=0))
    assert "\n" not in str(caught.value)


class Faulty(Deadly):
    """Raises an error of its own, and only when a worker opens an image."""

    targets = (0,) * 16

    def __getitem__(self, i: int) -> Image.Image:
        raise EOFError("the socket is shut")


def test_error_of_the_dataset_is_not_taken_for_a_dead_worker(deadly) -> None:
    sys.modules["a_deadly_module"].Faulty = Faulty
    with pytest.raises(EOFError, match="the socket is shut"):
        list(Data("a_deadly_module.Faulty", workers=1).batches((PLAIN,), 4, seed=0, epoch=0))


@pytest.mark.skipif(not hasattr(signal, "sigwaitinfo"), reason="this system does not tell who sent a signal")
def test_workers_ignore_signals_of_other_processes(folder) -> None:
    """A scheduler's SIGTERM reaches every process of the job; the main one must find its workers alive."""
    data, others = Data(folder=folder, workers=1), children()
    batches = data.batches(VIEWS, 8, seed=0, epoch=0)
    next(batches)
    [worker] = children() - others
    sender = os.fork()  # not the worker's parent
    if sender == 0:
        os.kill(worker.pid, signal.SIGTERM)
        os.kill(worker.pid, signal.SIGINT)
        os._exit(0)
    os.waitpid(sender, 0)
    assert len(list(batches)) == 4
    assert worker.is_alive()
    worker.terminate()
    worker.join(10)
    assert not worker.is_alive()


LOADING = """
import signal, sys
from pathlib import Path
from sslbook.data.loader import Data
from sslbook.data.views import View

if __name__ == "__main__":
    signals = []
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda number, _: signals.append(number))
    data = Data(folder=Path(sys.argv[1]), workers=2, start_method="fork")
    batches = data.batches((View(size=8),), 8, seed=0, epoch=0)
    next(batches)
    print("loading", flush=True)
    sys.stdin.readline()
    print(1 + len(list(batches)), *sorted(signals))
"""


@pytest.mark.skipif(not hasattr(signal, "sigwaitinfo"), reason="this system does not tell who sent a signal")
@pytest.mark.slow
def test_signals_to_the_process_group_lose_no_batch(folder, tmp_path) -> None:
    (tmp_path / "loading.py").write_text(LOADING)
    command = [sys.executable, "loading.py", str(folder)]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, cwd=tmp_path, env=environment, start_new_session=True, **pipes) as process:
        assert process.stdout.readline() == "loading\n"
        for number in (signal.SIGTERM, signal.SIGINT):
            os.killpg(process.pid, number)
        output, _ = process.communicate("\n", timeout=120)
    assert output.split() == ["5", str(int(signal.SIGINT)), str(int(signal.SIGTERM))]
    assert process.returncode == 0
