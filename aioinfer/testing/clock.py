"""Time that passes when a test says so."""

from __future__ import annotations

import asyncio
import heapq
import itertools
import threading
from collections.abc import Callable

from aioinfer.clock import TimerHandle
from aioinfer.intake import running_loop


class ManualClock:
    """A clock that stands still until the test moves it.

    Give it to a server as ``clock``: every timeout and every deadline then passes exactly
    when :meth:`advance` says so::

        clock = ManualClock()
        async with InferenceServer(policy, clock=clock, timeout=60.0) as server:
            ...
            clock.advance(60.0)

    Any thread may use it. (A thread that blocks in a :class:`~aioinfer.SyncInferenceClient`
    call waits in real time, whatever the server's clock is.)

    Args:
        now: what it reads at first.
    """

    def __init__(self, now: float = 1000.0) -> None:
        self._now = float(now)
        self._timers: list[tuple[float, int, _ManualTimer]] = []
        self._armed = itertools.count()
        self._lock = threading.Lock()

    def __call__(self) -> float:
        """Return the present, in seconds."""
        return self._now

    def call_at(
        self, loop: asyncio.AbstractEventLoop, when: float, callback: Callable[[], object]
    ) -> TimerHandle:
        """Run ``callback`` on ``loop`` once the clock reads ``when`` or later."""
        timer = _ManualTimer(loop, callback)
        with self._lock:
            due = when <= self._now
            if not due:
                heapq.heappush(self._timers, (when, next(self._armed), timer))
        if due:
            timer.fire_soon()
        return timer

    def advance(self, seconds: float) -> None:
        """Let ``seconds`` pass, and fire the timers that come due, in their order.

        A timer of the event loop that this is called on has fired when this returns, at the
        very moment it was armed for: what it arms in turn is fired too if it comes due. A
        timer of another loop is handed to that loop, and fires there as soon as it may.

        Args:
            seconds: at least 0.

        Raises:
            ValueError: ``seconds`` is negative; this clock is monotonic.
        """
        if not seconds >= 0:
            raise ValueError(f"seconds must be at least 0 on a monotonic clock, got {seconds!r}")
        target = self._now + seconds
        while (timer := self._next_due(target)) is not None:
            timer.fire()
        with self._lock:
            self._now = max(self._now, target)

    @property
    def timers(self) -> list[float]:
        """When the timers that are armed will fire, soonest first."""
        with self._lock:
            return sorted(when for when, _, timer in self._timers if not timer.cancelled)

    def _next_due(self, target: float) -> _ManualTimer | None:
        with self._lock:
            while self._timers and self._timers[0][0] <= target:
                when, _, timer = heapq.heappop(self._timers)
                if not timer.cancelled:
                    self._now = max(self._now, when)
                    return timer
        return None


class _ManualTimer:
    """One armed timer."""

    def __init__(self, loop: asyncio.AbstractEventLoop, callback: Callable[[], object]) -> None:
        self._loop = loop
        self._callback: Callable[[], object] | None = callback

    @property
    def cancelled(self) -> bool:
        return self._callback is None

    def cancel(self) -> None:
        self._callback = None  # and keep nothing that it refers to

    def fire(self) -> None:
        if running_loop() is self._loop:
            self._run()
        else:
            self.fire_soon()

    def fire_soon(self) -> None:
        try:
            self._loop.call_soon_threadsafe(self._run)
        except RuntimeError:
            if not self._loop.is_closed():  # like a loop's own timer, it dies with the loop
                raise

    def _run(self) -> None:
        callback = self._callback
        if callback is not None:
            callback()
