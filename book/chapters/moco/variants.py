"""MoCo with one part removed or replaced, for the chapter's ablations, and what a run's queue and key encoder are like."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from sslbook.data.loader import Batch
from sslbook.methods.moco import MoCo, info_nce
from sslbook.schedules import Clock


class PushedFirst(MoCo):
    """The mistake of enqueuing before the loss: every positive is also one of the negatives."""

    def forward(self, batch: Batch, clock: Clock) -> dict[str, Tensor]:
        q = F.normalize(self.projector(self.backbone(batch.views[0])), dim=1)
        k = F.normalize(self.keys(batch.views[1], batch, clock), dim=1)
        self.queue.push(k)
        loss, logits = info_nce(q, k, self.queue.rows.clone(), self.temperature)
        accuracy = 100 * (logits[:, 1:].max(1).values <= logits[:, 0] + 1e-4).float().mean()
        return {"loss": loss, "contrastive_accuracy": accuracy, "alignment": (q - k).detach().square().sum(1).mean()}


class InBatch(MoCo):
    """No queue: the negatives of an image are the keys of the other images of its batch."""

    def forward(self, batch: Batch, clock: Clock) -> dict[str, Tensor]:
        q = F.normalize(self.projector(self.backbone(batch.views[0])), dim=1)
        k = F.normalize(self.keys(batch.views[1], batch, clock), dim=1)
        logits, positive = q @ k.T / self.temperature, torch.arange(len(q), device=q.device)
        accuracy = 100 * (logits.argmax(1) == positive).float().mean()
        loss = F.cross_entropy(logits, positive)
        return {"loss": loss, "contrastive_accuracy": accuracy, "alignment": (q - k).detach().square().sum(1).mean()}


def keys_again(
    method: MoCo, run: Sequence[Batch], step: int, age: int
) -> tuple[Float[Tensor, "n dim"], Float[Tensor, "n dim"]]:
    """Keys that were pushed `age` steps before `step`, as they lie in the queue and as the key encoder gives them now."""
    batch = run[step - age]
    rows = method.queue.rows
    at = torch.arange(len(batch.index), device=rows.device) + method.queue.pointer - age * len(batch.index)
    with torch.no_grad():
        now = F.normalize(method.keys(batch.views[1], batch, Clock(step - age, len(run))), dim=1)
    return rows[at % len(rows)], now


def agreement(method: MoCo, run: Sequence[Batch], step: int) -> list[tuple[float, float]]:
    """For every age in the queue, the mean cosine of a key with itself encoded now, and with other images' keys."""
    found = []
    for age in range(1, len(method.queue.rows) // len(run[0].index) + 1):
        stored, now = keys_again(method, run, step, age)
        n, cosine = len(now), stored @ now.T
        found.append((cosine.diag().mean().item(), ((cosine.sum() - cosine.trace()) / (n * n - n)).item()))
    return found


@torch.no_grad()
def positives_found(
    method: MoCo, run: Sequence[Batch], step: int, negatives: Float[Tensor, "size dim"]
) -> dict[str, float]:
    """Loss and contrastive accuracy on the next batch, with the given negatives."""
    batch = run[step]
    q = F.normalize(method.projector(method.backbone(batch.views[0])), dim=1)
    k = F.normalize(method.keys(batch.views[1], batch, Clock(step, len(run))), dim=1)
    loss, logits = info_nce(q, k, negatives, method.temperature)
    return {"loss": loss.item(), "accuracy": 100 * (logits.argmax(1) == 0).float().mean().item()}


def fresh_queue(method: MoCo, run: Sequence[Batch], step: int) -> Float[Tensor, "size dim"]:
    """The images of the queue, encoded again by the key encoder as it is now."""
    ages = len(method.queue.rows) // len(run[0].index)
    return torch.cat([keys_again(method, run, step, age)[1] for age in range(1, ages + 1)])


def leak(method: MoCo, run: Sequence[Batch], batches: int = 4) -> dict[str, float]:
    """The loss with keys of the queries' own groups, and with shuffled ones, after training."""
    found, shuffles = {}, method.shuffles
    for name, method.shuffles in (("loss, same groups", False), ("loss, shuffled", True)):
        losses = [positives_found(method, run, len(run) - i, method.queue.rows)["loss"] for i in range(1, batches + 1)]
        found[name] = sum(losses) / batches
    method.shuffles = shuffles
    return found


class Lag:
    """Follows a run: how far the key encoder's weights are behind, and three formulas for it.

    Called with the step and the method before every step, as `watch` of `experiments.train`.

    Args:
        momentum: the EMA momentum.
    """

    def __init__(self, momentum: float) -> None:
        self.momentum, self.last = momentum, torch.zeros(())
        self.bound = self.walk = self.longest = self.weight = 0.0
        self.rows: list[dict[str, float]] = []

    def __call__(self, step: int, method: MoCo) -> None:
        vector = nn.utils.parameters_to_vector
        now = vector([*method.backbone.parameters(), *method.projector.parameters()]).detach()
        key = vector([*method.key_backbone.parameters(), *method.key_projector.parameters()])
        if step:
            m, length = self.momentum, (now - self.last).norm().item()
            self.bound = m * (self.bound + length)
            self.walk = m * (self.walk**2 + length**2) ** 0.5
            self.longest = max(self.longest, length)
            self.weight = m * (self.weight + 1)  # m + m^2 + ..., toward m / (1 - m)
            lag = (now - key).norm().item()
            names = ("step", "lag", "bound", "random walk", "largest step everywhere")
            self.rows.append(dict(zip(names, (step, lag, self.bound, self.walk, self.weight * self.longest))))
        self.last = now
