"""Training with labels on a backbone: frozen, frozen up to a layer, or trained whole; by the loop of pre-training.

A `Transfer` is a method like any other, whose loss is cross-entropy: schedules, resumption, mixed precision, accumulation
and several processes are `engine.loop.pretrain`'s. On a frozen backbone the heads of a whole grid of learning rates and
weight decays share one forward pass, as in DINOv2 and V-JEPA 2. A choice is made on a part of each class of the *training*
images that is set aside; what was chosen is trained again on all of them, and the test images are classified once.
"""

import copy
import hashlib
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from sslbook import distributed
from sslbook.data.datasets.base import ImageSource, Splits
from sslbook.data.loader import Batch, Data
from sslbook.data.views import View
from sslbook.engine.loop import pretrain
from sslbook.errors import UserError, nearest
from sslbook.evaluation.augment import Augmentation, augment, mix
from sslbook.evaluation.base import Metrics, Protocol, Representation
from sslbook.evaluation.features import device_of, extract_with_index
from sslbook.evaluation.heads import Heads, Parts, Reading, feature, shapes
from sslbook.evaluation.protocols.linear import stratified
from sslbook.methods.base import Method
from sslbook.nn.ema import EMA
from sslbook.optim import LARS, ParamRule, blocks_of, layer_of
from sslbook.schedules import Clock, Cosine, Schedule
from sslbook.types import PositiveFloat, PositiveInt

OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "sgd": partial(torch.optim.SGD, momentum=0.9),
    "nesterov": partial(torch.optim.SGD, momentum=0.9, nesterov=True),
    "lars": partial(LARS, momentum=0.9),
    "adamw": partial(torch.optim.AdamW, betas=(0.9, 0.999)),
}
TOP = 5  # the second accuracy, where there are more classes than that


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


# -- the method --------------------------------------------------------------------------------------------------------


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


def with_backbone(model: Representation) -> Representation:
    """The same with a copy of the backbone, which may be changed; details are kept together."""
    return replace(model, backbone=copy.deepcopy(model.backbone), _features={})


# -- data --------------------------------------------------------------------------------------------------------------


@dataclass
class FeatureSource(ImageSource):
    """Features that were extracted once, in place of images."""

    x: Float[Tensor, "images numbers"]
    labels: Int[Tensor, "images"]

    def open(self, position: int) -> Any:
        raise UserError("these are features, not images")

    def subset(self, positions: Int[Tensor, "some"]) -> "FeatureSource":
        return FeatureSource(self.x[positions], self.labels[positions])


class FeatureData(Data):
    """Features of training and test images as data, whose only view is the feature.

    Args:
        train: of the training images.
        test: of the test images.
        like: the data whose classes these are.
    """

    def __init__(self, train: FeatureSource, test: FeatureSource, like: Data) -> None:
        super().__init__()
        self.name, self._splits = like.name, Splits(train, train, test, like.class_names)

    def adapted(self, view: View) -> View:
        return view

    def _load(self, source: Any, views: Any, positions: Any, seed: int, epoch: int, device: Any, training: bool) -> Any:
        for index in positions:
            yield Batch((source.x[index].to(device),), index.to(device), source.labels[index].to(device))


class _Packed(nn.Module):
    """All parts of a reading as one vector for each image, as extraction wants it."""

    def __init__(self, backbone: nn.Module, reading: Reading) -> None:
        super().__init__()
        self.backbone, self.reading = backbone, reading

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([part.flatten(1) for part in self.reading(self.backbone, x)], dim=1)


def _unpack(dims: list[torch.Size], _: nn.Module, x: Tensor) -> Parts:
    parts = x.split([shape.numel() for shape in dims], dim=1)
    return [part.unflatten(1, shape) for part, shape in zip(parts, dims)]


def read_once(model: Representation, data: Data, reading: Reading) -> tuple[FeatureData, Tensor]:
    """What a reading gives for the evaluation view of all images, as data; and their positions among the training images."""
    packed = _Packed(model.backbone, reading)
    options = {"device": model.device, "batch_size": model.batch_size, "progress": model.progress}
    train, test = (extract_with_index(packed, data, split, model.view, **options) for split in ("train", "test"))
    sources = (FeatureSource(part.x, part.y) for part in (train, test))
    return FeatureData(*sources, like=data), train.index


def require_labels(data: Data, positions: Int[Tensor, "some"], batch_size: int) -> None:
    """UserError if labels do not suit: not one class each, more than there are classes, a class without images."""
    labels, test = data.labels("train"), data.labels("test")
    names = data.class_names
    if labels.ndim != 1 or labels.is_floating_point():
        raise UserError(f"{data.name} has several labels for an image, or numbers: this protocol needs one class each")
    train, test = labels[positions], test[test >= 0]
    if (most := int(torch.cat([train, test]).max())) >= len(names):
        raise UserError(f"{data.name} has a label {most} and {len(names)} classes: mend its labels, which begin at 0")
    if len(train) < len(names):
        raise UserError(f"{len(train)} training images of {len(names)} classes: give at least one of each")
    absent = [names[i] for i in test.unique().tolist() if not bool((train == i).any())]
    if absent:
        shown = ", ".join(absent[:3]) + (f", ... ({len(absent)})" if len(absent) > 3 else "")
        raise UserError(f"test images of classes without any training image: {shown}; add some, or leave these out")
    if batch_size > len(train):
        raise UserError(
            f"a batch of {batch_size} of {len(train)} training images: lower --training.batch_size"
            " (of a choice, a part is set aside)"
        )


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
        task = replace(task, reading=partial(_unpack, dims))
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
    method = Transfer(copy.deepcopy(backbone), heads.to(device), task, view, data.num_classes, example)
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
    if not run.finished:
        cure = f"the same command goes on ({model.folder})" if model.folder else "give --keep FOLDER to go on next time"
        raise UserError(f"{task.name} was stopped at step {run.clock.step} of {run.clock.total_steps}: {cure}")
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


@contextmanager
def run_folder(keep: Path | None, name: str) -> Iterator[Path]:
    """Where a run is kept, or a temporary folder."""
    if keep is not None:
        yield keep / name
        return
    folder = distributed.broadcast(tempfile.mkdtemp(prefix="sslbook-") if distributed.is_main() else "")
    try:
        yield Path(folder) / name
    finally:
        if distributed.is_main():
            shutil.rmtree(folder, ignore_errors=True)


def hash_of_weights(module: nn.Module) -> str:
    """A hash of a network's weights: those of a run that is resumed are the same."""
    digest = hashlib.blake2b(digest_size=8)
    for name, value in module.state_dict().items():
        digest.update(name.encode())
        digest.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def short_hash(text: bytes) -> str:
    return hashlib.blake2b(text, digest_size=6).hexdigest()


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
