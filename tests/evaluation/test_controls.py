"""Controls are measured like the method; labels help; nothing global is disturbed."""

import copy

import pytest
import torch
from torch import nn

from sslbook.data.datasets.shapes import Shapes
from sslbook.data.loader import Data
from sslbook.data.views import View
from sslbook.errors import UserError
from sslbook.evaluation import controls, knn
from sslbook.evaluation.table import measure

EASY = Shapes(
    num_train=200,
    num_test=60,
    position=0.0,
    scale=0.0,
    orientation=0.0,
    hue=0.0,
    lighting=0.0,
    background=0.0,
    noise=0.0,
)
VIEW = View.center(16)


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=2), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(3), nn.Flatten()
    )


def test_pixels_are_the_raw_images() -> None:
    data = Data(shapes=Shapes(num_train=60, num_test=20))
    row = controls.pixels(data, View.center(16), protocols=("knn",), progress=False)
    (train, train_f), (test, test_f) = data.shapes.render("train"), data.shapes.render("test")
    expected = knn.accuracy(train.flatten(1).float(), train_f["shape"], test.flatten(1).float(), test_f["shape"])
    assert row.name == "pixels"
    assert row.knn == pytest.approx(expected)
    assert row.linear is None


def test_large_images_are_compared_small() -> None:
    seen = []
    original = controls.measure

    def spy(name: str, backbone: nn.Module, data: Data, view: View, **options: object) -> object:
        seen.append(view)
        return original(name, backbone, data, view, **options)

    controls.measure = spy
    try:
        data = Data(shapes=Shapes(num_train=20, num_test=10, size=40))
        controls.pixels(data, View.center(224, resize=256), protocols=("knn",), progress=False)
    finally:
        controls.measure = original
    assert (seen[0].size, seen[0].resize) == (32, 37)


def test_random_weights_are_measured_like_a_method() -> None:
    data = Data(shapes=EASY)
    row = controls.random_weights(network(), data, VIEW, progress=False)
    expected = measure("random weights", network(), data, VIEW, progress=False)
    assert (row.name, row.knn, row.linear) == (expected.name, expected.knn, expected.linear)


def test_supervision_helps_and_is_repeatable() -> None:
    data, view = Data(shapes=EASY), View(16, crop=(0.9, 1.0), flip=0.0)
    start = network()
    options = {"evaluation_view": VIEW, "lr": 0.02, "progress": False}
    state = torch.random.get_rng_state()
    trained = copy.deepcopy(start)
    row = controls.supervised(trained, data, view, 60, 50, **options)
    assert torch.equal(torch.random.get_rng_state(), state)
    before = controls.random_weights(start, data, VIEW, progress=False)
    assert row.name == "supervised"
    assert row.head is not None
    assert row.head > 60
    assert row.linear is not None
    assert row.linear >= before.linear - 5
    again = controls.supervised(copy.deepcopy(start), data, view, 60, 50, **options)
    assert (again.knn, again.linear, again.head) == (row.knn, row.linear, row.head)
    assert int(trained[1].num_batches_tracked) == 60  # exactly the steps asked for, over epochs of four batches


def test_what_cannot_be_measured_is_refused(tmp_path) -> None:
    from PIL import Image

    for i in range(4):
        Image.new("RGB", (20, 20)).save(tmp_path / f"{i}.png")
    data = Data(folder=tmp_path, workers=0)
    with pytest.raises(UserError, match="no labels"):
        controls.pixels(data, VIEW, progress=False)
    with pytest.raises(UserError, match="no labels"):
        controls.supervised(network(), data, VIEW, 2, 2, evaluation_view=VIEW, progress=False)


def test_a_diverging_control_stops() -> None:
    data = Data(shapes=Shapes(num_train=60, num_test=20))
    backbone = network()
    nn.init.constant_(backbone[0].weight, float("nan"))
    with pytest.raises(UserError, match="loss became nan at step 0"):
        controls.supervised(backbone, data, VIEW, 3, 20, evaluation_view=VIEW, progress=False)
