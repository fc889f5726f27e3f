"""Depth: files of two kinds, loss and errors as literal sums, a linear head learns where brightness is depth."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from sslbook.data.datasets.masks import read_depth
from sslbook.data.loader import Data
from sslbook.data.views import View
from sslbook.errors import UserError
from sslbook.evaluation.base import Representation
from sslbook.evaluation.protocols.depth import Depth, errors, mean_errors, scale_invariant_log_loss
from sslbook.nn import ConvNet

OPTIONS = {"size": 16, "steps": 40, "train_batch_size": 4, "lrs": [0.03], "min_depth": 0.1, "max_depth": 4.0}


def write_pairs(
    folder: Path, count: int = 6, suffix: str = ".png", side: tuple[int, int] = (20, 24)
) -> dict[str, Path]:
    """Two flat regions an image, made for the test: the brighter, the nearer. Depth in millimeters, a column unknown."""
    random = np.random.default_rng(0)
    options = {}
    for split in ("", "test_"):
        for what in ("images", "depths"):
            options[split + what] = folder / (split + what)
            options[split + what].mkdir(parents=True)
        for i in range(count):
            depth = np.full(side, random.uniform(2.5, 3.5))
            depth[:, : random.integers(8, 16)] = random.uniform(0.5, 1.5)
            image = np.repeat((250 - 60 * depth)[:, :, None], 3, axis=2)
            Image.fromarray(image.astype(np.uint8)).save(options[f"{split}images"] / f"{i}.png")
            depth[:, -1] = 0
            millimeters = (1000 * depth).astype(np.uint16)
            if suffix == ".npy":
                np.save(options[f"{split}depths"] / f"{i}.npy", millimeters)
            else:
                Image.fromarray(millimeters).save(options[f"{split}depths"] / f"{i}.png")
    return options


def representation(backbone: nn.Module) -> Representation:
    return Representation(backbone, Data(workers=0), View.center(16), "cpu", progress=False)


def test_reads_16_bits_and_arrays_alike(tmp_path: Path) -> None:
    values = np.array([[0, 1], [1500, 60000]], np.uint16)
    Image.fromarray(values).save(tmp_path / "d.png")
    np.save(tmp_path / "d.npy", values)
    np.save(tmp_path / "f.npy", np.array([[np.nan, np.inf], [-1.0, 2.5]]))
    expected = torch.tensor([[0.0, 0.001], [1.5, 60.0]])
    for name in ("d.png", "d.npy"):
        torch.testing.assert_close(read_depth(tmp_path / name, 1000.0), expected)
    assert read_depth(tmp_path / "f.npy").tolist() == [[0, 0], [0, 2.5]]  # what is no depth is unknown


def test_loss_and_errors_are_literal_sums() -> None:
    output, target = torch.rand(2, 1, 3, 4) + 0.5, torch.rand(2, 3, 4) * 2
    limits = (0.4, 1.6)
    losses, literal = [], []
    for p, t in zip(output[:, 0].double().tolist(), target.double().tolist()):
        both = [(a, b) for x, y in zip(p, t) for a, b in zip(x, y) if limits[0] <= b <= limits[1]]
        g = [math.log(a) - math.log(b) for a, b in both]
        mean = sum(g) / len(g)
        losses.append(math.sqrt(sum((v - mean) ** 2 for v in g) / len(g) + 0.15 * mean**2))
        literal.append(
            (
                math.sqrt(sum((a - b) ** 2 for a, b in both) / len(both)),
                sum(abs(a - b) / b for a, b in both) / len(both),
                100 * sum(max(a / b, b / a) < 1.25 for a, b in both) / len(both),
            )
        )
    assert scale_invariant_log_loss(output, target, limits).item() == pytest.approx(sum(losses) / 2, rel=1e-4)
    found = mean_errors([errors(p[0], t, limits) for p, t in zip(output, target)])
    assert list(found.values()) == pytest.approx([sum(column) / 2 for column in zip(*literal)], rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("suffix", [".png", ".npy"])
def test_a_linear_head_reads_depth_from_brightness(tmp_path: Path, suffix: str) -> None:
    torch.manual_seed(0)
    options = {**OPTIONS, "lrs": [0.03, 1e-9]} if suffix == ".png" else OPTIONS
    protocol = Depth(**write_pairs(tmp_path, suffix=suffix), **options)
    model = representation(ConvNet(8))
    found, level = protocol.run(model, model.data), protocol.chance(model.data)
    assert found["RMSE"] < 0.7 * level["RMSE"]
    assert found["delta < 1.25 (%)"] > level["delta < 1.25 (%)"]
    if suffix == ".png":
        assert model.details["depth"]["chosen on a tenth of the training images"]["lr"] == 0.03
    assert set(protocol.figures()) == {"images"}


def _measured(options: dict[str, Path]) -> dict[str, float]:
    torch.manual_seed(0)
    protocol = Depth(**options, **{**OPTIONS, "steps": 3})
    model = representation(ConvNet(4))
    return protocol.run(model, model.data)


@pytest.mark.slow
def test_two_processes_are_one(tmp_path: Path, pool) -> None:
    options = write_pairs(tmp_path)
    alone = _measured(options)
    for found in pool.run(_measured, options):
        assert found == pytest.approx(alone, rel=1e-3)


def test_rejects_what_does_not_fit(tmp_path: Path) -> None:
    options = write_pairs(tmp_path)
    model = representation(ConvNet(4))
    with pytest.raises(UserError, match="depth needs --images, --depths"):
        _ = Depth(images=tmp_path).pairs
    with pytest.raises(UserError, match="0 < min_depth < max_depth"):
        Depth(min_depth=3.0, max_depth=2.0)
    with pytest.raises(UserError, match=r"no depth in .* lies between .*: check --scale 1e-06"):
        Depth(**options, scale=1e-6).lacks(model.backbone, model.data)  # before anything is trained
    with pytest.raises(UserError, match="lrs is empty"):
        Depth(lrs=[])
    other = write_pairs(tmp_path / "other", count=2)
    for file in other["test_depths"].iterdir():
        Image.fromarray(np.zeros((20, 24), np.uint16)).save(file)
    with pytest.raises(UserError, match=r"no depth in .*test_depths lies between"):
        Depth(**other).lacks(model.backbone, model.data)
    np.save(options["depths"] / "0.npy", np.zeros((2, 2, 3)))
    with pytest.raises(UserError, match=r"0.npy .*it has the shape \(2, 2, 3\)"):
        read_depth(options["depths"] / "0.npy")
    (options["depths"] / "0.npy").unlink()
    Image.fromarray(np.ones((3, 3), np.uint16)).save(options["depths"] / "0.png")
    with pytest.raises(UserError, match=r"depths/0.png has 3x3 and its image 24x20 pixels"):
        Depth(**options, **OPTIONS).run(model, model.data)
