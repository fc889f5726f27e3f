"""InterCLR: MoCo with a second contrastive loss whose positives are other images of the same online cluster.

MoCo matches a query with the key of its own image (intra-image). The inter-image loss matches it with the feature of an
image from the same cluster, in a memory bank whose clusters are updated with every batch as in ODC. Such a positive may
be wrong, so its margin is negative, which demands less similarity. Negatives are semi-hard: sampled from the most
similar tenth of the memory bank.

Xie, Zhan, Liu, Ong and Loy, 2020, "Delving into inter-image invariance for unsupervised visual representations"
(arXiv:2008.11702), sections 3.2 to 3.4. Values and order of events are those of the authors' code (MMSelfSup's
InterCLR-MoCo): an image belongs to the cluster whose mean feature has the greatest inner product with its own,
positives are sampled from the whole cluster, and the margin of -0.5 is subtracted from the positive's cosine before the
temperature divides.

What differs from the authors' code (open-mmlab/mmselfsup, 1887786):
- Negatives are sampled with replacement. Those of the own cluster are left out of the softmax, where the authors sample
  others instead.
- An epoch shows every image once; the authors' sampler chooses images with replacement, so that an epoch shows 63 % of
  them.
- Keys, queue and EMA updates are MoCo's: see what differs in `sslbook.methods.moco`.
"""

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from sslbook import distributed, rng
from sslbook.data.loader import Batch, Data
from sslbook.data.views import MOCO_V2, View
from sslbook.errors import UserError
from sslbook.methods.moco import MoCo, info_nce
from sslbook.methods.odc import OnlineClusters
from sslbook.nn.kmeans import embed
from sslbook.nn.precision import full_precision
from sslbook.schedules import Clock
from sslbook.types import PositiveInt


def inter_image_loss(
    positive: Float[Tensor, "n"],
    negatives: Float[Tensor, "n k"],
    counted: Bool[Tensor, "n k"],
    known: Bool[Tensor, "n"],
    temperature: float,
    margin: float,
) -> Float[Tensor, ""]:
    """Equation 4 for cosine similarities.

    Args:
        positive: similarity to the positive.
        negatives: similarities to the negatives.
        counted: which negatives take part.
        known: which rows have a positive; the mean is over those of all processes.
        temperature: divides the similarities.
        margin: subtracted from the positive's similarity; a negative one demands less.
    """
    negatives = negatives.masked_fill(~counted, -torch.inf)
    logits = torch.cat([(positive - margin)[:, None], negatives], dim=1) / temperature
    target = torch.zeros(len(logits), dtype=torch.int64, device=logits.device)
    each = F.cross_entropy(logits, target, reduction="none")
    return (each * known).sum() / distributed.all_reduce_mean(known.float().sum()).clamp(min=1e-6)  # it may be 0


def sample_positives(
    label: Int[Tensor, "n"], assignment: Int[Tensor, "images"], sizes: Int[Tensor, "clusters"], u: Float[Tensor, "n"]
) -> Int[Tensor, "n"]:
    """For each label an image of this cluster, chosen by a random number in [0, 1)."""
    members = assignment.argsort(stable=True)  # cluster by cluster, those without one first
    starts = len(assignment) - sizes.sum() + sizes.cumsum(0) - sizes
    return members[starts[label] + (u.double() * sizes[label]).long()]


def sample_semihard(
    similarity: Float[Tensor, "n images"], pool_size: int, u: Float[Tensor, "n k"]
) -> Int[Tensor, "n k"]:
    """For each row k of its `pool_size` most similar images, chosen by random numbers in [0, 1) (section 3.3)."""
    pool = similarity.topk(pool_size, dim=1).indices.sort(dim=1).values  # sorted, so that rounding changes no order
    return pool.gather(1, (u.double() * pool_size).long())


