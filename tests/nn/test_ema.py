import pytest
import torch
from torch import nn

from sslbook.errors import UserError
from sslbook.nn import EMA, VisionTransformer


def test_update_is_a_moving_average() -> None:
    online = nn.Linear(3, 2)
    teacher = EMA(online)
    start = online.weight.detach().clone()
    with torch.no_grad():
        online.weight += 1
    teacher.update(online, 0.9)
    torch.testing.assert_close(teacher.module.weight, 0.9 * start + 0.1 * online.weight)
    teacher.update(online, 1.0)
    torch.testing.assert_close(teacher.module.weight, 0.9 * start + 0.1 * online.weight)
    teacher.update(online, 0.0)
    torch.testing.assert_close(teacher.module.weight, online.weight)
    with pytest.raises(UserError, match="from 0 to 1"):
        teacher.update(online, 2.0)


def test_is_a_copy_without_gradient() -> None:
    online = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))
    teacher = EMA(online)
    assert not any(p.requires_grad for p in teacher.parameters())
    assert not {p.data_ptr() for p in teacher.parameters()} & {p.data_ptr() for p in online.parameters()}
    x = torch.randn(8, 3, requires_grad=True)
    assert not teacher(x).requires_grad


def test_running_statistics_are_its_own() -> None:
    online = nn.Sequential(nn.BatchNorm1d(2))
    teacher = EMA(online)
    online(torch.randn(8, 2) + 5)
    teacher.update(online, 0.0)
    assert teacher.module[0].running_mean.abs().max() == 0
    teacher(torch.full((8, 2), 3.0))
    torch.testing.assert_close(teacher.module[0].running_mean, torch.full((2,), 0.3))


def test_rejects_another_module() -> None:
    with pytest.raises(ValueError):
        EMA(nn.Linear(3, 2)).update(nn.Linear(3, 2, bias=False), 0.5)


def test_teacher_has_no_drop_path() -> None:
    torch.manual_seed(0)
    online = VisionTransformer(8, 4, 8, 2, 2, drop_path=0.5)
    teacher = EMA(online)
    x = torch.randn(64, 3, 8, 8)  # so many that some branch is dropped in one pass and not in the other
    assert torch.equal(teacher(x), teacher(x))
    assert (online(x) - online(x)).abs().max() > 0
