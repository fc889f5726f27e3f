"""The fifteen corruptions of ImageNet-C at five severities, on batches of images.

Hendrycks and Dietterich (2019, "Benchmarking neural network robustness to common corruptions and perturbations"),
section 4.1. The strengths are those of the authors' code: of ImageNet-C for images of 64 pixels or more, else of
CIFAR-10-C. The implementation is our own and batched, and every random number is keyed by the image. What differs:

- frost: the authors blend in photographs of frosted glass; here it is a pattern of ridged fractal noise, bluish white;
- glass blur: pixels are replaced by a random neighbor, not swapped with it one after the other;
- motion blur and snow: streaks are sampled at whole pixels, not by ImageMagick;
- elastic: affine shift and displacement are one interpolation, not two;
- no image is compressed besides (the files of ImageNet-C are JPEGs of quality 85).

Figures are therefore close to, but not the same as, those on the published files.
"""

import io
import math
from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from sslbook import rng
from sslbook.errors import UserError, nearest

Images = Float[Tensor, "n 3 height width"]
Uniform = Callable[..., Tensor]  # `uniform(*shape)`: (n, *shape) numbers in [0, 1), each image's its own
STREAM = 3000  # of the random numbers: one for each corruption from here on
LARGE = 64  # side of an image from which the strengths of ImageNet-C are in force


def corrupt(images: Images, name: str, severity: int, index: Int[Tensor, "n"], seed: int = 0) -> Images:
    """Corrupt images with values in [0, 1]; the result has 8 bits, as a file would.

    Args:
        images: of one size.
        name: one of `NAMES`.
        severity: from 1 to 5.
        index: position of each image, which with `seed` is the key of its random numbers.
        seed: the seed.

    Raises:
        UserError: there is no such corruption or severity.
    """
    require(name, severity)
    function, large, small = CORRUPTIONS[name]
    strength = (large if min(images.shape[2:]) >= LARGE else small)[severity - 1]
    used = [0]  # numbers of each image so far

    def uniform(*shape: int) -> Tensor:
        count = math.prod(shape)
        # An epoch of its own for each call, so that no two calls share numbers.
        used[0] += 1
        found = rng.uniform(seed, 100 * severity + used[0], index.to(images.device), STREAM + NAMES.index(name), count)
        return found.view(len(images), *shape)

    return (function(images, strength, uniform).clamp(0, 1) * 255).floor() / 255


def require(name: str, severity: int) -> None:
    """UserError unless there is such a corruption and severity."""
    if name not in CORRUPTIONS:
        raise UserError(f"no corruption {name}: choose among {', '.join(NAMES)}{nearest(name, list(NAMES))}")
    if severity not in range(1, 6):
        raise UserError(f"severity {severity}: give a whole number from 1 to 5")


# -- noise -------------------------------------------------------------------------------------------------------------


def _normal(uniform: Uniform, *shape: int) -> Tensor:
    """Standard normal numbers (Box and Muller, 1958)."""
    return (-2 * (1 - uniform(*shape)).log()).sqrt() * (2 * math.pi * uniform(*shape)).cos()


def _gaussian_noise(x: Tensor, std: float, uniform: Uniform) -> Tensor:
    return x + std * _normal(uniform, *x.shape[1:])


def _shot_noise(x: Tensor, photons: float, uniform: Uniform) -> Tensor:
    """Poisson noise: a value of 1 is so many photons."""
    keys = (uniform(2).double() * 2**24).long().cpu()
    counts = []
    for image, (high, low) in zip((x * photons).cpu(), keys.tolist()):
        counts.append(torch.poisson(image, generator=torch.Generator().manual_seed(high << 24 | low)))
    return torch.stack(counts).to(x) / photons


def _impulse_noise(x: Tensor, amount: float, uniform: Uniform) -> Tensor:
    """Some values become 0 or 1."""
    u = uniform(*x.shape[1:])
    return torch.where(u < amount / 2, 0.0, torch.where(u < amount, 1.0, x))


