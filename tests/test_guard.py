"""A run that learns nothing says so: features that collapse, a teacher that stands still, a loss that is no number."""

import warnings
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import nn

from sslbook import checkpoint
from sslbook.data.datasets.shapes import Shapes
from sslbook.data.loader import Data
from sslbook.data.views import View
from sslbook.engine.guard import Guard
from sslbook.engine.loop import pretrain
from sslbook.errors import UserError
from sslbook.methods.base import Method
from sslbook.methods.byol import BYOL
from sslbook.methods.simclr import SimCLR
from sslbook.nn import ConvNet

VIEW = View(size=16)
FAST = partial(torch.optim.SGD, lr=0.01, momentum=0.9)


class Plain(nn.Module):
    """A network without a normalization, which would hold the features apart."""

    dim = 8

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3 * 16 * 16, 8)

    def forward(self, x):
        return self.linear(x.flatten(1))


class Collapses(Method):
    """A method that brings all features to one point."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = Plain()

    def views(self) -> tuple[View, ...]:
        return (VIEW, VIEW)

    def forward(self, batch, clock):
        return {"loss": 1e-6 * self.backbone(torch.cat(batch.views)).var(dim=0).sum()}

    @torch.no_grad()
    def after_step(self, clock) -> None:
        self.backbone.linear.weight.mul_(0.6)  # soon only the bias is left


class Still(BYOL):
    """BYOL whose teacher is not moved."""

    def after_step(self, clock) -> None:
        pass


def byol(kind: type[BYOL] = BYOL) -> BYOL:
    return kind(ConvNet(4), VIEW, VIEW, hidden_dim=8, projector_dim=4)


def run(method: nn.Module, out: Path, steps: int = 45, **options) -> None:
    data = Data(shapes=Shapes(num_train=160, num_test=4, size=16))
    pretrain(method, data, FAST, batch_size=8, steps=steps, device="cpu", progress=False, out_dir=out, **options)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "answer"),
    [
        (Collapses, r"by step 40 the features collapsed: .* at the start .*What to try: lower the learning rate"),
        (partial(byol, Still), r"by step 40 the EMA teacher .*target.* stands still.*below 1"),
    ],
    ids=["collapse", "teacher"],
)
def test_a_run_that_learns_nothing_warns_or_ends(method, answer: str, tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match=answer):
        run(method(), tmp_path / "warns")
    assert checkpoint.find(tmp_path / "warns").name == "checkpoint-00000045.pt"
    with pytest.raises(UserError, match=answer):
        run(method(), tmp_path / "ends", guard=True)
    assert checkpoint.find(tmp_path / "ends").name == "checkpoint-00000020.pt"
    with pytest.raises(UserError, match=answer):
        run(method(), tmp_path / "hook", hooks=[Guard()])


@pytest.mark.slow
@pytest.mark.parametrize("method", [byol, lambda: SimCLR(ConvNet(4), VIEW, projector_dim=4)], ids=["byol", "simclr"])
def test_a_run_that_learns_is_left_alone(method, tmp_path: Path) -> None:
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run(method(), tmp_path, guard=True)


def test_a_look_changes_nothing(tmp_path: Path) -> None:
    weights = []
    for name, hooks in (("a", []), ("b", [Guard(images=16), Guard(images=7)])):
        torch.manual_seed(0)
        method = SimCLR(ConvNet(4), VIEW, projector_dim=4)
        run(method, tmp_path / name, steps=21, hooks=hooks)
        weights.append(method.state_dict())
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_a_loss_that_is_no_number_ends_every_run(tmp_path: Path) -> None:
    class Explodes(Collapses):
        def forward(self, batch, clock):
            return {"loss": super().forward(batch, clock)["loss"] * (float("nan") if clock.step == 3 else 1)}

    with pytest.raises(UserError, match="became nan at step 3"):
        run(Explodes(), tmp_path)


def test_a_network_that_is_no_number_from_the_start_ends_at_the_first_step(tmp_path: Path) -> None:
    method = SimCLR(ConvNet(width=4), view=VIEW)
    next(method.backbone.parameters()).data.fill_(float("nan"))
    with pytest.raises(UserError, match="became nan at step 0"):
        run(method, tmp_path / "run", guard=True)
