"""Several processes: which one keeps the others waiting? Without an answer a stalled run ends after long, and names nobody.

Every process tells the others, from a thread, where its main thread stands. One that makes no step for long asks around.
"""

import json
import os
import sys
import threading
import time
import traceback
from typing import Any

import torch.distributed as dist

from sslbook import distributed
from sslbook.engine.hooks import Hook
from sslbook.engine.run import Run

PATIENCE = 540.0  # seconds without a step; NCCL waits for 600
BEAT = 10.0  # seconds between two signs of life
WAITING = (os.sep.join(("torch", "distributed")), os.sep.join(("torch", "autograd", "graph.py")))


class Heartbeat(Hook):
    """Ends a run of several processes that stands still, with a line that says which of them the others wait for."""

    def start(self, run: Run) -> None:
        self.run, self.moved, self.over = run, time.monotonic(), threading.Event()
        self.main = threading.get_ident()
        self.store = dist.distributed_c10d._get_default_store() if distributed.world_size() > 1 else None
        if self.store is not None:
            self.store.set(f"sslbook-{distributed.rank()}", json.dumps({"beat": 0}))
            threading.Thread(target=self._watch, daemon=True).start()

    def step(self, run: Run) -> None:
        self.moved = time.monotonic()

    def epoch(self, run: Run) -> None:
        self.moved = time.monotonic()

    def end(self, run: Run) -> None:
        self.over.set()

    def _watch(self) -> None:
        rank, beats, asked, before = distributed.rank(), 0, 0, []
        while not self.over.wait(BEAT):
            beats += 1
            self.store.set(f"sslbook-{rank}", json.dumps({"beat": beats, **self._where()}))
            asked = asked + 1 if time.monotonic() - self.moved > PATIENCE else 0
            if asked == 1:
                before = self._all()
            elif asked == 4:
                verdict, who = _verdict(before, self._all(), self.run.clock.step)
                if rank == min({*range(len(before))} - {*who}, default=0):  # one says it
                    print(f"error: {verdict}", file=sys.stderr, flush=True)
                else:
                    self.over.wait(5 * BEAT)  # whoever ends first would end the others before they have spoken
                os._exit(2)  # the main thread waits in a collective, which cannot be interrupted

    def _where(self) -> dict[str, Any]:
        stack = traceback.extract_stack(sys._current_frames()[self.main])
        last = next((frame for frame in reversed(stack) if "site-packages" not in frame.filename), stack[-1])
        waits = any(part in frame.filename for frame in stack for part in WAITING)
        return {"place": f"{os.path.basename(last.filename)}, line {last.lineno}", "waits": waits}

    def _all(self) -> list[dict[str, Any]]:
        return [json.loads(self.store.get(f"sslbook-{rank}")) for rank in range(distributed.world_size())]


def _verdict(before: list[dict[str, Any]], now: list[dict[str, Any]], step: int) -> tuple[str, list[int]]:
    """Who gives no sign of life, or else who does something while the others wait."""
    silent = [rank for rank, (a, b) in enumerate(zip(before, now)) if a["beat"] == b["beat"]]
    busy = [rank for rank, state in enumerate(now) if not state.get("waits")]
    who = silent or busy or list(range(len(now)))
    names = ", ".join(map(str, who[:8])) + (", ..." if len(who) > 8 else "")
    does = "gives no sign of life" if silent else f"stands in {now[who[0]].get('place', 'its start')}"
    cure = "look there, then go on with --resume"
    return f"no step since step {step}: process {names} of {len(now)} {does}, the others wait; {cure}", who
