"""What is optimized, and how: parameter rules, layer decay, LARS.

The plan of the groups stands beside the optimizer and not in it: loading an optimizer's state replaces its groups, and a
resumed run would otherwise go on with the rates of the moment it was saved.
"""

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sslbook.errors import UserError, explained, nearest
from sslbook.schedules import Clock, Constant, Schedule


class LARS(torch.optim.Optimizer):
    """Layer-wise adaptive rate scaling (You, Gitman and Ginsburg, 2017, Algorithm 1).

    The form that BYOL, Barlow Twins, VICReg, DINO and MoCo v3 share: decay enters the norm of the trust ratio, and the
    learning rate stands outside the momentum. (SimCLR's own code keeps the rate inside the momentum, which differs only
    while the rate changes.) Groups with `adapt=False` are left as plain SGD with momentum.

    Args:
        params: parameters or groups; a group may carry its own `adapt`.
        lr: learning rate.
        momentum: momentum.
        weight_decay: L2 penalty, part of the gradient.
        trust_coefficient: eta, the part of a layer's norm that one step may change.
        adapt: scale every layer's step by its trust ratio.
    """

    def __init__(
        self,
        params: Iterable,
        lr: float = 0.3,
        momentum: float = 0.9,
        weight_decay: float = 1e-6,
        trust_coefficient: float = 0.001,
        adapt: bool = True,
    ) -> None:
        defaults = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay}
        super().__init__(params, {**defaults, "trust_coefficient": trust_coefficient, "adapt": adapt})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # pyrefly: ignore
        """One update of every parameter that has a gradient."""
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                update = p.grad.add(p, alpha=group["weight_decay"])
                if group["adapt"]:
                    size, change = p.norm(), update.norm()
                    ratio = group["trust_coefficient"] * size / change
                    update = update * torch.where((size > 0) & (change > 0), ratio, torch.ones_like(ratio))
                momentum = self.state[p].setdefault("momentum_buffer", torch.zeros_like(p))
                momentum.mul_(group["momentum"]).add_(update)
                p.sub_(group["lr"] * momentum)


@dataclass
class ParamRule:
    """Options for the parameters whose name matches a pattern. The first rule that matches a parameter wins.

    Args:
        pattern: regular expression, searched for in names such as `backbone.layer1.0.conv1.weight`.
        lr_scale: factor of the learning rate.
        schedule: a schedule of its own instead of the run's.
        weight_decay: weight decay instead of the optimizer's.
        frozen: leave these parameters as they are.
        options: further options of the optimizer, such as `{"betas": [0.9, 0.99]}` or `{"adapt": false}`.
    """

    pattern: str
    lr_scale: float = 1.0
    schedule: Schedule | None = None
    weight_decay: float | None = None
    frozen: bool = False
    options: dict[str, object] | None = None


@dataclass(frozen=True)
class GroupPlan:
    """What one parameter group's rates are at any time."""

    lr: float
    weight_decay: float
    schedule: Schedule
    weight_decay_schedule: Schedule

    def apply(self, group: dict, clock: Clock) -> None:
        """Write the rates of this step into an optimizer's group."""
        group["lr"] = self.lr * self.schedule(clock)
        group["weight_decay"] = self.weight_decay * self.weight_decay_schedule(clock)


BLOCK = re.compile(r"(?:(?:^|\.)(?:layers|stages)\.(\d+)\.)?(?:(?<=\.)|^)blocks\.(\d+)\.")
STAGE = re.compile(r"(?:^|\.)(?:layers|stages)\.(\d+)\.")


def blocks_of(names: list[str]) -> list[tuple[int, int]]:
    """Stage and number of all blocks in the order in which an image meets them; a plain transformer has one stage."""
    return sorted({(int(found[1] or 0), int(found[2])) for name in names if (found := BLOCK.search(name))})


