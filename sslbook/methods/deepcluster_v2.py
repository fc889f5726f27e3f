"""DeepCluster-v2: DeepCluster with multi-crop, a projector, and k-means centroids as the classifier.

The projections of an epoch are stored as they are computed, so that no extra pass over the images is needed. Before the
next epoch, spherical k-means clusters them several times from different starts, and its centroids are the weights of
the classifiers, so that none is learned anew. From every crop the cluster of its image is predicted.

Caron, Misra, Mairal, Goyal, Bojanowski and Joulin, 2020, "Unsupervised learning of visual features by contrasting
cluster assignments" (arXiv:2006.09882), appendix D. The defaults are those of the authors' code (facebookresearch/swav)
for 800 epochs.

What differs from the authors' code (facebookresearch/swav, 9a2dc80):
- The first centroids are random rows chosen by the seed and the epoch, and an empty cluster takes half of the largest;
  the authors leave an empty one as it was.
- An image that the last epoch did not show keeps its older projection and is clustered again; the authors leave it out
  of the loss. Only an image that was never shown is left out.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from sslbook import distributed, rng
from sslbook.data.loader import Batch, Data
from sslbook.data.views import SWAV_GLOBAL, SWAV_LOCAL, View
from sslbook.methods.base import Method
from sslbook.nn import MLP, MemoryBank, backbone_dim
from sslbook.nn.kmeans import check_clusters, embed_views, kmeans
from sslbook.nn.precision import full_precision
from sslbook.schedules import Clock
from sslbook.types import PositiveFloat, PositiveInt


def cluster_loss(
    z: Float[Tensor, "crops n dim"],
    prototypes: Float[Tensor, "heads clusters dim"],
    label: Int[Tensor, "heads n"],
    temperature: float,
) -> Float[Tensor, ""]:
    """Cross-entropy of every crop's prediction and its image's cluster: the mean over heads, crops and counted images.

    Args:
        z: unit vectors of the crops.
        prototypes: unit vectors, the centroids of each head.
        label: cluster of each image in each head; images of cluster -1 do not count, in any process.
        temperature: divides the cosines.
    """
    counted = (label >= 0).float()
    logits = torch.einsum("cnd,hkd->chnk", z, prototypes) / temperature
    target = label.clamp(min=0).expand(len(z), -1, -1)
    each = F.cross_entropy(logits.flatten(0, 2), target.flatten(), reduction="none").view(target.shape)
    total = distributed.all_reduce_mean(counted.sum() * len(z)).clamp(min=1)
    return (each * counted).sum() / total


class DeepClusterV2(Method):
    """DeepCluster, version 2 (arXiv:2006.09882, appendix D).

    Args:
        backbone: the network to train.
        view: a large crop; there are two, whose projections the heads cluster alternately.
        small_view: a small crop.
        num_small: number of small crops.
        hidden_dim: hidden width of the projector.
        projector_dim: width of the projections.
        num_prototypes: clusters of each head.
        num_heads: number of clusterings, from different starts.
        temperature: divides the cosines to the prototypes.
        kmeans_iterations: updates of the centroids in k-means.
    """

    prototypes: Tensor
    assignment: Tensor

    def __init__(
        self,
        backbone: nn.Module,
        view: View = SWAV_GLOBAL,
        small_view: View = SWAV_LOCAL,
        num_small: int = 6,
        hidden_dim: PositiveInt = 2048,
        projector_dim: PositiveInt = 128,
        num_prototypes: PositiveInt = 3000,
        num_heads: PositiveInt = 3,
        temperature: PositiveFloat = 0.1,
        kmeans_iterations: int = 10,
    ) -> None:
        super().__init__()
        self.view, self.small_view, self.num_small = view, small_view, num_small
        self.temperature, self.kmeans_iterations = temperature, kmeans_iterations
        self.backbone = backbone
        self.projector = MLP(backbone_dim(backbone), hidden_dim, projector_dim)
        generator = torch.Generator().manual_seed(0)
        prototypes = torch.randn(num_heads, num_prototypes, projector_dim, generator=generator)
        self.register_buffer("prototypes", F.normalize(prototypes, dim=2))
        self.memory_1, self.memory_2 = MemoryBank(projector_dim), MemoryBank(projector_dim)
        self.memories = (self.memory_1, self.memory_2)  # the latest projections of every image's large crops
        self.register_buffer("assignment", torch.empty(num_heads, 0, dtype=torch.int64))

    def views(self) -> tuple[View, ...]:
        return (self.view, self.view, *[self.small_view] * self.num_small)

    def setup(self, data: Data) -> None:
        heads, clusters, _ = self.prototypes.shape
        check_clusters(clusters, data.num_train)
        for memory in self.memories:
            memory.allocate(data.num_train)
            memory.rows.zero_()  # zero: not yet shown
        start = rng.uniform(0, 0, torch.arange(data.num_train), rng.METHOD, heads).T
        self.assignment = (start * clusters).long().to(self.assignment.device)  # until the first clustering

    def before_epoch(self, data: Data, clock: Clock) -> None:
        if clock.epoch == 0:  # the only pass over the images beside training
            z, index = embed_views(nn.Sequential(self.backbone, self.projector), data, self.views()[:2], clock)
            for memory, z_view in zip(self.memories, z):
                memory.rows[index] = F.normalize(z_view, dim=1)
        index = self.memory_1.rows.any(dim=1).nonzero()[:, 0]
        self.assignment.fill_(-1)
        heads, clusters, _ = self.prototypes.shape
        for head in range(heads):
            z = self.memories[head % 2].rows[index]
            seed = (100003 * clock.seed + clock.epoch) * heads + head
            result = kmeans(z, clusters, self.kmeans_iterations, seed, spherical=True)
            self.prototypes[head], self.assignment[head, index] = result

    def project(self, views: tuple[Tensor, ...]) -> Float[Tensor, "crops n dim"]:
        """Unit vectors of all crops: one pass of the backbone for each size, one of the projector for all."""
        features = [self.backbone(torch.cat(crops)) for crops in (views[:2], views[2:]) if crops]
        z = self.projector(torch.cat(features)).float()
        return F.normalize(z, dim=1).unflatten(0, (len(views), -1))

    def forward(self, batch: Batch, clock: Clock) -> dict[str, Tensor]:
        z = self.project(batch.views)  # (crops, n, dim), large crops first
        label = self.assignment[:, batch.index]  # pseudo-labels (heads, n), constant during the epoch
        with full_precision(z):  # a temperature of 0.1 magnifies rounding
            # The prototypes are centroids and get no gradient; a copy, since before_epoch writes into the buffer.
            loss = cluster_loss(z, self.prototypes.clone(), label, self.temperature)
            predicted = torch.einsum("cnd,hkd->chnk", z.detach(), self.prototypes).argmax(dim=3)
        for memory, z_view in zip(self.memories, z.detach()):  # of the two large crops, for the next clustering
            memory.update(batch.index, z_view, 0.0)
        return {"loss": loss, "cluster_accuracy": 100 * (predicted == label).float().mean()}
