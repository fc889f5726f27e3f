"""A fully convolutional head for segmentation, and a ResNet whose last maps keep their resolution for it.

Long, Shelhamer and Darrell (2015, "Fully convolutional networks for semantic segmentation"), as in mmsegmentation.
"""

from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor, nn


class FCNHead(nn.Module):
    """3x3 convolutions with batch norm, their output beside their input, one more of them, dropout, a class for a cell.

    Args:
        dim: channels of the map.
        classes: channels of the output.
        convolutions: how many before the two are joined.
        width: their channels.
        joins: whether the input joins.
    """

    def __init__(self, dim: int, classes: int, convolutions: int = 2, width: int = 512, joins: bool = True) -> None:
        from torchvision.ops import Conv2dNormActivation

        super().__init__()
        make = partial(Conv2dNormActivation, kernel_size=3)
        self.layers = nn.Sequential(*(make(dim if i == 0 else width, width) for i in range(convolutions)))
        self.last = make(dim + width, width) if joins else None
        self.classes = nn.Sequential(nn.Dropout2d(0.1), nn.Conv2d(width, classes, 1))

    def forward(self, x: Float[Tensor, "batch dim rows columns"]) -> Float[Tensor, "batch classes rows columns"]:
        y = self.layers(x)
        return self.classes(y if self.last is None else self.last(torch.cat([x, y], dim=1)))


def dilate(backbone: nn.Module) -> None:
    """Keep the resolution in the last two stages of a ResNet, and dilate its convolutions instead; others are left.

    As torchvision's `replace_stride_with_dilation`: the first block of a stage keeps the dilation of the stage before.
    """
    for name, before, after in (("layer3", 1, 2), ("layer4", 2, 4)):
        for i, block in enumerate(getattr(backbone, name, ())):
            for module in block.modules():
                if isinstance(module, nn.Conv2d):
                    module.stride = (1, 1)
                    if module.kernel_size == (3, 3):
                        module.dilation = module.padding = (before if i == 0 else after,) * 2
