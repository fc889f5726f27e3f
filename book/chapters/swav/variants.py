"""SwAV with one part removed or replaced, for the chapter's ablations."""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from sslbook.data.loader import Batch
from sslbook.methods.swav import SwAV, prototype_perplexity, swapped_prediction
from sslbook.schedules import Clock


class SoftmaxCodes(SwAV):
    """The code of a crop is a softmax of its own scores: no equipartition."""

    @torch.no_grad()
    def codes(self, z: Float[Tensor, "large n dim"]) -> Float[Tensor, "large n prototypes"]:
        return F.softmax(z @ self.prototypes.T / self.epsilon, dim=2)


class HardCodes(SwAV):
    """The code is rounded to the prototype with the largest share."""

    @torch.no_grad()
    def codes(self, z: Float[Tensor, "large n dim"]) -> Float[Tensor, "large n prototypes"]:
        q = super().codes(z)
        return F.one_hot(q.argmax(dim=2), q.shape[2]).to(q.dtype)


class OwnCodes(SwAV):
    """Each of two crops predicts its own code: no swap."""

    @torch.no_grad()
    def codes(self, z: Float[Tensor, "large n dim"]) -> Float[Tensor, "large n prototypes"]:
        return super().codes(z).flip(0)


class LongPrototypes(SwAV):
    """The prototypes may grow: they are not normalized after a step."""

    def after_step(self, clock: Clock) -> None:
        pass


class GradientThroughCodes(SwAV):
    """The gradient flows through Sinkhorn-Knopp into the codes as well."""

    def forward(self, batch: Batch, clock: Clock) -> dict[str, Tensor]:
        scores = self.project(batch.views) @ self.prototypes.T
        q = torch.stack([sinkhorn(s, self.epsilon, self.sinkhorn_iterations) for s in scores[:2]])
        loss = swapped_prediction(q, scores, self.temperature)
        return {"loss": loss, "prototype_perplexity": prototype_perplexity(scores.detach(), self.temperature)}


def sinkhorn(scores: Float[Tensor, "n clusters"], epsilon: float, iterations: int) -> Float[Tensor, "n clusters"]:
    """As `sslbook.nn.sinkhorn`, in one process and with a gradient."""
    log_q = scores / epsilon
    for _ in range(iterations):
        log_q = log_q - log_q.logsumexp(dim=0)
        log_q = log_q - log_q.logsumexp(dim=1, keepdim=True)
    return log_q.exp()
