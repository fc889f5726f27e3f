"""Controls: what a method must beat before its figures mean anything, measured with the same protocols.

- `pixels`: the image itself, as one long vector.
- random weights: the same network before any training. An untrained convolution already gives fair features.
- `train_supervised`: the same network, view, batch size and number of steps, trained with labels. A reference, not an
  upper bound.
"""

import math
from collections.abc import Callable, Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer
from tqdm.auto import tqdm

from sslbook.data.loader import Data
from sslbook.data.views import View
from sslbook.errors import UserError
from sslbook.evaluation.base import Representation
from sslbook.evaluation.features import device_of, extract_features, frozen

PIXELS = 32  # the longest side of an image that is compared pixel by pixel


def pixels(data: Data, view: View, **options) -> Representation:
    """The images themselves, flattened; larger ones are first resized to 32 pixels.

    Args:
        data: the images.
        view: the view that the method is measured with; its crop is kept.
        options: of `Representation`.
    """
    size = min(view.size, PIXELS)
    resize = None if view.resize is None else max(size, round(view.resize * size / view.size))
    raw = View.center(size, resize=resize, mean=(0.0,) * len(view.mean), std=(1.0,) * len(view.mean))
    return Representation(nn.Flatten(), data, raw, **options)


def train_supervised(
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
) -> float:
    """Train a backbone with labels: cross-entropy through one linear layer, for as many steps as the method took.

    The backbone is trained in place; global random states are left as they were.

    Args:
        backbone: initialized as the method's own was.
        data: labeled images with a test split.
        view: the view to train on; give the method's own.
        steps: optimizer steps.
        batch_size: images per step.
        evaluation_view: the view that the method is measured with.
        lr: peak learning rate of AdamW, after a linear warm-up over 5 % of the steps and before a cosine to zero. Short
            runs need the default (a small residual net, 250 steps: 72 % at 3e-3, 36 % at 1e-3); give a transformer 1e-3.
        weight_decay: of AdamW.
        optimizer: another optimizer, given its parameters; its own learning rate is then the peak.
        seed: key of the order of the images and of their views.
        device: where to train; by default where the backbone is.
        progress: show bars.

    Returns:
        Accuracy of the network's own linear layer on the test images, in percent.

    Raises:
        UserError: the images to learn from have no labels, or the loss is no longer finite.
    """
    if data.num_classes == 0 or not bool((data.labels("pretrain") >= 0).any()):
        raise UserError("the images to learn from have no labels, so there is no supervised control")
    device = device_of(backbone) if device is None else torch.device(device)
    network = nn.Sequential(backbone, _zero_linear(_dim(backbone, evaluation_view, device), data.num_classes))
    network.to(device)
    make = optimizer or (lambda parameters: AdamW(parameters, lr=lr, weight_decay=weight_decay))
    optimizer_ = make([p for p in network.parameters() if p.requires_grad])
    peaks = [group["lr"] for group in optimizer_.param_groups]
    cuda = [device] if device.type == "cuda" else []
    bar = tqdm(total=steps, desc="supervised control", unit="step", leave=False, disable=None if progress else True)
    network.train()
    with torch.random.fork_rng(devices=cuda), bar:  # dropout in the backbone must not change the caller's random state
        torch.manual_seed(seed)
        for step, (x, y) in enumerate(_labeled(data, view, steps, batch_size, seed, device)):
            for group, peak in zip(optimizer_.param_groups, peaks):
                group["lr"] = peak * _schedule(step, steps)
            loss = F.cross_entropy(network(x), y, ignore_index=-1)
            if not torch.isfinite(loss):
                raise UserError(f"the supervised control's loss became {loss.item()} at step {step}; lower its lr")
            optimizer_.zero_grad(set_to_none=True)
            loss.backward()
            optimizer_.step()
            bar.update()
    logits, labels = extract_features(network, data, "test", evaluation_view, device=device, progress=progress)
    known = labels >= 0
    return 100 * (logits.argmax(1) == labels)[known].double().mean().item()


def _zero_linear(dim: int, num_classes: int) -> nn.Linear:
    """A linear layer that starts at zero, without a random number: the problem is convex in its weights."""
    layer = nn.utils.skip_init(nn.Linear, dim, num_classes)
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer


def _dim(backbone: nn.Module, view: View, device: torch.device) -> int:
    """The number of features, of one blank image where the module does not say."""
    if isinstance(dim := getattr(backbone, "dim", None), int):
        return dim
    with frozen(backbone.to(device)):
        return backbone(torch.zeros(1, len(view.mean), view.size, view.size, device=device)).shape[1]


def _labeled(
    data: Data, view: View, steps: int, batch_size: int, seed: int, device: torch.device
) -> Iterable[tuple[Tensor, Tensor]]:
    """Exactly `steps` batches that hold a label, epoch after epoch."""
    step, epoch = 0, 0
    while step < steps:
        for batch in data.batches((view,), batch_size, seed=seed, epoch=epoch, device=device):
            if step < steps and bool((batch.label >= 0).any()):
                yield batch.views[0], batch.label.to(device)
                step += 1
        epoch += 1


def _schedule(step: int, steps: int) -> float:
    warm_up = max(1, steps // 20)
    if step < warm_up:
        return (step + 1) / warm_up
    return 0.5 * (1 + math.cos(math.pi * (step - warm_up) / max(1, steps - warm_up)))
