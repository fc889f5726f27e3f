"""InterCLR: two views of an image belong together, and so do images of one cluster.

MoCo compares a query with the key of its own image. Beside it, a second loss takes for the right answer a feature of
another image of the same cluster, from a memory whose clusters move with every batch, as in ODC. Such an answer may
be wrong, so its margin is negative, which asks for less than a tie; wrong answers are drawn from the nearest tenth of
the memory, neither the hardest nor all.

Xie, Zhan, Liu, Ong and Loy, 2020, "Delving into inter-image invariance for unsupervised visual representations"
(arXiv:2008.11702), sections 3.2 to 3.4. Values and order of events are those of the authors' code (MMSelfSup's
InterCLR-MoCo): clusters by inner product with the plain mean of their features, right answers drawn from the whole
cluster, margin -0.5 added to the right cosine before the temperature. What differs:

- Right and wrong answers are drawn with counter-based random numbers, wrong ones with replacement. Those of the own cluster are left out
  of the softmax, where the authors draw in their place anew.
- Batch norm's groups, the shuffling of keys and the time of the moving average are those of `sslbook.methods.moco`.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from sslbook import distributed, rng
from sslbook.data.loader import Batch, Data
from sslbook.data.views import MOCO_V2, View
from sslbook.errors import UserError
from sslbook.methods.base import Method
from sslbook.nn import EMA, MLP, BatchNorm, Queue, backbone_dim, convert_batch_norm
from sslbook.nn.kmeans import embed
from sslbook.nn.online_clusters import OnlineClusters
from sslbook.schedules import Clock


def info_nce(
    positive: Float[Tensor, "n"],
    negatives: Float[Tensor, "n k"],
    temperature: float,
    margin: float = 0.0,
    counted: Bool[Tensor, "n k"] | None = None,
    known: Bool[Tensor, "n"] | None = None,
) -> tuple[Float[Tensor, ""], Float[Tensor, "n columns"]]:
    """Equations 1 and 4 for cosines: the loss, and the logits with the right answer in column 0.

    `margin` is taken from the right cosine: a negative one is content with less. Wrong answers that are not `counted`
    are left out, and so are rows whose right answer is not `known`; the mean is over those that all processes have.
    """
    if counted is not None:
        negatives = negatives.masked_fill(~counted, -torch.inf)
    logits = torch.cat([(positive - margin)[:, None], negatives], dim=1) / temperature
    target = torch.zeros(len(logits), dtype=torch.int64, device=logits.device)
    if known is None:
        return F.cross_entropy(logits, target), logits
    each = F.cross_entropy(logits, target, reduction="none")
    return (each * known).sum() / distributed.all_reduce_mean(known.float().sum()).clamp(
        min=1e-6
    ), logits  # none may be known


def draw_positive(
    label: Int[Tensor, "n"], assignment: Int[Tensor, "images"], sizes: Int[Tensor, "clusters"], u: Float[Tensor, "n"]
) -> Int[Tensor, "n"]:
    """For each label an image of this cluster, chosen by a number in [0, 1)."""
    members = assignment.argsort(stable=True)  # cluster by cluster, first those of none
    starts = len(assignment) - sizes.sum() + sizes.cumsum(0) - sizes
    return members[starts[label] + (u.double() * sizes[label]).long()]


def draw_semihard(similarity: Float[Tensor, "n images"], pool_size: int, u: Float[Tensor, "n k"]) -> Int[Tensor, "n k"]:
    """For each row some of its `pool_size` most similar images, chosen by numbers in [0, 1) (section 3.3)."""
    pool = similarity.topk(pool_size, dim=1).indices.sort(dim=1).values  # in an order that rounding cannot change
    return pool.gather(1, (u.double() * pool_size).long())


class InterCLR(Method):
    """Inter-image invariance on top of MoCo v2 (arXiv:2008.11702).

    Args:
        backbone: the network to train; its batch norm becomes that of `sslbook.nn.BatchNorm`.
        view: what an image becomes, twice, each augmented independently.
        cluster_resize: for the first clustering, the shorter side of an image is brought to this length, and the
            center of the view's size is seen.
        projector_dim: width of queries and keys.
        temperature: divides the similarities.
        momentum: how much of itself the key encoder keeps at a step.
        queue_size: keys kept as wrong answers within an image.
        batch_norm_groups: parts of the global batch that batch norm sees separately (see MoCo).
        num_clusters: how many clusters.
        margin: taken from the cosine of the right answer between images.
        intra_weight: weight of the loss within an image.
        inter_weight: weight of the loss between images.
        num_negatives: wrong answers between images.
        pool_size: the most similar images, from which they are drawn.
        memory_momentum: how much of itself a row of the memory keeps when its image is seen.
        min_cluster: clusters with fewer images are dissolved.
        centroids_every: steps between updates of all centroids.
    """

    def __init__(
        self,
        backbone: nn.Module,
        view: View = MOCO_V2,
        cluster_resize: int = 256,
        projector_dim: int = 128,
        temperature: float = 0.2,
        momentum: float = 0.999,
        queue_size: int = 65536,
        batch_norm_groups: int = 8,
        num_clusters: int = 10000,
        margin: float = -0.5,
        intra_weight: float = 0.75,
        inter_weight: float = 0.25,
        num_negatives: int = 16384,
        pool_size: int = 128000,
        memory_momentum: float = 0.0,
        min_cluster: int = 20,
        centroids_every: int = 10,
    ) -> None:
        super().__init__()
        self.view, self.temperature, self.momentum = view, temperature, momentum
        self.cluster_view = View.center(view.size, max(cluster_resize, view.size), view.mean, view.std)
        self.margin, self.intra_weight, self.inter_weight = margin, intra_weight, inter_weight
        self.num_negatives, self.pool_size, self.centroids_every = num_negatives, pool_size, centroids_every
        self.backbone = convert_batch_norm(backbone, batch_norm_groups)
        dim = backbone_dim(backbone)
        self.projector = MLP(dim, dim, projector_dim, batch_norm=False)
        self.key_backbone, self.key_projector = EMA(self.backbone), EMA(self.projector)
        self.queue = Queue(queue_size, projector_dim)
        self.clusters = OnlineClusters(num_clusters, projector_dim, memory_momentum, min_cluster)
        normalizes = any(isinstance(module, BatchNorm) for module in self.backbone.modules())
        self.shuffles = normalizes and batch_norm_groups > 1

    def views(self) -> tuple[View, ...]:
        return (self.view, self.view)

    def setup(self, data: Data) -> None:
        if self.pool_size > data.num_train:
            raise UserError(
                f"the {self.pool_size} most similar of {data.num_train} images: lower --method.pool_size, "
                f"such as to {max(1, data.num_train // 10)}"
            )
        self.clusters.allocate(data.num_train)

    def before_epoch(self, data: Data, clock: Clock) -> None:
        if clock.epoch == 0:
            features, index = embed(nn.Sequential(self.backbone, self.projector), data, self.cluster_view)
            self.clusters.begin(features, index, clock.seed)

    @torch.no_grad()
    def keys(self, x: Float[Tensor, "n 3 h w"], batch: Batch, clock: Clock) -> Float[Tensor, "n dim"]:
        """The keys of this process's images, encoded among other companions than their queries were."""
        if not self.shuffles:
            return self.key_projector(self.key_backbone(x))
        n, first = len(x), distributed.rank() * len(x)
        everyone = distributed.all_gather(batch.index)
        order = rng.uniform(clock.seed, clock.epoch, everyone, rng.METHOD, 1)[:, 0].argsort(stable=True)
        x = distributed.all_gather(x)[order[first : first + n]]
        k = distributed.all_gather(self.key_projector(self.key_backbone(x)))
        return k[order.argsort()[first : first + n]]

    def inter(self, q: Float[Tensor, "n dim"], index: Int[Tensor, "n"], clock: Clock) -> Float[Tensor, ""]:
        """The loss between images: equation 4 with answers from the memory, for images that have a cluster."""
        rows, assignment = self.clusters.memory.rows, self.clusters.assignment
        label = assignment[index]
        u = rng.uniform(clock.seed, clock.epoch, index, rng.METHOD + 1, 1 + self.num_negatives)
        right = draw_positive(label.clamp(min=0), assignment, self.clusters.sizes(), u[:, 0])
        wrong = draw_semihard(q.detach() @ rows.T, self.pool_size, u[:, 1:])
        counted = (assignment[wrong] != label[:, None]) & (assignment[wrong] >= 0)
        negatives = torch.einsum("nd,nkd->nk", q, rows[wrong])
        positive = (q * rows[right]).sum(dim=1)
        return info_nce(positive, negatives, self.temperature, self.margin, counted, label >= 0)[0]

    def forward(self, batch: Batch, clock: Clock) -> dict[str, Tensor]:
        x_q, x_k = batch.views
        q = self.projector(self.backbone(x_q))
        k = self.keys(x_k, batch, clock)
        with torch.autocast(q.device.type, enabled=False):  # a temperature of 0.2 magnifies rounding
            q, k = F.normalize(q.float(), dim=1), F.normalize(k.float(), dim=1)
            # A copy of the queue, since the backward pass needs these rows after `push` has overwritten some.
            intra, logits = info_nce((q * k).sum(dim=1), q @ self.queue.rows.clone().T, self.temperature)
            inter = self.inter(q, batch.index, clock)
        self.queue.push(k)
        changed = self.clusters.move_samples(batch.index, k)
        return {
            "loss": self.intra_weight * intra + self.inter_weight * inter,
            "intra": intra.detach(),
            "inter": inter.detach(),
            "contrastive_accuracy": 100 * (logits.argmax(dim=1) == 0).float().mean(),
            "changed": 100 * changed,
        }

    def after_step(self, clock: Clock) -> None:
        self.key_backbone.update(self.backbone, self.momentum)
        self.key_projector.update(self.projector, self.momentum)
        if clock.step % self.centroids_every == 0:
            self.clusters.move_centroids()
        self.clusters.deal_with_small_clusters()
