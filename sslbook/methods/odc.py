"""ODC: DeepCluster with clusters that are updated after every batch instead of every epoch.

A memory bank holds a feature and a cluster for every image, another memory the centroids. After a batch, the features
of its images are updated and assigned to the nearest centroids; clusters that became too small are dissolved, and the
largest ones are split to replace them. The pseudo-labels thus change gradually, together with the classifier.

Zhan, Xie, Liu, Ong and Loy, 2020, "Online deep clustering for unsupervised representation learning" (arXiv:2006.10645),
sections 3.1 to 3.3. The defaults and the order of events are those of the authors' code (open-mmlab/OpenSelfSup):
similarity to a centroid is the inner product with the plain mean of its features, and the loss of a class is weighted
by frequency^-0.5.

What differs from the authors' code (open-mmlab/mmselfsup, 1887786):
- Dropout, the first centroids and the halves of a split cluster are functions of the seed, and the memories are updated
  identically in every process, so that one process and several have the same clusters.
- The weighted loss is averaged over the global batch instead of each GPU's images.
- The authors' code also rotates every image by up to 2 degrees.
- An epoch shows every image once; the authors' code samples images with replacement, so that one shows 63 % of them.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from sslbook import distributed, rng
from sslbook.data.loader import Batch, Data
from sslbook.data.views import View
from sslbook.errors import UserError
from sslbook.methods.base import Method
from sslbook.nn import MemoryBank, backbone_dim
from sslbook.nn.kmeans import check_clusters, embed, kmeans
from sslbook.schedules import Clock
from sslbook.types import PositiveInt

VIEW = View(crop=(0.08, 1.0), color_jitter=(0.4, 0.4, 1.0, 0.5), color_jitter_p=1.0, grayscale=0.2)


def weighted_cross_entropy(
    logits: Float[Tensor, "n clusters"], label: Int[Tensor, "n"], sizes: Int[Tensor, "clusters"]
) -> Float[Tensor, ""]:
    """Mean cross-entropy in which an image is weighted by its cluster's size to the power -0.5 (section 3.3).

    An image of cluster -1 does not count.
    """
    weight = sizes.clamp(min=1).float().rsqrt()[label.clamp(min=0)] * (label >= 0)
    each = F.cross_entropy(logits, label, reduction="none", ignore_index=-1)
    total = distributed.all_reduce_mean(weight.sum()).clamp(min=1e-9)  # 0 if all images are of cluster -1
    return (weight * each).sum() / total


class Neck(nn.Module):
    """Two linear layers with batch norm and dropout between backbone and classifier.

    As in the authors' code, batch norm has no scale and shift, and its running statistics have a momentum of 0.001.
    """

    def __init__(self, in_dim: int, hidden_dim: int, out_dim: int) -> None:
        super().__init__()
        self.first = nn.Linear(in_dim, hidden_dim, bias=False)
        self.norm = nn.BatchNorm1d(hidden_dim, momentum=0.001, affine=False)
        self.second = nn.Linear(hidden_dim, out_dim)

    def forward(
        self, x: Float[Tensor, "n in_dim"], kept: Bool[Tensor, "n hidden"] | None = None
    ) -> Float[Tensor, "n out_dim"]:
        """`kept` is the mask of dropout with probability 1/2: kept values are doubled, the others become zero."""
        hidden = F.relu(self.norm(self.first(x)))
        if kept is not None:
            hidden = 2 * hidden * kept
        return F.relu(self.second(hidden))


class OnlineClusters(nn.Module):
    """The samples memory (a feature and a cluster for every image) and the centroids memory (section 3.1).

    Every process computes both, identically. An unreadable image has the cluster -1. The nearest centroid is that of
    the largest inner product. InterCLR has the same clusters.

    Args:
        num_clusters: number of clusters.
        dim: width of the features.
        momentum: momentum of an image's feature when it is updated.
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
        """Sizes the memories for so many images, in random clusters.

        Raises:
            UserError: there are too few images for the clusters and their smallest size.
        """
        check_clusters(self.num_clusters, images)
        if self.num_clusters * self.min_cluster > images:
            raise UserError(
                f"{self.num_clusters} clusters of at least {self.min_cluster} images need more than {images}: "
                "lower --method.num_clusters or --method.min_cluster"
            )
        self.memory.allocate(images)
        self.assignment = (rng.permutation(0, 0, images) % self.num_clusters).to(self.assignment.device)
        self.update_centroids()

    @torch.no_grad()
    def initialize(self, features: Float[Tensor, "n dim"], index: Int[Tensor, "n"], seed: int) -> None:
        """Sets the features of all readable images, and clusters them by k-means."""
        x = F.normalize(features, dim=1)
        self.assignment.fill_(-1)
        _, self.assignment[index] = kmeans(x, self.num_clusters, 20, seed)
        self.memory.rows[index] = x
        self.update_centroids()
        self.replace_small_clusters()

    def sizes(self) -> Int[Tensor, "clusters"]:
        """Images in every cluster."""
        return self.assignment[self.assignment >= 0].bincount(minlength=self.num_clusters)

    @torch.no_grad()
    def update_samples(self, index: Int[Tensor, "n"], x: Float[Tensor, "n dim"]) -> Float[Tensor, ""]:
        """Updates the batch's features and assigns them to the nearest centroids; returns the fraction reassigned."""
        self.memory.update(index, F.normalize(x, dim=1), self.momentum)
        index = distributed.all_gather(index)
        old = self.assignment[index]
        self.assignment[index] = (self.memory.rows[index] @ self.centroids.T).argmax(dim=1)
        return (self.assignment[index] != old).float().mean()

    @torch.no_grad()
    def update_centroids(self) -> None:
        """Moves every centroid to the mean of its features; that of an empty cluster stays."""
        sums, sizes = torch.zeros_like(self.centroids, dtype=torch.float64), self.sizes()
        for rows, clusters in zip(self.memory.rows.split(2**16), self.assignment.split(2**16)):
            sums.index_add_(0, clusters[clusters >= 0], rows[clusters >= 0].double())
        means = (sums / sizes.clamp(min=1)[:, None]).float()
        self.centroids.copy_(torch.where(sizes[:, None] > 0, means, self.centroids))

    @torch.no_grad()
    def replace_small_clusters(self) -> None:
        """Dissolves clusters below `min_cluster` and replaces them by halves of the largest ones (section 3.2)."""
        is_small = self.sizes() < self.min_cluster
        small, large = is_small.nonzero()[:, 0], (~is_small).nonzero()[:, 0]
        if len(small) and len(large):
            lost = torch.isin(self.assignment, small).nonzero()[:, 0]
            self.assignment[lost] = large[(self.memory.rows[lost] @ self.centroids[large].T).argmax(dim=1)]
        for cluster in small:
            if self.sizes()[cluster] == 0:  # else all clusters were small, and it stays
                self.split(int(self.sizes().argmax()), int(cluster))

    def split(self, largest: int, empty: int) -> None:
        """Moves half of the images of the largest cluster into an empty one, by k-means with two clusters."""
        members = (self.assignment == largest).nonzero()[:, 0]
        rows = self.memory.rows[members]
        _, half = kmeans(rows, 2, 20, 0)
        if half.min() == half.max():  # all rows are equal
            half = torch.arange(len(members), device=members.device) % 2
        self.assignment[members[half == 1]] = empty
        for side, cluster in enumerate((largest, empty)):
            self.centroids[cluster] = rows[half == side].mean(dim=0)


