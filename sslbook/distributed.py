"""Collectives over processes, each the identity in one process.

A method is written once and runs in one process, in two CPU processes (gloo) or on many GPUs (NCCL).

The convention for gradients: each process returns the mean loss over *its own* images, the backward passes below give
the gradient of the SUM of all processes' losses, and `DistributedDataParallel` divides by their number. The result is
the gradient of the mean over the global batch.
"""

import inspect
import os
import pickle
import tempfile
import time
import uuid
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from jaxtyping import Int, Shaped
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from sslbook.errors import UserError, explained

T = TypeVar("T")


def initialized() -> bool:
    """Whether this process belongs to a process group."""
    return dist.is_available() and dist.is_initialized()


def rank() -> int:
    """The number of this process, from 0."""
    return dist.get_rank() if initialized() else 0


def world_size() -> int:
    """The number of processes that train together."""
    return dist.get_world_size() if initialized() else 1


def is_main() -> bool:
    """Whether this is the process that writes files and prints."""
    return rank() == 0


def own_rows(count: int, device: torch.device | str = "cpu") -> Int[Tensor, "{count}"]:
    """The positions of this process's `count` rows in a gathered batch."""
    return rank() * count + torch.arange(count, device=device)


def barrier() -> None:
    """Wait until every process has called this."""
    if world_size() > 1:
        dist.barrier()


@torch.no_grad()
def all_gather(x: Shaped[Tensor, "n *rest"]) -> Shaped[Tensor, "all *rest"]:
    """The rows of all processes in the order of their ranks, without gradient; all must have the same number of rows."""
    if world_size() == 1:
        return x
    parts = [torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(world_size())]
    dist.all_gather(parts, x.contiguous())
    return torch.cat(parts)


def all_gather_object(x: T) -> list[T]:
    """The object that each process passes, in the order of their ranks."""
    parts: list[Any] = [x] * world_size()
    if world_size() > 1:
        dist.all_gather_object(parts, x)
    return parts


def full_tensor(x: Tensor) -> Tensor:
    """A tensor whose shards lie in several processes (a `DTensor`), gathered in all of them; any other as it is."""
    return x.full_tensor() if hasattr(x, "full_tensor") else x  # pyrefly: ignore


def all_gather_with_grad(x: Shaped[Tensor, "n *rest"]) -> Shaped[Tensor, "all *rest"]:
    """As `all_gather`; the gradient of a row is summed over all the processes that used it."""
    return _Gather.apply(x) if world_size() > 1 else x


def all_reduce_sum_with_grad(x: Shaped[Tensor, "*shape"]) -> Shaped[Tensor, "*shape"]:
    """The sum over processes; its gradient is the sum over processes too, since each of them used the sum."""
    return _Sum.apply(x) if world_size() > 1 else x


@torch.no_grad()
def all_reduce_mean(x: Shaped[Tensor, "*shape"]) -> Shaped[Tensor, "*shape"]:
    """The average over processes, without gradient."""
    return all_reduce_sum(x) / world_size() if world_size() > 1 else x


@torch.no_grad()
def all_reduce_sum(x: Shaped[Tensor, "*shape"]) -> Shaped[Tensor, "*shape"]:
    """The sum over processes, without gradient."""
    return _reduced(x, dist.ReduceOp.SUM)


@torch.no_grad()
def all_reduce_std(x: Shaped[Tensor, "n *rest"]) -> Shaped[Tensor, "*rest"]:
    """The standard deviation over the rows of all processes, which must have the same number of rows."""
    center = all_reduce_mean(x.mean(dim=0))
    return all_reduce_mean((x - center).square().mean(dim=0)).sqrt()


@torch.no_grad()
def all_reduce_max(x: Shaped[Tensor, "*shape"]) -> Shaped[Tensor, "*shape"]:
    """The greatest value over processes, without gradient."""
    return _reduced(x, dist.ReduceOp.MAX)


def _reduced(x: Tensor, operation: Any) -> Tensor:
    if world_size() == 1:
        return x
    x = x.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(x, operation)
    return x


