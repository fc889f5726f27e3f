"""The closed forms of the chapter *Rotation prediction* against a grid of angles."""

import pytest
import torch

from sslbook.book.chapters.rotation import exercises


@pytest.mark.parametrize("folds", [1, 3, 5])
@pytest.mark.parametrize("half_width", [5.0, 22.5, 60.0, 100.0, 180.0])
def test_closed_form_against_a_grid_of_angles(half_width: float, folds: int) -> None:
    """Densities of the four classes on the circle of angles that a shape of that symmetry leaves visible."""
    angle = (torch.arange(7200, dtype=torch.float64) + 0.5) / 20
    density = torch.zeros(4, 7200, dtype=torch.float64)
    for rotation in range(4):
        for wound in range(-6, 13):
            density[rotation] += (angle - 90 * rotation * folds % 360 + 360 * wound).abs() < half_width * folds
    joint = density / density.sum()
    floor = exercises.loss_floor.solution(joint)
    assert exercises.best_accuracy(half_width, folds) == pytest.approx(joint.amax(0).sum().item(), abs=2e-3)
    assert exercises.smallest_loss(half_width, folds) == pytest.approx(floor.item(), abs=2e-3)
