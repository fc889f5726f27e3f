"""What chapters run in two processes is what one process gets."""

import pytest
import torch

from sslbook.book.chapters.simclr import exercises as contrast
from sslbook.methods import simclr


def test_constant_candidates_leave_the_loss_but_not_the_gradient() -> None:
    z_1, z_2 = torch.randn(2, 12, 5, generator=torch.Generator().manual_seed(0))
    found = contrast.shard_gradients(z_1, z_2, 0.2)
    right = z_1.clone().requires_grad_()
    value = simclr.nt_xent(right, z_2, 0.2)
    (gradient,) = torch.autograd.grad(value, right)
    torch.testing.assert_close(found["gather_with_grad"][1], gradient)
    assert found["gather"][0] == pytest.approx(value.item(), rel=1e-5)
    detached = found["gather"][1]
    assert detached.norm() < 0.7 * gradient.norm()  # what others want of a row is lost: about half
