"""Features of any images, to a file that other tools read.

    python -m sslbook.extract runs/simclr-shapes --data.folder PHOTOS --out features.npz
    python -m sslbook.extract backbone.safetensors --data.folder PHOTOS --out features.safetensors
    python -m sslbook.extract runs/mae-photos --data.folder PHOTOS --what tokens --out tokens.npz

The file holds, a row for each image: `features` (float32; with `--what tokens` instead `tokens`, patches x dim, with
`--what maps` instead `maps`, dim x rows x columns), `labels` (-1 where there is none), `split` (0 train, 1
test), `index` (the position in the split) and, for files, `paths` relative to the folder. Where images have several
classes or numbers to regress, `targets` hold them (bool, images x classes; or float32), and `labels` are -1. In
safetensors, which has no text, `paths` are the bytes of all of them, each ended by a zero byte.

>>> table = numpy.load("features.npz")
>>> table["features"].shape, table["paths"][0]
((372, 512), 'shirts/0001.jpg')
"""

import os
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from sslbook import checkpoint, distributed
from sslbook.data.datasets.base import FileList
from sslbook.data.loader import Data
from sslbook.errors import UserError, at_least_one
from sslbook.evaluate import choose_device, own_data, quiet_about_skipped, require_writable, tell_skipped, view_of
from sslbook.evaluation.features import Split, extract_with_index
from sslbook.nn.backbones import require
from sslbook.weights.backbone import load_backbone

SPLITS: tuple[Split, ...] = ("train", "test")


def extract(
    run: str,
    data: Data,
    out: str,
    what: Literal["features", "tokens", "maps"] = "features",
    split: Literal["all", "train", "test"] = "all",
    overwrite: bool = False,
    resize: int | None = None,
    batch_size: int = 256,
    device: str | None = None,
    backbone: nn.Module | None = None,
    progress: bool = True,
) -> dict[str, np.ndarray]:
    """Write the features of images, labeled or not, to a file.

    RUN is a run folder, an exported backbone.safetensors or a checkpoint. Without --data.folder, list, name or shapes
    the images are those that the run learned from. Images that cannot be read are named and left out.

    Args:
        run: run folder, exported backbone or checkpoint; `--run` may be left out if it comes first.
        data: images.
        out: the file to write, `.npz` or `.safetensors`.
        what: features, one vector an image; tokens, the last layer's patches, row by row, without the class token; maps,
            the last feature map before pooling. Tokens and maps of an image take as many numbers as 200 features or more.
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
    local = module if what == "features" else Local(module, what)
    view = view_of(facts, resize)
    splits = SPLITS if data.num_test else SPLITS[:1]
    if distributed.is_main():
        print(data.describe())
    parts: dict[str, list[Any]] = {what: [], "labels": [], "split": [], "index": []}
    parts |= {"targets": []} if data.kind in ("several classes", "numbers") else {}
    paths: list[str] = []
    with quiet_about_skipped():
        for number, name in enumerate(splits if split == "all" else (split,), start=split == "test"):
            x, y, index = extract_with_index(local, data, name, view, **options)
            columns = (x, y, torch.full_like(y, number, dtype=torch.uint8), index, data.targets(name)[index])
            for key, values in zip(parts, columns):  # without targets the last is left out
                parts[key].append(values)
            paths += _paths(data, name, index.tolist())
    table: dict[str, Any] = {name: torch.cat(part).numpy() for name, part in parts.items()}
    if isinstance(local, Local):
        table[what] = table[what].reshape(-1, *local.shape)
    if paths:
        table["paths"] = np.array(paths)
    if not distributed.is_main():
        return table
    checkpoint.write_atomically(target, lambda part: _write(part, table, target.suffix, facts, data))
    tell_skipped(data)
    count, *shape = table[what].shape
    print(f"{count:,} images, {what} of {' x '.join(map(str, shape))} each, in {target}")
    return table


class Local(nn.Module):
    """A backbone's patch tokens or map as one long vector; `shape` is their own, once an image was seen.

    Args:
        backbone: has `forward_tokens` or `forward_map`.
        what: tokens or maps.

    Raises:
        UserError: it has not.
    """

    shape: tuple[int, ...]

    def __init__(self, backbone: nn.Module, what: Literal["tokens", "maps"]) -> None:
        super().__init__()
        require(backbone, {"tokens": "forward_tokens", "maps": "forward_map"}[what], f"--what {what}")
        self.backbone, self.what = backbone, what

    def forward(self, x: Tensor) -> Tensor:
        if self.what == "tokens":
            local = self.backbone.forward_tokens(x)[:, self.backbone.num_prefix_tokens :]  # pyrefly: ignore
        else:
            local = self.backbone.forward_map(x)  # pyrefly: ignore
        self.shape = tuple(local.shape[1:])
        return local.flatten(1)


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
