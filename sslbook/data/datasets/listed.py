"""Lists of image files with labels: plain text as the lists of ImageNet, CSV, JSON or JSON lines.

    photos/001.jpg cat                    text: a path, then its class; several classes are separated by commas
    image,label,split                     CSV: the first line names the columns
    {"image": "001.jpg", "labels": ["cat", "sofa"]}      JSON lines, or a JSON list of such objects

Columns and keys: `image` (or path, file, filename), and of these what there is: `label` (a class), `labels` (several,
in CSV separated by commas or semicolons), `target` (a number to regress), `split` (train or test).
"""

import csv
import json
import os
import re
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from sslbook.data.datasets.base import FileList, Splits
from sslbook.data.datasets.folder import held_out_split
from sslbook.data.datasets.targets import encode
from sslbook.data.images import EXTENSIONS
from sslbook.errors import UserError, explained
from sslbook.files import read_text

IMAGE, CLASS, CLASSES = ("image", "path", "file", "filename"), ("label", "class"), ("labels", "classes")
TEST_NAMES = ("test", "val", "valid", "validation")
_PATH = re.compile(rf"(.+?(?:{'|'.join(map(re.escape, (*EXTENSIONS, '.npy')))}))(?:[\s,]+(.*))?", re.IGNORECASE)


class Row(NamedTuple):
    """One image of a list."""

    line: int
    path: str
    label: Any = None
    """a class, a list of classes, or a number to regress; None or an empty text if unlabeled"""
    regression: bool = False
    test: bool | None = None
    """whether it is for evaluation; None if the list does not say"""


def load_list(file: str | Path, root: str | Path, test_file: str | Path | None = None) -> Splits:
    """The splits of the listed images.

    Without a second list and a column `split`, all are for training or, if they are labeled, a tenth is held out.

    Args:
        file: the list; `.csv`, `.tsv`, `.json` and `.jsonl` are read as such, everything else as plain text.
        root: the folder that the paths are relative to, unless they are relative to the list itself.
        test_file: the list of the images to evaluate on.

    Raises:
        UserError: a list cannot be read, names images that are not there, or contradicts itself.
    """
    rows, folder = _read(Path(file).expanduser(), Path(root).expanduser())
    num_test_rows = 0
    if test_file is not None:
        if any(row.test is not None for row in rows):
            raise UserError(f"the list {file} has a column split: leave out the list {test_file}, or that column")
        test_rows, test_folder = _read(Path(test_file).expanduser(), Path(root).expanduser())
        num_test_rows = len(test_rows)
        rows = [row._replace(test=False) for row in rows]
        rows += [row._replace(path=os.path.relpath(test_folder / row.path, folder), test=True) for row in test_rows]
        _tell_shared(rows, file)
    try:
        targets = encode([row.label for row in rows], any(row.regression for row in rows))
    except UserError as error:
        raise UserError(f"{file}: {error}") from None
    paths = np.array([os.fsencode(row.path) for row in rows])
    images = FileList(folder, paths, targets.labels, targets.values)
    if rows[0].test is None:
        return held_out_split(images, targets.names)
    is_test = torch.tensor([bool(row.test) for row in rows])
    if is_test.all():
        raise UserError(f"the list {file} has no image to train on: its column split says test everywhere")
    train, test = (images.subset(part.nonzero()[:, 0]) for part in (~is_test, is_test))
    splits = Splits(train, train, test if len(test) else None, targets.names)
    _tell_other_classes(splits, f"{test_file if num_test_rows else file}")
    return splits


def _read(file: Path, root: Path) -> tuple[list[Row], Path]:
    """The images of one list, each once, and the folder of their paths."""
    with explained(f"cannot read the list {file}", OSError, UnicodeDecodeError, cure="give a text file of image paths"):
        text = read_text(file)
    read = {".csv": _csv, ".tsv": _csv, ".json": _json, ".jsonl": _json_lines}.get(file.suffix.lower(), _text)
    rows = _once(list(read(file, text)), file)
    if not rows:
        raise UserError(f"no images by the list {file} (it is empty): write a path on each line")
    missing = {folder: _missing(folder, rows) for folder in (file.parent, root)}
    folder = min(missing, key=lambda folder: len(missing[folder]))
    if not (lost := missing[folder]):
        return rows, folder
    if len(lost) == len(rows):
        what = f"{lost[0]} is neither beside it nor in {root}"
        raise UserError(f"no images by the list {file} ({what}): set data.root to the folder of its paths")
    shown = ", ".join(lost[:3]) + (", ..." if len(lost) > 3 else "")
    raise UserError(f"the list {file} names {len(lost):,} of {len(rows):,} images that are not in {folder}: {shown}")


def _text(file: Path, text: str) -> Iterator[Row]:
    for number, line in enumerate(text.splitlines(), start=1):
        if not (line := line.strip()):
            continue
        found = _PATH.fullmatch(line)
        path, label = found.groups() if found else (line.rpartition(" ")[0] or line, line.rpartition(" ")[2])
        several = bool(label) and "," in label
        yield Row(number, path.strip(), _several(label) if several else label)


def _csv(file: Path, text: str) -> Iterator[Row]:
    lines = text.splitlines()
    first = next((line for line in lines if line.strip()), "")
    delimiter = max(",;\t", key=first.count)
    reader = csv.reader(lines, delimiter=delimiter, strict=True)
    names: list[str] = []
    try:
        for cells in reader:
            if not any(cell.strip() for cell in cells):
                continue
            if not names:
                names = [cell.strip().lower() for cell in cells]
                _require_columns(file, names)
            elif len(cells) != len(names):
                raise UserError(f"{file}: line {reader.line_num} has {len(cells)} cells for {len(names)} columns")
            else:
                yield _row(file, reader.line_num, dict(zip(names, (cell.strip() for cell in cells))))
    except csv.Error as error:
        raise UserError(f"{file}: line {reader.line_num}: {error}") from None


