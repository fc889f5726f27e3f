"""ODC: DeepCluster without epochs of its own: the clusters move with every batch.

A memory holds a feature of every image and its cluster, another the centroids. After a batch, its images move in the
memory and go to the nearest centroid; clusters that became too small are dissolved, and in their places the largest
ones are split. The labels thus change little by little, together with the classifier that learns them.

Zhan, Xie, Liu, Ong and Loy, 2020, "Online deep clustering for unsupervised representation learning"
(arXiv:2006.10645), sections 3.1 to 3.3. Values and order of events are those of the authors' code (OpenSelfSup):
similarity to a centroid is the inner product with the plain mean of its features, and the loss of a class has the
weight frequency^-0.5. What differs:

- Dropout, the first centroids and the halves of a split cluster are keyed, and everything that looks at the memories is
  computed alike in every process, so that one process and several have the same clusters.
- The weighted loss is averaged over the global batch instead of each GPU's part.
- The authors' code also turns every image by up to 2 degrees.
"""

import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from sslbook import distributed, rng
from sslbook.data.loader import Batch, Data
from sslbook.data.views import View
from sslbook.methods.base import Method
from sslbook.nn import backbone_dim
from sslbook.nn.kmeans import embed
from sslbook.nn.online_clusters import OnlineClusters
from sslbook.schedules import Clock

VIEW = View(crop=(0.08, 1.0), color_jitter=(0.4, 0.4, 1.0, 0.5), color_jitter_p=1.0, grayscale=0.2)


def weighted_cross_entropy(
    logits: Float[Tensor, "n clusters"], label: Int[Tensor, "n"], sizes: Int[Tensor, "clusters"]
) -> Float[Tensor, ""]:
    """The mean cross-entropy in which an image counts as its cluster's size to the power -0.5 (section 3.3).

    Images of cluster -1 do not count.
    """
    weight = sizes.clamp(min=1).float().rsqrt()[label.clamp(min=0)] * (label >= 0)
    each = F.cross_entropy(logits, label, reduction="none", ignore_index=-1)
    return (weight * each).sum() / distributed.all_reduce_mean(weight.sum()).clamp(
        min=1e-9
    )  # all images may be of cluster -1


class Neck(nn.Module):
    """Two layers with batch norm and dropout between backbone and classifier.

    As in the authors' code, batch norm has no scale and shift, and its running statistics are slow.
    """

    def __init__(self, in_dim: int, hidden_dim: int, out_dim: int) -> None:
        super().__init__()
        self.first = nn.Linear(in_dim, hidden_dim, bias=False)
        self.norm = nn.BatchNorm1d(hidden_dim, momentum=0.001, affine=False)
        self.second = nn.Linear(hidden_dim, out_dim)

    def forward(
        self, x: Float[Tensor, "n in_dim"], kept: Bool[Tensor, "n hidden"] | None = None
    ) -> Float[Tensor, "n out_dim"]:
        """`kept` says which half of the hidden values stay; the others become zero, and these are doubled."""
        hidden = F.relu(self.norm(self.first(x)))
        if kept is not None:
            hidden = 2 * hidden * kept
        return F.relu(self.second(hidden))


class ODC(Method):
    """Online deep clustering (arXiv:2006.10645).

    Args:
        backbone: the network to train.
        view: what an image becomes in training.
        cluster_resize: for the first clustering, the shorter side of an image is brought to this length, and the
            center of the view's size is seen.
        hidden_dim: hidden width between backbone and classifier.
        feature_dim: width of the features in memory.
        num_clusters: how many clusters.
        momentum: how much of itself a row of the memory keeps when its image is seen.
        min_cluster: clusters with fewer images are dissolved.
        centroids_every: steps between updates of all centroids.
    """

    def __init__(
        self,
        backbone: nn.Module,
        view: View = VIEW,
        cluster_resize: int = 256,
        hidden_dim: int = 512,
        feature_dim: int = 256,
        num_clusters: int = 10000,
        momentum: float = 0.5,
        min_cluster: int = 20,
        centroids_every: int = 10,
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
            self.clusters.begin(features, index, clock.seed)

    def forward(self, batch: Batch, clock: Clock) -> dict[str, Tensor]:
        kept = rng.uniform(clock.seed, clock.epoch, batch.index, rng.METHOD, self.neck.first.out_features) < 0.5
        x = self.neck(self.backbone(batch.views[0]), kept)
        logits, label = self.classifier(x).float(), self.clusters.assignment[batch.index]
        loss = weighted_cross_entropy(logits, label, self.clusters.sizes())
        accuracy = 100 * (logits.argmax(dim=1) == label).float().mean()
        changed = self.clusters.move_samples(batch.index, x.detach().float())
        return {"loss": loss, "cluster_accuracy": accuracy, "changed": 100 * changed}

    def after_step(self, clock: Clock) -> None:
        if clock.step % self.centroids_every == 0:
            self.clusters.move_centroids()
        self.clusters.deal_with_small_clusters()
