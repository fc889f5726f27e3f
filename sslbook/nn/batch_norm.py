"""Batch norm with statistics of the global batch, in any number of processes, on any device.

`torch.nn.SyncBatchNorm` does not support CPU tensors, and without it the statistics depend on the number of GPUs. Here
they are those of the whole global batch, or of `groups` contiguous chunks of it, which imitates the statistics of that
many GPUs. One process and several then compute the same, and a method that relies on small groups (MoCo) chooses them.

Ioffe and Szegedy, 2015, "Batch normalization" (arXiv:1502.03167).
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from sslbook import distributed
from sslbook.errors import UserError


class BatchNorm(_BatchNorm):
    """Batch norm for any number of axes, with `torch.nn.BatchNorm*d`'s parameters and buffers.

    Args:
        num_features: channels.
        eps: added to the variance.
        momentum: weight of the new statistics in the running ones; None: the average of all so far.
        affine: learn scale and shift.
        track_running_stats: keep running statistics for evaluation.
        groups: number of contiguous chunks of the global batch that are normalized separately.
    """

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        groups: int = 1,
    ) -> None:
        super().__init__(num_features, eps, momentum, affine, track_running_stats)
        self.groups = groups

    def extra_repr(self) -> str:
        return super().extra_repr() + f", groups={self.groups}"

    def forward(  # pyrefly: ignore[bad-override-param-name]
        self, x: Float[Tensor, "batch channels *space"]
    ) -> Float[Tensor, "batch channels *space"]:
        processes = distributed.world_size()
        if (not self.training and self.running_mean is not None) or (self.groups == 1 and processes == 1):
            return super().forward(x)
        y, mean, variance = self._across_processes(x) if self.groups == 1 else self._in_chunks(x)
        if self.training and self.running_mean is not None:
            self._track(mean, variance)
        return y

    def _in_chunks(
        self, x: Float[Tensor, "batch channels *space"]
    ) -> tuple[Float[Tensor, "batch channels *space"], Float[Tensor, "channels"], Float[Tensor, "channels"]]:
        """Every group lies within one process: torch's kernel on each, whose momentum of 1 returns the statistics.

        Raises:
            UserError: the batch, or the groups over processes, cannot be divided evenly.
        """
        processes = distributed.world_size()
        if self.groups % processes or (len(x) * processes) % self.groups:
            what = f"a batch of {len(x) * processes} on {processes} processes into {self.groups} groups"
            raise UserError(f"batch norm cannot split {what}: set batch_size and batch_norm_groups to multiples")
        chunks = x.chunk(self.groups // processes)
        dtype = torch.promote_types(x.dtype, torch.float32)
        means = torch.zeros(len(chunks), x.shape[1], dtype=dtype, device=x.device)
        variances = torch.ones_like(means)
        normalized = [
            F.batch_norm(chunk, mean, variance, self.weight, self.bias, True, 1.0, self.eps)
            for chunk, mean, variance in zip(chunks, means, variances)
        ]
        mean, variance = distributed.all_reduce_mean(torch.stack([means.mean(0), variances.mean(0)]))
        return normalized[0] if len(chunks) == 1 else torch.cat(normalized), mean, variance

    def _across_processes(
        self, x: Float[Tensor, "batch channels *space"]
    ) -> tuple[Float[Tensor, "batch channels *space"], Float[Tensor, "channels"], Float[Tensor, "channels"]]:
        """One group over all processes, from each one's mean and variance, which combine without cancellation."""
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        axes = [0, *range(2, x.ndim)]
        count = x.numel() // x.shape[1] * distributed.world_size()
        variance, mean = torch.var_mean(wide, axes, correction=0)
        means, variances = distributed.all_gather_with_grad(torch.stack([mean, variance])[None]).unbind(1)
        mean = means.mean(0)
        variance = variances.mean(0) + means.var(0, correction=0)

        scale = (variance + self.eps).rsqrt()
        if self.weight is not None:
            scale = scale * self.weight
        shift = -mean * scale
        if self.bias is not None:
            shift = shift + self.bias
        shape = (1, -1) + (1,) * (x.ndim - 2)
        y = (wide * scale.view(shape) + shift.view(shape)).to(x.dtype)
        return y, mean.detach(), variance.detach() * (count / (count - 1))

    @torch.no_grad()
    def _track(self, mean: Float[Tensor, "channels"], variance: Float[Tensor, "channels"]) -> None:
        assert self.running_mean is not None
        assert self.running_var is not None
        assert self.num_batches_tracked is not None
        self.num_batches_tracked.add_(1)
        new = self.momentum if self.momentum is not None else 1.0 / float(self.num_batches_tracked)
        self.running_mean.lerp_(mean.to(self.running_mean.dtype), new)
        self.running_var.lerp_(variance.to(self.running_var.dtype), new)

    def _check_input_dim(self, input: Tensor) -> None:
        """Any number of axes is allowed."""


class BatchNormAct(BatchNorm):
    """Batch norm followed by dropout and activation, which timm keeps in the same module."""

    drop: nn.Module
    act: nn.Module

    def forward(  # pyrefly: ignore[bad-override-param-name]
        self, x: Float[Tensor, "batch channels *space"]
    ) -> Float[Tensor, "batch channels *space"]:
        return self.act(self.drop(super().forward(x)))


def convert_batch_norm(module: nn.Module, groups: int | None = None) -> nn.Module:
    """Replaces every batch norm of torch inside `module` by `BatchNorm`, keeping parameters and buffers.

    Args:
        module: changed in place; returned, since it may be a batch norm itself.
        groups: as for `BatchNorm`; by default 1, and a `BatchNorm` keeps its own.

    Raises:
        UserError: a subclass of batch norm computes something else as well (other than timm's, with an activation).
    """
    if isinstance(module, BatchNorm):
        module.groups = groups or module.groups
        return module
    if isinstance(module, _BatchNorm):
        act = getattr(module, "act", None)
        if act is None and type(module).forward not in (_BatchNorm.forward, nn.SyncBatchNorm.forward):
            raise UserError(
                f"{type(module).__name__} does more than batch norm, which would be lost: "
                "use a torch.nn.BatchNorm2d and a separate module for the rest"
            )
        new = (BatchNorm if act is None else BatchNormAct)(
            module.num_features, module.eps, module.momentum, module.affine, module.track_running_stats, groups or 1
        )
        # The same tensors, not copies: an optimizer made before still updates them.
        for name in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked"):
            setattr(new, name, getattr(module, name))
        if act is not None:  # under the same names, so that weights load unchanged
            new.drop, new.act = getattr(module, "drop", nn.Identity()), act
        return new.train(module.training)
    for name, child in module.named_children():
        setattr(module, name, convert_batch_norm(child, groups))
    return module
