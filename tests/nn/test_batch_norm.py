from copy import deepcopy

import pytest
import torch
from torch import Tensor, nn

from sslbook import distributed
from sslbook.errors import UserError
from sslbook.nn import BatchNorm, convert_batch_norm


def torch_batch_norm(like: BatchNorm, x: Tensor) -> nn.Module:
    module = (nn.BatchNorm1d if x.ndim == 2 else nn.BatchNorm2d)(x.shape[1]).to(x.dtype)
    module.load_state_dict(like.state_dict())
    return module


def make(channels: int, groups: int = 1) -> BatchNorm:
    torch.manual_seed(1)
    module = BatchNorm(channels, groups=groups).double()
    nn.init.normal_(module.weight)
    nn.init.normal_(module.bias)
    return module


def step(module: nn.Module, x: Tensor, weights: Tensor) -> dict[str, Tensor]:
    """Output, gradients (of the sum of both processes' losses) and running statistics after two batches."""
    module(x.detach() * 3 + 1)
    x = x.clone().requires_grad_()
    y = module(x)
    (y.sin() * weights).sum().backward()
    gradients = torch.stack([module.weight.grad, module.bias.grad])
    return {
        "y": y.detach(),
        "x": x.grad,
        "parameters": distributed.all_reduce_mean(gradients) * distributed.world_size(),
        **{name: value.clone() for name, value in module.named_buffers()},
    }


@pytest.mark.parametrize("shape", [(5, 3), (6, 3, 4, 4), (2, 3, 1, 2)])
def test_one_process_equals_torch(shape: tuple[int, ...]) -> None:
    x, weights = torch.randn(2, *shape, dtype=torch.float64)
    module = make(shape[1])
    expected = step(torch_batch_norm(module, x), x, weights)
    for name, got in step(module, x, weights).items():
        torch.testing.assert_close(got, expected[name], msg=name)


def _half(groups: int, x: Tensor, weights: Tensor) -> dict[str, Tensor]:
    r = distributed.rank()
    return step(make(x.shape[1], groups), x.chunk(2)[r], weights.chunk(2)[r])


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("shape", [(8, 3), (8, 3, 3, 2)])
def test_two_processes_equal_one(pool, groups: int, shape: tuple[int, ...]) -> None:
    x, weights = torch.randn(2, *shape, dtype=torch.float64)
    # A mean far from zero: a variance computed as the mean of squares less the squared mean would lose its digits.
    x = x + 1e4
    one = step(make(shape[1], groups), x, weights)
    two = pool.run(_half, groups, x, weights)
    for name in ("y", "x"):
        torch.testing.assert_close(torch.cat([got[name] for got in two]), one[name], rtol=1e-7, atol=1e-7, msg=name)
    for got in two:
        for name in ("parameters", "running_mean", "running_var", "num_batches_tracked"):
            torch.testing.assert_close(got[name], one[name], msg=name)


def test_one_sample_in_each_process(pool) -> None:
    x, weights = torch.randn(2, 2, 3, dtype=torch.float64)
    one = step(make(3), x, weights)
    two = pool.run(_half, 1, x, weights)
    torch.testing.assert_close(torch.cat([got["y"] for got in two]), one["y"])
    torch.testing.assert_close(two[0]["running_var"], one["running_var"])


@pytest.mark.parametrize("groups", [2, 3])
def test_groups_are_separate_batches(groups: int) -> None:
    x = torch.randn(6, 4, 3, 3, dtype=torch.float64)
    module = make(4, groups)
    parts = [torch_batch_norm(module, x) for _ in range(groups)]
    y = torch.cat([part(chunk) for part, chunk in zip(parts, x.chunk(groups))])
    torch.testing.assert_close(module(x), y)
    for name in ("running_mean", "running_var"):
        torch.testing.assert_close(getattr(module, name), torch.stack([getattr(part, name) for part in parts]).mean(0))
    module.eval()
    torch.testing.assert_close(module(x), torch_batch_norm(module, x).eval()(x))


def test_rejects_batches_that_groups_do_not_divide() -> None:
    with pytest.raises(UserError, match=r"batch of 5 .* into 2 groups"):
        make(3, groups=2)(torch.randn(5, 3, dtype=torch.float64))
    with pytest.raises(ValueError, match="Expected more than 1 value per channel"):
        make(3, groups=2)(torch.randn(2, 3, dtype=torch.float64))


