"""A user's map-style dataset by its import path."""

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sslbook.data.datasets.base import DECODING_ERRORS, DatasetSource, Splits
from sslbook.data.datasets.folder import held_out
from sslbook.data.datasets.targets import encode
from sslbook.errors import UserError, explained, first_line, import_attribute, require_known

TRAIN_SPLITS = ("train", "trainval", "train-standard", "training")
TEST_SPLITS = ("test", "val", "valid", "validation", "testing")


def load_imported(
    name: str,
    root: str | Path,
    download: bool = False,
    arguments: Mapping[str, Any] = {},
    test_arguments: Mapping[str, Any] = {},
) -> Splits:
    """The splits of the dataset class `name`, such as `my.module.MyDataset` or `torchvision.datasets.Food101`.

    Of the arguments `root`, `download`, `train` and `split` it gets those that its signature names. With `train` or
    `split` it is constructed twice, for training and for testing; the names of the splits are the first that it accepts.
    Of a class without them a tenth of the labeled images is held out.

    Args:
        name: its import path.
        root: the folder that it reads.
        download: whether it may download what is not there.
        arguments: others of its constructor, which win; a mapping with a `class_path` becomes that object.
        test_arguments: those that differ for the images to evaluate on.

    Raises:
        UserError: it cannot be imported, needs other arguments, finds no data, is not map-style, or has unusable labels.
    """
    dataset_class = import_attribute(name, "data set")
    with explained(f"data set {name}: is no class", TypeError, ValueError, cure="give one"):
        parameters = inspect.signature(dataset_class).parameters
    given = {key: _object(value) for key, value in arguments.items()}
    given_test = {key: _object(value) for key, value in test_arguments.items()}
    takes_any = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
    for key in () if takes_any else (*given, *given_test):
        require_known(key, parameters, f"data set {name} takes no argument {key!r}")
    own = {"root": str(Path(root).expanduser()), "download": download}
    common = {key: value for key, value in own.items() if key in parameters} | given

    def make(options: dict[str, Any], names: Sequence[Any], labeled: bool) -> Any:
        """The dataset with the first of these names of its split that it knows; if it can be, a labeled one."""
        found, refusal = None, None
        for split in names:
            try:
                dataset = dataset_class(**{**options, "split": split})
            except UserError:
                raise
            except (
                ValueError,
                KeyError,
                RuntimeError,
                OSError,
            ) as error:  # an unknown name, or its files are not there
                refusal = refusal or error
                continue
            if not labeled or any(label is not None for label in _labels(dataset)):
                return dataset
            found = dataset if found is None else found  # Places365 gives no labels of its test images
        if found is None:
            raise _refused(name, refusal, "download" in parameters and not download, "; or set data.arguments.split")
        return found

    which = {key: None for key in ("train", "split") if key in parameters}
    with explained(f"data set {name}: its class cannot be called", TypeError, cure="give the rest by data.arguments"):
        inspect.signature(dataset_class).bind(**{**which, **common})
    try:
        if "train" in parameters:
            sets = [
                dataset_class(**{"train": True, **common}),
                dataset_class(**{**common, "train": False, **given_test}),
            ]
        elif "split" in parameters:
            first = make(common, [given["split"]] if "split" in given else TRAIN_SPLITS, labeled=False)
            used = given.get("split", getattr(first, "split", getattr(first, "_split", "train")))
            rest = [given_test["split"]] if "split" in given_test else [s for s in TEST_SPLITS if s != used]
            sets = [first, make({**common, **given_test}, rest, labeled=True)]
        else:
            sets = [dataset_class(**common)]
            if test_arguments:
                sets.append(dataset_class(**common, **given_test))
    except (RuntimeError, OSError) as error:
        raise _refused(name, error, "download" in parameters and not download) from error
    splits = splits_of(sets)
    return _held_out(splits) if len(sets) == 1 else splits


def _refused(name: str, error: BaseException | None, may_download: bool, other: str = "") -> UserError:
    cure = ", or set data.download true" if may_download else ""
    reason = first_line(error).rstrip(".") if error else "no data"
    return UserError(f"data set {name}: {reason}; set data.root to its folder{cure}{other}")


def _object(value: Any) -> Any:
    """A mapping with a `class_path` as the object that it names, such as a transform."""
    if not (isinstance(value, Mapping) and "class_path" in value):
        return value
    make = import_attribute(str(value["class_path"]), "argument of the data set")
    return make(**{key: _object(argument) for key, argument in (value.get("init_args") or {}).items()})


def _held_out(splits: Splits) -> Splits:
    """A tenth of each class for evaluation, where there are at least two."""
    source = splits.train
    if len(splits.class_names) < 2 and source.targets is None:
        return splits
    labels = source.labels if source.targets is None else torch.zeros_like(source.labels)
    held = held_out(np.array([str(i).encode() for i in range(len(source))]), labels)
    train = source.subset((~held).nonzero()[:, 0])
    return replace(splits, pretrain=train, train=train, test=source.subset(held.nonzero()[:, 0]))


