"""What a run is asked for, compared with what it can be, before any work."""

from collections.abc import Iterator
from typing import Any

from torch import nn

from sslbook import distributed
from sslbook.data.loader import Data
from sslbook.errors import UserError, nearest
from sslbook.nn.backbones import in_channels


def plain_values(given: dict[str, Any]) -> dict[str, Any]:
    """What can be written down of the options of a run that was started from Python."""
    plain = (str, int, float, bool, type(None))
    paths = ("out_dir", "resume", "config")
    return {name: value for name, value in given.items() if isinstance(value, plain) and name not in paths}


def check_options(**given: Any) -> None:
    """Compare the options of `pretrain` with what they can be, and with each other.

    Args:
        given: all of them, by their names.

    Raises:
        UserError: the first that cannot be, and what to give instead.
    """
    if (problem := next(_problems(given), None)) is not None:
        raise UserError(problem)


def _problems(given: dict[str, Any]) -> Iterator[str]:
    # Texts stand for objects on the command line only; from Python they would fail later, and less clearly.
    method, data, schedule = given["method"], given["data"], given["schedule"]
    wanted: dict[str, tuple[bool, str]] = {
        "method": (isinstance(method, nn.Module), "SimCLR(resnet18())"),
        "data": (isinstance(data, Data), "Data(folder='photos')"),
        "optimizer": (callable(given["optimizer"]), "functools.partial(torch.optim.AdamW, lr=1e-3)"),
        "schedule": (schedule is None or callable(schedule), "sslbook.schedules.Cosine()"),
        "precision": (given["precision"] in ("float32", "bf16", "fp16"), "'float32', 'bf16' or 'fp16'"),
        "parallel": (given["parallel"] in ("ddp", "fsdp"), "'ddp' or 'fsdp'"),
    }
    for name, (suits, example) in wanted.items():
        if not suits:
            yield f"pretrain({name}={given[name]!r}): give {example}"

    name, batch_size, parts = type(method).__name__, given["batch_size"], given["grad_accum_steps"]
    if (images := batch_size // parts) < method.min_images:
        yield (
            f"{name} compares at least {method.min_images} images and gets {images} at a time: raise --batch_size, or "
            "lower --grad_accum_steps"
        )
    if batch_size % (parts * (processes := distributed.world_size())):
        yield (
            f"a batch of {batch_size} cannot be shared evenly by {processes} process(es) in {parts} part(s): make "
            f"--batch_size a multiple of {parts * processes}"
        )
    channels, taken = data.channels or 3, in_channels(method.backbone)
    if method.rgb_only and channels != 3:
        yield f"{name} is about red, green and blue, and the images have {channels} channels"
    if channels != taken:
        cure = f"give it in_channels {channels} (--method.backbone.in_channels {channels})"
        yield f"the images have {channels} channels and the backbone takes {taken}: {cure}"
    monitor, measured = given["monitor"], [name for hook in given["hooks"] or [] for name in hook.measures]
    if monitor is not None and monitor not in measured:
        hint = nearest(monitor, measured) or "; add a hook that does: --hooks OnlineKNN"
        yield f"--monitor: nothing measures {monitor!r}{hint}"
    if given["resume"] not in (None, "auto") and given["init_from"] is not None:
        yield "--init_from starts a new run and --resume goes on with an old one: give one of them"
    if given["parallel"] == "fsdp" and (given["compile"] or given["precision"] == "fp16"):
        yield "--parallel fsdp goes with --precision float32 or bf16, and without --compile"
    if given["parallel"] == "fsdp" and not method.can_shard:
        yield f"{name} cannot be trained in shards: use --parallel ddp"
