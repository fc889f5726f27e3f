"""Colorization: predict the colors of a gray image, at each position as a distribution over a palette.

A pixel's color follows from the object it belongs to. Several colors may be plausible, and regression would predict
their brownish mean, so colors are quantized and classified. Most pixels are grayish, so each is weighted by the rarity
of its color.

Zhang, Isola and Efros, 2016, "Colorful image colorization" (arXiv:1603.08511), section 2: equation 2 is the loss,
equations 3 and 4 weight the pixels, equation 5 decodes. The authors trained a network like VGG whose map has an eighth
of the resolution.

What differs from the paper:
- Any backbone with a feature map will do: transposed convolutions bring its map to a quarter of the image's resolution.
- The palette holds every bin that contains an RGB color, 261 of width 10, where the authors list 313.
- Color frequencies are counted over the batches so far instead of over ImageNet beforehand.
- A backbone has three input channels. All three are the lightness, and the first convolution starts with equal weights
  for them. Their gradients are equal too, so the weights stay equal, and features never depend on color, also when the
  network is evaluated on colored images.
- The loss is the mean over pixels, not the sum.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from sslbook import distributed
from sslbook.data.loader import Batch
from sslbook.data.views import View
from sslbook.errors import UserError
from sslbook.methods.base import Method
from sslbook.nn import backbone_dim
from sslbook.nn.feature_map import UpConvolutions, feature_map, map_side
from sslbook.nn.precision import full_precision
from sslbook.schedules import Clock
from sslbook.types import PositiveFloat, PositiveInt

VIEW = View(crop=(0.08, 1.0))
NEIGHBORS = 5  # bins that share a pixel's color (section 2.1)
EXACT = "donot_use_mm_for_euclid_dist"  # distances that do not depend on the rest of the batch

# Linear sRGB to XYZ, each row divided by its sum, which makes white (1, 1, 1) (IEC 61966-2-1, D65).
TO_XYZ = (
    (0.4124564 / 0.9504700, 0.3575761 / 0.9504700, 0.1804375 / 0.9504700),
    (0.2126729, 0.7151522, 0.0721750),
    (0.0193339 / 1.0888300, 0.1191920 / 1.0888300, 0.9503041 / 1.0888300),
)
EDGE = 6 / 29  # below its cube, CIE's cube root becomes a straight line


def rgb_to_lab(rgb: Float[Tensor, "*pixels 3"]) -> Float[Tensor, "*pixels 3"]:
    """sRGB values from 0 to 1 as CIE L*a*b*: L from 0 (black) to 100 (white), a and b 0 for gray."""
    linear = torch.where(rgb > 0.04045, ((rgb + 0.055) / 1.055) ** 2.4, rgb / 12.92)
    xyz = linear @ rgb.new_tensor(TO_XYZ).T
    x, y, z = torch.where(xyz > EDGE**3, xyz ** (1 / 3), xyz / (3 * EDGE**2) + 4 / 29).unbind(-1)
    return torch.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)], dim=-1)


def lab_to_rgb(lab: Float[Tensor, "*pixels 3"]) -> Float[Tensor, "*pixels 3"]:
    """The inverse of `rgb_to_lab`; colors outside of sRGB are clamped."""
    y = (lab[..., 0] + 16) / 116
    xyz = torch.stack([y + lab[..., 1] / 500, y, y - lab[..., 2] / 200], dim=-1)
    xyz = torch.where(xyz > EDGE, xyz**3, 3 * EDGE**2 * (xyz - 4 / 29))
    linear = (xyz @ torch.linalg.inv(lab.new_tensor(TO_XYZ).T)).clamp(0, 1)
    return torch.where(linear > 0.0031308, 1.055 * linear ** (1 / 2.4) - 0.055, 12.92 * linear)


def palette(width: float) -> Float[Tensor, "bins 2"]:
    """Centers (a, b) of the square bins that contain an RGB color (section 2.1)."""
    side = torch.linspace(0, 1, 65, device="cpu")
    ab = rgb_to_lab(torch.cartesian_prod(side, side, side))[:, 1:]
    return (ab / width).round().unique(dim=0) * width


def soft_encode(
    ab: Float[Tensor, "pixels 2"], bins: Float[Tensor, "bins 2"], sigma: float
) -> tuple[Float[Tensor, "pixels near"], Int[Tensor, "pixels near"]]:
    """Z of equation 2: the nearest bins' probabilities, a Gaussian of the distance; and the bins, nearest first."""
    distance, near = torch.cdist(ab, bins, compute_mode=EXACT).topk(min(NEIGHBORS, len(bins)), dim=1, largest=False)
    return torch.softmax(-distance.square() / (2 * sigma**2), dim=1), near


