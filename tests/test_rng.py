import torch

from sslbook import rng


def test_numbers_depend_on_their_key_alone() -> None:
    index = torch.tensor([5, 0, 123_456_789])
    row = rng.uniform(3, 7, index, 1, 4)
    torch.testing.assert_close(row[1], rng.uniform(3, 7, torch.tensor([0]), 1, 4)[0], rtol=0, atol=0)
    torch.testing.assert_close(row, rng.uniform(3, 7, index, 1, 9)[:, :4], rtol=0, atol=0)
    stored = [0.857912540435791, 0.3988015055656433, 0.33126145601272583]  # on every machine, in every version
    assert row[0, :3].tolist() == stored
    assert rng.permutation(1, 2, 8).tolist() == [6, 7, 1, 0, 3, 2, 4, 5]


def test_every_part_of_the_key_matters() -> None:
    index = torch.arange(1000)
    base = rng.uniform(0, 0, index, 0, 3)
    for other in ((1, 0, 0), (0, 1, 0), (0, 0, 1)):
        rows = rng.uniform(other[0], other[1], index, other[2], 3)
        assert abs(torch.corrcoef(torch.stack([base.flatten(), rows.flatten()]))[0, 1]) < 0.06
        assert not torch.equal(base, rows)
    assert base.unique().numel() > 2990


def test_uniform_is_uniform() -> None:
    x = rng.uniform(0, 0, torch.arange(20_000), 0, 5)
    assert x.min() >= 0
    assert x.max() < 1
    counts = torch.histc(x, bins=50, min=0, max=1)
    expected = x.numel() / 50
    assert ((counts - expected) ** 2 / expected).sum() < 100  # chi-squared with 49 degrees of freedom: 99.998 %
    correlation = torch.corrcoef(x.T) - torch.eye(5)
    assert correlation.abs().max() < 0.03


def test_permutation() -> None:
    order = rng.permutation(1, 2, 1001)
    assert torch.equal(order.sort().values, torch.arange(1001))
    assert torch.equal(order, rng.permutation(1, 2, 1001))
    assert not torch.equal(order, rng.permutation(1, 3, 1001))
    assert (order == torch.arange(1001)).sum() < 10
