"""BYOL with one part removed or replaced, for the chapter's ablations."""

from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.utils import parametrize

from sslbook.data.loader import Batch
from sslbook.methods.byol import BYOL, regression_loss
from sslbook.nn import ConvNet
from sslbook.nn.metrics import feature_std
from sslbook.schedules import Clock


class Constant(BYOL):
    """BYOL with one EMA momentum throughout: 0 makes the target network a copy, 1 never changes it."""

    def after_step(self, clock: Clock) -> None:
        self.target_backbone.update(self.backbone, self.momentum)
        self.target_projector.update(self.projector, self.momentum)


class NoStopGradient(BYOL):
    """The online network is its own target, and the gradient flows through both sides."""

    def forward(self, batch: Batch, clock: Clock) -> dict[str, Tensor]:
        z_1, z_2 = (self.projector(self.backbone(x)) for x in batch.views)
        loss = regression_loss(self.predictor(z_1), z_2) + regression_loss(self.predictor(z_2), z_1)
        return {"loss": loss, "feature_std": feature_std(z_1)}


class DirectPred(BYOL):
    """The predictor is computed from the correlation of its inputs (Tian et al., 2021), not trained.

    `boost` is added to all eigenvalues, relative to the largest; the paper's epsilon. A factor in front of the matrix
    has no effect on a cosine.
    """

    def __init__(self, *args, boost: float = 0.1, keep: float = 0.3, **options) -> None:
        super().__init__(*args, **options)
        (width, _) = self.predictor.weight.shape  # pyrefly: ignore
        self.predictor.weight.requires_grad_(False)
        self.boost, self.keep = boost, keep
        self.register_buffer("correlation", torch.eye(width) / width)

    def forward(self, batch: Batch, clock: Clock) -> dict[str, Tensor]:
        with torch.no_grad():
            z = torch.cat([self.projector(self.backbone(x)) for x in batch.views]).float()
            self.correlation.lerp_(z.T @ z / len(z), 1 - self.keep)
            self.predictor.weight.copy_(direct_predictor(self.correlation, self.boost))  # pyrefly: ignore
        return super().forward(batch, clock)


def direct_predictor(correlation: Float[Tensor, "dim dim"], boost: float) -> Float[Tensor, "dim dim"]:
    """The root of a correlation matrix, with `boost` times its largest eigenvalue added to all."""
    values, vectors = torch.linalg.eigh(correlation)
    root = values.clamp(min=0).sqrt()
    return vectors @ torch.diag(root + boost * root.max()) @ vectors.T


def replace_batch_norm(module: nn.Module, by: Literal["group", "none"]) -> nn.Module:
    """`module` with group norm (groups of 8 channels, one image at a time) or nothing in place of batch norm.

    Without any normalization, the weights are initialized so that the scale stays the same from layer to layer (He et
    al., 2015); torch's own shrink it.
    """
    for name, child in module.named_children():
        if isinstance(child, nn.BatchNorm1d | nn.BatchNorm2d):
            channels = child.num_features
            setattr(module, name, nn.GroupNorm(channels // 8, channels) if by == "group" else nn.Identity())
        else:
            replace_batch_norm(child, by)
            if by == "none" and isinstance(child, nn.Conv2d | nn.Linear):
                nn.init.kaiming_normal_(child.weight, nonlinearity="relu")
    return module


class Standardized(nn.Module):
    """Weight standardization (Qiao et al., 2019): the weights of every output have mean 0 and length 1."""

    def forward(self, weight: Tensor) -> Tensor:
        rows = weight.flatten(1)
        rows = rows - rows.mean(1, keepdim=True)
        return (rows / (rows.norm(dim=1, keepdim=True) + 1e-5)).view_as(weight)


def standardize_weights(module: nn.Module) -> nn.Module:
    """`module` with weight standardization in every convolution and linear layer."""
    for part in list(module.modules()):
        if isinstance(part, nn.Conv2d | nn.Linear):
            parametrize.register_parametrization(part, "weight", Standardized())
    return module


def mlp(in_dim: int, hidden_dim: int, out_dim: int, norm: str = "batch") -> nn.Module:
    """Projector or predictor, with the norm that is asked for."""
    from sslbook.nn import MLP

    head = MLP(in_dim, hidden_dim, out_dim, last_bias=False)
    return head if norm == "batch" else replace_batch_norm(head, norm)  # pyrefly: ignore


def convnet(width: int, norm: str = "batch") -> nn.Module:
    backbone = ConvNet(width)
    return backbone if norm == "batch" else replace_batch_norm(backbone, norm)  # pyrefly: ignore