def _refusal(groups: int) -> str:
    try:
        make(3, groups)(torch.randn(3, 3, dtype=torch.float64))
    except UserError as error:
        return str(error)
    return "accepted"


def test_rejects_groups_that_cross_processes(pool) -> None:
    assert "into 3 groups" in pool.run(_refusal, 3)[0]


@pytest.mark.parametrize("momentum", [0.1, None])
def test_conversion_keeps_outputs_parameters_and_modes(momentum: float | None) -> None:
    plain = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, momentum=momentum), nn.ReLU(), nn.Flatten(), nn.Linear(16, 5)
    )
    plain.append(nn.Sequential(nn.BatchNorm1d(5, eps=1e-3, affine=False)))
    plain[5][0].eval()
    x = torch.randn(6, 3, 4, 4)
    plain(x)
    parameter = plain[1].weight
    ours = convert_batch_norm(deepcopy(plain))
    assert [type(ours[1]), type(ours[5][0])] == [BatchNorm, BatchNorm]
    assert (ours[1].training, ours[5][0].training) == (True, False)
    for _ in range(2):
        torch.testing.assert_close(ours(x), plain(x))
    for (name, a), (other, b) in zip(ours.state_dict().items(), plain.state_dict().items(), strict=True):
        assert name == other
        torch.testing.assert_close(a, b)
    assert convert_batch_norm(plain)[1].weight is parameter
    assert isinstance(convert_batch_norm(nn.SyncBatchNorm(3)), BatchNorm)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("name", ["mobilenetv3_small_050", "resnetv2_50"])
def test_conversion_keeps_timms_activation(name: str, training: bool) -> None:
    timm = pytest.importorskip("timm", reason="needs timm")
    options = {"layers": (1, 1, 1, 1)} if name == "resnetv2_50" else {}
    plain = timm.create_model(name, num_classes=0, drop_rate=0.0, drop_path_rate=0.0, **options).train(training)
    for module in plain.modules():
        if isinstance(module, nn.BatchNorm2d):  # far from where batch norm starts, at which evaluation does nothing
            nn.init.uniform_(module.running_mean, -0.2, 0.2)
            nn.init.uniform_(module.running_var, 0.5, 2.0)
    ours = convert_batch_norm(deepcopy(plain))
    assert not any(isinstance(module, nn.BatchNorm2d) for module in ours.modules())
    x = torch.randn(4, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(ours(x), plain(x))
    for (key, a), (other, b) in zip(ours.state_dict().items(), plain.state_dict().items(), strict=True):
        assert key == other
        torch.testing.assert_close(a, b)


class ActsFirst(nn.BatchNorm2d):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.relu())


class Renamed(nn.BatchNorm2d):
    """The same computation under another name."""


def test_conversion_rejects_unknown_subclasses() -> None:
    with pytest.raises(UserError, match=r"ActsFirst does more than batch norm, .*: use a torch\.nn\.BatchNorm2d"):
        convert_batch_norm(nn.Sequential(ActsFirst(3)))
    assert type(convert_batch_norm(nn.Sequential(Renamed(3)))[0]) is BatchNorm


def test_conversion_leaves_chosen_groups_alone() -> None:
    module = convert_batch_norm(nn.Sequential(nn.BatchNorm1d(3)), groups=4)
    assert convert_batch_norm(module)[0].groups == 4
    assert convert_batch_norm(module, groups=2)[0].groups == 2


def _autocast(x: Tensor) -> tuple[Tensor, Tensor, torch.dtype]:
    module = BatchNorm(3)
    with torch.autocast("cpu", torch.bfloat16):
        y = module(x.chunk(2)[distributed.rank()].bfloat16())
    return y.float(), module.running_var, y.dtype


def test_statistics_are_float32_under_autocast(pool) -> None:
    x = (100 + torch.randn(64, 3)).bfloat16().float()
    y = nn.BatchNorm1d(3)(x)
    for r, (got, variance, dtype) in enumerate(pool.run(_autocast, x)):
        assert dtype == torch.bfloat16
        torch.testing.assert_close(got, y.chunk(2)[r], rtol=1e-2, atol=1e-2)
        torch.testing.assert_close(variance, 0.9 + 0.1 * x.var(0), rtol=1e-4, atol=0)
