"""EMA: a teacher (target network, momentum encoder) whose weights are a moving average of the student's."""

from copy import deepcopy
from typing import Any

import torch
from torch import nn

from sslbook.errors import UserError


class EMA(nn.Module):
    """A copy of a module whose parameters are the exponential moving average of the original's.

    Buffers are neither averaged nor copied. The teacher runs in training mode on its own images, so its batch norm
    collects running statistics that fit its own weights, as in the code of MoCo and BYOL. Drop path is switched off.
    Outputs carry no gradient.

    Args:
        online: the module to copy.
    """

    def __init__(self, online: nn.Module) -> None:
        super().__init__()
        self.module = deepcopy(online).requires_grad_(False)
        self._online = (online,)  # in a tuple, so that it is not registered as a submodule
        for part in self.module.modules():
            for name in ("drop_path", "drop_prob"):  # ours is a number, timm's a module with one
                if isinstance(getattr(part, name, None), float):
                    setattr(part, name, 0.0)

    @torch.no_grad()
    def forward(self, *inputs: Any) -> Any:
        return self.module(*inputs)

    def restart(self) -> None:
        """Copies the online module again, parameters and buffers, after it was given other weights."""
        self.module.load_state_dict(self._online[0].state_dict())

    @torch.no_grad()
    def update(self, online: nn.Module, momentum: float) -> None:
        """One step: parameter = momentum * parameter + (1 - momentum) * online parameter.

        Raises:
            UserError: `momentum` is not between 0 and 1.
        """
        if not -1e-6 <= momentum <= 1 + 1e-6:  # a schedule rounds
            raise UserError(f"the EMA momentum is {momentum}: give a number from 0 to 1")
        for mine, theirs in zip(self.module.parameters(), online.parameters(), strict=True):
            mine.lerp_(theirs.to(mine.dtype), 1 - momentum)
