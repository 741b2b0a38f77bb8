"""Time as the library sees it: a monotonic clock that can be replaced in tests.

Nothing else in the package reads the time or arms a timer, so a test that passes
:class:`aioinfer.testing.ManualClock` decides when a deadline passes.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Protocol


class TimerHandle(Protocol):
    """What arming a timer returns."""

    def cancel(self) -> None:
        """Forget the timer; harmless once it has fired."""


class Clock(Protocol):
    """A monotonic clock in seconds, and timers on an event loop that follow it."""

    def __call__(self) -> float:
        """Return the present, in seconds since an arbitrary origin."""

    def call_at(
        self, loop: asyncio.AbstractEventLoop, when: float, callback: Callable[[], object]
    ) -> TimerHandle:
        """Run ``callback`` on ``loop`` once the clock reads ``when`` or later."""


class MonotonicClock:
    """The clock of production: :func:`time.monotonic` and the loop's own timers."""

    __call__ = staticmethod(time.monotonic)

    def call_at(
        self, loop: asyncio.AbstractEventLoop, when: float, callback: Callable[[], object]
    ) -> TimerHandle:
        """Arm a loop timer.

        The delay is taken from this clock, not from ``loop.time()``, which uvloop caches
        per iteration and rounds to milliseconds.
        """
        return loop.call_later(max(0.0, when - time.monotonic()), callback)


def epoch_now() -> int:
    """A number that is larger the later it is asked for, on all computers: Unix time in ns."""
    return time.time_ns()


class RemoteTimer:
    """A timer on an event loop, armed and cancelled from any thread."""

    def __init__(
        self,
        clock: Clock,
        loop: asyncio.AbstractEventLoop,
        when: float,
        callback: Callable[[], object],
    ) -> None:
        self._clock = clock
        self._loop = loop
        self._timer: TimerHandle | None = None
        self._cancelled = False
        loop.call_soon_threadsafe(self._arm, when, callback)

    def _arm(self, when: float, callback: Callable[[], object]) -> None:
        if not self._cancelled:
            self._timer = self._clock.call_at(self._loop, when, callback)

    def cancel(self) -> None:
        """Forget the timer; harmless once it has fired."""
        self._cancelled = True
        if self._timer is not None and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._timer.cancel)
