"""Features that are given, for tests of what is computed from them."""

import torch
from torch import Tensor, nn

from sslbook.data.loader import Data
from sslbook.data.views import View
from sslbook.evaluation.base import Representation
from sslbook.evaluation.features import Features


def given(train: tuple[Tensor, Tensor], test: tuple[Tensor, Tensor], names: str = "abcdefgh") -> Representation:
    """A representation with these features and labels; its images are single black pixels."""
    images = [torch.zeros(len(y), 3, 1, 1, dtype=torch.uint8) for _, y in (train, test)]
    classes = tuple(names[: int(max(y.max() for _, y in (train, test))) + 1])
    data = Data.from_images(images[0], train[1], images[1], test[1], class_names=classes)
    model = Representation(nn.Flatten(), data, View.center(1), progress=False)
    for split, (x, y) in (("train", train), ("test", test)):
        model._features[split] = Features(x, y, torch.arange(len(y)))
    return model


def clusters(
    n: int, seed: int, dim: int = 8, classes: int = 4, noise: float = 1.0, centers: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Features around fixed centers, and the number of the center."""
    middle = centers * torch.randn(classes, dim, generator=torch.Generator().manual_seed(0))
    g = torch.Generator().manual_seed(seed)
    y = torch.randint(classes, (n,), generator=g)
    return middle[y] + noise * torch.randn(n, dim, generator=g), y
