"""What every method promises."""

import json
from copy import deepcopy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sslbook.data.loader import Batch
from sslbook.data.views import View
from sslbook.errors import UserError
from sslbook.methods import METHODS, load
from sslbook.methods.base import Method
from sslbook.nn import BatchNorm, VisionTransformer
from sslbook.schedules import Clock
from tests.methods.cases import NAMES, SIZE, gradient, make, make_batch, train, transformer
from tests.methods.first_loss import FILE, first_loss

methods = pytest.mark.parametrize("name", NAMES)


def test_every_method_is_tested_here() -> None:
    assert set(NAMES) == set(METHODS)


def test_a_wrong_name_gets_the_nearest() -> None:
    with pytest.raises(UserError, match="did you mean simclr"):
        load("simcrl")


@methods
def test_loss_and_gradients_are_finite(name: str) -> None:
    method = make(name)
    assert isinstance(method, Method)
    assert all(isinstance(view, View) for view in method.views())
    out = method(make_batch(method, 8), Clock())
    out["loss"].backward()
    assert out["loss"].shape == ()
    for key, value in out.items():
        assert value.isfinite()
        assert value.shape == ()
        assert key == "loss" or not value.requires_grad
    for key, parameter in method.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None, f"{key} gets no gradient: several processes would wait for it forever"
            assert parameter.grad.isfinite().all(), key
            assert parameter.grad.abs().max() > 0, key


@methods
def test_the_defaults_are_for_full_scale(name: str) -> None:
    with torch.device("meta"):
        from sslbook.nn import resnet50, vit_base

        method = load(name)(vit_base() if name == "mae" else resnet50())
    assert {view.size for view in method.views()} == {224}


def relative(a: Tensor, b: Tensor) -> float:
    return float((a.double() - b.double()).norm() / b.double().norm().clamp_min(1e-12))


@methods
def test_two_processes_are_one(name: str, pool) -> None:
    # Steps of about equal length: SimCLR's gradient is a hundred times the others', and from too long a step on, the
    # rounding of a sum in another order grows tenfold at each step in any method.
    lr = 5e-4 if name == "simclr" else 0.05
    check(train(name, lr=lr), pool.run(train, name, 8, lr))


def check(one: dict, two: list[dict]) -> None:
    for got in two:
        for step in range(len(one["logged"])):
            assert got["logged"][step] == pytest.approx(one["logged"][step], rel=1e-5, abs=1e-5)
            assert relative(got["gradients"][step], one["gradients"][step]) < 1e-5, f"gradient of step {step}"
        for key, value in one["state"].items():
            if value.is_floating_point():
                assert float((got["state"][key] - value).abs().max()) < 1e-5 * max(1.0, float(value.abs().max())), key
            else:
                assert torch.equal(got["state"][key], value), key
    for key, value in two[0]["state"].items():
        assert torch.equal(value, two[1]["state"][key]), f"the processes disagree about {key}"


@pytest.mark.parametrize(
    ("name", "size", "lr", "options"),
    [
        ("rotation", 2, 0.05, {}),  # one picture in each process
        ("mae", 2, 0.05, {}),
        ("moco", 2, 0.05, {}),
        ("moco", 8, 0.05, {"batch_norm_groups": 1}),
        ("moco", 8, 0.05, {"batch_norm_groups": 4}),
        ("simclr", 6, 1e-5, {"temperature": 0.01}),
    ],
)
def test_two_processes_are_one_in_corners(name: str, size: int, lr: float, options: dict, pool) -> None:
    check(train(name, size, lr, options), pool.run(train, name, size, lr, options))


@methods
def test_bfloat16(name: str) -> None:
    method = make(name)
    batch = make_batch(method, 8)
    reference = deepcopy(method)(batch, Clock())["loss"]
    with torch.autocast("cpu", torch.bfloat16):
        out = method(batch, Clock())
    out["loss"].backward()
    method.after_step(Clock(1, 10))
    assert out["loss"].dtype == torch.float32
    torch.testing.assert_close(out["loss"], reference, rtol=0.05, atol=0.05)
    assert gradient(method).isfinite().all()
    for key, value in method.state_dict().items():
        assert value.dtype in (torch.float32, torch.int64), key


