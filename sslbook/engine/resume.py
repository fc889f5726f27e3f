"""What a checkpoint holds, how it is written, and how a run goes on from it to the bit."""

import math
import os
import warnings
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import yaml

from sslbook import checkpoint, distributed
from sslbook.engine.hooks import Hook
from sslbook.engine.run import Run
from sslbook.engine.sharding import load_optimizer_state_dict, load_state_dict, optimizer_state_dict, state_dict
from sslbook.errors import UserError, explained
from sslbook.files import read_yaml
from sslbook.nn.backbones import describe

CONTENTS = (
    *("method", "optimizer", "scaler", "step", "steps_per_epoch", "batch_size", "seed", "seconds"),
    *("evaluations", "best", "random", "description"),
)


@dataclass
class TrainState:
    """All that changes in a run and is not recomputed: what its checkpoints hold.

    Args:
        run: the run, with its method and clock.
        optimizer: its state follows the order of its parameter groups.
        scaler: of fp16.
        monitor: the metric whose highest value marks the best checkpoint; none without one.
        best: its highest value so far.
        improved: whether the last evaluation was the best one.
    """

    run: Run
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    monitor: str | None = None
    best: float = -math.inf
    improved: bool = False

    def compare(self) -> None:
        """Compare the monitored metric with its best value, after an epoch; a hook may measure it now and then."""
        if self.monitor in self.run.evaluations:
            value = self.run.evaluations[self.monitor]
            self.improved = value > self.best
            self.best = max(self.best, value)

    def save(self, hooks: list[Hook], keep_last: int) -> None:
        """Write a checkpoint, the best one besides if the last evaluation was the best; delete the oldest.

        Raises:
            UserError: a weight is NaN or infinite; then nothing is written.
        """
        run, step = self.run, self.run.clock.step
        random = _random_states(run.device)  # of all processes
        weights, optimizer = state_dict(run.method), optimizer_state_dict(self.optimizer)  # of all processes, too
        names = {name for name, _ in run.method.named_parameters()}
        finite = all(bool(torch.isfinite(weights[name]).all()) for name in names & weights.keys())
        if not distributed.broadcast(finite):
            raise UserError(
                f"weights became NaN or Inf by step {step}, though the loss was a number; they were not saved, the "
                "last checkpoint is as it was: lower the learning rate, or set --clip_grad_norm"
            )
        if distributed.is_main():
            contents = {
                "method": weights,
                "optimizer": optimizer,
                "optimizer_class": type(self.optimizer).__name__,
                "images": run.data.fingerprint(),
                "scaler": self.scaler.state_dict(),
                "step": step,
                "steps_per_epoch": run.clock.steps_per_epoch,
                "batch_size": run.batch_size,
                "seed": run.clock.seed,
                "seconds": run.seconds,
                "evaluations": run.evaluations,
                "best": self.best,
                "random": random,
                "description": description(run),
            }
            if self.improved:  # first, since the checkpoint says that it is there
                checkpoint.save(run.folder / "best.pt", contents)
            path = run.folder / f"checkpoint-{step:08d}.pt"
            checkpoint.save(path, contents)
            for old in checkpoint.checkpoints(run.folder)[:-keep_last] if keep_last else []:
                old.unlink()
            for hook in hooks:
                hook.save(run, path)
        self.improved = False

    def restore(self, state: dict[str, Any], path: Path) -> None:
        """Go on from a checkpoint's contents, which were read from `path`.

        Raises:
            UserError: it belongs to a run with other options, or was altered.
        """
        run = self.run
        _require_same_run(state, run, type(self.optimizer).__name__)
        if state.get("images", run.data.fingerprint()) != run.data.fingerprint():
            warnings.warn(
                "the images are not those that the run began with: it goes on, but not to the bit", stacklevel=3
            )
        kinds = (RuntimeError, ValueError, LookupError, TypeError, AttributeError)
        with explained(f"{path}: does not fit this run", *kinds, cure="take an older one"):
            load_state_dict(run.method, state["method"])
            _load_optimizer(self.optimizer, state["optimizer"])
            self.scaler.load_state_dict(state["scaler"])
            _set_random_states(state["random"], run.clock.seed, run.device)
        run.clock = replace(run.clock, step=state["step"])
        run.seconds, run.evaluations, self.best = state["seconds"], dict(state["evaluations"]), state["best"]
        rename_newer_checkpoints(run.folder, run.clock.step)


