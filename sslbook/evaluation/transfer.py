"""Training with labels on a backbone: frozen, frozen up to a layer, or trained whole; by the loop of pre-training.

A `Transfer` is a method like any other, whose loss is cross-entropy: schedules, resumption, mixed precision, accumulation
and several processes are `engine.loop.pretrain`'s. On a frozen backbone the heads of a whole grid of learning rates and
weight decays share one forward pass, as in DINOv2 and V-JEPA 2. A choice is made on a part of each class of the *training*
images that is set aside; what was chosen is trained again on all of them, and the test images are classified once.
"""

import copy
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from sslbook import distributed
from sslbook.data.loader import Data
from sslbook.data.views import View
from sslbook.engine.loop import pretrain
from sslbook.errors import UserError
from sslbook.evaluation.base import Metrics, Protocol, Representation
from sslbook.evaluation.classifier import OPTIMIZERS, Task, Transfer
from sslbook.evaluation.feature_data import read_once, require_labels, unpack
from sslbook.evaluation.features import device_of
from sslbook.evaluation.heads import Heads, shapes
from sslbook.evaluation.protocols.linear import stratified
from sslbook.evaluation.runs import hash_of_weights, require_finished, run_folder, short_hash
from sslbook.optim import ParamRule
from sslbook.schedules import Cosine

TOP = 5  # the second accuracy, where there are more classes than that


@dataclass(frozen=True)
class Setting:
    """One point of a grid.

    Args:
        lr: learning rate.
        weight_decay: weight decay.
        head_lr_scale: factor of the learning rate for the head.
    """

    lr: float
    weight_decay: float = 0.0
    head_lr_scale: float = 1.0


@dataclass
class Outcome:
    """What a transfer found, for every part of the reading.

    Args:
        top1: percentage of test images classified correctly.
        top5: percentage whose class is among the five most probable; none with five classes or fewer.
        chosen: the setting that was trained on all training images.
        validation: accuracy of every setting on the images that were set aside; empty without a choice.
        per_class: accuracy for each class of the test images, by its name.
    """

    top1: float
    top5: float | None
    chosen: Setting
    validation: dict[Setting, float] = field(default_factory=dict)
    per_class: dict[str, float] = field(default_factory=dict)

    def metrics(self, name: str) -> Metrics:
        """The accuracies under this name."""
        return {name: self.top1} | ({f"{name} top-5": self.top5} if self.top5 is not None else {})

    def details(self) -> dict[str, Any]:
        """What a result file holds besides: the setting, and on which split it was chosen."""
        tried = [{**asdict(setting), "accuracy": accuracy} for setting, accuracy in self.validation.items()]
        split = "validation part of the training images" if tried else "none: one setting"
        return {"chosen": asdict(self.chosen), "chosen on": split, "validation": tried, "per class": self.per_class}


def grid(
    lrs: Sequence[float], weight_decays: Sequence[float] = (0.0,), scales: Sequence[float] = (1.0,)
) -> list[Setting]:
    """All combinations, in order.

    Raises:
        UserError: one of the lists is empty, or a learning rate is not positive.
    """
    for name, values in (("lrs", lrs), ("weight_decays", weight_decays), ("head_lr_scales", scales)):
        if not values:
            raise UserError(f"{name} is empty: give at least one value")
    if min(lrs) <= 0 or min(weight_decays) < 0 or min(scales) <= 0:
        raise UserError("lrs must be above 0, weight_decays at least 0")
    return [Setting(lr, decay, scale) for lr in lrs for decay in weight_decays for scale in scales]


# -- training and choosing ---------------------------------------------------------------------------------------------


