"""Linear probe: accuracy of one linear layer, trained on frozen features to predict the labels.

Multinomial logistic regression (scikit-learn, L-BFGS) on features standardized with the training set's mean and
standard deviation. The weight of the L2 penalty is chosen on a stratified validation part of the *training* images, the
layer is then trained again on all of them, and the test images are classified once.

The features are of one fixed view per image. The paper-scale protocol, which trains the layer on features of augmented
images for about 100 epochs (He et al., 2020, "Momentum contrast", section 4.1), is a different and much more expensive
measurement; figures of this probe are not comparable with those of papers.

Time grows with images x features x classes. On one CPU core, with ten classes: 1.4 s for 3,000 x 128, 6 s for
10,000 x 512, 14 s for 10,000 x 2,048. Batched SGD over six learning rates took 1.1 s, 2.8 s and 44 s for the same, and
its learning rates were too low for the first of them (90.9 % instead of 92.8 %).
"""

import warnings
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from sslbook import rng
from sslbook.data.loader import Data
from sslbook.errors import UserError
from sslbook.evaluation.base import Metrics, Protocol, Representation
from sslbook.evaluation.metrics import MANY, classification, confusion_figure, top_k
from sslbook.evaluation.protocols.knn import majority
from sslbook.types import Fraction

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SMALL = 10_000_000  # numbers in a matrix of features
PENALTIES = (10.0, 1.0, 0.1, 0.01, 1e-3, 1e-4)  # of the squared weights, relative to the mean loss of an image
PATIENCE = 2  # penalties without a better validation accuracy before weaker ones are passed over: they only take longer
ITERATIONS = 100  # of L-BFGS; three times as many changed the accuracy by 0.1 points


class Linear(Protocol):
    """Accuracy of a linear probe; top-5 too where there are more than ten classes.

    Args:
        validation: the fraction of each class that is set aside for the choice of the penalty.
        seed: key of this split.
    """

    cost = "seconds to minutes"

    def __init__(self, validation: Fraction = 0.2, seed: int = 0) -> None:
        self.validation, self.seed = validation, seed
        self._details: dict[str, Any] = {}

    def run(self, model: Representation, data: Data) -> Metrics:
        train_x, train_y, test_x, test_y = model.labeled()
        found = probe(train_x, train_y, test_x, test_y, validation=self.validation, seed=self.seed)
        ranked = found.classifier.ranked(test_x, top=5)
        self._details = model.details[self.name] = {
            "penalty": found.penalty,
            "validation accuracy": {str(penalty): accuracy for penalty, accuracy in found.validation.items()},
            "penalty chosen on": f"a fraction of {self.validation} of the training images",
            **classification(ranked[:, 0], test_y, data.class_names),
        }
        more = {"linear top-5": top_k(ranked, test_y)} if data.num_classes > MANY else {}
        return {"linear": found.accuracy, **more}

    def figures(self) -> dict[str, "Figure"]:
        confusion = self._details.get("confusion")
        return {"confusion": confusion_figure(confusion, "linear probe")} if confusion else {}

    def chance(self, data: Data) -> Metrics:
        return {"linear": majority(data.labels("train"), data.labels("test"))}


class Classifier:
    """A linear layer on standardized features.

    Args:
        mean: of the training features.
        std: of the training features.
        model: scikit-learn's; None where there is a single class.
        classes: the labels, in the order of the model's outputs.
    """

    def __init__(self, mean: Tensor, std: Tensor, model: Any, classes: Int[Tensor, "classes"]) -> None:
        self.mean, self.std, self.model, self.classes = mean, std, model, classes

    def log_probabilities(self, x: Float[Tensor, "n dim"]) -> Float[Tensor, "n classes"]:
        """Log probabilities of the classes."""
        if self.model is None:
            return torch.zeros(len(x), 1, dtype=torch.float64)
        scores = torch.from_numpy(self.model.decision_function(((x - self.mean) / self.std).numpy())).double()
        if scores.ndim == 1:  # of two classes the model scores the second alone
            scores = torch.stack([torch.zeros_like(scores), scores], dim=1)
        return scores.log_softmax(dim=1)

    def ranked(self, x: Float[Tensor, "n dim"], top: int = 1) -> Int[Tensor, "n top"]:
        """The most likely labels, at most `top` of them; the lower label first where two are equal."""
        order = self.log_probabilities(x).sort(dim=1, descending=True, stable=True).indices[:, :top]
        return self.classes[order]


@dataclass(frozen=True)
class LinearResult:
    """What the probe found.

    Args:
        accuracy: percentage of test images classified correctly.
        penalty: the weight of the L2 penalty, chosen on the validation part.
        validation: accuracy on the validation part, in percent, of every penalty tried.
        classifier: the layer, trained on all training images.
    """

    accuracy: float
    penalty: float
    validation: dict[float, float]
    classifier: Classifier = field(compare=False)


