import torch
from torch import Tensor

from sslbook import distributed
from sslbook.nn import Queue


def test_holds_the_latest_rows_and_wraps_around() -> None:
    queue = Queue(5, 1)
    seen = []
    for start in range(0, 21, 3):
        rows = torch.arange(start, start + 3.0)[:, None]
        queue.push(rows)
        seen += rows.flatten().tolist()
        assert set(seen[-5:]) <= set(queue.rows.flatten().tolist())
    assert int(queue.pointer) == len(seen) % 5


def test_push_of_more_rows_than_its_size() -> None:
    queue = Queue(4, 1)
    queue.push(torch.arange(11.0)[:, None])
    assert sorted(queue.rows.flatten().tolist()) == [7, 8, 9, 10]
    queue.push(torch.tensor([[11.0]]))
    assert sorted(queue.rows.flatten().tolist()) == [8, 9, 10, 11]


def test_initial_rows_are_unit_vectors_in_float32() -> None:
    queue = Queue(7, 3)
    torch.testing.assert_close(queue.rows.norm(dim=1), torch.ones(7))
    queue.push(torch.ones(2, 3, dtype=torch.bfloat16, requires_grad=True))
    assert queue.rows.dtype == torch.float32
    assert not queue.rows.requires_grad
    assert set(queue.state_dict()) == {"rows", "pointer"}
    assert not list(queue.parameters())


def _push(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(distributed.rank())  # the start may not depend on a process's random state
    queue = Queue(7, 2)
    start = queue.rows.clone()
    for part in x:
        queue.push(part.chunk(2)[distributed.rank()])
    return start, queue.rows, queue.pointer


def test_two_processes_are_one(pool) -> None:
    x = torch.randn(3, 4, 2)
    queue = Queue(7, 2)
    start = queue.rows.clone()
    for part in x:
        queue.push(part)
    for got in pool.run(_push, x):
        for a, b in zip(got, (start, queue.rows, queue.pointer)):
            torch.testing.assert_close(a, b, rtol=0, atol=0)
