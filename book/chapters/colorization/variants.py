"""Shapes whose colors are ours to choose, and colorization and the context encoder with one part replaced."""

import math
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int, UInt8
from torch import Tensor, nn
from torch.func import functional_call

from sslbook.data.datasets.shapes import Shapes
from sslbook.data.loader import Batch, Data
from sslbook.data.views import View
from sslbook.methods.base import Method
from sslbook.methods.colorization import Colorization, annealed_mean, lab_to_rgb, rgb_to_lab
from sslbook.methods.context_encoder import ContextEncoder, pixel_weights, reconstruction_loss
from sslbook.schedules import Clock

Colors = Literal["by shape", "at random", "one"]
SKY = (0.74, 0.87, 0.96)  # the background of Shapes, which becomes gray
CHROMA, UNIT = 0.36, 50.0  # how colorful the shapes are; the unit of a and b in regression
EASY = {"hue": 0.0, "lighting": 0.0, "background": 0.0}  # one red shape on one sky: what is painted


def to_lab(images: UInt8[Tensor, "n 3 size size"]) -> Float[Tensor, "n size size 3"]:
    return rgb_to_lab(images.movedim(1, 3).float() / 255)


def to_images(lab: Float[Tensor, "n size size 3"]) -> UInt8[Tensor, "n 3 size size"]:
    return (lab_to_rgb(lab) * 255).round().to(torch.uint8).movedim(3, 1)


def gray(images: UInt8[Tensor, "n 3 size size"]) -> UInt8[Tensor, "n 3 size size"]:
    """The lightness of the images in all three channels: what a colorization network gets."""
    lightness = (to_lab(images)[..., 0] * 2.55).round().to(torch.uint8)
    return lightness[:, None].repeat(1, 3, 1, 1)


def paint(
    images: UInt8[Tensor, "n 3 size size"], angle: Float[Tensor, "n"], gain: Float[Tensor, "n"]
) -> UInt8[Tensor, "n 3 size size"]:
    """Red shapes on a blue sky, as shapes of any hue on gray.

    Colors are rotated by `angle` (radians) around the sky's, and the contrast of the lightness is multiplied by `gain`;
    a negative one makes dark shapes bright. The lightness does not depend on the angle.
    """
    lab = to_lab(images)
    ab = CHROMA * (lab[..., 1:] - rgb_to_lab(torch.tensor(SKY))[1:])
    cos, sin = angle.cos()[:, None, None], angle.sin()[:, None, None]
    lightness = 55 + gain[:, None, None] * (lab[..., 0] - 70)
    turned = [cos * ab[..., 0] - sin * ab[..., 1], sin * ab[..., 0] + cos * ab[..., 1]]
    return to_images(torch.stack([lightness.clamp(0, 100), *turned], 3))


def angles(shape: Int[Tensor, "n"], colors: Colors, seed: int = 0) -> Float[Tensor, "n"]:
    """The angle of each image's color: one of ten, which its shape decides, or nothing."""
    if colors == "at random":
        shape = torch.randint(10, shape.shape, generator=torch.Generator().manual_seed(seed))
    return 2 * math.pi * (shape if colors != "one" else torch.zeros_like(shape)) / 10


def gains(count: int, seed: int = 0) -> Float[Tensor, "n"]:
    """Contrasts from 0.4 to 1, half of them negative."""
    u = torch.rand(2, count, generator=torch.Generator().manual_seed(100 + seed))
    return (0.4 + 0.6 * u[0]) * (u[1] < 0.5).float().mul(2).sub(1)


def painted(shapes: Shapes, colors: Colors | Literal["none"], leak: bool = False) -> Data:
    """Shapes, painted, or with "none" their lightness alone, which is the same whatever the colors.

    Args:
        shapes: what is painted, with the options `EASY`.
        colors: what the color of an image depends on.
        leak: let the contrast, and with it the lightness, tell the random color.
    """
    given: list[Tensor] = []
    for split in ("train", "test"):
        images, factors = shapes.render(split)
        label = factors["shape"]
        gain = gains(len(label), shapes.seed)
        if leak:
            k = (angles(label, "at random", shapes.seed) * 5 / math.pi).round()  # 0 to 9
            gain = (0.4 + 0.15 * (k % 5)) * torch.where(k < 5, 1, -1)
        angle = angles(label, "one" if colors == "none" else colors, shapes.seed)
        images = paint(images, angle, gain)
        given += [gray(images) if colors == "none" else images, label]
    return Data.from_images(*given, Shapes.class_names, f"shapes, color {colors}")


class Regression(Colorization):
    """Colorization as a regression of a and b.

    Args:
        power: of the error: 2 for squares, 1 for absolute values.
    """

    def __init__(self, *args, power: int = 2, **options) -> None:
        super().__init__(*args, **options)
        self.power = power
        self.decoder[-1] = nn.Conv2d(self.decoder[-1].in_channels, 2, 1)

    def forward(self, batch: Batch, clock: Clock) -> dict[str, Tensor]:
        lab = self.to_lab(batch.views[0])
        start = self.stride // 2
        ab = lab[:, start :: self.stride, start :: self.stride, 1:]
        error = self.predict(lab[..., 0]) - ab / UNIT
        return {"loss": error.abs().pow(self.power).mean()}


