"""Data sets: one file each, and one line in `NAMED` for those that `--data.name` knows."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from sslbook.data.datasets.base import Splits
from sslbook.data.datasets.imported import load_imported
from sslbook.data.datasets.torchvision import ARRAYS, FOLDERS, load_torchvision
from sslbook.errors import require_known

NAMED: dict[str, Callable[[str, str | Path, bool], Splits]] = dict.fromkeys([*ARRAYS, *FOLDERS], load_torchvision)


def load_named(
    name: str,
    root: str | Path,
    download: bool,
    arguments: Mapping[str, Any] = {},
    test_arguments: Mapping[str, Any] = {},
) -> Splits:
    """The splits of a data set by its name in `NAMED`, or by the import path of a map-style dataset class.

    Raises:
        UserError: no data set has this name, or it cannot be loaded.
    """
    if "." in name:
        return load_imported(name, root, download, arguments, test_arguments)
    what = f"unknown data set {name!r}: give a name, the import path of a class, or set data.folder"
    require_known(name, ["shapes", *NAMED], what)
    return NAMED[name](name, root, download)
