"""What tests share: a seed, two processes that stay for the session, and the real data where there is any."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch: several tests run at once, and a thread too many spins

import multiprocessing
import pickle
import random
import tempfile
import traceback
import zlib
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from sslbook import distributed

SEED = int(os.environ.get("SSLBOOK_TEST_SEED", "0"))
PROCESSES = 2
PATIENCE = 120.0  # seconds until two processes that wait for each other count as stuck


def pytest_report_header() -> str:
    return f"SSLBOOK_TEST_SEED={SEED} (of what tests draw at random)"


@pytest.fixture(autouse=True)
def seed(request: pytest.FixtureRequest) -> int:
    """A seed for every test, from its name; whatever order or process it runs in, it draws the same numbers."""
    seed = (SEED + zlib.crc32(request.node.nodeid.encode())) % 2**31
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002 (what libraries draw from)
    torch.manual_seed(seed)
    print(f"seed {seed}")  # pytest shows it with a failure
    return seed


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
