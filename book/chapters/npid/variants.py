"""Instance discrimination with one part removed or replaced at a time, and how old and how large its numbers are.

One process only: nothing that is measured here is gathered.
"""

import copy
import math
import statistics
from collections import deque
from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from sslbook.data.loader import Batch, Data
from sslbook.data.views import View
from sslbook.methods.base import Method
from sslbook.methods.npid import NPID, sample_negatives
from sslbook.nn import backbone_dim
from sslbook.schedules import Clock

Watch = Callable[[int, Method], None]


class Watched(NPID):
    """NPID whose parts can be switched off, and which notes its partition function.

    Args:
        *args: those of NPID.
        loss: "NCE", if there are noise samples; or "InfoNCE", cross-entropy over the own row and the noise samples.
        constant_until: the constant is estimated in every step before this one and then never again. The package's is
            estimated in the first step, 1, and from the positives as well.
        wrong: factor on the constant.
        proximal: weight of the squared distance between a feature and the image's own row (the paper's equation 9).
        unit: features and rows of length one.
        **options: those of NPID. A momentum of 1 leaves the memory bank as it starts.
    """

    def __init__(
        self,
        *args,
        loss: str = "NCE",
        constant_until: int = 1,
        wrong: float = 1.0,
        proximal: float = 0.0,
        unit: bool = True,
        **options,
    ) -> None:
        super().__init__(*args, **options)
        self.loss, self.constant_until, self.wrong = loss, constant_until, wrong
        self.proximal, self.unit = proximal, unit
        self.features: deque[Tensor] = deque(maxlen=100)  # of the last steps

    def contrast(
        self, v: Float[Tensor, "n dim"], index: Int[Tensor, "n"], clock: Clock
    ) -> tuple[Float[Tensor, ""], Float[Tensor, "n classes"], Int[Tensor, "n"]]:
        self.step = clock.step
        if self.num_negatives and self.loss == "InfoNCE":
            negatives = sample_negatives(index, self.num_negatives, len(self.memory.rows), clock)
            compared = self.memory.rows[torch.cat([index[:, None], negatives], dim=1)]
            logits = torch.einsum("nd,nkd->nk", v, compared) / self.temperature
            loss, positive = F.cross_entropy(logits, torch.zeros_like(index)), torch.zeros_like(index)
        else:
            loss, logits, positive = super().contrast(v, index, clock)
        own = self.memory.rows[index]
        return loss + self.proximal * (v - own).square().sum(1).mean(), logits, positive

    def estimate_partition(self, logits: Float[Tensor, "n rows"]) -> None:
        if self.step < self.constant_until:
            noise = logits[:, 1:] if self.constant_until > 1 else logits
            mean = noise.logsumexp(dim=(0, 1)) - math.log(noise.numel())
            self.log_partition.copy_(mean + math.log(len(self.memory.rows)) + math.log(self.wrong))

    def forward(self, batch: Batch, clock: Clock) -> dict[str, Tensor]:
        v = self.projector(self.backbone(batch.views[0]))
        v = F.normalize(v, dim=1) if self.unit else v
        loss, _, _ = self.contrast(v, batch.index, clock)
        with torch.no_grad():
            rows, n = self.memory.rows, len(self.memory.rows)
            logits = v @ rows.T / self.temperature
            noted = {
                "accuracy": 100 * (logits.argmax(1) == batch.index).float().mean(),
                "log Z/n": logits.logsumexp(1).mean() - math.log(n),
                "own row": F.cosine_similarity(v, rows[batch.index]).mean(),
                "length of mean": F.normalize(v, dim=1).mean(0).norm(),
            }
            if self.num_negatives and self.loss == "NCE":
                noted["log constant/n"] = self.log_partition - math.log(n)
            self.features.append(v.detach())
            if self.momentum < 1 and self.unit:
                self.memory.update(batch.index, v.detach(), self.momentum)
            elif self.momentum < 1:
                rows[batch.index] = self.momentum * rows[batch.index] + (1 - self.momentum) * v.detach()
        return {"loss": loss, **noted}


