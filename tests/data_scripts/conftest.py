"""The scripts' folder on the import path, and a server on the loopback address."""

import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from loopback import Server

sys.path.insert(0, str(Path(__file__).parents[2] / "data_scripts"))  # as `python data_scripts/x.py` does


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with Server() as running:
        thread = threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        yield running
        running.closing.set()
        running.shutdown()
        thread.join()
