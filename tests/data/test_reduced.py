"""Large JPEGs are decoded smaller where every view allows it, and the views stay the same up to what one can see."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from sslbook.data import executors, workers
from sslbook.data.images import FULL_SIZE, open_image
from sslbook.data.loader import Data
from sslbook.data.views import View


def photograph(path: Path, height: int, width: int, orientation: int = 1) -> None:
    """Smooth colors with a sharp edge; its sides as stored, before the camera's orientation is applied."""
    noise = np.random.default_rng(0).integers(0, 256, (9, 12, 3), dtype=np.uint8)
    image = Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC)
    image.paste((250, 20, 20), (width // 3, height // 4, width // 2, height // 2))
    exif = Image.Exif()
    exif[0x0112] = orientation
    image.save(path, quality=95, exif=exif)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "photographs").mkdir()
    photograph(tmp_path / "photographs" / "a.jpg", 480, 640)
    photograph(tmp_path / "photographs" / "b.jpg", 640, 401, orientation=6)
    photograph(tmp_path / "photographs" / "c.jpg", 60, 120)
    Image.open(tmp_path / "photographs" / "a.jpg").save(tmp_path / "photographs" / "d.png")
    return tmp_path / "photographs"


def views_of(folder: Path, *views: View) -> list[torch.Tensor]:
    """In the order of the files' names, whatever the order of the epoch."""
    data = Data(folder=folder, workers=0)
    (batch,) = data.batches(views, 4, seed=3, epoch=2)
    return [view[batch.index.argsort()] for view in batch.views]


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_views_are_those_of_the_whole_image(folder: Path, interpolation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    views = (View(size=16, crop=(0.2, 1.0), interpolation=interpolation), View.center(16, interpolation=interpolation))
    opened = []
    monkeypatch.setattr(workers, "sides", lambda image: opened.append(image) or sides(image))
    reduced = views_of(folder, *views)
    assert {image.info.get(FULL_SIZE) for image in opened} == {(480, 640), (401, 640), None}
    monkeypatch.setattr(workers, "MIN_PIXELS", 10**6)  # nothing is reduced
    for view, whole in zip(reduced, views_of(folder, *views)):
        assert not torch.equal(view[:2], whole[:2])
        assert torch.equal(view[2:], whole[2:])  # too small, and no JPEG
        difference = (view - whole).abs() * torch.tensor(views[0].std)[:, None, None]
        assert difference.mean() < 0.01
        assert difference.max() < 0.2  # at the edge


sides = executors.sides


@pytest.mark.parametrize(("factor", "stored"), [(1, (480, 640)), (2, (240, 320)), (8, (60, 80))])
def test_a_decoded_image_has_the_size_asked_for(folder: Path, factor: int, stored: tuple[int, int]) -> None:
    asked = []
    image = open_image(folder / "a.jpg", lambda height, width: asked.append((height, width)) or factor)
    assert asked == [(480, 640)]
    assert (image.height, image.width) == stored
    assert sides(image) == (480, 640)
    assert sides(open_image(folder / "a.jpg")) == (480, 640)


def test_sides_are_upright_where_the_camera_lay(folder: Path) -> None:
    image = open_image(folder / "b.jpg", lambda height, width: 2)
    assert sides(image) == (401, 640)
    assert (image.height, image.width) == (201, 320)


def test_the_smallest_crop_of_all_views_decides(folder: Path) -> None:
    def factor(*views: View) -> int:
        dataset = workers.CropDataset(Data(folder=folder)._splits.train, views, 0, False, True)
        return dataset._reduction(0, torch.tensor([0]), 480, 640)

    center = View.center(16)
    assert factor(center) == 8  # 30 pixels each, of which 8 times smaller leaves more than 2
    assert factor(View.center(64)) == 2
    assert factor(View.center(128)) == 1
    assert factor(center, View(size=16, crop=(0.02, 0.02))) == 2
    assert factor(center, View.center(128)) == 1
