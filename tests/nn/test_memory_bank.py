import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from sslbook import distributed
from sslbook.nn import MemoryBank


def bank(size: int, dim: int) -> MemoryBank:
    memory = MemoryBank(dim)
    memory.allocate(size)
    return memory


def test_initial_rows_are_reproducible_unit_vectors() -> None:
    torch.manual_seed(1)
    one = bank(9, 4)
    torch.manual_seed(2)
    assert torch.equal(one.rows, bank(9, 4).rows)
    torch.testing.assert_close(one.rows.norm(dim=1), torch.ones(9))
    assert set(one.state_dict()) == {"rows"}
    assert not list(one.parameters())


def test_update_is_a_normalized_moving_average() -> None:
    memory = bank(9, 4)
    before, x = memory.rows.clone(), torch.randn(2, 4, requires_grad=True)
    memory.update(torch.tensor([7, 2]), x, 0.75)
    for i, row in ((7, x[0]), (2, x[1])):
        expected = 0.75 * before[i] + 0.25 * row.detach()
        torch.testing.assert_close(memory.rows[i], expected / expected.norm())
    others = [0, 1, 3, 4, 5, 6, 8]
    assert torch.equal(memory.rows[others], before[others])
    assert not memory.rows.requires_grad


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rows_stay_float32(dtype: torch.dtype) -> None:
    memory = bank(3, 4)
    memory.update(torch.tensor([0]), torch.randn(1, 4, dtype=dtype), 0.5)
    assert memory.rows.dtype == torch.float32


def test_last_of_repeated_images_counts() -> None:
    memory, x = bank(3, 4), torch.randn(4, 4)
    before = memory.rows.clone()
    memory.update(torch.tensor([1, 2, 1, 1]), x, 0.5)
    torch.testing.assert_close(memory.rows[1], F.normalize(before[1] + x[3], dim=0))
    torch.testing.assert_close(memory.rows[2], F.normalize(before[2] + x[1], dim=0))


def _update(index: Tensor, x: Tensor) -> Tensor:
    torch.manual_seed(distributed.rank())
    memory, r = bank(5, 4), distributed.rank()
    memory.update(index.chunk(2)[r], x.chunk(2)[r], 0.5)
    return memory.rows


def test_two_processes_are_one(pool) -> None:
    index, x = torch.tensor([4, 1, 1, 0]), torch.randn(4, 4)  # number 1 is in both
    memory = bank(5, 4)
    memory.update(index, x, 0.5)
    for rows in pool.run(_update, index, x):
        assert torch.equal(rows, memory.rows)