def probe(
    train_x: Float[Tensor, "train dim"],
    train_y: Int[Tensor, "train"],
    test_x: Float[Tensor, "test dim"],
    test_y: Int[Tensor, "test"],
    *,
    penalties: tuple[float, ...] = PENALTIES,
    validation: float = 0.2,
    seed: int = 0,
) -> LinearResult:
    """Choose the penalty on a validation part, train on all, test once. The same arguments give the same result.

    Args:
        train_x: training features.
        train_y: their labels, none missing.
        test_x: test features.
        test_y: their labels.
        penalties: weights of the L2 penalty to try, from strong to weak; of equally good ones the stronger is taken.
        validation: the fraction of each class that is set aside for the choice.
        seed: key of the split.

    Raises:
        UserError: a split is empty.
    """
    if len(train_x) == 0 or len(test_x) == 0:
        raise UserError(f"the linear probe needs both splits; got {len(train_x)} training, {len(test_x)} test images")
    classifier, penalty, found = train(train_x, train_y, penalties=penalties, validation=validation, seed=seed)
    return LinearResult(top_k(classifier.ranked(test_x), test_y.cpu()), penalty, found, classifier)


def train(
    train_x: Float[Tensor, "train dim"],
    train_y: Int[Tensor, "train"],
    *,
    penalties: tuple[float, ...] = PENALTIES,
    validation: float = 0.2,
    seed: int = 0,
) -> tuple[Classifier, float, dict[float, float]]:
    """The classifier trained on all images, its penalty, and the validation accuracy of each tried; see `probe`."""
    train_y = train_y.cpu()
    mean, std = moments(train_x)
    if bool((train_y == train_y[0]).all()):  # one class: nothing to separate
        return Classifier(mean, std, None, train_y[:1]), penalties[0], {}
    held = stratified(train_y, validation, seed)
    kept = ~held
    if not held.any():  # not one class with two images: nothing can be set aside
        held = kept
    mean, std = moments(train_x[kept])
    fit, found = _model(), {}
    for penalty in penalties:
        fit.C = 1 / (penalty * int(kept.sum()))
        _fit(fit, (train_x[kept] - mean) / std, train_y[kept])  # from the weights of the penalty before
        found[penalty] = 100 * fit.score(((train_x[held] - mean) / std).numpy(), train_y[held].numpy())
        best = max(found, key=lambda p: found[p])
        if list(found).index(best) + PATIENCE < len(found):
            break
    mean, std = moments(train_x)
    fit = _model(C=1 / (best * len(train_x)))
    _fit(fit, (train_x - mean) / std, train_y)
    return Classifier(mean, std, fit, torch.from_numpy(fit.classes_)), best, found


def stratified(labels: Int[Tensor, "n"], fraction: float, seed: int = 0) -> Bool[Tensor, "n"]:
    """Marks about `fraction` of every class, at least one of a class with two; the choice is keyed by `seed`."""
    order = rng.permutation(seed, 0, len(labels))
    order = order[labels[order].argsort(stable=True)]  # by class, within a class at random
    _, counts = labels.unique(return_counts=True)
    first = counts.cumsum(0) - counts
    rank = torch.arange(len(labels)) - first.repeat_interleave(counts)
    wanted = (counts * fraction).floor().clamp(min=1).minimum(counts - 1)
    marked = torch.zeros(len(labels), dtype=torch.bool)
    marked[order] = rank < wanted.repeat_interleave(counts)
    return marked


def moments(x: Float[Tensor, "n dim"]) -> tuple[Float[Tensor, "dim"], Float[Tensor, "dim"]]:
    """Mean and standard deviation of each feature; of a constant feature the standard deviation is 1."""
    std, mean = torch.std_mean(x.double(), dim=0, correction=0)
    # A rounding error is no standard deviation: dividing by it would scale a dead feature up to the size of the others.
    constant = std <= 1e-6 * mean.abs().clamp(min=1e-6)
    return mean.float(), torch.where(constant, 1.0, std).float()


def _model(**options):
    from sklearn.linear_model import LogisticRegression  # takes a second to import

    return LogisticRegression(max_iter=ITERATIONS, warm_start=True, **options)


def _fit(model, x: Float[Tensor, "n dim"], y: Int[Tensor, "n"]) -> None:
    from threadpoolctl import threadpool_limits  # comes with scikit-learn

    threads = 1 if x.numel() < SMALL else None  # on small matrices threads wait for each other longer than they compute
    with warnings.catch_warnings(), threadpool_limits(limits=threads):
        warnings.filterwarnings("ignore", message="lbfgs failed to converge")  # stopping early costs no accuracy
        model.fit(x.numpy(), y.numpy())
