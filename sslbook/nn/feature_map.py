"""From a feature map back to pixels."""

import copy
from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from sslbook.errors import UserError


def feature_map(
    backbone: nn.Module, x: Float[Tensor, "batch 3 height width"]
) -> Float[Tensor, "batch dim rows columns"]:
    """What a backbone says of every place, before pooling."""
    model: Any = backbone
    return model.forward_map(x)


def map_side(backbone: nn.Module, size: int, method: str) -> int:
    """Rows of the feature map that a backbone makes of images of this size; a `UserError` if it makes none."""
    if not hasattr(backbone, "forward_map"):
        raise UserError(
            f"{method} draws from a feature map and a {type(backbone).__name__} makes none: "
            "choose sslbook.nn.ResNet or sslbook.nn.ConvNet, or give the backbone a method forward_map"
        )
    shapes_only = copy.deepcopy(backbone).to("meta").eval()
    with torch.no_grad():
        return feature_map(shapes_only, torch.empty(1, 3, size, size, device="meta")).shape[2]


class UpConvolutions(nn.Sequential):
    """Up-convolutions with batch norm, each of which doubles rows and columns, and a linear layer per place at the end.

    Args:
        in_dim: channels of the feature map.
        widths: channels after every up-convolution; none: only the linear layer.
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
