"""A server and its clients in virtual time, driving the very batcher that serves.

Use it to size a system before it exists: so many actors that think for so long, a forward
that costs so much, and the settings of a server::

    from aioinfer.simulation import Clients, Constant, Exponential, simulate

    result = simulate(
        [Clients(60, Exponential(0.004)), Clients(4, Constant(0.05))],
        forward_cost=lambda rows: 0.001 + 0.0001 * rows,
        max_batch_size=64,
        duration=10.0,
    )
    print(result.throughput, result.p99_latency)

Every client is a closed loop: it asks, waits for the answer, thinks, and asks again. Nothing
but thinking, waiting and the forward takes time. Times are in seconds. The same arguments and
seed give the same result, to the last bit.
"""

from __future__ import annotations

import abc
import dataclasses
import heapq
import itertools
import math
import random
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from aioinfer.batching import (
    DEFAULT_STATIC_TIMEOUT_S,
    DEFAULT_TIMEOUT_S,
    Batcher,
    Dispatch,
)
from aioinfer.request import Request, Source, State

__all__ = [
    "Bimodal",
    "Bursts",
    "Clients",
    "Constant",
    "Exponential",
    "Pareto",
    "SimulationResult",
    "ThinkTime",
    "Uniform",
    "simulate",
]


class ThinkTime(abc.ABC):
    """How long a client takes from an answer to its next request."""

    @abc.abstractmethod
    def sample(self, rng: random.Random, now: float) -> float:
        """Draw a think time, in seconds, for an answer received at ``now``."""


@dataclasses.dataclass(frozen=True)
class Constant(ThinkTime):
    """Always the same."""

    seconds: float

    def sample(self, rng: random.Random, now: float) -> float:
        return self.seconds


@dataclasses.dataclass(frozen=True)
class Uniform(ThinkTime):
    """Evenly between two bounds."""

    low: float
    high: float

    def sample(self, rng: random.Random, now: float) -> float:
        return rng.uniform(self.low, self.high)


@dataclasses.dataclass(frozen=True)
class Exponential(ThinkTime):
    """Memoryless, with this mean."""

    mean: float

    def sample(self, rng: random.Random, now: float) -> float:
        return rng.expovariate(1.0 / self.mean)


@dataclasses.dataclass(frozen=True)
class Pareto(ThinkTime):
    """Heavy-tailed: mostly near ``minimum``, now and then much longer.

    ``shape`` above 1 has a mean, ``minimum * shape / (shape - 1)``; above 2 a variance.
    """

    minimum: float
    shape: float = 1.5

    def sample(self, rng: random.Random, now: float) -> float:
        return self.minimum * rng.paretovariate(self.shape)


@dataclasses.dataclass(frozen=True)
class Bimodal(ThinkTime):
    """Mostly short, sometimes long (an environment that resets, say)."""

    short: float
    long: float
    share_of_long: float

    def sample(self, rng: random.Random, now: float) -> float:
        return self.long if rng.random() < self.share_of_long else self.short