def description(run: Run) -> dict[str, Any]:
    """What whoever uses the backbone must know: how to build it, which images it expects, what it learned from."""
    view = run.data.adapted(run.method.views()[0])
    return {
        "backbone": describe(run.method.backbone),
        "method": type(run.method).__name__,
        "view": {"size": view.size, "mean": list(view.mean), "std": list(view.std)},
        "data": run.config.get("data", {}),
        "cwd": os.getcwd(),  # the data's paths may be relative
        "config": run.config,
    }


LIKE_PARAMETER = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq", "momentum_buffer", "square_avg", "sum")


def _load_optimizer(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Load what the optimizer has gathered. Its options are those that this run was given: they may have changed."""
    own = [{name: value for name, value in group.items() if name != "params"} for group in optimizer.param_groups]
    load_optimizer_state_dict(optimizer, state)
    if type(optimizer).__module__.startswith(("torch.optim.", "sslbook.")):  # others keep some state in their options
        for group, options in zip(optimizer.param_groups, own):
            group.update(options)
    for parameter, kept in optimizer.state.items():
        for name in LIKE_PARAMETER:
            if name in kept and kept[name] is not None and kept[name].shape != parameter.shape:
                raise ValueError(f"optimizer: {name} of another shape, {tuple(kept[name].shape)}")


def _require_same_run(state: dict[str, Any], run: Run, optimizer: str) -> None:
    own = {"method": type(run.method).__name__, "batch_size": run.batch_size}
    own |= {"steps_per_epoch": run.clock.steps_per_epoch, "seed": run.clock.seed}
    own |= {"optimizer": optimizer}
    written = {**state, "method": state["description"]["method"], "optimizer": state.get("optimizer_class", optimizer)}
    own |= {f"shape of {name}": tuple(value.shape) for name, value in run.method.state_dict().items()}
    written |= {f"shape of {name}": tuple(value.shape) for name, value in state["method"].items()}
    for name, value in own.items():
        if written.get(name) != value:
            raise UserError(
                f"--resume: the checkpoint was written with {name} {written.get(name)}, this run has {value}; "
                "go on with the same options, or start anew from its weights with --init_from"
            )


def write_config(run: Run) -> None:
    """Write down the run's options: `config.yaml`."""
    checkpoint.write_text(run.folder / "config.yaml", yaml.safe_dump(run.config, sort_keys=False))


def record_changes(run: Run) -> None:
    """Write down with which other options a run goes on: `config-from-step-N.yaml`, beside its first `config.yaml`."""
    first = run.folder / "config.yaml"
    if not distributed.is_main():
        return
    if not first.is_file():  # it goes on in a folder of its own
        return write_config(run)
    before, now = _flat(read_yaml(first)), _flat(run.config)
    changes = [
        f"{name}: {before.get(name)} -> {now.get(name)}"
        for name in sorted({*before, *now})
        if before.get(name) != now.get(name) and name != "init_from"
    ]
    if changes:
        path = run.folder / f"config-from-step-{run.clock.step:08d}.yaml"
        lines = "".join(f"# {change}\n" for change in changes)
        checkpoint.write_text(path, lines + yaml.safe_dump(run.config, sort_keys=False))
        print(f"goes on with other options, written to {path.name}: {'; '.join(changes)[:500]}")


def _flat(values: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(values, dict) or not values:
        return {prefix.rstrip("."): values}
    return {name: value for key, inner in values.items() for name, value in _flat(inner, f"{prefix}{key}.").items()}


def rename_newer_checkpoints(folder: Path, step: int) -> None:
    """Rename, never delete, checkpoints of later steps than the one that the run goes on from."""
    if not distributed.is_main():
        return
    for path in checkpoint.checkpoints(folder):
        if int(path.stem.rpartition("-")[2]) > step:
            number = 1
            while (aside := folder / f"aside-{number}-{path.name}").exists():
                number += 1
            path.rename(aside)
            print(f"{path.name} is newer than step {step} and was renamed to {aside.name}")


def _random_states(device: torch.device) -> list[dict[str, torch.Tensor]]:
    """Torch's generators in every process: they serve what is not counter-based, such as drop path."""
    own = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        own["cuda"] = torch.cuda.get_rng_state(device)
    if distributed.world_size() == 1:
        return [own]
    states: list[Any] = [None] * distributed.world_size()
    torch.distributed.all_gather_object(states, own)
    return states


def _set_random_states(states: list[dict[str, torch.Tensor]], seed: int, device: torch.device) -> None:
    if len(states) != distributed.world_size():  # another number of processes: nothing to continue
        torch.manual_seed(seed + distributed.rank())
        return
    own = states[distributed.rank()]
    torch.set_rng_state(own["cpu"])
    if device.type == "cuda" and "cuda" in own:
        torch.cuda.set_rng_state(own["cuda"], device)
