"""Robustness of a probe, against corrupting and classifying one image after the other."""

import pytest
import torch
from torch import Tensor, nn

from sslbook.data.datasets.shapes import Shapes
from sslbook.data.loader import Data
from sslbook.data.views import View
from sslbook.errors import UserError
from sslbook.evaluation.base import Representation
from sslbook.evaluation.corruptions import NAMES, corrupt
from sslbook.evaluation.protocols import robustness
from sslbook.evaluation.protocols.linear import train
from sslbook.evaluation.protocols.robustness import Robustness

VIEW = View.center(16)


class Pooled(nn.Module):
    """Colors of a coarse grid."""

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.adaptive_avg_pool2d(x, 4).flatten(1)


def model(**options) -> Representation:
    data = Data(shapes=Shapes(num_train=80, num_test=30, size=16))
    return Representation(Pooled(), data, VIEW, batch_size=8, progress=False, **options)


@pytest.mark.slow
def test_accuracy_is_that_of_each_image_corrupted_by_itself() -> None:
    one = model()
    protocol = Robustness(corruptions=["contrast", "gaussian noise"], severities=[2, 5])
    metrics = protocol.run(one, one.data)
    classify = train(one.features("train").x, one.features("train").y)[0].ranked
    raw = next(one.data.evaluation_batches("test", View.center(16, mean=(0, 0, 0), std=(1, 1, 1))))
    mean, std = (torch.tensor(v)[:, None, None] for v in (VIEW.mean, VIEW.std))
    accuracy = {}
    for name in ("contrast", "gaussian noise"):
        for severity in (2, 5):
            hits = 0
            for image, index, label in zip(raw.views[0], raw.index, raw.label):
                changed = corrupt(image[None], name, severity, index[None])
                hits += int(classify(Pooled()((changed - mean) / std))[0, 0] == label)
            accuracy[name, severity] = 100 * hits / 30
    noted = one.details["robustness"]["accuracy by severity"]
    for (name, severity), value in accuracy.items():
        assert noted[name][str(severity)] == pytest.approx(value)
    assert metrics["corrupted"] == pytest.approx(sum(accuracy.values()) / 4)
    assert metrics["lost"] == pytest.approx(metrics["clean"] - metrics["corrupted"])
    assert metrics["contrast"] == pytest.approx((accuracy["contrast", 2] + accuracy["contrast", 5]) / 2)
    assert set(protocol.figures()) == {"severity", "images"}
    assert set(protocol.chance(one.data)) == {"clean", "corrupted", "contrast", "gaussian noise"}


def test_knn_classifies_too_and_mce_is_relative_to_alexnet(monkeypatch: pytest.MonkeyPatch) -> None:
    one = model()
    metrics = Robustness("knn", severities=[1]).run(one, one.data)
    assert set(NAMES) < set(metrics)
    assert "mCE" not in metrics
    monkeypatch.setattr(Data, "num_classes", 1000)
    monkeypatch.setattr(
        Robustness,
        "_corrupted",
        lambda *_: 100 - torch.tensor(list(robustness.ALEXNET.values()))[:, None].expand(-1, 5),
    )
    assert Robustness("knn").run(one, one.data)["mCE"] == pytest.approx(100)


def test_images_normalized_by_the_data_are_corrupted_alike() -> None:
    one = model()
    other = model()
    other.data = Data(shapes=Shapes(num_train=80, num_test=30, size=16), mean=VIEW.mean, std=VIEW.std)
    other.view = View.center(16, mean=(0.1, 0.1, 0.1), std=(2.0, 2.0, 2.0))  # the data's take precedence
    chosen = {"corruptions": ["brightness"], "severities": [5]}
    assert Robustness(**chosen).run(other, other.data) == pytest.approx(Robustness(**chosen).run(one, one.data))


def test_what_is_refused() -> None:
    with pytest.raises(UserError, match="no corruption rain"):
        Robustness(corruptions=["rain"])
    with pytest.raises(UserError, match="severity 7"):
        Robustness(severities=[7])
    with pytest.raises(UserError, match="at least one"):
        Robustness(severities=[])
    data = Data.from_images(
        torch.zeros(4, 5, 8, 8, dtype=torch.uint8), torch.arange(4), mean=(0.5,) * 5, std=(0.5,) * 5
    )
    assert "color images" in str(Robustness().lacks(nn.Flatten(), data))


def _two(classifier: str) -> dict[str, float]:
    one = model()
    return Robustness(classifier, corruptions=["shot noise", "fog"], severities=[1, 4]).run(one, one.data)


@pytest.mark.parametrize("classifier", ["linear", "knn"])
def test_two_processes_are_one(pool, classifier: str) -> None:
    assert pool.run(_two, classifier) == [_two(classifier)] * 2
