"""Clustering: how well k-means on features, without any label, recovers the classes.

As many clusters as classes are found in the normalized training features, the best of several starts by its own
criterion, the sum of squared distances. Every test image goes to the nearest center. Compared with its class are

- NMI, normalized mutual information (arithmetic mean), in percent;
- ARI, the adjusted Rand index, in percent: 0 for a random partition;
- accuracy by assignment: each cluster is named after one class, such that as many test images as possible are right
  (Kuhn, 1955, "The Hungarian method"). The names are chosen on the test labels: that is the metric's definition in the
  field (Xie et al., 2016, "Unsupervised deep embedding for clustering analysis", equation 10), and no tuned setting.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Int
from torch import Tensor

from sslbook.data.loader import Data
from sslbook.errors import UserError, at_least_one
from sslbook.evaluation.base import Metrics, Protocol, Representation
from sslbook.nn.kmeans import kmeans, nearest


class Clustering(Protocol):
    """NMI, ARI and accuracy by assignment of k-means on frozen features.

    Args:
        num_clusters: number of clusters; by default as many as there are classes.
        restarts: k-means from so many random starts, of which the tightest clusters are kept.
        iterations: updates of the centers.
        normalize: bring features to unit length first.
    """

    def __init__(
        self, num_clusters: int | None = None, restarts: int = 5, iterations: int = 50, normalize: bool = True
    ) -> None:
        at_least_one(restarts=restarts, iterations=iterations, num_clusters=1 if num_clusters is None else num_clusters)
        self.num_clusters, self.restarts = num_clusters, restarts
        self.iterations, self.normalize = iterations, normalize

    def run(self, model: Representation, data: Data) -> Metrics:
        train_x, _, test_x, test_y = model.labeled()
        count = self.num_clusters or data.num_classes
        if count > len(train_x):
            raise UserError(
                f"clustering: {count} clusters of {len(train_x)} training images: give fewer --num_clusters"
            )
        if self.normalize:
            train_x, test_x = F.normalize(train_x, dim=1), F.normalize(test_x, dim=1)
        device = model.device or "cpu"
        train_x, test_x = train_x.to(device), test_x.to(device)
        tried = []
        for start in range(self.restarts):
            centers, own = kmeans(train_x, count, self.iterations, model.seed + start)
            tried.append((float((train_x - centers[own]).square().sum(dtype=torch.float32)), start, centers))
        _, start, centers = min(tried, key=lambda one: one[:2])
        model.details[self.name] = {"clusters": count, "start": start, "squared distances": [t[0] for t in tried]}
        return scores(nearest(test_x, centers).cpu(), test_y)

    def chance(self, data: Data) -> Metrics:
        labels = data.labels("test")
        largest = 100 * labels[labels >= 0].bincount().max() / (labels >= 0).sum()
        return {"NMI": 0.0, "ARI": 0.0, "clustering accuracy": float(largest)}  # as if all were one cluster


def scores(clusters: Int[Tensor, "n"], labels: Int[Tensor, "n"]) -> Metrics:
    """NMI, ARI and accuracy by assignment of a partition, in percent."""
    from sklearn.metrics import adjusted_rand_score, normalized_mutual_info_score

    y, found = labels.numpy(), clusters.numpy()
    return {
        "NMI": 100 * float(normalized_mutual_info_score(y, found)),
        "ARI": 100 * float(adjusted_rand_score(y, found)),
        "clustering accuracy": accuracy_by_assignment(clusters, labels),
    }


def accuracy_by_assignment(clusters: Int[Tensor, "n"], labels: Int[Tensor, "n"]) -> float:
    """Percentage of images in a cluster of their class, under the best one-to-one naming of clusters."""
    from scipy.optimize import linear_sum_assignment
    from sklearn.metrics.cluster import contingency_matrix

    table = contingency_matrix(labels.numpy(), clusters.numpy())
    return 100 * float(table[linear_sum_assignment(table, maximize=True)].sum()) / len(labels)