def _json(file: Path, text: str) -> Iterator[Row]:
    entries = _parsed(file, text, "")
    if not isinstance(entries, list):
        raise UserError(f'{file}: holds no list: write [{{"image": "a.jpg", "label": "cat"}}, ...]')
    for number, entry in enumerate(entries, start=1):
        yield _object(file, number, entry)


def _json_lines(file: Path, text: str) -> Iterator[Row]:
    for number, line in enumerate(text.splitlines(), start=1):
        if line.strip():
            yield _object(file, number, _parsed(file, line, f"line {number}: "))


def _parsed(file: Path, text: str, where: str) -> Any:
    with explained(f"{file}: {where}not valid JSON", ValueError, RecursionError):
        return json.loads(text)


def _object(file: Path, number: int, entry: Any) -> Row:
    if not isinstance(entry, dict):
        raise UserError(f'{file}: entry {number} is no object: write {{"image": "a.jpg", "label": "cat"}}')
    names = [str(name).lower() for name in entry]
    _require_columns(file, names, f"entry {number}")
    return _row(file, number, dict(zip(names, entry.values())))


def _require_columns(file: Path, names: list[str], where: str = "the first line") -> None:
    if not any(name in names for name in IMAGE):
        raise UserError(
            f"{file}: {where} names no column image (or {', '.join(IMAGE[1:])}), but {', '.join(names)[:80]}; "
            "the columns label, labels, target and split are read besides"
        )


def _row(file: Path, number: int, cells: dict[str, Any]) -> Row:
    """A row from its columns or keys, whose names are in lower case."""

    def cell(*names: str) -> Any:
        return next((cells[name] for name in names if name in cells), None)

    path, split, target = cell(*IMAGE), cell("split"), cell("target")
    if not isinstance(path, str) or not path:
        raise UserError(f"{file}: line or entry {number} names no image")
    test = None
    if split is not None:
        if (name := str(split).lower()) not in ("train", *TEST_NAMES):
            raise UserError(f"{file}: line or entry {number}: the split {split!r} is neither train nor {TEST_NAMES[0]}")
        test = name != "train"
    label = cell(*CLASS) if target is None else target
    if label is None and (label := cell(*CLASSES)) is not None:
        label = _several(label) if isinstance(label, str) else label
        if not isinstance(label, list):
            raise UserError(f"{file}: line or entry {number}: labels are {label!r}: give a list of classes")
    if isinstance(label, dict) or (isinstance(label, list) and any(isinstance(one, list | dict) for one in label)):
        raise UserError(
            f"{file}: line or entry {number}: the label {str(label)[:40]} is no class, list of classes or number"
        )
    return Row(number, path, label, target is not None, test)


def _several(label: str) -> list[str]:
    return [name.strip() for name in re.split("[,;]", label) if name.strip()]


def _once(rows: list[Row], file: Path) -> list[Row]:
    """Every image once; one that is listed again with another label is refused, others are warned of."""
    first: dict[str, Row] = {}
    for row in rows:
        before = first.setdefault(row.path, row)
        if (before.label, before.test) != (row.label, row.test):
            lines = f"(lines {before.line} and {row.line})"
            cure = "for several classes of an image write them in one line, with commas between"
            raise UserError(f"the list {file} has {row.path} twice, and differently {lines}: {cure}")
    if len(first) < len(rows):
        again = next(row for row in rows if first[row.path] is not row).path
        warnings.warn(f"{file} lists {len(rows) - len(first):,} images twice, such as {again}: used once", stacklevel=2)
    return list(first.values())


def _missing(folder: Path, rows: list[Row]) -> list[str]:
    """The paths that are no files below a folder; every folder is read once, for lists of a million files."""
    there: dict[str, set[str]] = {}
    lost = []
    for row in rows:
        above, _, name = row.path.rpartition("/")
        if above not in there:
            try:
                there[above] = set(os.listdir(folder / (above or ("/" if row.path.startswith("/") else "."))))
            except OSError:
                there[above] = set()
        if name not in there[above] and not (folder / row.path).is_file():  # some file systems ignore case
            lost.append(row.path)
    return lost


def _tell_shared(rows: list[Row], file: str | Path) -> None:
    train = {os.path.normpath(row.path) for row in rows if not row.test}
    shared = [row.path for row in rows if row.test and os.path.normpath(row.path) in train]
    if shared:
        what = f"{len(shared):,} images are both in {file} and in the test list, such as {shared[0]}"
        warnings.warn(f"{what}: what is measured on them is no test", stacklevel=2)


def _tell_other_classes(splits: Splits, file: str) -> None:
    if splits.test is None or not splits.class_names:
        return
    of_train, of_test = (_present(source) for source in (splits.train, splits.test))
    if others := sorted(of_test - of_train):
        shown = ", ".join(splits.class_names[i] for i in others[:3]) + (
            f", ... ({len(others)})" if len(others) > 3 else ""
        )
        warnings.warn(f"{file}: classes of test images without a training image: {shown}", stacklevel=2)


def _present(source: Any) -> set[int]:
    """The classes that a source has images of."""
    if source.targets is not None:
        return set(source.targets.any(0).nonzero()[:, 0].tolist())
    return set(source.labels.unique().tolist()) - {-1}
