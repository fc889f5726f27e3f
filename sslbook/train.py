"""Pre-training: one loop, read downwards.

python -m sslbook.train                                   SimCLR on the Shapes data set, two minutes on a CPU
python -m sslbook.train mae --data.folder PHOTOS --epochs 5
torchrun --nproc-per-node 8 -m sslbook.train moco --recipe imagenet --data.root data
"""

import copy
import re
import signal
import sys
import time
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
import yaml

from sslbook import checkpoint, distributed
from sslbook.data.loader import Data
from sslbook.data.views import View
from sslbook.errors import UserError, nearest
from sslbook.hooks import Hook, Metrics, Progress, Run, keep_for_replay
from sslbook.methods.base import Method
from sslbook.nn.backbones import describe
from sslbook.nn.batch_norm import convert_batch_norm
from sslbook.optim import ParamRule, parameter_groups
from sslbook.schedules import Clock, Constant, Duration, Schedule, in_steps
from sslbook.weights.backbone import export_backbone
from sslbook.weights.load import load_weights

ERROR_HINTS = {  # what torch says of batches and images that are too small or too large, and what to do about it
    "Expected more than 1 value per channel": "batch norm needs more than one image at a time: raise --batch_size, or "
    "lower --grad_accum_steps",
    "Kernel size can't be greater than actual input size": "the views are too small for the backbone: raise their size",
    "doesn't match model": "this network of timm takes images of one size: give the views that size, or the network "
    "theirs by --method.backbone.dict_kwargs.img_size, or by --method.backbone.dict_kwargs.dynamic_img_size true",
    "can't allocate memory": "out of memory: lower --batch_size or the views' size, or raise --grad_accum_steps",
}
CHECKPOINT = (  # its entries
    *("method", "optimizer", "scaler", "step", "steps_per_epoch", "batch_size"),
    *("seed", "seconds", "figures", "best", "random", "description"),
)
OWN_FILES = ("metrics.jsonl", "backbone.safetensors", "best.pt", "report.json")  # of a run that took a step


