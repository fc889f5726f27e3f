"""Checkpoints of a run: written atomically, read without executing code (`weights_only=True`)."""

import math
import os
import pickle
import tempfile
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from sslbook.errors import UserError, first_line
from sslbook.files import Whole, check

FORMAT = "sslbook checkpoint 2"
OLD_FORMAT = "sslbook checkpoint 1"  # its weights can be used, its runs not resumed: options had other names

# What is known of a backbone, in a checkpoint or as JSON beside exported weights.
DESCRIPTION = {
    "backbone?": {"class_path?": (str, None), "init_args?": (None, {"depth?": Whole(0, 2000), str: object})},
    "view?": {"size?": Whole(1, 65536), "mean?": [float], "std?": [float]},
    **{"method?": str, "data?": ({str: object}, None), "cwd?": str, "config?": ({str: object}, None)},
}
SCHEMA = {
    "method?": {str: torch.Tensor},
    "optimizer?": {"state": dict, "param_groups": [{"params": [Whole()], str: object}]},
    "optimizer_class?": str,
    "images?": str,
    "scaler?": {str: float},
    **{"step?": Whole(), "steps_per_epoch?": Whole(1), "batch_size?": Whole(1), "seed?": Whole(-(2**63))},
    **{"seconds?": float, "evaluations?": {str: float}, "best?": (float, -math.inf)},
    "random?": [{"cpu": torch.Tensor, "cuda?": torch.Tensor}],
    "description?": DESCRIPTION,
}


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` fill a file beside `path`, then put it in its place: a reader sees the old file or the whole new one.

    Raises:
        UserError: the disk is full, or the folder may not be written; what was there is as it was.
    """
    name = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name[:100]}.", suffix=".part")
        os.close(handle)
        write(Path(name))
        with open(name, "rb+") as file:
            os.fsync(file.fileno())
        mask = os.umask(0)
        os.umask(mask)
        os.chmod(name, 0o666 & ~mask)
        os.replace(name, path)
    except (OSError, RuntimeError, SafetensorError) as error:  # torch and safetensors have no OSError of their own
        if not isinstance(error, OSError) and not _cannot_write(path.parent):
            raise
        reason = error.strerror or first_line(error) if isinstance(error, OSError) else "no space left, or forbidden"
        raise UserError(f"{path}: cannot be written ({reason}); nothing was changed: mend that, then go on") from error
    finally:
        if name is not None:
            Path(name).unlink(missing_ok=True)


def _cannot_write(folder: Path) -> bool:
    """Whether a megabyte cannot be written there now."""
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(bytes(2**20))
    except OSError:
        return True
    return False


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically."""
    write_atomically(path, lambda part: part.write_text(text, encoding="utf-8"))


def save(path: Path, state: dict[str, Any]) -> None:
    """Write a checkpoint atomically."""
    write_atomically(path, lambda part: torch.save({"format": FORMAT, **state}, part))


def read(path: Path) -> Any:
    """Read a file that torch has written; nothing in it is executed.

    Raises:
        UserError: the file is missing, truncated or damaged, or would execute code.
    """
    try:
        if path.exists() and not path.is_file():
            raise UserError(f"{path}: is no file")  # a pipe would be waited for
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                if any(part.compress_type != zipfile.ZIP_STORED for part in archive.infolist()):  # it may be a bomb
                    raise zipfile.BadZipFile("compressed, which torch does not do")
                if (damaged := archive.testzip()) is not None:  # torch does not compare the checksums that it writes
                    raise zipfile.BadZipFile(f"{damaged} is not what was saved")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of pickles that are refused in the next line
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        reason = "holds more than tensors and could execute code; it was not loaded"
    except (FileNotFoundError, PermissionError, IsADirectoryError) as error:
        reason = f"cannot be read ({error.strerror})"
    except UserError:
        raise
    except Exception as error:  # torch's reader and pickle raise many kinds for bytes that were changed
        what = "not written by torch" if isinstance(error, KeyError) else first_line(error)[:120]  # that of an opcode
        reason = f"truncated or not a checkpoint ({what}); take an older one"
    raise UserError(f"{path}: {reason}")


def load(path: Path, *needs: str) -> dict[str, Any]:
    """Read a checkpoint written by `save`, which holds the entries `needs`.

    Raises:
        UserError: the file cannot be read, is not a checkpoint of this version, lacks an entry, or one is of another form.
    """
    # What `save` has written is a zip archive; torch would unpickle anything else.
    regular = path.is_file() and os.access(path, os.R_OK)
    state = read(path) if not regular or zipfile.is_zipfile(path) else None
    found = state.get("format") if isinstance(state, dict) else None
    if found == OLD_FORMAT and "optimizer" in needs:
        reason = f"written by sslbook 0.1, whose runs cannot be resumed; start anew with --init_from {path}"
    elif found not in (FORMAT, OLD_FORMAT):
        reason = "truncated or not a checkpoint of sslbook; take an older one, or only its weights with --init_from"
    elif absent := [name for name in needs if name not in state]:
        reason = f"holds no {', '.join(absent)}; take another checkpoint"
    else:
        return check(path, state, SCHEMA)
    raise UserError(f"{path}: {reason}")


def checkpoints(folder: Path) -> list[Path]:
    """The checkpoints of a run folder, oldest first."""
    own = [path for path in folder.glob("checkpoint-*.pt") if path.stem.removeprefix("checkpoint-").isdecimal()]
    return sorted(own, key=lambda path: int(path.stem.removeprefix("checkpoint-")))


def find(path: Path) -> Path:
    """The newest checkpoint of a run folder, or the file itself.

    Raises:
        UserError: the folder holds none.
    """
    if not path.is_dir():
        return path
    if not (found := checkpoints(path)):
        raise UserError(f"{path}: holds no checkpoint to go on from")
    return found[-1]
