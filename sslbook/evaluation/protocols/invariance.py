"""Invariance: how much the features of an image change when it is augmented by one operation alone.

For every operation of a view (crop, flip, brightness, ..., solarize), at the strength of SimCLR's augmentation but
always applied, the mean cosine similarity between the features of the image and of its augmented copy. The mean feature
is subtracted first, so that 0 is the similarity of two different images and 100 means that nothing changed. (Without it
features behind a ReLU, which are all positive, look alike whatever is done.) High is not better: methods become
invariant to the augmentations they were trained with (Ericsson et al., 2022, "Why do self-supervised models transfer?
On the impact of invariance on downstream tasks"), and lose what a task may need.
"""

from dataclasses import replace
from typing import TYPE_CHECKING

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from sslbook.data.loader import Data
from sslbook.data.views import SIMCLR, View
from sslbook.errors import at_least_one
from sslbook.evaluation.base import Metrics, Protocol, Representation
from sslbook.evaluation.features import extract_views

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class Invariance(Protocol):
    """Similarity of features before and after each operation of an augmentation.

    Args:
        images: training images at most, chosen at random.
    """

    labels = False
    title = "Invariance: 100 if an operation leaves the features as they were, 0 if they are as another image's"
    cost = "ten passes over IMAGES"

    def __init__(self, images: int = 2000) -> None:
        at_least_one(images=images)
        self.images = images
        self._found: Metrics = {}

    def run(self, model: Representation, data: Data) -> Metrics:
        center = data.adapted(model.view)
        views = {name: data.adapted(view) for name, view in operations(center).items()}
        # Of bands that are no colors some operations are left out: their view is the center itself.
        views = {
            name: view for name, view in views.items() if replace(view, color_jitter_p=center.color_jitter_p) != center
        }
        z = extract_views(
            model.backbone,
            data,
            (center, *views.values()),
            self.images,
            seed=model.seed,
            device=model.device,
            batch_size=model.batch_size,
        )
        self._found = dict(zip(views, similarities(z)))
        return self._found

    def figures(self) -> dict[str, "Figure"]:
        from sslbook.notebook import style

        order = sorted(self._found, key=lambda name: self._found[name])
        alt = f"Features change most by {order[0]} ({self._found[order[0]]:.0f}), least by {order[-1]}."
        figure, ax = style.figure(alt=alt, caption=None, height=0.9 + 0.3 * len(order))
        ax.barh(order, [self._found[name] for name in order])
        ax.set_xlabel("similarity of the features, 100 = unchanged")
        return {"operations": figure}


def operations(center: View) -> dict[str, View]:
    """One view for each operation of SimCLR's augmentation, always applied; last all of them as SimCLR samples them."""
    brightness, contrast, saturation, hue = SIMCLR.color_jitter
    own = {"size": center.size, "mean": center.mean, "std": center.std}
    changes = {
        "crop": {"crop": SIMCLR.crop, "resize": None, "interpolation": SIMCLR.interpolation},
        "flip": {"flip": 1.0},
        "brightness": {"color_jitter": (brightness, 0.0, 0.0, 0.0)},
        "contrast": {"color_jitter": (0.0, contrast, 0.0, 0.0)},
        "saturation": {"color_jitter": (0.0, 0.0, saturation, 0.0)},
        "hue": {"color_jitter": (0.0, 0.0, 0.0, hue)},
        "grayscale": {"grayscale": 1.0},
        "blur": {"blur": 1.0},
        "solarize": {"solarize": 1.0},
    }
    views = {name: replace(center, color_jitter_p=1.0, **change) for name, change in changes.items()}
    return {**views, "all of SimCLR's": replace(SIMCLR, **own)}


def similarities(z: Float[Tensor, "images views dim"]) -> list[float]:
    """100 times the mean cosine similarity between the first view's features and those of each other view.

    All are relative to the first view's mean; an image whose features equal it has no direction and counts as 0.
    """
    centered = F.normalize(z.double() - z[:, 0].double().mean(dim=0), dim=2)
    return (100 * (centered[:, :1] * centered[:, 1:]).sum(dim=2).mean(dim=0)).tolist()
