"""Fill a module with tensors of any library's names, and say what became of them."""

from typing import NamedTuple

import torch
from torch import nn

from sslbook.errors import UserError
from sslbook.nn.ema import EMA
from sslbook.weights.importers import Match, Tensors, best_match

LEAST_SHARE = 0.9  # of the backbone's tensors; with fewer it is another network


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
    prefix: str = ""
    """what stands before the names in the file"""

    def __str__(self) -> str:
        text = f"{len(self.taken)} of {len(self.taken) + len(self.missing)} tensors loaded"
        text += f" from {self.prefix}*" if self.prefix else ""
        for what, names in (
            ("resampled", self.resampled),
            ("copied from the student", self.copied),
            ("left at their initial values", self.missing),
            ("not used", self.unused),
        ):
            text += f"; {what}: {_few(names)}" if names else ""
        return text


def fill(module: nn.Module, tensors: Tensors, source: str) -> Loaded:
    """Load what fits the module, or the backbone in it, under whatever names and prefix the tensors have.

    Tables of positions for another image size are interpolated, by the method `resampled` of the part they belong to. A
    teacher that is not among the tensors becomes a copy of its student, as at the beginning of every run.

    Args:
        module: a method or a backbone.
        tensors: by their names in a file.
        source: the file, for messages.

    Raises:
        UserError: nothing fits, or less than nine tenths of the backbone's tensors are there, or the file holds further
            layers of such a network.
    """
    own = module.state_dict()
    match = best_match(own, tensors)
    fitting, resampled, used = {}, [], set()
    for target, (value, names) in (match.tensors if match else {}).items():
        if own[target].shape != value.shape:
            if (fitted := _fitted(module, target, value, own[target].shape)) is None:
                continue
            value = fitted
            resampled.append(target)
        fitting[target] = value
        used.update(names)
    unused = [name for name in tensors if name not in used]
    if match is None:
        held = f"{len(tensors)} tensors, none of which" if tensors else "no tensors, so nothing"
        raise UserError(f"{source}: holds {held} fits {type(module).__name__}; is the backbone the same?")
    _require_share(module, own, match, fitting, unused, source)
    module.load_state_dict(fitting, strict=False)
    missing, copied = [name for name in own if name not in fitting], []
    for teacher, part in module.named_modules():
        if isinstance(part, EMA) and not any(name.startswith(f"{teacher}.") for name in fitting):
            part.restart()
            copied.append(teacher)
            missing = [name for name in missing if not name.startswith(f"{teacher}.")]
    return Loaded(list(fitting), resampled, copied, missing, unused, match.prefix)


def _require_share(
    module: nn.Module, own: Tensors, match: Match, fitting: Tensors, unused: list[str], source: str
) -> None:
    """Refuse weights of another network than the module's backbone."""
    scope = "backbone." if isinstance(getattr(module, "backbone", None), nn.Module) else ""
    names = [name for name in own if name.startswith(scope) and not name.endswith("num_batches_tracked")]
    absent = [name for name in names if name not in fitting]
    unused = [name for name in unused if name.startswith(match.prefix)]
    what = f"{len(names) - len(absent)} of the {len(names)} tensors of the backbone"
    if len(absent) > (1 - LEAST_SHARE) * len(names):
        cure = f"choose the backbone that they belong to, whose tensors are {_few(unused)}" if unused else "use others"
        if other := [name for name in absent if name in match.tensors]:
            sizes = f"{tuple(match.tensors[other[0]].value.shape)} there and {tuple(own[other[0]].shape)} here"
            cure = f"give the backbone the sizes of these weights: {other[0]} is {sizes}"
        raise UserError(f"{source}: holds only {what}; missing: {_few(absent)}: {cure}")
    parts = {name.removeprefix(scope).split(".")[0] for name in names}
    further = [name for name in unused if name.removeprefix(match.prefix).removeprefix(scope).split(".")[0] in parts]
    further = [name for name in further if not name.endswith(("num_batches_tracked", "index"))]
    if len(further) > (1 - LEAST_SHARE) * len(names):
        raise UserError(
            f"{source}: holds {what} and {len(further)} more of such a network, a larger one: {_few(further)}"
        )


def _fitted(module: nn.Module, name: str, value: torch.Tensor, shape: torch.Size) -> torch.Tensor | None:
    """A tensor of another shape as the module's `name`: positions of another image size, a mask token of older files."""
    if value.squeeze().shape == torch.Size(size for size in shape if size != 1):
        return value.reshape(shape)
    owner, _, last = name.rpartition(".")
    return getattr(module.get_submodule(owner), "resampled", lambda *_: None)(last, value)


def _few(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f", ... ({len(names)})" if len(names) > 3 else "")
