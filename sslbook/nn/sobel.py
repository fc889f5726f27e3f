"""Edges instead of colors."""

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from sslbook.nn.backbones import backbone_dim, build, describe


class Sobel(nn.Module):
    """A backbone that sees an image's gray edges: its horizontal and vertical Sobel gradients.

    They take the places of red and green; blue is zero, and the weights for it stay what they were. (DeepCluster's
    networks have two input channels instead, which is the same function.)

    Args:
        backbone: a network for images of three channels.
    """

    filters: Tensor
    class_path = "sslbook.nn.sobel.sobel"

    def __init__(self, backbone: nn.Module) -> None:
        super().__init__()
        self.backbone = backbone
        self.dim = backbone_dim(backbone)
        self.init_args = {"backbone": describe(backbone)}
        horizontal = torch.tensor([[1.0, 0.0, -1.0], [2.0, 0.0, -2.0], [1.0, 0.0, -1.0]])
        filters = torch.stack([horizontal, horizontal.T])[:, None] / 3  # of the mean of three colors
        self.register_buffer("filters", filters, persistent=False)

    def edges(self, x: Float[Tensor, "n 3 h w"]) -> Float[Tensor, "n 3 h w"]:
        """What the backbone sees."""
        edges = F.conv2d(x.sum(dim=1, keepdim=True), self.filters.to(x.dtype), padding=1)
        return F.pad(edges, (0, 0, 0, 0, 0, 1))

    def forward(self, x: Float[Tensor, "n 3 h w"]) -> Float[Tensor, "n dim"]:
        return self.backbone(self.edges(x))

    def forward_map(self, x: Float[Tensor, "n 3 h w"]) -> Float[Tensor, "n dim rows columns"]:
        """The feature map of the backbone, if it has one."""
        return self.backbone.forward_map(self.edges(x))  # pyrefly: ignore[not-callable]


def sobel(backbone: dict[str, Any]) -> Sobel:
    """The network of an exported description, with fresh weights."""
    return Sobel(build(backbone))
