import pytest
import torch

from sslbook import rng
from sslbook.data.patch_grid import STREAM, check_patches, cut_patches
from sslbook.data.views import View
from sslbook.errors import UserError
from sslbook.schedules import Clock


@pytest.mark.parametrize(("side", "cell", "patch"), [(16, 5, 4), (255, 85, 64), (11, 3, 3), (4, 1, 1)])
def test_patches_pixel_by_pixel(side: int, cell: int, patch: int) -> None:
    images, index, clock = torch.rand(2, 3, side, side + 2), torch.tensor([4, 9]), Clock(5, 9, 2, seed=3)
    patches = cut_patches(images, index, cell, patch, clock)
    assert patches.shape == (2, 9, 3, patch, patch)
    u = rng.uniform(3, 2, index, STREAM, 18)
    for i in range(2):
        for row in range(3):
            for column in range(3):
                position = 3 * row + column
                down, right = (int(u[i, position + half] * (cell - patch + 1)) for half in (0, 9))
                top = (side - 3 * cell) // 2 + row * cell + down
                left = (side + 2 - 3 * cell) // 2 + column * cell + right
                expected = images[i, :, top : top + patch, left : left + patch]
                assert torch.equal(patches[i, position], expected)


def test_jitter_is_uniform_and_reproducible() -> None:
    images = torch.arange(9.0).expand(3000, 1, 9, 9)  # a pixel's value is its column
    patches = cut_patches(images, torch.arange(3000), 3, 2, Clock())
    starts = patches[:, 4, 0, 0, 0]
    assert set(starts.tolist()) == {3.0, 4.0}
    assert abs(float((starts == 3).float().mean()) - 0.5) < 0.05
    alone = cut_patches(images[:1], torch.tensor([17]), 3, 2, Clock())
    assert torch.equal(alone[0], patches[17])
    later = cut_patches(images, torch.arange(3000), 3, 2, Clock(1, 2, 1))
    assert not torch.equal(later, patches)
    assert not torch.equal(patches[:, 3], patches[:, 4] - 3)  # each patch has its own jitter


def accuracy_from_borders(cell: int, patch: int) -> float:
    """Fraction of right neighbors that the better matching pair of borders identifies as right, not left."""
    noise = torch.randn(500, 1, 24, 26, generator=torch.Generator().manual_seed(0))
    images = (noise[..., :-2] + noise[..., 1:-1] + noise[..., 2:]) / 3**0.5  # independent of what is 3 pixels away
    patches = cut_patches(images, torch.arange(500), cell, patch, Clock())
    center, right = patches[:, 4], patches[:, 5]
    as_right = (center[..., -1] - right[..., 0]).square().mean(dim=(1, 2))
    as_left = (center[..., 0] - right[..., -1]).square().mean(dim=(1, 2))
    return float((as_right < as_left).float().mean())


def test_gaps_remove_the_border_shortcut() -> None:
    assert accuracy_from_borders(8, 8) > 0.8
    assert 0.4 < accuracy_from_borders(8, 4) < 0.65


def test_rejects_sizes_that_do_not_fit() -> None:
    check_patches(View(size=255), 85, 64)
    check_patches(View(size=16), 5, 5)
    with pytest.raises(UserError, match=r"set view\.size to at least 255 or cell_size to at most 74"):
        check_patches(View(size=224), 85, 64)
    with pytest.raises(UserError, match="set patch_size to at least 1 and at most 5"):
        check_patches(View(size=16), 5, 6)
    with pytest.raises(UserError, match="a patch of 0 pixels"):
        check_patches(View(size=16), 5, 0)
