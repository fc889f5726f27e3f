"""A plain convolutional network for the Shapes data set: small enough to learn from 16-pixel images on a CPU."""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from sslbook.types import PositiveInt


class ConvNet(nn.Module):
    """Four convolutions with batch norm, the first and the third of stride 2, then average pooling.

    Args:
        width: channels of the first layer; the last has four times as many, which are the features.
        in_channels: channels of the images.
    """

    def __init__(self, width: PositiveInt = 32, in_channels: PositiveInt = 3) -> None:
        super().__init__()
        self.init_args = {"width": width, "in_channels": in_channels}
        self.in_channels = in_channels
        self.dim = 4 * width
        self.layers = nn.Sequential(
            *_layer(in_channels, width, kernel_size=4, stride=2),
            *_layer(width, 2 * width),
            *_layer(2 * width, 2 * width, stride=2),
            *_layer(2 * width, 4 * width),
        )

    def forward_stages(self, x: Float[Tensor, "batch channels height width"]) -> list[Tensor]:
        """The feature maps at half and at a quarter of the resolution."""
        half = self.layers[:6](x.contiguous(memory_format=torch.channels_last))  # twice as fast on a CPU
        return [half, self.layers[6:](half)]

    def forward_map(self, x: Float[Tensor, "batch channels height width"]) -> Float[Tensor, "batch dim rows columns"]:
        """The last feature map, before pooling; a quarter of the resolution remains."""
        return self.forward_stages(x)[-1]

    def forward(self, x: Float[Tensor, "batch channels height width"]) -> Float[Tensor, "batch dim"]:
        return self.forward_map(x).mean(dim=(2, 3))


def _layer(channels: int, out_channels: int, kernel_size: int = 3, stride: int = 1) -> list[nn.Module]:
    convolution = nn.Conv2d(channels, out_channels, kernel_size, stride, padding=1, bias=False)
    return [convolution, nn.BatchNorm2d(out_channels), nn.ReLU(inplace=True)]
