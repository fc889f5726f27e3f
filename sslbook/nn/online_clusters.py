"""Clusters that move with every batch.

Zhan, Xie, Liu, Ong and Loy, 2020, "Online deep clustering for unsupervised representation learning"
(arXiv:2006.10645), sections 3.1 and 3.2; InterCLR (arXiv:2008.11702) uses the same.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from sslbook import distributed, rng
from sslbook.errors import UserError
from sslbook.nn.kmeans import check_clusters, kmeans
from sslbook.nn.memory_bank import MemoryBank


class OnlineClusters(nn.Module):
    """A feature and a cluster for every image, and the centroids of the clusters.

    Everything is the same in all processes and computed alike in each of them. An image that cannot be read has the
    cluster -1. Nearness is the inner product with the plain mean of a cluster's features, as in the authors' code.

    Args:
        num_clusters: how many clusters.
        dim: width of the features.
        momentum: how much of itself a feature keeps when its image is seen.
        min_cluster: clusters with fewer images are dissolved.
    """

    assignment: Tensor
    centroids: Tensor

    def __init__(self, num_clusters: int, dim: int, momentum: float, min_cluster: int) -> None:
        super().__init__()
        self.num_clusters, self.momentum, self.min_cluster = num_clusters, momentum, min_cluster
        self.memory = MemoryBank(dim)
        self.register_buffer("assignment", torch.empty(0, dtype=torch.int64))
        self.register_buffer("centroids", torch.zeros(num_clusters, dim))

    def allocate(self, images: int) -> None:
        """Makes room for so many images, in clusters at random; a `UserError` if they are too few."""
        check_clusters(self.num_clusters, images)
        if self.num_clusters * self.min_cluster > images:
            raise UserError(
                f"{self.num_clusters} clusters of at least {self.min_cluster} images need more than {images}: "
                "lower --method.num_clusters or --method.min_cluster"
            )
        self.memory.allocate(images)
        self.assignment = (rng.permutation(0, 0, images) % self.num_clusters).to(self.assignment.device)
        self.move_centroids()

    @torch.no_grad()
    def begin(self, features: Float[Tensor, "n dim"], index: Int[Tensor, "n"], seed: int, iterations: int = 20) -> None:
        """The first features of all readable images, and their clusters by k-means."""
        x = F.normalize(features, dim=1)
        _, clusters = kmeans(x, self.num_clusters, iterations, seed)
        self.assignment.fill_(-1)
        self.memory.rows[index], self.assignment[index] = x, clusters
        self.move_centroids()
        self.deal_with_small_clusters()

    def sizes(self) -> Int[Tensor, "clusters"]:
        """Images in every cluster."""
        return self.assignment[self.assignment >= 0].bincount(minlength=self.num_clusters)

    @torch.no_grad()
    def move_samples(self, index: Int[Tensor, "n"], x: Float[Tensor, "n dim"]) -> Float[Tensor, ""]:
        """The batch's rows follow its features and go to the nearest centroid; returns the part that changed over."""
        self.memory.update(index, F.normalize(x, dim=1), self.momentum)
        index = distributed.all_gather(index)
        old = self.assignment[index]
        self.assignment[index] = (self.memory.rows[index] @ self.centroids.T).argmax(dim=1)
        return (self.assignment[index] != old).float().mean()

    @torch.no_grad()
    def move_centroids(self) -> None:
        """Every centroid to the mean of its rows; an empty one stays."""
        sums, sizes = torch.zeros_like(self.centroids, dtype=torch.float64), self.sizes()
        for rows, clusters in zip(self.memory.rows.split(2**16), self.assignment.split(2**16)):
            sums.index_add_(0, clusters[clusters >= 0], rows[clusters >= 0].double())
        means = (sums / sizes.clamp(min=1)[:, None]).float()
        self.centroids.copy_(torch.where(sizes[:, None] > 0, means, self.centroids))

    @torch.no_grad()
    def deal_with_small_clusters(self) -> None:
        """Dissolves clusters below `min_cluster` and puts halves of the largest ones in their places (section 3.2)."""
        small = (self.sizes() < self.min_cluster).nonzero()[:, 0]
        if not len(small):
            return
        large = torch.ones(self.num_clusters, dtype=torch.bool, device=small.device)
        large[small] = False
        large = large.nonzero()[:, 0]
        if len(large):
            lost = torch.isin(self.assignment, small).nonzero()[:, 0]
            self.assignment[lost] = large[(self.memory.rows[lost] @ self.centroids[large].T).argmax(dim=1)]
        for empty in small:
            if self.sizes()[empty]:
                continue  # all clusters were small: those that have images stay
            self.split(int(self.sizes().argmax()), int(empty))

    def split(self, largest: int, empty: int) -> None:
        """Half of one cluster's images go to another, which has none."""
        members = (self.assignment == largest).nonzero()[:, 0]
        rows = self.memory.rows[members]
        _, half = kmeans(rows, 2, 20, 0)
        if half.min() == half.max():  # all rows are the same
            half = torch.arange(len(members), device=members.device) % 2
        self.assignment[members[half == 1]] = empty
        for side, cluster in enumerate((largest, empty)):
            self.centroids[cluster] = rows[half == side].mean(dim=0)
