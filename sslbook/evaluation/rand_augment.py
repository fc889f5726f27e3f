"""RandAugment (Cubuk et al., 2020, arXiv:1909.13719) for a batch on its device, as timm's `rand-m9-mstd0.5-inc1`.

Two operations of fifteen, each applied with probability one half, all of which grow stronger with the magnitude.
"""

import math

import torch
import torch.nn.functional as F
from jaxtyping import Float, UInt8
from torch import Tensor

NUM_LAYERS = 2
_GRAY = (0.2989, 0.587, 0.114)


def rand_augment(
    x: UInt8[Tensor, "batch 3 height width"],
    magnitude: float,
    u: Float[Tensor, "batch numbers"],
    fill: tuple[float, ...] = (0.485, 0.456, 0.406),
) -> UInt8[Tensor, "batch 3 height width"]:
    """Operations chosen for each image; those of one kind are applied to all their images at once.

    Args:
        x: images, levels of 8 bits.
        magnitude: mean strength of 10, with a standard deviation of one half.
        u: four uniform numbers for each image and layer: which operation, whether, how strong, which sign.
        fill: color of what comes in from outside.
    """
    x = x.clone()
    for which, apply, strength, sign in u.T.reshape(-1, 4, len(x)):
        kind = (which * len(OPERATIONS)).long()
        level = (magnitude + 0.5 * normal(strength)).clamp(0, 10) / 10
        signed = torch.where(sign < 0.5, -level, level)
        for number, operation in enumerate(OPERATIONS):
            rows = ((kind == number) & (apply < 0.5)).nonzero()[:, 0]
            if len(rows):
                x[rows] = operation(x[rows], level[rows], signed[rows], fill)
    return x


def normal(u: Tensor) -> Tensor:
    """Standard normal numbers of uniform ones."""
    return math.sqrt(2) * torch.erfinv((2 * u.double() - 1).clamp(-1 + 1e-7, 1 - 1e-7)).float()


def _blend(x: Tensor, other: Tensor, signed: Tensor) -> Tensor:
    """PIL's enhancement by a factor of 1 plus or minus up to 0.9: below 1 towards `other`, above away from it."""
    factor = (1 + 0.9 * signed).clamp(min=0.1).view(-1, 1, 1, 1)
    return (other + factor * (x.float() - other)).clamp(0, 255).to(torch.uint8)


def _gray(x: Tensor) -> Tensor:
    return sum(weight * x[:, i : i + 1].float() for i, weight in enumerate(_GRAY))  # pyrefly: ignore


def _smooth(x: Tensor) -> Tensor:
    """PIL's SMOOTH filter, which leaves the border as it is."""
    kernel = torch.ones(3, 3, device=x.device)
    kernel[1, 1] = 5
    inner = F.conv2d(x.float(), (kernel / 13).expand(x.shape[1], 1, 3, 3), groups=x.shape[1])
    smooth = x.float().clone()
    smooth[:, :, 1:-1, 1:-1] = inner.round()
    return smooth


def _warp(x: Tensor, theta: Float[Tensor, "n 2 3"], fill: tuple[float, ...]) -> Tensor:
    border = 255 * torch.tensor(fill, device=x.device).view(-1, 1, 1)
    grid = F.affine_grid(theta, list(x.shape), align_corners=False)
    return (F.grid_sample(x.float() - border, grid, align_corners=False) + border).round().clamp(0, 255).to(torch.uint8)


def _theta(n: int, device: torch.device, **entries: Tensor) -> Float[Tensor, "n 2 3"]:
    """Matrices from output to input, in coordinates of -1 to 1: the identity but for the entries given (a ... f)."""
    theta = torch.eye(2, 3, device=device).repeat(n, 1, 1)
    for name, value in entries.items():
        theta[:, "abcdef".index(name) // 3, "abcdef".index(name) % 3] = value
    return theta


def _rotate(x: Tensor, level: Tensor, signed: Tensor, fill: tuple[float, ...]) -> Tensor:
    angle, ratio = signed * math.radians(30), x.shape[2] / x.shape[3]
    sin, cos = angle.sin(), angle.cos()
    return _warp(x, _theta(len(x), x.device, a=cos, b=-sin * ratio, d=sin / ratio, e=cos), fill)


def _posterize(x: Tensor, level: Tensor, signed: Tensor, fill: tuple[float, ...]) -> Tensor:
    dropped = 4 + (4 * level).long()  # bits: 4 at level 0, all 8 at level 1
    return x & (256 - 2**dropped).to(torch.uint8).view(-1, 1, 1, 1)


def _solarize(x: Tensor, level: Tensor, signed: Tensor, fill: tuple[float, ...]) -> Tensor:
    return torch.where(x < (256 - (256 * level).long()).view(-1, 1, 1, 1), x, 255 - x)


def _solarize_add(x: Tensor, level: Tensor, signed: Tensor, fill: tuple[float, ...]) -> Tensor:
    added = (x.long() + (110 * level).long().view(-1, 1, 1, 1)).clamp(max=255).to(torch.uint8)
    return torch.where(x < 128, added, x)


def _autocontrast(x: Tensor, *_: object) -> Tensor:
    from torchvision.transforms.v2 import functional as V

    return V.autocontrast(x)


def _equalize(x: Tensor, *_: object) -> Tensor:
    from torchvision.transforms.v2 import functional as V

    return V.equalize(x)


OPERATIONS = (  # each of images, level from 0 to 1, level with a random sign, and the color of the border
    _autocontrast,
    _equalize,
    lambda x, level, signed, fill: 255 - x,
    _rotate,
    _posterize,
    _solarize,
    _solarize_add,
    lambda x, level, signed, fill: _blend(x, _gray(x), signed),
    lambda x, level, signed, fill: _blend(x, _gray(x).mean((1, 2, 3), keepdim=True).round(), signed),
    lambda x, level, signed, fill: _blend(x, torch.zeros_like(x, dtype=torch.float32), signed),
    lambda x, level, signed, fill: _blend(x, _smooth(x), signed),
    # shears are about the upper left corner
    lambda x, level, s, fill: _warp(x, _theta(len(x), x.device, b=0.3 * s, c=0.3 * s), fill),
    lambda x, level, s, fill: _warp(x, _theta(len(x), x.device, d=0.3 * s, f=0.3 * s), fill),
    lambda x, level, s, fill: _warp(x, _theta(len(x), x.device, c=0.9 * s), fill),  # 45 % of the width
    lambda x, level, s, fill: _warp(x, _theta(len(x), x.device, f=0.9 * s), fill),
)
"""Autocontrast, equalize, invert, rotate, posterize, solarize, solarize-add, color, contrast, brightness, sharpness,
shear in x and y, translation in x and y: timm's `_RAND_INCREASING_TRANSFORMS`, in its order."""
