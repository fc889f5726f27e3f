"""One process at a time works in a run's folder: a lock that survives crashes and works on network disks.

The lock is the hidden file `.lock`, which says who holds it. Its holder writes to it every few seconds, for file locks of
the operating system are not kept on every network disk, and clocks of two machines differ. A lock that nobody writes to
is left over from a crash, and is taken over.
"""

import os
import socket
import threading
import time
import uuid
from pathlib import Path
from types import TracebackType

from sslbook.errors import UserError

HEARTBEAT = 5.0  # seconds between two signs of life
PATIENCE = 30.0  # seconds without one until the holder counts as dead


class RunLock:
    """The right to write into a run's folder; `acquire` waits for it, leaving the `with` block gives it back.

    Only the main process of a run acquires it; to the others the object means nothing.

    Args:
        folder: the run's folder.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.path = folder, folder / ".lock"
        self.text = f"process {os.getpid()} on {socket.gethostname()}"
        self.token = uuid.uuid4().hex
        self.stop = threading.Event()
        self.thread: threading.Thread | None = None

    def acquire(self) -> "RunLock":
        """Take the lock, or take it over from a process that is dead.

        Raises:
            UserError: a process that is alive works in this folder.
        """
        while not self._create():
            holder = self._read()
            if (_dead_here(holder) or self._silent(holder)) and self._read() == holder:  # nobody else was quicker
                self.path.unlink(missing_ok=True)
                print(f"{self.folder}: {_who(holder)} died without leaving; its lock is taken over")
        for part in self.folder.glob(".*.part"):  # of writers that were killed
            part.unlink(missing_ok=True)
        self.thread = threading.Thread(target=self._beat, daemon=True)
        self.thread.start()
        return self

    def require(self) -> None:
        """UserError if another process has taken over, after this one had been suspended for long."""
        if self.thread is not None and (found := self._read()) and self.token not in found:
            raise UserError(
                f"{self.folder}: this process stood still and another has taken over; nothing more is written"
            )

    def __enter__(self) -> "RunLock":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self.thread is not None:
            self.stop.set()
            self.thread.join()
            if self.token in self._read():
                self.path.unlink(missing_ok=True)

    def _create(self) -> bool:
        try:
            handle = os.open(self.path, os.O_CREAT | os.O_EXCL | os.O_WRONLY)
        except FileExistsError:
            return False
        os.close(handle)
        self._write()
        return True

    def _write(self) -> None:
        part = self.path.with_name(f".lock-{self.token}")
        part.write_text(f"{self.text}\n{self.token}\n{time.time()}\n", encoding="utf-8")
        os.replace(part, self.path)  # whoever reads finds the old sign of life or the new one

    def _read(self) -> str:
        try:
            return self.path.read_text(encoding="utf-8")
        except OSError:
            return ""

    def _beat(self) -> None:
        while not self.stop.wait(HEARTBEAT):
            try:
                if self.token in self._read():
                    self._write()
            except OSError:  # a full disk: the next checkpoint reports it
                pass

    def _silent(self, holder: str) -> bool:
        """Whether the holder shows no sign of life for long; False once it has given the lock back.

        Raises:
            UserError: it is alive.
        """
        deadline = time.monotonic() + PATIENCE
        while time.monotonic() < deadline:
            time.sleep(HEARTBEAT / 10)
            found = self._read()
            if not self.path.exists():
                return False
            if found not in ("", holder):
                raise UserError(
                    f"{self.folder}: {_who(found)} works there; wait until it ends, or choose another --out_dir"
                )
        return True


def _who(text: str) -> str:
    return (text.splitlines() or ["a process"])[0][:100]


def _dead_here(holder: str) -> bool:
    """Whether the holder was a process of this machine that is no more."""
    words = _who(holder).split()
    if len(words) != 4 or words[3] != socket.gethostname() or not words[1].isdecimal():
        return False
    try:
        os.kill(int(words[1]), 0)
    except (ProcessLookupError, OverflowError):
        return True
    except PermissionError:
        pass
    return False
