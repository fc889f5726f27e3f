"""SparK: hide patches from a convolutional network without letting it notice the holes, and draw them.

Zeros in place of patches are no absence for a dense convolution: visible places leak into the holes layer by layer, the
pattern of the mask wears off, and the statistics of batch norm become those of half-empty images. Here the encoder
computes as if hidden places did not exist: after every layer they are empty again, and normalization looks at visible
places only. A light decoder in the shape of a U gets the maps of all scales, the holes filled with a mask token each.

Tian, Jiang, Diao, Lin, Wang and Yuan, 2023, "Designing BERT for convolutional networks: Sparse and hierarchical masked
modeling" (arXiv:2301.03580), section 3: 3.1 sparse encoder, 3.2 hierarchical decoder, 3.3 loss on normalized pixels of
hidden patches. As in the authors' code sparseness is imitated by dense layers whose results are masked. What differs:
layers of any network are masked from outside, by standing in for their `forward` while the method runs it, so that the
backbone is the ordinary one; all convolutions of the decoder start as He's, where there only those that enlarge do and
the others start from a truncated normal of 0.02; maps are made dense after a batch norm, where the authors take a layer
norm for ConvNeXt; and which patches are hidden is keyed.
"""

import copy
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from einops import rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from sslbook import rng
from sslbook.data.loader import Batch
from sslbook.data.views import View
from sslbook.errors import UserError
from sslbook.methods.base import Method
from sslbook.nn import ConvNet, ResNet
from sslbook.nn.patches import patchify
from sslbook.schedules import Clock

VIEW = View(crop=(0.67, 1.0), interpolation="bicubic")


def reconstruction_loss(
    prediction: Float[Tensor, "batch patches values"],
    target: Float[Tensor, "batch patches values"],
    hidden: Bool[Tensor, "batch patches"],
) -> Float[Tensor, ""]:
    """Mean squared error over hidden patches, each brought to mean 0 and variance 1 first (section 3.3)."""
    prediction, target = prediction[hidden].float(), target[hidden].float()
    variance, mean = torch.var_mean(target, dim=1, keepdim=True)
    return (prediction - (target - mean) / (variance + 1e-6).sqrt()).square().mean()


def visible_mask(
    index: Int[Tensor, "batch"], grid: tuple[int, int], num_visible: int, clock: Clock
) -> Bool[Tensor, "batch 1 rows columns"]:
    """Equally many visible patches in every image, true where visible."""
    order = rng.uniform(clock.seed, clock.epoch, index, rng.METHOD, grid[0] * grid[1]).argsort(dim=1, stable=True)
    mask = torch.zeros_like(order, dtype=torch.bool).scatter(1, order[:, :num_visible], True)
    return mask.view(len(index), 1, *grid)


def at(mask: Bool[Tensor, "batch 1 rows columns"], x: Tensor) -> Bool[Tensor, "batch 1 height width"]:
    """The mask at the resolution of a map `(batch, channels, height, width)`."""
    rows, columns = x.shape[2] // mask.shape[2], x.shape[3] // mask.shape[3]
    return mask.repeat_interleave(rows, dim=2).repeat_interleave(columns, dim=3)


@contextmanager
def sparsely(network: nn.Module, mask: Bool[Tensor, "batch 1 rows columns"]) -> Iterator[None]:
    """While this lasts, convolutions, poolings and norms of `network` work on visible places only."""
    places = (nn.Conv2d, nn.MaxPool2d, nn.AvgPool2d)
    changed: list[tuple[nn.Module, Callable[[Tensor], Tensor]]] = []
    for module in network.modules():
        if isinstance(module, places):
            changed.append((module, _masked(module.forward, mask)))
        elif isinstance(module, _BatchNorm):
            changed.append((module, _normalized_over_visible(module.forward, mask)))
    try:
        for module, forward in changed:
            module.__dict__["forward"] = forward
        yield
    finally:
        for module, _ in changed:
            module.__dict__.pop("forward", None)


def _masked(forward: Callable[[Tensor], Tensor], mask: Tensor) -> Callable[[Tensor], Tensor]:
    def only_visible(x: Tensor) -> Tensor:
        y = forward(x * at(mask, x))
        return y * at(mask, y)

    return only_visible


def _normalized_over_visible(forward: Callable[[Tensor], Tensor], mask: Tensor) -> Callable[[Tensor], Tensor]:
    """All processes have equally many visible places, so a norm that is over all of them stays that."""

    def only_visible(x: Tensor) -> Tensor:
        visible = at(mask, x)[:, 0]
        rows = forward(rearrange(x, "b c h w -> b h w c")[visible][:, :, None, None])[:, :, 0, 0]
        y = rows.new_zeros(*visible.shape, rows.shape[1])
        y[visible] = rows
        return rearrange(y, "b h w c -> b c h w")

    return only_visible


