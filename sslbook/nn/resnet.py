"""Residual networks: torchvision's blocks and parameter names, with what small images need.

He, Zhang, Ren and Sun, 2016, "Deep residual learning for image recognition" (arXiv:1512.03385). State dicts are those
of `torchvision.models.resnet*` and `wide_resnet*` without `fc`, so weights go in and out unchanged. The stem for small
images is the one of SimCLR's CIFAR-10 experiments (arXiv:2002.05709, appendix B.9). What is called wide here are the
networks of Zagoruyko and Komodakis, 2016 (arXiv:1605.07146): only the bottlenecks' inner convolutions are wider.
"""

from collections.abc import Callable
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock, Bottleneck

from sslbook.errors import UserError
from sslbook.types import PositiveInt

_BLOCKS = {
    18: (BasicBlock, (2, 2, 2, 2)),
    34: (BasicBlock, (3, 4, 6, 3)),
    50: (Bottleneck, (3, 4, 6, 3)),
    101: (Bottleneck, (3, 4, 23, 3)),
    152: (Bottleneck, (3, 8, 36, 3)),
}


class ResNet(nn.Module):
    """A residual network without classifier: images to average-pooled features.

    Args:
        depth: 18, 34, 50, 101 or 152.
        width: channels of the first stage; the following stages double them.
        stem: `imagenet`: 7x7 convolution of stride 2 and max-pooling, a quarter of the resolution remains;
            `small`: 3x3 convolution of stride 1, for images of up to about 64 pixels.
        zero_init_residual: start every residual branch at zero, so that each block begins as the identity.
        inner_width: channels of the bottlenecks' 3x3 convolutions in units of the usual; 2 in `wide_resnet50_2`.
        in_channels: channels of the images.

    Raises:
        UserError: there is no ResNet of this depth.
    """

    layer1: nn.Sequential
    layer2: nn.Sequential
    layer3: nn.Sequential
    layer4: nn.Sequential

    def __init__(
        self,
        depth: int = 50,
        width: PositiveInt = 64,
        stem: Literal["imagenet", "small"] = "imagenet",
        zero_init_residual: bool = False,
        inner_width: PositiveInt = 1,
        in_channels: PositiveInt = 3,
    ) -> None:
        init_args = {name: value for name, value in locals().items() if name not in ("self", "__class__")}
        super().__init__()
        if depth not in _BLOCKS:
            raise UserError(f"no ResNet has depth {depth}: use one of {', '.join(map(str, _BLOCKS))}")
        block, counts = _BLOCKS[depth]
        self.init_args, self.in_channels = init_args, in_channels
        self.dim = 8 * width * block.expansion

        if stem == "small":
            self.conv1 = nn.Conv2d(in_channels, width, 3, padding=1, bias=False)
            self.maxpool: nn.Module = nn.Identity()
        else:
            self.conv1 = nn.Conv2d(in_channels, width, 7, stride=2, padding=3, bias=False)
            self.maxpool = nn.MaxPool2d(3, stride=2, padding=1)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)

        channels = width
        for stage, count in enumerate(counts):
            layers: list[nn.Module] = []
            for i in range(count):
                planes, stride = width * 2**stage, 2 if stage > 0 and i == 0 else 1
                downsample = None
                if stride != 1 or channels != planes * block.expansion:
                    downsample = nn.Sequential(
                        nn.Conv2d(channels, planes * block.expansion, 1, stride, bias=False),
                        nn.BatchNorm2d(planes * block.expansion),
                    )
                layers.append(block(channels, planes, stride, downsample, base_width=64 * inner_width))
                channels = planes * block.expansion
            self.add_module(f"layer{stage + 1}", nn.Sequential(*layers))

        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            elif zero_init_residual and isinstance(module, BasicBlock | Bottleneck):
                last = module.bn2 if isinstance(module, BasicBlock) else module.bn3
                nn.init.zeros_(last.weight)  # pyrefly: ignore[bad-argument-type]

    def forward_stages(self, x: Float[Tensor, "batch channels height width"]) -> list[Tensor]:
        """The feature maps after each of the four stages, fine to coarse."""
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        maps = []
        for stage in (self.layer1, self.layer2, self.layer3, self.layer4):
            x = stage(x)
            maps.append(x)
        return maps

    def forward_map(self, x: Float[Tensor, "batch channels height width"]) -> Float[Tensor, "batch dim h w"]:
        """The last feature map, before pooling."""
        return self.forward_stages(x)[-1]

    def forward(self, x: Float[Tensor, "batch channels height width"]) -> Float[Tensor, "batch dim"]:
        return torch.mean(self.forward_map(x), dim=(2, 3))


def _named(name: str, size: str, depth: int, inner_width: int = 1) -> Callable[..., ResNet]:
    """A function that makes a network of a known size; the command line reads its options from the signature."""

    def make(
        width: PositiveInt = 64,
        stem: Literal["imagenet", "small"] = "imagenet",
        zero_init_residual: bool = False,
        in_channels: PositiveInt = 3,
    ) -> ResNet:
        return ResNet(depth, width, stem, zero_init_residual, inner_width, in_channels)

    make.__name__ = make.__qualname__ = name
    make.__doc__ = f"{size} features. For the arguments see `ResNet`."
    return make


resnet18 = _named("resnet18", "ResNet-18: 11.2 million parameters, 512", 18)
resnet34 = _named("resnet34", "ResNet-34: 21.3 million parameters, 512", 34)
resnet50 = _named("resnet50", "ResNet-50: 23.5 million parameters, 2048", 50)
resnet101 = _named("resnet101", "ResNet-101: 42.5 million parameters, 2048", 101)
resnet152 = _named("resnet152", "ResNet-152: 58.1 million parameters, 2048", 152)
wide_resnet50_2 = _named("wide_resnet50_2", "Wide ResNet-50-2: 66.8 million parameters, 2048", 50, 2)
wide_resnet101_2 = _named("wide_resnet101_2", "Wide ResNet-101-2: 124.8 million parameters, 2048", 101, 2)
