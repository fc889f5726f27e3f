"""DenseCL, InterCLR and PIRL with one part removed or replaced at a time, and what is noted while they train."""

import copy
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from sslbook import rng
from sslbook.book.chapters.densecl.scenes import Truth
from sslbook.data.loader import Batch, Data
from sslbook.methods.densecl import DenseCL, correspondence, local_features
from sslbook.methods.interclr import InterCLR, inter_image_loss, sample_positives, sample_semihard
from sslbook.methods.moco import info_nce
from sslbook.methods.pirl import IMAGE_NEGATIVES, PIRL, PUZZLE_NEGATIVES
from sslbook.schedules import Clock

Match = Literal["features", "projections", "random", "identity", "truth"]
STREAM = rng.METHOD + 40


class Matched(DenseCL):
    """DenseCL with other correspondences or other negatives.

    Args:
        match: what the pairs of cells are chosen by; "truth" is what `pairs` was set to before the step.
        negatives: what an image leaves in the dense queue: the mean of its keys, or one of them.
        **options: those of DenseCL.
    """

    def __init__(self, *args, match: Match = "features", negatives: Literal["pooled", "cell"] = "pooled", **options):
        super().__init__(*args, **options)
        self.match, self.negatives = match, negatives
        self.pairs: Int[Tensor, "n s"] | None = None
        self.last: dict[str, Tensor] = {}

    def forward(self, batch: Batch, clock: Clock) -> dict[str, Tensor]:
        x_q, x_k = batch.views
        f_q = local_features(self.backbone, x_q)
        f_k = self.key_features(x_k, batch, clock)
        q, dense_q = self.projector(f_q.mean(dim=1)), self.dense_projector(f_q)
        k, dense_k = self.key_projector(f_k.mean(dim=1)), self.key_dense_projector(f_k)
        q, k = F.normalize(q, dim=1), F.normalize(k, dim=1)
        stored = F.normalize(dense_k.mean(dim=1), dim=1)
        dense_q, dense_k = F.normalize(dense_q, dim=2), F.normalize(dense_k, dim=2)
        n, s, _ = dense_q.shape
        u = rng.uniform(clock.seed, clock.step, batch.index, STREAM, 1 + s)
        if self.negatives == "cell":
            stored = dense_k[torch.arange(n), (u[:, 0].double() * s).long()]
        match = self.chosen(f_q.detach(), f_k, dense_q.detach(), dense_k, (u[:, 1:].double() * s).long(), batch.index)
        matched_k = dense_k.gather(1, match[:, :, None].expand_as(dense_k))
        loss, logits = info_nce(q, k, self.queue.rows.clone(), self.temperature)
        dense_loss, dense_logits = info_nce(
            dense_q.flatten(0, 1), matched_k.flatten(0, 1), self.dense_queue.rows.clone(), self.temperature
        )
        self.queue.push(k)
        self.dense_queue.push(stored)
        out = {
            "loss": (1 - self.dense_weight) * loss + self.dense_weight * dense_loss,
            "global_loss": loss.detach(),
            "dense_loss": dense_loss.detach(),
            "contrastive_accuracy": 100 * (logits.argmax(dim=1) == 0).float().mean(),
            "dense_accuracy": 100 * (dense_logits.argmax(dim=1) == 0).float().mean(),
        }
        self.last = {name: value.detach() for name, value in out.items()}
        return out

    def chosen(
        self,
        f_q: Float[Tensor, "n s dim"],
        f_k: Float[Tensor, "n s dim"],
        dense_q: Float[Tensor, "n s out"],
        dense_k: Float[Tensor, "n s out"],
        random: Int[Tensor, "n s"],
        index: Int[Tensor, "n"],
    ) -> Int[Tensor, "n s"]:
        """The cell of the key for every cell of the query."""
        if self.match == "features":
            return correspondence(f_q, f_k)
        if self.match == "projections":
            return correspondence(dense_q, dense_k)
        if self.match == "random":
            return random
        if self.match == "identity":
            return torch.arange(random.shape[1], device=random.device).expand_as(random)
        assert self.pairs is not None
        return self.pairs


