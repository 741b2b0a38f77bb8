"""Servers and their clients in virtual time."""

from __future__ import annotations

import contextlib
import gc
import itertools
import math
import random
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from aioinfer.balancing import Balancer, room_for
from aioinfer.batching import DEFAULT_STATIC_TIMEOUT_S, DEFAULT_TIMEOUT_S, Batcher
from aioinfer.request import GivenUp, Request, Source
from aioinfer.simulation.agenda import Agenda
from aioinfer.simulation.records import Clients, SimulationResult
from aioinfer.simulation.replica import Replica


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
    replicas: int = 1,
    room: int | None = None,
    network: float = 0.0,
    **batcher_options: Any,
) -> SimulationResult:
    """Run servers and their clients in virtual time.

    Several replicas share the clients as they do in earnest: each process of clients chooses
    where to send with a :class:`aioinfer.balancing.Balancer`.

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
        replicas: how many servers there are, each with its own executor.
        room: rows that clients let one replica have under way before they use a second one too;
            ``None`` for what follows from the cost of a forward, as servers tell their clients.
        network: seconds that a request takes to its server, and an answer back.
        batcher_options: further arguments of :class:`aioinfer.batching.Batcher`.

    Returns:
        What happened in the counted time.

    Raises:
        ValueError: a number that makes no sense; the message says which.
    """
    for name, value, allowed, fits in (
        ("duration", duration, "finite and > 0 seconds", 0 < duration < math.inf),
        ("warmup", warmup, "finite and >= 0 seconds", 0 <= warmup < math.inf),
        ("network", network, "finite and >= 0 seconds", 0 <= network < math.inf),
        ("replicas", replicas, "at least 1", replicas >= 1),
        ("room", room, "None or at least 1", room is None or room >= 1),
    ):
        if not fits:
            raise ValueError(f"{name} must be {allowed}, got {value!r}")

    def batcher() -> Batcher:
        return Batcher(
            max_batch_size=max_batch_size,
            min_batch_size=min_batch_size,
            max_queue_size=2**62 if max_queue_size is None else max_queue_size,
            timeout=_timeout(timeout, min_batch_size),
            **batcher_options,
        )

    if room is None:
        room = _room(max_batch_size, forward_cost)
    with _no_collector():
        simulation = _Simulation(network, warmup, duration, seed)
        simulation.serve([batcher() for _ in range(replicas)], forward_cost)
        simulation.join(clients, room)
        return simulation.run()


class _Client:
    __slots__ = ("balancer", "kind", "sources")

    def __init__(self, kind: Clients, balancer: Balancer[int] | None, replicas: int) -> None:
        self.kind = kind
        self.balancer = balancer
        self.sources: list[Source | None] = [None] * replicas
        """Itself as each replica knows it, from its first request there."""