class Parametric(Method):
    """A classifier with a weight vector for every image, behind the same projector as NPID's.

    Weights and features have length one, and a temperature divides their inner products. So it differs from NPID with
    the full softmax in one thing: the weights are moved by the gradient.

    Args:
        backbone: the network to train.
        view: augmentation of an image.
        projector_dim: width of features and weights.
        temperature: divides the cosine similarities.
        num_images: how many weight vectors.
        rate: their learning rate, over that of the network.
    """

    def __init__(
        self,
        backbone: nn.Module,
        view: View,
        projector_dim: int,
        temperature: float,
        num_images: int,
        rate: float = 1.0,
    ) -> None:
        super().__init__()
        self.view, self.temperature, self.backbone, self.rate = view, temperature, backbone, rate
        self.projector = nn.Linear(backbone_dim(backbone), projector_dim)
        start = torch.randn(num_images, projector_dim, generator=torch.Generator().manual_seed(0))
        self.weight = nn.Parameter(F.normalize(start, dim=1))

    def views(self) -> tuple[View, ...]:
        return (self.view,)

    def forward(self, batch: Batch, clock: Clock) -> dict[str, Tensor]:
        v = F.normalize(self.projector(self.backbone(batch.views[0])), dim=1)
        weight = F.normalize(self.weight, dim=1)
        logits = v @ weight.T / self.temperature
        accuracy = 100 * (logits.argmax(1) == batch.index).float().mean()
        own = (v * weight[batch.index]).sum(1).mean().detach()
        return {"loss": F.cross_entropy(logits, batch.index), "accuracy": accuracy, "own row": own}


def train(
    method: Method,
    data: Data,
    run: Sequence[Batch],
    batch_size: int,
    lr: float,
    seed: int,
    watch: Watch = lambda step, method: None,
) -> tuple[dict[str, float], dict[str, list[float]]]:
    """Train in place by AdamW and one cycle of the learning rate: the means of the last epoch's log, and the whole log.

    Unlike `experiments.train` it knows epochs, on which the choice of noise samples depends.

    Args:
        method: what to train; its `setup` is called.
        data: its images.
        run: one batch a step, epoch after epoch.
        batch_size: images in a batch.
        lr: peak learning rate.
        seed: of the noise samples.
        watch: called after every step.
    """
    per_epoch = data.steps_per_epoch(batch_size)
    method.setup(data)
    weights = [method.weight] if isinstance(method, Parametric) else []
    groups = [{"params": [p for p in method.parameters() if all(p is not w for w in weights)]}]
    groups += [{"params": weights, "lr": lr * method.rate}] if isinstance(method, Parametric) else []
    optimizer = torch.optim.AdamW(groups, lr, weight_decay=0.01)
    rates = [group["lr"] for group in optimizer.param_groups]
    rate = torch.optim.lr_scheduler.OneCycleLR(optimizer, rates, total_steps=len(run), pct_start=0.1)
    log: dict[str, list[float]] = {}
    method.train()
    for step, batch in enumerate(run):
        out = method(batch, Clock(step, len(run), per_epoch, seed))
        optimizer.zero_grad()
        out["loss"].backward()
        optimizer.step()
        rate.step()
        for name, value in out.items():
            log.setdefault(name, []).append(value.item())
        watch(step + 1, method)
    return {name: statistics.fmean(values[-per_epoch:]) for name, values in log.items()}, log


def roughness(loss: Sequence[float]) -> float:
    """How much the loss jumps from step to step in the last 100 steps, relative to its mean."""
    last = list(loss[-100:])
    jumps = [b - a for a, b in pairwise(last)]
    return statistics.stdev(jumps) / math.sqrt(2) / abs(statistics.fmean(last))


@torch.no_grad()
def staleness(method: Watched, run: Sequence[Batch], step: int, per_epoch: int) -> dict[str, list[float]]:
    """What the last two epochs' views are to the network of now, by their age in steps, the newest first.

    "same view": cosine of the feature that was computed then and of the one computed now; "error": mean distance of
    the two over the temperature, which bounds the change of any logit; "row": cosine of the image's row with its
    feature of now. Further two numbers: "two views": cosine of two views of an image, both encoded now; "other image":
    cosine of two images.
    """
    now = copy.deepcopy(method).train()  # batch norm as in training, and its buffers must not change
    found: dict[str, list[float]] = {"same view": [], "error": [], "row": []}
    fresh: list[dict[int, Tensor]] = [{}, {}]
    for age in range(1, min(2 * per_epoch, step, len(method.features)) + 1):
        batch, old = run[step - age], method.features[-age]
        v = F.normalize(now.projector(now.backbone(batch.views[0])), dim=1)
        found["same view"].append((v * old).sum(1).mean().item())
        found["error"].append((v - old).norm(dim=1).mean().item() / method.temperature)
        found["row"].append((v * method.memory.rows[batch.index]).sum(1).mean().item())
        fresh[(age - 1) // per_epoch] |= dict(zip(batch.index.tolist(), v))
    both = [torch.stack([epoch[i] for i in fresh[0] if i in fresh[1]]) for epoch in fresh]
    found["two views"] = [(both[0] * both[1]).sum(1).mean().item()]
    found["other image"] = [(both[0] * both[1].roll(1, 0)).sum(1).mean().item()]
    return {name: [round(value, 4) for value in values] for name, values in found.items()}