class Pairs(InterCLR):
    """InterCLR with other positives or negatives, which notes how often these have the class of their anchor.

    Args:
        positives: images of the same cluster, any images, or images of the same class.
        negatives: from the most similar images, or from all.
        **options: those of InterCLR.
    """

    def __init__(
        self,
        *args,
        positives: Literal["cluster", "random", "class"] = "cluster",
        negatives: Literal["semi-hard", "uniform"] = "semi-hard",
        **options,
    ):
        super().__init__(*args, **options)
        self.positives, self.negatives = positives, negatives
        self.classes: Tensor = torch.empty(0)
        self.noted: dict[str, Tensor] = {}

    def setup(self, data: Data) -> None:
        super().setup(data)
        self.classes = data.labels("train").to(self.clusters.assignment.device)

    def inter(self, q: Float[Tensor, "n dim"], index: Int[Tensor, "n"], clock: Clock) -> Float[Tensor, ""]:
        rows, clusters, classes = self.clusters.memory.rows, self.clusters.assignment, self.classes
        images = len(rows)
        u = rng.uniform(clock.seed, clock.epoch, index, rng.METHOD + 1, 1 + self.num_negatives)
        known, label = clusters[index] >= 0, clusters[index].clamp(min=0)
        if self.positives == "cluster":
            positive = sample_positives(label, clusters, self.clusters.sizes(), u[:, 0])
        elif self.positives == "class":
            positive = sample_positives(classes[index], classes, classes.bincount(), u[:, 0])
        else:
            positive = (u[:, 0].double() * images).long()
        if self.negatives == "semi-hard":
            negative = sample_semihard(q.detach() @ rows.T, self.pool_size, u[:, 1:])
        else:
            negative = (u[:, 1:].double() * images).long()
        groups = classes if self.positives == "class" else clusters
        counted = (groups[negative] != groups[index][:, None]) & (groups[negative] >= 0)
        s_negative = torch.einsum("nd,nkd->nk", q, rows[negative])
        s_positive = (q * rows[positive]).sum(dim=1)
        other = positive != index
        alike = classes[positive] == classes[index]
        self.noted = {
            "purity": 100 * alike[other].float().mean(),
            "own image": 100 * (~other).float().mean(),
            "false negatives": 100 * (classes[negative] == classes[index][:, None])[counted].float().mean(),
        }
        return inter_image_loss(s_positive, s_negative, counted, known, self.temperature, self.margin)

    def forward(self, batch: Batch, clock: Clock) -> dict[str, Tensor]:
        return super().forward(batch, clock) | self.noted


# -- what is measured --------------------------------------------------------------------------------------------------


@torch.no_grad()
def same_place(method: nn.Module, x: tuple[Tensor, ...], where: Truth, on: Tensor, *, project: bool = False) -> float:
    """Percent of the matches that are less than a cell from the true place, among those cells of the first view that
    `on` selects and the second view shows. Batch norm uses the batch, as in training, and is not changed.

    Args:
        method: DenseCL, or any method with a backbone.
        x: two views.
        where: what their crops say.
        on: which cells count.
        project: match dense projections instead of the backbone's features.
    """
    copied = copy.deepcopy(method).train()
    f = [local_features(copied.backbone, view) for view in x]
    if project:
        f = [copied.dense_projector(one) for one in f]
    found = correspondence(*f)
    right = where.near.to(found.device).gather(2, found[:, :, None])[:, :, 0]
    return 100 * right[(where.seen & on).to(found.device)].float().mean().item()


def common_share(weight: Float[Tensor, "out patches_times_dim"], patches: int) -> float:
    """Fraction of the squared weights that is common to all positions: one over their number if they are unrelated, one
    if the layer sums over the patches."""
    by_position = weight.detach().view(len(weight), patches, -1)
    return (patches * by_position.mean(1).square().sum() / by_position.square().sum()).item()


def summed_nce(scores: Float[Tensor, "n rows"]) -> Float[Tensor, ""]:
    """PIRL's `nce` with the sum over each row's negatives in place of a constant Z."""
    log_odds = scores - scores[:, 1:].logsumexp(1, keepdim=True)
    return (F.softplus(-log_odds[:, 0]) + F.softplus(log_odds[:, 1:]).sum(dim=1)).mean()


class OwnSum(PIRL):
    """PIRL whose h divides by the sum over an image's own negatives, as the paper's equation 4 does."""

    def forward(self, batch: Batch, clock: Clock) -> dict[str, Tensor]:
        x, x_puzzle = batch.views
        f = F.normalize(self.projector(self.backbone(x)), dim=1)
        g = F.normalize(self.puzzle(x_puzzle, batch.index, clock), dim=1)
        scores = [self.scores(v, batch.index, clock, s) for v, s in ((g, PUZZLE_NEGATIVES), (f, IMAGE_NEGATIVES))]
        puzzle, image = map(summed_nce, scores)
        self.memory.update(batch.index, f.detach(), self.momentum)
        return {
            "loss": self.puzzle_weight * puzzle + (1 - self.puzzle_weight) * image,
            "puzzle_accuracy": 100 * (scores[0].argmax(dim=1) == 0).float().mean(),
            "alignment": (f.detach() - g.detach()).square().sum(dim=1).mean(),
        }
