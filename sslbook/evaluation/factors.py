"""What of an image is in its features: one linear probe for each factor of the Shapes data set.

A categorical factor (shape, hue, background) is named by the linear probe and scored by its accuracy in percent. A
continuous one (place, scale, light) is predicted by ridge regression and scored by 100 times R^2, the percentage of its
variance that is explained. An angle is not a number (359 degrees is next to 0), so its sine and cosine are predicted.
Every score has its chance level beside it: 0 for R^2, the most frequent value's share for an accuracy.
"""

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor
from tqdm.auto import tqdm

from sslbook.errors import UserError
from sslbook.evaluation import linear

PERIODS = {"orientation": 360.0}  # factors that return to where they began
PENALTIES = (1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0)  # per image, on standardized features


def probe(
    features_train: Float[Tensor, "train dim"],
    factors_train: dict[str, Tensor],
    features_test: Float[Tensor, "test dim"],
    factors_test: dict[str, Tensor],
    *,
    seed: int = 0,
    device: torch.device | str | None = None,
    progress: bool = False,
) -> dict[str, float]:
    """The score of each factor: accuracy in percent, or 100 R^2. A factor that never changes has none.

    Args:
        features_train: training features.
        factors_train: factors of the same images; int64 is categorical, float32 continuous.
        features_test: test features.
        factors_test: factors of the test images.
        seed: key of the validation part.
        device: where the categorical probes are trained.
        progress: show a bar.

    Raises:
        UserError: features and factors are of different images.
    """
    for x, factors in ((features_train, factors_train), (features_test, factors_test)):
        if wrong := [name for name, value in factors.items() if len(value) != len(x)]:
            raise UserError(f"factor {wrong[0]} has {len(factors[wrong[0]])} values for {len(x)} images")
    names = list(chance_levels(factors_train, factors_test))
    continuous = {name: factors_train[name] for name in names if factors_train[name].is_floating_point()}
    scores = _ridge(features_train, continuous, features_test, factors_test, seed) if continuous else {}
    for name in tqdm(
        [n for n in names if n not in continuous], desc="factors", leave=False, disable=None if progress else True
    ):
        result = linear.probe(
            features_train, factors_train[name], features_test, factors_test[name], seed=seed, device=device
        )
        scores[name] = result.accuracy
    return {name: scores[name] for name in names}


def chance_levels(factors_train: dict[str, Tensor], factors_test: dict[str, Tensor]) -> dict[str, float]:
    """What `probe` would report for features that know nothing."""
    levels = {}
    for name, value in factors_train.items():
        if name not in factors_test or not _varies(value, factors_test[name]):
            continue
        if value.is_floating_point():
            levels[name] = 0.0
        else:
            levels[name] = majority(value, factors_test[name])
    return levels


def majority(train_y: Int[Tensor, "train"], test_y: Int[Tensor, "test"]) -> float:
    """Accuracy, in percent, of always naming the most frequent training label."""
    return 100 * (test_y == train_y.mode().values).double().mean().item()


def _varies(train: Tensor, test: Tensor) -> bool:
    return all(len(value) > 0 and bool((value != value[0]).any()) for value in (train, test))


def _targets(name: str, value: Float[Tensor, "n"]) -> Float[Tensor, "n columns"]:
    """The columns that stand for a factor: itself, or sine and cosine of an angle."""
    value = value.double().cpu()
    if name not in PERIODS:
        return value[:, None]
    angle = value * (2 * math.pi / PERIODS[name])
    return torch.stack([angle.sin(), angle.cos()], dim=1)


def _ridge(
    train_x: Float[Tensor, "train dim"],
    train: dict[str, Tensor],
    test_x: Float[Tensor, "test dim"],
    test: dict[str, Tensor],
    seed: int,
) -> dict[str, float]:
    """Ridge regression of all continuous factors together; each has the penalty that suits it on a validation part."""
    columns = [_targets(name, value) for name, value in train.items()]
    owner = [name for name, block in zip(train, columns) for _ in range(block.shape[1])]
    y = torch.cat(columns, dim=1)
    test_y = torch.cat([_targets(name, test[name]) for name in train], dim=1)

    held = linear.stratified(torch.zeros(len(train_x), dtype=torch.int64), 0.2, seed)
    if not held.any():
        held = ~held
    fit = ~held if (~held).any() else held
    tried = {p: _scores(train_x[held], y[held], owner, w) for p, w in _solve(train_x[fit], y[fit], PENALTIES).items()}
    chosen = {name: max(PENALTIES, key=lambda p: tried[p][name]) for name in train}
    final = _solve(train_x, y, tuple(sorted(set(chosen.values()))))
    scores = {p: _scores(test_x, test_y, owner, weights) for p, weights in final.items()}
    return {name: 100 * scores[chosen[name]][name] for name in train}


_Fit = tuple[Tensor, Tensor, Tensor, Tensor]  # mean and deviation of the features, weight, mean of the targets


def _solve(x: Float[Tensor, "n dim"], y: Float[Tensor, "n columns"], penalties: tuple[float, ...]) -> dict[float, _Fit]:
    """(X'X/n + penalty I) w = X'y/n on standardized features, in float64, the products summed chunk by chunk."""
    mean, deviation = linear.moments(x)
    center = y.mean(0)
    gram = torch.zeros(x.shape[1], x.shape[1], dtype=torch.float64)
    right = torch.zeros(x.shape[1], y.shape[1], dtype=torch.float64)
    for part, target in zip(x.split(4096), y.split(4096)):
        z = ((part - mean) / deviation).double().cpu()
        gram += z.T @ z / len(x)
        right += z.T @ (target - center) / len(x)
    identity = torch.eye(len(gram), dtype=torch.float64)
    weights = {p: torch.cholesky_solve(right, torch.linalg.cholesky(gram + p * identity)) for p in penalties}
    return {p: (mean, deviation, weight, center) for p, weight in weights.items()}


def _scores(x: Float[Tensor, "n dim"], y: Float[Tensor, "n columns"], owner: list[str], fit: _Fit) -> dict[str, float]:
    """R^2 of each factor; the columns of one factor share the sums of squares."""
    mean, deviation, weight, center = fit
    error = torch.zeros(y.shape[1], dtype=torch.float64)
    for part, target in zip(x.split(4096), y.split(4096)):
        z = ((part - mean) / deviation).double().cpu()
        error += (z @ weight + center - target).square().sum(0)
    spread = (y - y.mean(0)).square().sum(0)
    scores = {}
    for name in dict.fromkeys(owner):
        mine = torch.tensor([o == name for o in owner])
        scores[name] = 1 - (error[mine].sum() / spread[mine].sum().clamp(min=1e-12)).item()
    return scores
