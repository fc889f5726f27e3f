"""A method in shards (FSDP2) takes the steps of the whole method, and its checkpoints are those of any other run."""

import copy
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule

from sslbook import checkpoint, distributed
from sslbook.data.loader import Batch
from sslbook.engine import sharding
from sslbook.errors import UserError
from sslbook.methods import load
from sslbook.nn import convert_batch_norm
from sslbook.schedules import Clock
from sslbook.train import main
from sslbook.weights.backbone import load_backbone
from tests.engine import command, lines, weights
from tests.faults import Fault, start
from tests.methods.cases import NAMES, case, make, make_batch, train
from tests.methods.test_contracts import check


def _sharded(name: str, lr: float) -> dict:
    """As `cases.train` in shards."""
    method = convert_batch_norm(make(name, seed=distributed.rank()))
    plain = {key: value.detach().clone() for key, value in method.state_dict().items()}
    sharding.shard(method, torch.device("cpu"))
    if distributed.rank() == 0:
        assert all(torch.equal(plain[k], v) for k, v in sharding.state_dict(method).items())
    else:
        sharding.state_dict(method)
    optimizer = torch.optim.SGD([p for p in method.parameters() if p.requires_grad], lr=lr, momentum=0.9)
    logged, gradients = [], []
    for step in range(3):
        batch = make_batch(method, 8, seed=step)
        own = slice(distributed.rank() * 4, distributed.rank() * 4 + 4)
        batch = Batch(tuple(view[own] for view in batch.views), batch.index[own], batch.label[own])
        out = method(batch, Clock(step, 3, steps_per_epoch=2))
        optimizer.zero_grad()
        out["loss"].backward()
        logged.append({key: float(distributed.all_reduce_mean(value.detach())) for key, value in out.items()})
        parts = [p.grad for p in method.parameters() if p.requires_grad]
        gradients.append(torch.cat([distributed.full_tensor(g).flatten() for g in parts]))
        method.before_optimizer_step(Clock(step, 3, steps_per_epoch=2))
        optimizer.step()
        method.after_step(Clock(step + 1, 3, steps_per_epoch=2))
    shards = [p for p in method.parameters() if hasattr(p, "to_local")]  # all but a frozen teacher's
    local = sum(distributed.full_tensor(p).numel() for p in shards)
    held = sum(p.to_local().numel() for p in shards)
    assert held < 0.6 * local, "every process holds more than its half"
    sharding.make_whole(method)
    return {"logged": logged, "gradients": gradients, "state": dict(method.state_dict())}


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in NAMES if load(name).can_shard])
def test_shards_equal_the_whole(name: str, pool) -> None:
    check(train(name, lr=case(name).lr), pool.run(_sharded, name, case(name).lr))


def _touched() -> dict[str, object]:
    method = make("byol", backbone=case("mae").backbone())
    sharding.shard(method, torch.device("cpu"))
    units = [name for name, module in method.named_modules() if isinstance(module, FSDPModule)]
    with sharding.whole(method):
        plain = [type(module) for module in method.modules()]
        for p in method.parameters():
            p.data.fill_(3.0)
        copy.deepcopy(method)(make_batch(method, 4), Clock())["loss"].backward()
        with sharding.whole(method):  # is whole already
            pass
    kept = all(bool((distributed.full_tensor(p) == 3).all()) for p in method.parameters())
    own = [type(module) for module in make("byol", backbone=case("mae").backbone()).modules()]
    return {"units": units, "plain": plain == own, "kept": kept, "name": type(method).__name__}


def test_a_whole_method_is_what_it_was_and_its_changes_are_kept(pool) -> None:
    for got in pool.run(_touched):
        assert got["units"] == [
            "",
            *(f"{net}.blocks.{i}" for net in ("backbone", "target_backbone.module") for i in (0, 1)),
        ]
        assert got["plain"]
        assert got["kept"]
        assert got["name"] == "BYOL"


