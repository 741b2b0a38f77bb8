"""What happens when, in virtual time."""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Callable
from typing import Any

_PER_SECOND = 1000
"""Slots per second of virtual time. It decides about speed only."""

Event = tuple[float, int, Callable[[Any], None], Any]
"""When it happens, its number, and what is then called with what."""


class Agenda:
    """Events in order of time; of those at the same time, in the order in which they were added.

    A heap of a million events is slow, for each step through it misses the cache. Only those of
    the current millisecond are in one; the others lie, in no order, in the slot of theirs.

    Args:
        end: when time ends; later events never happen.
    """

    def __init__(self, end: float) -> None:
        self.now = 0.0
        self.end = end
        self._order = itertools.count()
        self._soon: list[Event] = []
        self._slot = -1
        self._later: dict[int, list[Event]] = {}
        self._slots: list[int] = []
        self._afterwards: list[Callable[[], None]] = []

    def add(self, when: float, what: Callable[[Any], None], about: Any) -> None:
        """Let ``what(about)`` happen at ``when``."""
        if when > self.end:
            return
        event = (when, next(self._order), what, about)
        slot = int(when * _PER_SECOND)
        if slot <= self._slot:
            heapq.heappush(self._soon, event)
        elif slot in self._later:
            self._later[slot].append(event)
        else:
            self._later[slot] = [event]
            heapq.heappush(self._slots, slot)

    def afterwards(self, what: Callable[[], None]) -> None:
        """Call ``what`` once everything that happens at this very moment has happened."""
        self._afterwards.append(what)

    def run(self) -> None:
        """Let everything happen, then forget it."""
        while True:
            when = self._next()
            if self._afterwards and when != self.now:
                calls, self._afterwards = self._afterwards, []
                for call in calls:
                    call()
            elif when is None:
                break
            else:
                self.now, _, what, about = heapq.heappop(self._soon)
                what(about)
        self.now = self.end

    def _next(self) -> float | None:
        """When the next event is, if there is one."""
        while not self._soon:
            if not self._slots:
                return None
            self._slot = heapq.heappop(self._slots)
            self._soon = self._later.pop(self._slot)
            heapq.heapify(self._soon)
        return self._soon[0][0]
