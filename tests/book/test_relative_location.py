"""What the chapter on relative location and jigsaw claims of lenses, colors and permutations."""

import itertools

import pytest
import torch
from torch import Tensor

from sslbook.book.chapters.relative_location.fields import NO_LENS, lens, photograph, waves
from sslbook.book.chapters.relative_location.variants import (
    Blind,
    dropped,
    near_permutations,
    normalized,
    projected,
    without_jitter,
)
from sslbook.data.loader import Batch
from sslbook.methods.jigsaw import permutation_set


def distances(permutations: Tensor) -> Tensor:
    """Hamming distances of all ordered pairs of different permutations."""
    found = (permutations[:, None] != permutations[None]).sum(2)
    return found[~torch.eye(len(permutations), dtype=torch.bool)]


def largest_average(n: int, count: int) -> float:
    """The bound: at every position the values stand as evenly as can be."""
    low, more = divmod(count, n)
    return n * (count**2 - more * (low + 1) ** 2 - (n - more) * low**2) / (count * (count - 1))


@pytest.mark.parametrize("count", [10, 100])
def test_the_average_distance_is_bounded_and_the_package_nearly_reaches_it(count: int) -> None:
    mean = distances(permutation_set(count)).double().mean().item()
    assert 0.999 * largest_average(9, count) < mean <= largest_average(9, count) + 1e-9


def test_no_set_of_permutations_of_three_exceeds_the_bound() -> None:
    everything = torch.tensor(list(itertools.permutations(range(3))))
    for count in range(2, 7):
        best = max(
            distances(everything[list(chosen)]).double().mean().item()
            for chosen in itertools.combinations(range(6), count)
        )
        assert best == pytest.approx(largest_average(3, count))  # reached for every size


def test_near_permutations_are_near() -> None:
    found = near_permutations(100)
    assert len(found.unique(dim=0)) == 100
    assert torch.equal(found.sort(dim=1).values, torch.arange(9).expand(100, 9))
    assert distances(found).min() == 2
    assert (found != torch.arange(9)).sum(1).max() == 3


def test_fields_have_the_covariance_they_promise() -> None:
    x = waves(4000, size=8, length=3.0)[:, 0]
    for distance in (0, 1, 3):
        product = (x[:, 0, 0] * x[:, 0, distance]).mean().item()
        assert product == pytest.approx(torch.tensor(-(distance**2) / 18).exp().item(), abs=0.06)


def test_projection_removes_the_difference_of_red_and_blue_only_where_the_lens_treats_them_alike() -> None:
    same, opposite = waves(4, kappa=(0.1, 0.0, 0.1)), waves(4, kappa=(0.1, 0.0, -0.1))
    assert torch.equal(same[:, 0], same[:, 2])
    assert not torch.allclose(same[:, 0], same[:, 1], atol=0.1)
    for x, remains in ((same, False), (opposite, True)):
        y = projected(x)
        assert ((y[:, 0] - y[:, 2]).abs().max() > 0.1) == remains
        torch.testing.assert_close((y * torch.tensor([-1.0, 2.0, -1.0])[:, None, None]).sum(1), torch.zeros(4, 32, 32))


def test_a_lens_before_images_leaves_their_center_and_without_strength_all_of_them() -> None:
    x = photograph(waves(3))
    assert torch.equal(lens(x, NO_LENS), x)
    moved = (lens(x, (0.1, 0.0, 0.1)).float() - x).abs()
    assert moved[:, 1].max() <= 1
    assert moved[:, 0, 14:18, 14:18].mean() < moved[:, 0, :4].mean() / 2


def test_dropping_leaves_one_color_and_faint_noise() -> None:
    torch.manual_seed(0)
    x = torch.randn(50, 3, 8, 8)
    y = dropped(x)
    kept = (y == x).flatten(2).all(2)
    assert torch.equal(kept.sum(1), torch.ones(50, dtype=torch.long))
    assert kept.any(0).all()
    assert 0.005 < y[~kept].std() < 0.02


def test_patches_are_normalized_one_by_one() -> None:
    y = normalized(torch.randn(5, 3, 6, 6) * torch.rand(5, 3, 1, 1) + 3)
    torch.testing.assert_close(y.mean((2, 3)), torch.zeros(5, 3), atol=1e-4, rtol=0)
    torch.testing.assert_close(y.std((2, 3)), torch.ones(5, 3), atol=0.05, rtol=0)


def test_without_jitter_the_patches_are_the_middles_of_their_cells() -> None:
    x = torch.arange(32.0)[None, None, :, None].expand(1, 1, 32, 32)
    (kept,) = without_jitter(Batch((x,), torch.arange(1), torch.zeros(1, dtype=torch.long)), 10, 8).views
    assert kept[0, 0, :, 0].tolist() == [*range(2, 10), *range(12, 20), *range(22, 30)]


def test_a_blind_head_does_not_see_the_center() -> None:
    head, pair = Blind(torch.nn.Linear(6, 8)), torch.randn(4, 6)
    other = pair.clone()
    other[:, :3] += 1
    assert torch.equal(head(pair), head(other))
    other[:, 3:] += 1
    assert not torch.equal(head(pair), head(other))
