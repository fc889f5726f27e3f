"""What segmentation and depth share: images with a value for every pixel, heads on feature maps, whole images.

A head is trained by the loop of pre-training (`pretrain`) on random resized crops; image and target are cropped and
flipped alike. A test image is shown whole: its shorter side is brought to `size` pixels, and what the head predicts is
resized (bilinear) to the target, never the target to the prediction.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Shaped
from torch import Tensor, nn
from tqdm.auto import tqdm

from sslbook import distributed
from sslbook.data.images import UnreadableImage
from sslbook.data.loader import Batch, Data
from sslbook.data.views import View
from sslbook.engine.loop import pretrain
from sslbook.engine.run import Run
from sslbook.errors import UserError
from sslbook.evaluation.base import Protocol, Representation
from sslbook.evaluation.features import device_of
from sslbook.evaluation.runs import hash_of_weights, require_finished, run_folder, short_hash
from sslbook.evaluation.target_data import PairData
from sslbook.methods.base import Method
from sslbook.optim import ParamRule
from sslbook.rng import permutation
from sslbook.schedules import Clock

SHOWN = 4  # test images in a figure


class DenseTask(Method):
    """Heads on a backbone's maps, trained with a loss between their output and a target for every pixel.

    Args:
        backbone: gives the maps.
        heads: each maps `(batch, dim, rows, columns)` to `(batch, channels, rows, columns)`.
        loss: of an output, resized to the target, and the target.
        view: what an image becomes.
        frozen: leave the backbone as it is, in evaluation mode.
        auxiliary: a head on the last map but one, whose loss counts 0.4 times.
    """

    def __init__(
        self,
        backbone: nn.Module,
        heads: Sequence[nn.Module],
        loss: Callable[[Tensor, Tensor], Tensor],
        view: View,
        frozen: bool = True,
        auxiliary: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.backbone, self.heads, self.auxiliary = backbone, nn.ModuleList(heads), auxiliary
        self.loss, self.view, self.frozen = loss, view, frozen
        if frozen:
            backbone.requires_grad_(False)

    def train(self, mode: bool = True) -> "DenseTask":
        """A frozen backbone stays in evaluation mode."""
        super().train(mode)
        if self.frozen:
            self.backbone.eval()
        return self

    def views(self) -> tuple[View, ...]:
        return (self.view,)

    def predict(self, x: Float[Tensor, "batch 3 height width"]) -> list[Float[Tensor, "batch channels rows columns"]]:
        """The output of every head."""
        features = self.backbone.forward_map(x)  # pyrefly: ignore
        return [head(features) for head in self.heads]

    def forward(self, batch: Batch, clock: Clock) -> dict[str, Tensor]:
        x, target = batch.views[0], batch.label
        if self.auxiliary is None:
            with torch.set_grad_enabled(not self.frozen):
                features = self.backbone.forward_map(x)  # pyrefly: ignore
        else:
            *_, before, features = self.backbone.forward_stages(x)  # pyrefly: ignore
        losses = [self._loss(head(features), target) for head in self.heads]
        if self.auxiliary is not None:
            losses.append(0.4 * self._loss(self.auxiliary(before), target))
        logged = {f"loss_{i}": loss.detach() for i, loss in enumerate(losses)}
        return {"loss": torch.stack(losses).sum(), **(logged if len(losses) > 1 else {})}

    def _loss(self, output: Tensor, target: Tensor) -> Tensor:
        return self.loss(resized(output.float(), target), target)


def resized(output: Float[Tensor, "batch channels rows columns"], target: Shaped[Tensor, "... height width"]) -> Tensor:
    """An output at the resolution of the target."""
    return F.interpolate(output, tuple(target.shape[-2:]), mode="bilinear", align_corners=False)


class Shown(NamedTuple):
    """A test image beside what is known of it and what was predicted."""

    image: Any
    target: Shaped[Tensor, "height width"]
    prediction: Shaped[Tensor, "height width"]


def whole_images(
    data: PairData, split: Literal["train", "test"], view: View, multiple: int, device: torch.device, progress: bool
) -> Iterator[tuple[int, Float[Tensor, "1 3 height width"], Tensor, Any]]:
    """This process's share of a split: position, the image whose shorter side is `view.size`, target, image file.

    Args:
        data: the pairs.
        split: train or test.
        view: its size, mean and standard deviation are used.
        multiple: sides become multiples of this, as patches want it.
        device: where the image is wanted.
        progress: show a bar.
    """
    from torchvision.transforms.v2 import functional as T

    source = data._source(split)
    own = range(distributed.rank(), len(source), distributed.world_size())
    for position in tqdm(own, desc=f"whole images of {split}", leave=False, disable=None if progress else True):
        try:
            image, target = source.open(position)
        except UnreadableImage as error:
            data._note_unreadable(((error.name, error.reason),))
            continue
        scale = view.size / min(image.height, image.width)
        sides = [max(1, round(side * scale / multiple)) * multiple for side in (image.height, image.width)]
        x = T.resize(T.pil_to_tensor(image).float() / 255, sides, antialias=True)
        yield position, T.normalize(x, list(view.mean), list(view.std))[None].to(device), target, image


class Dense:
    """The options' values that both protocols need for training and for whole images.

    Raises:
        UserError: `size` is no multiple of the side of a patch.
    """

    def __init__(self, model: Representation, data: PairData, size: int | None, crop: tuple[float, float]) -> None:
        self.model, self.data = model, data
        data.workers, data.unreadable = (
            model.data.workers,
            model.data.unreadable,
        )  # of the command's options and reports
        self.device = device_of(model.backbone) if model.device is None else torch.device(model.device)
        self.multiple = int(getattr(model.backbone, "patch_size", 1))
        side = size or model.view.size
        if side % self.multiple:
            raise UserError(f"size {side}: make it a multiple of the patches' {self.multiple} pixels")
        mean, std = model.view.mean, model.view.std
        self.view = View.center(side, mean=mean, std=std)
        colors = {"color_jitter": (0.125, 0.5, 0.5, 0.05), "color_jitter_p": 0.5}  # mmsegmentation's distortion
        self.training_view = View(side, crop=crop, mean=mean, std=std, **colors)

    def held_out(self) -> tuple[PairData, PairData]:
        """The training images without a tenth, and that tenth as the test images of the other.

        Raises:
            UserError: there is only one.
        """
        train = self.data._splits.train
        order = permutation(self.model.seed, 0, len(train))
        count = max(1, len(train) // 10)
        if len(train) < 2:
            raise UserError("one training image: a learning rate is chosen on a tenth of them, so give at least 2")
        fit, held = (train.subset(part.sort().values) for part in (order[count:], order[:count]))
        about = (self.data.class_names, self.data.name, self.data.workers)
        parts = PairData(fit, self.data._splits.test, *about), PairData(fit, held, *about)
        for part in parts:
            part.unreadable = self.data.unreadable
        return parts

    def images(self, data: PairData, split: Literal["train", "test"]) -> Iterator[tuple[int, Tensor, Tensor, Any]]:
        """`whole_images` of a split."""
        return whole_images(data, split, self.view, self.multiple, self.device, self.model.progress)


def fit(
    task: Method,
    data: Data,
    model: Representation,
    protocol: Protocol,
    *,
    optimizer: Literal["sgd", "adamw"],
    lr: float,
    weight_decay: float,
    steps: int,
    batch_size: int,
    **options: Any,
) -> tuple[Run, dict[str, float]]:
    """Train a task by the loop of pre-training, in the folder that the representation keeps, if it keeps one.

    A run is resumed if options, weights and data are the same. Returns the run, and its first and last loss that were
    logged. Random states of the caller are left as they were.

    Raises:
        UserError: there are too few images, or the training was stopped.
    """
    makers = {
        "sgd": partial(torch.optim.SGD, lr=lr, momentum=0.9, weight_decay=weight_decay),
        "adamw": partial(torch.optim.AdamW, lr=lr, weight_decay=weight_decay),
    }
    device = device_of(model.backbone) if model.device is None else torch.device(model.device)
    if batch_size > data.num_train:
        raise UserError(f"train_batch_size {batch_size}: {data.name} has {data.num_train} training images")
    own = {name: str(value) for name, value in vars(protocol).items() if not name.startswith("_")}
    key = (hash_of_weights(model.backbone), own, model.seed, data.describe(), data.fingerprint())
    name = f"{protocol.name}-{short_hash(repr(key).encode())}"
    with run_folder(model.folder, name) as folder, torch.random.fork_rng():
        torch.manual_seed(model.seed)
        run = pretrain(
            task,
            data,
            makers[optimizer],
            steps=steps,
            batch_size=batch_size,
            seed=model.seed,
            device=str(device),
            out_dir=folder,
            resume="auto",
            checkpoint_every=f"{max(1, steps // 10)} steps",
            progress=model.progress,
            config={"protocol": protocol.name, "options": own},
            **options,
        )
        lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines() if distributed.is_main() else []
    require_finished(run, protocol.name, model)
    entries = [json.loads(lines[i]) for i in (0, -1)] if lines else []
    return run, {f"loss at step {entry['step']}": entry["loss"] for entry in entries}


def frozen_norm(dim: int) -> nn.BatchNorm2d:
    """Batch norm for frozen maps, whose statistics never change: all batches count alike.

    With torch's momentum of 0.1 the initial variance of 1 would still dominate small features after 60 steps.
    """
    return nn.BatchNorm2d(dim, momentum=None)


def learning_rates(lrs: Sequence[float]) -> list[ParamRule]:
    """Rules that give every head its own learning rate, in a run whose rate is the largest of them."""
    return [ParamRule(rf"^heads\.{i}\.", lr_scale=lr / max(lrs)) for i, lr in enumerate(lrs)]


def prediction_figure(shown: Sequence[Shown], what: str, draw: Callable[[Any, Tensor], None]) -> Any:
    """A figure of a row for each image: image, target, prediction."""
    from sslbook.notebook.style import figure

    alt = f"{len(shown)} test images, each beside its {what} and the predicted one"
    made, axes = figure(alt, len(shown), 3, width=7.0, height=2.0 * len(shown), caption=None, squeeze=False)
    for row, one in zip(axes, shown):
        row[0].imshow(np.asarray(one.image))
        draw(row[1], one.target)
        draw(row[2], one.prediction)
        for axis in row:
            axis.set_axis_off()
    for axis, title in zip(axes[0], ("image", what, "prediction")):
        axis.set_title(title)
    return made
