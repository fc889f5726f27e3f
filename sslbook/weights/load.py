"""Start a module from weights: a checkpoint, an exported backbone, or a state dict of another library."""

from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn

from sslbook.checkpoint import find, read
from sslbook.errors import UserError
from sslbook.nn.ema import EMA
from sslbook.weights.backbone import read_safetensors


class Loaded(NamedTuple):
    """What became of a file of weights."""

    taken: list[str]
    """names in the module that were loaded"""
    resampled: list[str]
    """those of them that were interpolated or reshaped, such as position tables of another image size"""
    copied: list[str]
    """names of EMA teachers in the module that the file does not contain, which became copies of their students"""
    missing: list[str]
    """names in the module that found none"""
    unused: list[str]
    """names in the file that fit nothing"""

    def __str__(self) -> str:
        text = f"{len(self.taken)} of {len(self.taken) + len(self.missing)} tensors loaded"
        for what, names in (
            ("resampled", self.resampled),
            ("copied from the student", self.copied),
            ("left at their initial values", self.missing),
            ("not used", self.unused),
        ):
            shown = ", ".join(names[:3]) + (f", ... ({len(names)})" if len(names) > 3 else "")
            text += f"; {what}: {shown}" if names else ""
        return text


def load_weights(module: nn.Module, path: Path) -> Loaded:
    """Start `module` from weights: a checkpoint of ours, an exported backbone, or a state dict saved by torch.

    Weights whose name and shape fit the module, or its backbone, are taken: those of torchvision's ResNets and timm's
    vision transformers among them, whose classifiers are not used. Tables of positions for another image size are
    interpolated, by the method `resampled` of the part they belong to. A teacher that is not in the file becomes a copy
    of its student, as at the beginning of every run.

    Raises:
        UserError: the file cannot be read, or nothing in it fits the module.
    """
    if path.is_dir():
        path = path / "backbone.safetensors" if (path / "backbone.safetensors").exists() else find(path)
    if path.suffix == ".safetensors":
        weights = read_safetensors(path)
    else:
        weights = read(path)
        for key in ("method", "state_dict", "model"):
            if isinstance(weights, dict) and isinstance(weights.get(key), dict):
                weights = weights[key]
                break
    own = module.state_dict()
    fitting, resampled, unused = {}, [], []
    for name, value in weights.items() if isinstance(weights, dict) else ():
        bare = str(name).removeprefix("module.").removeprefix("_orig_mod.")  # of data-parallel and compiled modules
        targets = [t for t in (name, f"backbone.{name}", bare, f"backbone.{bare}") if t in own]
        if not targets or not isinstance(value, torch.Tensor):
            unused.append(str(name))
            continue
        target = next((t for t in targets if own[t].shape == value.shape), targets[0])
        if own[target].shape != value.shape:
            value = _fitted(module, target, value, own[target].shape)
            resampled += [target] if value is not None else []
        if value is None:
            unused.append(str(name))
        else:
            fitting[target] = value
    if not fitting:
        raise UserError(f"{path}: none of its weights fits {type(module).__name__}; is the backbone the same?")
    module.load_state_dict(fitting, strict=False)
    missing, copied = [name for name in own if name not in fitting], []
    for teacher, part in module.named_modules():
        if isinstance(part, EMA) and not any(name.startswith(f"{teacher}.") for name in fitting):
            part.restart()
            copied.append(teacher)
            missing = [name for name in missing if not name.startswith(f"{teacher}.")]
    return Loaded(list(fitting), resampled, copied, missing, unused)


def _fitted(module: nn.Module, name: str, value: torch.Tensor, shape: torch.Size) -> torch.Tensor | None:
    """A tensor of another shape as the module's `name`: positions of another image size, a mask token of older files."""
    if value.squeeze().shape == torch.Size(size for size in shape if size != 1):
        return value.reshape(shape)
    owner, _, last = name.rpartition(".")
    return getattr(module.get_submodule(owner), "resampled", lambda *_: None)(last, value)
