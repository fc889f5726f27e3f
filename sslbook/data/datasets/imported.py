"""A user's map-style dataset by its import path."""

import inspect
from pathlib import Path
from typing import Any

import torch

from sslbook.data.datasets.base import DECODING_ERRORS, DatasetSource, Splits
from sslbook.errors import UserError, import_attribute


def load_imported(name: str, root: str | Path) -> Splits:
    """The splits of the dataset class `name`, such as `my.module.MyDataset`.

    Of the arguments `root`, `train` and `split` it gets those that its signature names. With `train` or `split` it is
    constructed twice, for training and for testing.

    Raises:
        UserError: it cannot be imported, needs other arguments, is not map-style, or has unusable labels.
    """
    dataset_class = import_attribute(name, "data set")
    try:
        signature = inspect.signature(dataset_class)
        options: dict[str, Any] = {"root": root} if "root" in signature.parameters else {}
        splits: list[dict[str, Any]] = [{}]
        if "train" in signature.parameters:
            splits = [{"train": True}, {"train": False}]
        elif "split" in signature.parameters:
            splits = [{"split": "train"}, {"split": "test"}]
        signature.bind(**options, **splits[0])
    except (TypeError, ValueError) as error:
        raise UserError(f"data set {name}: {error}; its class gets root, train and split only") from error
    return splits_of([dataset_class(**options, **split) for split in splits])


def splits_of(datasets: list[Any]) -> Splits:
    """The splits of map-style datasets: the first to train on, the second, where there is one, to evaluate on.

    Raises:
        UserError: one is not map-style, or has unusable labels.
    """
    labels = [_labels(dataset) for dataset in datasets]
    texts = sorted({label for part in labels for label in part if isinstance(label, str)})
    numbers = {text: i for i, text in enumerate(texts)}
    sources = [_source(dataset, part, numbers) for dataset, part in zip(datasets, labels)]
    classes = texts or getattr(datasets[0], "classes", None)
    count = int(max(source.labels.max() for source in sources)) + 1
    names = tuple(map(str, range(count) if classes is None or count == 0 else classes))
    return Splits(sources[0], sources[0], sources[1] if len(sources) > 1 else None, names)


def _labels(dataset: Any) -> list[Any]:
    """The dataset's `targets` or `labels`, or else those that its items hold; None for an unlabeled image.

    Raises:
        UserError: it is not map-style, or its items hold texts.
    """
    name = type(dataset).__name__
    if not (hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__") and len(dataset)):
        cure = "give a map-style dataset, as list(dataset) is one"
        raise UserError(f"{name} has no __len__ and __getitem__, or no images: {cure}")
    labels = getattr(dataset, "targets", getattr(dataset, "labels", None))
    if labels is not None:
        return labels.tolist() if hasattr(labels, "tolist") else list(labels)
    labels = []
    for i in range(len(dataset)):
        try:
            item = dataset[i]
        except DECODING_ERRORS:  # reported when the image is opened
            labels.append(None)
            continue
        if not (isinstance(item, tuple | list) and len(item) > 1):  # no item has a label: the others stay undecoded
            return [None] * len(dataset)
        if isinstance(item[1], str):  # a class or a caption
            cure = "number the classes, list their names as `targets`, or yield the image alone"
            raise UserError(f"{name} yields the label {item[1]!r}: {cure}")
        labels.append(item[1])
    return labels


def _source(dataset: Any, labels: list[Any], numbers: dict[str, int]) -> DatasetSource:
    """The dataset with its labels as numbers; `numbers` are those of its classes if the labels are names.

    Raises:
        UserError: there is not one label for each image, or they are no classes.
    """
    name = type(dataset).__name__
    try:
        pairs = zip(range(len(dataset)), labels, strict=True)
        values = [-1 if label is None else numbers[label] if numbers else int(label) for _, label in pairs]
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        what = f"{len(labels)} labels for {len(dataset)} images, or labels that are no classes"
        raise UserError(f"{name} has {what}: give each image one number, name or None") from error
    return DatasetSource(dataset, torch.tensor(values, dtype=torch.int64), torch.arange(len(dataset)))
