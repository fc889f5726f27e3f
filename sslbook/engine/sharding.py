"""Models that outgrow one GPU: parameters, gradients and optimizer states in shards, one a process (FSDP2).

Rajbhandari et al., 2020, "ZeRO: Memory optimizations toward training trillion parameter models" (arXiv:1910.02054), stage
3; Zhao et al., 2023, "PyTorch FSDP" (arXiv:2304.11277). A block of a network, of an EMA teacher's too, is gathered while
it computes; what lies outside the blocks is gathered for the whole forward pass. A frozen teacher stays whole.

Between the steps the parameters of a sharded method are `DTensor`s, and it cannot be called. Within `whole(method)` it is
the module that it was. Checkpoints hold whole tensors, and do not tell how a run was spread over processes.
"""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from sslbook import distributed
from sslbook.distributed import full_tensor
from sslbook.nn.frozen import Frozen

BLOCK = re.compile(r"(^|\.)(blocks|layers|stages|layer\d+)\.\d+$")


class Face(NamedTuple):
    """What differs between a module and the same module in shards."""

    kind: type
    attributes: dict[str, Any]
    parameters: dict[str, nn.Parameter | None]


def shard(method: nn.Module, device: torch.device) -> None:
    """Shard a method over all processes, in place: every block by itself, the rest together.

    Args:
        method: on its device; process 0's weights count.
        device: where it computes.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    with torch.no_grad():
        for tensor in [*method.parameters(), *method.buffers()]:
            tensor.copy_(distributed.broadcast(tensor))
    before = {module: (type(module), _hooks(module), set(module.__dict__)) for module in method.modules()}
    mesh = init_device_mesh(device.type, (distributed.world_size(),))
    # A frozen teacher has neither gradients nor optimizer states, and is read through other methods than `forward`.
    frozen = {part for module in method.modules() if isinstance(module, Frozen) for part in module.modules()}
    for name, module in reversed([*method.named_modules()]):  # the inner ones first
        if BLOCK.search(name) and module not in frozen:
            fully_shard(module, mesh=mesh)
    fully_shard(method, mesh=mesh, ignored_params={p for module in frozen for p in module.parameters()})
    # FSDP gives modules another class, hooks and attributes: what to take away again.
    method.__dict__["_plain"] = plain = {}
    for module, (kind, hooks, names) in before.items():
        plain[module] = (kind, hooks, set(module.__dict__) - names)
        type(module).__name__ = kind.__name__  # checkpoints and messages name it


def is_sharded(method: nn.Module) -> bool:
    """Whether its parameters lie in shards now."""
    return "_plain" in method.__dict__


@contextmanager
def whole(method: nn.Module) -> Iterator[None]:
    """A sharded method as the module that it was, with all its parameters in every process; any other as it is.

    All processes must enter. What changes the parameters is kept.
    """
    faces = make_whole(method)
    try:
        yield
    finally:
        for module, (kind, attributes, parameters) in faces.items():
            for name, sharded in parameters.items():
                if sharded is not None:
                    sharded.data.copy_(like(module._parameters[name], sharded))
            module.__class__ = kind
            module.__dict__.update(attributes, _parameters=parameters)


def make_whole(method: nn.Module) -> dict[nn.Module, Face]:
    """As `whole`, for good; returns what each module had."""
    faces = {}
    for module, (kind, hooks, added) in method.__dict__.get("_plain", {}).items():
        attributes = {**_hooks(module), **{name: module.__dict__.pop(name) for name in added}}
        faces[module] = Face(type(module), attributes, module._parameters)
        module.__class__ = kind
        module.__dict__.update({name: hook.copy() for name, hook in hooks.items()})
        module.__dict__["_parameters"] = {
            name: None if p is None else nn.Parameter(full_tensor(p.detach()), requires_grad=p.requires_grad)
            for name, p in module._parameters.items()
        }
    return faces


def _hooks(module: nn.Module) -> dict[str, Any]:
    return {
        name: value.copy() for name, value in module.__dict__.items() if "hooks" in name and isinstance(value, dict)
    }


def like(x: Tensor, other: Tensor) -> Tensor:
    """A whole tensor, the same in every process, sharded as another one is."""
    from torch.distributed.tensor import DTensor, distribute_tensor

    if not isinstance(other, DTensor):
        return x
    return distribute_tensor(x.detach(), other.device_mesh, other.placements, src_data_rank=None)


# -- checkpoints -------------------------------------------------------------------------------------------------------


def state_dict(method: nn.Module) -> dict[str, Tensor]:
    """The state of a method in whole tensors; of a sharded one on the CPU, and in process 0 only."""
    if not is_sharded(method):
        return method.state_dict()
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    return get_model_state_dict(method, options=StateDictOptions(full_state_dict=True, cpu_offload=True))


def load_state_dict(method: nn.Module, state: dict[str, Tensor]) -> None:
    """Load a state of whole tensors, given in every process."""
    if not is_sharded(method):
        method.load_state_dict(state)
        return
    from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict

    set_model_state_dict(method, state, options=StateDictOptions(full_state_dict=True))


def optimizer_state_dict(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """The state of an optimizer in whole tensors, its parameters by number; of a sharded one only in process 0."""
    state = optimizer.state_dict()
    kept: dict[int, dict[str, Any]] = {}
    for number, values in state["state"].items():
        for name, value in values.items():
            if hasattr(value, "full_tensor"):  # one at a time on the device
                gathered = full_tensor(value)
                value = gathered.cpu() if distributed.is_main() else None
            kept.setdefault(number, {})[name] = value
    return {**state, "state": kept}


def load_optimizer_state_dict(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Load a state of whole tensors, given in every process."""
    own = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    written = [number for group in state["param_groups"] for number in group["params"]]
    kept = dict(state["state"])
    for number, parameter in zip(written, own):
        for name, value in (kept.get(number) or {}).items():
            if isinstance(value, Tensor) and value.shape == parameter.shape and value.ndim:
                kept[number] = {**kept[number], name: like(value, parameter)}
    optimizer.load_state_dict({**state, "state": kept})
