import pytest
import torch
from torch import Tensor

from sslbook import distributed
from sslbook.nn.metrics import feature_std


def test_from_collapse_to_uniform() -> None:
    assert feature_std(torch.ones(6, 4)) < 1e-6
    assert feature_std(torch.ones(1, 4)) == 0
    assert feature_std(torch.randn(4000, 64)) == pytest.approx(1.0, abs=0.01)
    z = torch.randn(5, 3)
    torch.testing.assert_close(feature_std(z), feature_std(7 * z))


def _std(z: Tensor) -> float:
    n = len(z) // distributed.world_size()
    return float(feature_std(z[distributed.rank() * n :][:n]))


def test_two_processes_are_one(pool) -> None:
    z = torch.randn(6, 3)
    assert pool.run(_std, z) == pytest.approx([_std(z)] * 2)
