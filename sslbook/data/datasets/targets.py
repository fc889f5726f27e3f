"""What an image is labeled with, of any kind, as tensors: one class, several classes, or numbers to regress."""

from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from jaxtyping import Int
from torch import Tensor

from sslbook.errors import UserError


class Targets(NamedTuple):
    """The labels of all images of a data set."""

    labels: Int[Tensor, "images"]
    """class of each image; -1 if unlabeled, and everywhere if `values` hold the labels"""
    values: Tensor | None = None
    """several classes: bool (images, classes); regression: float32 (images,) or (images, numbers); else None"""
    names: tuple[str, ...] = ()
    """of the classes"""


def encode(labels: Sequence[Any], regression: bool = False) -> Targets:
    """The labels of a list of images as tensors.

    Args:
        labels: of each image a class (a name or a number), None or an empty text if unlabeled, a list of classes if an
            image may have several, or a number to regress.
        regression: whether the labels are numbers to regress. They are, too, if all are numbers and some are no integers.

    Raises:
        UserError: the labels do not fit together.
    """
    given = [label for label in labels if label is not None and label != ""]
    if not given:
        return Targets(torch.full((len(labels),), -1))
    if not regression and any(isinstance(label, list | tuple | set) for label in given):
        rows = [
            [] if label in (None, "") else label if isinstance(label, list | tuple | set) else [label]
            for label in labels
        ]
        names = class_names(str(name) for row in rows for name in row)
        numbers = {name: number for number, name in enumerate(names)}
        values = torch.zeros(len(rows), len(names), dtype=torch.bool)
        for hot, row in zip(values, rows):
            hot[[numbers[str(name)] for name in row]] = True
        return Targets(torch.full((len(labels),), -1), values, names)
    floats = _floats(given)
    if regression or (floats is not None and any(not value.is_integer() for value in floats)):
        return Targets(torch.full((len(labels),), -1), _regression(labels))
    # pandas writes integers of which some are missing as 3.0.
    texts = [str(label) if label is not None else "" for label in labels]
    if floats is not None and not all(isinstance(label, int) for label in given):
        texts = [str(int(float(text))) if "." in text or "e" in text.lower() else text for text in texts]
    names = class_names(texts)
    numbers = {name: number for number, name in enumerate(names)}
    return Targets(torch.tensor([numbers.get(text, -1) for text in texts]), None, names)


def class_names(texts: Iterable[str]) -> tuple[str, ...]:
    """The different classes, numbers before names and by their size.

    Raises:
        UserError: one number is written in two ways, as `01` and `1`.
    """
    names = sorted(set(texts) - {""}, key=lambda name: (int(name), "") if name.isdecimal() else (1 << 62, name))
    for one, other in pairwise(names):
        if one.isdecimal() and other.isdecimal() and int(one) == int(other):
            raise UserError(f"the classes {one} and {other} are one number in two spellings: write it in one way")
    return tuple(names)


def _floats(labels: Sequence[Any]) -> list[float] | None:
    """The labels as numbers, if every one is a finite number."""
    try:
        floats = [float(label) for label in labels]
    except (TypeError, ValueError):
        return None
    return floats if all(abs(value) < float("inf") for value in floats) else None


def _regression(labels: Sequence[Any]) -> Tensor:
    try:
        values = torch.tensor([_floats(label) if isinstance(label, list | tuple) else float(label) for label in labels])
    except (TypeError, ValueError):
        values = torch.tensor(float("nan"))
    if not torch.isfinite(values).all():
        wrong = next((i for i, label in enumerate(labels) if _floats([label]) is None), 0)
        raise UserError(
            f"the target {labels[wrong]!r} of image number {wrong} is no number: give every image a finite one"
        )
    return values.float()
