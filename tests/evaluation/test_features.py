"""Features come in order, with their labels, and leave the network as it was."""

import warnings
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from sslbook.data.datasets.shapes import Shapes
from sslbook.data.loader import Data
from sslbook.data.views import View
from sslbook.errors import UserError
from sslbook.evaluation.features import center_view, extract_features, extract_with_index, frozen

TINY = Shapes(num_train=40, num_test=15)
VIEW = View.center(16)


def network() -> nn.Module:
    torch.manual_seed(0)
    convolution = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.5))
    return nn.Sequential(convolution, nn.AdaptiveAvgPool2d(2), nn.Flatten())


@pytest.mark.parametrize("batch_size", [7, 40, 256])
def test_in_order_and_independent_of_the_batch(batch_size: int) -> None:
    data, backbone = Data(shapes=TINY), network()
    features, labels = extract_features(backbone, data, "train", VIEW, batch_size=batch_size, progress=False)
    assert (features.shape, features.dtype) == ((40, 16), torch.float32)
    assert torch.equal(labels, data.labels("train"))
    images, _ = TINY.render("train")
    mean, std = torch.tensor(VIEW.mean)[:, None, None], torch.tensor(VIEW.std)[:, None, None]
    with torch.no_grad():
        expected = backbone.eval()((images / 255 - mean) / std)
    torch.testing.assert_close(features, expected, atol=1e-5, rtol=1e-4)
    assert not features.requires_grad


def test_the_network_is_left_unchanged() -> None:
    backbone = network().train()
    backbone[0][1].eval()  # a frozen batch norm
    modes = [part.training for part in backbone.modules()]
    before = {name: value.clone() for name, value in backbone.state_dict().items()}
    extract_features(backbone, Data(shapes=TINY), "test", VIEW, progress=False)
    assert [part.training for part in backbone.modules()] == modes
    assert all(torch.equal(value, before[name]) for name, value in backbone.state_dict().items())
    with frozen(backbone):
        assert not any(part.training for part in backbone.modules())
    with pytest.raises(TypeError), frozen(backbone):
        backbone(None)
    assert [part.training for part in backbone.modules()] == modes
    assert torch.is_grad_enabled()


@pytest.mark.filterwarnings("ignore:skipped")
def test_unreadable_images_take_their_labels_with_them(tmp_path: Path) -> None:
    for label, name in enumerate(("dark", "light")):
        for i in range(6):
            path = tmp_path / split_of(i) / name / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("L", (20 + i, 30), 200 * label + 10).save(path)
    (tmp_path / "train" / "dark" / "1.png").write_bytes(b"no image")
    data = Data(folder=tmp_path, workers=0)
    mean = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
    features, labels, index = extract_with_index(mean, data, "train", View.center(8), batch_size=3, progress=False)
    assert labels.tolist() == [0] * 3 + [1] * 4
    assert index.tolist() == [0, 2, 3, 4, 5, 6, 7]
    assert torch.equal(features[:, 0] > 0, labels == 1)  # features and labels still belong together
    (tmp_path / "test" / "dark" / "4.png").write_bytes(b"")
    for path in (tmp_path / "test").rglob("*.png"):
        path.write_bytes(b"no image")
    with pytest.raises(UserError, match="no readable image"):
        extract_features(mean, Data(folder=tmp_path, workers=0), "test", View.center(8), progress=False)


def split_of(i: int) -> str:
    return "train" if i < 4 else "test"


class Broken(nn.Module):
    def __init__(self, output: str) -> None:
        super().__init__()
        self.output = output

    def forward(self, x: Tensor) -> Tensor:
        return {"map": x, "scalar": x.mean(), "nan": x.flatten(1) * float("nan")}[self.output]


@pytest.mark.parametrize(("output", "message"), [("map", "must return"), ("scalar", "must return"), ("nan", "NaN")])
def test_rejects_features_of_other_shapes_and_nan(output: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        extract_features(Broken(output), Data(shapes=TINY), "test", VIEW, progress=False)


def test_center_view() -> None:
    assert (center_view(224).size, center_view(224).resize) == (224, 256)
    assert center_view(32).resize in (None, 32)
    assert center_view(224, resize=224).resize == 224


# -- processes ---------------------------------------------------------------------------------------------------------


class Counted(nn.Module):
    """Mean colors, and how many images this process saw."""

    seen = 0

    def forward(self, x: Tensor) -> Tensor:
        self.seen += len(x)
        return x.mean(dim=(2, 3))


def _extract(folder: Path, batch_size: int) -> tuple[list[list[float]], list[int], list[int], int, list[str]]:
    backbone, data = Counted(), Data(folder=folder, workers=0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = extract_with_index(backbone, data, "train", View.center(8), batch_size=batch_size, progress=False)
    return found.x.tolist(), found.y.tolist(), found.index.tolist(), backbone.seen, sorted(data.unreadable)


@pytest.mark.slow
@pytest.mark.parametrize("batch_size", [2, 100])  # 100: the second process has nothing to do
def test_two_processes_share_the_images_and_both_have_all_features(tmp_path: Path, pool, batch_size: int) -> None:
    for i in range(11):
        path = tmp_path / ("train" if i < 9 else "test") / str(i % 2) / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (9, 8), (20 * i, 10, 200 - 20 * i)).save(path)
    (tmp_path / "train" / "1" / "3.png").write_bytes(b"no image")
    one = _extract(tmp_path, batch_size)
    assert (len(one[0]), one[3], len(one[4])) == (8, 8, 1)
    first, second = pool.run(_extract, tmp_path, batch_size)
    for two in (first, second):
        assert two[:3] == one[:3]  # to the last bit
        assert two[4] == one[4]  # the unreadable image is known to both
    assert first[3] + second[3] == 8
    assert (second[3] == 0) == (batch_size == 100)
