"""A method and a backbone from a file outside the package, by import path on the command line."""

from pathlib import Path

import pytest
import yaml

from sslbook import checkpoint
from tests.engine import COMMON, start_process, weights

pytestmark = pytest.mark.slow

MODULE = '''
"""Predict whether an image was flipped."""

import torch
import torch.nn.functional as F
from torch import nn

from sslbook import rng
from sslbook.data.views import View
from sslbook.methods.base import Method


class TinyNet(nn.Module):
    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.dim = width
        self.conv = nn.Conv2d(3, width, 3, stride=2)

    def forward(self, x):
        return self.conv(x).relu().mean(dim=(2, 3))


class FlipPrediction(Method):
    """Self-supervision by vertical flips.

    Args:
        backbone: the network to train.
        size: side of the view in pixels.
    """

    def __init__(self, backbone: nn.Module, size: int = 16) -> None:
        super().__init__()
        self.view, self.backbone = View(size=size), backbone
        self.head = nn.Linear(backbone.dim, 2)

    def views(self) -> tuple[View, ...]:
        return (self.view,)

    def forward(self, batch, clock):
        flipped = rng.uniform(clock.seed, clock.epoch, batch.index, rng.METHOD, 1)[:, 0] < 0.5
        x = torch.where(flipped[:, None, None, None], batch.views[0].flip(2), batch.views[0])
        return {"loss": F.cross_entropy(self.head(self.backbone(x)), flipped.long())}
'''


def test_method_and_backbone_from_a_file_of_the_user(tmp_path: Path) -> None:
    (tmp_path / "my_method.py").write_text(MODULE, encoding="utf-8")
    options = {**COMMON, "method.backbone": "my_method.TinyNet", "method.backbone.width": 6, "method.size": 12}
    options["out_dir"] = "run"
    words = ["-m", "sslbook.train", "my_method.FlipPrediction", *[f"--{key}={value}" for key, value in options.items()]]
    process = start_process(words, tmp_path)
    _, err = process.communicate(timeout=240)
    assert process.returncode == 0, err
    run = tmp_path / "run"
    assert checkpoint.load(checkpoint.find(run))["step"] == 12
    assert weights(run)["backbone.conv.weight"].shape == (6, 3, 3, 3)
    written = yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8"))["method"]
    assert written["class_path"] == "my_method.FlipPrediction"
    assert written["init_args"]["size"] == 12
