"""What a forward costs, as a function of its rows."""

from __future__ import annotations

import dataclasses
from bisect import bisect_left
from collections.abc import Mapping


@dataclasses.dataclass(frozen=True)
class LinearCost:
    """A forward of ``rows`` rows takes ``fixed + per_row * rows`` seconds."""

    fixed: float
    per_row: float = 0.0

    def __post_init__(self) -> None:
        for name, value in (("fixed", self.fixed), ("per_row", self.per_row)):
            if not 0 <= value <= 1e9:
                raise ValueError(f"{name} must be >= 0 and <= 1e+09 seconds, got {value!r}")
        if not self.fixed + self.per_row:
            raise ValueError("fixed or per_row must be more than 0, got 0 for both")

    def __call__(self, rows: int) -> float:
        return self.fixed + self.per_row * rows


class MeasuredCost:
    """What was measured for some numbers of rows, and a straight line from each to the next.

    Below the first number of rows it costs what that one does. Above the last, each row more
    costs as much as between the last two, or nothing if there is but one.

    Args:
        points: seconds by rows.
    """

    def __init__(self, points: Mapping[int, float]) -> None:
        if not points:
            raise ValueError("points must hold at least one number of rows, got none")
        for rows, seconds in points.items():
            if rows < 1 or not 0 < seconds <= 1e9:
                raise ValueError(
                    "points must be of at least 1 row and of > 0 and <= 1e+09 seconds, "
                    f"got {rows}: {seconds!r}"
                )
        self._rows = sorted(points)
        self._seconds = [points[rows] for rows in self._rows]

    def __repr__(self) -> str:
        return f"MeasuredCost({dict(zip(self._rows, self._seconds, strict=True))})"

    def __call__(self, rows: int) -> float:
        at, seconds = self._rows, self._seconds
        if rows <= at[0] or len(at) == 1:
            return seconds[0]
        upper = min(bisect_left(at, rows), len(at) - 1)
        lower = upper - 1
        slope = (seconds[upper] - seconds[lower]) / (at[upper] - at[lower])
        if rows > at[upper]:
            slope = max(slope, 0.0)  # noise must not make larger batches free
        return seconds[upper] + slope * (rows - at[upper])
