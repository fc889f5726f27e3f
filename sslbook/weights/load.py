"""Start a module from weights: ours, those of another library's file, or a model of timm or torchvision by name."""

from pathlib import Path
from typing import Any

from torch import nn

from sslbook import distributed
from sslbook.checkpoint import find
from sslbook.errors import UserError
from sslbook.nn.backbones import describe
from sslbook.weights.fill import Loaded, fill
from sslbook.weights.importers import read_tensors
from sslbook.weights.models import VIEW, is_named, open_named


def load_weights(module: nn.Module, source: str | Path) -> Loaded:
    """Start `module` from weights whose names and shapes fit it, or its backbone.

    Args:
        module: a method or a backbone.
        source: a run folder, a checkpoint, an exported backbone, a state dict saved by torch or safetensors in the names
            of any library that `importers` knows, or `timm:NAME` and `torchvision:NAME`.

    Raises:
        UserError: they cannot be had, nothing in them fits the module, or less than nine tenths of the backbone.
    """
    if is_named(source):
        model, _, file = open_named(source)
        return fill(module, model.state_dict() if file is None else read_tensors(file), str(source))
    path = Path(source)
    if str(source).startswith(("timm/", "torchvision/")) and not path.exists():
        raise UserError(f"{source}: no such file; a model of a library is {str(source).replace('/', ':', 1)}")
    if path.is_dir():
        path = path / "backbone.safetensors" if (path / "backbone.safetensors").exists() else find(path)
    return fill(module, read_tensors(path), str(path))


def open_foreign(source: str | Path, backbone: nn.Module | None) -> tuple[nn.Module, dict[str, Any]]:
    """A backbone with weights that no description of ours goes with, and what is known of it.

    A file does not say its images: those of ImageNet are assumed, 224 of 256 pixels, or the backbone's `image_size`.
    What was taken of a file and what was left is printed.

    Args:
        source: `timm:NAME`, `torchvision:NAME`, either with `+FILE`, or a file of weights.
        backbone: the network of the file.

    Raises:
        UserError: there is no such model, no network for the file, or the weights are not its own.
    """
    if is_named(source):
        module, facts, file = open_named(source)
    elif backbone is None:
        cure = "give --backbone, such as --backbone resnet50 or --backbone timm/vit_small_patch16_224"
        raise UserError(f"{source}: weights alone, which do not say their network: {cure}")
    else:
        module, file = backbone, Path(source)
        size = (getattr(module, "init_args", None) or {}).get("image_size", VIEW["size"])
        view = VIEW if size == VIEW["size"] else {**VIEW, "size": size, "resize": None}
        facts = {"method": file.stem, "backbone": describe(module), "view": view}
    if file is not None:
        loaded = fill(module, read_tensors(file), str(file))
        if distributed.is_main():
            print(f"{file}: {loaded}")
    return module, facts
