"""Predictions at the resolution of pixels from a backbone's feature map (context encoder, colorization)."""

import copy
from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from sslbook.nn.backbones import in_channels, require


def feature_map(
    backbone: nn.Module, x: Float[Tensor, "batch channels height width"]
) -> Float[Tensor, "batch dim rows columns"]:
    """The backbone's last feature map, before pooling."""
    model: Any = backbone
    return model.forward_map(x)


def map_side(backbone: nn.Module, size: int, method: str) -> int:
    """Rows of the feature map for images of `size` pixels; nothing is computed.

    Raises:
        UserError: the backbone has no feature map.
    """
    require(backbone, "forward_map", method)
    shapes_only = copy.deepcopy(backbone).to("meta").eval()
    with torch.no_grad():
        return feature_map(shapes_only, torch.empty(1, in_channels(backbone), size, size, device="meta")).shape[2]


class UpConvolutions(nn.Sequential):
    """Transposed convolutions with batch norm, each of which doubles rows and columns, then a 1x1 convolution.

    Args:
        in_dim: channels of the feature map.
        widths: channels after each transposed convolution; empty for the 1x1 convolution alone.
        out_dim: channels of the result.
    """

    def __init__(self, in_dim: int, widths: Sequence[int], out_dim: int) -> None:
        modules: list[nn.Module] = []
        for width in widths:
            modules += [
                nn.ConvTranspose2d(in_dim, width, kernel_size=4, stride=2, padding=1, bias=False),
                nn.BatchNorm2d(width),
                nn.ReLU(inplace=True),
            ]
            in_dim = width
        super().__init__(*modules, nn.Conv2d(in_dim, out_dim, 1))