def transfer(
    model: Representation, data: Data, task: Task, settings: list[Setting], positions: Int[Tensor, "some"] | None = None
) -> list[Outcome]:
    """Train, choose, train again, test: an outcome for each part of the task's reading.

    Args:
        model: the backbone, which is left as it was.
        data: the images.
        task: what is trained.
        settings: the grid; with one setting there is no choice, and nothing is set aside.
        positions: which of the labeled training images to use; by default all that have a label.

    Raises:
        UserError: the labels do not suit, or there are too few images.
    """
    labels = data.labels("train")
    positions = (labels >= 0).nonzero()[:, 0] if positions is None else positions
    require_labels(data, positions, task.training.batch_size)
    device = device_of(model.backbone) if model.device is None else torch.device(model.device)
    backbone, model = model.backbone.to(device), replace(model, view=data.adapted(model.view))
    example = torch.zeros(2, len(model.view.mean), model.view.size, model.view.size, device=device)
    dims = shapes(task.reading, backbone, example)
    weights = hash_of_weights(backbone)
    if task.augmentation is None and task.frozen == "all":
        data, read = read_once(model, data, task.reading)
        positions = torch.isin(read, positions).nonzero()[:, 0]
        backbone, example = nn.Identity(), torch.zeros(2, sum(shape.numel() for shape in dims), device=device)
        task = replace(task, reading=partial(unpack, dims))
    fit = partial(_fit, model, task=task, backbone=backbone, dims=dims, example=example, device=device, weights=weights)

    best = [settings[0]] * len(dims)
    validation: list[dict[Setting, float]] = [{} for _ in dims]
    if len(settings) > 1:
        held = stratified(data.labels("train")[positions], task.validation, model.seed)
        if not held.any():
            raise UserError("no class has two training images, so none can be set aside: give one value of each option")
        require_labels(data, positions[~held], task.training.batch_size)
        subset = data.split(positions[~held], positions[held])
        each = [(setting, part) for part in range(len(dims)) for setting in settings]
        for group in [each] if task.frozen == "all" else [[one] for one in each]:
            for (setting, part), (top1, _, total) in zip(group, fit(subset, group)):
                validation[part][setting] = 100 * float(top1.sum() / total.sum())
        best = [max(found, key=lambda setting: found[setting]) for found in validation]

    outcomes = []
    for part, (top1, top5, total) in enumerate(fit(data.split(positions), [(s, part) for part, s in enumerate(best)])):
        classes = {data.class_names[i]: 100 * float(top1[i] / n) for i, n in enumerate(total.tolist()) if n}
        five = 100 * float(top5.sum() / total.sum()) if data.num_classes > TOP else None
        outcomes.append(Outcome(100 * float(top1.sum() / total.sum()), five, best[part], validation[part], classes))
    return outcomes


def _fit(
    model: Representation,
    data: Data,
    settings: list[tuple[Setting, int]],
    *,
    task: Task,
    backbone: nn.Module,
    dims: list[torch.Size],
    example: Tensor,
    device: torch.device,
    weights: str,
) -> Float[Tensor, "heads 3 classes"]:
    """Train one head for each setting and part; for each head and class the images right, right in five, and in all."""
    what, how = task.augmentation, task.training
    with torch.random.fork_rng(devices=[]):  # the same initial heads, whatever else the grid holds
        torch.manual_seed(model.seed)
        each = [task.make_head(shape, data.num_classes) for shape in dims]
    heads = Heads(each, [part for _, part in settings], task.batch_norm, [shape[-1] for shape in dims])
    view = model.view
    if what is not None:
        changes: dict[str, Any] = {"crop": what.crop, "flip": what.flip, "interpolation": what.interpolation}
        changes |= {"resize": view.resize if what.crop is None else None}
        view = replace(view, **changes, color_jitter=what.color_jitter, color_jitter_p=1.0)
    backbone = copy.deepcopy(backbone)
    backbone.in_channels = data.channels or 3  # pyrefly: ignore (it has taken the example, so it takes these images)
    method = Transfer(backbone, heads.to(device), task, view, data.num_classes, example)
    base = settings[0][0]
    key = (
        weights,
        task.options,
        settings,
        model.seed,
        data.describe(),
        data.fingerprint(),
        data.labels("train").tolist(),
    )
    with run_folder(model.folder, f"{task.name}-{short_hash(repr(key).encode())}") as folder:
        run = pretrain(
            method,
            data,
            partial(OPTIMIZERS[how.optimizer], lr=base.lr, weight_decay=base.weight_decay),
            schedule=how.schedule or Cosine(),
            rules=_rules(heads, settings, how.decay_bias_and_norm),
            base_batch_size=how.base_batch_size,
            decay_bias_and_norm=how.decay_bias_and_norm,
            layer_decay=task.layer_decay,
            batch_size=how.batch_size,
            epochs=how.epochs,
            grad_accum_steps=how.grad_accum_steps,
            clip_grad_norm=how.clip_grad_norm if len(settings) == 1 else None,
            precision=how.precision,
            seed=model.seed,
            device=str(device),
            out_dir=folder,
            resume="auto",
            checkpoint_every="5 %" if model.folder else how.epochs,
            progress=model.progress,
            config={"protocol": task.name, "options": {name: str(value) for name, value in task.options.items()}},
        )
    require_finished(run, task.name, model)
    return count(method, data, model.view, model.batch_size, device)