def pretrain(
    method: Method,
    data: Data,
    optimizer: Callable[[Iterable], torch.optim.Optimizer],
    schedule: Schedule = Constant(),
    weight_decay_schedule: Schedule | None = None,
    rules: list[ParamRule] | None = None,
    base_batch_size: int | None = None,
    decay_bias_and_norm: bool = False,
    layer_decay: float | None = None,
    batch_size: int = 256,
    epochs: float = 100,
    steps: int | None = None,
    grad_accum_steps: int = 1,
    clip_grad_norm: float | None = None,
    precision: Literal["float32", "bf16", "fp16"] = "float32",
    channels_last: bool = False,
    compile: bool = False,
    seed: int = 0,
    device: str | None = None,
    backend: Literal["nccl", "gloo"] | None = None,
    cudnn_benchmark: bool = True,
    out_dir: str | None = None,
    resume: str | None = None,
    init_from: str | None = None,
    checkpoint_every: Duration = 1,
    keep_last: int = 1,
    monitor: str | None = None,
    log_every: int = 10,
    progress: bool = True,
    hooks: list[Hook] | None = None,
    report: Literal["full", "quick", "none"] = "full",
    config: dict[str, Any] | None = None,
) -> Run:
    """Train a method on images.

    Args:
        method: what is learned.
        data: what it is learned from.
        optimizer: SGD, AdamW, LARS or any torch optimizer, with its options.
        schedule: factor of the learning rate over the run.
        weight_decay_schedule: factor of the weight decay over the run.
        rules: options for parameters by name; the first whose pattern matches wins.
        base_batch_size: scale the learning rate by batch size / this number.
        decay_bias_and_norm: weight decay (and LARS' scaling) also for biases and normalizations.
        layer_decay: factor of the learning rate for every layer further from the backbone's end.
        batch_size: images per optimizer step, over all processes.
        epochs: passes over the data.
        steps: optimizer steps, instead of epochs.
        grad_accum_steps: split every batch into this many parts that are computed one after the other.
        clip_grad_norm: greatest norm of the gradient.
        precision: float32, or automatic mixed precision in bf16 or fp16.
        channels_last: memory layout that suits convolutions on GPUs.
        compile: compile the networks with torch.compile.
        seed: everything random depends on it.
        device: cpu, cuda, cuda:1; a GPU if there is one.
        backend: how processes talk; NCCL on GPUs and gloo on CPUs.
        cudnn_benchmark: let cuDNN try which convolution is fastest.
        out_dir: the run's folder; by default a new one under runs/.
        resume: go on with a run: its folder or a checkpoint, or auto for the newest, if there is one.
        init_from: start from these weights (checkpoint, exported backbone or state dict) as a new run.
        checkpoint_every: duration between checkpoints, in epochs, or such as '500 steps'.
        keep_last: how many checkpoints to keep; 0 keeps all.
        monitor: also keep the checkpoint with the highest value of this figure, such as knn (needs its hook).
        log_every: steps between lines of metrics.jsonl.
        progress: show a progress bar.
        hooks: what else watches the run: OnlineKNN, Images, TensorBoard, WandB, or your own.
        report: what the command line measures and draws at the end; quick leaves the trained controls out.
        config: the resolved configuration, kept in the run's folder.

    Raises:
        UserError: something the caller can mend.
    """
    # -- where ---------------------------------------------------------------------------------------------------------
    where = distributed.setup(backend, device)
    torch.backends.cudnn.benchmark = cudnn_benchmark
    processes, rank = distributed.world_size(), distributed.rank()
    _check_batch(batch_size, grad_accum_steps, processes)
    _check_numbers(
        log_every=log_every,
        clip=clip_grad_norm,
        layer_decay=layer_decay,
        base_batch_size=base_batch_size,
        keep=keep_last,
    )
    measured = [name for hook in hooks or [] for name in hook.measures or ()]
    if monitor is not None and monitor not in measured and all(hook.measures is not None for hook in hooks or []):
        raise UserError(
            f"best: nothing measures {monitor!r}{nearest(monitor, measured)}; add a hook that does, such as OnlineKNN"
        )
    steps_per_epoch = data.steps_per_epoch(batch_size)
    total_steps = steps if steps is not None else round(epochs * steps_per_epoch)
    if total_steps < 1:
        raise UserError(f"epochs {epochs} and steps {steps} leave nothing to do; ask for at least one step")
    every = in_steps(checkpoint_every, total_steps, steps_per_epoch)
    clock = Clock(step=0, total_steps=total_steps, steps_per_epoch=steps_per_epoch, seed=seed)
    folder, state = _open_folder(method, data, out_dir, resume, init_from)

    # -- what ----------------------------------------------------------------------------------------------------------
    if processes > 1:
        convert_batch_norm(method)  # in place: a method is not a normalization itself
    method.to(where)
    method.setup(data)
    fresh = method.backbone
    if init_from is not None and state is None:
        fresh = copy.deepcopy(fresh).cpu()  # the controls begin where nothing has been learned
        loaded = load_weights(method, Path(init_from))
        method.on_weights_loaded(loaded.taken)
        if distributed.is_main():
            print(f"weights: {loaded}")
    if channels_last:
        method.to(memory_format=torch.channels_last)  # pyrefly: ignore
    lr_factor = batch_size / base_batch_size if base_batch_size else 1.0
    opt, plans = parameter_groups(
        method,
        optimizer,
        rules=rules or [],
        schedule=schedule,
        weight_decay_schedule=weight_decay_schedule,
        decay_bias_and_norm=decay_bias_and_norm,
        layer_decay=layer_decay,
        lr_factor=lr_factor,
    )
    scaler = torch.amp.GradScaler(where.type, enabled=precision == "fp16")
    dtype = {"float32": None, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    autocast = torch.autocast(where.type, dtype) if dtype else nullcontext()
    run = Run(method, data, folder, clock, where, batch_size, config or _plain_config(locals()))
    watchers = [*(hooks or []), Metrics(log_every), *([Progress()] if progress else [])]  # what hooks measure is logged
    best_value = -float("inf")
    description = {
        "backbone": describe(method.backbone),
        "method": type(method).__name__,
        "view": _evaluation_view(method.views()[0]),
        "data": run.config.get("data", {}),
        "config": run.config,
    }

    # -- from where ----------------------------------------------------------------------------------------------------
    if state is not None:
        _check_same_run(state, method, batch_size, steps_per_epoch, seed)
        method.load_state_dict(state["method"])
        opt.load_state_dict(state["optimizer"])
        scaler.load_state_dict(state["scaler"])
        clock = run.clock = replace(clock, step=state["step"])
        run.seconds, run.figures, best_value = state["seconds"], dict(state["figures"]), state["best"]
        _set_random_states(state["random"], rank, seed, where)
        rename_newer_checkpoints(folder, clock.step)
    else:
        torch.manual_seed(seed + rank)  # only for what is not keyed, such as drop path
    if distributed.is_main():
        if state is None or not (folder / "config.yaml").exists():  # or the run goes on in a folder of its own
            checkpoint.write_text(folder / "config.yaml", yaml.safe_dump(run.config, sort_keys=False))
        if state is None and report != "none":
            export_backbone(folder / "initial.safetensors", fresh, description)

    for module in _compilable(method) if compile else ():
        module.compile()
    model = method
    if processes > 1:
        model = distributed.data_parallel(method, where)
    method.train()

    def save() -> None:
        random = _random_states(where)  # of all processes
        if not all(bool(torch.isfinite(p).all()) for p in method.parameters()):
            raise UserError(
                f"weights became NaN or Inf by step {clock.step}, though the loss was a number; they were not saved, the "
                "last checkpoint is as it was: lower the learning rate, or set --clip_grad_norm"
            )
        if distributed.is_main():
            path = folder / f"checkpoint-{clock.step:08d}.pt"
            contents = {
                "method": method.state_dict(),
                "optimizer": opt.state_dict(),
                "scaler": scaler.state_dict(),
                "step": clock.step,
                "steps_per_epoch": steps_per_epoch,
                "batch_size": batch_size,
                "seed": seed,
                "seconds": run.seconds,
                "figures": run.figures,
                "best": best_value,
                "random": random,
                "description": description,
            }
            if improved:  # first, since the checkpoint says that it is there
                checkpoint.save(folder / "best.pt", contents)
            checkpoint.save(path, contents)
            for old in checkpoint.checkpoints(folder)[:-keep_last] if keep_last else []:
                old.unlink()
            for hook in watchers:
                hook.save(run, path)

    # -- the loop ------------------------------------------------------------------------------------------------------
    leaving = PreemptionHandler()
    improved, started = False, []
    try:
        for hook in watchers:
            hook.start(run)
            started.append(hook)
        while clock.step < total_steps and not leaving.now:
            place = clock.step % steps_per_epoch  # steps of this epoch already taken, by a run that was resumed
            if place == 0:
                method.before_epoch(data, clock)
            batches = iter(
                data.batches(
                    method.views(),
                    batch_size // grad_accum_steps,
                    seed=seed,
                    epoch=clock.epoch,
                    start=place * grad_accum_steps,
                    stop=steps_per_epoch * grad_accum_steps,  # a last part that fills no step is not made
                    rank=rank,
                    world_size=processes,
                    device=where,
                    order=method.sample_order(data, clock),
                )
            )
            for _ in range(place, steps_per_epoch):
                began = time.perf_counter()
                for plan, group in zip(plans, opt.param_groups):
                    plan.apply(group, clock)

                logged: dict[str, float] = {}
                for part in range(grad_accum_steps):
                    batch = next(batches)
                    if channels_last:
                        views = tuple(view.contiguous(memory_format=torch.channels_last) for view in batch.views)
                        batch = batch._replace(views=views)
                    wait = (
                        part < grad_accum_steps - 1 and processes > 1
                    )  # gradients are exchanged once, with the last part
                    with model.no_sync() if wait else nullcontext():  # pyrefly: ignore
                        with autocast:
                            out_of_step = model(batch, clock)
                        loss = out_of_step["loss"]
                        scaler.scale(loss / grad_accum_steps).backward()
                    values = distributed.all_reduce_mean(
                        torch.stack([v.detach().float() for v in out_of_step.values()])
                    ).tolist()
                    for name, value in zip(out_of_step, values):
                        logged[name] = logged.get(name, 0.0) + value / grad_accum_steps
                    if not abs(logged["loss"]) < float("inf"):
                        path = keep_for_replay(run, batch, loss, opt)
                        raise UserError(
                            f"the loss became {logged['loss']} at step {clock.step} (epoch {clock.epoch}); batch and "
                            f"state are in {path}: look with python -m sslbook.tools.replay, or lower the learning rate"
                        )

                if clip_grad_norm is not None:
                    scaler.unscale_(opt)
                    parameters = [p for group in opt.param_groups for p in group["params"]]
                    logged["gradient_norm"] = float(torch.nn.utils.clip_grad_norm_(parameters, clip_grad_norm))
                scaler.step(opt)
                scaler.update()
                opt.zero_grad(set_to_none=True)
                logged["lr"] = opt.param_groups[0]["lr"]

                clock = run.clock = replace(clock, step=clock.step + 1)
                method.after_step(clock)

                took = time.perf_counter() - began
                run.seconds += took
                rate = batch_size / took
                run.images_per_second += (rate - run.images_per_second) * (0.1 if run.images_per_second else 1)
                run.metrics = logged
                for hook in watchers:
                    hook.step(run)
                ended = clock.step == total_steps
                if clock.step % steps_per_epoch == 0 or ended:
                    method.eval()
                    for hook in watchers:
                        hook.epoch(run)
                    method.train()
                    if monitor is not None:
                        if monitor in run.figures:
                            improved = run.figures[monitor] > best_value
                            best_value = max(best_value, run.figures[monitor])
                        elif monitor not in measured or ended:
                            raise UserError(f"best: nothing measures {monitor!r}{nearest(monitor, list(run.figures))}")
                leaving.agree(where)
                if ended or leaving.now or improved or (every and clock.step % every == 0):
                    save()
                    improved = False
                if ended or leaving.now:
                    break
    finally:
        leaving.restore()
        for hook in started:
            hook.end(run)

    run.finished = clock.step >= total_steps
    run.peak_memory = _peak_memory(where)
    method.eval()
    if distributed.is_main():
        export_backbone(folder / "backbone.safetensors", method.backbone, description)
    distributed.barrier()
    return run


# -- the parts of it ---------------------------------------------------------------------------------------------------


def _peak_memory(where: torch.device) -> float:
    """The most memory used so far, in MB: by tensors on the GPU, or by the whole process."""
    if where.type == "cuda":
        return torch.cuda.max_memory_allocated(where) / 2**20
    try:
        import resource
    except ImportError:  # Windows
        return 0.0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)  # bytes there, KB elsewhere


