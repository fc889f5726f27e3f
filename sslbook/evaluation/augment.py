"""Augmentations of supervised training, for a whole batch on its device: what comes after crop and flip of a `View`.

- padded crop (He et al., 2016, section 4.2): the image shifted by a few pixels, the border filled with the mean;
- AutoAugment (Cubuk et al., 2019, arXiv:1805.09501), torchvision's policies, image by image;
- RandAugment (Cubuk et al., 2020, arXiv:1909.13719), timm's `rand-m9-mstd0.5-inc1` (`rand_augment.py`);
- random erasing (Zhong et al., 2020, arXiv:1708.04896), timm's mode `pixel`;
- Mixup (Zhang et al., 2018, arXiv:1710.09412), CutMix (Yun et al., 2019, arXiv:1905.04899) and ResizeMix (Qin et al.,
  2020, arXiv:2012.11101) with label smoothing.

All random numbers are keyed: those of an image by (seed, epoch, index), those of a mixed batch by (seed, step). What
differs from timm: geometric operations interpolate linearly and not by a cubic chosen at random, on images that are
already cropped, as there; a batch is mixed with its neighbors (first with second, third with fourth, ...) instead of with
itself reversed, which several processes could not do alike; the order of images is random, so the distribution is the same.
"""

import math
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int, UInt8
from torch import Tensor

from sslbook.errors import UserError
from sslbook.evaluation.rand_augment import NUM_LAYERS, normal, rand_augment
from sslbook.rng import METHOD, uniform
from sslbook.schedules import Clock

_PAD, _RAND, _ERASE, _NOISE, _MIX, _AUTO = range(METHOD, METHOD + 6)  # streams
_ATTEMPTS = 10  # at a rectangle that fits, as in timm


@dataclass(frozen=True)
class Augmentation:
    """What is done to the images of a supervised training, besides the crop and the flip of their view.

    Args:
        crop: range of the fraction of the image's area that a random crop keeps; null crops the center instead.
        flip: probability of a horizontal flip.
        interpolation: filter of the resize.
        color_jitter: greatest change of brightness, contrast, saturation and hue; zeros for none.
        padding: shift the image by up to so many pixels in each direction, as CIFAR's networks are trained.
        auto_augment: the policy of AutoAugment, as found on ImageNet, CIFAR-10 or SVHN; null leaves it out.
        rand_augment: magnitude of RandAugment, 0 to 10; 0 leaves it out, 9 is timm's rand-m9-mstd0.5-inc1.
        erasing: probability that a rectangle is erased by noise.
        mixup: alpha of Mixup's Beta(alpha, alpha); 0 leaves it out.
        cutmix: likewise of CutMix.
        resizemix: likewise of ResizeMix.
        mix_probabilities: probabilities that a batch is mixed by Mixup, CutMix and ResizeMix, at most 1 together; null
            gives equal ones to those with an alpha.
        label_smoothing: fraction of the target that is spread over all classes.
    """

    crop: tuple[float, float] | None = (0.08, 1.0)
    flip: float = 0.5
    interpolation: Literal["bilinear", "bicubic"] = "bilinear"
    color_jitter: tuple[float, float, float, float] = (0.0, 0.0, 0.0, 0.0)
    padding: int = 0
    auto_augment: Literal["imagenet", "cifar10", "svhn"] | None = None
    rand_augment: float = 0.0
    erasing: float = 0.0
    mixup: float = 0.0
    cutmix: float = 0.0
    resizemix: float = 0.0
    mix_probabilities: tuple[float, float, float] | None = None
    label_smoothing: float = 0.0

    def __post_init__(self) -> None:
        def require(fine: bool, field: str, rule: str) -> None:
            if not fine:
                raise UserError(f"augmentation.{field} = {getattr(self, field)}: it must be {rule}")

        require(self.padding >= 0, "padding", "at least 0")
        require(0 <= self.rand_augment <= 10, "rand_augment", "from 0 to 10")
        require(0 <= self.erasing <= 1, "erasing", "a probability, from 0 to 1")
        require(0 <= self.label_smoothing < 1, "label_smoothing", "from 0 to below 1")
        for field in ("mixup", "cutmix", "resizemix"):
            require(getattr(self, field) >= 0, field, "at least 0")
        given = self.mix_probabilities
        require(
            given is None or (min(given) >= 0 and sum(given) <= 1 + 1e-6), "mix_probabilities", "at most 1 together"
        )
        unused = given is not None and any(p and not a for p, a in zip(given, self.alphas))
        require(not unused, "mix_probabilities", "0 where the alpha is 0")

    @property
    def alphas(self) -> tuple[float, float, float]:
        """Of Mixup, CutMix, ResizeMix."""
        return self.mixup, self.cutmix, self.resizemix

    @property
    def mixes(self) -> bool:
        """Whether images of a batch are mixed."""
        return any(self.alphas) and (self.mix_probabilities is None or any(self.mix_probabilities))


