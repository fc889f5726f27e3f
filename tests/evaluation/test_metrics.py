"""Metrics against scikit-learn and literal counts."""

import numpy as np
import pytest
import torch
from sklearn.metrics import average_precision_score, classification_report

from sslbook.evaluation.metrics import average_precision, classification, confusion_figure, multi_label, top_k


def test_top_k_counts_the_target_among_the_first() -> None:
    ranked = torch.tensor([[2, 0, 1], [1, 2, 0], [0, 1, 2], [0, 2, 1]])
    target = torch.tensor([0, 1, 2, 0])
    assert [top_k(ranked[:, :k], target) for k in (1, 2, 3)] == [50, 75, 100]


def test_classification_equals_scikit_learn_by_class_and_on_average() -> None:
    g = torch.Generator().manual_seed(0)
    y = torch.randint(4, (200,), generator=g)
    predicted = torch.where(torch.rand(200, generator=g) < 0.6, y, torch.randint(6, (200,), generator=g))
    names = ["a", "b", "c", "d", "e", "f"]
    values = classification(predicted, y, names)
    theirs = classification_report(y, predicted, labels=range(4), output_dict=True, zero_division=0)
    for name, key in zip("abcd", "0123"):
        mine = values["classes"][name]
        assert mine["images"] == theirs[key]["support"]
        for ours, other in (("precision", "precision"), ("recall", "recall"), ("F1", "f1-score")):
            assert mine[ours] == pytest.approx(100 * theirs[key][other])
            assert values["macro"][ours] == pytest.approx(100 * theirs["macro avg"][other])
    assert values["accuracy"] == pytest.approx(100 * (predicted == y).double().mean().item())
    counts = np.array(values["confusion"]["counts"])
    literal = [[int(((y == i) & (predicted == j)).sum()) for j in range(6)] for i in range(6)]
    assert counts.tolist() == literal
    assert values["confusion"]["classes"] == names
    assert "confusion" not in classification(torch.arange(101), torch.arange(101))
    figure = confusion_figure(values["confusion"], "test")
    assert "most frequent confusion" in figure.alt


def test_average_precision_with_difficult_images_left_out() -> None:
    g = torch.Generator().manual_seed(1)
    scores = torch.randn(60, 3, generator=g)
    targets = torch.randint(-1, 2, (60, 3), generator=g)
    targets[:, 2] = targets[:, 2].clamp(max=0)  # no positives
    found = average_precision(scores, targets)
    better = average_precision(scores, targets, interpolated=True)
    for c in range(2):
        keep = targets[:, c] >= 0
        expected = average_precision_score(targets[keep, c], scores[keep, c])
        assert float(found[c]) == pytest.approx(100 * expected)
        assert float(better[c]) == pytest.approx(100 * voc(scores[keep, c].tolist(), targets[keep, c].tolist()))
        assert better[c] > found[c]
    assert found[2].isnan()
    assert better[2].isnan()


def voc(scores: list[float], targets: list[int]) -> float:
    """Area under the precision that is the best at this recall or more, step by step."""
    order = sorted(range(len(scores)), key=lambda i: -scores[i])
    hits, points = 0, []
    for rank, i in enumerate(order, start=1):
        hits += targets[i]
        points.append((hits / sum(targets), hits / rank))
    area, before = 0.0, 0.0
    for n, (recall, _) in enumerate(points):
        area += (recall - before) * max(p for _, p in points[n:])
        before = recall
    return area


def test_multi_label_is_literal() -> None:
    targets = torch.tensor([[1, 0, 0], [1, 1, 0], [0, 1, -1], [0, 0, 0]])
    predicted = torch.tensor([[1, 1, 0], [1, 0, 0], [1, 1, 1], [0, 0, 0]]).bool()
    values = multi_label(predicted, targets)
    # Class 0: 2 of 3 predictions right, 2 of 2 found; class 1: 1 of 2 right, 1 of 2 found; class 2 has no positives.
    cp, cr = (2 / 3 + 1 / 2) / 2, (1 + 1 / 2) / 2
    op, orr = 3 / 5, 3 / 4
    expected = {
        "CP": cp,
        "CR": cr,
        "CF1": 2 * cp * cr / (cp + cr),
        "OP": op,
        "OR": orr,
        "OF1": 2 * op * orr / (op + orr),
    }
    assert values == pytest.approx({name: 100 * value for name, value in expected.items()})
