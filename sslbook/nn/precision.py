"""Where a loss leaves automatic mixed precision."""

import torch
from torch import Tensor


def full_precision(x: Tensor) -> torch.autocast:
    """A context without autocast on the device of `x`: what is computed inside keeps the type it is given.

    Losses with a temperature, a matrix root or a long sum run here on float32, since half the bits would change them.
    """
    return torch.autocast(x.device.type, enabled=False)
