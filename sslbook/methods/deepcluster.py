"""DeepCluster: cluster the features with k-means, train a classifier on the clusters as pseudo-labels, and repeat.

Even an untrained convolutional network maps some similar images near each other, and training on its own clusters
amplifies this. Two measures prevent trivial solutions: an empty cluster is filled from the largest one, and images are
sampled uniformly over clusters; otherwise the largest cluster would absorb the others.

Caron, Bojanowski, Joulin and Douze, 2018, "Deep clustering for unsupervised learning of visual features"
(arXiv:1807.05520), sections 3.2 and 3.3. The defaults and the order of events are those of the authors' code
(facebookresearch/deepcluster): PCA with whitening to 256 dimensions, k-means with 10,000 clusters before every epoch, a
new classifier each time.

What differs from the authors' code (facebookresearch/deepcluster, b90f878):
- The classifier stands on the backbone's features. The authors' AlexNet and VGG have two hidden layers with dropout
  before it, which residual networks lack.
- The first centroids, the new classifier and the order of images are functions of the seed and the epoch.
- The optimizer's state of the old classifier stays. A recipe can give the classifier no momentum, as the authors do.
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
from sslbook.types import PositiveInt

VIEW = View(crop=(0.08, 1.0))


def uniform_order(assignment: Int[Tensor, "images"], num_clusters: int, seed: int, epoch: int) -> Int[Tensor, "images"]:
    """An epoch's images, sampled uniformly over the non-empty clusters (section 3.3), as many as there are images.

    A cluster larger than its share contributes different images, a smaller one repeats some. Images of cluster -1 are
    left out.
    """
    assignment = assignment.cpu()
    images = len(assignment)
    key = rng.uniform(seed, epoch, torch.arange(images), rng.METHOD, 1)[:, 0]
    shuffled = key.argsort(stable=True)
    members = shuffled[assignment[shuffled].argsort(stable=True)]  # sorted by cluster, in random order within each
    sizes = assignment[assignment >= 0].bincount(minlength=num_clusters)
    starts = images - sizes.sum() + sizes.cumsum(0) - sizes  # images of cluster -1 come first
    filled = sizes.nonzero()[:, 0]
    sizes, starts = sizes[filled, None], starts[filled, None]
    share = images // len(filled) + 1
    u = rng.uniform(seed, epoch, filled, rng.METHOD + 1, share)
    position = torch.where(sizes > share, torch.arange(share), (u.double() * sizes).long())
    chosen = members[(starts + position).flatten()]
    return chosen[rng.permutation(seed, epoch, len(chosen))][:images]


class DeepCluster(Method):
    """Deep clustering (arXiv:1807.05520).

    Args:
        backbone: the network to train.
        view: augmentation of an image.
        cluster_resize: for clustering, an image's shorter side is resized to this length in pixels, and a center crop
            of the view's size is taken.
        sobel: put a Sobel filter in front of the network, which removes color, as the authors do.
        num_clusters: number of clusters.
        pca_dim: principal components of the features that are clustered.
        kmeans_iterations: updates of the centroids in k-means.
        recluster_every: epochs between clusterings.

    Raises:
        UserError: the backbone has fewer features than `pca_dim`.
    """

    assignment: Tensor

    def __init__(
        self,
        backbone: nn.Module,
        view: View = VIEW,
        cluster_resize: PositiveInt = 256,
        sobel: bool = True,
        num_clusters: PositiveInt = 10000,
        pca_dim: PositiveInt = 256,
        kmeans_iterations: int = 20,
        recluster_every: PositiveInt = 1,
    ) -> None:
        super().__init__()
        dim = backbone_dim(backbone)
        if pca_dim > dim:
            raise UserError(f"{pca_dim} principal components of {dim} features: set --method.pca_dim to {dim} or less")
        self.view, self.num_clusters, self.pca_dim = view, num_clusters, pca_dim
        self.cluster_view = View.center(view.size, max(cluster_resize, view.size), view.mean, view.std)
        self.kmeans_iterations, self.recluster_every = kmeans_iterations, recluster_every
        self.backbone = Sobel(backbone) if sobel else backbone
        self.rgb_only = sobel
        self.classifier = nn.Linear(dim, num_clusters)
        self.register_buffer("assignment", torch.empty(0, dtype=torch.int64))

    def views(self) -> tuple[View, ...]:
        return (self.view,)

    def setup(self, data: Data) -> None:
        check_clusters(self.num_clusters, data.num_train)
        start = rng.uniform(0, 0, torch.arange(data.num_train), rng.METHOD, 1)[:, 0]
        self.assignment = (start * self.num_clusters).long().to(self.assignment.device)  # until the first clustering

    @torch.no_grad()
    def before_epoch(self, data: Data, clock: Clock) -> None:
        if clock.epoch % self.recluster_every:
            return
        features, index = embed(self.backbone, data, self.cluster_view)
        x = pca_whiten(features, self.pca_dim)
        seed = 100003 * clock.seed + clock.epoch  # differs for every seed and epoch
        self.assignment.fill_(-1)  # unreadable images have no cluster and are never sampled
        _, self.assignment[index] = kmeans(x, self.num_clusters, self.kmeans_iterations, seed)
        # The new clusters do not correspond to the old ones: the classifier is initialized again.
        generator = torch.Generator().manual_seed(seed)
        self.classifier.weight.copy_(0.01 * torch.randn(self.classifier.weight.shape, generator=generator))
        self.classifier.bias.zero_()

    def sample_order(self, data: Data, clock: Clock) -> Int[Tensor, "images"] | None:
        return uniform_order(self.assignment, self.num_clusters, clock.seed, clock.epoch)

    def forward(self, batch: Batch, clock: Clock) -> dict[str, Tensor]:
        label = self.assignment[batch.index]  # pseudo-labels y_n, constant during the epoch
        logits: Float[Tensor, "n clusters"] = self.classifier(self.backbone(batch.views[0])).float()
        accuracy = 100 * (logits.argmax(dim=1) == label).float().mean()
        largest = self.assignment[self.assignment >= 0].bincount(minlength=self.num_clusters).max()
        return {
            "loss": F.cross_entropy(logits, label, ignore_index=-1),  # equation 1
            "cluster_accuracy": accuracy,  # percent
            "largest_cluster": largest / len(self.assignment),  # fraction of the images; near 1: collapse
        }