def _check_batch(batch_size: int, accumulate: int, processes: int) -> None:
    if batch_size < 1 or accumulate < 1 or batch_size % (accumulate * processes):
        raise UserError(
            f"a batch of {batch_size} cannot be shared evenly by {processes} process(es) in {accumulate} part(s): "
            f"make --batch_size a multiple of {max(1, accumulate) * processes}"
        )


def _check_numbers(*, keep: int, **positive: float | None) -> None:
    for name, value in positive.items():
        if value is not None and not value > 0:
            raise UserError(f"--{name} is {value}: give a number above 0")
    if keep < 0:
        raise UserError(f"--keep_last is {keep}: give how many checkpoints to keep, or 0 for all")


def _open_folder(
    method: Method, data: Data, out: str | None, resume: str | None, weights: str | None
) -> tuple[Path, dict[str, Any] | None]:
    """The run's folder, and the checkpoint to go on from; the main process decides for all."""
    answer: list[Any] = [None, None, None]
    if distributed.is_main():
        try:
            answer[:2] = _choose_folder(method, data, out, resume)
        except UserError as error:
            answer[2] = str(error)
    folder, path, refusal = distributed.broadcast(answer)
    if refusal is not None:
        raise UserError(refusal)
    if path is not None and weights is not None and resume != "auto":
        raise UserError("--init_from starts a new run and --resume goes on with an old one: give one of them")
    return Path(folder), checkpoint.load(Path(path), *CHECKPOINT) if path is not None else None


