"""Render images with exact depth: spheres above a tilted plane, lit from one side.

    python data_scripts/synthetic_depth.py --out data/synthetic-depth

Result: {train,test}/images/NUMBER.png and {train,test}/depths/NUMBER.png, depth in millimeters (16 bits). Depth data
sets ask for a registration or a large download; these pairs show that a protocol works, and are no benchmark.
"""

import argparse
from pathlib import Path

import numpy as np
from PIL import Image


def render(random: np.random.Generator, side: int) -> tuple[np.ndarray, np.ndarray]:
    """An image, uint8 `(side, side, 3)`, and its depth in meters `(side, side)`; the camera looks along z."""
    v, u = np.mgrid[-1 : 1 : side * 1j, -1 : 1 : side * 1j]
    direction = np.stack([0.7 * u, 0.7 * v, np.ones_like(u)], axis=-1)
    depth = np.minimum(1.2 / np.maximum(0.25 * v + 0.3, 1e-3), 9.0)  # the plane, and a wall behind it
    normal = np.where(depth[..., None] < 9, [0.0, -1.0, 0.0], [0.0, 0.0, -1.0])
    color = np.where(depth[..., None] < 9, random.uniform(0.3, 0.9, 3), random.uniform(0.3, 0.9, 3))
    for _ in range(random.integers(2, 6)):
        center = np.array([*random.uniform(-1.2, 1.2, 2), random.uniform(1.5, 6.0)])
        radius = random.uniform(0.2, 0.7)
        a, b = (direction**2).sum(-1), direction @ center
        root = b**2 - a * (center @ center - radius**2)
        z = (b - np.sqrt(np.maximum(root, 0))) / a
        nearer = (root > 0) & (z > 0.3) & (z < depth)
        depth = np.where(nearer, z, depth)
        surface = (direction * z[..., None] - center) / radius
        normal = np.where(nearer[..., None], surface, normal)
        color = np.where(nearer[..., None], random.uniform(0.2, 1.0, 3), color)
    light = np.array([-0.5, -0.7, -0.5])
    shade = 0.35 + 0.65 * np.maximum(normal @ light, 0)
    image = 255 * color * shade[..., None] + random.normal(0, 4, (side, side, 3))
    return image.clip(0, 255).astype(np.uint8), depth


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--train", type=int, default=200)
    parser.add_argument("--test", type=int, default=50)
    parser.add_argument("--side", type=int, default=64)
    options = parser.parse_args()
    random = np.random.default_rng(0)
    for split, count in (("train", options.train), ("test", options.test)):
        for what in ("images", "depths"):
            (options.out / split / what).mkdir(parents=True, exist_ok=True)
        for i in range(count):
            image, depth = render(random, options.side)
            Image.fromarray(image).save(options.out / split / "images" / f"{i:04}.png")
            Image.fromarray((1000 * depth).round().astype(np.uint16)).save(
                options.out / split / "depths" / f"{i:04}.png"
            )


if __name__ == "__main__":
    main()
