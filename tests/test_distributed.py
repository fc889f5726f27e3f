"""Collectives are the identity in one process; in two, gradients are those of the mean over the global batch."""

import os
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from sslbook import distributed
from sslbook.errors import UserError


def test_identity_in_one_process() -> None:
    x = torch.randn(3, 2, requires_grad=True)
    assert (distributed.rank(), distributed.world_size(), distributed.is_main()) == (0, 1, True)
    for function in (
        distributed.all_gather,
        distributed.all_gather_with_grad,
        distributed.all_reduce_sum_with_grad,
        distributed.all_reduce_mean,
    ):
        assert function(x) is x
    assert distributed.broadcast({"a": 1}) == {"a": 1}
    distributed.barrier()


def _everything(x: Tensor) -> dict[str, object]:
    r = distributed.rank()
    mine = x.chunk(2)[r]
    return {
        "process": (r, distributed.world_size(), distributed.is_main()),
        "rows": distributed.own_rows(2).tolist(),
        "gather": distributed.all_gather(mine),
        "transposed": distributed.all_gather(mine.T.contiguous().T),
        "integers": distributed.all_gather(torch.tensor([r, r])),
        "booleans": distributed.all_gather(torch.tensor([r == 0])),
        "mean": distributed.all_reduce_mean(torch.tensor([1.0 + r, 0.0])),
        "std": distributed.all_reduce_std(mine),
        "tensor": distributed.broadcast(torch.full((2,), r)),
        "object": distributed.broadcast({"from": r}),
    }


def test_collectives_of_two_processes(pool) -> None:
    x = torch.randn(4, 3)
    for r, got in enumerate(pool.run(_everything, x)):
        assert got["process"] == (r, 2, r == 0)
        assert got["rows"] == [2 * r, 2 * r + 1]
        torch.testing.assert_close(got["gather"], x, rtol=0, atol=0)
        torch.testing.assert_close(got["transposed"], x, rtol=0, atol=0)
        assert got["integers"].tolist() == [0, 0, 1, 1]
        assert got["booleans"].tolist() == [True, False]
        assert got["mean"].tolist() == [1.5, 0.0]
        torch.testing.assert_close(got["std"], x.std(dim=0, correction=0))
        assert got["tensor"].tolist() == [0, 0]
        assert got["object"] == {"from": 0}


def _buffers_of_others() -> list[float]:
    norm = torch.nn.BatchNorm1d(2)
    norm.running_mean.fill_(5.0 + distributed.rank())
    return distributed.data_parallel(norm, torch.device("cpu")).module.running_mean.tolist()


def test_every_process_begins_with_the_buffers_of_the_first(pool) -> None:
    assert pool.run(_buffers_of_others) == [[5.0, 5.0]] * 2


def _loss(x: Tensor, everyone: Tensor, total: Tensor) -> Tensor:
    """Any loss in which every process's part depends on all rows."""
    return ((x @ everyone.T).sin().sum(dim=1) * total.cos().sum()).mean()


def _gradients(x: Tensor) -> Tensor:
    mine = x.chunk(2)[distributed.rank()].clone().requires_grad_()
    everyone = distributed.all_gather_with_grad(mine)
    total = distributed.all_reduce_sum_with_grad(mine.sum(dim=0))
    _loss(mine, everyone, total).backward()
    return mine.grad


def test_gradients_equal_those_of_the_global_batch(pool) -> None:
    x = torch.randn(6, 3, dtype=torch.float64, requires_grad=True)
    _loss(x, x, x.sum(dim=0)).backward()
    # Each process took the mean over its half: the sum of both means is twice the global mean.
    torch.testing.assert_close(torch.cat(pool.run(_gradients, x.detach())) / 2, x.grad)


def _fail() -> None:
    if distributed.rank() == 1:
        raise ValueError("a worker's own message")


@pytest.mark.slow
def test_failing_process_is_reported_and_replaced(pool) -> None:
    with pytest.raises(AssertionError, match="a worker's own message"):
        pool.run(_fail)
    assert [got["process"][0] for got in pool.run(_everything, torch.zeros(2, 1))] == [0, 1]


def _sum_of_ranks(start: int) -> int:
    return start + int(distributed.all_reduce_sum_with_grad(torch.tensor(float(distributed.rank()))))


@pytest.mark.slow
def test_launch_returns_the_results_by_rank() -> None:
    assert distributed.launch(_sum_of_ranks, 2, 40) == [41, 41]


def test_setup_in_one_process_and_its_errors(monkeypatch) -> None:
    monkeypatch.delenv("RANK", raising=False)
    assert distributed.setup(device="cpu") == torch.device("cpu")
    assert not distributed.initialized()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert distributed.setup() == torch.device("cpu")
    for device in ["abacus"] + ["cuda"] * (torch.cuda.device_count() == 0):
        with pytest.raises(UserError, match="use cpu, cuda or cuda:0"):
            distributed.setup(device=device)


def test_setup_rejects_more_processes_than_gpus(monkeypatch) -> None:
    monkeypatch.setitem(os.environ, "RANK", "3")
    monkeypatch.setitem(os.environ, "LOCAL_RANK", "3")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(UserError, match="at most 2 processes"):
        distributed.setup()


def _overwrite(x: Tensor) -> float:
    distributed.barrier()
    x += 1 + distributed.rank()
    distributed.barrier()
    return float(x)


@pytest.mark.slow
def test_launched_processes_share_no_memory() -> None:
    x = torch.zeros(())
    assert distributed.launch(_overwrite, 2, x) == [1.0, 2.0]
    assert x == 0


def test_default_device_is_a_gpu_where_there_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    found = {}
    for cuda, mps in ((True, True), (False, True), (False, False)):
        monkeypatch.setattr(torch.cuda, "is_available", lambda here=cuda: here)
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda here=mps: here)
        found[cuda, mps] = distributed.default_device().type
    assert found == {(True, True): "cuda", (False, True): "mps", (False, False): "cpu"}


@pytest.mark.parametrize(
    "environment",
    [
        {"RANK": "abc"},
        {"RANK": "0"},
        {"RANK": "0", "LOCAL_RANK": "first"},
        {"RANK": "3", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "29511"},  # would wait for ever
    ],
)
def test_an_environment_that_is_no_group_is_one_line(environment: dict, monkeypatch) -> None:
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match="unset RANK for one process"):
        distributed.setup("cpu")


def test_a_device_without_numbers_is_refused() -> None:
    with pytest.raises(UserError, match="device meta cannot be used"):
        distributed.setup("meta")


def test_a_restarted_group_reads_nothing_of_the_one_before(monkeypatch) -> None:
    """torchrun's store outlives a restart: a process must not take the address that a dead one has left there."""
    server = dist.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    own = threading.local()

    def rendezvous(url: str) -> Iterator[tuple]:
        yield dist.TCPStore("localhost", server.port, is_master=False, wait_for_workers=False), own.rank, 2

    monkeypatch.setattr(dist, "rendezvous", rendezvous)

    def join(rank: int, late: float, start: int) -> bytes:
        own.rank = rank
        time.sleep(late)
        store = distributed._fresh_store()["store"]
        if rank == 0:
            time.sleep(0.05)  # the other one looks first
            store.set("address", str(start))
        return store.get("address")

    with ThreadPoolExecutor(2) as threads:
        for start in range(6):  # either comes first
            late = (0.1, 0.0) if start % 2 else (0.0, 0.1)
            found = list(threads.map(join, (0, 1), late, (start, start)))
            assert found == [str(start).encode()] * 2
