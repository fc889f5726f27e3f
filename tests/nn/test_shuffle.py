import pytest
import torch
from torch import Tensor, nn

from sslbook import distributed
from sslbook.nn import BatchNorm, convert_batch_norm
from sslbook.nn.shuffle import encode_shuffled, needs_shuffling
from sslbook.schedules import Clock
from tests.methods.cases import Convolutions


def encoder() -> nn.Module:
    torch.manual_seed(0)
    return convert_batch_norm(Convolutions(), 2)


def _encode(x: Tensor, index: Tensor, seed: int) -> Tensor:
    own = distributed.own_rows(len(x) // distributed.world_size())
    return encode_shuffled(encoder(), x[own], index[own], Clock(seed=seed))


def test_batch_norm_groups_are_permuted_and_outputs_are_not() -> None:
    torch.manual_seed(0)
    x, index = torch.randn(8, 3, 16, 16), torch.randint(100, (8,))
    network = encoder()
    shuffled = encode_shuffled(network, x, index, Clock())
    assert (shuffled - network(x)).abs().max() > 1e-3
    network.eval()  # without batch statistics the groups do not matter
    torch.testing.assert_close(encode_shuffled(network, x, index, Clock()), network(x))
    assert not torch.equal(_encode(x, index, 0), _encode(x, index, 1))


def test_no_gradient() -> None:
    x = torch.randn(8, 3, 16, 16)
    assert not encode_shuffled(encoder(), x, torch.arange(8), Clock()).requires_grad


def test_two_processes_are_one(pool) -> None:
    torch.manual_seed(0)
    x, index = torch.randn(8, 3, 16, 16), torch.randint(100, (8,))
    torch.testing.assert_close(torch.cat(pool.run(_encode, x, index, 3)), _encode(x, index, 3))


@pytest.mark.parametrize(("groups", "expected"), [(1, False), (2, True)])
def test_shuffling_is_for_several_groups(groups: int, expected: bool) -> None:
    assert needs_shuffling(nn.Sequential(BatchNorm(4)), groups) is expected
    assert not needs_shuffling(nn.Linear(4, 4), groups)