def _choose_folder(method: Method, data: Data, out: str | None, resume: str | None) -> tuple[str, str | None]:
    stem = f"{type(method).__name__.lower()}-{data.name}"
    if out is not None and not out.strip():
        raise UserError("--out_dir is empty: name a folder, or leave it out")
    if resume is not None and resume != "auto":
        path = checkpoint.find(Path(resume))
        folder = Path(out) if out is not None else path.parent
        if out is not None and folder.resolve() != path.parent.resolve():
            _refuse_used(folder)
            _make(folder)
        return str(folder), str(path)
    if resume == "auto":
        own = re.compile(re.escape(stem) + r"(-\d+)?")
        every = list(Path("runs").iterdir()) if Path("runs").is_dir() else []
        runs = [Path(out)] if out is not None else [p for p in every if own.fullmatch(p.name) and _learns(p, data)]
        found = [path for run in runs if run.is_dir() for path in checkpoint.checkpoints(run)[-1:]]
        if found:
            newest = max(found, key=lambda path: path.stat().st_mtime)
            return str(newest.parent), str(newest)
    if out is not None:
        if resume != "auto" or not (Path(out) / "config.yaml").exists():
            _refuse_used(Path(out))
        _make(Path(out))
        return out, None
    for number in range(1, 1_000_000):
        folder = Path("runs") / (stem if number == 1 else f"{stem}-{number}")
        if not folder.exists():
            _make(folder)
            return str(folder), None
    raise UserError("runs/ is full; clear it out")