class ODC(Method):
    """Online deep clustering (arXiv:2006.10645).

    Args:
        backbone: the network to train.
        view: augmentation of an image.
        cluster_resize: for the first clustering, an image's shorter side is resized to this length in pixels, and a
            center crop of the view's size is taken.
        hidden_dim: hidden width between backbone and classifier.
        feature_dim: width of the features in the memory bank.
        num_clusters: number of clusters.
        momentum: momentum of the memory bank's features.
        min_cluster: clusters with fewer images are dissolved.
        centroids_every: steps between updates of all centroids.
    """

    def __init__(
        self,
        backbone: nn.Module,
        view: View = VIEW,
        cluster_resize: PositiveInt = 256,
        hidden_dim: PositiveInt = 512,
        feature_dim: PositiveInt = 256,
        num_clusters: PositiveInt = 10000,
        momentum: float = 0.5,
        min_cluster: int = 20,
        centroids_every: PositiveInt = 10,
    ) -> None:
        super().__init__()
        self.view = view
        self.cluster_view = View.center(view.size, max(cluster_resize, view.size), view.mean, view.std)
        self.centroids_every = centroids_every
        self.backbone = backbone
        self.neck = Neck(backbone_dim(backbone), hidden_dim, feature_dim)
        self.classifier = nn.Linear(feature_dim, num_clusters)
        self.clusters = OnlineClusters(num_clusters, feature_dim, momentum, min_cluster)

    def views(self) -> tuple[View, ...]:
        return (self.view,)

    def setup(self, data: Data) -> None:
        self.clusters.allocate(data.num_train)

    def before_epoch(self, data: Data, clock: Clock) -> None:
        if clock.epoch == 0:
            features, index = embed(nn.Sequential(self.backbone, self.neck), data, self.cluster_view)
            self.clusters.initialize(features, index, clock.seed)

    def forward(self, batch: Batch, clock: Clock) -> dict[str, Tensor]:
        kept = rng.uniform(clock.seed, clock.epoch, batch.index, rng.METHOD, self.neck.first.out_features) < 0.5
        x = self.neck(self.backbone(batch.views[0]), kept)  # (n, dim)
        # Pseudo-labels from before this batch.
        logits, label = self.classifier(x).float(), self.clusters.assignment[batch.index]
        loss = weighted_cross_entropy(logits, label, self.clusters.sizes())  # section 3.3
        accuracy = 100 * (logits.argmax(dim=1) == label).float().mean()
        # Samples memory: new features, then new labels (section 3.1). Nothing here passes a gradient.
        reassigned = self.clusters.update_samples(batch.index, x.detach().float())
        return {"loss": loss, "cluster_accuracy": accuracy, "reassigned": 100 * reassigned}

    def after_step(self, clock: Clock) -> None:
        if clock.step % self.centroids_every == 0:
            self.clusters.update_centroids()
        self.clusters.replace_small_clusters()
