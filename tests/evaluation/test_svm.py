"""Linear SVMs against scikit-learn's own cross validation, labels of several classes, and awkward splits."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.metrics import average_precision_score
from sklearn.model_selection import GridSearchCV
from sklearn.svm import LinearSVC
from torch import Tensor, nn

from sslbook.data.loader import Data
from sslbook.data.views import View
from sslbook.errors import UserError
from sslbook.evaluation.base import Representation
from sslbook.evaluation.protocols import svm
from sslbook.evaluation.protocols.few_shot import FewShot
from sslbook.evaluation.protocols.svm import SVM
from tests.evaluation.given import clusters, given

COSTS = [0.01, 0.1, 1.0]


def test_equal_to_scikit_learn_with_its_own_search() -> None:
    train, test = clusters(90, 1), clusters(60, 2)
    model = given(train, test)
    metrics = SVM(COSTS).run(model, model.data)
    unit = [(x / x.norm(dim=1, keepdim=True)).numpy() for x, _ in (train, test)]
    decisions, precision, costs = [], [], {}
    for c in range(4):
        plain = LinearSVC(class_weight={1: 2, 0: 1}, dual=True, max_iter=2000, random_state=0)
        found = GridSearchCV(plain, {"C": COSTS}, scoring="average_precision", cv=3)
        found.fit(unit[0], (train[1] == c).int().numpy())
        costs["abcd"[c]] = found.best_params_["C"]
        decisions.append(found.decision_function(unit[1]))
        precision.append(average_precision_score(test[1] == c, decisions[-1]))
    assert model.details["svm"]["C"] == costs
    assert len(set(costs.values())) > 1  # the search chose something
    assert metrics["SVM mAP"] == pytest.approx(100 * np.mean(precision), abs=1e-6)
    assert metrics["SVM"] == pytest.approx(100 * np.mean(np.argmax(decisions, axis=0) == test[1].numpy()))
    assert metrics["SVM mAP, interpolated"] > metrics["SVM mAP"] > SVM().chance(model.data)["SVM mAP"] + 10


def test_several_classes_an_image_and_difficult_ones() -> None:
    """A class's images of -1 take part neither in its training nor in its precision."""
    g = torch.Generator().manual_seed(0)
    x, new_x = torch.randn(80, 6, generator=g), torch.randn(50, 6, generator=g)
    y, new_y = (torch.stack([v[:, 0] > 0, v[:, 1] + v[:, 2] > 0.5], dim=1).long() for v in (x, new_x))
    y[:20, 0], new_y[:10, 0] = -1, -1
    decisions, _ = svm.decide(x, y, new_x, [1.0])
    alone, _ = svm.decide(x[20:], y[20:, :1], new_x, [1.0])
    assert torch.equal(decisions[:, :1], alone)
    precision = svm.average_precision(decisions, new_y)
    assert float(precision[0]) == pytest.approx(
        100 * average_precision_score(new_y[10:, 0], decisions[10:, 0]), abs=1e-6
    )
    assert precision.min() > 90


def test_a_list_of_images_with_several_classes(tmp_path: Path) -> None:
    """From the files to the metrics: the color of each half of an image are its two classes."""
    colors = {"red": (200, 0, 0), "green": (0, 200, 0), "blue": (0, 0, 200)}
    g = torch.Generator().manual_seed(0)
    for split, count in (("train", 60), ("test", 24)):
        rows = []
        for i in range(count):
            both = [list(colors)[int(c)] for c in torch.randint(3, (2,), generator=g)]
            picture = Image.new("RGB", (8, 8), colors[both[0]])
            picture.paste(colors[both[1]], (4, 0, 8, 8))
            picture.save(tmp_path / f"{split}{i}.png")
            rows.append({"image": f"{split}{i}.png", "labels": sorted(set(both))})
        (tmp_path / f"{split}.json").write_text(json.dumps(rows))
    data = Data(list=tmp_path / "train.json", test_list=tmp_path / "test.json", workers=0)
    assert data.kind == "several classes"
    model = Representation(nn.Flatten(), data, View.center(8), progress=False)
    for protocol in (SVM([1.0]), FewShot([10], samples=2)):
        assert protocol.lacks(model.backbone, data) is None
        metrics = protocol.run(model, data)
    assert metrics["10-shot"] > 95
    assert SVM([1.0]).run(model, data)["SVM mAP"] == 100
    noted = model.details["svm"]
    assert noted["a class is predicted where its decision value is positive"]["OF1"] == 100
    assert set(noted["average precision"]) == set(colors)
    assert 40 < SVM().chance(data)["SVM mAP"] < 75
    assert FewShot().chance(data) == {}


def test_awkward_classes() -> None:
    """A class without training images is never predicted; one with two images takes the lowest cost."""
    x, y = clusters(40, 3, classes=3)
    y[y == 2] = 1
    y[:2] = 3
    decisions, chosen = svm.decide(x, svm.one_hot(y, 4), x, COSTS)
    assert set(chosen) == {0, 1, 3}
    assert chosen[3] == min(COSTS)
    assert not (decisions.argmax(1) == 2).any()
    model = given((x, torch.full((40,), -1)), (x, y))
    with pytest.raises(UserError, match="no labeled train images"):
        SVM().run(model, model.data)
    for costs in ([], [0.0], [1.0, -1.0]):
        with pytest.raises(UserError, match="costs are"):
            SVM(costs)


def test_one_cost_leaves_nothing_to_choose(monkeypatch: pytest.MonkeyPatch) -> None:
    fits = []
    monkeypatch.setattr(svm, "fit", lambda x, y, cost, original=svm.fit: fits.append(len(x)) or original(x, y, cost))
    svm.decide(*(lambda x, y: (x, svm.one_hot(y, 4), x))(*clusters(40, 5)), [1.0])
    assert fits == [40] * 4


def _two(x: Tensor, y: Tensor) -> Tensor:
    return svm.decide(x, y, x, COSTS)[0]


def test_two_processes_share_the_classes(pool) -> None:
    x, y = clusters(40, 6)
    one = _two(x, svm.one_hot(y, 4))
    for two in pool.run(_two, x, svm.one_hot(y, 4)):
        assert torch.equal(two, one)