def feature_maps(backbone: nn.Module, x: Float[Tensor, "batch 3 height width"]) -> list[Tensor]:
    """The last map of every resolution, the finest first.

    Raises a `UserError` if the network has none that can be had.
    """
    if isinstance(backbone, ResNet):
        maps = [backbone.maxpool(backbone.relu(backbone.bn1(backbone.conv1(x))))]
        for stage in (backbone.layer1, backbone.layer2, backbone.layer3, backbone.layer4):
            maps.append(stage(maps[-1]))
        return _last_of_each(maps[1:])
    if isinstance(backbone, ConvNet):
        maps = [x.contiguous(memory_format=torch.channels_last)]
        for layer in backbone.layers:
            maps.append(layer(maps[-1]))
        return _last_of_each(maps[1:])
    network: Any = backbone
    if not hasattr(network, "forward_intermediates") or any(hasattr(m, "qkv") for m in network.modules()):
        raise UserError(
            f"SparK masks convolutions and cannot use a {type(backbone).__name__}: choose sslbook.nn.ResNet, resnet50 "
            "and the like, sslbook.nn.ConvNet, or a ResNet or ConvNeXt of timm"
        )
    return _last_of_each(network.forward_intermediates(x, intermediates_only=True))


def _last_of_each(maps: list[Tensor]) -> list[Tensor]:
    return list({tuple(m.shape[2:]): m for m in maps}.values())


def _freeze_what_is_not_used(backbone: nn.Module, maps: list[Tensor]) -> None:
    """A norm behind the last map, as timm's ConvNeXt has, would get no gradient, and processes would wait for it."""
    parameters = [p for p in backbone.parameters() if p.requires_grad]
    gradients = torch.autograd.grad([m.sum() for m in maps], parameters, allow_unused=True)
    for parameter, gradient in zip(parameters, gradients):
        parameter.requires_grad_(gradient is not None)


@torch.no_grad()
def _refuse_what_notices_holes(backbone: nn.Module, size: int, side: int) -> None:
    """An image among hidden patches must have the maps that it has alone; a norm or gate over all places sees more."""
    if any(parameter.is_meta for parameter in backbone.parameters()):
        return  # no numbers to try it with
    stride, alike = size // side, False
    x = torch.randn(1, 3, size, size, generator=torch.Generator().manual_seed(0), device="cpu")
    visible = torch.ones(1, 1, side, side, dtype=torch.bool, device="cpu")
    backbone = copy.deepcopy(backbone).cpu().eval()
    for parameter in backbone.parameters():
        if not parameter.any():  # what begins at zero would hide what it does
            parameter.fill_(0.5)
    try:
        with sparsely(backbone, visible):
            alone = feature_maps(backbone, x)[-1]
        with sparsely(backbone, nn.functional.pad(visible, [1] * 4)):
            among = feature_maps(backbone, nn.functional.pad(x, [stride] * 4))[-1]
        alike = bool((among[:, :, 1:-1, 1:-1] - alone).abs().max() <= 1e-3 * alone.abs().max())
    except (RuntimeError, AssertionError):  # a layer that works on one number per channel has no place for the mask
        pass
    if not alike:
        raise UserError(
            f"SparK cannot use this {type(backbone).__name__}: one of its layers, such as a group norm or squeeze-and-"
            "excitation, looks at all places, hidden ones too; choose one with batch norm, or a ConvNeXt"
        )


