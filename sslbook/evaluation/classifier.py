"""Classifiers on a backbone as a method: frozen, frozen up to a layer, or trained whole; the loss is cross-entropy."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from sslbook.data.loader import Batch
from sslbook.data.views import View
from sslbook.errors import UserError, nearest
from sslbook.evaluation.augment import Augmentation, augment, mix
from sslbook.evaluation.heads import Heads, Reading, feature
from sslbook.methods.base import Method
from sslbook.nn.ema import EMA
from sslbook.optim import LARS, blocks_of, layer_of
from sslbook.schedules import Clock, Schedule
from sslbook.types import PositiveFloat, PositiveInt

OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "sgd": partial(torch.optim.SGD, momentum=0.9),
    "nesterov": partial(torch.optim.SGD, momentum=0.9, nesterov=True),
    "lars": partial(LARS, momentum=0.9),
    "adamw": partial(torch.optim.AdamW, betas=(0.9, 0.999)),
}


@dataclass(frozen=True)
class Training:
    """How heads or networks are trained with labels.

    Args:
        epochs: passes over the training images.
        batch_size: images per optimizer step, over all processes.
        base_batch_size: scale learning rates by batch size / this number.
        optimizer: sgd and nesterov have momentum 0.9, lars the trust ratio 0.001, adamw betas 0.9 and 0.999.
        schedule: factor of the learning rate; null: a cosine to zero.
        clip_grad_norm: greatest norm of the gradient, of each head's own where there are several.
        grad_accum_steps: split every batch into this many parts whose gradients are added.
        precision: float32, or automatic mixed precision in bf16 or fp16.
        decay_bias_and_norm: weight decay (and LARS' scaling) also for biases and normalizations.
    """

    epochs: PositiveFloat = 100
    batch_size: PositiveInt = 256
    base_batch_size: PositiveInt | None = None
    optimizer: Literal["sgd", "nesterov", "lars", "adamw"] = "sgd"
    schedule: Schedule | None = None
    clip_grad_norm: PositiveFloat | None = None
    grad_accum_steps: PositiveInt = 1
    precision: Literal["float32", "bf16", "fp16"] = "float32"
    decay_bias_and_norm: bool = False


@dataclass
class Task:
    """What is trained on which backbone.

    Args:
        name: of the protocol, and of the run's folder.
        options: all options of the protocol: a run that is resumed has the same ones.
        make_head: a head for a part of this shape and a number of classes.
        training: how.
        augmentation: of the training images; null: features of the evaluation view, extracted once (frozen only).
        reading: what heads read from the backbone.
        frozen: `all` of the backbone, `none`, all layers up to this number, or up to and with the module of this name.
        batch_norm: batch norm without learned scale and shift before every head.
        layer_decay: factor of the learning rate for every layer further from the backbone's end.
        ema: momentum of a moving average of the weights, which is then evaluated; 0 for none.
        flip_test: add the probabilities of the mirrored image.
        validation: the fraction of each class that is set aside for a choice.
    """

    name: str
    options: dict[str, Any]
    make_head: Callable[[torch.Size, int], nn.Module]
    training: Training
    augmentation: Augmentation | None = None
    reading: Reading = feature
    frozen: int | str = "all"
    batch_norm: bool = False
    layer_decay: float | None = None
    ema: float = 0.0
    flip_test: bool = False
    validation: float = 0.1


class Transfer(Method):
    """Cross-entropy of heads on a backbone. The loss is the sum over heads, which share nothing that is trained.

    Args:
        backbone: is trained in place, as far as it is not frozen.
        heads: classifiers of what the reading gives.
        task: the options.
        view: the view of the training images.
        num_classes: width of the heads' output.
        example: one input, to find out what of the backbone is used.
    """

    def __init__(
        self, backbone: nn.Module, heads: Heads, task: Task, view: View, num_classes: int, example: Tensor
    ) -> None:
        super().__init__()
        self.backbone, self.heads = backbone, heads
        self.task, self.view, self.num_classes = task, view, num_classes
        freeze(backbone, task.frozen)
        self._freeze_unused(example)
        self._kept = [
            m for m in backbone.modules() if _all_frozen(m)
        ]  # in evaluation mode: their statistics stand still
        self.averages = nn.ModuleList([EMA(part) for part in (backbone, heads)] if task.ema else [])

    def _freeze_unused(self, example: Tensor) -> None:
        """Freeze what no head reaches, such as a norm behind the tokens that are read; DDP would wait for its gradient."""
        self.eval()
        with torch.enable_grad():
            self.heads(self.task.reading(self.backbone, example)).sum().backward()
        for p in self.parameters():
            p.requires_grad_(p.requires_grad and p.grad is not None)
        self.zero_grad(set_to_none=True)
        self.train()

    def train(self, mode: bool = True) -> "Transfer":
        """What is frozen stays in evaluation mode, or its batch norm would learn from the labeled images."""
        super().train(mode)
        for module in getattr(self, "_kept", []):
            module.train(False)
        return self

    def views(self) -> tuple[View, ...]:
        return (self.view,)

    def forward(self, batch: Batch, clock: Clock) -> dict[str, Tensor]:
        x, label = batch.views[0], batch.label
        what = self.task.augmentation or Augmentation()
        if self.task.augmentation is not None:
            x = augment(what, x, self.view.mean, self.view.std, clock, batch.index)
        x, target = mix(what, x, label, self.num_classes, clock)
        logits = self.heads(self.task.reading(self.backbone, x)).float()
        logits = logits.nan_to_num(posinf=1e4, neginf=-1e4)  # a learning rate of the grid that diverges stops no other
        losses = torch.stack([F.cross_entropy(own, target) for own in logits])
        correct = (logits.argmax(-1) == label).float().mean(1)
        return {"loss": losses.sum(), "best_loss": losses.min().detach(), "best_accuracy": 100 * correct.max().detach()}

    def before_optimizer_step(self, clock: Clock) -> None:
        """Clip each head's gradient by itself, and leave a head alone whose gradient is not finite."""
        limit = self.task.training.clip_grad_norm
        if len(self.heads.each) == 1:
            return  # the loop clips, and reports what is not finite
        norms = [nn.utils.get_total_norm([p.grad for p in head.parameters()]) for head in self.heads.each]
        for head, norm in zip(self.heads.each, torch.stack(norms).tolist()):
            for p in head.parameters():
                if not norm < float("inf"):
                    p.grad = None
                elif limit is not None and norm > limit:
                    p.grad.mul_(limit / (norm + 1e-6))

    @torch.no_grad()
    def after_step(self, clock: Clock) -> None:
        for average, part in zip(self.averages, (self.backbone, self.heads)):
            average.update(part, self.task.ema)
            for mine, theirs in zip(average.module.buffers(), part.buffers(), strict=True):
                mine.copy_(theirs)  # batch norm's statistics: the average never sees an image

    @torch.no_grad()
    def predict(self, x: Float[Tensor, "batch ..."]) -> Float[Tensor, "heads batch classes"]:
        """Probabilities, of the averaged weights where there are any."""
        backbone, heads = [a.module for a in self.averages] or (self.backbone, self.heads)
        both = [x, x.flip(-1)] if self.task.flip_test else [x]
        return sum(heads(self.task.reading(backbone, one)).float().softmax(-1) for one in both) / len(both)


def freeze(backbone: nn.Module, upto: int | str) -> None:
    """Freeze a backbone's parameters up to a layer.

    Args:
        backbone: changed in place.
        upto: `all`, `none`; a number: stem or embedding (0), then stages or blocks; or the name of a module, which is the
            last that is frozen, in the order in which the modules were made.

    Raises:
        UserError: there is no such layer.
    """
    names = [name for name, _ in backbone.named_parameters()]
    blocks = blocks_of(names)
    if upto in ("all", "none"):
        chosen = names if upto == "all" else []
    elif str(upto).isdecimal():
        depth = max((layer_of(name, 0, blocks) for name in names), default=0)
        if int(upto) > depth:
            raise UserError(f"frozen: the backbone has {depth} layers after its stem, not {upto}; give a lower number")
        chosen = [name for name in names if layer_of(name, depth, blocks) <= int(upto)]
    else:
        inside = [i for i, name in enumerate(names) if name.startswith(f"{upto}.")]
        if not inside:
            modules = [name for name, _ in backbone.named_modules() if name]
            raise UserError(f"frozen: the backbone has no module {upto}{nearest(str(upto), modules)}")
        chosen = names[: inside[-1] + 1]
    frozen_names = set(chosen)
    for name, p in backbone.named_parameters():
        p.requires_grad_(name not in frozen_names)


def _all_frozen(module: nn.Module) -> bool:
    parameters = list(module.parameters())
    return bool(parameters) and not any(p.requires_grad for p in parameters)


def set_drop_path(backbone: nn.Module, rate: float) -> None:
    """Stochastic depth that grows linearly to `rate` in the last block, of our transformers or timm's networks.

    Raises:
        UserError: the backbone's blocks have no drop path.
    """
    named = [(name, m) for name, m in backbone.named_modules() if re.search(r"(^|\.)blocks\.\d+$", name)]
    places = [
        (block, name, i)
        for i, (_, block) in enumerate(named)
        for name in ("drop_path", "drop_path1", "drop_path2")
        if hasattr(block, name)
    ]
    if not places:
        raise UserError(f"drop_path: the blocks of {type(backbone).__name__} have none; set it to 0")
    for block, name, i in places:
        own = rate * i / max(1, len(named) - 1)
        if isinstance(getattr(block, name), float | int):
            setattr(block, name, own)
        else:
            from timm.layers import DropPath  # whose networks these are

            setattr(block, name, DropPath(own))
