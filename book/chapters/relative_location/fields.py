"""Images without objects: smooth random fields, seen through a lens that bends colors differently.

A field is a sum of random waves, so it can be evaluated at any point, without interpolation. A lens with lateral
chromatic aberration shows color channel c at radius (1 + kappa_c) r from the center of the image instead of r.
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float, UInt8
from torch import Tensor

from sslbook.data.loader import Data

NO_LENS = (0.0, 0.0, 0.0)


def waves(
    count: int,
    size: int = 32,
    length: float = 3.0,
    kappa: Sequence[float] = NO_LENS,
    seed: int = 0,
    num_waves: int = 64,
) -> Float[Tensor, "count 3 size size"]:
    """Fields of mean 0 and variance 1 with the covariance exp(-distance^2 / 2 length^2), in three colors.

    Args:
        count: number of images.
        size: height and width in pixels.
        length: correlation length in pixels.
        kappa: red, green and blue are magnified by 1 / (1 + kappa) around the center.
        seed: of the waves.
        num_waves: in each image; the more, the nearer to a Gaussian field.
    """
    generator = torch.Generator().manual_seed(seed)
    frequency = torch.randn(count, 2, num_waves, generator=generator) / length
    phase = 2 * math.pi * torch.rand(count, num_waves, generator=generator)
    r = torch.arange(size) - (size - 1) / 2
    channels = []
    for k in kappa:
        rows, columns = (torch.exp(1j * (1 + k) * r[:, None] * frequency[:, None, axis]) for axis in (0, 1))
        rows = rows * torch.exp(1j * phase)[:, None]  # a wave is the product of its row and its column
        channels.append((rows @ columns.mT).real * math.sqrt(2 / num_waves))
    return torch.stack(channels, dim=1)


def photograph(field: Tensor) -> UInt8[Tensor, "count channels height width"]:
    """Fields as images of 8 bits: gray 128 in the mean."""
    return (255 * (0.5 + 0.17 * field).clamp(0, 1) + 0.5).to(torch.uint8)


def noise_data(num_train: int = 2000, length: float = 3.0, kappa: Sequence[float] = NO_LENS, seed: int = 0) -> Data:
    """Images of noise to train on; they have no classes."""
    images = photograph(waves(num_train, length=length, kappa=kappa, seed=seed))
    return Data.from_images(images, torch.full((num_train,), -1), name="noise")


def lens(
    images: UInt8[Tensor, "count 3 height width"], kappa: Sequence[float]
) -> UInt8[Tensor, "count 3 height width"]:
    """The same lens before images that exist already, by bilinear interpolation."""
    x, channels = images.float(), []
    for c, k in enumerate(kappa):
        theta = torch.tensor([[1 + k, 0.0, 0.0], [0.0, 1 + k, 0.0]]).expand(len(x), 2, 3)
        grid = F.affine_grid(theta, [len(x), 1, *x.shape[2:]], align_corners=False)
        channels.append(F.grid_sample(x[:, c : c + 1], grid, padding_mode="reflection", align_corners=False))
    return (torch.cat(channels, 1) + 0.5).to(torch.uint8)