# -- blur --------------------------------------------------------------------------------------------------------------


@cache
def _blur_matrix(size: int, sigma: float, mode: str, truncate: float) -> np.ndarray:
    from scipy.ndimage import gaussian_filter1d

    return gaussian_filter1d(np.eye(size), sigma, axis=0, mode=mode, truncate=truncate).astype(np.float32)


def _gaussian_blur(x: Tensor, sigma: float, mode: str = "nearest", truncate: float = 4.0) -> Tensor:
    """Gaussian blur of the last two axes, which is a matrix for each."""
    rows, columns = (torch.from_numpy(_blur_matrix(side, sigma, mode, truncate)).to(x) for side in x.shape[-2:])
    return rows @ x @ columns.T


def _defocus_blur(x: Tensor, strength: tuple[float, float], uniform: Uniform) -> Tensor:
    """A disk as kernel, whose edge is softened by a Gaussian."""
    radius, sigma = strength
    reach = math.ceil(radius) + 2
    line = torch.arange(-reach, reach + 1, dtype=torch.float32)
    disk = (line[:, None] ** 2 + line**2 <= radius**2).float()
    kernel = _gaussian_blur(disk / disk.sum(), sigma, mode="mirror").to(x)
    padded = F.pad(x, [reach] * 4, mode="reflect" if reach < min(x.shape[2:]) else "replicate")
    return F.conv2d(padded, kernel.expand(3, 1, -1, -1), groups=3)


def _glass_blur(x: Tensor, strength: tuple[float, int, int], uniform: Uniform) -> Tensor:
    """Pixels move to random positions near by, between two blurs."""
    sigma, reach, times = strength
    x = _gaussian_blur(x, sigma)
    height, width = x.shape[2:]
    for _ in range(times):
        shift = (uniform(2, height, width) * 2 * reach).floor().long() - reach
        rows = (torch.arange(height, device=x.device)[:, None] + shift[:, 0]).clamp(0, height - 1)
        columns = (torch.arange(width, device=x.device) + shift[:, 1]).clamp(0, width - 1)
        index = (rows * width + columns).flatten(1)[:, None].expand(-1, 3, -1)
        x = x.flatten(2).gather(2, index).view_as(x)
    return _gaussian_blur(x, sigma)


def _streaks(x: Tensor, radius: float, sigma: float, angle: Float[Tensor, "n"]) -> Tensor:
    """Motion blur: each pixel is a mean along a line at `angle` (radians) that starts in it, with weights of a Gaussian."""
    height, width = x.shape[2:]
    total, result = 0.0, torch.zeros_like(x)
    for step in range(2 * int(radius) + 1):
        weight = math.exp(-(step**2) / (2 * sigma**2))
        dy, dx = ((step * way).round().long()[:, None] for way in (angle.sin(), angle.cos()))
        rows = (torch.arange(height, device=x.device) + dy).clamp(0, height - 1)
        columns = (torch.arange(width, device=x.device) + dx).clamp(0, width - 1)
        index = (rows[:, :, None] * width + columns[:, None]).flatten(1)[:, None].expand(-1, x.shape[1], -1)
        result += weight * x.flatten(2).gather(2, index).view_as(x)
        total += weight
    return result / total


def _motion_blur(x: Tensor, strength: tuple[float, float], uniform: Uniform) -> Tensor:
    return _streaks(x, *strength, angle=(uniform(1)[:, 0] - 0.5) * math.pi / 2)


def _zoomed(x: Tensor, zoom: float) -> Tensor:
    """The center of the images, enlarged."""
    theta = torch.tensor([[1 / zoom, 0.0, 0.0], [0.0, 1 / zoom, 0.0]], device=x.device).expand(len(x), -1, -1)
    grid = F.affine_grid(theta, list(x.shape), align_corners=False)
    return F.grid_sample(x, grid, padding_mode="border", align_corners=False)


