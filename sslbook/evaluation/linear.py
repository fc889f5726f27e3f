"""The linear probe: how much of the labels can be read off frozen features by one linear layer.

Multinomial logistic regression on features standardized with the training set's mean and deviation, by SGD with
momentum and a cosine schedule. Every learning rate trains its own head, all heads at once: side by side they are the
columns of one matrix. The rate is chosen on a validation part of the *training* set, the probe is then trained again
on the whole training set, and the test set is looked at once. There is no weight decay: a low rate regularizes as well
(tried on the Shapes data set, decay moved the accuracy by less than the test set can resolve).

The features here are of one fixed view per image. The paper-scale protocol, which trains the layer on features of
augmented images for about 100 epochs (He et al., 2020, "Momentum contrast", section 4.1), is a different and much
dearer measurement; this module does not do it, and its figures are not to be set against those of papers.
"""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from sslbook import rng
from sslbook.errors import UserError

LRS = (0.003, 0.01, 0.03, 0.1, 0.3, 1.0)


@dataclass(frozen=True)
class LinearResult:
    """What the probe found.

    Args:
        accuracy: percentage of test images named rightly.
        lr: the learning rate chosen on the validation part.
        validation: accuracy on the validation part, in percent, of every learning rate tried.
    """

    accuracy: float
    lr: float
    validation: dict[float, float]


def probe(
    train_x: Float[Tensor, "train dim"],
    train_y: Int[Tensor, "train"],
    test_x: Float[Tensor, "test dim"],
    test_y: Int[Tensor, "test"],
    *,
    lrs: tuple[float, ...] = LRS,
    epochs: int = 30,
    batch_size: int = 512,
    validation: float = 0.2,
    seed: int = 0,
    device: torch.device | str | None = None,
) -> LinearResult:
    """Choose the learning rate on a validation part, train on all, test once.

    The same arguments give the same result: the heads start at zero, and splits and orders are keyed by `seed`.

    Args:
        train_x: training features.
        train_y: their labels.
        test_x: test features.
        test_y: their labels.
        lrs: learning rates to try.
        epochs: passes over the features.
        batch_size: features per step.
        validation: the part of each class that is set aside for the choice.
        seed: key of the split and of the order of the features.
        device: where to compute; by default where `train_x` is.

    Raises:
        UserError: a split is empty or a training label is missing.
    """
    if len(train_x) == 0 or len(test_x) == 0:
        raise UserError(f"the linear probe needs both splits; got {len(train_x)} training, {len(test_x)} test images")
    if int(train_y.min()) < 0:
        raise UserError("the linear probe needs a label for every training image; use one folder per class")
    device = train_x.device if device is None else torch.device(device)
    classes, train_y = train_y.cpu().unique(return_inverse=True)
    options = (epochs, batch_size, seed, device)

    held_out = stratified(train_y, validation, seed)
    kept, held = (~held_out).nonzero()[:, 0], held_out.nonzero()[:, 0]
    if len(held) == 0:  # not one class with two images: nothing can be set aside
        held = kept
    heads = _Heads.fit(train_x, train_y, kept, len(classes), lrs, *options)
    right, loss = heads.score(train_x, train_y, held)
    # Small validation parts tie often; the lower loss then decides, and it does so without looking at the test set.
    best = max(range(len(lrs)), key=lambda i: (right[i].item(), -loss[i].item()))

    final = _Heads.fit(train_x, train_y, torch.arange(len(train_x)), len(classes), (lrs[best],), *options)
    predicted = classes[final.predict(test_x)]
    accuracy = 100 * (predicted == test_y.cpu()).double().mean().item()
    return LinearResult(accuracy, lrs[best], {lr: right[i].item() for i, lr in enumerate(lrs)})


def stratified(labels: Int[Tensor, "n"], fraction: float, seed: int = 0) -> Bool[Tensor, "n"]:
    """Marks about `fraction` of every class, at least one of a class with two; the choice is keyed by `seed`."""
    order = rng.permutation(seed, 0, len(labels))
    order = order[labels[order].argsort(stable=True)]  # by class, within a class at random
    _, counts = labels.unique(return_counts=True)
    first = counts.cumsum(0) - counts
    rank = torch.arange(len(labels)) - first.repeat_interleave(counts)
    wanted = (counts * fraction).floor().clamp(min=1).minimum(counts - 1)
    marked = torch.zeros(len(labels), dtype=torch.bool)
    marked[order] = rank < wanted.repeat_interleave(counts)
    return marked


