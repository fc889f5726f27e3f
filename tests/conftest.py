"""What tests share: two processes that stay for the session, and the real data where there is any."""

import multiprocessing
import pickle
import tempfile
import traceback
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest
import torch

from sslbook import distributed

PROCESSES = 2
PATIENCE = 120.0  # seconds until two processes that wait for each other count as stuck


class Pool:
    """Two processes of one gloo group, started when first used, since starting costs more than most tests.

    They meet through a file, so that no port can be taken. After a failure both are replaced.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.workers: list[tuple[Any, Connection]] = []
        self.generation = 0

    def run(self, fn: Callable[..., Any], *args: Any) -> list[Any]:
        """What `fn(*args)` returns in each process, by rank; `fn` must be a function of a module."""
        if not self.workers:
            self._start()
        answers = []
        try:
            for _, pipe in self.workers:
                pipe.send_bytes(pickle.dumps((fn, args)))
            for rank, (_, pipe) in enumerate(self.workers):
                assert pipe.poll(PATIENCE), f"process {rank} did not answer in {PATIENCE} s"
                good, answer = pickle.loads(pipe.recv_bytes())
                assert good, f"process {rank} failed:\n{answer}"
                answers.append(answer)
        except BaseException:
            self.stop()
            raise
        return answers

    def _start(self) -> None:
        self.generation += 1
        context = multiprocessing.get_context("spawn")
        for rank in range(PROCESSES):
            here, there = context.Pipe()
            rendezvous = self.folder / f"rendezvous-{self.generation}"
            process = context.Process(target=_work, args=(rank, rendezvous, there), daemon=True)
            process.start()
            there.close()
            self.workers.append((process, here))

    def stop(self) -> None:
        for process, pipe in self.workers:
            pipe.close()
            process.terminate()
        for process, _ in self.workers:
            process.join()
        self.workers = []


def _work(rank: int, rendezvous: Path, pipe: Connection) -> None:
    torch.set_num_threads(1)
    distributed.init_process_group(rank, PROCESSES, rendezvous, timeout=PATIENCE / 2)
    while True:
        try:
            fn, args = pickle.loads(pipe.recv_bytes())
        except EOFError:
            return
        try:
            answer = (True, fn(*args))
        except Exception:
            answer = (False, traceback.format_exc())
        pipe.send_bytes(pickle.dumps(answer))


@pytest.fixture(scope="session")
def pool() -> Iterator[Pool]:
    """Two gloo processes: `pool.run(function, *arguments)` returns both results."""
    with tempfile.TemporaryDirectory() as folder:
        pool = Pool(Path(folder))
        yield pool
        pool.stop()


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real images beside the repository, which only some machines have."""
    folder = Path(__file__).parents[2] / "shared" / "data"
    if not folder.is_dir():
        pytest.skip(f"no real images here: there is no folder {folder}")
    return folder
