"""ODC that notes what its clusters are, and with one part removed or replaced at a time; and a clock of images."""

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from sslbook import rng
from sslbook.book.chapters.deepcluster.variants import Partitions
from sslbook.data.loader import Batch, Data
from sslbook.methods.odc import ODC
from sslbook.schedules import Clock


def weights(label: Int[Tensor, "n"], sizes: Int[Tensor, "clusters"], power: float) -> Float[Tensor, "n"]:
    """The weight of each image, its cluster's size to the power `-power`; the sum is 1."""
    w = sizes.clamp(min=1).float().pow(-power)[label]
    return w / w.sum()


class Watched(ODC):
    """ODC whose parts can be switched off.

    Args:
        power: an image counts by its cluster's size to the power `-power`.
        care: dissolve small clusters and split the largest.
        start: first clusters by "k-means"; or "random".
        moving: images may change their cluster; else the first clusters stay.
        reset: a new classifier before every epoch.
        distance: assign to the nearest centroid by distance instead of by inner product.
        dropout: in the neck.
        **options: those of ODC.
    """

    def __init__(
        self,
        *args,
        power: float = 0.5,
        care: bool = True,
        start: str = "k-means",
        moving: bool = True,
        reset: bool = False,
        distance: bool = False,
        dropout: bool = True,
        **options,
    ) -> None:
        super().__init__(*args, **options)
        self.power, self.care, self.start, self.moving = power, care, start, moving
        self.reset, self.distance, self.dropout = reset, distance, dropout
        self.partitions: Partitions | None = None

    def before_epoch(self, data: Data, clock: Clock) -> None:
        clusters = self.clusters
        super().before_epoch(data, clock)
        if clock.epoch == 0 and self.start == "random":
            clusters.assignment.copy_(rng.permutation(clock.seed, 0, data.num_train) % clusters.num_clusters)
            clusters.update_centroids()
        if self.partitions is None:
            self.partitions = Partitions(data.labels("train"))
        self.partitions(clusters.assignment, clusters.num_clusters)
        if self.reset:
            generator = torch.Generator().manual_seed(100003 * clock.seed + clock.epoch)
            with torch.no_grad():
                self.classifier.weight.copy_(0.01 * torch.randn(self.classifier.weight.shape, generator=generator))
                self.classifier.bias.zero_()

    def forward(self, batch: Batch, clock: Clock) -> dict[str, Tensor]:
        width = self.neck.first.out_features
        kept = rng.uniform(clock.seed, clock.epoch, batch.index, rng.METHOD, width) < 0.5 if self.dropout else None
        x = self.neck(self.backbone(batch.views[0]), kept)
        logits, label = self.classifier(x).float(), self.clusters.assignment[batch.index]
        each = F.cross_entropy(logits, label, reduction="none")
        loss = (weights(label, self.clusters.sizes(), self.power) * each).sum()
        accuracy = 100 * (logits.argmax(dim=1) == label).float().mean()
        reassigned = self.assign(batch.index, x.detach().float())
        return {"loss": loss, "cluster_accuracy": accuracy, "reassigned": 100 * reassigned}

    def assign(self, index: Int[Tensor, "n"], x: Float[Tensor, "n dim"]) -> Float[Tensor, ""]:
        """New features and labels of the batch's images; the fraction of the labels that change."""
        clusters = self.clusters
        old = clusters.assignment[index]
        clusters.update_samples(index, x)
        if self.distance:
            clusters.assignment[index] = torch.cdist(clusters.memory.rows[index], clusters.centroids).argmin(dim=1)
        if not self.moving:
            clusters.assignment[index] = old
        return (clusters.assignment[index] != old).float().mean()

    def after_step(self, clock: Clock) -> None:
        if clock.step % self.centroids_every == 0:
            self.clusters.update_centroids()
        if self.care and self.moving:
            self.clusters.replace_small_clusters()


class Work:
    """Counts the images that pass through a network, with and without a backward pass.

    A forward pass counts 1 and a backward pass 2, the usual estimate: it computes two products for each one of the
    forward pass.

    Args:
        network: whose calls are counted, while `on` is true.
    """

    def __init__(self, network: nn.Module) -> None:
        self.trained, self.embedded, self.on = 0, 0, True
        network.register_forward_hook(self._count)

    def _count(self, network: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        if self.on and torch.is_grad_enabled():
            self.trained += len(inputs[0])
        elif self.on:
            self.embedded += len(inputs[0])

    def passes(self) -> int:
        """Forward passes of one image that the work so far is worth."""
        return 3 * self.trained + self.embedded
