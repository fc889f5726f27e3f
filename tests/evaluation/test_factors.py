"""Probes per factor: factors in the features are predicted, others score at the level of chance."""

import math

import pytest
import torch
from sklearn.linear_model import Ridge
from sklearn.metrics import r2_score

from sslbook.errors import UserError
from sslbook.evaluation.protocols import factors, linear


def made_up(n: int, seed: int) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Features that hold the class, x and the angle, but neither y nor the background."""
    g = torch.Generator().manual_seed(seed)
    known = {
        "shape": torch.randint(3, (n,), generator=g),
        "x": torch.rand(n, generator=g),
        "y": torch.rand(n, generator=g),
        "orientation": 720 * torch.rand(n, generator=g) - 360,
        "background": torch.randint(2, (n,), generator=g),
        "scale": torch.full((n,), 0.5),  # constant
    }
    angle = known["orientation"] * math.pi / 180
    hot = torch.nn.functional.one_hot(known["shape"], 3).float()
    columns = torch.cat([hot, known["x"][:, None], angle.sin()[:, None], angle.cos()[:, None]], dim=1)
    mixing = torch.randn(6, 10, generator=torch.Generator().manual_seed(0))
    return columns @ mixing + 0.01 * torch.randn(n, 10, generator=g), known


def test_factors_in_the_features_are_predicted_and_others_are_not() -> None:
    train_x, train_f = made_up(600, seed=1)
    test_x, test_f = made_up(400, seed=2)
    scores = factors.probe(train_x, train_f, test_x, test_f)
    assert list(scores) == ["shape", "x", "y", "orientation", "background"]  # what never changes has no score
    assert min(scores["shape"], scores["x"], scores["orientation"]) > 97
    chance = factors.chance_levels(train_f, test_f)
    assert list(chance) == list(scores)
    assert (chance["x"], chance["orientation"]) == (0, 0)
    assert 30 < chance["shape"] < 40
    assert abs(scores["y"]) < 8
    assert scores["background"] == pytest.approx(chance["background"], abs=8)


def test_an_angle_needs_sine_and_cosine() -> None:
    """The same features, the same angles: without sine and cosine the jump from 359 to 0 degrees costs dearly."""
    train_x, train_f = made_up(600, seed=1)
    test_x, test_f = made_up(400, seed=2)
    rename = {"orientation": "height"}
    train_f, test_f = ({rename.get(k, k): v for k, v in f.items() if k == "orientation"} for f in (train_f, test_f))
    assert factors.probe(train_x, train_f, test_x, test_f)["height"] < 80


def test_r2_is_of_standardized_features_and_a_penalty_per_image() -> None:
    train_x, train_f = made_up(200, seed=3)
    test_x, test_f = made_up(100, seed=4)
    mean, std = train_x.double().mean(0), train_x.double().std(0, correction=0)
    z, target = (train_x - mean) / std, train_f["x"].double()
    weight = torch.linalg.solve(z.T @ z / 200 + 0.1 * torch.eye(10), z.T @ (target - target.mean()) / 200)
    predicted = (test_x - mean) / std @ weight + target.mean()
    truth = test_f["x"].double()
    expected = 1 - (predicted - truth).square().sum() / (truth - truth.mean()).square().sum()
    found = factors._r2(train_x, {"x": target[:, None]}, test_x, {"x": truth[:, None]}, 0.1)["x"]
    assert found == pytest.approx(expected.item(), abs=1e-5)
    assert expected < 0.99  # the penalty is felt


def test_rejects_factors_of_other_images() -> None:
    train_x, train_f = made_up(50, seed=1)
    with pytest.raises(UserError, match="50 values for 49 images"):
        factors.probe(train_x[:49], train_f, train_x, train_f)


def test_ridge_is_retrained_on_all_with_a_penalty_chosen_on_training_images() -> None:
    """Against scikit-learn's, with so few images and so much noise that either would change the score."""
    g = torch.Generator().manual_seed(0)
    x, new = torch.randn(40, 30, generator=g), torch.randn(60, 30, generator=g)
    weights = torch.randn(30, generator=g)
    y, new_y = (z @ weights + 6 * torch.randn(len(z), generator=g) for z in (x, new))

    def r2(a: torch.Tensor, b: torch.Tensor, c: torch.Tensor, d: torch.Tensor, penalty: float) -> float:
        mean, std = a.mean(0), a.std(0, correction=0)
        fit = Ridge(alpha=penalty * len(a)).fit((a - mean) / std, b)
        return r2_score(d, fit.predict((c - mean) / std))

    held = linear.stratified(torch.zeros(40, dtype=torch.int64), 0.2, 0)
    best = max(linear.PENALTIES, key=lambda p: r2(x[~held], y[~held], x[held], y[held], p))
    wanted = 100 * r2(x, y, new, new_y, best)
    assert wanted < 100 * max(r2(x, y, new, new_y, p) for p in linear.PENALTIES) - 1, (
        "choosing on test images is no better"
    )
    assert wanted != pytest.approx(100 * r2(x[~held], y[~held], new, new_y, best), abs=0.5)
    got = factors.probe(x, {"position": y}, new, {"position": new_y})["position"]
    assert got == pytest.approx(wanted, abs=0.05)