@torch.no_grad()
def augment(
    what: Augmentation,
    x: Float[Tensor, "batch channels height width"],
    mean: tuple[float, ...],
    std: tuple[float, ...],
    clock: Clock,
    index: Int[Tensor, "batch"],
) -> Float[Tensor, "batch channels height width"]:
    """Padded crop, AutoAugment, RandAugment and random erasing of normalized images.

    Args:
        what: the options.
        x: images of a view.
        mean: that the view has subtracted.
        std: that the view has divided by.
        clock: gives seed and epoch of the keys.
        index: gives the image's part of the keys.

    Raises:
        UserError: AutoAugment or RandAugment of something else than red, green and blue.
    """
    if what.padding:
        x = _padded_crop(x, what.padding, uniform(clock.seed, clock.epoch, index, _PAD, 2))
    if what.auto_augment or what.rand_augment:
        if x.shape[1] != 3:
            cure = "set augmentation.auto_augment to null and rand_augment to 0"
            raise UserError(
                f"AutoAugment and RandAugment are for 3 channels, and these images have {x.shape[1]}: {cure}"
            )
        m, s = (torch.tensor(v, device=x.device).view(-1, 1, 1) for v in (mean, std))
        levels = ((x * s + m) * 255).round().clamp(0, 255).to(torch.uint8)
        if what.auto_augment:
            levels = _auto_augment(levels, what.auto_augment, uniform(clock.seed, clock.epoch, index, _AUTO, 1), mean)
        if what.rand_augment:
            u = uniform(clock.seed, clock.epoch, index, _RAND, 4 * NUM_LAYERS)
            levels = rand_augment(levels, what.rand_augment, u, mean)
        x = (levels.to(x.dtype) / 255 - m) / s
    if what.erasing:
        x = _erased(x, what.erasing, clock, index)
    return x


def _padded_crop(x: Tensor, padding: int, u: Float[Tensor, "batch 2"]) -> Tensor:
    """Each image shifted by its own whole pixels; what comes in is 0, the mean."""
    shift = (u * (2 * padding + 1)).long()
    rows, columns = (
        shift[:, i, None] + torch.arange(side, device=x.device) for i, side in enumerate((x.shape[2], x.shape[3]))
    )
    padded = F.pad(x, [padding] * 4)
    each = torch.arange(len(x), device=x.device)[:, None, None]
    return padded.permute(0, 2, 3, 1)[each, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2).contiguous()


def _auto_augment(
    x: UInt8[Tensor, "batch 3 height width"], policy: str, u: Float[Tensor, "batch 1"], fill: tuple[float, ...]
) -> UInt8[Tensor, "batch 3 height width"]:
    """torchvision's policy on each image; its generator is seeded by the image's uniform number."""
    from torchvision.transforms import AutoAugment, AutoAugmentPolicy, InterpolationMode

    color = [255 * value for value in fill]
    change = AutoAugment(AutoAugmentPolicy(policy), InterpolationMode.BILINEAR, color)
    made = []
    with torch.random.fork_rng(devices=[]):
        for image, key in zip(x, u[:, 0].tolist()):
            torch.manual_seed(int(key * 2**32))  # of which torch takes 32 bits
            made.append(change(image))
    return torch.stack(made)


# -- erasing and mixing ------------------------------------------------------------------------------------------------


