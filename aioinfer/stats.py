"""What the server did: counters and windows, and the frozen snapshot users read.

Counting costs the same per batch whatever its size: a batch is remembered by the moments of
its life and the list of its submission times; percentiles are worked out when asked for, over
a window of the latest batches that holds at most ``WINDOW`` requests.
"""

from __future__ import annotations

import dataclasses
import threading
from collections import Counter, deque
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from aioinfer.batching import Reason

WINDOW = 4096
"""Requests over which percentiles are taken, about; older ones are forgotten."""


class BatchTimes(NamedTuple):
    """The moments of one batch, in seconds on the server's clock."""

    submitted_at: Sequence[float]
    dispatched_at: float
    forward_s: float
    answered_at: float


@dataclasses.dataclass(frozen=True, slots=True)
class ServerStats(Mapping[str, Any]):
    """A snapshot of a server's counters. Times are in milliseconds.

    Every field, and every property, can also be read as ``stats["name"]``; the names that
    TorchRL's server uses mean the same here. ``print(stats)`` prints a table.
    """

    elapsed_s: float
    """Seconds since the server started, or since the last reset."""
    requests: int
    """Requests accepted."""
    rows: int
    """Rows that went through a forward."""
    batches: int
    """Forwards that gave answers."""
    batch_sizes: Mapping[int, int]
    """How many batches had how many rows."""
    reasons: Mapping[str, int]
    """Why batches left: ``"full"``, ``"all clients in"``, ``"deadline"``,
    ``"minimum reached"``, ``"closing"``."""
    cancelled: int
    """Requests withdrawn by their callers before they were answered."""
    timed_out: int
    """Requests whose own timeout passed."""
    refused: int
    """Requests that were not accepted: invalid, no room, or the server was closing."""
    failed: int
    """Requests answered with an error of the policy, or by a server that went away."""
    queue_depth: int
    """Rows waiting now."""
    policy_version: int
    """The version that serves now."""
    weight_updates: int
    """Updates of the policy."""
    weights_skipped: int
    """Versions that were never served, because newer ones came before them."""
    weights_refused: int
    """Weights that did not fit, or were not newer than those in service."""
    policy_staleness: int
    """Versions that the policy is behind the newest one that was announced."""
    policy_age_s: float
    """Seconds since the policy was updated, or since the server was made."""
    p50_queue_ms: float
    p95_queue_ms: float
    p99_queue_ms: float
    """From submission to the start of the forward's batch."""
    p50_forward_ms: float
    p95_forward_ms: float
    p99_forward_ms: float
    """The policy's own time, per batch."""
    p50_latency_ms: float
    p95_latency_ms: float
    p99_latency_ms: float
    """From submission to answer."""

    @property
    def requests_per_s(self) -> float:
        """Accepted requests per second."""
        return self.requests / self.elapsed_s if self.elapsed_s > 0 else 0.0

    @property
    def rows_per_s(self) -> float:
        """Rows through a forward per second."""
        return self.rows / self.elapsed_s if self.elapsed_s > 0 else 0.0

    @property
    def batches_per_s(self) -> float:
        """Forwards per second."""
        return self.batches / self.elapsed_s if self.elapsed_s > 0 else 0.0

    @property
    def avg_batch_size(self) -> float:
        """Mean rows per forward."""
        return self.rows / self.batches if self.batches else 0.0

    def __getitem__(self, name: str) -> Any:
        if name not in _NAMES:
            raise KeyError(name)
        return getattr(self, name)

    def __iter__(self) -> Iterator[str]:
        return iter(_NAMES)

    def __len__(self) -> int:
        return len(_NAMES)

    def __str__(self) -> str:
        troubles = ("cancelled", "timed_out", "refused", "failed")
        lines = [
            _line("requests", f"{self.requests:,}"),
            *[_line(name.replace("_", " "), f"{self[name]:,}") for name in troubles if self[name]],
            _line("requests/s", f"{self.requests_per_s:,.0f}"),
            _line("batches", f"{self.batches:,}"),
            _line("mean batch, rows", f"{self.avg_batch_size:.1f}"),
            "why batches left",
        ]
        reasons = sorted(self.reasons.items(), key=lambda item: -item[1])
        lines += [_line("  " + reason, f"{count:,}") for reason, count in reasons]
        lines.append(_line("times, ms", "p50", "p95", "p99"))
        for title, name in (
            ("queue wait", "queue"),
            ("forward", "forward"),
            ("latency", "latency"),
        ):
            values = [self[f"{percentile}_{name}_ms"] for percentile in ("p50", "p95", "p99")]
            lines.append(_line("  " + title, *[f"{value:.3f}" for value in values]))
        return "\n".join(lines)


