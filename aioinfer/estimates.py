"""What a server learns while it serves: what a forward costs, and when callers come back.

Both are estimates for decisions that are taken thousands of times a second, so they are cheap
to keep, follow changes within some dozens of batches, and are not thrown off by single
outliers, such as the first, slow forwards of a policy.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections import deque
from collections.abc import Hashable


class ForwardCost:
    """The cost of a forward as ``fixed + per_row * rows``, in seconds.

    Durations are smoothed per power of two of the rows, each step bounded to twice what was
    expected and taken more readily downwards than upwards, at first without reserve: forwards
    that compile, allocate and warm up are forgotten at the next one. A line is fitted through
    the smoothed points. While only one size has been seen, half of its cost is taken to be
    fixed; all of it, where forwards have one size only.
    """

    def __init__(self, *, one_size: bool = False) -> None:
        self._one_size = one_size
        self.fixed = 0.0
        self.per_row = 0.0
        self.learnt = 0
        """Forwards seen."""
        self._points: dict[int, _Point] = {}

    def learn(self, rows: int, seconds: float) -> None:
        """A forward of ``rows`` rows took ``seconds``."""
        key = rows if rows < 8 else int(8 * math.log2(rows))
        point = self._points.get(key)
        if point is None:
            self._points[key] = _Point(rows, seconds)
        else:
            point.rows += (rows - point.rows) / 8
            step = min(seconds, 2 * point.seconds) - point.seconds
            if step > 0:
                step /= 8
            elif point.weight > 8:
                step /= 4
            point.seconds += step
            point.weight = min(point.weight + 1, 16)
        self.learnt += 1
        if self.learnt < 16 or self.learnt % 8 == 0:
            self._fit()

    def of(self, rows: int) -> float:
        """Return what a forward of so many rows is expected to take; 0 if nothing is known."""
        return self.fixed + self.per_row * rows

    def _fit(self) -> None:
        points = self._points.values()
        weight = sum([p.weight for p in points])
        rows = sum([p.weight * p.rows for p in points]) / weight
        seconds = sum([p.weight * p.seconds for p in points]) / weight
        spread = sum([p.weight * (p.rows - rows) ** 2 for p in points]) / weight
        slope = sum([p.weight * (p.rows - rows) * (p.seconds - seconds) for p in points]) / weight
        guess = seconds / (2 * rows) if rows > 1 and not self._one_size else 0.0
        doubt = _DOUBT * rows * rows
        slope = (slope + doubt * guess) / (spread + doubt)
        self.per_row = min(max(slope, 0.0), seconds / rows)  # neither part can be negative
        self.fixed = max(0.0, seconds - self.per_row * rows)


_DOUBT = 0.0005
"""What the guess counts beside the points: as much as if their rows varied by 2 %."""


class _Point:
    __slots__ = ("rows", "seconds", "weight")

    def __init__(self, rows: float, seconds: float) -> None:
        self.rows = rows
        self.seconds = seconds
        self.weight = 1


class Cohort:
    """Callers that were answered together, and how many of them have not asked again."""

    __slots__ = ("answered_at", "kind", "left", "stride")

    def __init__(self, kind: Hashable, answered_at: float, stride: int) -> None:
        self.kind = kind
        """What they asked for (their signature), or ``None`` where that is not known."""
        self.answered_at = answered_at
        self.left = 0
        self.stride = stride
        """One in so many of them tells how long it took: of a large one, a few are enough."""


class ThinkTimes:
    """How long callers take from an answer to their next request: the latest 256 of them.

    Kept sorted, which makes every question about the distribution one binary search: it needs
    no assumption about its shape, and a caller that is slower than nearly all others simply
    stops being expected.
    """

    def __init__(self) -> None:
        self.sorted: list[float] = []
        self.known = False
        """Whether enough of them were seen to judge by."""
        self.longest = 0.0
        """The longest of the latest, 0 if there are none."""
        self._latest: deque[float] = deque(maxlen=256)
        self._fresh = 0

    def learn(self, seconds: float) -> None:
        """A caller took ``seconds``."""
        self._latest.append(seconds)
        self._fresh += 1
        # Sorting costs little when it is rare; at the start it is done more often.
        if self._fresh >= 128 or (self._fresh >= 8 and len(self._latest) < 64):
            self._fresh = 0
            self.sorted = sorted(self._latest)
            self.known = len(self.sorted) >= 16
            self.longest = self.sorted[-1]

    @property
    def median(self) -> float:
        """The typical think time."""
        return self.sorted[len(self.sorted) // 2]

    def returned(self, seconds: float) -> int:
        """How many of :attr:`sorted` are at most ``seconds``."""
        return bisect_right(self.sorted, seconds)
