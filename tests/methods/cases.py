"""The methods at a small size, shared by the tests of this folder."""

import json
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sslbook import distributed
from sslbook.data.datasets.shapes import Shapes
from sslbook.data.loader import Batch, Data
from sslbook.data.views import View
from sslbook.methods import METHODS, load
from sslbook.methods.base import Method
from sslbook.nn import EMA, VisionTransformer, convert_batch_norm, timm_model
from sslbook.schedules import Clock

SIZE = 16
VIEW = View(size=SIZE)
NUM_IMAGES = 64
TINY_SHAPES = Shapes(num_train=NUM_IMAGES, num_test=16, size=SIZE)  # what memories are sized by
CONVNET = '{"class_path": "sslbook.nn.ResNet", "init_args": {"depth": 18, "width": 4, "stem": "small"}}'
TRANSFORMER = json.dumps(
    {
        "class_path": "sslbook.nn.VisionTransformer",
        "init_args": {"image_size": SIZE, "patch_size": 4, "dim": 16, "depth": 2, "num_heads": 2},
    }
)
NAMES = os.environ.get("SSLBOOK_TEST_METHODS", ",".join(METHODS)).split(",")  # to test some of them only


@dataclass(frozen=True)
class Case:
    """A method at the smallest size at which it still learns; `CASE` in its `test_NAME.py`.

    Args:
        options: of the constructor, besides the backbone.
        command: the same on the command line, the backbone included.
        learned: whether the method overfits a batch of 32 images, from its outputs.
        backbone: makes the network.
        full_scale: the name in `sslbook.nn` of a network that the defaults are for.
        full_options: makes further arguments that the constructor needs, such as a teacher.
        overfit: options with which it overfits 32 images ...
        overfit_lr: ... and the learning rate.
        lr: learning rate at which two processes are compared with one.
        corners: further batch sizes, learning rates and options for that comparison.
        order_free: options with which the order of the images in a batch does not matter.
        other_backbones: further networks it must work with.
    """

    options: dict[str, Any]
    command: dict[str, Any]
    learned: Callable[[Method, Batch, dict[str, Tensor]], bool]
    backbone: Callable[[], nn.Module] = lambda: Convolutions()
    full_scale: str = "resnet50"
    full_options: Callable[[], dict[str, Any]] = dict
    overfit: dict[str, Any] = field(default_factory=dict)
    overfit_lr: float = 1e-2
    lr: float = 0.05
    corners: list[tuple[int, float, dict[str, Any]]] = field(default_factory=list)
    order_free: dict[str, Any] = field(default_factory=dict)
    other_backbones: list[Callable[[], nn.Module]] = field(default_factory=list)


def case(name: str) -> Case:
    return import_module(f"tests.methods.test_{name}").CASE


class Convolutions(nn.Module):
    """A cheap backbone with batch norm."""

    dim = 16

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(3, 8, 3, stride=2, padding=1, bias=False),
            nn.BatchNorm2d(8),
            nn.ReLU(),
            nn.Conv2d(8, self.dim, 3, stride=2, padding=1, bias=False),
            nn.BatchNorm2d(self.dim),
            nn.ReLU(),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x).mean(dim=(2, 3))


def transformer() -> VisionTransformer:
    return VisionTransformer(SIZE, 4, 16, 2, 2)


def swin() -> nn.Module:
    """timm's Swin with patches of 2 pixels and a last map of 4x4 cells."""
    pytest.importorskip("timm", reason="needs timm")
    options = {"img_size": SIZE, "patch_size": 2, "embed_dim": 8, "window_size": 4, "drop_path_rate": 0.0}
    return timm_model("swin_tiny_patch4_window7_224", depths=(1, 1), num_heads=(2, 2), **options)


def make(name: str, seed: int = 0, backbone: nn.Module | None = None, **options) -> Method:
    this = case(name)  # before the seed: importing it may use random numbers
    torch.manual_seed(seed)
    method = load(name)(this.backbone() if backbone is None else backbone, **{**this.options, **options})
    method.setup(Data(shapes=TINY_SHAPES))
    return method


def apart(method: Method) -> Method:
    """The method with every EMA teacher moved away from its student, as after some training: at first they are equal."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for teacher in (part for part in method.modules() if isinstance(part, EMA)):
            for p in teacher.module.parameters():
                p += 0.3 * p.std(correction=0).clamp(min=0.1) * torch.randn(p.shape, generator=generator)
    return method


def make_batch(method: Method, size: int, seed: int = 0) -> Batch:
    """Random images; each further view is the first one plus noise, at the size that the method asks for."""
    generator = torch.Generator().manual_seed(seed)
    first = torch.randn(size, 3, SIZE, SIZE, generator=generator)
    views = []
    for i, view in enumerate(method.views()):
        noisy = first + 0.5 * i * torch.randn(first.shape, generator=generator)
        views.append(noisy if view.size == SIZE else F.interpolate(noisy, view.size, mode="bilinear"))
    index = torch.randint(NUM_IMAGES, (size,), generator=generator)
    return Batch(tuple(views), index, torch.full((size,), -1))


def gradient(method: nn.Module) -> Tensor:
    return torch.cat([p.grad.flatten() for p in method.parameters() if p.requires_grad])


def train(name: str, size: int = 8, lr: float = 0.05, options: dict | None = None) -> dict[str, object]:
    """Three training steps in one or several processes, each with its rows of the same global batches."""
    steps = 3
    method = convert_batch_norm(make(name, seed=distributed.rank(), **(options or {})))
    model = method
    if distributed.world_size() > 1:
        model = distributed.data_parallel(method, torch.device("cpu"))
    optimizer = torch.optim.SGD([p for p in method.parameters() if p.requires_grad], lr=lr, momentum=0.9)
    clock = Clock(0, steps, steps_per_epoch=2)
    logged, gradients = [], []
    for step in range(steps):
        batch = make_batch(method, size, seed=step)
        r, n = distributed.rank(), size // distributed.world_size()
        own = slice(r * n, (r + 1) * n)
        batch = Batch(tuple(view[own] for view in batch.views), batch.index[own], batch.label[own])
        out = model(batch, clock)
        optimizer.zero_grad()
        out["loss"].backward()
        logged.append({key: float(distributed.all_reduce_mean(value.detach())) for key, value in out.items()})
        gradients.append(gradient(method))
        method.before_optimizer_step(clock)
        optimizer.step()
        clock = Clock(step + 1, steps, steps_per_epoch=2)
        method.after_step(clock)
    return {"logged": logged, "gradients": gradients, "state": dict(method.state_dict())}