def _rules(heads: Heads, settings: list[tuple[Setting, int]], decay_all: bool) -> list[ParamRule]:
    """Each head's learning rate and weight decay, relative to the first setting's; vectors are not decayed."""
    base, rules = settings[0][0], []
    for i, ((setting, _), head) in enumerate(zip(settings, heads.each)):
        scale = setting.lr / base.lr * setting.head_lr_scale
        vectors = [re.escape(name) for name, p in head.named_parameters() if p.ndim <= 1]
        if vectors and not decay_all:
            rules.append(ParamRule(rf"^heads\.each\.{i}\.({'|'.join(vectors)})$", scale))
        rules.append(ParamRule(rf"^heads\.each\.{i}\.", scale, weight_decay=setting.weight_decay))
    return rules


@torch.no_grad()
def count(
    method: Transfer, data: Data, view: View, batch_size: int, device: torch.device
) -> Float[Tensor, "heads 3 classes"]:
    """Of the test images of each class, by every head: classified correctly, right among the five best, and all.

    Processes share the batches.
    """
    method.eval()
    counts = torch.zeros(len(method.heads.each), 3, method.num_classes, device=device)
    share = {"rank": distributed.rank(), "world_size": distributed.world_size()}
    for batch in data.evaluation_batches("test", view, batch_size, device, **share):
        known = batch.label >= 0
        y = batch.label[known]
        best = method.predict(batch.views[0])[:, known].topk(min(TOP, method.num_classes)).indices
        hits = best == y[None, :, None]
        for row, hit in enumerate((hits[..., 0], hits.any(-1), torch.ones_like(hits[..., 0]))):
            counts[:, row].index_add_(1, y, hit.float())
    return distributed.all_reduce_sum(counts).cpu().double()


def with_backbone(model: Representation) -> Representation:
    """The same with a copy of the backbone, which may be changed; details are kept together."""
    return replace(model, backbone=copy.deepcopy(model.backbone), _features={})


class TransferProtocol(Protocol):
    """What the protocols that train with labels share."""

    cost = "minutes to hours"

    def options(self) -> dict[str, Any]:
        """All options, for the key of a run."""
        return {name: value for name, value in vars(self).items() if not name.startswith("_")}

    def note(self, model: Representation, outcomes: dict[str, Outcome]) -> Metrics:
        """Keep the details of outcomes by their names, and return their metrics."""
        details = {name: outcome.details() for name, outcome in outcomes.items()}
        model.details[self.name] = details if len(details) > 1 else next(iter(details.values()))
        return {k: v for name, outcome in outcomes.items() for k, v in outcome.metrics(name).items()}