def _zoom_blur(x: Tensor, strength: tuple[float, float], uniform: Uniform) -> Tensor:
    """The mean of the image and of itself zoomed by 1, 1 + step, ... up to the greatest zoom."""
    most, step = strength
    zooms = [1 + step * i for i in range(round((most - 1) / step) + 1)]
    return (x + sum(_zoomed(x, zoom) for zoom in zooms)) / (len(zooms) + 1)


# -- weather -----------------------------------------------------------------------------------------------------------


def _fractal(uniform: Uniform, side: int, decay: float) -> Float[Tensor, "n side side"]:
    """Plasma noise by the diamond-square algorithm (Fournier, Fussell and Carpenter, 1982), from 0 to 1.

    Args:
        uniform: the source of random numbers.
        side: at least this; what is returned has exactly it.
        decay: by which the displacement shrinks from one step to the next.
    """
    size = 2 ** math.ceil(math.log2(max(side, 2)))
    first = uniform(1, 1)
    map_ = torch.zeros(len(first), size, size, device=first.device)
    step, wobble = size, 100.0

    def displaced(corners: Tensor) -> Tensor:
        return corners / 4 + wobble**2 * (2 * uniform(*corners.shape[1:]) - 1)

    while step >= 2:
        half = step // 2
        corners = map_[:, ::step, ::step]
        below = corners + corners.roll(-1, 1)
        map_[:, half::step, half::step] = displaced(below + below.roll(-1, 2))
        centers = map_[:, half::step, half::step]
        map_[:, ::step, half::step] = displaced(centers + centers.roll(1, 1) + corners + corners.roll(-1, 2))
        map_[:, half::step, ::step] = displaced(centers + centers.roll(1, 2) + corners + corners.roll(-1, 1))
        step, wobble = half, wobble / decay
    low, high = map_.amin((1, 2), keepdim=True), map_.amax((1, 2), keepdim=True)
    return ((map_ - low) / (high - low).clamp(min=1e-12))[:, :side, :side]


def _fog(x: Tensor, strength: tuple[float, float], uniform: Uniform) -> Tensor:
    amount, decay = strength
    brightest = x.amax((1, 2, 3), keepdim=True)
    fog = _fractal(uniform, max(x.shape[2:]), decay)[:, None, : x.shape[2], : x.shape[3]]
    return (x + amount * fog) * brightest / (brightest + amount)


def _frost(x: Tensor, strength: tuple[float, float], uniform: Uniform) -> Tensor:
    """Ridges of a fractal, where it crosses its middle, as crystals on a bluish pane."""
    kept, amount = strength
    noise = _fractal(uniform, max(x.shape[2:]), 1.7)[:, None, : x.shape[2], : x.shape[3]]
    ridges = (1 - (2 * noise - 1).abs()) ** 3
    pane = 0.35 + 0.65 * ridges
    return kept * x + amount * pane * torch.tensor([0.85, 0.92, 1.0], device=x.device)[:, None, None]


def _snow(x: Tensor, strength: tuple[float, ...], uniform: Uniform) -> Tensor:
    """Flakes, thresholded normal noise, blurred as they fall, on an image that is whitened."""
    mean, std, zoom, threshold, radius, sigma, kept = strength
    flakes = _zoomed((mean + std * _normal(uniform, *x.shape[2:]))[:, None], zoom)
    flakes = torch.where(flakes < threshold, 0.0, flakes).clamp(0, 1)
    flakes = _streaks(flakes, radius, sigma, angle=-math.pi * (0.25 + 0.5 * uniform(1)[:, 0]))
    gray = (x * torch.tensor([0.299, 0.587, 0.114], device=x.device)[:, None, None]).sum(1, keepdim=True)
    return kept * x + (1 - kept) * torch.maximum(x, 1.5 * gray + 0.5) + flakes + flakes.rot90(2, (2, 3))


