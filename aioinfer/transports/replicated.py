"""The link to several servers of one policy: each request goes to one of them.

It is the clients' side only, made of one transport per replica. Where a request goes is decided
in :mod:`aioinfer.balancing`; here it is sent on, and sent on again if its replica goes away.
Inference has no side effects, so a request may be computed twice; it is answered once.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
import weakref
from collections.abc import Callable, Hashable, Iterable, Mapping
from typing import Any

import aioinfer.arguments as arguments
from aioinfer.balancing import Balancer
from aioinfer.blocking import BackgroundLoop, OwnLoop
from aioinfer.clock import Clock, MonotonicClock, RemoteTimer
from aioinfer.errors import InferenceError, ServerClosedError
from aioinfer.forks import forgets
from aioinfer.intake import Intake
from aioinfer.request import GivenUp, Request, Source
from aioinfer.transports.attempt import GONE, Attempt, Replica, ReplicatedWaiter
from aioinfer.transports.base import InferenceTransport

MAX_RETRIES = 2
"""How often a request that a replica took down with it is sent on: one that is itself the reason
must not take down all of them."""
FIRST_PAUSE_S = 0.1
"""Seconds for which a replica that went away is left alone; twice as long each time."""
LONGEST_PAUSE_S = 5.0
DEFAULT_ROOM = 64
"""Rows for which a replica has room until it says so itself."""


class ReplicatedTransport(InferenceTransport):
    """Spreads requests over several servers of the same policy, each with a transport of its own.

    As few replicas are used as have room for the rows under way, and of these the least loaded.
    Requests of a replica that dies or closes are sent to another one, with the time that is left
    to them. It is left alone for a while, and then tried again. Replicas may be added and removed
    at any time. Clients, and the transport itself, pickle if the transports of the replicas do; the
    copy knows the replicas of that moment.

    Args:
        replicas: the transport of each replica, by name. Where several processes share them, the
            order should be the same everywhere.
        room: rows that one replica has room for, before a second one is used too; ``None`` for
            what the replicas themselves say, where they do, from what their forwards cost.
        retry: whether requests of a replica that goes away are sent to another one.
        otherwise: where to send a request if no replica is known to be there.
        clock: for tests.
    """

    def __init__(
        self,
        replicas: Mapping[Any, InferenceTransport] | None = None,
        *,
        room: int | None = None,
        retry: bool = True,
        otherwise: InferenceTransport | None = None,
        clock: Clock | None = None,
    ) -> None:
        self._room = None if room is None else arguments.count("room", room)
        self._retry = arguments.flag("retry", retry)
        self._clock: Clock = MonotonicClock() if clock is None else clock
        self._replicas: dict[Hashable, Replica] = {}
        self._otherwise: Replica | None = None
        if otherwise is not None:
            self._otherwise = Replica("otherwise", otherwise, None)
            self._otherwise.removed = True  # it is no replica: nothing is learnt of it, nor kept
        self._begin()
        for name, transport in (replicas or {}).items():
            self.add(name, transport)
        forgets(self)

    def _begin(self) -> None:
        """Start with nothing under way."""
        self._lock = threading.Lock()
        self._balancer: Balancer[Replica] = Balancer(self._room or DEFAULT_ROOM)
        for replica in self._replicas.values():
            replica.rows, replica.back_at, replica.pause_s = 0, 0.0, 0.0
            self._balancer.add(replica, replica.room)
        self._absent: list[Replica] = []
        self._background = OwnLoop(self)

    def __reduce__(self) -> Any:
        with self._lock:
            replicas = [(r.name, r.transport, r.room) for r in self._replicas.values()]
        otherwise = None if self._otherwise is None else self._otherwise.transport
        return _elsewhere, (replicas, self._room, self._retry, otherwise)

    # -- replicas -----------------------------------------------------------

    @property
    def replicas(self) -> dict[Any, InferenceTransport]:
        """The replicas that there are, in the order in which they are used."""
        with self._lock:
            return {name: replica.transport for name, replica in self._replicas.items()}

    def add(self, name: Hashable, transport: InferenceTransport, room: int | None = None) -> None:
        """Send requests to this one too. A replica of the same name is replaced.

        Args:
            name: what it is called, in :meth:`remove` and in errors.
            transport: the link to it.
            room: as of the transport, where this replica differs from the others.
        """
        if not isinstance(transport, InferenceTransport):
            raise TypeError(f"transport must be an InferenceTransport, got {transport!r}")
        if room is not None:
            room = arguments.count("room", room)
        replica = Replica(name, transport, room)
        with self._lock:
            replaced = self._replicas.get(name)
            goodbye = None if replaced is None else self._take_out(replaced)
            self._replicas[name] = replica
            self._balancer.add(replica, room)
        if goodbye is not None:
            goodbye()

    def remove(self, name: Hashable) -> None:
        """Send nothing more to this one; what it has is still answered. Harmless if unknown."""
        with self._lock:
            replica = self._replicas.pop(name, None)
            goodbye = None if replica is None else self._take_out(replica)
        if goodbye is not None:
            goodbye()

    def arrange(self, names: Iterable[Hashable]) -> None:
        """Use the replicas in this order, which names all of them, from now on."""
        with self._lock:
            self._replicas = {name: self._replicas[name] for name in names}
            self._balancer.arrange(self._replicas.values())

    def rows_under_way(self, name: Hashable) -> int:
        """Return how many rows of this transport's clients a replica has not answered."""
        with self._lock:
            replica = self._replicas.get(name)
            return 0 if replica is None else replica.rows

    def _take_out(self, replica: Replica) -> Callable[[], None] | None:
        """Take a replica out, under the lock; return what is to be done after, if anything is."""
        replica.removed = True
        self._balancer.remove(replica)
        if replica in self._absent:
            self._absent.remove(replica)
        return None if replica.rows else replica.let_go()

    # -- used by clients ----------------------------------------------------

    @property
    def clock(self) -> Clock:
        return self._clock

    def waiter(self) -> ReplicatedWaiter:
        return ReplicatedWaiter()

    def send(
        self, request: Request, loop: asyncio.AbstractEventLoop | None, *, block: bool = True
    ) -> None:
        handle = request.handle
        in_thread = loop is None and isinstance(handle, ReplicatedWaiter)
        request.submitted_at = self._clock()
        if request.timeout is not None:
            request.deadline = request.submitted_at + request.timeout
        background = None
        if loop is None and not in_thread:  # a future: it waits on no thread, so it needs a loop
            background = self._background_loop()
            loop = background.loop
        attempt = Attempt(self, request, loop)
        request.data, request.port = None, attempt  # type: ignore[assignment]
        if in_thread:
            handle.attempt = attempt
        if background is None:
            self._set_out(attempt, block)
            return

        async def send() -> None:
            self._set_out(attempt, block)

        background.call(send)

    def give_up(self, request: Request, why: GivenUp) -> None:
        request.given_up = why
        attempt: Any = getattr(request, "port", None)
        if not isinstance(attempt, Attempt):
            return
        attempt.given_up = why
        if self.settled(attempt):
            attempt.replica.transport.give_up(attempt.inner, why)
            attempt.end()

    def wait_for_room(self, rows: int, timeout: float | None) -> bool:
        with self._lock:
            try:
                replica = self._balancer.choose(rows)
            except LookupError:  # sending says what is wrong
                return True
        try:
            return replica.transport.wait_for_room(rows, timeout)
        except InferenceError:  # so does this
            return True

    def call_at(self, when: float, callback: Callable[[], object]) -> RemoteTimer:
        return RemoteTimer(self._clock, self._background_loop().loop, when, callback)

    def join(self, source: Source) -> None:
        pass  # it joins a replica with its first request there

    def leave(self, source: Source) -> None:
        # No lock here: this runs from finalizers, which may interrupt a thread that holds it.
        for replica in self._all():
            replica.leave(source)

    # -- used by the server -------------------------------------------------

    async def attach(self, intake: Intake) -> None:
        raise RuntimeError(
            "a ReplicatedTransport is for clients; each replica serves the transport of its own "
            "that this one was given"
        )

    async def detach(self) -> None:
        pass

    # -- inside -------------------------------------------------------------

    def _set_out(self, attempt: Attempt, block: bool) -> None:
        """Send a request to a replica that takes it.

        Raises:
            InferenceError: none does, or the request is refused.
        """
        refusal: InferenceError | None = None
        while True:
            replica = self._take(attempt)
            if replica is None:
                attempt.end()
                raise refusal or ServerClosedError("this transport has no replica")
            try:
                replica.transport.send(attempt.inner, attempt.loop, block=block)
            except GONE as error:
                self.settled(attempt)
                self._left(replica)
                refusal = attempt.failed(error)
            except BaseException:
                self.settled(attempt)
                attempt.end()
                raise
            else:
                # It may have been given up while it was being sent.
                if attempt.given_up is not None and self.settled(attempt):
                    replica.transport.give_up(attempt.inner, attempt.given_up)
                    attempt.end()
                return

    def _take(self, attempt: Attempt) -> Replica | None:
        """Choose a replica that has not failed this request, and count it as sent there."""
        request: Request = attempt.inner
        with self._lock:
            replica = self._choose(request.rows, attempt.tried)
            if replica is None:
                return None
            attempt.tried.append(replica)
            attempt.replica = replica
            attempt.over = False
            replica.rows += request.rows
            self._balancer.sent(replica, request.rows)
        waits_here = isinstance(attempt.handle, ReplicatedWaiter)
        timeout = attempt.deadline
        if timeout is not None:
            timeout = max(0.0, timeout - self._clock())
        attempt.inner = Request(
            attempt.data,
            request.rows,
            request.batched,
            request.signature,
            timeout,
            request.priority,
            self._source(replica, attempt.source, waits_here),
            replica.transport.waiter() if waits_here else attempt,
        )
        return replica

    def _source(self, replica: Replica, of: Source, in_thread: bool) -> Source:
        """A client as this replica knows it."""
        with self._lock:
            source = replica.sources.get(of)
            if source is not None:
                return source
            source = Source(competes=in_thread and replica.transport.in_process)
            replica.sources[of] = source
        replica.transport.join(source)
        return source

    def _choose(self, rows: int, tried: list[Replica]) -> Replica | None:
        if self._absent:
            now = self._clock()
            for replica in [r for r in self._absent if r.back_at <= now]:
                self._return(replica)
        with contextlib.suppress(LookupError):
            best = self._balancer.choose(rows)
            if best not in tried:
                return best
        # None is known to be there, so those that were not may be asked again.
        if self._otherwise is not None and self._otherwise not in tried:
            return self._otherwise
        left = [replica for replica in self._replicas.values() if replica not in tried]
        return min(left, key=lambda replica: replica.back_at, default=None)

    def settled(self, attempt: Attempt, *, well: bool = False) -> bool:
        """The replica no longer has this request; return whether that is news."""
        with self._lock:
            if attempt.over:
                return False
            attempt.over = True
            replica, rows = attempt.replica, attempt.inner.rows
            replica.rows -= rows
            link = getattr(attempt.inner, "port", None) if well else None
            self._balancer.answered(replica, rows, getattr(link, "load", None))
            room = getattr(link, "room", None)
            if room and (self._room or replica.room) is None and not replica.removed:
                self._balancer.add(replica, room)
            if well and replica.pause_s:
                replica.pause_s = 0.0
                self._return(replica)
            goodbye = replica.let_go() if replica.removed and not replica.rows else None
        if goodbye is not None:
            goodbye()
        return True

    def _left(self, replica: Replica) -> None:
        """A replica is not there: leave it alone for a while."""
        with self._lock:
            if replica.removed or replica in self._absent:
                return
            replica.pause_s = min(2 * replica.pause_s or FIRST_PAUSE_S, LONGEST_PAUSE_S)
            replica.back_at = self._clock() + replica.pause_s
            self._balancer.pause(replica)
            self._absent.append(replica)

    def _return(self, replica: Replica) -> None:
        """A replica may be there again; the lock is held."""
        if replica in self._absent:
            self._absent.remove(replica)
            self._balancer.resume(replica)

    def again(self, attempt: Attempt, error: InferenceError) -> BaseException | None:
        """Send a request to another replica than the one that went; its error if that cannot be."""
        self._left(attempt.replica)
        error = attempt.failed(error)
        late = attempt.deadline is not None and self._clock() >= attempt.deadline
        if not self._retry or attempt.given_up is not None or late:
            return error
        if attempt.retries >= MAX_RETRIES or not self._others(attempt):
            return error
        attempt.retries += 1
        try:
            self._set_out(attempt, True)
        except InferenceError as refusal:
            return error if isinstance(refusal, ServerClosedError) else refusal
        except Exception as refusal:
            return refusal
        return None

    def _others(self, attempt: Attempt) -> bool:
        with self._lock:
            return any(replica not in attempt.tried for replica in self._all())

    def _all(self) -> list[Replica]:
        """The replicas, and what there is besides."""
        replicas = list(self._replicas.values())
        return replicas if self._otherwise is None else [*replicas, self._otherwise]

    def _background_loop(self) -> BackgroundLoop:
        return self._background.get()

    def _after_fork(self) -> None:
        """Forget, in a forked child, what is under way in the parent."""
        self._background.forget()
        for replica in self._all():
            replica.rows = 0
            replica.sources = weakref.WeakKeyDictionary()
        self._begin()


def _elsewhere(
    replicas: list[tuple[Hashable, InferenceTransport, int | None]],
    room: int | None,
    retry: bool,
    otherwise: InferenceTransport | None,
) -> ReplicatedTransport:
    """Make the transport in the process to which it was sent."""
    transport = ReplicatedTransport(room=room, retry=retry, otherwise=otherwise)
    for name, of_replica, its_room in replicas:
        transport.add(name, of_replica, its_room)
    return transport
