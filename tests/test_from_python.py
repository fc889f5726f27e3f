"""The package as a library: objects instead of words of a command line."""

import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import sslbook
from sslbook import methods
from sslbook.data.loader import Data
from sslbook.data.views import View
from sslbook.engine.loop import pretrain
from sslbook.errors import UserError
from sslbook.evaluate import evaluate
from sslbook.nn import ConvNet

ADAMW = partial(torch.optim.AdamW, lr=1e-3)


def simclr() -> methods.base.Method:
    return methods.SimCLR(ConvNet(4), View(size=16), projector_dim=4)


class Images:
    """Map-style: PIL images, arrays or tensors, with labels or without."""

    def __init__(self, count: int, kind: str, labeled: bool = True) -> None:
        self.arrays = np.random.default_rng(0).integers(0, 255, (count, 20, 20, 3), dtype=np.uint8)
        self.kind, self.labeled = kind, labeled

    def __len__(self) -> int:
        return len(self.arrays)

    def __getitem__(self, i: int) -> object:
        if i >= len(self):
            raise IndexError(i)
        array = self.arrays[i]
        image = {
            "pil": lambda: Image.fromarray(array),
            "array": lambda: array,
            "uint8": lambda: torch.from_numpy(array).permute(2, 0, 1),
            "float": lambda: torch.from_numpy(array).permute(2, 0, 1) / 255,
        }[self.kind]()
        return (image, i % 2) if self.labeled else image


@pytest.mark.parametrize("kind", ["pil", "array", "uint8", "float"])
def test_a_dataset_object_of_any_kind_of_image(kind: str, tmp_path: Path) -> None:
    data = Data(train=Images(16, kind), test=Images(8, kind), workers=0)
    assert data.describe() == "Images: 16 training images, 2 classes, 8 test images"
    run = pretrain(simclr(), data, ADAMW, batch_size=8, steps=2, out_dir=tmp_path / "run", progress=False, device="cpu")
    assert run.folder == tmp_path / "run"
    assert "knn" in {name.lower() for name in evaluate(str(run.folder), data, progress=False, device="cpu")["SimCLR"]}


def test_a_dataset_object_gives_the_same_views_as_its_images() -> None:
    given = Images(8, "uint8")
    images = torch.from_numpy(given.arrays).permute(0, 3, 1, 2).contiguous()
    labels = torch.arange(8) % 2
    one = Data(train=given, workers=0).batches((View(size=16),), 8, seed=0, epoch=0)
    two = Data.from_images(images, labels).batches((View(size=16),), 8, seed=0, epoch=0)
    for a, b in zip(one, two, strict=True):
        assert torch.equal(a.index, b.index)
        assert torch.equal(a.label, b.label)
        torch.testing.assert_close(a.views[0], b.views[0], atol=0.03, rtol=0)  # one crops in uint8, one in float


def test_unlabeled_and_limited_datasets() -> None:
    assert Data(train=Images(16, "pil", labeled=False)).num_classes == 0
    subset = torch.utils.data.Subset(Images(16, "pil"), range(10))
    assert Data(train=subset).num_train == 10
    assert Data(train=Images(16, "pil"), limit=5).num_train == 5
    assert Data(train=[item for item in Images(4, "pil")]).num_train == 4


def test_an_iterable_is_refused_with_the_cure() -> None:
    with pytest.raises(UserError, match=r"generator has no __len__ .* list\(dataset\)"):
        Data(train=(item for item in Images(4, "pil")))


SCRIPT = """
import torch, sslbook
from functools import partial
from sslbook.methods import SimCLR
from sslbook.nn import ConvNet
from sslbook.data.datasets.shapes import Shapes
method, data = SimCLR(ConvNet(4)), sslbook.Data(shapes=Shapes(num_train=16, num_test=4))
adamw = partial(torch.optim.AdamW, lr=1e-3)
for call in (
    lambda: sslbook.Data([1, 2]),
    lambda: SimCLR("resnet18"),
    lambda: sslbook.pretrain(method, "photos", adamw),
    lambda: sslbook.pretrain("simclr", data, adamw),
    lambda: sslbook.pretrain(method, data, "adamw"),
    lambda: sslbook.pretrain(method, data, adamw, schedule="cosine"),
    lambda: sslbook.pretrain(method, data, adamw, precision="bfloat16"),
):
    try:
        call()
    except sslbook.UserError as error:
        print(error)
"""


@pytest.mark.slow
def test_texts_in_place_of_objects_say_what_they_want(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=True, cwd=tmp_path)
    assert done.stdout.splitlines() == [
        "a data set is named by a text; write Data(train=DATASET), or Data(folder=FOLDER)",
        "the backbone 'resnet18' is a text: give the network, such as sslbook.nn.resnet18()",
        "pretrain(data='photos'): give Data(folder='photos')",
        "pretrain(method='simclr'): give SimCLR(resnet18())",
        "pretrain(optimizer='adamw'): give functools.partial(torch.optim.AdamW, lr=1e-3)",
        "pretrain(schedule='cosine'): give sslbook.schedules.Cosine()",
        "pretrain(precision='bfloat16'): give 'float32', 'bf16' or 'fp16'",
    ]
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_methods_are_imported_by_their_class_when_asked_for() -> None:
    script = "import sys, sslbook.methods as m; print('SimCLR' in dir(m), 'torch' in sys.modules); m.BYOL; m.Nothing"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.stdout == "True False\n"
    assert "has no attribute 'Nothing'" in done.stderr
    for name, path in methods.METHODS.items():
        assert getattr(methods, path.rpartition(".")[2]) is methods.load(name)


def test_the_example_of_the_package_runs(tmp_path: Path, monkeypatch) -> None:
    import doctest

    monkeypatch.chdir(tmp_path)
    example = doctest.DocTestParser().get_doctest(
        sslbook.__doc__.replace("epochs=5", "steps=2"), {}, "sslbook", None, 0
    )
    runner = doctest.DocTestRunner(verbose=False)
    assert runner.run(example).failed == 0
    assert len(example.examples) == 9