def _brightness(x: Tensor, amount: float, uniform: Uniform) -> Tensor:
    """Added to the value of HSV: hue and saturation stay."""
    value = x.amax(1, keepdim=True)
    brighter = (value + amount).clamp(max=1)
    return torch.where(value > 0, x * brighter / value.clamp(min=1e-8), brighter)


# -- digital -----------------------------------------------------------------------------------------------------------


def _contrast(x: Tensor, factor: float, uniform: Uniform) -> Tensor:
    mean = x.mean((2, 3), keepdim=True)
    return (x - mean) * factor + mean


def _elastic(x: Tensor, strength: tuple[float, float, float], uniform: Uniform) -> Tensor:
    """A random affine map, then a smooth random displacement; strengths are relative to the side of the image."""
    height, width = x.shape[2:]
    amount, sigma, shift = (value * min(height, width) for value in strength)
    middle, third = torch.tensor([height / 2, width / 2]), min(height, width) / 3
    corners = middle + third * torch.tensor([[1.0, 1.0], [1.0, -1.0], [-1.0, -1.0]])
    moved = corners.to(x) + shift * (2 * uniform(3, 2) - 1)
    ones = torch.ones(len(x), 3, 1, device=x.device)
    affine = torch.linalg.solve(
        torch.cat([moved, ones], dim=2), corners.to(x).expand(len(x), -1, -1)
    )  # moved to corners
    grid = torch.stack(
        torch.meshgrid(*(torch.arange(side, device=x.device) for side in (height, width)), indexing="ij")
    )
    target = grid.float().expand(len(x), -1, -1, -1)
    if amount > 0:
        field = 2 * uniform(2, height, width) - 1
        target = target + amount * _gaussian_blur(field, sigma, mode="reflect", truncate=3.0)
    flat = torch.cat([target.flatten(2), torch.ones(len(x), 1, height * width, device=x.device)], dim=1)
    source = (affine.transpose(1, 2) @ flat).unflatten(2, (height, width))
    scale = torch.tensor([height, width], device=x.device)[:, None, None]
    where = (2 * source + 1) / scale - 1
    return F.grid_sample(x, where.flip(1).permute(0, 2, 3, 1), padding_mode="reflection", align_corners=False)


def _by_pil(x: Tensor, change: Callable[[Any], Any]) -> Tensor:
    from PIL import Image

    images = (x * 255).round().byte().permute(0, 2, 3, 1).cpu().numpy()
    changed = np.stack([np.asarray(change(Image.fromarray(image)).convert("RGB")) for image in images])
    return torch.from_numpy(changed).permute(0, 3, 1, 2).to(x) / 255


def _jpeg(x: Tensor, quality: int, uniform: Uniform) -> Tensor:
    from PIL import Image

    def compressed(image: Any) -> Any:
        file = io.BytesIO()
        image.save(file, "JPEG", quality=quality)
        return Image.open(file)

    return _by_pil(x, compressed)


def _pixelate(x: Tensor, factor: float, uniform: Uniform) -> Tensor:
    from PIL import Image

    height, width = x.shape[2:]
    small, box = (max(1, int(width * factor)), max(1, int(height * factor))), Image.Resampling.BOX
    return _by_pil(x, lambda image: image.resize(small, box).resize((width, height), box))