@methods
def test_state_goes_round(name: str) -> None:
    method, other = make(name), make(name, seed=1)
    clock = Clock(0, 10)
    method(make_batch(method, 8), clock)["loss"].backward()
    state = method.state_dict()
    assert len({value.data_ptr() for value in state.values()}) == len(state), "two names for one tensor"
    other.load_state_dict(deepcopy(state))
    batch = make_batch(method, 8, seed=1)
    assert torch.equal(method(batch, clock)["loss"], other(batch, clock)["loss"])
    for (key, a), b in zip(method.state_dict().items(), other.state_dict().values()):
        assert torch.equal(a, b), key


@methods
def test_first_loss_is_as_ever(name: str) -> None:
    assert first_loss(name) == pytest.approx(json.loads(FILE.read_text(encoding="utf-8"))[name], rel=1e-4, abs=1e-4)


@methods
def test_chance_is_keyed(name: str) -> None:
    """The same pictures in another order, whatever torch's own generator does, give the same loss."""
    method = make(name, **({"batch_norm_groups": 1} if name == "moco" else {}))
    batch, clock = make_batch(method, 8), Clock(seed=3)
    order = torch.randperm(8)
    shuffled = type(batch)(tuple(view[order] for view in batch.views), batch.index[order], batch.label)
    losses = [deepcopy(method)(b, clock)["loss"] for b in (batch, shuffled)]
    torch.testing.assert_close(losses[0], losses[1])


@pytest.mark.parametrize("name", ["rotation", "simclr", "moco", "byol"])
def test_a_transformer_will_do(name: str) -> None:
    method = make(name, backbone=transformer())
    method(make_batch(method, 8), Clock())["loss"].backward()
    assert gradient(method).isfinite().all()
    assert not any(isinstance(module, (nn.BatchNorm2d, BatchNorm)) for module in method.backbone.modules())


def _finds_keys(method: Method, batch: Batch, out: dict[str, Tensor]) -> bool:
    """Every query's nearest key of the batch is its own; the queue is no measure, since it starts at random."""
    q = F.normalize(method.projector(method.backbone(batch.views[0])), dim=1)
    k = F.normalize(method.keys(batch.views[1], batch, Clock()), dim=1)
    return bool(((q @ k.T).argmax(dim=1) == torch.arange(len(q))).float().mean() > 0.95)


LEARNED = {
    "rotation": lambda method, batch, out: out["rotation_accuracy"] > 95,
    "simclr": lambda method, batch, out: out["contrastive_accuracy"] > 95,
    "moco": _finds_keys,
    "byol": lambda method, batch, out: out["loss"] < 0.2 and out["feature_spread"] > 0.5,
    "mae": lambda method, batch, out: out["loss"] < 0.8,  # 47/48 for who knows nothing, and the pictures are noise
}
OVERFIT = {
    "rotation": ({}, 1e-2),
    "simclr": ({}, 1e-2),
    "moco": ({"queue_size": 16, "momentum": 0.9, "batch_norm_groups": 1}, 1e-2),
    "byol": ({"momentum": 0.9}, 1e-2),
    "mae": ({"backbone": VisionTransformer(SIZE, 4, 64, 2, 4), "decoder_dim": 64, "decoder_heads": 4}, 3e-3),
}


@methods
def test_it_learns_32_pictures_by_heart(name: str) -> None:
    options, lr = OVERFIT[name]
    method = make(name, **deepcopy(options))
    batch = make_batch(method, 32)
    optimizer = torch.optim.AdamW([p for p in method.parameters() if p.requires_grad], lr=lr)
    for step in range(400):
        clock = Clock(step, 400, steps_per_epoch=400)
        out = method(batch, clock)
        if LEARNED[name](method, batch, out):
            assert step > 0, "nothing was learned: the test is too easy"
            return
        optimizer.zero_grad()
        out["loss"].backward()
        optimizer.step()
        method.after_step(clock)
    pytest.fail(f"not learned: {out}")
