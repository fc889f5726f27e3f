"""Retrieval against scikit-learn and a literal ranking."""

import pytest
import torch
from sklearn.metrics import average_precision_score
from torch import Tensor

from sslbook.errors import UserError
from sslbook.evaluation.protocols import retrieval
from sslbook.evaluation.protocols.retrieval import Retrieval, leave_one_out
from tests.evaluation.given import clusters, given


def test_equal_to_scikit_learn_and_a_literal_ranking(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retrieval, "QUERIES", 7)
    x, y = clusters(60, 1, noise=1.5)
    y[5] = 7  # nobody else's class: asks nothing
    model = given(clusters(5, 0), (x, y))
    metrics = Retrieval().run(model, model.data)
    z = x.double() / x.double().norm(dim=1, keepdim=True)
    precisions, ranks = [], []
    for i in range(60):
        others = [j for j in range(60) if j != i]
        relevant = (y[others] == y[i]).int()
        if relevant.any():
            similarity = z[others] @ z[i]
            precisions.append(average_precision_score(relevant, similarity))
            ranks.append(relevant[similarity.argsort(descending=True)].tolist().index(1) + 1)
    assert len(ranks) == model.details["retrieval"]["queries"] == 59
    assert metrics["mAP"] == pytest.approx(100 * sum(precisions) / 59)
    for k in (1, 5, 10):
        assert metrics[f"recall@{k}"] == pytest.approx(100 * sum(rank <= k for rank in ranks) / 59)
    assert metrics["recall@1"] < metrics["recall@5"] < 100


def test_the_query_is_left_out() -> None:
    """Of four orthogonal images in two classes none is nearer than another: the image itself would be."""
    precision, rank = leave_one_out(torch.eye(4), torch.tensor([0, 1, 1, 0]))
    assert rank.tolist() == [3, 2, 2, 1]  # equals in their order: 0 asks 1, 2, 3; 1 asks 0, 2, 3; ...
    assert precision.tolist() == pytest.approx([1 / 3, 1 / 2, 1 / 2, 1])


def test_chance_is_that_of_a_random_order() -> None:
    y = torch.tensor([0] * 5 + [1] * 15 + [2] * 20)
    chance = Retrieval([1, 3]).chance(given(clusters(5, 0), (torch.randn(40, 4), y)).data)
    found = [Retrieval([1, 3]).run(model, model.data) for model in (given(clusters(5, 0), (x, y)) for x in noise(80))]
    for name in ("recall@1", "recall@3"):
        assert sum(metrics[name] for metrics in found) / 80 == pytest.approx(chance[name], abs=2)
    assert sum(metrics["mAP"] for metrics in found) / 80 == pytest.approx(chance["mAP"], abs=1)


def noise(count: int) -> list[Tensor]:
    g = torch.Generator().manual_seed(0)
    return [torch.randn(40, 16, generator=g) for _ in range(count)]


def test_no_class_with_two_images() -> None:
    model = given(clusters(5, 0), (torch.eye(3), torch.arange(3)))
    with pytest.raises(UserError, match="no class has two test images"):
        Retrieval().run(model, model.data)


def _two(x: Tensor, y: Tensor) -> list[Tensor]:
    retrieval.QUERIES = 7
    return list(leave_one_out(x, y))


def test_two_processes_share_the_queries(pool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retrieval, "QUERIES", 7)
    x, y = clusters(40, 2)
    one = leave_one_out(x, y)
    for two in pool.run(_two, x, y):
        assert torch.equal(two[0], one[0])
        assert torch.equal(two[1], one[1])
