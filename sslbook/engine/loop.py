"""Pre-training: one loop, read downwards.

>>> run = pretrain(SimCLR(resnet18()), Data(), partial(torch.optim.AdamW, lr=1e-3), epochs=10)
"""

import copy
import math
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from sslbook import checkpoint, distributed
from sslbook.data.loader import Batch, Data
from sslbook.engine.checks import check_options, plain_values
from sslbook.engine.guard import Guard
from sslbook.engine.heartbeat import Heartbeat
from sslbook.engine.hooks import Hook, MetricsLog, Progress, watching
from sslbook.engine.preemption import PreemptionHandler
from sslbook.engine.resume import CONTENTS, TrainState, description, record_changes, write_config
from sslbook.engine.run import Run
from sslbook.engine.run_folder import open_folder, removed_if_unstarted
from sslbook.engine.sharding import is_sharded, make_whole, shard, whole
from sslbook.errors import UserError
from sslbook.methods.base import Method
from sslbook.nn.batch_norm import convert_batch_norm
from sslbook.optim import ParamRule, parameter_groups
from sslbook.schedules import Clock, Constant, Duration, Schedule, in_steps
from sslbook.types import PositiveFloat, PositiveInt
from sslbook.weights.backbone import export_backbone
from sslbook.weights.load import load_weights