class UpBlock(nn.Module):
    """Doubles the resolution and halves the channels."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.up = nn.ConvTranspose2d(channels, channels, 4, stride=2, padding=1)
        self.layers = nn.Sequential(
            nn.Conv2d(channels, channels, 3, padding=1, bias=False),
            nn.BatchNorm2d(channels),
            nn.ReLU6(inplace=True),
            nn.Conv2d(channels, channels // 2, 3, padding=1, bias=False),
            nn.BatchNorm2d(channels // 2),
        )

    def forward(self, x: Float[Tensor, "batch channels h w"]) -> Float[Tensor, "batch half h2 w2"]:
        return self.layers(self.up(x))


class Densify(nn.Module):
    """A sparse map as the decoder wants it: normalized, its holes filled, its channels matched (section 3.2)."""

    def __init__(self, channels: int, out_channels: int, kernel_size: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(channels)
        self.mask_token = nn.Parameter(nn.init.trunc_normal_(torch.empty(channels), std=0.02, a=-0.02, b=0.02))
        self.project = nn.Conv2d(channels, out_channels, kernel_size, padding=kernel_size // 2)

    def forward(
        self, x: Float[Tensor, "batch channels h w"], mask: Bool[Tensor, "batch 1 rows columns"]
    ) -> Float[Tensor, "batch out h w"]:
        with sparsely(self.norm, mask):
            x = self.norm(x)
        return self.project(torch.where(at(mask, x), x, self.mask_token.to(x.dtype)[:, None, None]))


class SparK(Method):
    """Sparse and hierarchical masked modeling (arXiv:2301.03580).

    Args:
        backbone: the convolutional network to train. A patch is what one place of its last map stands for.
        view: what an image becomes.
        mask_ratio: part of the patches that is hidden.
        decoder_dim: channels of the decoder where it begins; each doubling of the resolution halves them.
    """

    def __init__(self, backbone: nn.Module, view: View = VIEW, mask_ratio: float = 0.6, decoder_dim: int = 768) -> None:
        super().__init__()
        self.view, self.mask_ratio, self.backbone = view, mask_ratio, backbone
        training = backbone.training
        maps = feature_maps(backbone.eval(), torch.zeros(1, 3, view.size, view.size))[::-1]
        backbone.train(training)
        _freeze_what_is_not_used(backbone, maps)
        self.stride = view.size // maps[0].shape[2]
        doublings = round(math.log2(self.stride))
        if (
            any(view.size != self.stride * m.shape[2] // 2**i for i, m in enumerate(maps))
            or 2**doublings != self.stride
        ):
            side = 2 ** round(math.log2(max(2, self.stride)))
            raise UserError(
                f"images of {view.size} pixels cannot be cut into the patches of this {type(backbone).__name__}, "
                f"whose maps have sides {', '.join(str(m.shape[2]) for m in maps)}: use a view of "
                f"{max(1, round(view.size / side)) * side} pixels"
            )
        _refuse_what_notices_holes(backbone, view.size, maps[0].shape[2])
        self.num_visible(maps[0].shape[2] ** 2)  # refuses a ratio that leaves nothing to do
        if decoder_dim % 2**doublings:
            raise UserError(f"decoder_dim {decoder_dim} is halved {doublings} times: use a multiple of {2**doublings}")
        self.densify = nn.ModuleList(
            [Densify(m.shape[1], decoder_dim // 2**i, 3 if i else 1) for i, m in enumerate(maps[:doublings])]
        )
        self.decoder = nn.ModuleList([UpBlock(decoder_dim // 2**i) for i in range(doublings)])
        self.predict_pixels = nn.Conv2d(decoder_dim // 2**doublings, 3, 1)
        for module in [*self.densify.modules(), *self.decoder.modules()]:
            if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d)):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def views(self) -> tuple[View, ...]:
        return (self.view,)

    def num_visible(self, num_patches: int) -> int:
        """How many patches the encoder sees; a `UserError` if that is none or all."""
        visible = round(num_patches * (1 - self.mask_ratio))
        if not 0 < visible < num_patches:
            raise UserError(
                f"mask ratio {self.mask_ratio} of {num_patches} patches leaves nothing to "
                f"{'predict' if visible else 'see'}: use a ratio near 0.6, or images with more patches"
            )
        return visible

    def encode(
        self, images: Float[Tensor, "batch 3 height width"], mask: Bool[Tensor, "batch 1 rows columns"]
    ) -> list[Tensor]:
        """The sparse maps, the coarsest first."""
        with sparsely(self.backbone, mask):
            return feature_maps(self.backbone, images)[::-1]

    def predict(
        self, images: Float[Tensor, "batch 3 height width"], mask: Bool[Tensor, "batch 1 rows columns"]
    ) -> Float[Tensor, "batch 3 height width"]:
        """The decoder's drawing of the whole image, every patch up to its own mean and deviation."""
        maps = self.encode(images, mask)
        x = self.densify[0](maps[0], mask)
        for i, block in enumerate(self.decoder):
            x = block(x if i == 0 or i >= len(self.densify) else x + self.densify[i](maps[i], mask))
        return self.predict_pixels(x)

    def forward(self, batch: Batch, clock: Clock) -> dict[str, Tensor]:
        (images,) = batch.views
        grid = (images.shape[2] // self.stride, images.shape[3] // self.stride)
        mask = visible_mask(batch.index, grid, self.num_visible(grid[0] * grid[1]), clock)
        prediction = self.predict(images, mask)
        hidden = ~mask.flatten(1)
        return {"loss": reconstruction_loss(patchify(prediction, self.stride), patchify(images, self.stride), hidden)}
