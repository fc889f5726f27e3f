"""What is kept on disk: checkpoints to go on from, and backbones to take elsewhere.

Nothing here executes code from a file: checkpoints are read with `weights_only=True`, backbones are safetensors with a
JSON description, and only the backbones of `sslbook.nn` are built from a description alone.
"""

import importlib
import inspect
import json
import os
import pickle
import tempfile
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from sslbook.errors import UserError
from sslbook.nn.ema import EMA

FORMAT = "sslbook checkpoint 1"
BUILDABLE = ("ConvNet", "ResNet", "VisionTransformer", "DiscreteEncoder", "VQTokenizer", "sobel")


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` fill a file beside `path`, then put it in its place: a reader sees the old file or the whole new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".part")
    os.close(handle)
    try:
        write(Path(name))
        with open(name, "rb+") as file:
            os.fsync(file.fileno())
        mask = os.umask(0)
        os.umask(mask)
        os.chmod(name, 0o666 & ~mask)
        os.replace(name, path)
    finally:
        Path(name).unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically."""
    write_atomically(path, lambda part: part.write_text(text, encoding="utf-8"))


# -- checkpoints to go on from -----------------------------------------------------------------------------------------


def save(path: Path, state: dict[str, Any]) -> None:
    """Write a checkpoint atomically."""
    write_atomically(path, lambda part: torch.save({"format": FORMAT, **state}, part))


def load(path: Path, *needs: str) -> dict[str, Any]:
    """Read a checkpoint written by `save`, which holds the entries `needs`.

    Raises:
        UserError: the file is missing, truncated, damaged, from elsewhere, or would execute code.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such checkpoint")
    if path.stat().st_size == 0 or not zipfile.is_zipfile(path):
        raise UserError(f"{path}: truncated or not a checkpoint; take an older one (checkpoint-*.pt beside it)")
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()  # torch does not compare the checksums that it writes
        if damaged is not None:
            raise UserError(f"{path}: damaged ({damaged} is not what was saved); take an older one")
        state = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise UserError(f"{path}: holds more than tensors and could execute code; it was not loaded") from None
    except (RuntimeError, EOFError, OSError, KeyError, ValueError, zipfile.BadZipFile) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0][:120]
        raise UserError(f"{path}: truncated or not a checkpoint ({reason}); take an older one") from None
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        raise UserError(f"{path}: not a checkpoint of sslbook; to start from its weights use --init_from")
    if absent := [name for name in needs if name not in state]:
        raise UserError(f"{path}: holds no {', '.join(absent)}; take another checkpoint")
    return state


def checkpoints(folder: Path) -> list[Path]:
    """The checkpoints of a run folder, oldest first."""
    own = [path for path in folder.glob("checkpoint-*.pt") if path.stem.removeprefix("checkpoint-").isdecimal()]
    return sorted(own, key=lambda path: int(path.stem.removeprefix("checkpoint-")))


def find(path: Path) -> Path:
    """The newest checkpoint of a run folder, or the file itself."""
    if path.is_dir():
        found = checkpoints(path)
        if not found:
            raise UserError(f"{path}: holds no checkpoint to go on from")
        return found[-1]
    return path


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
        weights = _read_safetensors(path)
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


# -- backbones to take elsewhere ---------------------------------------------------------------------------------------


def export_backbone(path: Path, backbone: nn.Module, description: dict[str, Any]) -> None:
    """Write `path` (safetensors) and the JSON beside it that says how to build and feed the backbone.

    Args:
        path: file ending in `.safetensors`.
        backbone: the module.
        description: facts for whoever uses it: `view` (size, mean, std), `method`, `data`.
    """
    from safetensors.torch import save_file

    weights = {name: value.detach().cpu().contiguous().clone() for name, value in backbone.state_dict().items()}
    write_atomically(path, lambda part: save_file(weights, part, metadata={"format": "pt"}))
    facts = {"backbone": describe(backbone), **description}
    write_text(path.with_suffix(".json"), json.dumps(facts, indent=2, default=str) + "\n")


def describe(module: nn.Module) -> dict[str, Any]:
    """Import path and constructor arguments of a module; the arguments are known if it keeps them in `init_args`."""
    init_args = getattr(module, "init_args", None)
    path = f"{type(module).__module__}.{type(module).__qualname__}"
    if init_args is not None:
        path = getattr(module, "class_path", path)
    return {"class_path": path, "init_args": init_args}


def build(description: dict[str, Any]) -> nn.Module:
    """The backbone of a description, with fresh weights.

    Only networks of `sslbook.nn` that are made of numbers alone are built: a description is data, and data must not
    choose what code is run, or what files are read.
    """
    path, init_args = str(description.get("class_path", "")), description.get("init_args")
    if not path.startswith("sslbook.nn.") or path.rpartition(".")[2] not in BUILDABLE or init_args is None:
        raise UserError(
            f"the backbone {path or '(none)'} is not one of sslbook.nn: build it yourself and pass --backbone"
        )
    module_name, _, name = path.rpartition(".")
    try:
        make = getattr(importlib.import_module(module_name), name)
        inspect.signature(make).bind(**init_args)
    except (ImportError, AttributeError, TypeError) as error:
        raise UserError(f"the backbone {path} cannot be built: {error}") from None
    module = make(**init_args)
    if not isinstance(module, nn.Module):
        raise UserError(f"{path} does not make a module")
    return module


def load_backbone(path: str | Path, backbone: nn.Module | None = None) -> tuple[nn.Module, dict[str, Any]]:
    """A trained backbone and its description.

    Args:
        path: a run folder, an exported `backbone.safetensors`, or a checkpoint that lies in its run folder.
        backbone: the module to fill, for backbones that are not from `sslbook.nn`.

    Raises:
        UserError: nothing usable is there.
    """
    path = Path(path)
    if not path.exists():
        raise UserError(f"{path}: no such run folder, exported backbone or checkpoint")
    checkpoint = path if path.suffix == ".pt" else None
    export = path / "backbone.safetensors" if path.is_dir() else path
    if checkpoint is None and path.is_dir() and not export.exists():
        checkpoint = find(path)
    if checkpoint is not None:
        state = load(checkpoint, "method", "description")
        facts = state["description"]
        weights = {
            name.removeprefix("backbone."): value
            for name, value in state["method"].items()
            if name.startswith("backbone.")
        }
    else:
        description = export.with_suffix(".json")
        weights = _read_safetensors(export)
        if not description.is_file():
            raise UserError(f"{description}: missing; it says how to build the backbone")
        try:
            facts = json.loads(description.read_text(encoding="utf-8"))
        except ValueError:
            raise UserError(f"{description}: not valid JSON") from None
    module = backbone if backbone is not None else build(facts.get("backbone", {}))
    try:
        module.load_state_dict(weights)
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{path}: the weights do not fit the backbone ({reason})") from None
    return module, facts


def _read_safetensors(path: Path) -> dict[str, torch.Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if not path.is_file():
        raise UserError(f"{path}: no such file")
    try:
        return load_file(path)
    except (SafetensorError, OSError, ValueError):
        raise UserError(f"{path}: truncated, or not a safetensors file") from None
