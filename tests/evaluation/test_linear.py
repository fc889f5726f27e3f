"""The linear probe against scikit-learn, and its promises: determinism, no peeking, no chance consumed."""

import pytest
import torch
from sklearn.linear_model import LogisticRegression
from torch import Tensor

from sslbook.errors import UserError
from sslbook.evaluation import linear


def overlapping(n: int, seed: int, dim: int = 12, classes: int = 4) -> tuple[Tensor, Tensor]:
    centers = torch.randn(classes, dim, generator=torch.Generator().manual_seed(0))
    g = torch.Generator().manual_seed(seed)
    y = torch.randint(classes, (n,), generator=g)
    x = centers[y] + 1.5 * torch.randn(n, dim, generator=g)
    return x * torch.logspace(-3, 3, dim) + 5, y  # features of very different size, off center


def test_as_good_as_an_exact_solver() -> None:
    train_x, train_y = overlapping(1500, seed=1)
    test_x, test_y = overlapping(1000, seed=2)
    mean, deviation = train_x.mean(0), train_x.std(0)
    exact = LogisticRegression(max_iter=1000).fit((train_x - mean) / deviation, train_y)
    expected = 100 * exact.score((test_x - mean) / deviation, test_y)
    result = linear.probe(train_x, train_y, test_x, test_y)
    assert expected < 95
    assert result.accuracy == pytest.approx(expected, abs=1.5)
    assert set(result.validation) == set(linear.LRS)
    assert result.validation[result.lr] == max(result.validation.values())


def test_gradient_is_that_of_cross_entropy() -> None:
    """One full-batch step from zero moves every head by its learning rate times autograd's gradient."""
    x, y = overlapping(64, seed=3)
    heads = linear._Heads.fit(x, y, torch.arange(64), 4, (0.1, 0.5), 1, 64, 0, torch.device("cpu"))
    weight = torch.zeros(13, 4, requires_grad=True)
    torch.nn.functional.cross_entropy(heads.standardized(x) @ weight, y).backward()
    expected = torch.cat([-0.1 * weight.grad, -0.5 * weight.grad], dim=1)
    torch.testing.assert_close(heads.weight, expected, atol=1e-6, rtol=1e-5)


def test_same_seed_same_result_and_no_chance_consumed() -> None:
    train_x, train_y = overlapping(300, seed=4)
    state = torch.random.get_rng_state()
    first = linear.probe(train_x, train_y, train_x, train_y, epochs=5)
    assert torch.equal(torch.random.get_rng_state(), state)
    torch.manual_seed(123)
    assert linear.probe(train_x, train_y, train_x, train_y, epochs=5) == first
    assert linear.probe(train_x, train_y, train_x, train_y, epochs=5, seed=1).validation != first.validation


def test_the_choice_does_not_see_the_test_set() -> None:
    train_x, train_y = overlapping(300, seed=5)
    test_x, test_y = overlapping(100, seed=6)
    honest = linear.probe(train_x, train_y, test_x, test_y, epochs=5)
    wrong = linear.probe(train_x, train_y, test_x, (test_y + 1) % 4, epochs=5)
    assert (wrong.lr, wrong.validation) == (honest.lr, honest.validation)
    assert wrong.accuracy != honest.accuracy


def test_validation_part_is_stratified_and_keyed() -> None:
    labels = torch.tensor([0] * 50 + [1] * 10 + [2] * 2 + [3])
    marked = linear.stratified(labels, 0.2)
    assert [int(marked[labels == c].sum()) for c in range(4)] == [10, 2, 1, 0]
    assert torch.equal(marked, linear.stratified(labels, 0.2))
    assert not torch.equal(marked, linear.stratified(labels, 0.2, seed=1))


def test_awkward_data() -> None:
    x, y = torch.eye(4), torch.tensor([5, 9, 2, 7])  # one image of each class: nothing to validate on
    assert linear.probe(x, y, x, y).accuracy == 100
    constant = torch.cat([torch.eye(4).repeat(5, 1), torch.full((20, 1), 0.1)], dim=1)  # a dead feature
    assert linear.probe(constant, y.repeat(5), constant, y.repeat(5)).accuracy == 100
    assert linear.probe(x, torch.full((4,), 3), x, torch.full((4,), 3)).accuracy == 100  # one class
    assert linear.probe(x, y, x, torch.tensor([0, 1, 3, 4])).accuracy == 0  # classes never trained on
    with pytest.raises(UserError, match="label"):
        linear.probe(x, torch.tensor([0, 1, -1, 1]), x, y)
    with pytest.raises(UserError, match="both splits"):
        linear.probe(x, y, x[:0], y[:0])


def test_moments_in_chunks() -> None:
    x = torch.randn(20_000, 3, generator=torch.Generator().manual_seed(0)) * torch.tensor([1.0, 10.0, 0.0]) + 100
    mean, deviation = linear.moments(x)
    torch.testing.assert_close(mean, x.double().mean(0).float())
    torch.testing.assert_close(deviation[:2], x[:, :2].double().std(0, correction=0).float())
    assert deviation[2] == 1