class Adversarial(ContextEncoder):
    """The context encoder with its adversarial term, for the central mask.

    The discriminator's loss is added to the encoder's, with no gradient from one to the other: what the discriminator
    minimizes reaches only its own weights, what the encoder minimizes leaves them alone.

    Args:
        weight: of the adversarial term; the reconstruction has what remains to 1.
    """

    def __init__(self, backbone: nn.Module, view: View, weight: float = 0.001, width: int = 32, **options) -> None:
        super().__init__(backbone, view, mask="center", **options)
        self.weight = weight
        side = view.size // 8  # of the map of a square of half the image's side
        self.discriminator = nn.Sequential(
            nn.Conv2d(3, width, 4, 2, 1),
            nn.LeakyReLU(0.2),
            nn.Conv2d(width, 2 * width, 4, 2, 1),
            nn.LeakyReLU(0.2),
            nn.Conv2d(2 * width, 1, side),
        )

    def forward(self, batch: Batch, clock: Clock) -> dict[str, Tensor]:
        (images,) = batch.views
        mask = self.sample_masks(batch.index, clock)
        prediction = self.predict(images, mask)
        rec = reconstruction_loss(prediction, images, pixel_weights(mask, self.overlap, self.overlap_weight))
        if not self.weight:
            return {"loss": rec, "reconstruction": rec}
        quarter = self.view.size // 4
        square = (slice(None), slice(None), slice(quarter, 3 * quarter), slice(quarter, 3 * quarter))
        real, fake = images[square], prediction[square]
        frozen = {name: p.detach() for name, p in self.discriminator.named_parameters()}
        fooled = functional_call(self.discriminator, frozen, (fake,))
        told = self.discriminator(torch.cat([real, fake.detach()])).flatten()
        is_real = torch.cat([torch.ones(len(real)), torch.zeros(len(fake))]).to(told)
        d_loss = F.binary_cross_entropy_with_logits(told, is_real)
        adversarial = F.softplus(-fooled).mean()  # minus the log of the probability of real
        right = ((told > 0) == (is_real > 0)).float().mean()
        return {
            "loss": (1 - self.weight) * rec + self.weight * adversarial + d_loss,
            "reconstruction": rec,
            "discriminator_accuracy": 100 * right,
        }


def watch_loss(method: Method) -> list[float]:
    """A list to which every forward pass of a method in training adds its loss."""
    found: list[float] = []

    def note(module: nn.Module, given: tuple, out: dict[str, Tensor]) -> None:
        found.append(out["loss"].item())

    method.register_forward_hook(note)
    return found


def gradient_energy(images: Float[Tensor, "n 3 height width"]) -> float:
    """Mean squared difference of neighboring pixels: how sharp images are."""
    down, right = images.diff(dim=2), images.diff(dim=3)
    return (down.square().mean() + right.square().mean()).item()


class Seeing(Colorization):
    """Colorization that sees the colors: the first convolution keeps a weight for each."""

    def predict(self, lightness: Float[Tensor, "batch height width"]) -> Float[Tensor, "batch rows columns bins"]:
        return self.decoder(self.backbone.forward_map(self.images)).float().movedim(1, 3)

    def forward(self, batch: Batch, clock: Clock) -> dict[str, Tensor]:
        (self.images,) = batch.views
        return super().forward(batch, clock)


class Unmasked(ContextEncoder):
    """The context encoder that sees what it reconstructs."""

    def predict(
        self, images: Float[Tensor, "batch channels height width"], mask: Bool[Tensor, "batch height width"]
    ) -> Float[Tensor, "batch channels height width"]:
        return super().predict(images, torch.zeros_like(mask))


@torch.no_grad()
def chroma(method: Colorization, data: Data, temperature: float = 0.38) -> dict[str, float]:
    """How colorful the predictions for test images are, in percent of the images', and their error, in units of ab."""
    found = []
    view = View.center(method.view.size, mean=method.view.mean, std=method.view.std)
    for batch in data.evaluation_batches("test", view, device=method.bins.device):
        lab = method.to_lab(batch.views[0])
        start = method.stride // 2
        ab = lab[:, start :: method.stride, start :: method.stride, 1:]
        predicted = colors_of(method, lab[..., 0], temperature)
        found.append(
            torch.stack([predicted.norm(dim=3).mean(), ab.norm(dim=3).mean(), (predicted - ab).norm(dim=3).mean()])
        )
    predicted, true, error = torch.stack(found).mean(0).tolist()
    return {"chroma, % of the truth's": 100 * predicted / true, "error": error}


@torch.no_grad()
def colors_of(
    method: Colorization, lightness: Float[Tensor, "n height width"], temperature: float = 0.38
) -> Float[Tensor, "n rows columns 2"]:
    """The colors (a, b) that a trained method predicts."""
    out = method.predict(lightness)
    if isinstance(method, Regression):
        return UNIT * out
    return annealed_mean(out.flatten(0, 2), method.bins, temperature).unflatten(0, out.shape[:3])
