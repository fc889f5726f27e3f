"""Features of any images, to a file that other tools read.

    python -m sslbook.extract runs/simclr-shapes --data.folder PHOTOS --out features.npz
    python -m sslbook.extract backbone.safetensors --data.folder PHOTOS --out features.safetensors

The file holds, a row for each image: `features` (float32), `labels` (-1 where there is none), `split` (0 train, 1
test), `index` (the position in the split) and, for files, `paths` relative to the folder. In safetensors, which has no
text, `paths` are the bytes of all of them, each ended by a zero byte.

>>> table = numpy.load("features.npz")
>>> table["features"].shape, table["paths"][0]
((372, 512), 'shirts/0001.jpg')
"""

import os
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import nn

from sslbook import checkpoint
from sslbook.data.datasets.base import FileList
from sslbook.data.loader import Data
from sslbook.errors import UserError, at_least_one
from sslbook.evaluate import choose_device, own_data, quiet_about_skipped, require_writable, tell_skipped, view_of
from sslbook.evaluation.features import Split, extract_with_index
from sslbook.weights.backbone import load_backbone

SPLITS: tuple[Split, ...] = ("train", "test")


def extract(
    run: str,
    data: Data,
    out: str,
    split: Literal["all", "train", "test"] = "all",
    overwrite: bool = False,
    resize: int | None = None,
    batch_size: int = 256,
    device: str | None = None,
    backbone: nn.Module | None = None,
    progress: bool = True,
) -> dict[str, np.ndarray]:
    """Write the features of images, labeled or not, to a file.

    RUN is a run folder, an exported backbone.safetensors or a checkpoint. Without any --data option the images are
    those that the run learned from. Images that cannot be read are named and left out.

    Args:
        run: run folder, exported backbone or checkpoint; `--run` may be left out if it comes first.
        data: images.
        out: the file to write, `.npz` or `.safetensors`.
        split: only the training or the test images; all of them by default, the training images first.
        overwrite: replace a file that is there.
        resize: the image's shorter side before the center is cropped; by default 8/7 of the view, below 128 pixels all.
        batch_size: images at a time.
        device: cpu, cuda, cuda:1; a GPU if there is one.
        backbone: the module to fill, for backbones that are not from sslbook.nn.
        progress: show a progress bar.

    Returns:
        The arrays that were written, by name.

    Raises:
        UserError: something the caller can mend.
    """
    target = Path(out).expanduser()
    require_writable(target, (".npz", ".safetensors"))
    if target.exists() and not overwrite:
        raise UserError(f"--out {out}: exists already; choose another name, or give --overwrite true")
    at_least_one(batch_size=batch_size)
    options = {"device": choose_device(device), "batch_size": batch_size, "progress": progress}
    module, facts = load_backbone(run, backbone)
    view = view_of(facts, resize)
    splits = SPLITS if data.num_test else SPLITS[:1]
    print(data.describe())
    parts: dict[str, list[Any]] = {"features": [], "labels": [], "split": [], "index": []}
    paths: list[str] = []
    with quiet_about_skipped():
        for number, name in enumerate(splits if split == "all" else (split,), start=split == "test"):
            x, y, index = extract_with_index(module, data, name, view, **options)
            for key, values in zip(parts, (x, y, torch.full_like(y, number, dtype=torch.uint8), index)):
                parts[key].append(values)
            paths += _paths(data, name, index.tolist())
    table: dict[str, Any] = {name: torch.cat(part).numpy() for name, part in parts.items()}
    if paths:
        table["paths"] = np.array(paths)
    checkpoint.write_atomically(target, lambda part: _write(part, table, target.suffix, facts, data))
    tell_skipped(data)
    count, dim = table["features"].shape
    print(f"{count:,} images, {dim} features each, in {target}")
    return table


def _paths(data: Data, split: Split, positions: list[int]) -> list[str]:
    """Names of the files, relative to the folder that was given; none for images that are no files."""
    source = data._source(split)
    if not isinstance(source, FileList):
        return []
    top = Path(data.folder).expanduser() if data.folder is not None else source.root
    return [os.path.relpath(source.path(position), top) for position in positions]


def _write(part: Path, table: dict[str, Any], suffix: str, facts: dict[str, Any], data: Data) -> None:
    if suffix == ".npz":
        with open(part, "wb") as file:  # given a name, numpy would append .npz to it
            np.savez(file, **table, class_names=np.array(data.class_names, dtype=np.str_))
        return
    from safetensors.numpy import save_file

    tensors = {name: value for name, value in table.items() if name != "paths"}
    if "paths" in table:
        names = b"".join(os.fsencode(str(path)) + b"\0" for path in table["paths"])
        tensors["paths"] = np.frombuffer(names, dtype=np.uint8)
    about = {"method": str(facts.get("method", "")), "class_names": "\n".join(data.class_names)}
    save_file(tensors, part, metadata=about)


def main() -> None:
    """`python -m sslbook.extract RUN --data.folder PHOTOS --out FILE`."""
    from sslbook.cli.common import cli

    cli(extract, prog="python -m sslbook.extract RUN", own_data=own_data)


if __name__ == "__main__":
    from sslbook.cli.common import run as run_command

    run_command(main)