def rarity_weights(
    frequency: Float[Tensor, "bins"], bins: Float[Tensor, "bins 2"], sigma: float, mix: float
) -> Float[Tensor, "bins"]:
    """Equation 4: smoothed by a Gaussian, mixed with the uniform distribution, inverted; the mean over pixels is 1."""
    kernel = torch.exp(-torch.cdist(bins, bins).square() / (2 * sigma**2))
    smooth = (kernel / kernel.sum(dim=0)) @ frequency
    weights = 1 / ((1 - mix) * smooth + mix / len(bins))
    return weights / (smooth * weights).sum()


def color_loss(
    logits: Float[Tensor, "pixels bins"],
    share: Float[Tensor, "pixels near"],
    near: Int[Tensor, "pixels near"],
    weights: Float[Tensor, "bins"],
) -> Float[Tensor, ""]:
    """Equations 2 and 3, averaged: cross-entropy with the soft encoding, weighted by the nearest bin's rarity."""
    log_p = F.log_softmax(logits, dim=1).gather(1, near)
    return -(weights[near[:, 0]] * (share * log_p).sum(dim=1)).mean()


def annealed_mean(
    logits: Float[Tensor, "pixels bins"], bins: Float[Tensor, "bins 2"], temperature: float = 0.38
) -> Float[Tensor, "pixels 2"]:
    """Equation 5: one color (a, b) for each distribution, between its mean (temperature 1) and its mode (0)."""
    return torch.softmax(logits / temperature, dim=1) @ bins


@torch.no_grad()
def average_color_weights(backbone: nn.Module) -> None:
    """Sets the first convolution's weights for red, green and blue to their mean."""
    first = next(module for module in backbone.modules() if isinstance(module, nn.Conv2d))
    first.weight.copy_(first.weight.mean(dim=1, keepdim=True).expand_as(first.weight))


