"""Measures without labels on real extraction, invariance per operation, and the hook that logs them in a run."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sslbook.data.datasets.shapes import Shapes
from sslbook.data.loader import Data
from sslbook.data.views import SIMCLR, View
from sslbook.errors import UserError
from sslbook.evaluation.base import Representation
from sslbook.evaluation.features import extract_views, some_of
from sslbook.evaluation.protocols.invariance import Invariance, operations, similarities
from sslbook.evaluation.protocols.label_free import LabelFree
from sslbook.loggers import OnlineLabelFree
from sslbook.nn import metrics
from sslbook.nn.convnet import ConvNet
from sslbook.weights.backbone import export_backbone
from tests.engine import lines, start

VIEW = View.center(16)


def images(count: int = 60) -> Data:
    return Data(shapes=Shapes(num_train=count, num_test=4, size=16))


def model(backbone: nn.Module | None = None, count: int = 60, **options) -> Representation:
    torch.manual_seed(0)
    options = {"batch_size": 40, "progress": False, **options}
    return Representation(backbone or ConvNet(width=8), images(count), VIEW, **options)


def test_views_are_those_of_the_chosen_images() -> None:
    data, mean = images(), nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
    noisy = replace(SIMCLR, size=16)
    z = extract_views(mean, data, (VIEW, noisy, noisy), 30, batch_size=12)
    assert z.shape == (30, 3, 3)
    few = some_of(data, 30, 0)
    batch = next(few.batches((VIEW, noisy, noisy), 30, seed=0, epoch=0, order=torch.arange(30)))
    for i in range(3):
        torch.testing.assert_close(z[:, i], mean(batch.views[i]))
    assert not torch.allclose(z[:, 1], z[:, 2])
    assert some_of(data, 60, 0) is data
    assert not torch.equal(extract_views(mean, data, (VIEW,), 20, seed=1)[:, 0], z[:20, 0])


def test_each_measure_is_of_the_features_it_names() -> None:
    one = model()
    found = LabelFree(view_images=24, num_views=4).run(one, one.data)
    x = one.features("train").x
    assert found["RankMe"] == pytest.approx(metrics.rank_me(x))
    assert found["alpha-ReQ"] == pytest.approx(metrics.alpha_req(x))
    assert found["uniformity"] == pytest.approx(metrics.uniformity(x), abs=1e-6)
    view = replace(SIMCLR, size=16, mean=VIEW.mean, std=VIEW.std)
    z = extract_views(one.backbone, one.data, (view,) * 4, 24, batch_size=40)
    assert found["LiDAR"] == pytest.approx(metrics.lidar(z))
    assert found["alignment"] == pytest.approx(metrics.alignment(z[:, 0], z[:, 1]))
    assert 0 < found["CKA with random weights"] < 1
    assert one.details["label_free"]["images"] == 60
    fewer = LabelFree(images=20, view_images=8, num_views=2)
    assert fewer.run(one, one.data)["RankMe"] <= 20
    assert set(fewer.figures()) == {"spectrum"}
    assert one.details["label_free"]["images"] == 20


def test_cka_with_another_model(tmp_path: Path) -> None:
    one, other = model(), model()
    facts = {"view": {"size": 16, "mean": list(VIEW.mean), "std": list(VIEW.std)}}
    export_backbone(tmp_path / "same.safetensors", other.backbone, facts)
    found = LabelFree(view_images=8, num_views=2, against=str(tmp_path / "same.safetensors")).run(one, one.data)
    assert found["CKA with same.safetensors"] == pytest.approx(1, abs=1e-6)
    pixels = model(nn.Flatten())
    assert not any("CKA" in name for name in LabelFree(view_images=8, num_views=2).run(pixels, pixels.data))


def test_invalid_options() -> None:
    with pytest.raises(UserError, match="num_views is 1"):
        LabelFree(num_views=1)
    with pytest.raises(UserError, match="images is 0"):
        Invariance(images=0)


# -- invariance --------------------------------------------------------------------------------------------------------


class Gray(nn.Module):
    """Sees gray values alone, and no order from left to right."""

    def forward(self, x: Tensor) -> Tensor:
        std, mean = torch.tensor(VIEW.std), torch.tensor(VIEW.mean)
        rgb = x * std[:, None, None] + mean[:, None, None]
        gray = (rgb * torch.tensor([0.2989, 0.587, 0.114])[:, None, None]).sum(1)
        return (gray + gray.flip(2)).flatten(1)


@pytest.mark.slow
def test_a_network_that_ignores_an_operation_scores_100() -> None:
    one = model(Gray())
    protocol = Invariance(images=40)
    found = protocol.run(one, one.data)
    assert set(protocol.figures()) == {"operations"}
    assert found["flip"] == pytest.approx(100, abs=1e-3)
    assert found["grayscale"] == pytest.approx(100, abs=1e-3)
    assert max(found[name] for name in ("crop", "brightness", "contrast", "blur", "solarize", "all of SimCLR's")) < 99
    assert found["solarize"] < found["brightness"]


def test_similarity_is_literal_and_0_for_other_images() -> None:
    z = torch.randn(50, 3, 6) + 5
    mean = z[:, 0].mean(dim=0)
    expected = [100 * F.cosine_similarity(z[:, 0] - mean, z[:, i] - mean).mean().item() for i in (1, 2)]
    assert similarities(z) == pytest.approx(expected, abs=1e-3)
    assert abs(similarities(z[:, :2])[0]) < 40
    assert similarities(torch.cat([z[:, :1]] * 2, dim=1)) == pytest.approx([100])


def test_every_operation_changes_an_image_and_only_it() -> None:
    views = operations(VIEW)
    data = images(8)
    batch = next(data.batches((VIEW, *views.values()), 8, seed=0, epoch=0))
    center, *others = batch.views
    for name, changed in zip(views, others):
        assert not torch.allclose(changed, center), name
    torch.testing.assert_close(others[list(views).index("flip")], center.flip(3))


@pytest.mark.filterwarnings("ignore:.*left out of their views")
def test_bands_that_are_no_colors() -> None:
    bands = torch.randint(256, (12, 5, 8, 8), dtype=torch.uint8)
    data = Data.from_images(bands, torch.full((12,), -1), mean=(0.5,) * 5, std=(0.2,) * 5)
    view = View.center(8, mean=(0.5,) * 5, std=(0.2,) * 5)
    one = Representation(nn.Flatten(), data, view, progress=False)
    found = Invariance(images=12).run(one, data)
    assert set(operations(view)) - set(found) == {"saturation", "hue", "grayscale"}
    assert {"RankMe", "LiDAR"} < set(LabelFree(view_images=12, num_views=2).run(one, data))


# -- processes and runs ------------------------------------------------------------------------------------------------


def _measure() -> dict[str, float]:
    one = model(count=41)
    free = LabelFree(view_images=24, num_views=3).run(one, one.data)
    return {**free, **Invariance(images=24).run(one, one.data)}


@pytest.mark.slow
def test_two_processes_are_one(pool) -> None:
    one = _measure()
    for two in pool.run(_measure):
        assert two == pytest.approx(one, rel=1e-6)


@pytest.mark.slow
def test_logged_in_a_run(tmp_path: Path) -> None:
    hooks = '[{"class_path": "OnlineLabelFree", "init_args": {"images": 24}}]'
    start("simclr", tmp_path / "run", hooks=hooks, monitor="rank_me")
    logged = [line for line in lines(tmp_path / "run") if "rank_me" in line]
    assert len(logged) == 2  # epochs
    assert all(set(OnlineLabelFree.measures) <= set(line) for line in logged)
    assert 1 <= logged[-1]["rank_me"] <= 24
    start("simclr", tmp_path / "plain")
    without = [line["loss"] for line in lines(tmp_path / "plain") if "loss" in line]
    assert [line["loss"] for line in lines(tmp_path / "run") if "loss" in line] == without  # it changes nothing
    assert json.dumps(logged)
