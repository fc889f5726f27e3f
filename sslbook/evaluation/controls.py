"""What a method must beat before its figures mean anything, measured exactly like the method.

- `pixels`: the image itself, as one long vector. Whatever the method adds shows against this.
- `random_weights`: the same network before any training. An untrained convolution is already a fair feature.
- `supervised`: the same network, view, batch and number of steps, but with labels. An anchor, not a ceiling.
"""

import math
import time
from collections.abc import Callable, Iterable
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer
from tqdm.auto import tqdm

from sslbook.data.loader import Data
from sslbook.data.views import View
from sslbook.errors import UserError
from sslbook.evaluation.features import device_of, extract_features, frozen
from sslbook.evaluation.table import Row, measure, require_labels

PIXELS = 32  # the longest side of an image that is compared pixel by pixel


def pixels(data: Data, view: View, *, device: torch.device | str | None = None, **options) -> Row:
    """The images themselves, flattened; larger ones are first resized to 32 pixels.

    Args:
        data: labeled images with a test split.
        view: the view that the method is measured with; its cut is kept.
        device: where to compute.
        options: passed on to `sslbook.evaluation.table.measure`.
    """
    size = min(view.size, PIXELS)
    resize = None if view.resize is None else max(size, round(view.resize * size / view.size))
    raw = View.center(size, resize=resize, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))
    return _timed(lambda: measure("pixels", nn.Flatten(), data, raw, device=device, **options))


def random_weights(
    backbone: nn.Module, data: Data, view: View, *, device: torch.device | str | None = None, **options
) -> Row:
    """A network before training.

    Args:
        backbone: freshly initialized: a copy made before the method began to train.
        data: labeled images with a test split.
        view: the view that the method is measured with.
        device: where to compute.
        options: passed on to `sslbook.evaluation.table.measure`.
    """
    return _timed(lambda: measure("random weights", backbone, data, view, device=device, **options))


def supervised(
    backbone: nn.Module,
    data: Data,
    view: View,
    steps: int,
    batch_size: int,
    *,
    evaluation_view: View,
    lr: float = 3e-3,
    weight_decay: float = 0.05,
    optimizer: Callable[[Iterable[nn.Parameter]], Optimizer] | None = None,
    seed: int = 0,
    device: torch.device | str | None = None,
    progress: bool = True,
    **options,
) -> Row:
    """The same network with labels: cross-entropy through one linear layer, for as many steps as the method took.

    The backbone is trained in place; global random states are left as they were.

    Args:
        backbone: freshly initialized: a copy made before the method began to train.
        data: labeled images with a test split.
        view: the view to train on; give the method's own.
        steps: optimizer steps.
        batch_size: images per step.
        evaluation_view: the view that the method is measured with.
        lr: peak learning rate of AdamW; it rises over the first twentieth and falls to zero along a cosine. Short runs
            need the default (a small residual net, 250 steps: 72 % at 3e-3, 36 % at 1e-3); give a transformer 1e-3.
        weight_decay: of AdamW.
        optimizer: another optimizer, given its parameters; its own learning rate is then the peak.
        seed: key of the order of the images and of their views.
        device: where to train; by default where the backbone is.
        progress: show bars.
        options: passed on to `sslbook.evaluation.table.measure`.

    Raises:
        UserError: the data have no labels, or the loss is no longer finite.
    """
    require_labels(data)
    device = device_of(backbone) if device is None else torch.device(device)
    began = time.perf_counter()
    network = nn.Sequential(backbone, _zero_linear(_dim(backbone, evaluation_view, device), data.num_classes))
    network.to(device)
    make = optimizer or (lambda parameters: AdamW(parameters, lr=lr, weight_decay=weight_decay))
    chosen = make([p for p in network.parameters() if p.requires_grad])
    peaks = [group["lr"] for group in chosen.param_groups]
    cuda = [device] if device.type == "cuda" else []
    bar = tqdm(total=steps, desc="supervised control", unit="step", leave=False, disable=None if progress else True)
    network.train()
    with torch.random.fork_rng(devices=cuda), bar:  # dropout in the backbone must not disturb the caller's chance
        torch.manual_seed(seed)
        for step, (x, y) in enumerate(_labeled(data, view, steps, batch_size, seed, device)):
            for group, peak in zip(chosen.param_groups, peaks):
                group["lr"] = peak * _schedule(step, steps)
            if bool((y < 0).all()):
                raise UserError("the images to learn from have no labels, so there is no supervised control")
            loss = F.cross_entropy(network(x), y, ignore_index=-1)
            if not torch.isfinite(loss):
                raise UserError(f"the supervised control's loss became {loss.item()} at step {step}; lower its lr")
            chosen.zero_grad(set_to_none=True)
            loss.backward()
            chosen.step()
            bar.update()
    row = measure("supervised", backbone, data, evaluation_view, device=device, seed=seed, progress=progress, **options)
    head = _head_accuracy(network, data, evaluation_view, device, progress)
    return replace(row, head=head, seconds=time.perf_counter() - began)


def _timed(make: Callable[[], Row]) -> Row:
    began = time.perf_counter()
    return replace(make(), seconds=time.perf_counter() - began)


def _zero_linear(dim: int, num_classes: int) -> nn.Linear:
    """A linear layer that starts at zero: no chance is needed where the problem is convex."""
    with torch.random.fork_rng(devices=[]):  # its usual weights would take numbers from the caller's chance
        layer = nn.Linear(dim, num_classes)
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer


def _dim(backbone: nn.Module, view: View, device: torch.device) -> int:
    """The number of features, tried out on one blank image where the module does not say."""
    if isinstance(dim := getattr(backbone, "dim", None), int):
        return dim
    with frozen(backbone.to(device)):
        return backbone(torch.zeros(1, 3, view.size, view.size, device=device)).shape[1]


def _labeled(
    data: Data, view: View, steps: int, batch_size: int, seed: int, device: torch.device
) -> Iterable[tuple[Tensor, Tensor]]:
    """Exactly `steps` batches, epoch after epoch."""
    step, epoch = 0, 0
    while step < steps:
        before = step
        for batch in data.batches((view,), batch_size, seed=seed, epoch=epoch, device=device):
            if step == steps:
                return
            yield batch.views[0], batch.label.to(device)
            step += 1
        if step == before:
            raise UserError(f"no batch of {batch_size} labeled images; lower the batch size")
        epoch += 1


def _schedule(step: int, steps: int) -> float:
    warm_up = max(1, steps // 20)
    if step < warm_up:
        return (step + 1) / warm_up
    return 0.5 * (1 + math.cos(math.pi * (step - warm_up) / max(1, steps - warm_up)))


def _head_accuracy(network: nn.Module, data: Data, view: View, device: torch.device, progress: bool) -> float:
    logits, labels = extract_features(network, data, "test", view, device=device, progress=progress)
    known = labels >= 0
    return 100 * (logits.argmax(1) == labels)[known].double().mean().item()
