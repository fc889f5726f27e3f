"""DeepCluster that notes what its clusters are, and with one part removed or replaced at a time."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from scipy.optimize import linear_sum_assignment
from sklearn.metrics import normalized_mutual_info_score
from torch import Tensor

from sslbook import rng
from sslbook.data.loader import Data
from sslbook.methods.base import Method
from sslbook.methods.deepcluster import DeepCluster
from sslbook.nn.kmeans import embed, kmeans, nearest, pca_whiten
from sslbook.schedules import Clock


def nmi(a: Int[Tensor, "n"], b: Int[Tensor, "n"]) -> float:
    """Normalized mutual information of two partitions, with the geometric mean of the entropies, as in the paper.

    Two partitions of one cluster each are equal: 1.
    """
    return float(normalized_mutual_info_score(a.cpu().numpy(), b.cpu().numpy(), average_method="geometric"))


def match(old: Int[Tensor, "n"], new: Int[Tensor, "n"], k: int) -> tuple[Int[Tensor, "k"], float]:
    """For each new cluster the old one it continues, such that as many images as possible keep their cluster (Kuhn,
    1955), and the fraction of the images that do."""
    counts = (new.cpu() * k + old.cpu()).bincount(minlength=k * k).view(k, k)
    rows, columns = linear_sum_assignment(counts.numpy(), maximize=True)
    return torch.as_tensor(columns), counts[rows, columns].sum().item() / len(old)


def describe(assignment: Int[Tensor, "n"], k: int) -> dict[str, float]:
    """How many clusters have images, the share of the largest in percent, and the perplexity of the sizes."""
    share = assignment.bincount(minlength=k).double() / len(assignment)
    return {
        "clusters": float((share > 0).sum()),
        "largest": 100 * share.max().item(),
        "perplexity": torch.special.entr(share).sum().exp().item(),
    }


class Partitions:
    """Called after every clustering: notes sizes, and how the clusters agree with the last ones and with the classes."""

    def __init__(self, classes: Int[Tensor, "n"]) -> None:
        self.classes = classes
        self.last: Tensor | None = None
        self.epochs: list[dict[str, float]] = []

    def __call__(self, assignment: Int[Tensor, "n"], k: int) -> None:
        now = assignment.cpu().clone()
        found = {**describe(now, k), "NMI to classes": nmi(now, self.classes)}
        if self.last is not None:
            same = (now == self.last).double().mean().item()
            matched = match(self.last, now, k)[1]
            found |= {"NMI to last": nmi(now, self.last), "same number": 100 * same, "matched": 100 * matched}
        self.last = now
        self.epochs.append(found)

    def curves(self) -> dict[str, list[float]]:
        """One list a quantity; those that need a last clustering begin at the second."""
        names = dict.fromkeys(name for epoch in self.epochs for name in epoch)
        return {name: [round(epoch[name], 4) for epoch in self.epochs if name in epoch] for name in names}


class Watched(DeepCluster):
    """DeepCluster whose parts can be switched off.

    Args:
        head: what becomes of the classifier after a clustering: "reset"; "keep"; or "matched", whose rows follow the
            clusters that they belong to.
        uniform: sample images uniformly over clusters.
        fill: empty clusters take half of the largest one.
        prepare: from features (images, dim) to what is clustered; None for PCA-whitening and unit length.
        labels: "k-means"; "own": after the first clustering the classifier's own predictions; or "random": assigned
            once.
        **options: those of DeepCluster.
    """

    def __init__(
        self,
        *args,
        head: str = "reset",
        uniform: bool = True,
        fill: bool = True,
        prepare: Callable[[Tensor], Tensor] | None = None,
        labels: str = "k-means",
        **options,
    ) -> None:
        super().__init__(*args, **options)
        self.head, self.uniform, self.fill, self.prepare, self.labels = head, uniform, fill, prepare, labels
        self.partitions: Partitions | None = None

    def before_epoch(self, data: Data, clock: Clock) -> None:
        if self.partitions is None:
            self.partitions = Partitions(data.labels("train"))
        if clock.epoch % self.recluster_every or (self.labels == "random" and clock.epoch):
            return
        old, weight, bias = self.assignment.clone(), self.classifier.weight.clone(), self.classifier.bias.clone()
        if self.labels == "k-means" or clock.epoch == 0:
            super().before_epoch(data, clock)  # cluster, reset the classifier
        if not self.fill or self.prepare is not None or (self.labels == "own" and clock.epoch):
            features, index = embed(self.backbone, data, self.cluster_view)
            if self.labels == "own" and clock.epoch:
                self.assignment[index] = self.classifier(features).argmax(1)
            else:
                x = (self.prepare or (lambda h: pca_whiten(h, self.pca_dim)))(features)
                find = kmeans if self.fill else lloyd
                seed = 100003 * clock.seed + clock.epoch
                _, self.assignment[index] = find(x, self.num_clusters, self.kmeans_iterations, seed)
        if self.labels == "random":
            u = rng.uniform(clock.seed, 0, torch.arange(len(self.assignment)), rng.METHOD + 2, 1)[:, 0]
            self.assignment.copy_((u * self.num_clusters).long())
        if self.head != "reset" and clock.epoch:
            order = match(old, self.assignment, self.num_clusters)[0].to(weight.device)
            rows = slice(None) if self.head == "keep" else order
            with torch.no_grad():
                self.classifier.weight.copy_(weight[rows])
                self.classifier.bias.copy_(bias[rows])
        self.partitions(self.assignment, self.num_clusters)

    def sample_order(self, data: Data, clock: Clock) -> Int[Tensor, "images"] | None:
        return super().sample_order(data, clock) if self.uniform else None


@torch.no_grad()
def lloyd(x: Float[Tensor, "n dim"], k: int, iterations: int, seed: int) -> tuple[Tensor, Int[Tensor, "n"]]:
    """Lloyd's algorithm in which an empty cluster stays empty."""
    centroids = x[rng.permutation(seed, 0, len(x))[:k].to(x.device)].clone()
    for _ in range(iterations):
        found = nearest(x, centroids)
        sizes = found.bincount(minlength=k)
        sums = torch.zeros_like(centroids, dtype=torch.float64).index_add_(0, found, x.double())
        centroids = torch.where(sizes[:, None] > 0, sums / sizes.clamp(min=1)[:, None], centroids.double()).to(x.dtype)
    return centroids, nearest(x, centroids)


