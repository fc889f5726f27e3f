"""kNN against a literal float64 version, scikit-learn, and awkward data."""

import math

import numpy as np
import pytest
import torch
from sklearn.neighbors import KNeighborsClassifier, NearestNeighbors
from torch import Tensor, nn

from sslbook import distributed
from sslbook.data.datasets.shapes import Shapes
from sslbook.data.loader import Data
from sslbook.data.views import View
from sslbook.errors import UserError
from sslbook.evaluation.base import Representation
from sslbook.evaluation.protocols import knn


def literal_predict(train_x: Tensor, train_y: Tensor, test_x: Tensor, k: int, temperature: float) -> list[int]:
    """The protocol, one image and one neighbor at a time."""
    unit = [x / x.norm() for x in train_x.double()]
    predictions = []
    for q in test_x.double():
        q = q / q.norm()
        similarity = [float(q @ x) for x in unit]
        nearest = sorted(range(len(unit)), key=lambda i: (-similarity[i], i))[:k]
        votes: dict[int, float] = {}
        for i in nearest:
            votes[int(train_y[i])] = votes.get(int(train_y[i]), 0.0) + math.exp(similarity[i] / temperature)
        predictions.append(max(sorted(votes), key=lambda label: votes[label]))
    return predictions


def clusters(n: int, seed: int, dim: int = 16, classes: int = 5) -> tuple[Tensor, Tensor]:
    """Overlapping clusters around fixed centers, so that about half of all decisions are close."""
    centers = torch.randn(classes, dim, generator=torch.Generator().manual_seed(0))
    g = torch.Generator().manual_seed(seed)
    y = torch.randint(classes, (n,), generator=g)
    return centers[y] + 2.5 * torch.randn(n, dim, generator=g), y


@pytest.mark.parametrize(("k", "temperature"), [(1, 0.07), (20, 0.07), (20, 1.0), (300, 0.5)])
def test_prediction_equals_the_literal_protocol(k: int, temperature: float) -> None:
    train_x, train_y = clusters(300, seed=1)
    test_x, test_y = clusters(80, seed=2)
    expected = torch.tensor(literal_predict(train_x, train_y, test_x, k, temperature))
    assert torch.equal(knn.predict(train_x, train_y, test_x, k, temperature), expected)
    accuracy = knn.accuracy(train_x, train_y, test_x, test_y, k, temperature)
    assert accuracy == pytest.approx(100 * (expected == test_y).double().mean().item())
    assert 25 < accuracy < 100  # above chance and not trivial: the comparison means something


def test_neighbors_and_accuracy_equal_scikit_learn() -> None:
    train_x, train_y = clusters(500, seed=3)
    test_x, test_y = clusters(120, seed=4)
    distances, expected = (
        NearestNeighbors(n_neighbors=7, metric="cosine").fit(train_x.double()).kneighbors(test_x.double())
    )
    similarities, indices = knn.neighbors(train_x, test_x, 7)
    assert torch.equal(indices, torch.as_tensor(expected))
    torch.testing.assert_close(similarities.double(), 1 - torch.as_tensor(distances), atol=1e-5, rtol=0)
    theirs = KNeighborsClassifier(
        7, metric="cosine", algorithm="brute", weights=lambda distance: np.exp((1 - distance) / 0.07)
    ).fit(train_x.double(), train_y)
    expected_accuracy = 100 * theirs.score(test_x.double(), test_y)
    assert knn.accuracy(train_x, train_y, test_x, test_y, 7) == pytest.approx(expected_accuracy)


@pytest.mark.parametrize(("query_chunk", "bank_chunk"), [(40, 1), (7, 13), (64, 3), (1000, 1000)])
def test_chunks_change_nothing(query_chunk: int, bank_chunk: int) -> None:
    train_x, _ = clusters(101, seed=5)
    test_x, _ = clusters(33, seed=6)
    expected = (torch.nn.functional.normalize(test_x) @ torch.nn.functional.normalize(train_x).T).topk(9)
    similarities, indices = knn.neighbors(train_x, test_x, 9, query_chunk=query_chunk, bank_chunk=bank_chunk)
    assert torch.equal(indices, expected.indices)
    torch.testing.assert_close(similarities, expected.values, atol=1e-6, rtol=0)


@pytest.mark.parametrize("bank_chunk", [1, 4, 10, 100])
def test_ties_go_to_the_lower_index(bank_chunk: int) -> None:
    """Forty copies of three images: the nearest are the first copies, in order, however the bank is cut."""
    train_x = torch.eye(3).repeat(40, 1)
    similarities, indices = knn.neighbors(train_x, torch.eye(3), 5, bank_chunk=bank_chunk)
    assert indices.tolist() == [[0, 3, 6, 9, 12], [1, 4, 7, 10, 13], [2, 5, 8, 11, 14]]
    assert similarities.tolist() == [[1.0] * 5] * 3
    # Similarity 0 of both signs is one and the same.
    _, indices = knn.neighbors(torch.tensor([[0.0, -1.0], [0.0, 1.0], [0.0, -1.0]]), torch.tensor([[1.0, 0.0]]), 3)
    assert indices.tolist() == [[0, 1, 2]]


