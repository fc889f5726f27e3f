from pathlib import Path

import torch
from torch import nn

from sslbook.nn import ConvNet, Sobel
from sslbook.weights.backbone import export_backbone, load_backbone


def test_edges_are_sobel_gradients() -> None:
    x = torch.randn(2, 3, 5, 6)
    edges = Sobel(ConvNet(4)).edges(x)
    gray = nn.functional.pad(x.mean(dim=1), (1, 1, 1, 1))
    weights = [1, 2, 1]
    for row in range(5):
        for column in range(6):
            part = gray[:, row : row + 3, column : column + 3]
            across = sum(w * (part[:, i, 0] - part[:, i, 2]) for i, w in enumerate(weights))
            down = sum(w * (part[:, 0, i] - part[:, 2, i]) for i, w in enumerate(weights))
            torch.testing.assert_close(edges[:, 0, row, column], across)
            torch.testing.assert_close(edges[:, 1, row, column], down)
    assert not edges[:, 2].any()


def test_color_channels_are_interchangeable() -> None:
    x = torch.rand(1, 3, 8, 8)
    network = Sobel(ConvNet(4))
    torch.testing.assert_close(network(x), network(x[:, [2, 0, 1]]))


def test_export_round_trip(tmp_path: Path) -> None:
    network = Sobel(ConvNet(4)).eval()
    export_backbone(tmp_path / "backbone.safetensors", network, {})
    again, _ = load_backbone(tmp_path / "backbone.safetensors")
    x = torch.rand(1, 3, 8, 8)
    torch.testing.assert_close(again.eval()(x), network(x))
