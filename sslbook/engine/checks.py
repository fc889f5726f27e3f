"""What a run is asked for, compared with what it can be, before any work."""

from typing import Any

from torch import nn

from sslbook import distributed
from sslbook.data.loader import Data
from sslbook.engine.hooks import Hook
from sslbook.errors import UserError, nearest
from sslbook.methods.base import Method
from sslbook.nn.backbones import in_channels


def plain_values(given: dict[str, Any]) -> dict[str, Any]:
    """What can be written down of the options of a run that was started from Python."""
    plain = (str, int, float, bool, type(None))
    paths = ("out_dir", "resume", "config")
    return {name: value for name, value in given.items() if isinstance(value, plain) and name not in paths}


def check_options(method: Method, data: Data, **given: Any) -> None:
    """Compare the options of `pretrain` with each other.

    Args:
        method: what is trained.
        data: what it learns from.
        given: the other options, by their names.

    Raises:
        UserError: an option, or two together, cannot be.
    """
    _require_objects(method=method, data=data, **given)
    _require_monitored(given["monitor"], given["hooks"] or [])
    _require_parts(method, given["batch_size"], given["grad_accum_steps"])
    _require_channels(method, data)
    if given["resume"] not in (None, "auto") and given["init_from"] is not None:
        raise UserError("--init_from starts a new run and --resume goes on with an old one: give one of them")
    if given["parallel"] == "fsdp" and (given["compile"] or given["precision"] == "fp16"):
        raise UserError("--parallel fsdp goes with --precision float32 or bf16, and without --compile")


def _require_objects(**given: Any) -> None:
    """Texts stand for objects on the command line only; from Python they would fail later, and less clearly."""
    schedule, precisions = given["schedule"], ("float32", "bf16", "fp16")
    wanted: dict[str, tuple[bool, str]] = {
        "method": (isinstance(given["method"], nn.Module), "SimCLR(resnet18())"),
        "data": (isinstance(given["data"], Data), "Data(folder='photos')"),
        "optimizer": (callable(given["optimizer"]), "functools.partial(torch.optim.AdamW, lr=1e-3)"),
        "schedule": (schedule is None or callable(schedule), "sslbook.schedules.Cosine()"),
        "precision": (given["precision"] in precisions, "'float32', 'bf16' or 'fp16'"),
        "parallel": (given["parallel"] in ("ddp", "fsdp"), "'ddp' or 'fsdp'"),
    }
    for name, (suits, example) in wanted.items():
        if not suits:
            raise UserError(f"pretrain({name}={given[name]!r}): give {example}")


def _require_monitored(monitor: str | None, hooks: list[Hook]) -> None:
    measured = [name for hook in hooks for name in hook.measures]
    if monitor is not None and monitor not in measured:
        hint = nearest(monitor, measured) or "; add a hook that does: --hooks OnlineKNN"
        raise UserError(f"--monitor: nothing measures {monitor!r}{hint}")


def _require_parts(method: Method, batch_size: int, grad_accum_steps: int) -> None:
    if (images := batch_size // grad_accum_steps) < method.min_images:
        raise UserError(
            f"{type(method).__name__} compares at least {method.min_images} images and gets {images} at a time: "
            "raise --batch_size, or lower --grad_accum_steps"
        )
    parts = grad_accum_steps * distributed.world_size()
    if batch_size % parts:
        raise UserError(
            f"a batch of {batch_size} cannot be shared evenly by {distributed.world_size()} process(es) in "
            f"{grad_accum_steps} part(s): make --batch_size a multiple of {parts}"
        )


def _require_channels(method: Method, data: Data) -> None:
    channels, taken = data.channels or 3, in_channels(method.backbone)
    if method.rgb_only and channels != 3:
        raise UserError(
            f"{type(method).__name__} is about red, green and blue, and the images have {channels} channels"
        )
    if channels != taken:
        cure = f"give it in_channels {channels} (--method.backbone.in_channels {channels})"
        raise UserError(f"the images have {channels} channels and the backbone takes {taken}: {cure}")
