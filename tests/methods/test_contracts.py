"""Properties that every method must have."""

import json
from collections.abc import Callable
from copy import deepcopy
from importlib import import_module
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from sslbook import nn as nets
from sslbook.data.views import View
from sslbook.errors import UserError
from sslbook.methods import load
from sslbook.methods.base import Method
from sslbook.nn.ema import EMA
from sslbook.schedules import Clock
from sslbook.weights.load import load_weights
from tests.methods.cases import NAMES, apart, case, gradient, make, make_batch, train
from tests.methods.first_loss import FILE, first_loss

methods = pytest.mark.parametrize("name", NAMES)


def test_unknown_method_suggests_the_nearest() -> None:
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
@pytest.mark.slow
def test_defaults_are_for_full_scale(name: str) -> None:
    with torch.device("meta"):
        method = load(name)(getattr(nets, case(name).full_scale)(), **case(name).full_options())
    assert max(view.size for view in method.views()) >= 224


def relative(a: Tensor, b: Tensor) -> float:
    return float((a.double() - b.double()).norm() / b.double().norm().clamp_min(1e-12))


@methods
@pytest.mark.slow
def test_two_processes_equal_one(name: str, pool) -> None:
    lr = case(name).lr
    check(train(name, lr=lr), pool.run(train, name, 8, lr))


def check(one: dict, two: list[dict], tolerance: float = 1e-5) -> None:
    for got in two:
        for step in range(len(one["logged"])):
            assert got["logged"][step] == pytest.approx(one["logged"][step], rel=tolerance, abs=tolerance)
            assert relative(got["gradients"][step], one["gradients"][step]) < tolerance, f"gradient of step {step}"
        for key, value in one["state"].items():
            if value.is_floating_point():
                assert float((got["state"][key] - value).abs().max()) < tolerance * max(1, float(value.abs().max())), (
                    key
                )
            else:
                assert torch.equal(got["state"][key], value), key
    for key, value in two[0]["state"].items():
        assert torch.equal(value, two[1]["state"][key]), f"the processes disagree about {key}"


@pytest.mark.parametrize(
    ("name", "size", "lr", "options"), [(name, *corner) for name in NAMES for corner in case(name).corners]
)
@pytest.mark.slow
def test_two_processes_equal_one_in_corner_cases(name: str, size: int, lr: float, options: dict, pool) -> None:
    # Temperatures of 0.01 and batches of two magnify rounding, by an amount that depends on the processor.
    check(train(name, size, lr, options), pool.run(train, name, size, lr, options), tolerance=1e-4)


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
@pytest.mark.slow
def test_state_dict_round_trip(name: str) -> None:
    method, other = make(name), make(name, seed=1)
    clock = Clock(0, 10)
    method(make_batch(method, 8), clock)["loss"].backward()
    state = method.state_dict()
    assert len({value.data_ptr() for value in state.values()}) == len(state), "two names share one tensor"
    other.load_state_dict(deepcopy(state))
    batch = make_batch(method, 8, seed=1)
    assert torch.equal(method(batch, clock)["loss"], other(batch, clock)["loss"])
    for (key, a), b in zip(method.state_dict().items(), other.state_dict().values()):
        assert torch.equal(a, b), key


def has_teacher(name: str) -> bool:
    return any(hasattr(import_module(base.__module__), "EMA") for base in load(name).__mro__)


with_teacher = pytest.mark.parametrize("name", [name for name in NAMES if has_teacher(name)])


def teachers_of(method: nn.Module) -> dict[str, EMA]:
    return {path: part for path, part in method.named_modules() if isinstance(part, EMA)}


@with_teacher
def test_moving_a_teacher_moves_the_loss(name: str) -> None:
    """Each part of it by itself. A target taken from the online network instead is the same while the two are equal."""
    method = make(name)
    batch, clock = make_batch(method, 8), Clock(seed=1)
    before = deepcopy(method)(batch, clock)["loss"].detach()
    for path in teachers_of(method):
        moved = deepcopy(method)
        with torch.no_grad():
            for p in moved.get_submodule(path).parameters():
                p += 0.3 * torch.randn_like(p)
        assert relative(moved(batch, clock)["loss"].detach(), before) > 1e-3, f"{path} is not used"


@with_teacher
def test_no_target_follows_the_online_network(name: str) -> None:
    """Moving the backbone changes the loss by what its gradient says; a target from it, detached, would change it more."""
    method = apart(make(name))
    batch, clock, step = make_batch(method, 8), Clock(seed=1), 1e-3
    online = deepcopy(method)
    online(batch, clock)["loss"].backward()
    direction = {path: p.grad for path, p in online.backbone.named_parameters() if p.grad is not None}
    slope = torch.stack([g.norm() for g in direction.values()]).norm()
    losses = []
    for sign in (1, -1):
        moved = deepcopy(method)
        with torch.no_grad():
            for path, g in direction.items():
                moved.backbone.get_parameter(path).add_(sign * step / slope * g)
        losses.append(moved(batch, clock)["loss"].detach().double())
    assert float((losses[0] - losses[1]) / (2 * step)) == pytest.approx(float(slope), rel=0.03)


