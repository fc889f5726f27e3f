"""Factor probes: which of the known factors of the Shapes data set are linearly readable from frozen features.

A categorical factor (shape, hue, background) is classified by the linear probe and scored by its accuracy in percent. A
continuous one (position, scale, light) is predicted by ridge regression and scored by 100 times R^2, the percentage of
its variance that is explained. An angle jumps from 359 degrees to 0, so its sine and cosine are predicted. The level of
chance is 0 for R^2, and the frequency of the most frequent value for an accuracy.
"""

import math

import torch
from jaxtyping import Float
from torch import Tensor, nn
from tqdm.auto import tqdm

from sslbook.data.loader import Data
from sslbook.errors import UserError
from sslbook.evaluation.base import Metrics, Protocol, Representation
from sslbook.evaluation.protocols import linear
from sslbook.evaluation.protocols.knn import majority

PERIODS = {"orientation": 360.0}  # degrees after which a factor repeats


class Factors(Protocol):
    """One linear probe for each factor of the Shapes data set.

    Args:
        seed: key of the validation part on which the penalties are chosen.
    """

    title = "Factors: accuracy, or 100 R^2 of continuous ones"
    cost = "seconds for each factor"

    def __init__(self, seed: int = 0) -> None:
        self.seed = seed

    def run(self, model: Representation, data: Data) -> Metrics:
        train, test = model.features("train"), model.features("test")
        known = [data.factors("train"), data.factors("test")]
        return probe(train.x, known[0], test.x, known[1], seed=self.seed, progress=model.progress)

    def chance(self, data: Data) -> Metrics:
        return chance_levels(data.factors("train"), data.factors("test"))

    def lacks(self, backbone: nn.Module, data: Data) -> str | None:
        if not data.factors("test"):
            return "images with known factors, which only the Shapes data set has (--data.name shapes)"
        return super().lacks(backbone, data)


def probe(
    features_train: Float[Tensor, "train dim"],
    factors_train: dict[str, Tensor],
    features_test: Float[Tensor, "test dim"],
    factors_test: dict[str, Tensor],
    *,
    seed: int = 0,
    progress: bool = False,
) -> dict[str, float]:
    """The score of each factor: accuracy in percent, or 100 R^2. A factor that never changes has none.

    Args:
        features_train: training features.
        factors_train: factors of the same images; int64 is categorical, float32 continuous.
        features_test: test features.
        factors_test: factors of the test images.
        seed: key of the validation part.
        progress: show a bar.

    Raises:
        UserError: features and factors are of different images.
    """
    for x, factors in ((features_train, factors_train), (features_test, factors_test)):
        if wrong := [name for name, value in factors.items() if len(value) != len(x)]:
            raise UserError(f"factor {wrong[0]} has {len(factors[wrong[0]])} values for {len(x)} images")
    names = list(chance_levels(factors_train, factors_test))
    continuous = [name for name in names if factors_train[name].is_floating_point()]
    targets = [{name: _targets(name, f[name]) for name in continuous} for f in (factors_train, factors_test)]
    scores = _ridge(features_train, targets[0], features_test, targets[1], seed) if continuous else {}
    for name in tqdm(names, desc="factors", leave=False, disable=None if progress else True):
        if name not in scores:
            given = features_train, factors_train[name], features_test, factors_test[name]
            scores[name] = linear.probe(*given, seed=seed).accuracy
    return {name: scores[name] for name in names}


def chance_levels(factors_train: dict[str, Tensor], factors_test: dict[str, Tensor]) -> dict[str, float]:
    """What `probe` would report for features without any information."""
    return {
        name: 0.0 if value.is_floating_point() else majority(value, factors_test[name])
        for name, value in factors_train.items()
        if name in factors_test and all(len(v.unique()) > 1 for v in (value, factors_test[name]))
    }


def _targets(name: str, value: Float[Tensor, "n"]) -> Float[Tensor, "n columns"]:
    """What is regressed for a factor: itself, or sine and cosine of an angle."""
    value = value.double().cpu()
    if name not in PERIODS:
        return value[:, None]
    angle = value * (2 * math.pi / PERIODS[name])
    return torch.stack([angle.sin(), angle.cos()], dim=1)


def _ridge(
    x: Float[Tensor, "train dim"],
    y: dict[str, Tensor],
    new_x: Float[Tensor, "test dim"],
    new_y: dict[str, Tensor],
    seed: int,
) -> dict[str, float]:
    """100 R^2 on the test images of every factor, each with the penalty that suits a validation part best."""
    held = linear.stratified(torch.zeros(len(x), dtype=torch.int64), 0.2, seed)
    kept = ~held
    if not held.any():  # a single image
        held = kept
    parts = [{name: value[rows] for name, value in y.items()} for rows in (kept, held)]
    tried = {p: _r2(x[kept], parts[0], x[held], parts[1], p) for p in linear.PENALTIES}
    best = {name: max(tried, key=lambda p: tried[p][name]) for name in y}
    final = {p: _r2(x, y, new_x, new_y, p) for p in sorted(set(best.values()))}
    return {name: 100 * final[penalty][name] for name, penalty in best.items()}


def _r2(x: Tensor, y: dict[str, Tensor], new_x: Tensor, new_y: dict[str, Tensor], penalty: float) -> dict[str, float]:
    """R^2 on new images of ridge regression on standardized features; the penalty is relative to one image.

    The columns of a factor, (n, 1) or (n, 2), share the sums of squares.
    """
    from sklearn.linear_model import Ridge
    from sklearn.metrics import r2_score

    mean, std = linear.moments(x)
    model = Ridge(alpha=penalty * len(x)).fit(((x - mean) / std).double().numpy(), torch.cat([*y.values()], 1).numpy())
    predicted = torch.from_numpy(model.predict(((new_x - mean) / std).double().numpy())).reshape(len(new_x), -1)
    columns = predicted.split([value.shape[1] for value in y.values()], dim=1)
    shared = {"multioutput": "variance_weighted"}
    return {name: float(r2_score(new_y[name].numpy(), c.numpy(), **shared)) for name, c in zip(y, columns)}