class InterCLR(MoCo):
    """Inter-image invariance (arXiv:2008.11702): MoCo v2 with a second loss over online clusters.

    Args:
        backbone: the network to train; its batch norm becomes that of `sslbook.nn.BatchNorm`.
        view: the augmentation of both views, sampled twice independently.
        cluster_resize: for the first clustering, the shorter side of an image is resized to this length and a center
            crop of the view's size is taken, in pixels.
        projector_dim: width of queries and keys.
        num_clusters: number of clusters.
        margin: subtracted from the cosine similarity of the inter-image positive.
        intra_weight: weight of the intra-image loss.
        inter_weight: weight of the inter-image loss.
        num_negatives: negatives of the inter-image loss.
        pool_size: the most similar images, from which these negatives are sampled.
        memory_momentum: momentum of the memory bank: a row becomes momentum times itself plus the rest of the new key.
        min_cluster: clusters with fewer images are dissolved.
        centroids_every: steps between updates of all centroids.
        moco_options: the other options of MoCo.

    Raises:
        UserError: in `setup`, if there are fewer images than `pool_size` or than the clusters need.
    """

    def __init__(
        self,
        backbone: nn.Module,
        view: View = MOCO_V2,
        cluster_resize: PositiveInt = 256,
        projector_dim: PositiveInt = 128,
        num_clusters: PositiveInt = 10000,
        margin: float = -0.5,
        intra_weight: float = 0.75,
        inter_weight: float = 0.25,
        num_negatives: PositiveInt = 16384,
        pool_size: PositiveInt = 128000,
        memory_momentum: float = 0.0,
        min_cluster: int = 20,
        centroids_every: PositiveInt = 10,
        **moco_options: Any,
    ) -> None:
        super().__init__(backbone, view, projector_dim=projector_dim, **moco_options)
        self.cluster_view = View.center(view.size, max(cluster_resize, view.size), view.mean, view.std)
        self.margin, self.intra_weight, self.inter_weight = margin, intra_weight, inter_weight
        self.num_negatives, self.pool_size, self.centroids_every = num_negatives, pool_size, centroids_every
        self.clusters = OnlineClusters(num_clusters, projector_dim, memory_momentum, min_cluster)

    def setup(self, data: Data) -> None:
        """Make room for every image; UserError if `pool_size` exceeds their number."""
        if self.pool_size > data.num_train:
            fewer = max(1, data.num_train // 10)
            raise UserError(f"the {self.pool_size} most similar of {data.num_train} images: set pool_size to {fewer}")
        self.clusters.allocate(data.num_train)

    def before_epoch(self, data: Data, clock: Clock) -> None:
        if clock.epoch == 0:  # memory bank and clusters start from the initial network's features
            features, index = embed(nn.Sequential(self.backbone, self.projector), data, self.cluster_view)
            self.clusters.initialize(features, index, clock.seed)

    def inter(self, q: Float[Tensor, "n dim"], index: Int[Tensor, "n"], clock: Clock) -> Float[Tensor, ""]:
        """The inter-image loss: equation 4 with positives and negatives from the memory bank."""
        rows, assignment = self.clusters.memory.rows, self.clusters.assignment
        label = assignment[index]  # pseudo-labels; -1 for an image without a cluster, which is ignored
        u = rng.uniform(clock.seed, clock.epoch, index, rng.METHOD + 1, 1 + self.num_negatives)
        positive = sample_positives(label.clamp(min=0), assignment, self.clusters.sizes(), u[:, 0])
        # Detached: which images are similar is a choice without gradient.
        negative = sample_semihard(q.detach() @ rows.T, self.pool_size, u[:, 1:])  # (n, num_negatives)
        counted = (assignment[negative] != label[:, None]) & (assignment[negative] >= 0)
        s_negative = torch.einsum("nd,nkd->nk", q, rows[negative])
        s_positive = (q * rows[positive]).sum(dim=1)
        return inter_image_loss(s_positive, s_negative, counted, label >= 0, self.temperature, self.margin)

    def forward(self, batch: Batch, clock: Clock) -> dict[str, Tensor]:
        x_q, x_k = batch.views
        q = self.projector(self.backbone(x_q))  # queries, (n, dim)
        k = self.keys(x_k, batch, clock)  # keys without gradient, (n, dim)
        with full_precision(q):  # a temperature of 0.2 amplifies rounding errors
            q, k = F.normalize(q.float(), dim=1), F.normalize(k.float(), dim=1)
            # Intra-image loss: MoCo's equation 1. The queue is copied, since the backward pass comes after `push`.
            intra, logits = info_nce(q, k, self.queue.rows.clone(), self.temperature)
            inter = self.inter(q, batch.index, clock)
        self.queue.push(k)
        # The memory bank receives the keys, and these images move to the nearest centroid (section 3.2).
        reassigned = self.clusters.update_samples(batch.index, k)
        return {
            "loss": self.intra_weight * intra + self.inter_weight * inter,
            "intra_loss": intra.detach(),
            "inter_loss": inter.detach(),
            "contrastive_accuracy": 100 * (logits.argmax(dim=1) == 0).float().mean(),
            "reassigned": 100 * reassigned,
        }

    def after_step(self, clock: Clock) -> None:
        super().after_step(clock)
        if clock.step % self.centroids_every == 0:
            self.clusters.update_centroids()
        self.clusters.replace_small_clusters()