def moments(
    x: Float[Tensor, "n dim"], rows: Int[Tensor, "m"] | None = None
) -> tuple[Float[Tensor, "dim"], Float[Tensor, "dim"]]:
    """Mean and standard deviation of each feature in float64, chunk by chunk; a constant feature's deviation is 1."""
    rows = torch.arange(len(x)) if rows is None else rows
    total = torch.zeros(x.shape[1], dtype=torch.float64, device=x.device)
    for part in rows.split(8192):
        total += x[part].double().sum(0)
    mean = total / len(rows)
    square = torch.zeros_like(total)
    for part in rows.split(8192):
        square += (x[part].double() - mean).square().sum(0)
    deviation = (square / len(rows)).sqrt()
    # A rounding error is not a deviation: dividing by it would blow a dead feature up to the size of the live ones.
    constant = deviation <= 1e-6 * mean.abs().clamp(min=1e-6)
    return mean.float(), torch.where(constant, 1.0, deviation).float()


class _Heads:
    """Linear layers side by side: the columns of one matrix, so that one product serves them all."""

    def __init__(self, mean: Tensor, deviation: Tensor, num_heads: int, num_classes: int, device: torch.device) -> None:
        self.mean, self.deviation = mean.to(device), deviation.to(device)
        self.num_heads, self.num_classes, self.device = num_heads, num_classes, device
        # The last row is the bias; features get a column of ones. The problem is convex: any start will do, so zero.
        self.weight = torch.zeros(len(mean) + 1, num_heads * num_classes, device=device)

    @classmethod
    def fit(
        cls,
        x: Float[Tensor, "n dim"],
        y: Int[Tensor, "n"],
        rows: Int[Tensor, "m"],
        num_classes: int,
        lrs: tuple[float, ...],
        epochs: int,
        batch_size: int,
        seed: int,
        device: torch.device,
    ) -> "_Heads":
        """SGD with momentum 0.9 and a cosine schedule; the gradient of the cross-entropy is written out."""
        heads = cls(*moments(x, rows), len(lrs), num_classes, device)
        rate = torch.tensor(lrs, device=device).repeat_interleave(num_classes)
        momentum = torch.zeros_like(heads.weight)
        batch_size = min(batch_size, len(rows))
        steps = math.ceil(len(rows) / batch_size) * epochs
        step = 0
        for epoch in range(epochs):
            order = rows[rng.permutation(seed, epoch + 1, len(rows))]
            for part in order.split(batch_size):
                z = heads.standardized(x[part])
                error = (z @ heads.weight).unflatten(1, (len(lrs), num_classes)).softmax(2)  # p ...
                target = y[part].to(device)[:, None, None].expand(-1, len(lrs), 1)
                error.scatter_add_(2, target, torch.full_like(error[:, :, :1], -1.0))  # ... - onehot(y)
                gradient = z.T @ error.flatten(1) / len(part)
                momentum.mul_(0.9).add_(gradient)
                heads.weight.addcmul_(momentum, rate * (-0.5 * (1 + math.cos(math.pi * step / steps))))
                step += 1
        return heads

    def standardized(self, x: Float[Tensor, "n dim"]) -> Float[Tensor, "n dim1"]:
        z = (x.to(self.device).float() - self.mean) / self.deviation
        return torch.cat([z, torch.ones_like(z[:, :1])], dim=1)

    def logits(self, x: Float[Tensor, "n dim"]) -> Float[Tensor, "n heads classes"]:
        return (self.standardized(x) @ self.weight).unflatten(1, (self.num_heads, self.num_classes))

    def predict(self, x: Float[Tensor, "n dim"]) -> Int[Tensor, "n"]:
        """Predictions of the first head."""
        return torch.cat([self.logits(part)[:, 0].argmax(1).cpu() for part in x.split(8192)])

    def score(
        self, x: Float[Tensor, "n dim"], y: Int[Tensor, "n"], rows: Int[Tensor, "m"]
    ) -> tuple[Float[Tensor, "num_heads"], Float[Tensor, "num_heads"]]:
        """Accuracy in percent and cross-entropy of every head on some rows."""
        right = torch.zeros(self.num_heads, dtype=torch.float64, device=self.device)
        loss = torch.zeros_like(right)
        for part in rows.split(1024):
            logits, target = self.logits(x[part]), y[part].to(self.device)[:, None]
            right += (logits.argmax(2) == target).double().sum(0)
            target = target[:, :, None].expand(-1, self.num_heads, 1)
            loss -= logits.log_softmax(2).gather(2, target)[:, :, 0].double().sum(0)
        return (100 * right / len(rows)).cpu(), (loss / len(rows)).cpu()