def test_negative_similarities_keep_their_order() -> None:
    angles = torch.linspace(math.pi / 2, math.pi, 9)
    train_x = torch.stack([angles.cos(), angles.sin()], 1)
    similarities, indices = knn.neighbors(train_x, torch.tensor([[1.0, 0.0]]), 9, bank_chunk=4)
    assert indices.tolist() == [list(range(9))]
    torch.testing.assert_close(similarities[0], angles.cos(), atol=1e-6, rtol=0)


def test_memory_stays_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """No table of similarities is larger than one query chunk by one bank chunk."""
    seen = []
    original = knn._largest
    monkeypatch.setattr(knn, "_largest", lambda s, k: seen.append(tuple(s.shape)) or original(s, k))
    x = torch.randn(5000, 4, generator=torch.Generator().manual_seed(0))
    _, indices = knn.neighbors(x, x, 3, query_chunk=100, bank_chunk=700)
    assert max(rows for rows, _ in seen) == 100
    assert max(columns for _, columns in seen) == 700
    assert torch.equal(indices[:, 0], torch.arange(5000))  # the nearest neighbor of each is itself


def test_small_and_awkward_data() -> None:
    x, y = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 0.0]]), torch.tensor([7, 3, 3])
    assert knn.accuracy(x[:2], y[:2], x[:2], y[:2], k=1) == 100
    # Fewer images than neighbors asked for; classes that are not 0, 1, 2; one test image; a zero vector.
    assert knn.predict(x, y, torch.tensor([[2.0, 0.1]]), k=20).tolist() == [7]
    assert knn.predict(x, y, torch.zeros(1, 2), k=20).tolist() == [3]
    # One class only.
    assert knn.accuracy(x, torch.zeros(3, dtype=torch.int64), x, torch.zeros(3, dtype=torch.int64)) == 100
    # At a temperature near 0 only the nearest counts; nothing overflows.
    assert knn.predict(x, y, torch.tensor([[1.0, 0.9]]), k=3, temperature=1e-6).tolist() == [7]
    # Equal votes: the lower label.
    assert knn.predict(x[:2], y[:2], torch.tensor([[1.0, 1.0]]), k=2).tolist() == [3]


def test_rejects_empty_splits_and_invalid_options() -> None:
    x, y = torch.eye(3), torch.arange(3)
    with pytest.raises(UserError, match="needs both splits"):
        knn.accuracy(x, y, x[:0], y[:0])
    with pytest.raises(UserError, match="needs both splits"):
        knn.accuracy(x[:0], y[:0], x, y)
    with pytest.raises(UserError, match="k is 0"):
        knn.KNN(k=0)
    with pytest.raises(UserError, match="temperature is 0"):
        knn.KNN(temperature=0.0)


def test_majority_ignores_images_without_a_label() -> None:
    assert knn.majority(torch.tensor([-1, -1, -1, 2, 2, 5]), torch.tensor([2, 5, 5, 5, -1])) == 25


def test_top_5_and_several_settings_in_one_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each pair of k and temperature is what it would be alone; top-5 only where there are many classes."""
    data = Data(shapes=Shapes(num_train=60, num_test=24))
    model = Representation(nn.Flatten(), data, View.center(8), progress=False)
    assert set(knn.KNN().run(model, data)) == {"kNN"}
    monkeypatch.setattr(knn, "MANY", 9)
    alone = {(k, t): knn.KNN(k, t).run(model, data) for k in (1, 20) for t in (0.07, 5.0)}
    many = knn.KNN([1, 20], [0.07, 5.0])
    together = many.run(model, data)
    assert len(together) == 8
    for (k, t), metrics in alone.items():
        assert together[f"kNN, k={k}, T={t}"] == metrics["kNN"]
        assert together[f"kNN top-5, k={k}, T={t}"] == metrics["kNN top-5"]
    assert set(knn.KNN([1, 20]).run(model, data)) == {"kNN, k=1", "kNN, k=20", "kNN top-5, k=1", "kNN top-5, k=20"}
    assert set(many.chance(data)) == {name for name in together if "top-5" not in name}
    train_x, train_y, test_x, test_y = model.labeled()
    ranked = knn.vote(*knn.neighbors(train_x, test_x, 20), train_y, 5.0, top=5)
    assert together["kNN top-5, k=20, T=5.0"] == pytest.approx(100 * sum(y in r for y, r in zip(test_y, ranked)) / 24)
    assert together["kNN top-5, k=20, T=5.0"] > together["kNN, k=20, T=5.0"]
    assert model.details["knn"]["confusion"]["classes"]
    assert set(many.figures()) == {"confusion"}
    with pytest.raises(UserError, match="at least one"):
        knn.KNN([])


def _two(queries: Tensor, bank: Tensor) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    own = queries[distributed.rank() :: distributed.world_size()]
    return knn.divided(bank, queries, 5, query_chunk=7), knn.neighbors(bank, own, 5)


@pytest.mark.slow
def test_two_processes_divide_queries_or_have_their_own(pool) -> None:
    bank, _ = clusters(60, seed=7)
    for count in (40, 5, 1):  # of one, the second process has none
        queries, _ = clusters(count, seed=8)
        one = knn.neighbors(bank, queries, 5, query_chunk=7)
        for rank, (together, own) in enumerate(pool.run(_two, queries, bank)):
            for part, whole, mine in zip(together, one, own):
                assert torch.equal(part, whole)
                torch.testing.assert_close(mine, whole[rank::2])
