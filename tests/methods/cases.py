"""The methods at the smallest size that still shows what they do, shared by the tests of this folder."""

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from sslbook import distributed
from sslbook.data.loader import Batch
from sslbook.data.views import View
from sslbook.methods import load
from sslbook.methods.base import Method
from sslbook.nn import VisionTransformer, convert_batch_norm
from sslbook.schedules import Clock

SIZE = 16
VIEW = View(size=SIZE)
OPTIONS = {
    "rotation": {"view": VIEW},
    "simclr": {"view": VIEW, "projector_dim": 16},
    "moco": {"view": VIEW, "projector_dim": 16, "queue_size": 21, "batch_norm_groups": 2},
    "byol": {"view_1": VIEW, "view_2": VIEW, "hidden_dim": 32, "projector_dim": 16},
    "mae": {"view": VIEW, "decoder_dim": 16, "decoder_depth": 1, "decoder_heads": 2},
}
NAMES = list(OPTIONS)


class Convolutions(nn.Module):
    """A backbone with batch norm that costs next to nothing."""

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


def make(name: str, seed: int = 0, backbone: nn.Module | None = None, **options) -> Method:
    torch.manual_seed(seed)
    if backbone is None:
        backbone = transformer() if name == "mae" else Convolutions()
    return load(name)(backbone, **{**OPTIONS[name], **options})


def make_batch(method: Method, size: int, seed: int = 0) -> Batch:
    """Random pictures, whose second view is the first with noise."""
    generator = torch.Generator().manual_seed(seed)
    first = torch.randn(size, 3, SIZE, SIZE, generator=generator)
    views = [first + 0.5 * i * torch.randn(first.shape, generator=generator) for i in range(len(method.views()))]
    index = torch.randint(1000, (size,), generator=generator)
    return Batch(tuple(views), index, torch.full((size,), -1))


def gradient(method: nn.Module) -> Tensor:
    return torch.cat([p.grad.flatten() for p in method.parameters() if p.requires_grad])


def train(name: str, size: int = 8, lr: float = 0.05, options: dict | None = None) -> dict[str, object]:
    """Three steps of the engine, alone or in several processes, each with its part of the same global batches."""
    steps = 3
    method = convert_batch_norm(make(name, seed=distributed.rank(), **(options or {})))
    model = DistributedDataParallel(method) if distributed.world_size() > 1 else method
    optimizer = torch.optim.SGD([p for p in method.parameters() if p.requires_grad], lr=lr, momentum=0.9)
    clock = Clock(0, steps, steps_per_epoch=2)
    logged, gradients = [], []
    for step in range(steps):
        batch = make_batch(method, size, seed=step)
        r, n = distributed.rank(), size // distributed.world_size()
        mine = slice(r * n, (r + 1) * n)
        batch = Batch(tuple(view[mine] for view in batch.views), batch.index[mine], batch.label[mine])
        out = model(batch, clock)
        optimizer.zero_grad()
        out["loss"].backward()
        logged.append({key: float(distributed.mean(value.detach())) for key, value in out.items()})
        gradients.append(gradient(method))
        optimizer.step()
        clock = Clock(step + 1, steps, steps_per_epoch=2)
        method.after_step(clock)
    return {"logged": logged, "gradients": gradients, "state": dict(method.state_dict())}
