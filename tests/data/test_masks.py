import pytest
import torch

from sslbook import distributed, rng
from sslbook.data.masks import block_mask, block_size, multi_block_mask, uniform_mask
from sslbook.errors import UserError
from sslbook.schedules import Clock


def test_uniform_mask_is_uniform_and_depends_only_on_image_and_epoch() -> None:
    index, clock = torch.arange(4000), Clock(step=7, steps_per_epoch=2, seed=5)
    mask = uniform_mask(index, 16, 6, clock)
    assert torch.equal(mask.sum(dim=1), torch.full((4000,), 6))
    torch.testing.assert_close(mask.float().mean(dim=0), torch.full((16,), 6 / 16), rtol=0, atol=0.04)
    # The definition: the patches with the smallest random numbers.
    noise = rng.uniform(5, 3, index[:1], rng.METHOD, 16)[0].tolist()
    assert mask[0].nonzero()[:, 0].tolist() == sorted(sorted(range(16), key=noise.__getitem__)[:6])
    assert torch.equal(uniform_mask(index[37:38], 16, 6, clock)[0], mask[37])
    for other in (Clock(step=8, steps_per_epoch=2, seed=5), Clock(step=7, steps_per_epoch=2, seed=6)):
        assert not torch.equal(uniform_mask(index, 16, 6, other), mask)


def test_block_mask_count_matches_authors_code() -> None:
    """The authors' code over 10,000 masks: 74.48 of 196 on average, at least 64."""
    count = block_mask(torch.arange(10_000), (14, 14), 75, Clock()).sum(dim=1)
    assert float(count.float().mean()) == pytest.approx(74.48, abs=0.05)
    assert count.max() == 75
    assert 58 <= count.min() <= 68


def test_masked_patches_form_blocks() -> None:
    mask = block_mask(torch.arange(500), (14, 14), 75, Clock()).unflatten(1, (14, 14))
    alike = (mask[:, :, 1:] == mask[:, :, :-1]).float().mean()
    p = float(mask.float().mean())
    assert alike > p**2 + (1 - p) ** 2 + 0.2  # a uniform mask gives p**2 + (1 - p)**2
    everywhere = mask.float().mean(dim=0)
    assert everywhere.min() > 0  # corners too
    assert everywhere.max() < 0.8


def test_exact_masks_have_the_given_count() -> None:
    index = torch.arange(300)
    loose = block_mask(index, (14, 14), 75, Clock(seed=2))
    exact = block_mask(index, (14, 14), 75, Clock(seed=2), exact=True)
    assert (exact.sum(dim=1) == 75).all()
    assert (exact | loose == exact).all()  # the blocks remain
    assert (loose.sum(dim=1) < 75).any()


def test_one_count_per_image() -> None:
    count_per_image = torch.arange(100) % 30
    mask = block_mask(torch.arange(100), (7, 9), count_per_image, Clock(), min_block=4)
    assert (mask.sum(dim=1) <= count_per_image).all()
    assert (mask.sum(dim=1)[count_per_image == 0] == 0).all()
    exact = block_mask(torch.arange(100), (7, 9), count_per_image, Clock(), min_block=4, exact=True)
    assert torch.equal(exact.sum(dim=1), count_per_image)


@pytest.mark.parametrize("exact", [True, False])
def test_block_mask_depends_only_on_image_and_epoch(exact: bool) -> None:
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
def test_rejects_masks_of_no_or_all_patches(num: int, what: str) -> None:
    with pytest.raises(UserError, match=f"leaves {what}: mask at least 1 and at most 195"):
        block_mask(torch.arange(2), (14, 14), num, Clock())


@pytest.mark.parametrize("grid", [(14, 14), (8, 8), (6, 9)])
def test_context_excludes_targets(grid: tuple[int, int]) -> None:
    for step in range(20):
        context, targets = multi_block_mask(torch.arange(50), grid, Clock(step=step), num_targets=3)
        assert targets.shape[:2] == (50, 3)
        assert int(min(context.min(), targets.min())) >= 0
        assert int(max(context.max(), targets.max())) < grid[0] * grid[1]
        assert not (context[:, :, None] == targets.flatten(1)[:, None]).any()
        assert (context[:, 1:] > context[:, :-1]).all()  # each patch once


def test_target_blocks_have_the_papers_size() -> None:
    areas = []
    for step in range(200):
        _, targets = multi_block_mask(torch.arange(2), (14, 14), Clock(step=step))
        rows, columns = targets // 14, targets % 14
        height, width = rows[0, 0].unique().numel(), columns[0, 0].unique().numel()
        assert targets.shape[2] == height * width
        assert ((rows.amax(dim=2) - rows.amin(dim=2)) == height - 1).all()
        assert ((columns.amax(dim=2) - columns.amin(dim=2)) == width - 1).all()
        assert rows.max() < 13  # no block begins at the last row where it would fit
        areas.append(height * width / 196)
    assert 0.13 < min(areas) < 0.16
    assert 0.19 < max(areas) < 0.22


def test_block_size_from_one_number() -> None:
    assert block_size(0.0, (14, 14), (0.15, 0.2), (0.75, 1.5)) == (5, 6)
    assert block_size(0.999, (14, 14), (0.15, 0.2), (0.75, 1.5)) == (8, 5)
    assert block_size(0.5, (14, 14), (0.85, 1.0), (1.0, 1.0)) == (13, 13)
    assert block_size(0.0, (2, 2), (0.15, 0.2), (0.75, 1.5)) == (1, 1)


def test_targets_depend_only_on_image_epoch_and_step() -> None:
    index, clock = torch.tensor([5, 900, 5, 31]), Clock(step=3, steps_per_epoch=2, seed=7)
    context, targets = multi_block_mask(index, (8, 8), clock)
    assert torch.equal(targets[0], targets[2])
    alone, target = multi_block_mask(index[1:2], (8, 8), clock)
    assert torch.equal(target[0], targets[1])
    assert torch.equal(alone[0, : context.shape[1]], context[1])  # only the length depends on the batch


def _context(index: torch.Tensor) -> torch.Tensor:
    n = len(index) // distributed.world_size()
    return multi_block_mask(index[distributed.rank() * n : (distributed.rank() + 1) * n], (8, 8), Clock())[0]


@pytest.mark.slow
def test_contexts_are_cut_to_the_shortest_of_all_processes(pool) -> None:
    index = torch.arange(8)
    assert torch.equal(torch.cat(pool.run(_context, index)), _context(index))
    assert _context(index[:4]).shape != _context(index[4:]).shape


def test_rejects_targets_that_leave_no_context() -> None:
    with pytest.raises(UserError, match="leave no context in 4x4 patches: use fewer or smaller targets"):
        multi_block_mask(torch.arange(50), (4, 4), Clock(), num_targets=20, target_scale=(0.5, 0.6))
    with pytest.raises(UserError, match="smaller patches"):
        multi_block_mask(torch.arange(2), (1, 1), Clock())