@torch.no_grad()
def broadcast(x: T) -> T:
    """The value that process 0 passes, in every process: a tensor (of one shape in all of them), or any object."""
    if world_size() == 1:
        return x
    box: list[Any] = [x]
    if isinstance(x, Tensor):
        box[0] = x.clone(memory_format=torch.contiguous_format)
        dist.broadcast(box[0], src=0)
    else:
        dist.broadcast_object_list(box, src=0)
    return box[0]


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.rows = len(x)
        return all_gather(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return all_reduce_sum(grads[0])[rank() * ctx.rows : (rank() + 1) * ctx.rows]


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return all_reduce_sum(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return all_reduce_sum(grads[0])


def data_parallel(module: nn.Module, device: torch.device) -> DistributedDataParallel:
    """The module in every process, with the same parameters and buffers, and gradients averaged over processes.

    Every process computes the same changes of buffers, so they are sent only once: a memory bank may have a million rows.
    """
    for buffer in module.buffers():
        buffer.copy_(broadcast(buffer))
    # The newer name came with torch 2.15, which warns of the older.
    names = ("forward_sync_buffers", "broadcast_buffers")
    once = next(name for name in names if name in inspect.signature(DistributedDataParallel).parameters)
    options: dict[str, Any] = {"device_ids": [device.index] if device.type == "cuda" else None, once: False}
    return DistributedDataParallel(module, **options)


def default_device() -> torch.device:
    """Where a notebook or a script computes: a CUDA GPU, else Apple's (MPS), else the CPU."""
    mps = torch.backends.mps.is_available()
    return torch.device("cuda" if torch.cuda.is_available() else "mps" if mps else "cpu")


def setup(device: str | None = None) -> torch.device:
    """Join the process group that `torchrun` describes, if it started this process; returns this process's device.

    Args:
        device: where to compute, such as `cpu` or `cuda:1`; by default a GPU if there is one.

    Raises:
        UserError: the device does not exist, there are more processes than GPUs, or the environment describes no group.
    """
    cuda = torch.cuda.is_available()
    kinds, cure = (RuntimeError, AssertionError, NotImplementedError), "use cpu, cuda or cuda:0"
    with explained(f"device {device} cannot be used", *kinds, cure=cure):
        kind = torch.device(device).type if device else "cuda" if cuda else "cpu"
        if kind != "cuda" or not cuda:  # a tensor on a GPU would take memory there
            torch.empty(0, device=kind).tolist()  # fails on devices without numbers, too
    if initialized() and kind == "cuda" and "LOCAL_RANK" in os.environ:
        return torch.device("cuda", torch.cuda.current_device())
    if "RANK" not in os.environ or initialized():
        return torch.device(device or kind)

    cure = "torchrun sets RANK, WORLD_SIZE and MASTER_ADDR; unset RANK for one process"
    with explained("no process group", ValueError, cure=cure):
        local_rank = int(os.environ.get("LOCAL_RANK", "0"))
        chosen = torch.device("cpu")
        if kind == "cuda":
            if local_rank >= torch.cuda.device_count():
                most = f"start at most {torch.cuda.device_count()} processes (--nproc-per-node)"
                raise UserError(f"process {local_rank} of this machine has no GPU of its own: {most}")
            chosen = torch.device("cuda", local_rank)
            torch.cuda.set_device(chosen)
        rank, processes = int(os.environ["RANK"]), int(os.environ.get("WORLD_SIZE", "0"))
        if processes and not 0 <= rank < processes:  # it would wait for ever
            raise UserError(f"RANK is {rank} and WORLD_SIZE {processes}: {cure}")
        backend = "nccl" if kind == "cuda" and dist.is_nccl_available() else "gloo"
        again = int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0")) > 0
        options: dict[str, Any] = _fresh_store() if again else {}
        dist.init_process_group(backend, device_id=chosen if backend == "nccl" else None, **options)
    return chosen


def _fresh_store() -> dict[str, Any]:
    """A store for this start alone: torchrun's own outlives a restart, and hands out addresses of processes that died.

    Process 0 chooses a name for the start. What another one reads of it is no leftover, since the answer is to a word of
    its own that nobody can have known before.
    """
    store, rank, processes = next(dist.rendezvous("env://"))
    name, deadline = uuid.uuid4().hex, time.monotonic() + store.timeout.total_seconds()
    if rank > 0:
        store.set(f"sslbook/ask/{rank}", name)
        name = store.get(f"sslbook/answer/{name}").decode()  # waits for it
        store.set(f"sslbook/{name}/{rank}", "joined")
    waiting = set(range(1, processes)) if rank == 0 else set()
    while waiting and time.monotonic() < deadline:
        for other in sorted(waiting):
            if store.check([f"sslbook/{name}/{other}"]):
                waiting.remove(other)
            elif store.check([asked := f"sslbook/ask/{other}"]):
                store.set(f"sslbook/answer/{store.get(asked).decode()}", name)
        time.sleep(0.05)
    return {"store": dist.PrefixStore(name, store), "rank": rank, "world_size": processes}


def shutdown() -> None:
    """Leave the process group, if there is one."""
    if initialized():
        dist.destroy_process_group()


def launch(fn: Callable[..., T], processes: int, *args: Any) -> list[T]:
    """Run `fn(*args)` in new CPU processes that form a gloo group; returns what each returned, by rank.

    For notebooks and demonstrations. The processes import `fn` afresh, so it must live in a module, not in a cell.
    """
    # As bytes: torch would pickle tensors as shared memory, and all processes would update the same weights in place.
    work = pickle.dumps((fn, args))
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(_launched, (work, processes, folder), nprocs=processes)
        return [pickle.loads((Path(folder) / f"{r}.pickle").read_bytes()) for r in range(processes)]


def _launched(rank: int, work: bytes, processes: int, folder: str) -> None:
    fn, args = pickle.loads(work)
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // processes))
    init_process_group(rank, processes, Path(folder) / "rendezvous")
    try:
        (Path(folder) / f"{rank}.pickle").write_bytes(pickle.dumps(fn(*args)))
    finally:
        shutdown()


def init_process_group(rank: int, processes: int, rendezvous: Path, timeout: float = 120.0) -> None:
    """Join a gloo group whose members meet through the file `rendezvous`, since a port could be in use."""
    dist.init_process_group(
        "gloo",
        init_method=rendezvous.resolve().as_uri(),
        rank=rank,
        world_size=processes,
        timeout=timedelta(seconds=timeout),
    )