def _learns(run: Path, data: Data) -> bool:
    """Whether the run's configuration names these data; folders of the same name may lie in different places."""
    try:
        written = yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8"))["data"]
        folder, name = written.get("folder"), written.get("name", "shapes")
    except (OSError, yaml.YAMLError, KeyError, TypeError, AttributeError):
        return True  # started from Python, where nothing is written of the data
    if folder is None or data.folder is None:
        return folder is None and data.folder is None and name == data.name
    return Path(folder).expanduser().resolve() == Path(data.folder).expanduser().resolve()


def _make(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{folder}: cannot be made ({error.strerror}); choose another --out_dir") from None


def _refuse_used(folder: Path) -> None:
    if folder.is_file():
        raise UserError(f"{folder}: is a file; --out_dir needs a folder")
    if folder.is_dir() and checkpoint.checkpoints(folder):
        raise UserError(f"{folder}: holds another run; choose another --out_dir, or go on with it by --resume {folder}")
    if folder.is_dir() and any((folder / name).exists() for name in OWN_FILES):
        raise UserError(f"{folder}: holds another run, without checkpoints; choose another --out_dir, or delete it")


def _check_same_run(state: dict, method: Method, batch_size: int, steps_per_epoch: int, seed: int) -> None:
    own = {
        "method": type(method).__name__,
        "batch_size": batch_size,
        "steps_per_epoch": steps_per_epoch,
        "seed": seed,
    }
    was = {**state, "method": state["description"]["method"]}
    for name, value in own.items():
        if was[name] != value:
            raise UserError(
                f"--resume: the checkpoint was made with {name} {was[name]}, this run has {value}; "
                "go on with the same, or start anew from its weights with --init_from"
            )
    found = {name: tuple(value.shape) for name, value in state["method"].items()}
    for name, value in method.state_dict().items():
        if found.get(name) != tuple(value.shape):
            shape = found.get(name, "missing")
            raise UserError(
                f"--resume: {name} is {tuple(value.shape)} here and {shape} in the checkpoint; same options?"
            )


def _evaluation_view(view: View) -> dict[str, Any]:
    """How the backbone wants its images."""
    return {"size": view.size, "mean": list(view.mean), "std": list(view.std)}


def _plain_config(values: dict[str, Any]) -> dict[str, Any]:
    """What can be written down of a run that was started from Python."""
    plain = (str, int, float, bool, type(None))
    return {
        name: value for name, value in values.items() if isinstance(value, plain) and name not in ("out_dir", "resume")
    }


def _compilable(method: Method) -> list[torch.nn.Module]:
    """Transformer blocks one by one (they share one compilation), and every other backbone whole."""
    blocks = [m for name, m in method.named_modules() if name.split(".")[-1].isdigit() and "blocks" in name]
    return blocks or [method.backbone]


def _random_states(where: torch.device) -> list[dict[str, torch.Tensor]]:
    own = {"cpu": torch.get_rng_state()}
    if where.type == "cuda":
        own["cuda"] = torch.cuda.get_rng_state(where)
    if distributed.world_size() == 1:
        return [own]
    states: list[Any] = [None] * distributed.world_size()
    torch.distributed.all_gather_object(states, own)
    return states


def _set_random_states(states: list[dict[str, torch.Tensor]], rank: int, seed: int, where: torch.device) -> None:
    if len(states) != distributed.world_size():  # there is nothing to continue
        torch.manual_seed(seed + rank)
        return
    torch.set_rng_state(states[rank]["cpu"])
    if where.type == "cuda" and "cuda" in states[rank]:
        torch.cuda.set_rng_state(states[rank]["cuda"], where)


def rename_newer_checkpoints(folder: Path, step: int) -> None:
    """Checkpoints that lie ahead of the one we go on from belong to another past: they are renamed, not deleted."""
    if not distributed.is_main():
        return
    for path in checkpoint.checkpoints(folder):
        if int(path.stem.rpartition("-")[2]) > step:
            number = 1
            while (aside := folder / f"aside-{number}-{path.name}").exists():
                number += 1
            path.rename(aside)
            print(f"{path.name} lies ahead of step {step} and was renamed to {aside.name}")


class PreemptionHandler:
    """SIGTERM or Ctrl-C: finish the step, save, leave. The second Ctrl-C leaves at once."""

    def __init__(self) -> None:
        self.asked, self.now, self.old = False, False, {}
        try:
            for number in (signal.SIGTERM, signal.SIGINT):
                self.old[number] = signal.signal(number, self._ask)
        except ValueError:  # not the main thread: whoever runs us handles signals
            pass

    def _ask(self, number: int, frame: object) -> None:
        if self.asked and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.asked = True

    def agree(self, device: torch.device) -> None:
        """All processes leave after the same step: when any of them was asked to."""
        if distributed.world_size() == 1:
            self.now = self.asked
        else:
            self.now = bool(distributed.all_reduce_mean(torch.tensor(float(self.asked), device=device)) > 0)

    def restore(self) -> None:
        for number, handler in self.old.items():
            signal.signal(number, handler)


# -- the command -------------------------------------------------------------------------------------------------------


def main(argv: list[str] | None = None) -> None:
    """`python -m sslbook.train`."""
    from sslbook import configuration

    parser, config, resolved = configuration.resolve(sys.argv[1:] if argv is None else argv, pretrain)
    if not -(2**63) <= config.seed < 2**63:
        raise UserError(f"--seed is {config.seed}: give a number of at most 64 bits")
    torch.manual_seed(config.seed)  # the fresh weights
    distributed.setup(config.backend, config.device)  # from here on, what is said once is said once
    try:
        options = vars(parser.construct(config))
        for name in ("config", "recipe"):
            options.pop(name, None)
        if distributed.is_main():
            print(options["data"].describe())
        run = pretrain(**options, config=resolved)
        if not run.finished:
            if distributed.is_main():
                print(f"stopped after step {run.clock.step}; go on with: python -m sslbook.train --resume {run.folder}")
        elif options.get("report", "full") != "none":
            reporting = distributed.is_main()
            distributed.shutdown()  # what is measured now is one process's work, and must not wait for the others
            if reporting:
                from sslbook.report import report

                report(run, full=options.get("report", "full") == "full")
    except torch.OutOfMemoryError as error:
        raise UserError(
            f"out of GPU memory: lower --batch_size or raise --grad_accum_steps ({error})".split("\n")[0]
        ) from None
    except (ValueError, RuntimeError, AssertionError) as error:
        cure = next((cure for words, cure in ERROR_HINTS.items() if words in str(error)), None)
        if isinstance(error, UserError) or cure is None:
            raise
        raise UserError(cure) from None
    finally:
        distributed.shutdown()


if __name__ == "__main__":
    from sslbook.configuration import run as run_command

    run_command(main)
