"""Start a module from weights: a checkpoint, an exported backbone, or a state dict of another library."""

import pickle
import warnings
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn

from sslbook.checkpoint import find
from sslbook.errors import UserError
from sslbook.nn.ema import EMA
from sslbook.weights.backbone import read_safetensors


class Loaded(NamedTuple):
    """What became of a file of weights."""

    taken: list[str]
    """names in the module that got weights"""
    resampled: list[str]
    """those of them that were interpolated: tables of positions for another image size"""
    copied: list[str]
    """names of teachers in the module that the file does not know, which became copies of their students"""
    missing: list[str]
    """names in the module that found none"""
    unused: list[str]
    """names in the file that fit nothing"""

    def __str__(self) -> str:
        text = f"{len(self.taken)} of {len(self.taken) + len(self.missing)} tensors taken"
        for what, names in (
            ("resampled", self.resampled),
            ("copied from the student", self.copied),
            ("left fresh", self.missing),
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
    """
    if path.is_dir():
        path = path / "backbone.safetensors" if (path / "backbone.safetensors").exists() else find(path)
    if not path.is_file():
        raise UserError(f"{path}: no such file of weights")
    if path.suffix == ".safetensors":
        weights = read_safetensors(path)
    else:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of pickles that are refused in the next line
                weights = torch.load(path, map_location="cpu", weights_only=True)
        except pickle.UnpicklingError:
            raise UserError(f"{path}: holds more than tensors and could execute code; it was not loaded") from None
        except (RuntimeError, EOFError, OSError, KeyError, ValueError):
            raise UserError(f"{path}: truncated, or not a file of weights") from None
        for key in ("method", "state_dict", "model"):
            if isinstance(weights, dict) and isinstance(weights.get(key), dict):
                weights = weights[key]
                break
    own = module.state_dict()
    fitting, resampled, unused = {}, [], []
    for name, value in weights.items() if isinstance(weights, dict) else ():
        bare = str(name).removeprefix("module.").removeprefix("_orig_mod.")  # of data-parallel and compiled modules
        targets = [t for t in (name, f"backbone.{name}", bare, f"backbone.{bare}") if t in own]
        target = next((t for t in targets if isinstance(value, torch.Tensor) and own[t].shape == value.shape), None)
        if target is None and targets and isinstance(value, torch.Tensor):
            owner, _, last = targets[0].rpartition(".")
            resample = getattr(module.get_submodule(owner), "resampled", lambda *_: None)
            value, target = resample(last, value), targets[0]
            resampled += [target] if value is not None else []
        if target is None or value is None:
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
