"""What the ablations of the chapter on decorrelation change, and that they change nothing else."""

import pytest
import torch
from torch import Tensor

from sslbook.book.chapters.decorrelation.experiments import VARIANTS, make, shorten, spectrum
from sslbook.book.chapters.decorrelation.variants import OtherVariance, hinge_on_variance, no_hinge
from sslbook.data.loader import Batch
from sslbook.methods.vicreg import VICReg, variance_loss
from sslbook.schedules import Clock


def batch(images: int = 32) -> Batch:
    generator = torch.Generator().manual_seed(0)
    views = torch.randn(2, images, 3, 16, 16, generator=generator)
    return Batch(tuple(views), torch.arange(images), torch.zeros(images, dtype=torch.int64))


def slope(term, z: Tensor) -> Tensor:
    z = z.clone().requires_grad_()
    return torch.autograd.grad(term(z), z)[0]


def test_with_the_hinge_on_the_standard_deviation_it_is_vicreg() -> None:
    other, own = make(0, dim=16, term=variance_loss), make(0, dim=16)
    assert isinstance(other, OtherVariance)
    assert not isinstance(own, OtherVariance)
    a, b = (method(batch(), Clock()) for method in (other, own))
    for name in b:
        torch.testing.assert_close(a[name], b[name])


def test_the_push_of_a_hinge_on_the_variance_fades_and_that_on_the_standard_deviation_does_not() -> None:
    z = torch.randn(64, 4, generator=torch.Generator().manual_seed(0)).double()
    ratios = [
        (slope(term, 0.05 * z).norm() / slope(term, 0.5 * z).norm()).item()
        for term in (hinge_on_variance, variance_loss)
    ]
    assert ratios[0] == pytest.approx(0.1, rel=1e-6)
    assert ratios[1] > 0.95


def test_without_the_hinge_large_stds_are_rewarded_and_small_ones_treated_alike() -> None:
    z = torch.randn(64, 4, generator=torch.Generator().manual_seed(0)).double()
    torch.testing.assert_close(no_hinge(0.3 * z), variance_loss(0.3 * z))
    assert no_hinge(3 * z) < 0
    assert variance_loss(3 * z) == 0


def test_a_slice_that_does_not_divide_the_batch_leaves_images_out() -> None:
    short = shorten(batch(32), 24)
    assert [len(x) for x in (*short.views, short.index, short.label)] == [24] * 4


def test_the_spectrum_is_that_of_the_covariance() -> None:
    z = torch.randn(50, 6, generator=torch.Generator().manual_seed(0)) @ torch.diag(torch.arange(1.0, 7.0))
    expected = torch.linalg.eigvalsh(torch.cov(z.T.double())).flip(0)
    torch.testing.assert_close(torch.tensor(spectrum(z)).double(), expected, rtol=1e-3, atol=0)


@pytest.mark.parametrize("row", VARIANTS)
def test_every_variant_takes_a_step(row: str) -> None:
    method = make(0, **VARIANTS[row])
    size = VARIANTS[row].get("slice_size", 128)
    out = method(shorten(batch(128), 128 // size * size), Clock())
    assert out["loss"].isfinite()
    assert isinstance(method, VICReg) == ("name" not in VARIANTS[row])