@dataclasses.dataclass(frozen=True)
class Bursts(ThinkTime):
    """``think``, but at the end of every ``period`` all pause until the next one starts.

    ``active`` is the share of the period in which they ask.
    """

    think: ThinkTime
    period: float
    active: float

    def sample(self, rng: random.Random, now: float) -> float:
        done = now + self.think.sample(rng, now)
        phase = done % self.period
        if phase > self.active * self.period:
            done += self.period - phase
        return done - now


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
    """

    count: int
    think: ThinkTime
    rows: int = 1
    joins_at: float = 0.0
    leaves_at: float = math.inf
    timeout: float | None = None
    priority: int = 0
    signature: str = ""


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
    utilisation: float
    """Share of the time that the executor was busy."""
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
        return self.rows / self.batches if self.batches else 0.0


def simulate(
    clients: Sequence[Clients],
    forward_cost: Callable[[int], float],
    *,
    duration: float = 10.0,
    warmup: float = 0.0,
    seed: int = 0,
    max_batch_size: int = 64,
    min_batch_size: int | None = None,
    timeout: float | None = None,
    max_queue_size: int | None = None,
    **batcher_options: Any,
) -> SimulationResult:
    """Run a server and its clients in virtual time.

    Args:
        clients: who asks.
        forward_cost: seconds that a forward of so many rows takes.
        duration: seconds of virtual time that are counted.
        warmup: seconds before that, which are not.
        seed: of the think times.
        max_batch_size: as of the server, like the other settings below.
        min_batch_size: ``None`` is the server's own judgement.
        timeout: ``None`` is the server's default.
        max_queue_size: ``None`` for no bound.
        batcher_options: further arguments of :class:`aioinfer.batching.Batcher`.

    Returns:
        What happened in the counted time.
    """
    batcher = Batcher(
        max_batch_size=max_batch_size,
        min_batch_size=min_batch_size,
        max_queue_size=2**62 if max_queue_size is None else max_queue_size,
        timeout=_timeout(timeout, min_batch_size),
        **batcher_options,
    )
    return _Simulation(clients, forward_cost, batcher, warmup, duration, seed).run()


class _Client:
    def __init__(self, kind: Clients) -> None:
        self.kind = kind
        self.source = Source()


class _Simulation:
    """Events in order of time: a client asks, a forward ends, the batcher wanted to be asked."""

    def __init__(
        self,
        clients: Sequence[Clients],
        forward_cost: Callable[[int], float],
        batcher: Batcher,
        warmup: float,
        duration: float,
        seed: int,
    ) -> None:
        self._rng = random.Random(seed)
        self._cost = forward_cost
        self._batcher = batcher
        self._warmup = warmup
        self._end = warmup + duration
        self._now = 0.0
        self._order = itertools.count()
        self._events: list[tuple[float, int, Callable[..., None], tuple[Any, ...]]] = []
        self._wake_at = math.inf
        self._arrivals = 0
        self._arrivals_wanted = 0
        self._asked = True
        self._free_since = 0.0
        self._busy_time = 0.0
        self._latencies: list[float] = []
        self._rows = 0
        self._timed_out = 0
        self._longest_hold = 0.0
        self._sizes: Counter[int] = Counter()
        self._reasons: Counter[str] = Counter()
        for kind in clients:
            for _ in range(kind.count):
                self._at(kind.joins_at, self._join, _Client(kind))

    def run(self) -> SimulationResult:
        events = self._events
        while events and events[0][0] <= self._end:
            self._now, _, event, arguments = heapq.heappop(events)
            event(*arguments)
            # Whatever happens at one moment is seen by one decision, as on a real loop.
            if not (events and events[0][0] == self._now):
                self._decide()
        latencies = sorted(self._latencies)
        count = len(latencies)
        return SimulationResult(
            duration=self._end - self._warmup,
            requests=count,
            rows=self._rows,
            batches=sum(self._sizes.values()),
            timed_out=self._timed_out,
            utilisation=self._busy_time / (self._end - self._warmup),
            batch_sizes=dict(sorted(self._sizes.items())),
            reasons=dict(self._reasons),
            p50_latency=_percentile(latencies, 0.50),
            p95_latency=_percentile(latencies, 0.95),
            p99_latency=_percentile(latencies, 0.99),
            mean_latency=sum(latencies) / count if count else 0.0,
            longest_hold=self._longest_hold,
        )

    def _at(self, when: float, event: Callable[..., None], *arguments: Any) -> None:
        heapq.heappush(self._events, (when, next(self._order), event, arguments))

    # -- events -------------------------------------------------------------

    def _join(self, client: _Client) -> None:
        self._batcher.join(client.source)
        self._think(client)

    def _think(self, client: _Client) -> None:
        when = self._now + client.kind.think.sample(self._rng, self._now)
        if when < client.kind.leaves_at:
            self._at(when, self._ask, client)
        else:
            self._at(client.kind.leaves_at, self._batcher.leave, client.source)

    def _ask(self, client: _Client) -> None:
        kind = client.kind
        request = Request(
            None, kind.rows, True, kind.signature, kind.timeout, kind.priority,
            client.source, client,
        )  # fmt: skip
        request.submitted_at = self._now
        if kind.timeout is not None:
            request.deadline = self._now + kind.timeout
            self._at(request.deadline, self._give_up, request)
        self._batcher.push(request)
        self._arrivals += 1
        self._asked = self._asked or (request.special and kind.rows > 1)

    def _give_up(self, request: Request) -> None:
        if request.state is not State.DONE:
            self._batcher.discard(request)
            self._answered_late(request)

    def _wake(self, when: float) -> None:
        if when == self._wake_at:
            self._wake_at = math.inf
            self._asked = True

    def _forward_ends(self, requests: list[Request], started: float) -> None:
        in_time = [r for r in requests if r.state is not State.DONE]
        self._batcher.forward_ended(requests, self._now)
        self._asked = True
        self._free_since = self._now
        if self._now > self._warmup:
            self._busy_time += self._now - max(started, self._warmup)
            self._latencies += [self._now - r.submitted_at for r in in_time]
            self._rows += sum(r.rows for r in in_time)
        for request in in_time:
            self._think(request.handle)

    def _answered_late(self, request: Request) -> None:
        if self._now > self._warmup:
            self._timed_out += 1
        self._think(request.handle)

    # -- decisions ----------------------------------------------------------

    def _decide(self) -> None:
        # As the server does: no question unless something happened that may matter.
        if not self._asked and self._arrivals < self._arrivals_wanted:
            return
        while True:
            self._asked = False
            self._arrivals = 0
            action = self._batcher.next_action(self._now)
            if not isinstance(action, Dispatch):
                break
            for request in action.expired:
                self._answered_late(request)
            if action.requests:
                self._start(action)
        self._arrivals_wanted = action.arrivals
        if action.until is not None and action.until < self._wake_at:
            self._wake_at = max(action.until, math.nextafter(self._now, math.inf))
            self._at(self._wake_at, self._wake, self._wake_at)

    def _start(self, action: Dispatch) -> None:
        if self._now > self._warmup:
            oldest = min(request.submitted_at for request in action.requests)
            held = self._now - max(oldest, self._free_since)
            self._longest_hold = max(self._longest_hold, held)
            self._sizes[action.rows] += 1
            self._reasons[action.reason.value] += 1
        ends = self._now + self._cost(action.size)
        self._at(ends, self._forward_ends, action.requests, self._now)


def _timeout(timeout: float | None, min_batch_size: int | None) -> float:
    if timeout is not None:
        return timeout
    return DEFAULT_TIMEOUT_S if min_batch_size is None else DEFAULT_STATIC_TIMEOUT_S


def _percentile(ordered: list[float], at: float) -> float:
    return ordered[round((len(ordered) - 1) * at)] if ordered else 0.0
