"""Who asks, and what came of it."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping

from aioinfer.simulation.thinking import ThinkTime


@dataclasses.dataclass(frozen=True)
class Clients:
    """So many clients that are alike.

    Attributes:
        count: how many.
        think: how long each takes from answer to request.
        rows: rows per request.
        joins_at: when they appear; each asks its first question after one think time.
        leaves_at: when they stop asking.
        timeout: seconds after which a client gives up a request that still waits; ``None``
            for never.
        priority: larger is served sooner.
        signature: clients of different signatures never share a batch.
        per_process: how many of them live in one process. With several replicas a process
            knows what its own clients have under way at each, and of the others only what
            the answers tell.
    """

    count: int
    think: ThinkTime
    rows: int = 1
    joins_at: float = 0.0
    leaves_at: float = math.inf
    timeout: float | None = None
    priority: int = 0
    signature: str = ""
    per_process: int = 16


@dataclasses.dataclass(frozen=True)
class SimulationResult:
    """What happened after the warm-up. Times in seconds."""

    duration: float
    requests: int
    """Requests answered."""
    rows: int
    """Rows answered."""
    batches: int
    timed_out: int
    utilisations: tuple[float, ...]
    """For each replica, the share of the time that its executor was busy."""
    batch_sizes: Mapping[int, int]
    """How many batches had how many rows."""
    reasons: Mapping[str, int]
    """Why batches left."""
    p50_latency: float
    p95_latency: float
    p99_latency: float
    """From submission to answer."""
    mean_latency: float
    longest_hold: float
    """The longest time a request waited while the executor was free."""

    @property
    def throughput(self) -> float:
        """Rows answered per second."""
        return self.rows / self.duration

    @property
    def mean_batch_size(self) -> float:
        """Mean rows per forward."""
        batched = sum(size * count for size, count in self.batch_sizes.items())
        return batched / self.batches if self.batches else 0.0

    @property
    def utilisation(self) -> float:
        """Share of the time that the executor was busy; of several, the mean."""
        return sum(self.utilisations) / len(self.utilisations)
