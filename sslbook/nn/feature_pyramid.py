"""Feature pyramids: what a detector sees of a backbone, maps of several resolutions with the same number of channels.

`FeaturePyramid` combines the stages of a convolutional network from coarse to fine (Lin et al., 2017, "Feature pyramid
networks for object detection", section 3, torchvision's module). `SimpleFeaturePyramid` makes all levels from the one
map of a plain vision transformer (Li, Mao, Girshick and He, 2022, "Exploring plain vision transformer backbones for
object detection", section 3 and appendix A.2); its window attention is left out, so the transformer's attention is
global in all blocks, as it was in pre-training. Both add a coarsest level by subsampling, for the largest anchors.
"""

from collections import OrderedDict

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn
from torchvision.ops import FeaturePyramidNetwork
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool

from sslbook.nn.backbones import backbone_dim, require
from sslbook.nn.modes import in_mode


class FeaturePyramid(nn.Module):
    """The maps of a backbone's stages (at most its last four), combined from coarse to fine.

    Args:
        backbone: has `forward_stages`.
        channels: of every level of the pyramid.
    """

    def __init__(self, backbone: nn.Module, channels: int = 256) -> None:
        super().__init__()
        require(backbone, "forward_stages", "A feature pyramid")
        self.backbone, self.out_channels = backbone, channels
        self.widths = stage_widths(backbone)[-4:]
        self.fpn = FeaturePyramidNetwork(self.widths, channels, LastLevelMaxPool())

    def forward(self, x: Float[Tensor, "batch 3 height width"]) -> OrderedDict[str, Tensor]:
        """Levels from fine to coarse, named `0`, `1`, ... and `pool`."""
        stages = self.backbone.forward_stages(x)[-len(self.widths) :]  # pyrefly: ignore
        return self.fpn(OrderedDict((str(i), stage) for i, stage in enumerate(stages)))


class SimpleFeaturePyramid(nn.Module):
    """Levels at 4, 2, 1 and 1/2 times the resolution of a transformer's map.

    Args:
        backbone: has `forward_map`.
        channels: of every level of the pyramid.
    """

    def __init__(self, backbone: nn.Module, channels: int = 256) -> None:
        super().__init__()
        require(backbone, "forward_map", "A simple feature pyramid")
        dim = backbone_dim(backbone)
        self.backbone, self.out_channels = backbone, channels
        up, half = nn.ConvTranspose2d(dim, dim // 2, 2, stride=2), dim // 2
        quarter = [up, ChannelNorm(half), nn.GELU(), nn.ConvTranspose2d(half, dim // 4, 2, stride=2)]
        rescaled = [
            (nn.Sequential(*quarter), dim // 4),
            (nn.ConvTranspose2d(dim, dim // 2, 2, stride=2), dim // 2),
            (nn.Identity(), dim),
            (nn.MaxPool2d(2), dim),
        ]
        self.levels = nn.ModuleList(
            nn.Sequential(
                module,
                nn.Conv2d(width, channels, 1, bias=False),
                ChannelNorm(channels),
                nn.Conv2d(channels, channels, 3, padding=1, bias=False),
                ChannelNorm(channels),
            )
            for module, width in rescaled
        )

    def forward(self, x: Float[Tensor, "batch 3 height width"]) -> OrderedDict[str, Tensor]:
        """Levels from fine to coarse, named `0`, `1`, `2`, `3` and `pool`."""
        features = self.backbone.forward_map(x)  # pyrefly: ignore
        levels = OrderedDict((str(i), level(features)) for i, level in enumerate(self.levels))
        levels["pool"] = levels["3"][:, :, ::2, ::2]
        return levels


class ChannelNorm(nn.LayerNorm):
    """Layer norm over the channels of each cell of a map."""

    def forward(self, x: Float[Tensor, "batch channels rows columns"]) -> Float[Tensor, "batch channels rows columns"]:
        return rearrange(super().forward(rearrange(x, "b c h w -> b h w c")), "b h w c -> b c h w")


def stage_widths(backbone: nn.Module) -> list[int]:
    """Channels of every map of `forward_stages`; one blank image is shown."""
    device = next(backbone.parameters()).device
    with torch.no_grad(), in_mode(backbone, False):
        maps = backbone.forward_stages(torch.zeros(1, 3, 64, 64, device=device))  # pyrefly: ignore
    return [stage.shape[1] for stage in maps]
