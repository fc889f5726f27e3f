"""Sobel filtering: a backbone whose input is the horizontal and vertical gradient of the gray image."""

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from sslbook.nn.backbones import backbone_dim, build, describe


class Sobel(nn.Module):
    """A backbone behind a Sobel filter, which removes color (DeepCluster, arXiv:1807.05520, section 3.3).

    The horizontal gradient replaces red and the vertical one green. Blue is zero, and the weights for it never change.
    (DeepCluster's networks have two input channels instead, which is the same function.)

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
        filters = torch.stack([horizontal, horizontal.T])[:, None] / 3  # gray: the mean of three channels
        self.register_buffer("filters", filters, persistent=False)

    def edges(self, x: Float[Tensor, "n 3 h w"]) -> Float[Tensor, "n 3 h w"]:
        """Horizontal gradient, vertical gradient and zeros, the input of the backbone."""
        edges = F.conv2d(x.sum(dim=1, keepdim=True), self.filters.to(x.dtype), padding=1)
        return F.pad(edges, (0, 0, 0, 0, 0, 1))

    def forward(self, x: Float[Tensor, "n 3 h w"]) -> Float[Tensor, "n dim"]:
        return self.backbone(self.edges(x))

    def forward_map(self, x: Float[Tensor, "n 3 h w"]) -> Float[Tensor, "n dim rows columns"]:
        """The feature map of the backbone, if it has one."""
        return self.backbone.forward_map(self.edges(x))  # pyrefly: ignore[not-callable]


def sobel(backbone: dict[str, Any]) -> Sobel:
    """The network that an exported description names, with freshly initialized weights."""
    return Sobel(build(backbone))
