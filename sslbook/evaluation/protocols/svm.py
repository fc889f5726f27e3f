"""Linear SVM on frozen features, one class against the rest: the protocol of VOC07 classification.

Goyal et al. (2019, "Scaling and benchmarking self-supervised visual representation learning", section 4.1 and their
code): features of unit length, scikit-learn's LinearSVC with squared hinge loss, L2 penalty, class weights 2 for
positives and 1 for negatives. The cost C of each class is chosen by the mean average precision of a 3-fold cross
validation within the training images, then the class is trained on all of them. On images with several labels the
result is the mean average precision (mAP) over classes, in which images that are marked difficult do not count; on
images with one label also the accuracy of the class with the highest decision value.

`SVM mAP` is scikit-learn's average precision, `SVM mAP, interpolated` that of the authors' code, which is what the
literature quotes for VOC07. The authors measure features of five layers; here they are the backbone's output.

Processes divide the classes.
"""

import warnings
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn
from tqdm.auto import tqdm

from sslbook import distributed
from sslbook.data.loader import Data
from sslbook.errors import UserError
from sslbook.evaluation.base import Metrics, Protocol, Representation
from sslbook.evaluation.metrics import average_precision, classification, multi_label

COSTS = [1.0, 10.0, 100.0, *(0.5**power for power in range(4, 20))]
FOLDS = 3
NEVER = -1e30  # a decision value below all others


class SVM(Protocol):
    """mAP, and with one label an image accuracy, of linear SVMs of one class against the rest.

    Args:
        costs: the values of C to try; by default 1, 10, 100, and 2^-4 down to 2^-19. With a single one nothing is chosen.
    """

    cost = "seconds to minutes for each class"

    def __init__(self, costs: list[float] | None = None) -> None:
        self.costs = COSTS if costs is None else costs
        if not self.costs or min(self.costs) <= 0:
            raise UserError(f"costs are {self.costs}: give at least one, each more than 0")

    def run(self, model: Representation, data: Data) -> Metrics:
        train_x, train_y, test_x, test_y = unit_features(model, data)
        y, new_y = (one_hot(part, data.num_classes) for part in (train_y, test_y))
        decisions, chosen = decide(train_x, y, test_x, self.costs, progress=model.progress)
        precision, interpolated = (average_precision(decisions, new_y, inter) for inter in (False, True))
        names = data.class_names
        details: dict[str, Any] = {
            "C": {names[c]: value for c, value in chosen.items()},
            "C chosen by": f"average precision, {FOLDS}-fold cross validation of the training images",
            "average precision": {names[c]: float(v) for c, v in enumerate(precision) if not v.isnan()},
        }
        metrics = {"SVM mAP": precision.nanmean().item(), "SVM mAP, interpolated": interpolated.nanmean().item()}
        if test_y.ndim == 1:
            predicted = decisions.argmax(dim=1)
            details |= classification(predicted, test_y, names)
            metrics = {"SVM": details["accuracy"], **metrics}
        else:
            details["a class is predicted where its decision value is positive"] = multi_label(decisions > 0, new_y)
        model.details[self.name] = details
        return metrics

    def lacks(self, backbone: nn.Module, data: Data) -> str | None:
        return lack_of_classes(data, super().lacks(backbone, data))

    def chance(self, data: Data) -> Metrics:
        """Of a random order: the mean fraction of positives."""
        y = data.targets("test").long()
        y = one_hot(y[y >= 0] if y.ndim == 1 else y, data.num_classes)
        share = (y == 1).sum(0) / (y >= 0).sum(0).clamp(min=1)
        return {"SVM mAP": 100 * float(share[share > 0].mean())}


def lack_of_classes(data: Data, otherwise: str | None) -> str | None:
    """What data with several classes an image lack, or for other data what they lack `otherwise`."""
    if data.kind != "several classes":
        return otherwise
    return None if data.num_test else f"test images; {data.name} has none: give a list or a folder of its own for them"


def unit_features(model: Representation, data: Data) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Training features and targets, test features and targets; features of unit length, unlabeled images left out.

    Raises:
        UserError: a split is empty.
    """
    found = []
    for split in ("train", "test"):
        features = model.features(split)
        y = data.targets(split)[features.index].cpu()
        labeled = y >= 0 if y.ndim == 1 else torch.ones(len(y), dtype=torch.bool)
        if not labeled.any():
            raise UserError(f"an SVM needs both splits, and there are no labeled {split} images")
        found += [F.normalize(features.x[labeled], dim=1), y[labeled].long()]
    return found[0], found[1], found[2], found[3]


def one_hot(y: Int[Tensor, "n *classes"], num_classes: int) -> Int[Tensor, "n {num_classes}"]:
    """Targets 1, 0 and -1 (does not count) of every class, from one label an image or from such targets themselves."""
    return y if y.ndim == 2 else (y[:, None] == torch.arange(num_classes)).long()


def decide(
    train_x: Float[Tensor, "train dim"],
    train_y: Int[Tensor, "train classes"],
    test_x: Float[Tensor, "test dim"],
    costs: list[float],
    progress: bool = False,
) -> tuple[Float[Tensor, "test classes"], dict[int, float]]:
    """Decision values of every class, and the cost chosen for it; the lowest of equally good ones.

    A class without a positive or without a negative training image is never predicted and has no cost.
    """
    classes = range(distributed.rank(), train_y.shape[1], distributed.world_size())
    found: dict[int, tuple[float, np.ndarray]] = {}
    for c in tqdm(classes, desc="SVM", unit="class", leave=False, disable=not progress or None):
        counted = train_y[:, c] >= 0
        y = (train_y[counted, c] == 1).numpy()
        if y.any() and not y.all():
            x = train_x[counted].numpy()
            best = choose_cost(x, y, costs)
            found[c] = best, fit(x, y, best).decision_function(test_x.numpy())
    found = {c: value for part in distributed.all_gather_object(found) for c, value in part.items()}
    decisions = torch.full((len(test_x), train_y.shape[1]), NEVER, dtype=torch.float64)
    for c, (_, values) in found.items():
        decisions[:, c] = torch.from_numpy(values)
    return decisions.float(), {c: found[c][0] for c in sorted(found)}


def choose_cost(x: np.ndarray, y: np.ndarray, costs: list[float]) -> float:
    """The cost with the best average precision in cross validation; the lowest where a fold would lack positives."""
    from sklearn.metrics import average_precision_score
    from sklearn.model_selection import StratifiedKFold

    if len(costs) == 1 or min(y.sum(), (~y).sum()) < FOLDS:
        return min(costs)
    folds = list(StratifiedKFold(FOLDS).split(x, y))

    def score(cost: float) -> float:
        values = [average_precision_score(y[b], fit(x[a], y[a], cost).decision_function(x[b])) for a, b in folds]
        return float(np.mean(values))

    return max(sorted(costs), key=score)


def fit(x: np.ndarray, y: np.ndarray, cost: float) -> Any:
    """scikit-learn's linear SVM with the settings of Goyal et al."""
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.svm import LinearSVC

    model = LinearSVC(C=cost, class_weight={True: 2, False: 1}, dual=True, tol=1e-4, max_iter=2000, random_state=0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # at C = 100; the authors stop there too
        return model.fit(x, y)