def splits_of(datasets: list[Any]) -> Splits:
    """The splits of map-style datasets: the first to train on, the second, where there is one, to evaluate on.

    Raises:
        UserError: one is not map-style, or has unusable labels.
    """
    parts = [_labels(dataset) for dataset in datasets]
    for dataset, part in zip(datasets, parts):
        if len(part) != len(dataset):
            what = f"{len(part)} labels for {len(dataset)} images"
            raise UserError(f"{type(dataset).__name__} has {what}: give each image one number, name or None")
    if any(isinstance(part, Tensor) for part in parts):  # rows of zeros and ones, or of numbers
        return _with_rows(datasets, parts)
    name = type(datasets[0]).__name__
    together = [label for part in parts for label in part]
    named = any(isinstance(label, str) for label in together)
    cure = "give each image one number, name or None"
    with explained(f"{name} has labels that are no classes", TypeError, ValueError, RuntimeError, cure=cure):
        values = together if named else [None if label is None else _number(label) for label in together]
        targets = encode(values)
    if named or targets.values is not None:
        labels, names = targets.labels, targets.names
    else:  # numbers of classes, which a dataset may name and of which some may have no image
        labels = torch.tensor([-1 if value is None else int(value) for value in values], dtype=torch.int64)
        count = int(labels.max()) + 1
        classes = getattr(datasets[0], "classes", None)
        names = tuple(map(str, range(count) if classes is None or len(classes) < count or not count else classes))
    sources, start = [], 0
    for dataset in datasets:
        end = start + len(dataset)
        values_of = None if targets.values is None else targets.values[start:end]
        sources.append(DatasetSource(dataset, labels[start:end], torch.arange(len(dataset)), values_of))
        start = end
    return Splits(sources[0], sources[0], sources[1] if len(sources) > 1 else None, names)


def _number(label: Any) -> int | float | list[int]:
    if isinstance(label, list | tuple | set):
        return [int(one) for one in label]
    value = float(label)
    return int(value) if value.is_integer() else value


def _with_rows(datasets: list[Any], parts: list[Any]) -> Splits:
    """Datasets whose labels are the rows of a matrix: of zeros and ones, classes of which there may be several."""
    name = type(datasets[0]).__name__
    if not all(isinstance(part, Tensor) for part in parts) or len({part.shape[1] for part in parts}) > 1:
        raise UserError(
            f"{name}: the labels to train and to evaluate on are not of one form: give both as one matrix each"
        )
    hot = all(bool(((part == 0) | (part == 1)).all()) for part in parts)
    columns = parts[0].shape[1]
    classes = getattr(datasets[0], "classes", None)
    names = tuple(map(str, classes if classes is not None and len(classes) == columns else range(columns)))
    sources = [
        DatasetSource(
            dataset, torch.full((len(part),), -1), torch.arange(len(part)), part.bool() if hot else part.float()
        )
        for dataset, part in zip(datasets, parts)
    ]
    return Splits(sources[0], sources[0], sources[1] if len(sources) > 1 else None, names if hot else ())


def _labels(dataset: Any) -> Sequence[Any] | Tensor:
    """The dataset's `targets` or `labels`, or else those that its items hold; None for an unlabeled image.

    Raises:
        UserError: it is not map-style, or its items hold texts.
    """
    name = type(dataset).__name__
    if not (hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__") and len(dataset)):
        cure = "give a map-style dataset, as list(dataset) is one"
        raise UserError(f"{name} has no __len__ and __getitem__, or no images: {cure}")
    labels = getattr(dataset, "targets", getattr(dataset, "labels", None))
    hidden = getattr(dataset, "_labels", None)  # where torchvision keeps them, of Food101 and Flowers102 for example
    if labels is None and isinstance(hidden, list) and len(hidden) == len(dataset):
        labels = hidden
    if labels is not None:
        labels = torch.as_tensor(labels) if isinstance(labels, np.ndarray) and labels.dtype.kind in "biuf" else labels
        if isinstance(labels, Tensor) and labels.ndim == 2 and labels.shape[1] > 1:
            return labels
        return labels.flatten().tolist() if isinstance(labels, Tensor) else list(labels)
    found: list[Any] = []
    for i in range(len(dataset)):
        try:
            item = dataset[i]
        except DECODING_ERRORS:  # reported when the image is opened
            found.append(None)
            continue
        if not (isinstance(item, tuple | list) and len(item) > 1):  # no item has a label: the others stay undecoded
            return [None] * len(dataset)
        if isinstance(item[1], str):  # a class or a caption
            cure = "number the classes, list their names as `targets`, or yield the image alone"
            raise UserError(f"{name} yields the label {item[1]!r}: {cure}")
        found.append(item[1])
    rows = [
        label for label in found if isinstance(label, Tensor | np.ndarray) and np.ndim(label) == 1 and len(label) > 1
    ]
    if rows and len(rows) == len(found) and len({len(row) for row in rows}) == 1:
        return torch.stack([torch.as_tensor(row) for row in rows])
    return found
