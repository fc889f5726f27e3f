"""Backbones on disk: safetensors with a JSON description beside them.

Nothing here executes code from a file: only the backbones of `sslbook.nn` are built from a description alone.
"""

import json
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sslbook.checkpoint import DESCRIPTION, find, load, write_atomically, write_text
from sslbook.errors import UserError, explained
from sslbook.files import read_json
from sslbook.nn.backbones import build, describe
from sslbook.weights.importers import read_safetensors
from sslbook.weights.load import open_foreign
from sslbook.weights.models import is_named

RENAMED = {"heads": "num_heads", "codes": "num_codes"}  # arguments of version 0.1


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


def load_backbone(path: str | Path, backbone: nn.Module | None = None) -> tuple[nn.Module, dict[str, Any]]:
    """A trained backbone and its description.

    Args:
        path: a run folder, an exported `backbone.safetensors`, a checkpoint that lies in its run folder, `timm:NAME`,
            `torchvision:NAME`, or weights in the names of any library that `importers` knows.
        backbone: the module to fill, for backbones that are not from `sslbook.nn`, and for weights without description.

    Raises:
        UserError: nothing usable is there.
    """
    if is_named(path):
        return open_foreign(path, backbone)
    path = Path(path)
    if path.is_dir():
        path = path / "backbone.safetensors" if (path / "backbone.safetensors").exists() else find(path)
    if path.is_file() and not is_ours(path):
        return open_foreign(path, backbone)
    if path.suffix == ".pt":
        state = load(path, "method", "description")
        facts = state["description"]
        own = (name for name in state["method"] if name.startswith("backbone."))
        weights = {name.removeprefix("backbone."): state["method"][name] for name in own}
    else:
        weights = read_safetensors(path)
        facts = read_json(path.with_suffix(".json"), DESCRIPTION)
    module = backbone
    if module is None:
        description = _current_names(facts.get("backbone", {}))
        with torch.device("meta"):  # an altered description may ask for more memory than there is
            shapes = {name: value.shape for name, value in build(description).state_dict().items()}
        if wrong := [name for name in {**shapes, **weights} if name not in shapes or name not in weights]:
            raise UserError(f"{path}: the weights do not fit the backbone (only one of them has {wrong[0]})")
        if wrong := [name for name, shape in shapes.items() if weights[name].shape != shape]:
            sizes = f"{tuple(weights[wrong[0]].shape)}, not {tuple(shapes[wrong[0]])}"
            raise UserError(f"{path}: the weights do not fit the backbone ({wrong[0]} is {sizes})")
        module = build(description)
    with explained(f"{path}: the weights do not fit the backbone", RuntimeError):
        module.load_state_dict(weights)
    return module, facts


def is_ours(path: Path) -> bool:
    """Whether a file says of itself, or one beside it, how to build its backbone."""
    if path.suffix == ".safetensors":
        return path.with_suffix(".json").exists()
    if path.suffix != ".pt":
        return False
    try:
        with zipfile.ZipFile(path) as archive:  # the pickle begins with the format of our checkpoints
            inside = next(name for name in archive.namelist() if name.endswith("data.pkl"))
            return b"sslbook checkpoint" in archive.read(inside)[:200]
    except Exception:  # zipfile raises many kinds; reading the file says that it is damaged
        return True


def _current_names(description: Any) -> Any:
    """A description with the arguments of version 0.1 under their names of today."""
    if not isinstance(description, dict):
        return description
    return {RENAMED.get(key, key): _current_names(value) for key, value in description.items()}