class _Simulation:
    """The clients, and the network between them and the replicas."""

    def __init__(self, network: float, warmup: float, duration: float, seed: int) -> None:
        self._network = network
        self._warmup = warmup
        self._duration = duration
        self._rng = random.Random(seed)
        self._seeds = itertools.count(seed)
        self._agenda = Agenda(warmup + duration)
        self._replicas: list[Replica] = []
        self._latencies: list[float] = []
        self._rows = 0
        self._timed_out = 0

    def serve(self, batchers: Sequence[Batcher], cost: Callable[[int], float]) -> None:
        self._replicas = [
            Replica(index, batcher, cost, self._agenda, self._warmup, self._answer, self._refuse)
            for index, batcher in enumerate(batchers)
        ]

    def join(self, clients: Sequence[Clients], room: int) -> None:
        for kind in clients:
            balancer: Balancer[int] | None = None
            for number in range(kind.count):
                if len(self._replicas) > 1 and number % kind.per_process == 0:
                    balancer = Balancer(room, seed=next(self._seeds))
                    for replica in self._replicas:
                        balancer.add(replica.index)
                client = _Client(kind, balancer, len(self._replicas))
                self._agenda.add(kind.joins_at, self._join, client)

    def run(self) -> SimulationResult:
        self._agenda.run()
        latencies = sorted(self._latencies)
        count = len(latencies)
        replicas, self._replicas = self._replicas, []  # which refer to us
        sizes = sum([replica.sizes for replica in replicas], Counter[int]())
        return SimulationResult(
            duration=self._duration,
            requests=count,
            rows=self._rows,
            batches=sum(sizes.values()),
            timed_out=self._timed_out,
            utilisations=tuple(replica.utilisation() for replica in replicas),
            batch_sizes=dict(sorted(sizes.items())),
            reasons=dict(sum([replica.reasons for replica in replicas], Counter[str]())),
            p50_latency=_percentile(latencies, 0.50),
            p95_latency=_percentile(latencies, 0.95),
            p99_latency=_percentile(latencies, 0.99),
            mean_latency=sum(latencies) / count if count else 0.0,
            longest_hold=max(replica.longest_hold for replica in replicas),
        )

    # -- clients ------------------------------------------------------------

    def _join(self, client: _Client) -> None:
        if client.balancer is None:
            self._source(client, self._replicas[0])
        self._think(client)

    def _source(self, client: _Client, replica: Replica) -> Source:
        source = client.sources[replica.index]
        if source is None:
            source = client.sources[replica.index] = Source()
            replica.batcher.join(source)
        return source

    def _leave(self, client: _Client) -> None:
        for replica, source in zip(self._replicas, client.sources, strict=True):
            if source is not None:
                replica.batcher.leave(source)

    def _think(self, client: _Client) -> None:
        now = self._agenda.now
        when = now + client.kind.think.sample(self._rng, now)
        if when < client.kind.leaves_at:
            self._agenda.add(when, self._ask, client)
        else:
            self._agenda.add(client.kind.leaves_at, self._leave, client)

    def _ask(self, client: _Client) -> None:
        kind = client.kind
        replica = self._replicas[0]
        if client.balancer is not None:
            replica = self._replicas[client.balancer.choose(kind.rows)]
            client.balancer.sent(replica.index, kind.rows)
        request = Request(
            None, kind.rows, kind.rows > 1, kind.signature, kind.timeout, kind.priority,
            client.sources[replica.index] or self._source(client, replica), client,
        )  # fmt: skip
        if kind.timeout is not None:
            request.deadline = self._agenda.now + kind.timeout
            self._agenda.add(request.deadline, self._give_up, (replica, request))
        self._travels(self._arrives, (replica, request))

    def _give_up(self, about: tuple[Replica, Request]) -> None:
        _, request = about
        if request.given_up is None and request.handle is not None:
            self._late(about)
            self._travels(self._withdrawn, about)

    def _answered(self, about: tuple[Replica, Sequence[Request], int]) -> None:
        replica, requests, load = about
        now = self._agenda.now
        counts = now > self._warmup
        for request in requests:
            if request.given_up is not None:
                continue
            client: _Client = request.handle
            request.handle = None
            if counts:
                self._latencies.append(now - request.submitted_at + self._network)
                self._rows += request.rows
            if client.balancer is not None:
                client.balancer.answered(replica.index, request.rows, load)
            self._think(client)

    def _late(self, about: tuple[Replica, Request]) -> None:
        replica, request = about
        if request.given_up is not None:
            return
        request.given_up = GivenUp.TIMED_OUT
        if self._agenda.now > self._warmup:
            self._timed_out += 1
        client: _Client = request.handle
        if client.balancer is not None:
            client.balancer.answered(replica.index, request.rows)
        self._think(client)

    # -- the network --------------------------------------------------------

    def _travels(self, what: Callable[[Any], None], about: Any) -> None:
        if self._network:
            self._agenda.add(self._agenda.now + self._network, what, about)
        else:
            what(about)

    def _arrives(self, about: tuple[Replica, Request]) -> None:
        replica, request = about
        if request.given_up is None:
            replica.take(request)

    def _withdrawn(self, about: tuple[Replica, Request]) -> None:
        replica, request = about
        replica.withdraw(request)

    def _answer(self, replica: Replica, requests: Sequence[Request], load: int) -> None:
        self._travels(self._answered, (replica, requests, load))

    def _refuse(self, replica: Replica, request: Request) -> None:
        self._travels(self._late, (replica, request))


@contextlib.contextmanager
def _no_collector() -> Iterator[None]:
    # There is no cyclic garbage, and to look for it among a million clients, again and again,
    # takes longer than all the rest.
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _timeout(timeout: float | None, min_batch_size: int | None) -> float:
    if timeout is not None:
        return timeout
    return DEFAULT_TIMEOUT_S if min_batch_size is None else DEFAULT_STATIC_TIMEOUT_S


def _room(max_batch_size: int, cost: Callable[[int], float]) -> int:
    one, full = cost(1), cost(max_batch_size)
    per_row = max(0.0, full - one) / max(1, max_batch_size - 1)
    return room_for(max_batch_size, max(0.0, one - per_row), per_row)


def _percentile(ordered: list[float], at: float) -> float:
    return ordered[round((len(ordered) - 1) * at)] if ordered else 0.0