class Colorization(Method):
    """Colorful image colorization (arXiv:1603.08511).

    Args:
        backbone: the network to train, with a feature map; its first convolution gets equal weights for all colors.
        view: augmentation of an image before its colors are removed; it should not change colors.
        stride: colors are predicted for every `stride`-th pixel in both directions.
        bin_width: side of the palette's square bins, in units of a and b.
        rebalance: weight lambda of the uniform distribution in equation 4; with 1 all pixels have equal weight.
        decoder_dim: channels of the transposed convolutions, if the feature map is coarser than the colors.

    Raises:
        UserError: the stride does not divide the view, or the backbone has no feature map.
    """

    rgb_only = True

    bins: Tensor
    frequency: Tensor
    batches: Tensor

    def __init__(
        self,
        backbone: nn.Module,
        view: View = VIEW,
        stride: PositiveInt = 4,
        bin_width: PositiveFloat = 10.0,
        rebalance: PositiveFloat = 0.5,
        decoder_dim: PositiveInt = 256,
    ) -> None:
        super().__init__()
        if view.size % stride:
            raise UserError(f"stride {stride} does not divide images of {view.size} pixels: change stride or view.size")
        self.view, self.stride, self.sigma, self.rebalance = view, stride, bin_width / 2, rebalance
        doublings = max(0, (view.size // stride - 1) // map_side(backbone, view.size, "Colorization")).bit_length()
        average_color_weights(backbone)
        self.backbone = backbone
        self.register_buffer("bins", palette(bin_width))
        self.register_buffer("frequency", torch.full((len(self.bins),), 1 / len(self.bins)))
        self.register_buffer("batches", torch.zeros((), dtype=torch.int64))
        self.decoder = UpConvolutions(backbone_dim(backbone), doublings * [decoder_dim], len(self.bins))

    def on_weights_loaded(self, taken: list[str]) -> None:
        average_color_weights(self.backbone)  # loaded weights may differ between colors

    def views(self) -> tuple[View, ...]:
        return (self.view,)

    def to_lab(self, images: Float[Tensor, "batch 3 height width"]) -> Float[Tensor, "batch height width 3"]:
        """Lab values of a view's normalized images."""
        mean, std = images.new_tensor(self.view.mean), images.new_tensor(self.view.std)
        return rgb_to_lab((images.movedim(1, 3) * std + mean).clamp(0, 1))

    def to_image(self, lab: Float[Tensor, "batch height width 3"]) -> Float[Tensor, "batch 3 height width"]:
        """The inverse of `to_lab`."""
        mean, std = lab.new_tensor(self.view.mean), lab.new_tensor(self.view.std)
        return ((lab_to_rgb(lab) - mean) / std).movedim(3, 1)

    def predict(self, lightness: Float[Tensor, "batch height width"]) -> Float[Tensor, "batch rows columns bins"]:
        """Logits of the palette for every `stride`-th pixel."""
        mean, std = sum(self.view.mean) / 3, sum(self.view.std) / 3  # equal inputs, or the weights would not stay equal
        gray = ((lightness / 100 - mean) / std)[:, None].expand(-1, 3, -1, -1)
        logits = self.decoder(feature_map(self.backbone, gray)).float()
        size = (lightness.shape[1] // self.stride, lightness.shape[2] // self.stride)
        if logits.shape[2:] != size:
            logits = F.interpolate(logits, size, mode="bilinear")
        return logits.movedim(1, 3)

    @torch.no_grad()
    def count(self, nearest: Int[Tensor, "pixels"]) -> None:
        """Adds a batch's colors to the frequencies, the mean over all batches so far."""
        share = nearest.bincount(minlength=len(self.bins)).float() / len(nearest)
        previous = torch.where(self.batches > 0, self.frequency, 0)  # the initial value does not count
        self.batches += 1
        self.frequency.copy_(previous + (distributed.all_reduce_mean(share) - previous) / self.batches)

    def forward(self, batch: Batch, clock: Clock) -> dict[str, Tensor]:
        (images,) = batch.views
        with full_precision(images):
            lab = self.to_lab(images)  # (batch, height, width, 3)
            start = self.stride // 2
            ab = lab[:, start :: self.stride, start :: self.stride, 1:].flatten(0, 2)  # targets Y, (pixels, 2)
            # Z: the target as a soft distribution over the nearest bins (section 2.1).
            share, near = soft_encode(ab, self.bins, self.sigma)
            if self.training:
                self.count(near[:, 0])
            # Class rebalancing (section 2.2): rare colors weigh more.
            weights = rarity_weights(self.frequency, self.bins, self.sigma, self.rebalance)
        logits = self.predict(lab[..., 0]).flatten(0, 2)  # from the lightness X alone, (pixels, bins)
        accuracy = 100 * (logits.argmax(dim=1) == near[:, 0]).float().mean()
        return {"loss": color_loss(logits, share, near, weights), "color_accuracy": accuracy}

    @torch.no_grad()
    def reconstruct(
        self, images: Float[Tensor, "batch 3 height width"], index: Int[Tensor, "batch"], clock: Clock = Clock()
    ) -> tuple[Float[Tensor, "batch 3 height width"], Float[Tensor, "batch 3 height width"]]:
        """The gray images, and the same with predicted colors (equation 5)."""
        lightness = self.to_lab(images)[..., :1]
        logits = self.predict(lightness[..., 0])
        ab = annealed_mean(logits.flatten(0, 2), self.bins).unflatten(0, logits.shape[:3]).movedim(3, 1)
        ab = F.interpolate(ab, images.shape[2:], mode="bilinear").movedim(1, 3)
        gray, colored = (self.to_image(torch.cat([lightness, x], dim=3)) for x in (torch.zeros_like(ab), ab))
        return gray, colored