@with_teacher
def test_teachers_move_after_the_step_all_alike(name: str) -> None:
    """By one momentum, that of the clock already advanced, and not at all before `after_step`."""
    method = make(name)
    with torch.no_grad():
        for path, p in method.named_parameters():
            p.add_(0.0 if "teacher" in path or "target" in path or "key_" in path else 1.0)
    before = {k: p.clone() for path, t in teachers_of(method).items() for k, p in t.module.named_parameters(path)}
    method(make_batch(method, 8), Clock(5, 10))
    after = {k: p for path, t in teachers_of(method).items() for k, p in t.module.named_parameters(path)}
    assert all(torch.equal(after[key], value) for key, value in before.items()), "a forward pass moved a teacher"
    method.after_step(Clock(6, 10))
    moved = torch.stack([(after[key] - value).mean() for key, value in before.items()])
    assert moved.min() > 0, "a part of the teacher stands still"
    torch.testing.assert_close(moved, moved[:1].expand_as(moved), rtol=1e-2, atol=1e-6)


@with_teacher
def test_teacher_starts_as_copy_of_its_student(name: str, tmp_path: Path) -> None:
    """Also if only a backbone's weights are loaded, such as torchvision's; weights of its own are kept."""
    source, target = make(name), make(name, seed=1)
    teachers = {path: part for path, part in target.named_modules() if isinstance(part, EMA)}
    torch.save(source.backbone.state_dict(), tmp_path / "backbone.pt")
    loaded = load_weights(target, tmp_path / "backbone.pt")
    assert loaded.copied == list(teachers)
    assert not any(missing.startswith(tuple(teachers)) for missing in loaded.missing)
    state = target.state_dict()
    for path, teacher in teachers.items():
        for key, value in teacher.module.state_dict().items():
            assert any(torch.equal(value, v) for k, v in state.items() if k.endswith(key) and path not in k), (
                path,
                key,
            )
    first = next(teacher.module.state_dict() for path, teacher in teachers.items() if "head" not in path)
    assert all(torch.equal(value, first[key]) for key, value in source.backbone.state_dict().items() if key in first)
    with torch.no_grad():
        for path, p in source.named_parameters():
            p.add_(float(path.startswith(tuple(teachers))))
    torch.save(source.state_dict(), tmp_path / "method.pt")
    assert load_weights(target, tmp_path / "method.pt").copied == []
    for key, value in source.state_dict().items():
        assert torch.equal(target.state_dict()[key], value), key


@methods
def test_first_loss_equals_stored_value(name: str) -> None:
    assert first_loss(name) == pytest.approx(json.loads(FILE.read_text(encoding="utf-8"))[name], rel=1e-4, abs=1e-4)


@methods
def test_randomness_depends_on_image_and_epoch_alone(name: str) -> None:
    """The same images in another order give the same loss, whatever the state of torch's generator."""
    method = make(name, **case(name).order_free)
    batch, clock = make_batch(method, 8), Clock(seed=3)
    order = torch.randperm(8)
    shuffled = type(batch)(tuple(view[order] for view in batch.views), batch.index[order], batch.label)
    losses = [deepcopy(method)(b, clock)["loss"] for b in (batch, shuffled)]
    torch.testing.assert_close(losses[0], losses[1])


@pytest.mark.parametrize(
    ("name", "backbone"), [(name, backbone) for name in NAMES for backbone in case(name).other_backbones]
)
def test_other_backbones(name: str, backbone: Callable[[], nn.Module]) -> None:
    method = make(name, backbone=backbone())
    method(make_batch(method, 8), Clock())["loss"].backward()
    assert gradient(method).isfinite().all()


@methods
@pytest.mark.slow
def test_overfits_32_images(name: str) -> None:
    method = make(name, **deepcopy(case(name).overfit))
    batch = make_batch(method, 32)
    optimizer = torch.optim.AdamW([p for p in method.parameters() if p.requires_grad], lr=case(name).overfit_lr)
    for step in range(400):
        clock = Clock(step, 400, steps_per_epoch=400)
        out = method(batch, clock)
        if case(name).learned(method, batch, out):
            assert step > 0, "fulfilled before training: the test is too easy"
            return
        optimizer.zero_grad()
        out["loss"].backward()
        method.before_optimizer_step(clock)
        optimizer.step()
        method.after_step(clock)
    pytest.fail(f"not overfitted: {out}")