PRECISIONS = {"float32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


def pretrain(
    method: Method,
    data: Data,
    optimizer: Callable[[Iterable], torch.optim.Optimizer],
    schedule: Schedule | None = None,
    weight_decay_schedule: Schedule | None = None,
    rules: list[ParamRule] | None = None,
    base_batch_size: PositiveInt | None = None,
    decay_bias_and_norm: bool = False,
    layer_decay: PositiveFloat | None = None,
    batch_size: PositiveInt = 256,
    epochs: PositiveFloat = 100,
    steps: PositiveInt | None = None,
    grad_accum_steps: PositiveInt = 1,
    clip_grad_norm: PositiveFloat | None = None,
    precision: Literal["float32", "bf16", "fp16"] = "float32",
    channels_last: bool = False,
    compile: bool = False,
    parallel: Literal["ddp", "fsdp"] = "ddp",
    seed: int = 0,
    device: str | None = None,
    out_dir: str | Path | None = None,
    resume: str | Path | None = None,
    init_from: str | Path | None = None,
    checkpoint_every: Duration = 1,
    keep_last: int = 1,
    monitor: str | None = None,
    log_every: PositiveInt = 10,
    progress: bool = True,
    guard: bool = False,
    hooks: list[Hook] | None = None,
    config: dict[str, Any] | None = None,
) -> Run:
    """Train a method on images.

    Args:
        method: the self-supervised method, with its backbone.
        data: the images.
        optimizer: SGD, AdamW, LARS or any torch optimizer, with its options.
        schedule: factor of the learning rate over the run; by default constant.
        weight_decay_schedule: factor of the weight decay over the run.
        rules: options for parameters by name; the first whose pattern matches wins.
        base_batch_size: scale the learning rate by batch size / this number.
        decay_bias_and_norm: weight decay (and LARS' scaling) also for biases and normalizations.
        layer_decay: factor of the learning rate for every layer further from the backbone's end.
        batch_size: images per optimizer step, over all processes.
        epochs: passes over the data.
        steps: optimizer steps, instead of epochs.
        grad_accum_steps: split every batch into this many parts whose gradients are added.
        clip_grad_norm: greatest norm of the whole gradient.
        precision: float32, or automatic mixed precision in bf16 or fp16.
        channels_last: memory layout that suits convolutions on GPUs.
        compile: compile the networks with torch.compile.
        parallel: several processes each hold the whole method (ddp), or a shard of it, for models that outgrow a GPU (fsdp).
        seed: everything random depends on it.
        device: cpu, cuda, cuda:1; by default a GPU if there is one.
        out_dir: the run's folder; by default a new one under runs/.
        resume: go on with a run: its folder or a checkpoint, or auto for the newest, if there is one.
        init_from: start a new run from these weights (checkpoint, exported backbone or state dict).
        checkpoint_every: duration between checkpoints, in epochs, or such as '500 steps'.
        keep_last: how many checkpoints to keep; 0 keeps all.
        monitor: also keep the checkpoint with the highest value of this metric, such as knn (needs its hook).
        log_every: steps between lines of metrics.jsonl.
        progress: show a progress bar.
        guard: end the run, with what to try, when features collapse or an EMA teacher stands still; else it warns.
        hooks: what else watches the run: OnlineKNN, Plots, TensorBoard, WandB, or your own.
        config: the resolved configuration, kept in the run's folder.

    Returns:
        The run: the trained method, its folder, metrics and evaluations; `finished` is false if it was stopped.

    Raises:
        UserError: an option, the data or a file does not suit; the loss or a weight became NaN or infinite.
    """
    # -- device and folder ---------------------------------------------------------------------------------------------
    given = dict(locals())
    config = config or plain_values(given)
    schedule = schedule or Constant()
    run_device = distributed.setup(device=device)
    check_options(**given)
    steps_per_epoch = data.steps_per_epoch(batch_size)
    total_steps = max(1, round(epochs * steps_per_epoch)) if steps is None else steps
    save_every = in_steps(checkpoint_every, total_steps, steps_per_epoch)
    folder, resumed, lock = open_folder(method, data, out_dir, resume)

    with removed_if_unstarted(folder, new=resumed is None), lock:
        state = None if resumed is None else checkpoint.load(resumed, *CONTENTS)
        # -- model and optimizer ---------------------------------------------------------------------------------------
        clock = Clock(0, total_steps, steps_per_epoch, seed)
        run = Run(method, data, folder, clock, run_device, batch_size, config)
        _set_up(run, init_from, channels_last, new=state is None)
        if parallel == "fsdp" and distributed.world_size() > 1:
            shard(method, run_device)
        optim, plans = parameter_groups(
            method,
            optimizer,
            rules=rules or [],
            schedule=schedule,
            weight_decay_schedule=weight_decay_schedule,
            decay_bias_and_norm=decay_bias_and_norm,
            layer_decay=layer_decay,
            lr_factor=batch_size / base_batch_size if base_batch_size else 1.0,
        )
        scaler = torch.amp.GradScaler(run_device.type, enabled=precision == "fp16")
        train_state = TrainState(run, optim, scaler, monitor)
        loggers = [Heartbeat(), Guard(stop=guard), MetricsLog(log_every), *([Progress()] if progress else [])]
        watchers = [*(hooks or []), *loggers]  # in this order: what hooks measure is logged

        # -- resume ----------------------------------------------------------------------------------------------------
        if state is not None:
            train_state.restore(state, resumed)
            record_changes(run)
        else:
            torch.manual_seed(seed + distributed.rank())  # only for what is not counter-based, such as drop path
        model = _parallel(method, run_device, compile)
        method.train()

        # -- loop ------------------------------------------------------------------------------------------------------
        stop = run.clock.step >= total_steps
        with PreemptionHandler() as preemption, watching(watchers, run):
            while not stop:
                if run.clock.step % steps_per_epoch == 0:
                    with whole(method):
                        method.before_epoch(data, run.clock)
                batches = _rest_of_epoch(run, grad_accum_steps, channels_last)
                while not stop:
                    started = time.perf_counter()
                    for plan, group in zip(plans, optim.param_groups):
                        plan.apply(group, run.clock)
                    run.metrics = _forward_backward(model, batches, run, grad_accum_steps, scaler, precision)
                    _update(run, optim, scaler, clip_grad_norm)
                    run.clock = replace(run.clock, step=run.clock.step + 1)
                    method.after_step(run.clock)
                    run.count_step(time.perf_counter() - started)

                    for hook in watchers:
                        hook.step(run)
                    stop = run.clock.step == total_steps
                    epoch_ended = run.clock.step % steps_per_epoch == 0
                    if epoch_ended or stop:
                        _end_epoch(run, watchers)
                        train_state.compare()
                    stop = preemption.agreed(run_device) or stop
                    if stop or train_state.improved or (save_every and run.clock.step % save_every == 0):
                        lock.require()
                        train_state.save(watchers, keep_last)
                    if epoch_ended:
                        break
    return _finish(run, preemption.requested)


# -- the parts of it, in order -----------------------------------------------------------------------------------------


def _set_up(run: Run, init_from: str | Path | None, channels_last: bool, new: bool) -> None:
    """Bring the method to its device and size; for a new run, load weights and write the folder's first files."""
    method, initial = run.method, run.method.backbone
    if distributed.world_size() > 1:
        convert_batch_norm(method)  # in place: a method is not a normalization itself
    torch.backends.cudnn.benchmark = True
    method.to(run.device)
    method.setup(run.data)
    if new and init_from is not None:
        initial = copy.deepcopy(initial).cpu()  # the random-weights control starts where nothing has been learned
        loaded = load_weights(method, Path(init_from))
        method.on_weights_loaded(loaded.taken)
        if distributed.is_main():
            print(f"init_from: {loaded}")
    if new and distributed.is_main():
        write_config(run)
        export_backbone(run.folder / "initial.safetensors", initial, description(run))
    if channels_last:
        method.to(memory_format=torch.channels_last)  # pyrefly: ignore


def _parallel(method: Method, device: torch.device, compile: bool) -> nn.Module:
    """The method, compiled if asked for, behind DDP if there are several processes."""
    if compile:  # transformer blocks one by one, since they share one compilation; any other backbone whole
        blocks = [m for name, m in method.named_modules() if "blocks" in name and name.split(".")[-1].isdigit()]
        for module in blocks or [method.backbone]:
            module.compile()
    copied = distributed.world_size() > 1 and not is_sharded(method)
    return distributed.data_parallel(method, device) if copied else method


def _rest_of_epoch(run: Run, grad_accum_steps: int, channels_last: bool) -> Iterator[Batch]:
    """The parts of batches that this epoch still has, from the step on where a resumed run stands."""
    clock, steps = run.clock, run.clock.steps_per_epoch
    batches = run.data.batches(
        run.method.views(),
        run.batch_size // grad_accum_steps,
        seed=clock.seed,
        epoch=clock.epoch,
        start=clock.step % steps * grad_accum_steps,
        stop=steps * grad_accum_steps,  # a last part that fills no step is not made
        rank=distributed.rank(),
        world_size=distributed.world_size(),
        device=run.device,
        order=run.method.sample_order(run.data, clock),
    )
    while True:
        started = time.perf_counter()
        batch = next(batches, None)
        run.seconds_waited += time.perf_counter() - started
        if batch is None:
            return
        if channels_last:
            views = tuple(view.contiguous(memory_format=torch.channels_last) for view in batch.views)
            batch = batch._replace(views=views)
        yield batch


def _forward_backward(
    model: nn.Module,
    batches: Iterator[Batch],
    run: Run,
    grad_accum_steps: int,
    scaler: torch.amp.GradScaler,
    precision: Literal["float32", "bf16", "fp16"],
) -> dict[str, float]:
    """Gradients of one step, added over its parts; returns what the method logs, averaged over processes and parts.

    Raises:
        UserError: the loss is NaN or infinite; the batch and the state are kept for `sslbook.tools.replay`.
    """
    dtype = PRECISIONS[precision]
    metrics: dict[str, float] = {}
    for part in range(grad_accum_steps):
        batch = next(batches)
        more = part < grad_accum_steps - 1 and hasattr(model, "no_sync")
        with model.no_sync() if more else nullcontext():  # pyrefly: ignore (DDP exchanges gradients once, at the end)
            with torch.autocast(run.device.type, dtype) if dtype else nullcontext():
                output = model(batch, run.clock)
            scaler.scale(output["loss"] / grad_accum_steps).backward()
        values = distributed.all_reduce_mean(torch.stack([value.detach().float() for value in output.values()]))
        for name, value in zip(output, values.tolist()):
            metrics[name] = metrics.get(name, 0.0) + value / grad_accum_steps
        if not math.isfinite(metrics["loss"]):
            with whole(run.method):
                path = _keep_failed_step(run, batch, output["loss"])
            raise UserError(
                f"the loss became {metrics['loss']} at step {run.clock.step} (epoch {run.clock.epoch}); batch and state "
                f"are in {path}: look with python -m sslbook.tools.replay, or lower the learning rate"
            )
    return metrics


def _update(
    run: Run, optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler, clip_grad_norm: float | None
) -> None:
    """One optimizer step on the gradients there are."""
    scaler.unscale_(optimizer)
    run.method.before_optimizer_step(run.clock)
    if clip_grad_norm is not None:
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        norm = nn.utils.clip_grad_norm_(parameters, clip_grad_norm)
        run.metrics["gradient_norm"] = float(distributed.full_tensor(norm))
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad(set_to_none=True)
    run.metrics["lr"] = optimizer.param_groups[0]["lr"]


def _keep_failed_step(run: Run, batch: Batch, loss: Tensor) -> Path:
    path = run.folder / f"failed-step-{run.clock.step}-rank-{distributed.rank()}.pt"
    contents = {
        "format": "sslbook failure 2",
        "method": run.method.state_dict(),
        "views": [view.cpu() for view in batch.views],
        "index": batch.index.cpu(),
        "label": batch.label.cpu(),
        "clock": vars(run.clock),
        "loss": loss.detach().item(),
    }
    checkpoint.write_atomically(path, lambda part: torch.save(contents, part))
    return path


def _end_epoch(run: Run, hooks: list[Hook]) -> None:
    run.method.eval()
    with whole(run.method):
        for hook in hooks:
            hook.epoch(run)
    run.method.train()


def _finish(run: Run, stopped_by: int) -> Run:
    run.finished, run.stopped_by = run.clock.step >= run.clock.total_steps, stopped_by
    run.measure_memory()
    make_whole(run.method)
    run.method.eval()
    if distributed.is_main():
        export_backbone(run.folder / "backbone.safetensors", run.method.backbone, description(run))
    distributed.barrier()
    return run
