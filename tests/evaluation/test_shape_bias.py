"""Shape bias of networks whose bias is known, and the names and categories of conflicting images."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from sslbook.data.loader import Data
from sslbook.data.views import View
from sslbook.errors import UserError
from sslbook.evaluation.base import Representation
from sslbook.evaluation.protocols import linear
from sslbook.evaluation.protocols.shape_bias import (
    IMAGENET,
    ShapeBias,
    categories,
    conflicts,
    decide,
    phases_and_amplitudes,
)

SIDE = 16
CLASSES = ("bar", "beam")  # shapes: upright, level; textures: red, green


class Edges(nn.Module):
    """Sees where an image changes, and no color: shape alone."""

    def forward(self, x: Tensor) -> Tensor:
        gray = x.mean(1)
        return torch.stack([gray.diff(dim=1).abs().sum((1, 2)), gray.diff(dim=2).abs().sum((1, 2))], dim=1)


class Colors(nn.Module):
    """Sees the mean color alone: texture."""

    def forward(self, x: Tensor) -> Tensor:
        return x.mean((2, 3))


def image(shape: int, texture: int, g: torch.Generator) -> Tensor:
    x = torch.zeros(3, SIDE, SIDE)
    start = int(torch.randint(2, 9, (1,), generator=g))
    where = (slice(None), slice(start, start + 4)) if shape == 0 else (slice(start, start + 4), slice(None))
    x[texture][where] = 0.8
    return (x + 0.02 * torch.rand(3, SIDE, SIDE, generator=g)).clamp(0, 1).mul(255).byte()


def data(n: int = 40) -> Data:
    g = torch.Generator().manual_seed(0)
    labels = torch.arange(n) % 2
    images = torch.stack([image(int(y), int(y), g) for y in labels])
    return Data.from_images(images, labels, images, labels, class_names=CLASSES)


def model(backbone: nn.Module) -> Representation:
    return Representation(backbone, data(), View.center(SIDE), batch_size=16, progress=False)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    g = torch.Generator().manual_seed(1)
    for i in range(6):
        for shape, texture in ((0, 1), (1, 0), (0, 0)):
            path = tmp_path / CLASSES[shape] / f"{CLASSES[shape]}{i}-{CLASSES[texture].upper()}{i + 1}.png"
            path.parent.mkdir(exist_ok=True)
            Image.fromarray(image(shape, texture, g).permute(1, 2, 0).numpy()).save(path)
    return tmp_path


def test_networks_of_known_bias(folder: Path) -> None:
    for backbone, bias in ((Edges(), 100), (Colors(), 0)):
        one = model(backbone)
        protocol = ShapeBias(folder)
        metrics = protocol.run(one, one.data)
        assert metrics == {"shape bias": bias, "as shape": bias, "as texture": 100 - bias}
        noted = one.details["shape_bias"]
        assert noted["images"] == 12  # the six that agree do not count
        assert noted["decisions for shape and texture, by shape"]["bar"] == ([6, 0] if bias else [0, 6])
        assert set(protocol.figures()) == {"categories"}


def test_images_made_of_phases_and_amplitudes() -> None:
    g = torch.Generator().manual_seed(2)
    one, other = (image(shape, shape, g).float() / 255 for shape in (0, 1))
    torch.testing.assert_close(phases_and_amplitudes(one, one), one, atol=1e-5, rtol=0)
    mixed = phases_and_amplitudes(one, other)
    amplitude, phase = np.abs(np.fft.fft2(other.numpy())), np.angle(np.fft.fft2(one.numpy()))
    expected = np.fft.ifft2(amplitude * np.exp(1j * phase)).real
    np.testing.assert_allclose(mixed, np.clip(expected, 0, 1), atol=1e-5)
    color = model(Colors())
    metrics = ShapeBias(images=12).run(color, color.data)
    assert metrics["shape bias"] < 10  # the mean color is an amplitude
    assert color.details["shape_bias"]["images"] == 12


def test_probabilities_of_a_category_are_means_over_its_classes() -> None:
    x = torch.randn(300, 4)
    y = torch.randint(5, (300,))
    classifier = linear.train(x + 2 * nn.functional.one_hot(y, 5)[:, :4], y)[0]
    members = [[0, 3], [4], [1, 7]]  # class 7 does not exist
    p = classifier.model.predict_proba(((x - classifier.mean) / classifier.std).numpy())
    expected = np.stack([(p[:, 0] + p[:, 3]) / 2, p[:, 4], p[:, 1] / 2], axis=1).argmax(1)
    assert decide(classifier, x, members).tolist() == expected.tolist()


def test_categories_by_name_and_of_imagenet(monkeypatch: pytest.MonkeyPatch) -> None:
    some = data()
    assert categories({"beam"}, some) == {"beam": [1]}
    with pytest.raises(UserError, match="show cat, which are no classes of"):
        categories({"cat", "bar"}, some)
    assert len(IMAGENET) == 16
    monkeypatch.setattr(Data, "class_names", tuple(f"n{i:08d}" for i in range(1000)))
    found = categories({"cat", "dog"}, some)
    assert found["cat"] == [281, 282, 283, 284, 285, 286]
    members = [i for numbers in found.values() for i in numbers]
    assert (len(set(members)), len(found["dog"]), len(found["bird"])) == (len(members), 109, 49)


def test_names_that_say_nothing(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no images in which"):
        conflicts(tmp_path)
    (tmp_path / "cat3.png").write_bytes(b"")
    with pytest.raises(UserError, match="does not say shape and texture"):
        conflicts(tmp_path)
    (tmp_path / "cat3.png").unlink()
    (tmp_path / "cat3-cat7.png").write_bytes(b"")
    with pytest.raises(UserError, match="no images in which"):
        conflicts(tmp_path)
