"""The Shapes data set: rendered images of ten shapes whose every factor is known.

An image shows one shape (a boat, a cat, a crown, ...). Which shape is the label. Everything else, such as its hue, its
position, the lighting or the background, is a nuisance factor whose range is an option from 0 (off) to 1 (full). Because
the factors are known, a probe per factor shows which of them a representation keeps and which it discards.

Nothing is read from disk: a shape is a short table of parts, a part is a signed distance (negative inside), and a
distance divided by the width of a pixel is an antialiased edge (Quilez, "2D distance functions"). What an image shows
is a pure function of `(seed, split, index)`, and each option changes its own factor alone. Per pixel there are only
sums, products, divisions and roots, which IEEE 754 rounds alike everywhere: the images are the same on every machine.

>>> images, factors = Shapes(num_train=8, size=32).render("train")
>>> images.shape, Shapes.class_names[factors["shape"][0]]
(torch.Size([8, 3, 32, 32]), 'house')
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple

import torch
from jaxtyping import Bool, Float, Int, UInt8
from torch import Tensor

from sslbook import rng
from sslbook.data.datasets.base import InMemory, Splits
from sslbook.errors import UserError
from sslbook.types import PositiveInt

NUISANCES = ("hue", "position", "scale", "orientation", "lighting", "background", "texture", "clutter", "noise")
SIZES = (16, 96)  # smaller is illegible, larger takes too long to render
_STREAM = {"train": 3000, "test": 3010}  # rows of random numbers that no view, method or order uses
_PIXELS = 1 << 18  # rendered at once: keeps every temporary tensor at 1 MB, in the cache, at any number of images
_NUM_DOTS = 6

HUES = {
    "red": (0.86, 0.20, 0.22),
    "orange": (0.95, 0.52, 0.13),
    "yellow": (0.97, 0.81, 0.20),
    "green": (0.30, 0.68, 0.28),
    "teal": (0.10, 0.65, 0.64),
    "blue": (0.16, 0.42, 0.82),
    "violet": (0.52, 0.30, 0.76),
    "pink": (0.94, 0.45, 0.68),
}
BACKGROUNDS = {
    "sky": (0.74, 0.87, 0.96),
    "sand": (0.95, 0.88, 0.72),
    "mint": (0.76, 0.92, 0.80),
    "rose": (0.97, 0.82, 0.83),
    "lilac": (0.84, 0.79, 0.94),
    "snow": (0.96, 0.96, 0.95),
    "night": (0.11, 0.14, 0.30),
    "forest": (0.09, 0.25, 0.20),
}

Point = tuple[float, float]
Plane = Float[Tensor, "batch size size"]


class Disc(NamedTuple):
    """A disc; `floor` cuts away what lies below that height."""

    center: Point
    radius: float
    tone: float = 0.0
    floor: float = -math.inf

    def distance(self, x: Plane, y: Plane) -> Plane:
        x, y = x - self.center[0], y - self.center[1]
        distance = (x * x + y * y).sqrt() - self.radius
        return distance if self.floor == -math.inf else distance.maximum(self.floor - self.center[1] - y)


class Polygon(NamedTuple):
    """Any simple polygon, its corners in order; `rounding` swells it by that much, which rounds the corners."""

    corners: Sequence[Point]
    tone: float = 0.0
    rounding: float = 0.0

    def distance(self, x: Plane, y: Plane) -> Plane:
        squared = torch.full_like(x, math.inf)
        inside: Bool[Tensor, "batch size size"] = torch.zeros_like(x, dtype=torch.bool)
        for (ax, ay), (bx, by) in zip(self.corners, [*self.corners[1:], self.corners[0]], strict=True):
            ex, ey = bx - ax, by - ay
            px, py = x - ax, y - ay
            along = ((px * ex + py * ey) / (ex * ex + ey * ey)).clamp(0, 1)
            dx, dy = px - along * ex, py - along * ey
            squared = squared.minimum(dx * dx + dy * dy)
            if ey != 0:  # a ray to the right crosses this edge: in and out take turns
                inside ^= ((y >= ay) != (y >= by)) & (px < py * (ex / ey))
        distance = squared.sqrt()
        return torch.where(inside, -distance, distance) - self.rounding


def _box(x: float, y: float, half_width: float, half_height: float, tone: float = 0.0) -> Polygon:
    """An upright rectangle around `(x, y)`."""
    left, right, low, high = x - half_width, x + half_width, y - half_height, y + half_height
    return Polygon([(left, low), (right, low), (right, high), (left, high)], tone)


def _star(points: int, outer: float, inner: float) -> list[Point]:
    """Corners of a star, the first one up."""
    angles = [math.pi * i / points for i in range(2 * points)]
    radii = [outer, inner] * points
    return [(r * math.sin(t), r * math.cos(t)) for r, t in zip(radii, angles, strict=True)]


# Parts are rendered in order, in a square from -1 to 1 with y upwards. Tone: 0 the hue itself, -1 black, 1 white.
# Every shape has an up and a down (so rotations can be classified), its parts have fixed positions (so can relative
# locations), and no shape is another's mirror image (a flip keeps the class).
SHAPES: dict[str, Sequence[Disc | Polygon]] = {
    "boat": (
        Polygon([(0.0, 0.98), (0.0, -0.22), (0.8, -0.22)], 0.55),
        Polygon([(-0.14, 0.7), (-0.14, -0.22), (-0.7, -0.22)], 0.8),
        Polygon([(-0.98, -0.38), (0.98, -0.38), (0.6, -0.9), (-0.6, -0.9)]),
    ),
    "cat": (
        Polygon([(-0.78, 0.95), (-0.8, 0.0), (-0.1, 0.45)]),
        Polygon([(0.78, 0.95), (0.8, 0.0), (0.1, 0.45)]),
        Disc((0.0, -0.1), 0.82),
        Disc((-0.34, 0.08), 0.15, -0.8),
        Disc((0.34, 0.08), 0.15, -0.8),
        Disc((0.0, -0.48), 0.3, 0.75),
        Polygon([(-0.12, -0.3), (0.12, -0.3), (0.0, -0.46)], -0.8),
    ),
    "crown": (
        Polygon(
            [(-0.85, -0.7), (0.85, -0.7), (0.95, 0.55), (0.45, -0.05), (0.0, 0.75), (-0.45, -0.05), (-0.95, 0.55)],
        ),
        _box(0.0, -0.68, 0.88, 0.16, -0.35),
        Disc((-0.93, 0.62), 0.15, 0.6),
        Disc((0.0, 0.8), 0.17, 0.6),
        Disc((0.93, 0.62), 0.15, 0.6),
    ),
    "flower": (
        _box(0.0, -0.55, 0.09, 0.45, -0.45),
        Polygon([(0.0, -0.95), (0.62, -0.6), (0.5, -0.35), (0.0, -0.7)], -0.45),
        Polygon([(0.0, -0.95), (-0.62, -0.6), (-0.5, -0.35), (0.0, -0.7)], -0.45),
        *(Disc((0.36 * math.sin(t), 0.38 + 0.36 * math.cos(t)), 0.29) for t in (0.0, 1.257, 2.513, 3.770, 5.027)),
        Disc((0.0, 0.38), 0.24, 0.8),
    ),
    "heart": (
        Disc((-0.43, 0.34), 0.5),
        Disc((0.43, 0.34), 0.5),
        Polygon([(-0.84, 0.06), (-0.43, 0.5), (0.0, 0.58), (0.43, 0.5), (0.84, 0.06), (0.0, -0.92)]),
        Disc((-0.45, 0.42), 0.17, 0.65),
    ),
    "house": (
        _box(0.55, 0.6, 0.13, 0.32, -0.35),
        _box(0.0, -0.4, 0.7, 0.5, 0.55),
        Polygon([(-0.95, 0.05), (0.95, 0.05), (0.0, 0.92)]),
        _box(0.22, -0.52, 0.2, 0.38, -0.45),
        _box(-0.34, -0.32, 0.17, 0.17, -0.2),
    ),
    "ice cream": (
        Polygon([(-0.55, 0.05), (0.55, 0.05), (0.0, -0.98)], 0.6),
        Disc((-0.32, 0.2), 0.36),
        Disc((0.32, 0.2), 0.36),
        Disc((0.0, 0.52), 0.4),
        Disc((0.0, 0.9), 0.12, -0.5),
    ),
    "mushroom": (
        Polygon([(-0.22, 0.05), (0.22, 0.05), (0.34, -0.9), (-0.34, -0.9)], 0.75),
        Disc((0.0, -0.05), 0.96, floor=-0.05),
        Disc((-0.42, 0.3), 0.17, 0.75),
        Disc((0.15, 0.58), 0.15, 0.75),
        Disc((0.5, 0.22), 0.14, 0.75),
    ),
    "star": (Polygon(_star(5, 0.95, 0.42), 0.0, 0.04),),
    "tree": (
        _box(0.0, -0.75, 0.15, 0.22, -0.55),
        Polygon([(-0.78, -0.58), (0.78, -0.58), (0.0, 0.35)], -0.15),
        Polygon([(-0.62, -0.1), (0.62, -0.1), (0.0, 0.65)]),
        Polygon([(-0.44, 0.35), (0.44, 0.35), (0.0, 0.95)], 0.2),
    ),
}


@dataclass(frozen=True)
class Shapes:
    """The Shapes data set: ten shapes rendered from known factors; every nuisance ranges from 0 (off) to 1 (full).

    Args:
        num_train: number of training images
        num_test: number of test images, from another row of random numbers
        size: height and width in pixels, 16 to 96; the same images at every size
        seed: of all factors; another seed gives other images
        hue: colors of the shape; 0 all red, 1 eight colors
        position: where the shape is; 0 the center, 1 up to half of the half image away on each axis
        scale: how large it is; 0 always 0.55 of the half image, 1 from 0.35 to 0.75
        orientation: how it is rotated; 0 upright, 1 by any angle, in between a fraction of that: 1/6 is up to 30 degrees
        lighting: the light's color and strength; 0 white, 1 red, green and blue each between 0.45 and 1
        background: colors behind the shape; 0 all sky, 1 eight colors, two of them dark
        texture: contrast of a wave pattern behind the shape, different in every image (a shortcut for methods that
            tell images apart)
        clutter: small dots of any color behind the shape; 1 six of them
        noise: independent noise on every pixel; 1 up to 0.2 of the range
    """

    num_train: PositiveInt = 3000
    num_test: PositiveInt = 1000
    size: int = 16
    seed: int = 0
    hue: float = 1.0
    position: float = 0.8
    scale: float = 0.5
    orientation: float = 1 / 6
    lighting: float = 1.0
    background: float = 1.0
    texture: float = 0.0
    clutter: float = 0.0
    noise: float = 0.1

    class_names: ClassVar[tuple[str, ...]] = tuple(SHAPES)
    categories: ClassVar[dict[str, tuple[str, ...]]] = {
        "shape": tuple(SHAPES),
        "hue": tuple(HUES),
        "background": tuple(BACKGROUNDS),
    }  # the categorical factors and the names of their values
    factor_names: ClassVar[tuple[str, ...]] = (
        *("shape", "hue", "x", "y", "scale", "orientation"),
        *("light_red", "light_green", "light_blue", "background", "wave_x", "wave_y"),
    )

    def __post_init__(self) -> None:
        for name, (low, high) in {"size": SIZES, **dict.fromkeys(NUISANCES, (0, 1))}.items():
            if not low <= getattr(self, name) <= high:
                raise UserError(f"shapes.{name} is {getattr(self, name)}: give a number from {low} to {high}")

    def render(self, split: Literal["train", "test"]) -> tuple[UInt8[Tensor, "images 3 size size"], dict[str, Tensor]]:
        """Every image of `split`, and its factors: int64 where categorical, float32 where continuous.

        `factors["shape"]` is the label. `x`, `y` and `scale` are in half images (x to the right, y upwards),
        `orientation` in degrees counter-clockwise; `light_red`, `light_green` and `light_blue` multiply the channels;
        `(wave_x, wave_y)` counts the coarser wave of the texture, in cycles per half image.
        """
        index = torch.arange(self.num_train if split == "train" else self.num_test)
        factors = self._factors(split, index)
        images = torch.empty(len(index), 3, self.size, self.size, dtype=torch.uint8)
        chunk = max(1, _PIXELS // self.size**2)
        for label, name in enumerate(self.class_names):
            for part in (factors["shape"] == label).nonzero()[:, 0].split(chunk):
                images[part] = self._render(split, part, SHAPES[name], {k: v[part] for k, v in factors.items()})
        return images, factors

    def _factors(self, split: str, index: Int[Tensor, "batch"]) -> dict[str, Tensor]:
        """The factors of the images. Each has its own column of random numbers, so no option changes another factor."""
        u = rng.uniform(self.seed, 0, index, _STREAM[split], count=12).double()  # float64: the same sin everywhere
        symmetric = 2 * u - 1
        # the texture: 0.8 to 2 cycles per half image, in any direction of a half circle
        wave, wave_to = (self.texture > 0) * (0.8 + 1.2 * u[:, 10]), math.pi * u[:, 11]
        factors = {
            "shape": (len(SHAPES) * u[:, 0]).long(),
            "hue": (len(HUES) * self.hue * u[:, 1]).long(),
            "x": self.position * 0.5 * symmetric[:, 2],
            "y": self.position * 0.5 * symmetric[:, 3],
            "scale": 0.55 + self.scale * 0.2 * symmetric[:, 4],
            "orientation": self.orientation * 180 * symmetric[:, 5],
            "light_red": 1 - self.lighting * 0.55 * u[:, 6],
            "light_green": 1 - self.lighting * 0.55 * u[:, 7],
            "light_blue": 1 - self.lighting * 0.55 * u[:, 8],
            "background": (len(BACKGROUNDS) * self.background * u[:, 9]).long(),
            "wave_x": wave * wave_to.cos(),
            "wave_y": wave * wave_to.sin(),
        }
        return {name: value.float() if value.is_floating_point() else value for name, value in factors.items()}

    def _render(
        self, split: str, index: Int[Tensor, "batch"], shape: Sequence[Disc | Polygon], factors: dict[str, Tensor]
    ) -> UInt8[Tensor, "batch 3 size size"]:
        """Images of one shape: background, texture, clutter, the shape itself, lighting, noise."""
        size = self.size
        pixel = 2 / size
        column = (torch.arange(size) + 0.5) * pixel - 1
        x, y = column[None, None, :], -column[None, :, None]
        hues, backgrounds = torch.tensor(list(HUES.values())), torch.tensor(list(BACKGROUNDS.values()))
        f = {name: value[:, None, None] for name, value in factors.items()}
        image = backgrounds[factors["background"]][:, :, None, None].expand(-1, -1, size, size).clone()

        if self.texture > 0:
            phase = rng.uniform(self.seed, 0, index, _STREAM[split] + 1, count=2)[:, :, None, None]
            coarse = _wave(x * f["wave_x"] + y * f["wave_y"] + phase[:, 0])
            fine = _wave((x * f["wave_y"] - y * f["wave_x"]) * 1.7 + phase[:, 1])
            image *= 1 + self.texture * (0.4 * coarse + 0.2 * fine)[:, None]
            image += self.texture * 0.2 * (coarse + fine)[:, None].clamp(min=0)  # visible on a dark background too

        dots = rng.uniform(self.seed, 0, index, _STREAM[split] + 2, count=4 * _NUM_DOTS)
        for dot in dots.reshape(-1, _NUM_DOTS, 4, 1, 1).unbind(1)[: round(_NUM_DOTS * self.clutter)]:
            dx, dy = x - (2 * dot[:, 0] - 1), y - (2 * dot[:, 1] - 1)
            distance = (dx * dx + dy * dy).sqrt() - (0.08 + 0.08 * dot[:, 2])
            _blend(image, hues[(len(HUES) * dot[:, 3, 0, 0]).long()], 0.5 - distance / pixel)

        angle = factors["orientation"].double().deg2rad()[:, None, None]
        cos, sin = angle.cos().float(), angle.sin().float()
        px, py = (x - f["x"]) / f["scale"], (y - f["y"]) / f["scale"]
        px, py = px * cos + py * sin, py * cos - px * sin
        edge = f["scale"] / pixel  # pixels per unit of the shape's own square
        color = hues[factors["hue"]]
        distances = [part.distance(px, py) for part in shape]
        outline = torch.stack(distances).amin(0) - 0.07
        bright = (backgrounds[factors["background"]].mean(1) > 0.5).float()[:, None]  # dark on bright, bright on dark
        _blend(image, color * 0.25 + 0.75 * (1 - bright), 0.5 - outline * edge)
        for part, distance in zip(shape, distances, strict=True):
            toned = color * (1 + min(part.tone, 0.0)) + (1 - color) * max(part.tone, 0.0)
            _blend(image, toned, 0.5 - distance * edge)

        image *= torch.stack([f["light_red"], f["light_green"], f["light_blue"]], 1)
        if self.noise > 0:
            noise = rng.uniform(self.seed, 0, index, _STREAM[split] + 3, count=3 * size * size)
            image += self.noise * 0.4 * (noise.reshape(image.shape) - 0.5)
        return (image.clamp(0, 1) * 255 + 0.5).to(torch.uint8)


def _blend(image: Float[Tensor, "batch 3 size size"], color: Float[Tensor, "batch 3"], cover: Plane) -> None:
    """Blend `color` into `image` in place, with opacity `cover` clamped to 0..1."""
    image += (color[:, :, None, None] - image) * cover.clamp(0, 1)[:, None]


def _wave(cycles: Plane) -> Plane:
    """Nearly a sine, of period 1, from sums and products alone."""
    triangle = ((cycles - cycles.floor()) - 0.5).abs() * 4 - 1
    return triangle * (1.5 - 0.5 * triangle * triangle)


def load_shapes(shapes: Shapes) -> Splits:
    """The Shapes data set, rendered."""
    sources, factors = {}, {}
    for split in ("train", "test"):
        images, factors[split] = shapes.render(split)
        sources[split] = InMemory(images, factors[split]["shape"])
    return Splits(sources["train"], sources["train"], sources["test"], shapes.class_names, factors)