def unit(h: Float[Tensor, "n dim"]) -> Float[Tensor, "n dim"]:
    """Centered features of unit length, without PCA and whitening."""
    return F.normalize(h - h.mean(0), dim=1)


def whitened(dim: int) -> Callable[[Tensor], Tensor]:
    """PCA-whitened features that keep their length."""

    def prepare(h: Float[Tensor, "n width"]) -> Float[Tensor, "n dim"]:
        h = h.double() - h.double().mean(0)
        u, s, _ = torch.linalg.svd(h, full_matrices=False)
        return (u[:, :dim] * len(h) ** 0.5).float() * (s[:dim] > 1e-5 * s[0])

    return prepare


def train(
    method: Method,
    data: Data,
    epochs: int,
    batch_size: int,
    lr: float,
    seed: int,
    watch: Callable[[dict[str, Tensor]], None] = lambda out: None,
    head_rate: float = 1.0,
) -> dict[str, float]:
    """Train in place with the hooks of an epoch, by AdamW and one cycle of the learning rate; the mean of the last
    epoch's log.

    Args:
        method: a method that clusters before epochs.
        data: its images.
        epochs: passes over them.
        batch_size: images a step.
        lr: peak learning rate.
        seed: of the order, the views and the clusterings.
        watch: called with every step's output.
        head_rate: learning rate of the classifier over that of the backbone.
    """
    device, per_epoch = next(method.parameters()).device, data.steps_per_epoch(batch_size)
    named = [(name.startswith("classifier"), p) for name, p in method.named_parameters() if p.requires_grad]
    groups = [{"params": [p for head, p in named if head == is_head]} for is_head in (False, True)]
    groups = [group for group in groups if group["params"]]
    optimizer = torch.optim.AdamW(groups, lr, weight_decay=0.01)
    rates = [lr, lr * head_rate][: len(groups)]
    rate = torch.optim.lr_scheduler.OneCycleLR(optimizer, rates, total_steps=epochs * per_epoch, pct_start=0.1)
    method.setup(data)
    method.train()
    step, log = 0, []
    for epoch in range(epochs):
        start = Clock(step, epochs * per_epoch, per_epoch, seed)
        method.before_epoch(data, start)
        order = method.sample_order(data, start)
        for batch in data.batches(method.views(), batch_size, seed=seed, epoch=epoch, device=device, order=order):
            out = method(batch, Clock(step, epochs * per_epoch, per_epoch, seed))
            optimizer.zero_grad()
            out["loss"].backward()
            optimizer.step()
            rate.step()
            step += 1
            log.append({name: value.item() for name, value in out.items()})
            watch(out)
    return {name: sum(line[name] for line in log[-per_epoch:]) / per_epoch for name in log[0]}
