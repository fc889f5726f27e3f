"""Few-shot classification: k labeled images of each class, a linear SVM on frozen features, all test images.

For every k the k images are sampled several times, by the seed; mean and standard deviation over the samples are
reported. As low-shot VOC07 of Goyal et al. (2019, "Scaling and benchmarking self-supervised visual representation
learning", section 4.2): one class against the rest, features of unit length, class weights 2 and 1. Two differences: the
cost C is fixed, since with k images none can be set aside to choose it and the authors chose it on the test images;
and on images with one label the result is accuracy. On images with several labels it is mean average precision, and k
positives of each class are sampled from its positives, with all images of the other samples as negatives.
"""

import torch
from jaxtyping import Int
from torch import Tensor, nn

from sslbook import rng
from sslbook.data.loader import Data
from sslbook.errors import UserError, at_least_one
from sslbook.evaluation.base import Metrics, Protocol, Representation
from sslbook.evaluation.metrics import average_precision, top_k
from sslbook.evaluation.protocols.knn import majority
from sslbook.evaluation.protocols.svm import decide, lack_of_classes, one_hot, unit_features


class FewShot(Protocol):
    """Accuracy (mAP with several labels an image) from k labeled images of each class: mean and std over samples.

    Args:
        shots: the numbers k of images of each class.
        samples: how often the k images are sampled.
        svm_cost: C of the linear SVM.
    """

    title = "Few-shot: accuracy from k images a class, or mAP; mean and std over samples"
    cost = "seconds to minutes"

    def __init__(self, shots: list[int] | None = None, samples: int = 5, svm_cost: float = 1.0) -> None:
        self.shots, self.samples, self.svm_cost = [1, 2, 4, 8, 16] if shots is None else shots, samples, svm_cost
        at_least_one(samples=samples)
        if not self.shots:
            raise UserError("shots is empty: give at least one number of images")
        for k in self.shots:
            at_least_one(shots=k)
        if not svm_cost > 0:
            raise UserError(f"svm_cost is {svm_cost}: give more than 0")

    def run(self, model: Representation, data: Data) -> Metrics:
        train_x, train_y, test_x, test_y = unit_features(model, data)
        targets, new_targets = (one_hot(y, data.num_classes) for y in (train_y, test_y))
        wanted = (targets == 1).sum(0)[(new_targets == 1).any(0)]
        if (fewest := int(wanted.min())) < max(self.shots):
            c = int((targets == 1).sum(0).where((new_targets == 1).any(0), len(targets) + 1).argmin())
            raise UserError(
                f"few_shot: class {data.class_names[c]} has {fewest} training images, fewer than k = {max(self.shots)}: "
                + (f"give --shots up to {fewest}" if fewest else "add some, or leave out its test images")
            )
        metrics: Metrics = {}
        everything: dict[str, list[float]] = {}
        for k in self.shots:
            found = []
            for sample in range(self.samples):
                rows = sampled(targets, k, model.seed, sample)
                decisions, _ = decide(train_x[rows], targets[rows], test_x, [self.svm_cost])
                if test_y.ndim == 1:
                    found.append(top_k(decisions.argmax(dim=1, keepdim=True), test_y))
                else:
                    found.append(average_precision(decisions, new_targets).nanmean().item())
            values = everything[f"{k}-shot"] = found
            metrics[f"{k}-shot"] = torch.tensor(values).mean().item()
            if self.samples > 1:
                metrics[f"{k}-shot, std"] = torch.tensor(values).std().item()
        model.details[self.name] = {"by sample": everything}
        return metrics

    def lacks(self, backbone: nn.Module, data: Data) -> str | None:
        return lack_of_classes(data, super().lacks(backbone, data))

    def chance(self, data: Data) -> Metrics:
        if data.targets("test").ndim > 1:
            return {}
        level = majority(data.labels("train"), data.labels("test"))
        return {f"{k}-shot": level for k in self.shots}


def sampled(targets: Int[Tensor, "n classes"], k: int, seed: int, sample: int) -> Int[Tensor, "some"]:
    """Positions of k positives of every class, in ascending order; an image may stand for several of its classes.

    The samples of different k are nested: the first k of one random order.
    """
    order = rng.permutation(seed, sample, len(targets))
    return torch.cat([order[targets[order, c] == 1][:k] for c in range(targets.shape[1])]).unique()
