"""DeepCluster: cluster the features, take the clusters for classes, learn to tell these classes apart, and repeat.

Even an untrained convolutional network puts some similar images near each other, and training on its own clusters
sharpens what it has. Two things keep it from the easy ways out: an empty cluster is filled from the largest, and an
epoch shows all clusters equally often, however many images they have.

Caron, Bojanowski, Joulin and Douze, 2018, "Deep clustering for unsupervised learning of visual features"
(arXiv:1807.05520), sections 3.2 and 3.3. Values and order of events are those of the authors' code (PCA with whitening
to 256, k-means with 10,000 clusters before every epoch, a new classifier each time). What differs:

- The classifier stands on the backbone's features; the authors' AlexNet and VGG have two hidden layers with dropout
  before, which residual networks lack.
- The first centroids, the new classifier and the order of images are drawn with counter-based random numbers. What an optimizer remembers
  of the old classifier stays (a recipe can give the classifier no momentum, as in the authors' code).
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from sslbook import rng
from sslbook.data.loader import Batch, Data
from sslbook.data.views import View
from sslbook.errors import UserError
from sslbook.methods.base import Method
from sslbook.nn import Sobel, backbone_dim
from sslbook.nn.kmeans import check_clusters, embed, kmeans, pca_whiten
from sslbook.schedules import Clock

VIEW = View(crop=(0.08, 1.0))


def uniform_order(assignment: Int[Tensor, "images"], num_clusters: int, seed: int, epoch: int) -> Int[Tensor, "images"]:
    """As many images as there are, such that every cluster that has any gives about equally many (section 3.3).

    A cluster with more than its share gives different images, a smaller one repeats some. Images of cluster -1 are
    left out.
    """
    assignment = assignment.cpu()
    images = len(assignment)
    key = rng.uniform(seed, epoch, torch.arange(images), rng.METHOD, 1)[:, 0]
    shuffled = key.argsort(stable=True)
    members = shuffled[assignment[shuffled].argsort(stable=True)]  # cluster by cluster, each in random order
    sizes = assignment[assignment >= 0].bincount(minlength=num_clusters)
    starts = images - sizes.sum() + sizes.cumsum(0) - sizes  # those of cluster -1 come first
    filled = sizes.nonzero()[:, 0]
    sizes, starts = sizes[filled, None], starts[filled, None]
    share = images // len(filled) + 1
    u = rng.uniform(seed, epoch, filled, rng.METHOD + 1, share)
    place = torch.where(sizes > share, torch.arange(share), (u.double() * sizes).long())
    chosen = members[(starts + place).flatten()]
    return chosen[rng.permutation(seed, epoch, len(chosen))][:images]


class DeepCluster(Method):
    """Deep clustering (arXiv:1807.05520).

    Args:
        backbone: the network to train.
        view: what an image becomes in training.
        cluster_resize: for clustering, the shorter side of an image is brought to this length, and the center of the
            view's size is seen.
        sobel: show the network edges instead of colors, as the authors do.
        num_clusters: how many clusters.
        pca_dim: principal components of the features that are clustered.
        kmeans_iterations: how often k-means moves its centroids.
        recluster_every: epochs between clusterings.
    """

    def __init__(
        self,
        backbone: nn.Module,
        view: View = VIEW,
        cluster_resize: int = 256,
        sobel: bool = True,
        num_clusters: int = 10000,
        pca_dim: int = 256,
        kmeans_iterations: int = 20,
        recluster_every: int = 1,
    ) -> None:
        super().__init__()
        dim = backbone_dim(backbone)
        if pca_dim > dim:
            raise UserError(f"{pca_dim} principal components of {dim} features: set --method.pca_dim to {dim} or less")
        self.view, self.num_clusters, self.pca_dim = view, num_clusters, pca_dim
        self.cluster_view = View.center(view.size, max(cluster_resize, view.size), view.mean, view.std)
        self.kmeans_iterations, self.recluster_every = kmeans_iterations, recluster_every
        self.backbone = Sobel(backbone) if sobel else backbone
        self.classifier = nn.Linear(dim, num_clusters)
        self.register_buffer("assignment", torch.empty(0, dtype=torch.int64))

    assignment: Tensor

    def views(self) -> tuple[View, ...]:
        return (self.view,)

    def setup(self, data: Data) -> None:
        check_clusters(self.num_clusters, data.num_train)
        if self.pca_dim > data.num_train:
            raise UserError(f"{self.pca_dim} principal components of {data.num_train} images: lower --method.pca_dim")
        start = rng.uniform(0, 0, torch.arange(data.num_train), rng.METHOD, 1)[:, 0]
        self.assignment = (start * self.num_clusters).long().to(self.assignment.device)

    def before_epoch(self, data: Data, clock: Clock) -> None:
        if clock.epoch % self.recluster_every:
            return
        features, index = embed(self.backbone, data, self.cluster_view)
        x = pca_whiten(features, self.pca_dim)
        _, clusters = kmeans(x, self.num_clusters, self.kmeans_iterations, 100003 * clock.seed + clock.epoch)
        self.assignment.fill_(-1)  # unreadable images have no cluster and are not shown
        self.assignment[index] = clusters
        self.renew_classifier(clock)

    @torch.no_grad()
    def renew_classifier(self, clock: Clock) -> None:
        """The new clusters have nothing to do with the old: the classifier begins anew."""
        generator = torch.Generator().manual_seed(100003 * clock.seed + clock.epoch)
        weight = 0.01 * torch.randn(self.classifier.weight.shape, generator=generator)
        self.classifier.weight.copy_(weight)
        self.classifier.bias.zero_()

    def sample_order(self, data: Data, clock: Clock) -> Int[Tensor, "images"] | None:
        return uniform_order(self.assignment, self.num_clusters, clock.seed, clock.epoch)

    def forward(self, batch: Batch, clock: Clock) -> dict[str, Tensor]:
        label = self.assignment[batch.index]
        logits: Float[Tensor, "n clusters"] = self.classifier(self.backbone(batch.views[0])).float()
        accuracy = 100 * (logits.argmax(dim=1) == label).float().mean()
        largest = self.assignment[self.assignment >= 0].bincount(minlength=self.num_clusters).max()
        return {
            "loss": F.cross_entropy(logits, label, ignore_index=-1),
            "cluster_accuracy": accuracy,
            "largest_cluster": largest / len(self.assignment),
        }
