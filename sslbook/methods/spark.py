"""SparK: masked image modeling for convolutional networks, with sparse convolutions and a hierarchical decoder.

A dense convolution given zeros in place of masked patches carries visible values into them layer by layer, so that the
mask disappears, and batch norm computes statistics of half-empty images. Here the encoder computes as if masked
positions did not exist: after every layer they are empty again, and normalization is over visible positions only. A
light U-Net decoder gets the maps of all resolutions, with a mask token at every masked position.

Tian, Jiang, Diao, Lin, Wang and Yuan, 2023, "Designing BERT for convolutional networks: Sparse and hierarchical masked
modeling" (arXiv:2301.03580), section 3: 3.1 sparse encoder, 3.2 hierarchical decoder, 3.3 loss on normalized pixels of
masked patches. As in the authors' code sparse layers are dense ones whose results are masked.

What differs from the authors' code (keyu-tian/SparK, 00883b8):
- Layers of any network are masked from outside, by replacing their `forward` while the method runs it; they convert the
  network to sparse classes.
- All convolutions of the decoder start from He's initialization; theirs only where they are transposed, the others from
  a truncated normal of 0.02.
- Maps pass a batch norm before they are made dense; with ConvNeXt theirs pass a layer norm.
- Our `ResNet` has no drop path; theirs has a rate of 0.05.
- Masks are counter-based random numbers of seed, epoch and image; theirs come from torch's generator.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from einops import rearrange
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm

from sslbook.data.loader import Batch
from sslbook.data.masks import require_mask, uniform_mask
from sslbook.data.views import View
from sslbook.errors import UserError
from sslbook.methods.base import Method
from sslbook.nn.backbones import in_channels, require
from sslbook.nn.patches import normalize_patches, patchify
from sslbook.schedules import Clock
from sslbook.types import PositiveInt

VIEW = View(crop=(0.67, 1.0), interpolation="bicubic")
GLOBAL_LAYERS = ("GlobalResponseNorm", "SEModule", "SqueezeExcite", "EffectiveSEModule", "EcaModule")  # of timm


def reconstruction_loss(
    prediction: Float[Tensor, "batch patches values"],
    target: Float[Tensor, "batch patches values"],
    masked: Bool[Tensor, "batch patches"],
) -> Float[Tensor, ""]:
    """Mean squared error over masked patches, each normalized to mean 0 and variance 1 (section 3.3)."""
    return (prediction[masked].float() - normalize_patches(target[masked].float())).square().mean()


def mask_like(visible: Bool[Tensor, "batch 1 rows columns"], x: Tensor) -> Bool[Tensor, "batch 1 height width"]:
    """The mask of patches at the resolution of a map `(batch, channels, height, width)`."""
    rows, columns = x.shape[2] // visible.shape[2], x.shape[3] // visible.shape[3]
    return visible.repeat_interleave(rows, dim=2).repeat_interleave(columns, dim=3)


@contextmanager
def sparse_layers(network: nn.Module, visible: Bool[Tensor, "batch 1 rows columns"]) -> Iterator[None]:
    """Inside this context, convolutions, poolings and batch norms of `network` work on visible positions only."""
    changed: list[tuple[nn.Module, Callable[[Tensor], Tensor]]] = []
    for module in network.modules():
        if isinstance(module, (nn.Conv2d, nn.MaxPool2d, nn.AvgPool2d, _BatchNorm)):
            sparse = _sparse_norm if isinstance(module, _BatchNorm) else _sparse
            changed.append((module, sparse(module.forward, visible)))
    try:
        for module, forward in changed:
            module.__dict__["forward"] = forward
        yield
    finally:
        for module, _ in changed:
            module.__dict__.pop("forward", None)


def _sparse(dense: Callable[[Tensor], Tensor], visible: Tensor) -> Callable[[Tensor], Tensor]:
    """A layer that reads zeros at masked positions, and writes zeros there (section 3.1)."""

    def forward(x: Tensor) -> Tensor:
        y = dense(x * mask_like(visible, x))
        return y * mask_like(visible, y)

    return forward


def _sparse_norm(dense: Callable[[Tensor], Tensor], visible: Tensor) -> Callable[[Tensor], Tensor]:
    """A batch norm over visible positions. All processes have equally many, so that global statistics stay exact."""

    def forward(x: Tensor) -> Tensor:
        positions = mask_like(visible, x)[:, 0]
        rows = dense(rearrange(x, "b c h w -> b h w c")[positions][:, :, None, None])[:, :, 0, 0]  # (visible, channels)
        y = rows.new_zeros(*positions.shape, rows.shape[1])
        y[positions] = rows
        return rearrange(y, "b h w c -> b c h w")

    return forward


def require_local(backbone: nn.Module) -> None:
    """Check that no layer mixes all positions of a map: masking its result would not remove the masked ones from it.

    Raises:
        UserError: there is a group or instance norm, attention, or a layer of timm such as squeeze-and-excitation.
    """
    for module in backbone.modules():
        name = type(module).__name__
        if isinstance(module, (nn.GroupNorm, _InstanceNorm)) or hasattr(module, "qkv") or name in GLOBAL_LAYERS:
            raise UserError(
                f"SparK cannot use this {type(backbone).__name__}: its layer {name} depends on all positions of a map, "
                "masked ones too; choose a ResNet with batch norm, or a ConvNeXt"
            )


class UpBlock(nn.Module):
    """A block of the U-Net decoder: doubles the resolution and halves the channels."""

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
    """A sparse map made dense for the decoder: normalized, masked positions filled, channels matched (section 3.2)."""

    def __init__(self, channels: int, out_channels: int, kernel_size: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(channels)
        self.mask_token = nn.Parameter(nn.init.trunc_normal_(torch.empty(channels), std=0.02, a=-0.02, b=0.02))
        self.project = nn.Conv2d(channels, out_channels, kernel_size, padding=kernel_size // 2)

    def forward(
        self, x: Float[Tensor, "batch channels h w"], visible: Bool[Tensor, "batch 1 rows columns"]
    ) -> Float[Tensor, "batch out h w"]:
        with sparse_layers(self.norm, visible):
            x = self.norm(x)
        x = torch.where(mask_like(visible, x), x, self.mask_token.to(x.dtype)[:, None, None])  # [M_i] in the paper
        return self.project(x)


class SparK(Method):
    """Sparse and hierarchical masked modeling (arXiv:2301.03580).

    Args:
        backbone: the convolutional network to train. A patch is what one position of its last map stands for.
        view: augmentation of an image.
        mask_ratio: fraction of the patches that is masked.
        decoder_dim: channels of the decoder's first block; each doubling of the resolution halves them.

    Raises:
        UserError: the backbone has no maps of several resolutions or a layer that depends on all positions, the view
            does not fit them, `decoder_dim` cannot be halved, or the mask ratio masks no patch or all of them.
    """

    can_shard = False  # another `forward` takes the place of each layer's while the encoder runs

    def __init__(
        self, backbone: nn.Module, view: View = VIEW, mask_ratio: float = 0.6, decoder_dim: PositiveInt = 768
    ) -> None:
        super().__init__()
        require(backbone, "forward_stages", "SparK")
        require_local(backbone)
        self.view, self.backbone = view, backbone
        maps = self._trial_maps()
        self.stride = view.size // maps[0].shape[2]
        doublings = round(math.log2(self.stride))
        sides = [m.shape[2] for m in maps]
        if 2**doublings != self.stride or any(view.size != self.stride * s // 2**i for i, s in enumerate(sides)):
            near = 2 ** round(math.log2(max(2, self.stride)))
            raise UserError(
                f"images of {view.size} pixels cannot be cut into the patches of this {type(backbone).__name__}, whose "
                f"maps have sides {', '.join(map(str, sides))}: use a view of "
                f"{max(1, round(view.size / near)) * near} pixels"
            )
        num_patches = sides[0] ** 2
        self.num_visible = round(num_patches * (1 - mask_ratio))
        require_mask(num_patches - self.num_visible, num_patches)
        if decoder_dim % 2**doublings:
            raise UserError(f"decoder_dim {decoder_dim} is halved {doublings} times: use a multiple of {2**doublings}")
        self.densify = nn.ModuleList(
            [Densify(m.shape[1], decoder_dim // 2**i, 3 if i else 1) for i, m in enumerate(maps[:doublings])]
        )
        self.decoder = nn.ModuleList([UpBlock(decoder_dim // 2**i) for i in range(doublings)])
        self.predict_pixels = nn.Conv2d(decoder_dim // 2**doublings, in_channels(backbone), 1)
        for module in [*self.densify.modules(), *self.decoder.modules()]:
            if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d)):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def _trial_maps(self) -> list[Tensor]:
        """The maps of a blank image, coarse to fine. Freezes what they do not depend on, such as a norm before pooling.

        A parameter without gradient would make several processes wait for it.
        """
        net: Any = self.backbone
        training = net.training
        maps = net.eval().forward_stages(torch.zeros(1, in_channels(net), self.view.size, self.view.size))
        net.train(training)
        parameters = [p for p in net.parameters() if p.requires_grad]
        gradients = torch.autograd.grad([m.sum() for m in maps], parameters, allow_unused=True)
        for parameter, gradient in zip(parameters, gradients):
            parameter.requires_grad_(gradient is not None)
        return maps[::-1]

    def views(self) -> tuple[View, ...]:
        return (self.view,)

    def encode(
        self, images: Float[Tensor, "batch channels height width"], visible: Bool[Tensor, "batch 1 rows columns"]
    ) -> list[Tensor]:
        """The sparse maps S_i, coarse to fine (section 3.1)."""
        net: Any = self.backbone
        with sparse_layers(net, visible):
            return net.forward_stages(images)[::-1]

    def predict(
        self, images: Float[Tensor, "batch channels height width"], visible: Bool[Tensor, "batch 1 rows columns"]
    ) -> Float[Tensor, "batch channels height width"]:
        """The decoder's prediction of the whole image, every patch normalized."""
        maps = self.encode(images, visible)
        x = self.densify[0](maps[0], visible)  # D_4, the coarsest map made dense (section 3.2)
        for i, block in enumerate(self.decoder):
            if 0 < i < len(self.densify):  # resolutions finer than the finest map have no S_i
                x = x + self.densify[i](maps[i], visible)  # D_i = B(D_(i+1)) + phi(S_i)
            x = block(x)
        return self.predict_pixels(x)

    def forward(self, batch: Batch, clock: Clock) -> dict[str, Tensor]:
        (images,) = batch.views
        rows = self.view.size // self.stride
        visible = uniform_mask(batch.index, rows**2, self.num_visible, clock)  # (batch, patches)
        prediction = self.predict(images, rearrange(visible, "b (h w) -> b 1 h w", h=rows))  # (batch, 3, height, width)
        # Masked patches only: (batch, patches, 3 * stride^2) each.
        loss = reconstruction_loss(patchify(prediction, self.stride), patchify(images, self.stride), ~visible)
        return {"loss": loss}
