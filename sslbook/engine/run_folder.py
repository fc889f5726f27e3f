"""The folder of a run: found or created, never that of another run, and gone again if no step was taken."""

import itertools
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sslbook import checkpoint, distributed
from sslbook.data.loader import Data
from sslbook.engine.run_lock import RunLock
from sslbook.errors import UserError
from sslbook.files import read_yaml
from sslbook.methods.base import Method

RESULT_FILES = ("metrics.jsonl", "backbone.safetensors", "best.pt", "report.json")  # of a run that took a step
START_FILES = ("config.yaml", "initial.safetensors", "initial.json")
LOG_FOLDERS = ("tensorboard", "wandb")  # of hooks, which begin before the first step


def open_folder(
    method: Method, data: Data, out_dir: str | Path | None, resume: str | Path | None
) -> tuple[Path, Path | None, RunLock]:
    """The run's folder, the checkpoint to resume, and the folder's lock; the main process decides for all.

    Args:
        method: names the folder where `out_dir` does not.
        data: likewise.
        out_dir: the folder asked for; by default a new one under `runs/`.
        resume: a run's folder or a checkpoint; `auto` is the newest run of this method and data, if there is one.

    Raises:
        UserError: the folder holds another run or anything else, lies in the images' folder or above it, cannot be
            created, or a process works there; or there is nothing to resume.
    """
    answer: list[Any] = [None, None, None]
    lock = None
    if distributed.is_main():
        try:
            names = (None if name is None else os.path.expanduser(name) for name in (out_dir, resume))
            answer[:2] = _choose(method, data, *names)
            lock = RunLock(Path(answer[0])).acquire()
        # UserErrors, and names that cannot be; the other processes wait for the answer, whatever it is.
        except (ValueError, OSError) as error:
            answer[2] = str(error)
    folder, path, refusal = distributed.broadcast(answer)
    if refusal is not None:
        raise UserError(refusal)
    return Path(folder), None if path is None else Path(path), lock or RunLock(Path(folder))


def _choose(method: Method, data: Data, out_dir: str | None, resume: str | None) -> tuple[str, str | None]:
    stem = f"{type(method).__name__.lower()}-{data.name}"
    if out_dir is not None and not out_dir.strip():
        raise UserError("--out_dir is empty: name a folder, or leave it out")
    if resume is not None and resume != "auto":
        path = checkpoint.find(Path(resume))
        folder = path.parent if out_dir is None else Path(out_dir)
        if folder.resolve() != path.parent.resolve():
            _create_unused(folder, data)
        return str(folder), str(path)
    if resume == "auto":
        runs = [Path(out_dir)] if out_dir is not None else _runs_of(stem, data)
        found = [path for run in runs if run.is_dir() for path in checkpoint.checkpoints(run)[-1:]]
        if found:
            newest = max(found, key=lambda path: path.stat().st_mtime)
            return str(newest.parent), str(newest)
    if out_dir is not None:
        if resume != "auto" or not (Path(out_dir) / "config.yaml").exists():
            _create_unused(Path(out_dir), data)
        return out_dir, None
    folders = (Path("runs") / (stem if number == 1 else f"{stem}-{number}") for number in itertools.count(1))
    folder = next(one for one in folders if not one.exists() or (one.is_dir() and not any(one.iterdir())))
    _create_unused(folder, data)
    return str(folder), None


def _runs_of(stem: str, data: Data) -> list[Path]:
    """Folders under `runs/` whose name and configuration are those of this method and these data."""
    own = re.compile(re.escape(stem) + r"(-\d+)?")
    folders = list(Path("runs").iterdir()) if Path("runs").is_dir() else []
    return [folder for folder in folders if own.fullmatch(folder.name) and _learns_from(folder, data)]


def _learns_from(run: Path, data: Data) -> bool:
    """Whether the run's configuration names these data; folders of the same name may lie in different folders."""
    try:
        written = read_yaml(run / "config.yaml", {"data": {"folder?": (str, None, [str]), "name?": str}})["data"]
    except UserError:
        return True  # started from Python, where nothing is written of the data
    folder, name = written.get("folder"), written.get("name", "shapes")
    if folder is None or not data.folders:
        return folder is None and not data.folders and name == data.name
    listed = folder if isinstance(folder, list) else [folder]
    return [Path(one).expanduser().resolve() for one in listed] == [p.expanduser().resolve() for p in data.folders]


def _create_unused(folder: Path, data: Data) -> None:
    """Make sure that the folder is there, is empty, and that what is written there is not taken for images."""
    if images := next((one for one in data.folders if _holds(folder, one) or _holds(one, folder)), None):
        where = "above the images'" if _holds(folder, images) else "inside the images'"
        reason = f"lies {where} folder {images}, and its plots would be learned from;"
    elif checkpoint.checkpoints(folder):
        reason = f"holds another run; go on with it by --resume {folder}, or"
    elif any((folder / name).exists() for name in RESULT_FILES):
        reason = "holds another run, without checkpoints; delete it, or"
    elif folder.is_dir() and (others := [p.name for p in folder.iterdir() if not p.name.startswith(".")]):
        reason = f"holds other files ({others[0]}), which are not overwritten;"
    else:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            return
        except OSError as error:
            reason = "is a file;" if folder.is_file() else f"cannot be created ({error.strerror});"
    raise UserError(f"{str(folder)[:200]}: {reason} choose another --out_dir")


def _holds(outer: Path | None, inner: Path | None) -> bool:
    """Whether `inner` is `outer` or lies in it."""
    if outer is None or inner is None:
        return False
    outside, inside = (os.path.realpath(os.path.expanduser(path)) for path in (outer, inner))
    return Path(inside).is_relative_to(outside)


@contextmanager
def removed_if_unstarted(folder: Path, new: bool) -> Iterator[None]:
    """Remove what a new run has written into its folder if it fails before its first result."""
    try:
        yield
    except BaseException:
        failures = folder.glob("failed-step-*.pt")  # of the loop; they are replayed with the run's config.yaml
        results = [*checkpoint.checkpoints(folder), *failures, *(folder / name for name in RESULT_FILES)]
        if new and distributed.is_main() and not any(path.exists() for path in results):
            for name in START_FILES:
                (folder / name).unlink(missing_ok=True)
            for name in LOG_FOLDERS:
                shutil.rmtree(folder / name, ignore_errors=True)
            if folder.is_dir() and not any(folder.iterdir()):
                folder.rmdir()
        raise
