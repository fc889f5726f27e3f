"""Writes the loss of every method's first step, for `test_contracts.py` to compare with.

python -m tests.methods.first_loss [NAME ...]

Run it only after a change that is meant to alter what a method computes, and say so in the commit.
"""

import json
import sys
from pathlib import Path
from unittest.mock import patch

import torch
from torch import Tensor

from sslbook.schedules import Clock
from tests.methods.cases import NAMES, make, make_batch

FILE = Path(__file__).with_suffix(".json")


def clamped_normal(x: Tensor, mean: float = 0.0, std: float = 1.0, a: float = -2.0, b: float = 2.0) -> Tensor:
    """Replaces torch's truncated normal, whose random numbers differ between versions of torch."""
    with torch.no_grad():
        return x.normal_(mean, std).clamp_(a, b)


def first_loss(name: str) -> dict[str, float]:
    with patch.object(torch.nn.init, "trunc_normal_", clamped_normal):
        method = make(name)
    with torch.no_grad():
        out = method(make_batch(method, 8), Clock(step=3, total_steps=10, steps_per_epoch=2, seed=5))
    return {key: float(value) for key, value in out.items()}


if __name__ == "__main__":
    stored = json.loads(FILE.read_text(encoding="utf-8"))
    stored |= {name: first_loss(name) for name in sys.argv[1:] or NAMES}
    FILE.write_text(json.dumps(stored, indent=2, sort_keys=True) + "\n", encoding="utf-8")
