"""NNCLR with one part removed or replaced, and what its neighbors are, for the chapter's ablations.

One process only: what the rows of the queue show is not gathered.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from sslbook.data.loader import Batch
from sslbook.methods.nnclr import NNCLR
from sslbook.schedules import Clock


class Traced(NNCLR):
    """NNCLR that remembers which image every row of the queue shows, and logs how often the neighbor is right.

    Labels are used for measuring only. Rows of random numbers, with which the queue starts, have image and label -1.
    """

    def __init__(self, *args, **options) -> None:
        super().__init__(*args, **options)
        size = len(self.queue.rows)
        self.register_buffer("images", torch.full((size,), -1))
        self.register_buffer("labels", torch.full((size,), -1))
        self.register_buffer("pushed", torch.zeros(size))  # the step at which a row was pushed

    def choose(self, z: Float[Tensor, "n dim"]) -> Int[Tensor, " n"]:
        """The row of the queue that replaces each row of `z`."""
        return (z @ self.queue.rows.T).argmax(dim=1)

    @torch.no_grad()
    def positives(self, z: Float[Tensor, "n dim"]) -> Float[Tensor, "n dim"]:
        self.row = self.choose(z)
        return self.queue.rows[self.row]

    def found(self) -> dict[str, Tensor]:
        """What the neighbors of the last search are, in % of the anchors; their mean age is in steps."""
        self.neighbor = self.images[self.row]  # before the next rows replace the oldest
        return {
            "purity": 100 * (self.labels[self.row] == self.batch.label).float().mean(),
            "own image": 100 * (self.neighbor == self.batch.index).float().mean(),
            "age": (self.step - self.pushed[self.row]).mean(),
            "different rows": torch.tensor(100 * self.row.unique().numel() / len(self.row)),
        }

    def note(self) -> None:
        """Write what the next rows of the queue show."""
        n = len(self.batch.index)
        position = (self.queue.pointer + torch.arange(n, device=self.labels.device)) % len(self.queue.rows)
        self.images[position], self.labels[position] = self.batch.index, self.batch.label
        self.pushed[position] = self.step

    def forward(self, batch: Batch, clock: Clock) -> dict[str, Tensor]:
        self.batch, self.step, before = batch, clock.step, self.queue.pointer.clone()
        out = super().forward(batch, clock)
        self.last = self.found()
        after, self.queue.pointer = self.queue.pointer, before
        self.note()
        self.queue.pointer = after
        return {**out, **self.last}


class OwnView(Traced):
    """The other view itself is the positive, as in SimCLR, behind a stop-gradient; what was found is still measured."""

    def positives(self, z: Float[Tensor, "n dim"]) -> Float[Tensor, "n dim"]:
        super().positives(z)
        return z.detach()


class Oracle(Traced):
    """The most similar row among those of the anchor's own class: it reads the labels."""

    def choose(self, z: Float[Tensor, "n dim"]) -> Int[Tensor, " n"]:
        right = self.labels == self.batch.label[:, None]
        return (z @ self.queue.rows.T - 4 * (~right).float()).argmax(dim=1)


class Random(Traced):
    """Any row of the queue."""

    def choose(self, z: Float[Tensor, "n dim"]) -> Int[Tensor, " n"]:
        return torch.randint(len(self.queue.rows), (len(z),), device=z.device)


class OneOfFive(Traced):
    """One of the five nearest rows, at random."""

    def choose(self, z: Float[Tensor, "n dim"]) -> Int[Tensor, " n"]:
        nearest = (z @ self.queue.rows.T).topk(5, dim=1).indices
        return nearest.gather(1, torch.randint(5, (len(z), 1), device=z.device)).squeeze(1)


class PushedFirst(Traced):
    """The first view is pushed before the search, so that it finds itself."""

    def positives(self, z: Float[Tensor, "n dim"]) -> Float[Tensor, "n dim"]:
        if self.searches % 2 == 0:
            self.queue.push(z.detach())
            self.queue.pointer.sub_(len(z)).remainder_(len(self.queue.rows))  # `forward` pushes the same rows again
            self.note()
        self.searches += 1
        return super().positives(z)

    searches = 0


class InBackbone(Traced):
    """Neighbors are searched among the features of the backbone; the positive is still a projection."""

    def __init__(self, *args, **options) -> None:
        super().__init__(*args, **options)
        width = next(p for p in self.projector.parameters() if p.ndim == 2).shape[1]
        start = torch.randn(len(self.queue.rows), width, generator=torch.Generator().manual_seed(0))
        self.register_buffer("features", F.normalize(start, dim=1))
        self.projector.register_forward_pre_hook(lambda module, inputs: self.h.append(F.normalize(inputs[0].detach())))
        self.h: list[Tensor] = []

    def choose(self, z: Float[Tensor, "n dim"]) -> Int[Tensor, " n"]:
        self.search = self.h.pop(0)
        self.first = self.search if len(self.h) else self.first  # of the first view: what is pushed
        return (self.search @ self.features.T).argmax(dim=1)

    def note(self) -> None:
        super().note()
        n = len(self.batch.index)
        position = (self.queue.pointer + torch.arange(n, device=self.labels.device)) % len(self.queue.rows)
        self.features[position] = self.first


class AmongNeighbors(Traced):
    """The softmax the other way round: a prediction is compared with the neighbors of the whole batch."""

    def forward(self, batch: Batch, clock: Clock) -> dict[str, Tensor]:
        self.batch, self.step = batch, clock.step
        z = [self.projector(self.backbone(x)) for x in batch.views]
        p_1, p_2 = (F.normalize(self.predictor(one), dim=1) for one in z)
        z_1, z_2 = (F.normalize(one, dim=1) for one in z)
        n_1, n_2 = self.positives(z_1), self.positives(z_2)
        own = torch.arange(len(z_1), device=z_1.device)
        logits = [p @ n.T / self.temperature for p, n in ((p_2, n_1), (p_1, n_2))]
        self.last = self.found()
        self.note()
        self.queue.push(z_1)
        return {
            "loss": sum(F.cross_entropy(one, own) for one in logits) / 2,
            "contrastive_accuracy": 100 * (logits[0].argmax(dim=1) == own).float().mean(),
            "neighbor_similarity": (z_1 * n_1).sum(dim=1).mean().detach(),
            **self.last,
        }


def agreement(values: Tensor, a: Int[Tensor, " n"], b: Int[Tensor, " n"]) -> float:
    """How much images `a` agree with images `b` in a factor: 1 if always, 0 on average if they are unrelated.

    Of a class it is `(p - p_0) / (1 - p_0)`, with `p` the fraction of equal pairs and `p_0` that of any two images; of a
    continuous factor the correlation, as one minus half the mean squared difference over the variance.
    """
    if values.is_floating_point():
        values = values.double()
        return (1 - (values[a] - values[b]).square().mean() / (2 * values.var())).item()
    share = torch.bincount(values).double() / len(values)
    equal, level = (values[a] == values[b]).double().mean(), share.square().sum()
    return ((equal - level) / (1 - level)).item()