def layer_of(name: str, depth: int, blocks: list[tuple[int, int]] | None = None) -> int:
    """The layer a backbone's parameter stands in, counted from the input: 0 is the embedding, `depth + 1` the end.

    In networks with stages (Swin, ConvNeXt) the blocks are counted through all `blocks`, and what leads into a stage
    stands with its first block.
    """
    if found := BLOCK.search(name):
        stage, number = int(found[1] or 0), int(found[2])
        return 1 + (blocks.index((stage, number)) if blocks else number)
    if blocks and (found := STAGE.search(name)):
        return 1 + min(blocks.index(block) for block in blocks if block[0] == int(found[1]))
    if found := re.search(r"(?:^|\.)layer(\d+)\.", name):
        return int(found[1])
    if re.search(r"(patch_embed|cls_token|pos_embed|mask_token|conv1|bn1|(^|\.)stem\.)", name):
        return 0
    return depth + 1


def _require_step(make_optimizer: Callable[[list[dict]], torch.optim.Optimizer]) -> None:
    """UserError if the optimizer needs more than dense gradients, as SparseAdam and L-BFGS do."""
    trial = nn.Parameter(torch.zeros(2, 2))
    trial.grad = torch.zeros(2, 2)
    what, cure = "optimizer: takes no step on ordinary gradients", "choose another, AdamW"
    with explained(what, TypeError, ValueError, RuntimeError, cure=cure):
        make_optimizer([{"params": [trial]}]).step()


def parameter_groups(
    method: nn.Module,
    make_optimizer: Callable[[list[dict]], torch.optim.Optimizer],
    *,
    rules: list[ParamRule],
    schedule: Schedule,
    weight_decay_schedule: Schedule | None = None,
    decay_bias_and_norm: bool = False,
    layer_decay: float | None = None,
    lr_factor: float = 1.0,
) -> tuple[torch.optim.Optimizer, list[GroupPlan]]:
    """The optimizer over all trainable parameters, and a plan for each of its groups.

    Args:
        method: the module to optimize.
        make_optimizer: a function of parameter groups that returns a torch optimizer.
        rules: see `ParamRule`; a rule that matches no parameter is an error.
        schedule: factor of the learning rate for parameters without a schedule of their own.
        weight_decay_schedule: factor of the weight decay.
        decay_bias_and_norm: apply weight decay (and LARS' trust ratio) also to biases and normalizations.
        layer_decay: multiply the rate by this for every layer between a backbone's parameter and its end.
        lr_factor: factor of every rate, such as batch size / 256.

    Raises:
        UserError: a rule's pattern is no regular expression or matches nothing; the optimizer refuses its options.
    """
    names = [name for name, p in method.named_parameters() if p.requires_grad]
    for rule in rules:
        try:
            why = "" if any(re.search(rule.pattern, name) for name in names) else "matches no parameter"
        except re.error as error:
            why = f"is not a regular expression ({error})"
        if why:
            raise UserError(f"rules: {rule.pattern!r} {why}{nearest(rule.pattern, names)}")
    in_backbone = [name for name in names if name.startswith("backbone.")]
    blocks = blocks_of(in_backbone)
    depth = max((layer_of(name, 0, blocks) for name in in_backbone), default=0)

    rules = [*rules, ParamRule("")]  # for all that no rule matches
    members: dict[tuple[int, bool, float], list[Tensor]] = {}
    for name, p in method.named_parameters():
        if not p.requires_grad:
            continue
        which = next(i for i, rule in enumerate(rules) if re.search(rule.pattern, name))
        if rules[which].frozen:
            p.requires_grad_(False)
            continue
        scale = 1.0
        if layer_decay is not None and name.startswith("backbone."):
            scale = layer_decay ** (depth + 1 - min(layer_of(name, depth, blocks), depth + 1))
        members.setdefault((which, p.ndim <= 1, scale), []).append(p)
    groups = [{"params": params, **(rules[which].options or {})} for (which, _, _), params in members.items()]
    with explained("optimizer", TypeError, ValueError):
        optimizer = make_optimizer(groups)
    _require_step(make_optimizer)

    plans = []
    for (which, vector, scale), group in zip(members, optimizer.param_groups):
        rule, decay = rules[which], group.get("weight_decay", 0.0)
        if vector and not decay_bias_and_norm:
            decay = 0.0
            if "adapt" in group and "adapt" not in (rule.options or {}):
                group["adapt"] = False
        if rule.weight_decay is not None:
            decay = rule.weight_decay
        lr = group["lr"] * lr_factor * scale * rule.lr_scale
        plans.append(GroupPlan(lr, decay, rule.schedule or schedule, weight_decay_schedule or Constant()))
    return optimizer, plans