class Stage(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks, self.norm = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), nn.LayerNorm(4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(self.blocks(x))


def _nested(x: torch.Tensor) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    net = nn.Sequential(OrderedDict(layers=nn.Sequential(Stage(), Stage())))
    if distributed.world_size() > 1:
        sharding.shard(net, torch.device("cpu"))
        assert sum(isinstance(module, FSDPModule) for module in net.modules()) == 7
    net(x).square().mean().backward()
    return {name: distributed.full_tensor(p.grad) for name, p in net.named_parameters()}


def test_blocks_within_stages(pool) -> None:
    """As in Swin: the gradients of two processes that see the same are those of one."""
    x = torch.randn(5, 4)
    for got in pool.run(_nested, x):
        torch.testing.assert_close(got, _nested(x))


# -- runs --------------------------------------------------------------------------------------------------------------

OPTIONS = {"steps": 8, "checkpoint_every": "1 steps", "keep_last": 2, "epochs": None, "device": "cpu"}
ADAM = '{"class_path": "torch.optim.AdamW", "init_args": {"lr": 0.001, "eps": 0.001}}'  # a small eps magnifies rounding


def close(one: Path, other: Path) -> None:
    """The states of two runs, equal to rounding."""
    a, b = weights(one), weights(other)
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(b[name], a[name], rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.slow
@pytest.mark.parametrize("method", ["mae", "byol"])
def test_runs_of_either_kind_go_on_as_the_other(method: str, tmp_path: Path) -> None:
    """One process, DDP, FSDP2, and from each of the two to the other in the middle: one trajectory."""
    log, options = tmp_path / "log", {**OPTIONS, "optimizer": ADAM, "clip_grad_norm": 1.0, "grad_accum_steps": 2}
    assert start(command(method, tmp_path / "one", **options), log) == [0]
    for before, after in (("fsdp", "fsdp"), ("ddp", "fsdp"), ("fsdp", "ddp")):
        run = tmp_path / f"{before}-{after}"
        words = [*command(method, run, **options), f"--parallel={before}"]
        assert start(words, log, 2, Fault("TERM", "step", 4)) == [0, 0], log.read_text()[-2000:]
        assert checkpoint.load(checkpoint.find(run))["step"] == 4
        words = [*command(method, run, **options), f"--parallel={after}", "--resume=auto"]
        assert start(words, log, 2) == [0, 0], log.read_text()[-2000:]
        assert "Traceback" not in log.read_text()
        close(tmp_path / "one", run)
        assert [line["loss"] for line in lines(run)] == pytest.approx(
            [line["loss"] for line in lines(tmp_path / "one")], rel=1e-4
        )


@pytest.mark.slow
def test_hooks_see_a_whole_network(tmp_path: Path) -> None:
    hooks = '["OnlineKNN", "OnlineLabelFree", {"class_path": "Plots", "init_args": {"every": 1}}]'
    words = command("mae", tmp_path / "run", hooks=hooks, monitor="knn", parallel="fsdp", device="cpu")
    log = tmp_path / "log"
    assert start(words, log, 2) == [0, 0], log.read_text()[-2000:]
    assert {"knn", "rank_me"} <= {name for line in lines(tmp_path / "run") for name in line}
    assert (tmp_path / "run" / "reconstructions.png").exists()
    assert (tmp_path / "run" / "best.pt").exists()
    exported, facts = load_backbone(tmp_path / "run")
    assert facts["method"] == "MAE"
    state = weights(tmp_path / "run")
    assert all(torch.equal(state[f"backbone.{name}"], value) for name, value in exported.state_dict().items())


def test_what_does_not_go_with_shards_is_refused(tmp_path: Path) -> None:
    for option in ({"compile": "true"}, {"precision": "fp16"}):
        with pytest.raises(UserError, match="--parallel fsdp goes with"):
            main(command("simclr", tmp_path / "run", parallel="fsdp", **option))
    with pytest.raises(UserError, match="SparK cannot be trained in shards: use --parallel ddp"):
        main(command("spark", tmp_path / "run", parallel="fsdp"))
