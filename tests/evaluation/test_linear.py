"""The linear probe: as accurate as scikit-learn at its best penalty, deterministic, chosen without the test images."""

import pytest
import torch
from sklearn.linear_model import LogisticRegression
from torch import Tensor

from sslbook.errors import UserError
from sslbook.evaluation.protocols import linear


def overlapping(n: int, seed: int, dim: int = 12, classes: int = 4) -> tuple[Tensor, Tensor]:
    centers = torch.randn(classes, dim, generator=torch.Generator().manual_seed(0))
    g = torch.Generator().manual_seed(seed)
    y = torch.randint(classes, (n,), generator=g)
    x = centers[y] + 1.5 * torch.randn(n, dim, generator=g)
    return x * torch.logspace(-3, 3, dim) + 5, y  # features of very different size, off center


def test_accuracy_equals_the_exact_solution() -> None:
    train_x, train_y = overlapping(1500, seed=1)
    test_x, test_y = overlapping(1000, seed=2)
    mean, std = train_x.mean(0), train_x.std(0)
    exact = LogisticRegression(max_iter=1000).fit((train_x - mean) / std, train_y)
    expected = 100 * exact.score((test_x - mean) / std, test_y)
    result = linear.probe(train_x, train_y, test_x, test_y)
    assert expected < 95
    assert result.accuracy == pytest.approx(expected, abs=1.0)
    assert result.validation[result.penalty] == max(result.validation.values())


def test_the_penalty_is_chosen_where_it_matters() -> None:
    """200 images, 150 features of noise: a weak penalty over-fits, and the validation part shows it."""
    (train_x, train_y), (test_x, test_y) = overlapping(200, seed=1), overlapping(2000, seed=2)
    g = torch.Generator().manual_seed(0)
    train_x, test_x = (torch.cat([x, 3 * torch.randn(len(x), 150, generator=g)], dim=1) for x in (train_x, test_x))
    weakest = linear.probe(train_x, train_y, test_x, test_y, penalties=(1e-4,)).accuracy
    result = linear.probe(train_x, train_y, test_x, test_y)
    assert result.penalty > 1e-4
    assert result.accuracy > weakest + 3


def test_same_seed_same_result_and_no_random_number_consumed() -> None:
    train_x, train_y = overlapping(300, seed=4)
    state = torch.random.get_rng_state()
    first = linear.probe(train_x, train_y, train_x, train_y)
    assert torch.equal(torch.random.get_rng_state(), state)
    torch.manual_seed(123)
    assert linear.probe(train_x, train_y, train_x, train_y) == first
    assert linear.probe(train_x, train_y, train_x, train_y, seed=1).validation != first.validation


def test_the_choice_does_not_see_the_test_set() -> None:
    train_x, train_y = overlapping(300, seed=5)
    test_x, test_y = overlapping(100, seed=6)
    honest = linear.probe(train_x, train_y, test_x, test_y)
    wrong = linear.probe(train_x, train_y, test_x, (test_y + 1) % 4)
    assert (wrong.penalty, wrong.validation) == (honest.penalty, honest.validation)
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
    assert linear.probe(x, torch.full((4,), 3), x, torch.tensor([3, 3, 3, 1])).accuracy == 75  # one class
    assert linear.probe(x, y, x, torch.tensor([0, 1, 3, 4])).accuracy == 0  # classes never trained on
    rare = torch.tensor([0] * 6 + [1])  # a class that the validation part cannot have
    assert linear.probe(torch.eye(7), rare, torch.eye(7), rare).accuracy >= 80
    with pytest.raises(UserError, match="both splits"):
        linear.probe(x, y, x[:0], y[:0])


def test_moments() -> None:
    x = torch.randn(20_000, 3, generator=torch.Generator().manual_seed(0)) * torch.tensor([1.0, 10.0, 0.0]) + 100
    mean, std = linear.moments(x)
    torch.testing.assert_close(mean, x.double().mean(0).float())
    torch.testing.assert_close(std[:2], x[:, :2].double().std(0, correction=0).float())
    assert std[2] == 1


def standardized(x: Tensor, by: Tensor) -> Tensor:
    return (x - by.mean(0)) / by.std(0, correction=0)


def test_the_layer_is_trained_on_all_training_images_with_the_chosen_penalty() -> None:
    """Against scikit-learn's on features standardized by the training images, and so few that a fifth of them counts."""
    x, y = overlapping(60, seed=7)
    new, _ = overlapping(40, seed=8)
    result = linear.probe(x, y, new, torch.zeros(40, dtype=torch.int64))
    exact = LogisticRegression(C=1 / (result.penalty * len(x)), max_iter=5000).fit(standardized(x, x), y)
    wanted = torch.from_numpy(exact.predict_log_proba(standardized(new, x)))
    torch.testing.assert_close(result.classifier.log_probabilities(new), wanted, rtol=0, atol=0.05)


def test_penalties_are_compared_on_held_out_images_standardized_as_the_others() -> None:
    x, y = overlapping(60, seed=9)
    x = x.sign() * x.abs() ** 1.5  # heavy tails: the moments of a part differ from those of the whole
    found = linear.probe(x, y, x, y).validation
    held = linear.stratified(y, 0.2)
    for penalty, accuracy in found.items():
        exact = LogisticRegression(C=1 / (penalty * int((~held).sum())), max_iter=5000)
        exact.fit(standardized(x[~held], x[~held]), y[~held])
        assert accuracy == pytest.approx(100 * exact.score(standardized(x[held], x[~held]), y[held]), abs=1e-6)


def test_a_prediction_depends_on_no_other_test_image() -> None:
    x, y = overlapping(80, seed=10)
    new = 3 * overlapping(30, seed=11)[0]
    classifier = linear.probe(x, y, new, torch.zeros(30, dtype=torch.int64)).classifier
    together = classifier.log_probabilities(new)
    torch.testing.assert_close(together[:1], classifier.log_probabilities(new[:1]))
    torch.testing.assert_close(together[5:7], classifier.log_probabilities(new[5:7]))