def _erased(x: Tensor, probability: float, clock: Clock, index: Int[Tensor, "batch"]) -> Tensor:
    """A rectangle of 2 % to 33 % of the area, aspect 0.3 to 3.3, replaced by normal noise."""
    height, width = x.shape[2:]
    u = uniform(clock.seed, clock.epoch, index, _ERASE, 3 + 2 * _ATTEMPTS)
    area = (0.02 + (1 / 3 - 0.02) * u[:, 3 : 3 + _ATTEMPTS]) * height * width
    ratio = torch.exp(math.log(0.3) * (1 - 2 * u[:, 3 + _ATTEMPTS :]))
    h, w = (area * ratio).sqrt().round().long(), (area / ratio).sqrt().round().long()
    fits = (h < height) & (w < width)
    first = fits.int().argmax(1, keepdim=True)
    h, w = h.gather(1, first)[:, 0], w.gather(1, first)[:, 0]
    top, left = (u[:, 1] * (height - h + 1)).long(), (u[:, 2] * (width - w + 1)).long()
    rows = ((u[:, 0] < probability) & fits.any(1)).nonzero()[:, 0]
    if not len(rows):
        return x
    inside = rectangle(height, width, *(v[rows, None, None] for v in (top, top + h, left, left + w)))
    noise = normal(uniform(clock.seed, clock.epoch, index[rows], _NOISE, x[0].numel())).view(-1, *x.shape[1:])
    x = x.clone()
    x[rows] = torch.where(inside[:, None], noise.to(x.dtype), x[rows])
    return x


def rectangle(
    height: int, width: int, top: Tensor | int, bottom: Tensor | int, left: Tensor | int, right: Tensor | int
) -> Bool[Tensor, "..."]:
    """Marks the pixels of a rectangle, or of one for each entry."""
    device = top.device if isinstance(top, Tensor) else "cpu"
    row, column = torch.arange(height, device=device)[:, None], torch.arange(width, device=device)
    return (row >= top) & (row < bottom) & (column >= left) & (column < right)


@torch.no_grad()
def mix(
    what: Augmentation,
    x: Float[Tensor, "batch *shape"],
    label: Int[Tensor, "batch"],
    num_classes: int,
    clock: Clock,
) -> tuple[Float[Tensor, "batch *shape"], Float[Tensor, "batch classes"]]:
    """Mixed images, and their targets with label smoothing: one way and one ratio for the whole batch of a step.

    Raises:
        UserError: a process has an odd number of images, which do not form pairs.
    """
    target = F.one_hot(label, num_classes).float()
    target = target * (1 - what.label_smoothing) + what.label_smoothing / num_classes
    if not what.mixes:
        return x, target
    if len(x) % 2:
        raise UserError(f"Mixup, CutMix and ResizeMix need an even number of images in a process, not {len(x)}")
    how, ratio, v, h = uniform(clock.seed, 0, torch.tensor([clock.step]), _MIX, 4)[0].tolist()
    probabilities = what.mix_probabilities or tuple(float(a > 0) / sum(a > 0 for a in what.alphas) for a in what.alphas)
    bounds = torch.tensor(probabilities).cumsum(0).tolist()
    kind = next((i for i, bound in enumerate(bounds) if how < bound), None)
    if kind is None:
        return x, target
    from scipy.special import betaincinv  # of scikit-learn's dependencies

    lam = float(betaincinv(what.alphas[kind], what.alphas[kind], ratio))  # of Beta(alpha, alpha)
    other = torch.arange(len(x), device=x.device) ^ 1
    if kind == 0:
        x = lam * x + (1 - lam) * x[other]
    else:
        lam = 0.1 + 0.7 * lam if kind == 2 else lam  # ResizeMix keeps its factor between 0.1 and 0.8
        x, lam = _pasted(x, other, lam, v, h, whole=kind == 2)
    return x, lam * target + (1 - lam) * target[other]


def _pasted(x: Tensor, other: Tensor, lam: float, v: float, h: float, whole: bool) -> tuple[Tensor, float]:
    """A rectangle of 1 - lam of the area from another image, or all of that image resized; and what remains."""
    height, width = x.shape[2:]
    cut_h, cut_w = (int(side * math.sqrt(1 - lam)) for side in (height, width))
    y, z = int(v * height), int(h * width)  # the center, which may lie at the border
    top, bottom = max(0, y - cut_h // 2), min(height, y + (cut_h + 1) // 2)
    left, right = max(0, z - cut_w // 2), min(width, z + (cut_w + 1) // 2)
    if top >= bottom or left >= right:
        return x, 1.0
    x, source = x.clone(), x[other]
    if whole:
        x[:, :, top:bottom, left:right] = F.interpolate(source, (bottom - top, right - left), mode="bilinear")
    else:
        x[:, :, top:bottom, left:right] = source[:, :, top:bottom, left:right]
    return x, 1 - (bottom - top) * (right - left) / (height * width)
