"""Controls: pixels are the images themselves, labels help, no global state changes."""

import copy
import math

import pytest
import torch
from PIL import Image
from torch import nn

from sslbook.data.datasets.shapes import Shapes
from sslbook.data.loader import Data
from sslbook.data.views import View
from sslbook.errors import UserError
from sslbook.evaluation import controls

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
    features = controls.pixels(data, View.center(16), progress=False).features("train")
    images, factors = data.shapes.render("train")
    torch.testing.assert_close(features.x, images.flatten(1) / 255, atol=1e-5, rtol=0)
    assert torch.equal(features.y, factors["shape"])


def test_large_images_are_compared_at_32_pixels() -> None:
    view = controls.pixels(Data(shapes=Shapes(num_train=20, num_test=10)), View.center(224, resize=256)).view
    assert (view.size, view.resize) == (32, 37)


@pytest.mark.slow
def test_supervision_helps_and_is_repeatable() -> None:
    data, view = Data(shapes=EASY), View(16, crop=(0.9, 1.0), flip=0.0)
    start = network()
    options = {"evaluation_view": VIEW, "lr": 0.02, "progress": False}
    state = torch.random.get_rng_state()
    trained = copy.deepcopy(start)
    head = controls.train_supervised(trained, data, view, 60, 50, **options)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert head > 60  # chance is 10
    again = copy.deepcopy(start)
    assert controls.train_supervised(again, data, view, 60, 50, **options) == head
    assert all(torch.equal(a, b) for a, b in zip(again.state_dict().values(), trained.state_dict().values()))
    assert int(trained[1].num_batches_tracked) == 60  # exactly the steps asked for, over epochs of four batches


def test_rejects_images_without_labels(tmp_path) -> None:
    for i in range(4):
        Image.new("RGB", (20, 20)).save(tmp_path / f"{i}.png")
    data = Data(folder=tmp_path, workers=0)
    with pytest.raises(UserError, match="no labels"):
        controls.train_supervised(network(), data, VIEW, 2, 2, evaluation_view=VIEW, progress=False)


def test_a_diverging_control_stops() -> None:
    data = Data(shapes=Shapes(num_train=60, num_test=20))
    backbone = network()
    nn.init.constant_(backbone[0].weight, float("nan"))
    with pytest.raises(UserError, match="loss became nan at step 0"):
        controls.train_supervised(backbone, data, VIEW, 3, 20, evaluation_view=VIEW, progress=False)


def test_the_control_is_measured_on_the_test_images() -> None:
    """Which here are the training images with the other label."""
    images = torch.cat([torch.zeros(16, 3, 16, 16), torch.full((16, 3, 16, 16), 255.0)]).to(torch.uint8)
    labels = torch.arange(32) // 16
    data = Data.from_images(images, labels, images, 1 - labels, ("dark", "bright"))
    options = {"evaluation_view": VIEW, "lr": 0.02, "progress": False}
    assert controls.train_supervised(network(), data, VIEW, 30, 16, **options) < 20


def test_the_control_s_rate_rises_linearly_and_falls_along_a_cosine() -> None:
    rates = [controls._schedule(step, 100) for step in range(100)]
    assert rates[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert rates[5:] == pytest.approx([(1 + math.cos(math.pi * i / 95)) / 2 for i in range(95)])
