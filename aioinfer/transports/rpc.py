"""The conversation with a server in coalesced calls, where no direct connection can be made.

A cluster's own remote calls reach everywhere, but each costs as much as dozens of requests. So
frames that queue up while calls are under way travel together in the next one, and so do the
answers to many requests.

One call is ``exchange(connection, number, data)`` and returns ``(number, data)``. The client
keeps at least one call under way, which the server holds until it has something to say; that is
how answers, and the news that the server is closing or dead, come without being asked for. Calls
may overtake each other, so both directions are numbered from 1 on. Call 0 opens a connection and
call ``LEAVE`` ends it. An answer with the number ``LEAVE`` says that no call will be answered any
more, save those under way.

What carries the calls is given from outside: any awaitable function. Who may call is decided
there, too: the cluster does not let strangers call its actors.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import secrets
import struct
import threading
from collections import deque
from collections.abc import Awaitable, Callable
from typing import Any

from aioinfer.errors import InferenceError, InvalidRequestError, ServerClosedError, ServerDiedError
from aioinfer.intake import Intake, loop_closed, running_loop
from aioinfer.transports import channel as channels
from aioinfer.transports import peer as peers
from aioinfer.transports import wire
from aioinfer.transports.channel import Channel, no_server
from aioinfer.transports.peer import ON_LOOP, Peer
from aioinfer.transports.wire import Kind

Answer = tuple[int, bytes]
Exchange = Callable[[bytes, int, bytes], Awaitable[Answer]]

LEAVE = -1
DIED = -2
"""The number of an answer that comes in place of a server that went away."""
MAX_CALLS = 4
"""Calls of one connection under way at once. The server never holds all of them."""
HOLD_S = 20.0
"""Seconds for which the server holds a call, at most."""
LEASE_S = 60.0
"""Seconds after which a client that does not call is forgotten."""

CLOSING_S = 1.0
"""Seconds in which clients must have taken the last words of a server that closes."""

_VERSION = struct.Struct("<I")
_NOW = struct.Struct("<d")


# -- the client ---------------------------------------------------------------


class RpcCarrier:
    """Carries the frames of a :class:`~aioinfer.transports.direct.PendingChannel` in calls.

    Args:
        channel: the channel of the running loop.
        exchange: makes a call; whatever it raises means that the server cannot be reached.
    """

    def __init__(self, channel: Channel, exchange: Exchange) -> None:
        self._channel = channel
        self._exchange = exchange
        self._loop = asyncio.get_running_loop()
        self.id = secrets.token_bytes(16)
        """The name of the connection."""
        self._unsent: list[bytes] = []
        self._scheduled = False
        self._tasks: set[asyncio.Task[None]] = set()
        self._calls = 0
        """Calls under way."""
        self._number = 0
        self._heard = 0
        self._early: dict[int, bytes] = {}  # answers that have overtaken others
        self._last_words: list[bytes] | None = None
        self._over = False
        self.ended: asyncio.Future[None] = self._loop.create_future()

    async def open(self) -> RpcCarrier:
        """Open the connection; return the carrier itself.

        Raises:
            ServerClosedError: there is no server.
            ServerDiedError: it went away.
        """
        number, data = await self._exchange(self.id, 0, _VERSION.pack(wire.PROTOCOL))
        if number == DIED:
            self._channel.lose(_died())
        elif number == LEAVE:
            self._end(data)
        else:
            self._unsent.append(_NOW.pack(channels._clock()))
            self._call()
        return self

    def write(self, data: bytes) -> None:
        if self._over:
            return
        self._unsent.append(data)
        if not self._scheduled and self._calls < MAX_CALLS:
            self._scheduled = True
            self._loop.call_soon(self._call)  # with what else is asked in this turn

    def close(self) -> None:
        if self._over:
            return
        self._over = True
        if self._loop.is_closed():
            return
        for task in self._tasks:
            task.cancel()
        farewell = self._exchange(self.id, LEAVE, b"".join(self._unsent))
        if asyncio.iscoroutine(farewell):
            self._start(_ignored(farewell)).add_done_callback(self._say_ended)
        else:  # it is on its way
            self._say_ended()

    def forget(self) -> None:
        self._over = True

    def _say_ended(self, _: object = None) -> None:
        if not self.ended.done():
            self.ended.set_result(None)

    def _call(self) -> None:
        self._scheduled = False
        if self._over or self._last_words is not None or self._calls >= MAX_CALLS:
            return
        data, self._unsent = b"".join(self._unsent), []
        self._number += 1
        self._calls += 1
        self._start(self._answered(self._number, data))

    def _start(self, coroutine: Any) -> asyncio.Task[None]:
        task: asyncio.Task[None] = self._loop.create_task(coroutine, name="aioinfer calls")
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def _answered(self, number: int, data: bytes) -> None:
        try:
            number, answer = await self._exchange(self.id, number, data)
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if task is None or task.cancelling():
                raise
            self._channel.lose(_died())  # it was the server that cancelled the call
            return
        except InferenceError as error:
            self._channel.lose(error)
            return
        except Exception as error:
            self._channel.lose(ServerDiedError(f"the server cannot be reached: {error}"))
            return
        self._calls -= 1
        if number == DIED:
            self._channel.lose(_died())
            return
        if number == LEAVE:
            self._last_words = [*(self._last_words or ()), answer]
        else:
            self._early[number] = answer
            while (following := self._early.pop(self._heard + 1, None)) is not None:
                self._heard += 1
                if following:
                    self._channel.hear(following)
        if self._last_words is not None:
            if not self._calls:
                self._end(b"".join(self._last_words))
        elif self._unsent or not self._calls:
            self._call()

    def _end(self, last_words: bytes) -> None:
        if last_words:
            self._channel.hear(last_words)
        self._channel.lose(no_server())


def _died() -> ServerDiedError:
    return ServerDiedError("the process of the server has ended")


async def _ignored(call: Awaitable[Answer]) -> None:
    with contextlib.suppress(Exception):
        await call


# -- the server ---------------------------------------------------------------


class RpcHub:
    """The server's end of all connections that are carried by calls.

    Args:
        intake: where requests go.
    """

    def __init__(self, intake: Intake) -> None:
        self._intake = intake
        self._peers: dict[bytes, RpcPeer] = {}
        self._leaving: dict[bytes, RpcPeer] = {}
        """Those whose last words wait for a call."""
        self._left: asyncio.Future[None] | None = None
        self._taken: set[asyncio.Task[Answer]] = set()
        # Calls from other loops. Those that the server's loop no longer comes to are answered by
        # close(), so under this lock they are either among them, or too late.
        self._asked: set[concurrent.futures.Future[Answer]] = set()
        self._over = False
        self._lock = threading.Lock()

    async def exchange(self, connection: bytes, number: int, data: bytes) -> Answer:
        """What actors expose to the clients: one call of one of them, on any event loop."""
        loop = self._intake.loop
        if running_loop() is loop:
            return await self._exchange(connection, number, data)
        answer: concurrent.futures.Future[Answer] = concurrent.futures.Future()
        with self._lock:
            if self._over:
                return self._too_late()
            try:
                # The coroutine is made there: a loop that ends first would leave it unawaited.
                loop.call_soon_threadsafe(self._take, answer, connection, number, data)
            except RuntimeError:
                return _the_end(loop_closed())
            self._asked.add(answer)
        return await asyncio.wrap_future(answer)

    def _take(
        self,
        answer: concurrent.futures.Future[Answer],
        connection: bytes,
        number: int,
        data: bytes,
    ) -> None:
        task = self._intake.loop.create_task(self._exchange(connection, number, data))
        self._taken.add(task)

        def done(task: asyncio.Task[Answer]) -> None:
            self._taken.discard(task)
            with self._lock:
                known = answer in self._asked
                self._asked.discard(answer)
            if not known or not answer.set_running_or_notify_cancel():
                return
            if task.cancelled():
                answer.set_result((DIED, b""))
            elif (error := task.exception()) is not None:
                answer.set_exception(error)
            else:
                answer.set_result(task.result())

        task.add_done_callback(done)

    async def _exchange(self, connection: bytes, number: int, data: bytes) -> Answer:
        peer = self._peers.get(connection)
        if number == 0:
            return self._open(connection, data)
        if number == LEAVE:
            if peer is not None:
                peer.hear(data)
                peer.close(None)
            return LEAVE, b""
        if peer is None and connection in self._leaving:
            return LEAVE, self._last_words(connection)
        if peer is None:
            return _the_end(self._closed() or ServerDiedError("the server has forgotten this one"))
        return await peer.exchange(number, data)

    def _open(self, connection: bytes, data: bytes) -> Answer:
        error = self._closed()
        if error is None and data != _VERSION.pack(wire.PROTOCOL):
            error = InvalidRequestError(f"this server speaks protocol {wire.PROTOCOL}")
        if error is not None:
            return _the_end(error)
        self._peers[connection] = RpcPeer(self._intake, lambda _: self._forget(connection))
        return 0, b""

    def _forget(self, connection: bytes) -> None:
        peer = self._peers.pop(connection)
        if peer.unsaid:
            self._leaving[connection] = peer

    def _last_words(self, connection: bytes) -> bytes:
        peer = self._leaving.pop(connection)
        if self._left is not None and not self._leaving and not self._left.done():
            self._left.set_result(None)
        return b"".join(peer.unsaid)

    @property
    def busy(self) -> bool:
        """Whether somebody waits for an answer, or calls the server while it closes."""
        untaken = len(self._asked) > len(self._taken)  # calls that its loop has not come to
        closing = self._intake.closed is not None
        return untaken or closing or any([peer.busy for peer in self._peers.values()])

    @property
    def is_lost(self) -> bool:
        """Whether the loop was closed under it: it answers nobody any more."""
        return self._intake.loop.is_closed()

    def _closed(self) -> InferenceError | None:
        closed = self._intake.closed
        return None if closed is None else closed()

    async def close(self) -> None:
        """End all connections, telling those who waited why."""
        for peer in list(self._peers.values()):
            peer.close(self._closed() or ServerClosedError("the server is closed"))
        if self._leaving:
            self._left = asyncio.get_running_loop().create_future()
            await asyncio.wait([self._left], timeout=CLOSING_S)
        with self._lock:
            self._over = True
            asked, self._asked = self._asked, set()
        for answer in asked:
            if answer.set_running_or_notify_cancel():
                answer.set_result(self._too_late())

    def _too_late(self) -> Answer:
        return _the_end(self._closed() or ServerClosedError("the server is closed"))


def _the_end(error: InferenceError) -> Answer:
    return LEAVE, wire.encode_error(0, error, Kind.CLOSING)


class RpcPeer(Peer):
    """The server's conversation over one connection, on the server's loop throughout."""

    port = ON_LOOP

    def __init__(self, intake: Intake, closed: Callable[[Any], None]) -> None:
        super().__init__(intake, closed)
        self._opened_at = intake.clock()
        self._done = 0
        self._early: dict[int, bytes] = {}  # calls that have overtaken others
        self._said = 0
        self.unsaid: list[bytes | memoryview] = []
        """What waits for a call."""
        self._unsaid_nbytes = 0
        self._held: deque[asyncio.Future[Answer]] = deque()
        self._scheduled = False
        self._lease = self._loop.call_later(LEASE_S, self._forgotten)

    async def exchange(self, number: int, data: bytes) -> Answer:
        """One call: take what it brings; return what there is to say, or wait for it."""
        self._early[number] = data
        while (following := self._early.pop(self._done + 1, None)) is not None:
            self._done += 1
            if self._done == 1:
                following = self._read_clock(following)
            self.hear(following)
        if self._over:
            return LEAVE, b"".join(self.unsaid)
        answer: asyncio.Future[Answer] = self._loop.create_future()
        self._held.append(answer)
        self._lease.cancel()
        timer = self._loop.call_later(HOLD_S, self._release, answer)
        if self.unsaid or len(self._held) == MAX_CALLS:
            self._release(self._held[0])
        try:
            return await answer
        finally:
            timer.cancel()
            if not self._held and not self._over:
                self._lease.cancel()
                self._lease = self._loop.call_later(LEASE_S, self._forgotten)

    @property
    def busy(self) -> bool:
        """Whether the client waits for an answer."""
        return bool(self._open)

    def _read_clock(self, data: bytes) -> bytes:
        if len(data) < _NOW.size:
            return b""
        client_now: float = _NOW.unpack_from(data)[0]
        self._clocks_agree = self._opened_at <= client_now <= self._intake.clock()
        return data[_NOW.size :]

    def send(self, data: bytes | memoryview) -> None:
        if self._over or not data:
            return
        self.unsaid.append(data)
        self._unsaid_nbytes += len(data)
        if self._unsaid_nbytes > peers.MAX_WAITING_NBYTES:
            self._loop.call_soon(self._forgotten)
        elif self._held and not self._scheduled and not self._loop.is_closed():
            self._scheduled = True
            self._loop.call_soon(self._speak)

    def _speak(self) -> None:
        self._scheduled = False
        if self._held and self.unsaid:
            self._release(self._held[0])

    def _release(self, answer: asyncio.Future[Answer], *, last: bool = False) -> None:
        """Answer a call that is held with what there is to say."""
        if answer not in self._held:
            return
        self._held.remove(answer)
        said, self.unsaid, self._unsaid_nbytes = b"".join(self.unsaid), [], 0
        if not last:
            self._said += 1
        if not answer.done():
            answer.set_result((LEAVE if last else self._said, said))

    def _forgotten(self) -> None:
        self.close(None)

    def _end(self) -> None:
        self._lease.cancel()
        while self._held:
            self._release(self._held[0], last=True)