_NAMES = (
    *(field.name for field in dataclasses.fields(ServerStats)),
    "requests_per_s",
    "rows_per_s",
    "batches_per_s",
    "avg_batch_size",
)


def _line(name: str, *columns: str) -> str:
    return f"{name:24}" + "".join([f"{column:>10}" for column in columns])


class StatsRecorder:
    """Counts. The server's loop writes; any thread may read and reset.

    Totals only ever grow; a reset remembers them as the new zero, so that nothing counted
    meanwhile on another thread is lost.
    """

    def __init__(self, now: float) -> None:
        self.requests = 0
        self.cancelled = 0
        self.timed_out = 0
        self.failed = 0
        self.weight_updates = 0
        self.weights_skipped = 0
        self.weights_refused = 0
        self._refused = 0
        self._rows = 0
        self._sizes: Counter[int] = Counter()
        self._reasons: Counter[str] = Counter()
        self._window: deque[BatchTimes] = deque()
        self._in_window = 0
        self._lock = threading.Lock()
        self._since = now
        self._zero = self._totals()

    def batch(self, rows: int, reason: Reason, times: BatchTimes) -> None:
        """Count a forward that gave answers."""
        with self._lock:
            self._rows += rows
            self._sizes[rows] += 1
            self._reasons[reason.value] += 1
            self._window.append(times)
            self._in_window += len(times.submitted_at)
            while self._in_window > WINDOW and len(self._window) > 1:
                self._in_window -= len(self._window.popleft().submitted_at)

    def count(self, name: str, number: int) -> None:
        """Add to a counter; any thread may call this."""
        with self._lock:
            setattr(self, name, getattr(self, name) + number)

    def refuse(self) -> None:
        """Count a request that was not accepted; any thread may call this."""
        with self._lock:
            self._refused += 1

    def snapshot(
        self,
        now: float,
        *,
        queue_depth: int,
        policy_version: int,
        policy_staleness: int = 0,
        policy_age_s: float = 0.0,
        reset: bool,
    ) -> ServerStats:
        """Return what was counted since the last reset, and maybe reset."""
        with self._lock:
            totals, since = self._totals(), self._since
            window = list(self._window)
            zero = self._zero
            if reset:
                self._zero, self._since = totals, now
                self._window.clear()
                self._in_window = 0
        return ServerStats(
            elapsed_s=now - since,
            queue_depth=queue_depth,
            policy_version=policy_version,
            policy_staleness=policy_staleness,
            policy_age_s=policy_age_s,
            batches=sum(totals.sizes.values()) - sum(zero.sizes.values()),
            batch_sizes=dict(sorted((totals.sizes - zero.sizes).items())),
            reasons=dict(totals.reasons - zero.reasons),
            **{
                name: getattr(totals, name) - getattr(zero, name)
                for name in _Totals._fields
                if name not in ("sizes", "reasons")
            },
            **_percentiles(window),  # type: ignore[arg-type]
        )

    def _totals(self) -> _Totals:
        return _Totals(
            requests=self.requests,
            rows=self._rows,
            cancelled=self.cancelled,
            timed_out=self.timed_out,
            refused=self._refused,
            failed=self.failed,
            weight_updates=self.weight_updates,
            weights_skipped=self.weights_skipped,
            weights_refused=self.weights_refused,
            sizes=self._sizes.copy(),
            reasons=self._reasons.copy(),
        )


class _Totals(NamedTuple):
    requests: int
    rows: int
    cancelled: int
    timed_out: int
    refused: int
    failed: int
    weight_updates: int
    weights_skipped: int
    weights_refused: int
    sizes: Counter[int]
    reasons: Counter[str]


def _percentiles(window: Sequence[BatchTimes]) -> dict[str, float]:
    """Nearest-rank percentiles in milliseconds, by field name; zeros for an empty window."""
    samples = {
        "queue": [t.dispatched_at - at for t in window for at in t.submitted_at],
        "forward": [t.forward_s for t in window],
        "latency": [t.answered_at - at for t in window for at in t.submitted_at],
    }
    found = {}
    for name, values in samples.items():
        values.sort()
        for percent in (50, 95, 99):
            rank = round((len(values) - 1) * percent / 100)
            found[f"p{percent}_{name}_ms"] = values[rank] * 1e3 if values else 0.0
    return found
