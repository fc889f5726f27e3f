import re

import pytest
import torch
from torch import nn

from sslbook.errors import UserError
from sslbook.nn import resnet18, vit_tiny
from sslbook.optim import LARS, ParamRule, blocks_of, layer_of, parameter_groups
from sslbook.schedules import Clock, Constant, Cosine, Linear


class Tiny(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
        self.head = nn.Linear(4, 2)


def build(method: nn.Module, optimizer=None, **options):
    make = optimizer or (lambda groups: torch.optim.SGD(groups, lr=0.5, weight_decay=0.1))
    return parameter_groups(method, make, **{"rules": [], "schedule": Constant(), **options})


def settings(method: nn.Module, optimizer, plans, clock=Clock()) -> dict[str, dict]:
    names = {id(p): name for name, p in method.named_parameters()}
    out = {}
    for group, plan in zip(optimizer.param_groups, plans):
        plan.apply(group, clock)
        for p in group["params"]:
            out[names[id(p)]] = {key: value for key, value in group.items() if key != "params"}
    return out


def test_the_first_matching_rule_wins() -> None:
    method = Tiny()
    rules = [
        ParamRule(r"^head\.weight", lr_scale=10.0, schedule=Linear(1.0, 0.0)),
        ParamRule(r"^head\.", lr_scale=2.0, weight_decay=0.3),
        ParamRule(r"backbone\.0\.bias", frozen=True),
    ]
    optimizer, plans = build(method, rules=rules, schedule=Cosine())
    at = settings(method, optimizer, plans, Clock(50, 100, 10))
    assert at["head.weight"]["lr"] == pytest.approx(0.5 * 10 * 0.5)
    assert at["head.bias"]["lr"] == pytest.approx(0.5 * 2 * 0.5)
    assert at["head.bias"]["weight_decay"] == 0.3
    assert at["backbone.0.weight"]["weight_decay"] == 0.1
    assert at["backbone.1.weight"]["weight_decay"] == 0.0  # vectors are spared
    assert "backbone.0.bias" not in at
    assert not method.backbone[0].bias.requires_grad


def test_vectors_decay_when_asked_and_weight_decay_follows_its_schedule() -> None:
    method = Tiny()
    optimizer, plans = build(method, decay_bias_and_norm=True, weight_decay_schedule=Linear(1.0, 10.0), lr_factor=4.0)
    at = settings(method, optimizer, plans, Clock(100, 100, 10))
    assert {v["weight_decay"] for v in at.values()} == {1.0}
    assert {v["lr"] for v in at.values()} == {2.0}


@pytest.mark.parametrize(("pattern", "message"), [("hed", "matches no parameter"), ("(", "regular expression")])
def test_a_rule_that_cannot_work_is_refused(pattern: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        build(Tiny(), rules=[ParamRule(pattern)])


def test_wrong_optimizer_options_are_refused() -> None:
    with pytest.raises(UserError, match="optimizer"):
        build(Tiny(), optimizer=lambda groups: torch.optim.SGD(groups, lr=-1.0))


def test_layer_decay_follows_depth() -> None:
    class Method(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.backbone = vit_tiny(image_size=32)
            self.head = nn.Linear(2, 2)

    method = Method()
    optimizer, plans = build(method, layer_decay=0.5)
    at = settings(method, optimizer, plans)
    assert at["head.weight"]["lr"] == at["backbone.norm.weight"]["lr"] == 0.5
    assert at["backbone.blocks.11.attn.qkv.weight"]["lr"] == pytest.approx(0.25)
    assert at["backbone.blocks.0.attn.qkv.weight"]["lr"] == pytest.approx(0.5 * 0.5**12)
    assert at["backbone.patch_embed.proj.weight"]["lr"] == pytest.approx(0.5 * 0.5**13)
    names = [name for name, _ in resnet18().named_parameters()]
    assert [layer_of(f"backbone.{n}", 4) for n in names if re.search(r"conv1|fc", n)][:2] == [0, 1]


def test_layer_decay_counts_through_stages() -> None:
    """Names as timm gives them to Swin and ConvNeXt: what leads into a stage stands with its first block."""
    names = ["patch_embed.proj", *(f"layers.{s}.blocks.{b}.mlp" for s, d in enumerate((2, 2, 6, 2)) for b in range(d))]
    blocks = blocks_of([f"backbone.{name}.weight" for name in names])
    assert len(blocks) == 12

    def layer(name: str) -> int:
        return layer_of(f"backbone.{name}.weight", 12, blocks)

    assert [layer(name) for name in names] == list(range(13))
    assert [layer(f"layers.{stage}.downsample.reduction") for stage in (1, 2, 3)] == [3, 5, 11]
    assert [layer(name) for name in ("stem.0", "norm", "head.fc")] == [0, 13, 13]
    names = [f"stages.{s}.blocks.{b}.conv_dw" for s, d in enumerate((3, 3)) for b in range(d)]
    blocks = blocks_of([f"backbone.{name}.weight" for name in names])
    assert [layer_of(f"backbone.{name}.weight", 6, blocks) for name in names] == [1, 2, 3, 4, 5, 6]


def literal_lars(w, gradients, lrs, momentum, decay, eta):
    """One tensor, step by step, in the words of the algorithm."""
    m = torch.zeros_like(w)
    for g, lr in zip(gradients, lrs):
        g = g + decay * w
        g = g * (eta * w.norm() / g.norm())
        m = momentum * m + g
        w = w - lr * m
    return w


def test_lars_follows_the_algorithm_while_the_rate_changes() -> None:
    torch.manual_seed(0)
    w = nn.Parameter(torch.randn(5, 3, dtype=torch.float64))
    gradients = torch.randn(4, 5, 3, dtype=torch.float64)
    lrs = [0.1, 0.5, 0.3, 0.2]
    expected = literal_lars(w.detach().clone(), gradients, lrs, 0.9, 0.01, 0.02)
    optimizer = LARS([w], momentum=0.9, weight_decay=0.01, trust_coefficient=0.02)
    for g, lr in zip(gradients, lrs):
        optimizer.param_groups[0]["lr"] = lr
        w.grad = g.clone()
        optimizer.step()
    torch.testing.assert_close(w.detach(), expected)


def test_lars_leaves_vectors_and_zero_weights_alone() -> None:
    method = Tiny()
    optimizer, plans = build(method, optimizer=lambda groups: LARS(groups, lr=0.1, weight_decay=0.5, momentum=0.0))
    at = settings(method, optimizer, plans)
    assert at["head.weight"]["adapt"] is True
    assert at["head.bias"]["adapt"] is False
    nn.init.zeros_(method.head.weight)
    before = method.head.bias.detach().clone()
    for p in method.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    torch.testing.assert_close(method.head.bias.detach(), before - 0.1)
    torch.testing.assert_close(method.head.weight.detach(), torch.full((2, 4), -0.1))  # no ratio for a norm of zero
