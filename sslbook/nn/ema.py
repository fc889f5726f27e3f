"""A teacher that follows its student slowly."""

from copy import deepcopy
from typing import Any

import torch
from torch import nn

from sslbook.errors import UserError


class EMA(nn.Module):
    """A copy of a module whose parameters are the exponential moving average of the original's.

    Buffers are not averaged and not copied: the teacher runs in training mode on its own images, so its batch norm
    gathers running statistics that fit its own weights, as in the code of MoCo and BYOL. Drop path is for students only.

    Args:
        online: the module to copy.
    """

    def __init__(self, online: nn.Module) -> None:
        super().__init__()
        self.module = deepcopy(online).requires_grad_(False)
        self._online = (online,)  # in a tuple, so that it does not count as a part of the teacher
        for part in self.module.modules():
            for name in ("drop_path", "drop_prob"):  # ours is a number, timm's a module with one
                if isinstance(getattr(part, name, None), float):
                    setattr(part, name, 0.0)

    @torch.no_grad()
    def forward(self, *inputs: Any) -> Any:
        return self.module(*inputs)

    def restart(self) -> None:
        """Become a copy of the online module again, parameters and buffers: it was given other weights."""
        self.module.load_state_dict(self._online[0].state_dict())

    @torch.no_grad()
    def update(self, online: nn.Module, momentum: float) -> None:
        """Every parameter becomes `momentum` times itself plus `1 - momentum` times the online one."""
        if not -1e-6 <= momentum <= 1 + 1e-6:  # a schedule rounds
            raise UserError(f"the teacher's momentum is {momentum}: give a number from 0 to 1")
        for mine, theirs in zip(self.module.parameters(), online.parameters(), strict=True):
            mine.lerp_(theirs.to(mine.dtype), 1 - momentum)