# Name: function, strengths of ImageNet-C, strengths of CIFAR-10-C.
CORRUPTIONS: dict[str, tuple[Callable[..., Tensor], list[Any], list[Any]]] = {
    "gaussian noise": (_gaussian_noise, [0.08, 0.12, 0.18, 0.26, 0.38], [0.04, 0.06, 0.08, 0.09, 0.10]),
    "shot noise": (_shot_noise, [60, 25, 12, 5, 3], [500, 250, 100, 75, 50]),
    "impulse noise": (_impulse_noise, [0.03, 0.06, 0.09, 0.17, 0.27], [0.01, 0.02, 0.03, 0.05, 0.07]),
    "defocus blur": (
        _defocus_blur,
        [(3, 0.1), (4, 0.5), (6, 0.5), (8, 0.5), (10, 0.5)],
        [(0.3, 0.4), (0.4, 0.5), (0.5, 0.6), (1, 0.2), (1.5, 0.1)],
    ),
    "glass blur": (
        _glass_blur,
        [(0.7, 1, 2), (0.9, 2, 1), (1, 2, 3), (1.1, 3, 2), (1.5, 4, 2)],
        [(0.05, 1, 1), (0.25, 1, 1), (0.4, 1, 1), (0.25, 1, 2), (0.4, 1, 2)],
    ),
    "motion blur": (
        _motion_blur,
        [(10, 3), (15, 5), (15, 8), (15, 12), (20, 15)],
        [(6, 1), (6, 1.5), (6, 2), (8, 2), (9, 2.5)],
    ),
    "zoom blur": (
        _zoom_blur,
        [(1.10, 0.01), (1.15, 0.01), (1.20, 0.02), (1.24, 0.02), (1.30, 0.03)],
        [(1.05, 0.01), (1.10, 0.01), (1.15, 0.01), (1.20, 0.01), (1.25, 0.01)],
    ),
    "snow": (
        _snow,
        [
            (0.1, 0.3, 3, 0.5, 10, 4, 0.8),
            (0.2, 0.3, 2, 0.5, 12, 4, 0.7),
            (0.55, 0.3, 4, 0.9, 12, 8, 0.7),
            (0.55, 0.3, 4.5, 0.85, 12, 8, 0.65),
            (0.55, 0.3, 2.5, 0.85, 12, 12, 0.55),
        ],
        [
            (0.1, 0.2, 1, 0.6, 8, 3, 0.95),
            (0.1, 0.2, 1, 0.5, 10, 4, 0.9),
            (0.15, 0.3, 1.75, 0.55, 10, 4, 0.9),
            (0.25, 0.3, 2.25, 0.6, 12, 6, 0.85),
            (0.3, 0.3, 1.25, 0.65, 14, 12, 0.8),
        ],
    ),
    "frost": (
        _frost,
        [(1.0, 0.4), (0.8, 0.6), (0.7, 0.7), (0.65, 0.7), (0.6, 0.75)],
        [(1.0, 0.2), (1.0, 0.3), (0.9, 0.4), (0.85, 0.4), (0.75, 0.45)],
    ),
    "fog": (
        _fog,
        [(1.5, 2.0), (2.0, 2.0), (2.5, 1.7), (2.5, 1.5), (3.0, 1.4)],
        [(0.2, 3.0), (0.5, 3.0), (0.75, 2.5), (1.0, 2.0), (1.5, 1.75)],
    ),
    "brightness": (_brightness, [0.1, 0.2, 0.3, 0.4, 0.5], [0.05, 0.1, 0.15, 0.2, 0.3]),
    "contrast": (_contrast, [0.4, 0.3, 0.2, 0.1, 0.05], [0.75, 0.5, 0.4, 0.3, 0.15]),
    "elastic": (
        _elastic,
        [(2.0, 0.7, 0.1), (2.0, 0.08, 0.2), (0.05, 0.01, 0.02), (0.07, 0.01, 0.02), (0.12, 0.01, 0.02)],
        [(0.0, 0.0, 0.08), (0.05, 0.2, 0.07), (0.08, 0.06, 0.06), (0.1, 0.04, 0.05), (0.1, 0.03, 0.03)],
    ),
    "pixelate": (_pixelate, [0.6, 0.5, 0.4, 0.3, 0.25], [0.95, 0.9, 0.85, 0.75, 0.65]),
    "jpeg": (_jpeg, [25, 18, 15, 10, 7], [80, 65, 58, 50, 40]),
}
NAMES = tuple(CORRUPTIONS)
