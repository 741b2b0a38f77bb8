"""Direct connections to a server on the network: TCP, with or without TLS.

The conversation is that of :mod:`aioinfer.transports.channel` and
:mod:`aioinfer.transports.peer`. Here are its carriers on the client's side: a protocol of
the event loop for coroutines, a blocking socket for threads. The server's side is in
:mod:`aioinfer.transports.listener`.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import ssl
import weakref
from collections.abc import AsyncGenerator, Awaitable, Callable
from typing import Any, Protocol

from aioinfer.errors import InferenceError, ServerDiedError
from aioinfer.request import Source
from aioinfer.transports import channel as channels
from aioinfer.transports.address import Connection
from aioinfer.transports.channel import Channel, OnLoop
from aioinfer.transports.endpoint import (
    CHALLENGE_NBYTES,
    ClientHandshake,
    Endpoint,
)
from aioinfer.transports.sockets import ThreadChannel
from aioinfer.transports.wire import WireError

CONNECT_TIMEOUT_S = 5.0
"""Seconds in which a connection must be made, the handshake included."""
_ENDING_S = 1.0
"""Seconds for which an event loop that ends waits for the end of its connection."""


# -- clients on an event loop -------------------------------------------------


class Carrier(Protocol):
    """What carries the frames of a :class:`PendingChannel`, once there is a way to the server.

    It calls :meth:`~aioinfer.transports.channel.Channel.hear` with what comes, and
    :meth:`~aioinfer.transports.channel.Channel.lose` when nothing more will; on the channel's
    event loop.
    """

    ended: asyncio.Future[None]
    """Done once it carries nothing more."""

    def write(self, data: bytes) -> None:
        """Send, never blocking."""

    def close(self) -> None:
        """Send what was written, and end."""

    def forget(self) -> None:
        """Let go of what a forked child has inherited, and touch nothing else."""


class PendingChannel(OnLoop):
    """The conversation of the coroutines of one event loop, begun before there is a way.

    Requests wait until ``connect`` has found one; if it fails, they all do.

    Args:
        loop: the running event loop.
        connect: makes the carrier of this channel.
    """

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        connect: Callable[[PendingChannel], Awaitable[Carrier]],
    ) -> None:
        super().__init__(None)
        self._loop = weakref.ref(loop)
        self._carrier: Carrier | None = None
        self._unsent: list[bytes] = []
        self._connected: asyncio.Future[None] = loop.create_future()
        self._task = loop.create_task(self._run(connect), name="aioinfer connects")
        self._guard: AsyncGenerator[None, None] | None = None

    async def _run(self, connect: Callable[[PendingChannel], Awaitable[Carrier]]) -> None:
        try:
            carrier = await connect(self)
            unsent, self._unsent = b"".join(self._unsent), []
            if unsent:
                carrier.write(unsent)
            if self.gone is None:
                self._carrier = carrier
                self._guard = self._until_the_loop_ends(carrier)
                await anext(self._guard)
            else:  # the last client has left meanwhile
                carrier.close()
        except InferenceError as error:
            self.lose(error)
        except asyncio.CancelledError:
            self._forsake()
            raise
        except Exception as error:
            self.lose(ServerDiedError(f"there is no way to the server: {error}"))
        finally:
            self._connected.set_result(None)

    async def _until_the_loop_ends(self, carrier: Carrier) -> AsyncGenerator[None, None]:
        """End the connection before the loop is closed: it ends what it knows to be suspended."""
        try:
            yield
        finally:
            if not carrier.ended.done():
                self._forsake()
                await asyncio.wait([carrier.ended], timeout=_ENDING_S)

    def _forsake(self) -> None:
        """The event loop ends, and with it whoever waits on it."""
        self._asked.clear()
        self.lose(ServerDiedError("the event loop of the client ended"))

    async def ready(self) -> None:
        """Wait until there is a way to the server.

        Raises:
            InferenceError: there is none.
        """
        if not self._connected.done():
            await asyncio.wait([self._connected])
        if self.gone is not None:
            raise self._gone()

    def forget(self) -> None:
        super().forget()
        if self._carrier is not None:
            self._carrier.forget()

    def _put(self, data: bytes, descriptor: int | None = None) -> None:
        if self.gone is not None:
            return
        if self._carrier is None:
            self._unsent.append(data)
        else:
            self._carrier.write(data)

    def _end(self) -> None:
        carrier, self._carrier = self._carrier, None
        guard, self._guard = self._guard, None
        if carrier is not None:
            carrier.close()
        if carrier is not None and guard is not None:
            # Until the connection has ended the loop may not be closed: one with TLS takes a while.
            if carrier.ended.done():
                _let_go(guard)
            else:
                carrier.ended.add_done_callback(lambda _: _let_go(guard))


def _let_go(guard: AsyncGenerator[None, None]) -> None:
    """What it was to wait for has come."""
    # So it does not wait, and this is all of it. Left to the garbage collector it would be a task
    # of the event loop, which may have no turn left to run it.
    with contextlib.suppress(StopIteration, RuntimeError):  # it runs already: the loop ends
        guard.aclose().send(None)


class StreamCarrier(asyncio.Protocol):
    """One connection under a channel; see :func:`connect`."""

    def __init__(self, channel: Channel, secret: bytes) -> None:
        self._channel = channel
        self._loop = asyncio.get_running_loop()
        self._handshake: ClientHandshake | None = ClientHandshake(secret)
        self._challenge = b""
        self._transport: Any = None
        self._unsent: list[bytes] = []
        self.ready: asyncio.Future[None] = self._loop.create_future()
        """Done once both sides have shown that they hold the secret."""
        self.ended: asyncio.Future[None] = self._loop.create_future()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert self._handshake is not None
        self._transport = transport
        keep_alive(transport.get_extra_info("socket"))
        self._transport.write(self._handshake.opening)

    def data_received(self, data: bytes) -> None:
        if self._handshake is None:
            self._channel.hear(data)
            return
        self._challenge += data
        if len(self._challenge) < CHALLENGE_NBYTES:
            return
        try:
            if len(self._challenge) > CHALLENGE_NBYTES:
                raise WireError("who listens there speaks out of turn")
            answer = self._handshake.answer(self._challenge, channels._clock())
        except WireError as error:
            self._fail(str(error))
            return
        self._handshake = None
        self._transport.write(answer)
        if not self.ready.done():
            self.ready.set_result(None)

    def connection_lost(self, error: Exception | None) -> None:
        if not self.ended.done():
            self.ended.set_result(None)
        if self._handshake is None:
            self._channel.lose(ServerDiedError("the connection to the server has ended"))
        else:
            self._fail("the connection ended before the server had shown itself")

    def _fail(self, why: str) -> None:
        if not self.ready.done():
            self.ready.set_exception(ConnectionError(why))
        self._transport.abort()

    def write(self, data: bytes) -> None:
        if not self._unsent:
            try:
                self._loop.call_soon(self._flush)  # with what else is asked in this turn
            except RuntimeError:  # closed
                return
        self._unsent.append(data)

    def _flush(self) -> None:
        unsent, self._unsent = self._unsent, []
        if unsent and not self._transport.is_closing():
            self._transport.write(unsent[0] if len(unsent) == 1 else b"".join(unsent))

    def close(self) -> None:
        if not self._loop.is_closed():
            self._flush()
            self._transport.close()

    def forget(self) -> None:
        # The event loop believes that the descriptor is its own, so it is not closed: that would
        # happen to whatever has its number next. From now on it leads nowhere.
        nowhere = os.open(os.devnull, os.O_RDWR)
        os.dup2(nowhere, self._transport.get_extra_info("socket").fileno())
        os.close(nowhere)


async def connect(
    endpoint: Endpoint, channel: Channel, timeout: float = CONNECT_TIMEOUT_S
) -> StreamCarrier:
    """A connection to ``endpoint`` for a channel of the running loop, past the handshake.

    Raises:
        OSError: nobody answers there, or who does is not the server.
        TimeoutError: not in time.
    """
    loop = asyncio.get_running_loop()
    tls = None if endpoint.tls is None else endpoint.tls(ssl.Purpose.SERVER_AUTH)
    async with asyncio.timeout(timeout):
        _, carrier = await loop.create_connection(
            lambda: StreamCarrier(channel, endpoint.secret), endpoint.host, endpoint.port, ssl=tls
        )
        try:
            await carrier.ready
        except BaseException:
            carrier._transport.abort()
            raise
    return carrier


def keep_alive(connection: Any) -> None:
    """Have the system notice within seconds that a host has vanished without a word."""
    options = [(socket.SOL_SOCKET, "SO_KEEPALIVE", 1)]
    options += [
        (socket.IPPROTO_TCP, name, value)
        for name, value in (
            *(("TCP_KEEPIDLE", 5), ("TCP_KEEPINTVL", 1), ("TCP_KEEPCNT", 5)),
            *(("TCP_USER_TIMEOUT", 10_000), ("TCP_NODELAY", 1)),
        )
    ]
    for level, name, value in options:
        if hasattr(socket, name):
            with contextlib.suppress(OSError):  # it has gone already
                connection.setsockopt(level, getattr(socket, name), value)


# -- clients in threads -------------------------------------------------------


def connect_thread(endpoint: Endpoint, timeout: float = CONNECT_TIMEOUT_S) -> ThreadChannel:
    """The channel of the calling thread, over a connection of its own.

    Raises:
        OSError: nobody answers there, or who does is not the server.
        TimeoutError: not in time.
    """
    connection: Any = socket.create_connection((endpoint.host, endpoint.port), timeout)
    try:
        keep_alive(connection)
        if endpoint.tls is not None:
            context = endpoint.tls(ssl.Purpose.SERVER_AUTH)
            connection = context.wrap_socket(connection, server_hostname=endpoint.host)
        handshake = ClientHandshake(endpoint.secret)
        connection.sendall(handshake.opening)
        challenge = b""
        while len(challenge) < CHALLENGE_NBYTES:
            more = connection.recv(CHALLENGE_NBYTES - len(challenge))
            if not more:
                raise ConnectionError("the connection ended before the server had shown itself")
            challenge += more
        try:
            connection.sendall(handshake.answer(challenge, channels._clock()))
        except WireError as error:
            raise ConnectionError(str(error)) from error
    except BaseException:
        connection.close()
        raise
    if endpoint.tls is None:
        connection.settimeout(None)
        return ThreadChannel(Connection(fileno=connection.detach()), None)
    tls: Any = _TlsSocket(connection)
    return _TlsThreadChannel(tls, None)


class _TlsSocket:
    """A TLS socket of a thread that waits for what can be read before it reads."""

    def __init__(self, connection: ssl.SSLSocket) -> None:
        self.connection = connection
        self.fileno = connection.fileno
        self.settimeout = connection.settimeout
        self.sendall = connection.sendall
        self.close = connection.close
        self.pending = connection.pending

    def recv_into(self, space: memoryview) -> int:
        # Something came, but perhaps half a record, or none of ours: a session ticket.
        self.connection.setblocking(False)
        try:
            return self.connection.recv_into(space)
        except ssl.SSLWantReadError:
            raise BlockingIOError from None
        finally:
            if self.connection.fileno() >= 0:
                self.connection.setblocking(True)

    def __del__(self) -> None:
        self.connection.close()


class _TlsThreadChannel(ThreadChannel):
    """The conversation of one thread over TLS."""

    def exchange(self, td: Any, source: Source) -> Any:
        return None  # its shortcut is none over TLS

    def _arrived(self, timeout_ms: int | None) -> bool:
        connection: Any = self.socket
        return connection.pending() > 0 or super()._arrived(timeout_ms)
