"""A list of image files: one `path label` a line, as in the lists of ImageNet's training images."""

from pathlib import Path

from sslbook.data.datasets.base import Splits
from sslbook.data.datasets.folder import file_list, held_out_split
from sslbook.data.images import EXTENSIONS
from sslbook.errors import UserError


def load_list(file: str | Path, root: str | Path) -> Splits:
    """The splits of the listed images: all for training or, if they are labeled, a tenth of each class held out.

    Args:
        file: a text file. A line is a path, or a path and the name or number of its class; paths may hold blanks.
        root: the folder that the paths are relative to, unless they are relative to the list itself.

    Raises:
        UserError: the list cannot be read, is empty, or its first image is not there.
    """
    file = Path(file).expanduser()
    try:
        lines = [line.strip() for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read the list {file} ({error}): give a text file of image paths") from error
    entries = [_entry(line) for line in lines]
    folders = [file.parent, Path(root).expanduser()]
    found = next((folder for folder in folders if entries and (folder / entries[0][0]).is_file()), None)
    if found is None:
        what = f"{entries[0][0]} is neither beside it nor in {root}" if entries else "it is empty"
        raise UserError(f"no images by the list {file} ({what}): set data.root to the folder of its paths")
    labels = [label for _, label in entries]
    names = sorted(set(labels) - {""}, key=lambda name: (int(name), "") if name.isdecimal() else (1 << 62, name))
    paths = [path for path, _ in entries]
    return held_out_split(file_list(found, paths, labels, tuple(names)), tuple(names))


def _entry(line: str) -> tuple[str, str]:
    """Path and label of a line; the label is empty where the line ends with a path."""
    if line.lower().endswith(EXTENSIONS):
        return line, ""
    path, _, label = line.replace("\t", " ").rpartition(" ")
    return (path.strip(), label) if path else (line, "")
