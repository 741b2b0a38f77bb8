"""An executor for a server on an event loop that has nothing else to do.

Handing a batch to another thread and its answers back costs two wake-ups, and more where all
cores are busy: threads take turns at the interpreter, and processes at the cores. Where a forward
costs less than that, the loop's own thread is the best place for it. A loop with other work must
not be blocked; one that is there for a server and its actors alone has nothing better to do for so
short a time.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

import torch

from aioinfer.batch import Batch
from aioinfer.clock import MonotonicClock
from aioinfer.executor import Report, Run, ThreadExecutor

_clock = MonotonicClock()

NEAR_S = 0.0005
"""Seconds that a batch may take, from its requests to its answers, to be run on the loop."""

TRIED = 16
"""Batches that are run on the thread first, by which their cost is known."""


class NearExecutor(ThreadExecutor):
    """Runs batches on the loop's thread while they are cheap, else on a thread of its own.

    Never two at once, nor one beside what :meth:`call` runs.

    Attributes:
        allowed: whether the loop may be blocked; to be set before the start. If not, all batches
            run on the thread.
    """

    def __init__(self) -> None:
        super().__init__()
        self.allowed = False
        self._turn = threading.RLock()  # held by whoever uses the model
        self._near: threading.Thread | None = None
        self._cost_s = math.inf
        self._learnt = 0

    def start(self, run: Run, finished: Report, free: Report | None = None) -> None:
        def run_in_turn(batch: Batch) -> None:
            with self._turn:
                started = _clock()
                rest = run(batch)
                if rest is not None:
                    rest()
                self._learn(_clock() - started)

        self._cost_s, self._learnt = math.inf, 0
        if not self.allowed:
            super().start(run, finished, free)
            return
        # OpenMP keeps it per thread, and this is the loop's.
        torch.set_num_threads(torch.get_num_threads())
        self._run, self._finished = run_in_turn, finished
        super().start(run_in_turn, finished)

    def submit(self, batch: Batch) -> None:
        # Unless it is allowed, nothing is learnt.
        cheap = self._learnt >= TRIED and self._cost_s < NEAR_S
        if not (cheap and self._jobs.empty() and self._turn.acquire(blocking=False)):
            super().submit(batch)
            return
        try:
            self._near = threading.current_thread()
            self._run(batch)
        finally:
            self._near = None
            self._turn.release()
        self._finished(batch)

    def call(self, function: Callable[[], Any]) -> Future[Any]:
        def call_in_turn() -> Any:
            with self._turn:
                return function()

        return super().call(call_in_turn)

    def is_here(self) -> bool:
        return threading.current_thread() is self._near or super().is_here()

    def _learn(self, seconds: float) -> None:
        # Slow ones count by and by, for one may have had to wait for a core; a fast one shows
        # what is possible.
        self._cost_s = seconds if seconds < self._cost_s else 0.75 * self._cost_s + 0.25 * seconds
        self._learnt += 1
