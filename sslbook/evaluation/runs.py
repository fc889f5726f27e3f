"""Runs of the loop of pre-training within a protocol: where they are kept, and what tells whether one is the same."""

import hashlib
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import nn

from sslbook import distributed
from sslbook.engine.run import Run
from sslbook.errors import UserError
from sslbook.evaluation.base import Representation


@contextmanager
def run_folder(keep: Path | None, name: str) -> Iterator[Path]:
    """Where a run is kept, or a temporary folder."""
    if keep is not None:
        yield keep / name
        return
    folder = distributed.broadcast(tempfile.mkdtemp(prefix="sslbook-") if distributed.is_main() else "")
    try:
        yield Path(folder) / name
    finally:
        if distributed.is_main():
            shutil.rmtree(folder, ignore_errors=True)


def require_finished(run: Run, name: str, model: Representation) -> None:
    """UserError if the run of a protocol was stopped; says how it goes on."""
    if not run.finished:
        cure = f"the same command goes on ({model.folder})" if model.folder else "give --keep FOLDER to go on next time"
        raise UserError(f"{name} was stopped at step {run.clock.step} of {run.clock.total_steps}: {cure}")


def hash_of_weights(module: nn.Module) -> str:
    """A hash of a network's weights: those of a run that is resumed are the same."""
    digest = hashlib.blake2b(digest_size=8)
    for name, value in module.state_dict().items():
        digest.update(name.encode())
        digest.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def short_hash(text: bytes) -> str:
    return hashlib.blake2b(text, digest_size=6).hexdigest()
