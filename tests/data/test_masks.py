import pytest
import torch

from sslbook import distributed
from sslbook.data.masks import block_mask, block_size, multi_block_mask
from sslbook.errors import UserError
from sslbook.schedules import Clock


def test_beits_masks_hide_what_the_authors_hide() -> None:
    """The authors' code over 10,000 draws: 74.48 of 196 on average, at least 64."""
    count = block_mask(torch.arange(10_000), (14, 14), 75, Clock()).sum(dim=1)
    assert float(count.float().mean()) == pytest.approx(74.48, abs=0.05)
    assert count.max() == 75
    assert 58 <= count.min() <= 68


def test_they_are_made_of_blocks() -> None:
    mask = block_mask(torch.arange(500), (14, 14), 75, Clock()).unflatten(1, (14, 14))
    alike = (mask[:, :, 1:] == mask[:, :, :-1]).float().mean()
    p = float(mask.float().mean())
    assert alike > p**2 + (1 - p) ** 2 + 0.2  # what patches hidden one by one would give
    everywhere = mask.float().mean(dim=0)
    assert everywhere.min() > 0  # corners too
    assert everywhere.max() < 0.8


def test_exactly_so_many() -> None:
    index = torch.arange(300)
    loose = block_mask(index, (14, 14), 75, Clock(seed=2))
    exact = block_mask(index, (14, 14), 75, Clock(seed=2), exact=True)
    assert (exact.sum(dim=1) == 75).all()
    assert (exact | loose == exact).all()  # the blocks remain
    assert (loose.sum(dim=1) < 75).any()


def test_a_number_for_every_image() -> None:
    wanted = torch.arange(100) % 30
    mask = block_mask(torch.arange(100), (7, 9), wanted, Clock(), min_block=4)
    assert (mask.sum(dim=1) <= wanted).all()
    assert (mask.sum(dim=1)[wanted == 0] == 0).all()
    exact = block_mask(torch.arange(100), (7, 9), wanted, Clock(), min_block=4, exact=True)
    assert torch.equal(exact.sum(dim=1), wanted)


@pytest.mark.parametrize("exact", [True, False])
def test_masks_depend_on_image_and_epoch_alone(exact: bool) -> None:
    index = torch.tensor([5, 900, 5, 31])
    clock = Clock(step=3, steps_per_epoch=2, seed=7)
    mask = block_mask(index, (6, 6), 14, clock, min_block=4, exact=exact)
    assert torch.equal(mask[0], mask[2])
    order = torch.tensor([3, 1, 0, 2])
    assert torch.equal(block_mask(index[order], (6, 6), 14, clock, min_block=4, exact=exact), mask[order])
    assert torch.equal(block_mask(index[1:2], (6, 6), 14, clock, min_block=4, exact=exact)[0], mask[1])
    for other in (Clock(step=4, steps_per_epoch=2, seed=7), Clock(step=3, steps_per_epoch=2, seed=8)):
        assert not torch.equal(block_mask(index, (6, 6), 14, other, min_block=4, exact=exact), mask)


@pytest.mark.parametrize(("num", "what"), [(0, "nothing to predict"), (196, "nothing to see")])
def test_masks_of_nothing_are_refused(num: int, what: str) -> None:
    with pytest.raises(UserError, match=f"leaves {what}: hide at least 1 and at most 195"):
        block_mask(torch.arange(2), (14, 14), num, Clock())


@pytest.mark.parametrize("grid", [(14, 14), (8, 8), (6, 9)])
def test_targets_are_never_in_the_context(grid: tuple[int, int]) -> None:
    for step in range(20):
        context, targets = multi_block_mask(torch.arange(50), grid, Clock(step=step), num_targets=3)
        assert targets.shape[:2] == (50, 3)
        assert int(min(context.min(), targets.min())) >= 0
        assert int(max(context.max(), targets.max())) < grid[0] * grid[1]
        assert not (context[:, :, None] == targets.flatten(1)[:, None]).any()
        assert (context[:, 1:] > context[:, :-1]).all()  # each patch once


def test_targets_are_blocks_of_the_papers_size() -> None:
    areas = []
    for step in range(200):
        _, targets = multi_block_mask(torch.arange(2), (14, 14), Clock(step=step))
        rows, columns = targets // 14, targets % 14
        height, width = rows[0, 0].unique().numel(), columns[0, 0].unique().numel()
        assert targets.shape[2] == height * width
        assert ((rows.amax(dim=2) - rows.amin(dim=2)) == height - 1).all()
        assert ((columns.amax(dim=2) - columns.amin(dim=2)) == width - 1).all()
        assert rows.max() < 13  # the last place is never the beginning, and blocks end before the last row
        areas.append(height * width / 196)
    assert 0.13 < min(areas) < 0.16
    assert 0.19 < max(areas) < 0.22


def test_one_number_sets_area_and_aspect() -> None:
    assert block_size(0.0, (14, 14), (0.15, 0.2), (0.75, 1.5)) == (5, 6)
    assert block_size(0.999, (14, 14), (0.15, 0.2), (0.75, 1.5)) == (8, 5)
    assert block_size(0.5, (14, 14), (0.85, 1.0), (1.0, 1.0)) == (13, 13)
    assert block_size(0.0, (2, 2), (0.15, 0.2), (0.75, 1.5)) == (1, 1)


def test_targets_depend_on_image_epoch_and_step_alone() -> None:
    index, clock = torch.tensor([5, 900, 5, 31]), Clock(step=3, steps_per_epoch=2, seed=7)
    context, targets = multi_block_mask(index, (8, 8), clock)
    assert torch.equal(targets[0], targets[2])
    alone, target = multi_block_mask(index[1:2], (8, 8), clock)
    assert torch.equal(target[0], targets[1])
    assert torch.equal(alone[0, : context.shape[1]], context[1])  # only its length is that of the batch


def _context(index: torch.Tensor) -> torch.Tensor:
    n = len(index) // distributed.world_size()
    return multi_block_mask(index[distributed.rank() * n : (distributed.rank() + 1) * n], (8, 8), Clock())[0]


def test_contexts_are_as_short_as_the_shortest_of_all_processes(pool) -> None:
    index = torch.arange(8)
    assert torch.equal(torch.cat(pool.run(_context, index)), _context(index))
    assert _context(index[:4]).shape != _context(index[4:]).shape


def test_targets_that_leave_no_context_are_refused() -> None:
    with pytest.raises(UserError, match="leave no context in 4x4 patches: use fewer or smaller targets"):
        multi_block_mask(torch.arange(50), (4, 4), Clock(), num_targets=20, target_scale=(0.5, 0.6))
    with pytest.raises(UserError, match="use smaller patches"):
        multi_block_mask(torch.arange(2), (1, 5), Clock())
