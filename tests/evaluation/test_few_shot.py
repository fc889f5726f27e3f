"""Few-shot: how many images, which, and what they yield."""

import pytest
import torch

from sslbook.errors import UserError
from sslbook.evaluation.protocols import few_shot
from sslbook.evaluation.protocols.few_shot import FewShot, sampled
from sslbook.evaluation.protocols.svm import fit, one_hot
from tests.evaluation.given import clusters, given


def test_k_images_of_each_class_nested_and_by_seed() -> None:
    y = torch.randint(4, (100,), generator=torch.Generator().manual_seed(0))
    targets = one_hot(y, 4)
    rows = {k: sampled(targets, k, 0, 1) for k in (1, 2, 8)}
    for k, found in rows.items():
        assert y[found].bincount().tolist() == [k] * 4
    assert set(rows[1].tolist()) < set(rows[2].tolist()) < set(rows[8].tolist())
    assert sampled(targets, 8, 0, 1).tolist() != sampled(targets, 8, 0, 2).tolist()
    assert sampled(targets, 8, 0, 1).tolist() != sampled(targets, 8, 1, 1).tolist()


def test_mean_and_std_over_samples_of_literal_svms() -> None:
    train, test = clusters(60, 1), clusters(80, 2)
    model = given(train, test)
    metrics = FewShot([1, 4], samples=3).run(model, model.data)
    x, new_x = (v[0] / v[0].norm(dim=1, keepdim=True) for v in (train, test))
    for k in (1, 4):
        found = []
        for sample in range(3):
            rows = sampled(one_hot(train[1], 4), k, 0, sample)
            values = [
                fit(x[rows].numpy(), (train[1][rows] == c).numpy(), 1.0).decision_function(new_x.numpy())
                for c in range(4)
            ]
            predicted = torch.tensor([max(range(4), key=lambda c: values[c][i]) for i in range(80)])
            found.append(100 * (predicted == test[1]).double().mean().item())
        assert metrics[f"{k}-shot"] == pytest.approx(torch.tensor(found).mean().item())
        assert metrics[f"{k}-shot, std"] == pytest.approx(torch.tensor(found).std().item())
        assert model.details["few_shot"]["by sample"][f"{k}-shot"] == pytest.approx(found)
    assert FewShot().chance(model.data)["1-shot"] < metrics["1-shot"] < metrics["4-shot"]


def test_fewer_images_than_k_names_the_class() -> None:
    x, y = clusters(60, 3)
    y[:] = y.clamp(max=2)
    y[:3] = 3
    model = given((x, y), clusters(20, 4))
    with pytest.raises(UserError, match="class d has 3 training images, fewer than k = 4: give --shots up to 3"):
        FewShot([1, 4]).run(model, model.data)
    y[:3] = 2
    with pytest.raises(UserError, match=r"class d has 0 training images, .*: add some, or leave out its test images"):
        FewShot([1, 4]).run(model, model.data)
    y[:3] = 3
    assert "3-shot" in FewShot([3], samples=1).run(model, model.data)
    for options in ({"shots": []}, {"shots": [0]}, {"samples": 0}, {"svm_cost": 0.0}):
        with pytest.raises(UserError):
            few_shot.FewShot(**options)
