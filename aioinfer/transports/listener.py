"""The server's side of direct connections: where it listens, and the clients that came.

Who has not shown that it holds the secret can cost the server little: a few bytes of memory,
two HMACs, one of a bounded number of places, for a bounded time. Nothing it says is looked at
but the handshake.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import socket
import ssl
from typing import Any

from aioinfer.intake import Intake
from aioinfer.transports import peer as peers
from aioinfer.transports.address import Connection
from aioinfer.transports.direct import keep_alive
from aioinfer.transports.endpoint import (
    ANSWER_NBYTES,
    OPENING_NBYTES,
    Endpoint,
    ServerHandshake,
    TlsFactory,
)
from aioinfer.transports.peer import ON_LOOP, Peer
from aioinfer.transports.wire import WireError

_log = logging.getLogger("aioinfer")

HANDSHAKE_TIMEOUT_S = 5.0
"""Seconds in which who connects must show that it holds the secret."""
MAX_HALF_OPEN = 256
"""Connections that have not shown it yet. One more, and the oldest of them is closed."""
_CLOSING_S = 1.0
"""Seconds in which the last words to a client must have left."""


class Listener:
    """Where a running server listens, and the clients that came.

    Args:
        intake: where requests go.
        secret: what a client must hold.
        host: the address to listen at.
        port: the port, 0 for any that is free.
        tls: makes the TLS context; ``None`` for no TLS.
    """

    def __init__(
        self,
        intake: Intake,
        secret: bytes,
        *,
        host: str,
        port: int = 0,
        tls: TlsFactory | None = None,
    ) -> None:
        self.intake = intake
        self.secret = secret
        self.peers: set[StreamPeer] = set()
        """Clients that have shown that they hold the secret."""
        self.half_open: dict[StreamPeer, None] = {}  # a set that keeps its order
        """Those that have not yet."""
        self._host = host
        self._port = port
        self._tls = tls
        self._server: asyncio.Server | None = None
        self._socket: socket.socket | None = None

    async def open(self) -> Endpoint:
        """Begin to listen.

        Raises:
            OSError: the address cannot be had.
        """
        loop = self.intake.loop
        tls = None if self._tls is None else self._tls(ssl.Purpose.CLIENT_AUTH)
        found = await loop.getaddrinfo(self._host, self._port, type=socket.SOCK_STREAM)
        family, kind, protocol, _, address = found[0]
        self._socket = Connection(family, kind, protocol)
        try:
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            self._socket.setblocking(False)
            self._socket.bind(address)
            port: int = self._socket.getsockname()[1]
            self._server = await loop.create_server(
                lambda: StreamPeer(self), sock=self._socket, backlog=4096, ssl=tls
            )
        except BaseException:
            self._socket.close()
            raise
        return Endpoint(self._host, port, self.secret, self._tls)

    async def close(self) -> None:
        """End all connections, telling those who waited why."""
        if self._server is None:
            return
        self._server.close()
        self._server = None
        closed = self.intake.closed
        last = [*self.peers, *self.half_open]
        for peer in list(self.peers):
            peer.close(None if closed is None else closed())
        for peer in list(self.half_open):
            peer.refuse("the server is closed")
        if last:
            await asyncio.wait([peer.ended for peer in last], timeout=_CLOSING_S)
        for peer in last:
            peer.abort()

    def forget(self) -> None:
        """Let go of everything; the loop of the server was closed under it."""
        for peer in [*self.peers, *self.half_open]:
            peer.abort()
            del peer._intake
        self.peers.clear()
        self.half_open.clear()
        self._server = None
        del self.intake  # the loop refers to this object, as long as anybody refers to the loop
        if self._socket is not None:
            self._socket.close()

    def begin(self, peer: StreamPeer) -> None:
        """Somebody has connected."""
        self.half_open[peer] = None
        if len(self.half_open) > MAX_HALF_OPEN:
            next(iter(self.half_open)).refuse("too many came without showing the secret")

    def welcome(self, peer: StreamPeer) -> None:
        """It has shown that it holds the secret."""
        del self.half_open[peer]
        self.peers.add(peer)


class StreamPeer(Peer, asyncio.Protocol):
    """The server's conversation over one connection, on the server's loop throughout."""

    port = ON_LOOP

    def __init__(self, listener: Listener) -> None:
        super().__init__(listener.intake, listener.peers.discard)
        self._listener = listener
        self._handshake: ServerHandshake | None = ServerHandshake(listener.secret)
        self._said = bytearray()
        self._expected = OPENING_NBYTES
        self._challenged_at: float | None = None
        self._transport: Any = None
        self._timer: asyncio.TimerHandle | None = None
        self.ended: asyncio.Future[None] = self._loop.create_future()
        """Done once the connection has ended."""

    # -- before it has shown that it holds the secret -----------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport
        keep_alive(transport.get_extra_info("socket"))
        self._timer = self._loop.call_later(HANDSHAKE_TIMEOUT_S, self.refuse, "it says nothing")
        self._listener.begin(self)

    def _greet(self, data: bytes) -> None:
        if self._over:
            return
        self._said += data
        if len(self._said) < self._expected:
            return
        said, rest = bytes(self._said[: self._expected]), bytes(self._said[self._expected :])
        self._said.clear()
        assert self._handshake is not None
        try:
            if self._challenged_at is None:
                challenge = self._handshake.challenge(said)
                if rest:
                    raise WireError("a client that speaks out of turn")
                self._expected = ANSWER_NBYTES
                self._challenged_at = self._intake.clock()
                self._transport.write(challenge)
                return
            client_now = self._handshake.check(said)
        except WireError as error:
            self.refuse(str(error))
            return
        # Clocks of one host agree. Another one's reading means nothing here.
        self._clocks_agree = self._challenged_at <= client_now <= self._intake.clock()
        self._handshake = None
        self._cancel_timer()
        self._listener.welcome(self)
        if rest:
            self.hear(rest)

    def refuse(self, why: str) -> None:
        """End a connection that was not let in."""
        _log.info("a connection was refused: %s", why)
        self._listener.half_open.pop(self, None)
        self._cancel_timer()
        self._over = True
        self._transport.abort()

    def _cancel_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    # -- the conversation ---------------------------------------------------

    def data_received(self, data: bytes) -> None:
        if self._handshake is not None:
            self._greet(data)
        else:
            self.hear(data)

    def send(self, data: bytes | memoryview) -> None:
        if self._over or not data:
            return
        if self._loop.is_closed():
            self._hang_up()
            return
        self._transport.write(data)
        if self._transport.get_write_buffer_size() > peers.MAX_WAITING_NBYTES:
            self._loop.call_soon(self._give_in)

    def _give_in(self) -> None:
        if not self._over:
            _log.warning("a client that does not read its answers was disconnected")
            self.close(None)
            self._transport.abort()

    # -- the end ------------------------------------------------------------

    def connection_lost(self, error: Exception | None) -> None:
        self._listener.half_open.pop(self, None)
        self._cancel_timer()
        if not self.ended.done():
            self.ended.set_result(None)
        self.close(None)

    def _end(self) -> None:
        if self.ended.done():
            return
        if self._loop.is_closed():
            self._hang_up()
            return
        self._transport.close()
        # Its last words wait for a client that may never read them.
        self._timer = self._loop.call_later(_CLOSING_S, self._transport.abort)

    def abort(self) -> None:
        """End the connection whatever still waits to be sent."""
        if self._loop.is_closed():
            self._hang_up()
        elif not self.ended.done():
            self._transport.abort()

    def _hang_up(self) -> None:
        """End a connection whose event loop can no longer do it."""
        self._over = True
        descriptor = self._transport.get_extra_info("socket").fileno()
        if descriptor >= 0:  # else the loop took it along
            with contextlib.suppress(OSError), socket.socket(fileno=os.dup(descriptor)) as twin:
                twin.shutdown(socket.SHUT_RDWR)
