"""The link for actors in other processes of the same host."""

from __future__ import annotations

import asyncio
import os
import socket
import weakref
from multiprocessing.context import BaseContext
from typing import Any

from aioinfer.intake import Intake
from aioinfer.transports import wire
from aioinfer.transports.address import Address
from aioinfer.transports.channel import no_server
from aioinfer.transports.channeled import ChannelTransport
from aioinfer.transports.socket_peer import SocketPeer
from aioinfer.transports.sockets import LoopChannel, ThreadChannel

INLINE_NBYTES = 1 << 14
"""Payloads up to so many bytes travel in the message. With 8 processes on 2 cores
(``tests/benchmarks/processes.py --threshold``) messages are a fifth faster at 1 KiB, both are
alike at 64 KiB, and memory is twice as fast at 1 MiB."""


class MPTransport(ChannelTransport):
    """Serves actors in processes of the same host, however those were started.

    Its clients, and the transport itself, can be sent to other processes or inherited by fork,
    before or after the server starts, and any number of times. In the process where it arrives, a
    client connects at its first request. Requests and answers are raw bytes on a Unix socket,
    large ones in shared memory that has no name and so cannot be left behind.

    Args:
        ctx: the multiprocessing context of a server that is started in a process of its own
            (:class:`~aioinfer.ProcessInferenceServer`); ``None`` for its default.
        inline_bytes: payloads larger than this go through shared memory.
    """

    def __init__(self, ctx: BaseContext | None = None, *, inline_bytes: int | None = None) -> None:
        if ctx is not None and not isinstance(ctx, BaseContext):
            raise TypeError(f"ctx must be a multiprocessing context or None, got {ctx!r}")
        if inline_bytes is None:
            inline_bytes = INLINE_NBYTES
        elif isinstance(inline_bytes, bool) or not isinstance(inline_bytes, int):
            raise TypeError(f"inline_bytes must be an int or None, got {inline_bytes!r}")
        elif inline_bytes < 0:
            raise ValueError(f"inline_bytes must be at least 0, got {inline_bytes}")
        self.ctx = ctx
        self._setup(Address.new(), inline_bytes)

    def __reduce__(self) -> Any:
        return _elsewhere, (self._address, self._inline_nbytes)

    def _setup(self, address: Address, inline_nbytes: int) -> None:
        self._address = address
        self._inline_nbytes = inline_nbytes
        self._listener: Any = None
        self._peers: set[SocketPeer] = set()
        super().__init__()

    def _new_loop_channel(self, loop: asyncio.AbstractEventLoop) -> LoopChannel:
        return LoopChannel(*self._connect(), loop)

    def _new_thread_channel(self) -> ThreadChannel:
        return ThreadChannel(*self._connect())

    def _connect(self) -> tuple[socket.socket, int, bytes]:
        """A connection to the server, from what size on memory is shared, and what to say first."""
        try:
            connection = self._address.connect()
        except OSError as error:
            raise no_server() from error
        hello = wire.encode(wire.Hello(wire.PROTOCOL, os.getpid(), self._address.token))
        return connection, self._inline_nbytes, hello

    # -- used by the server -------------------------------------------------

    async def attach(self, intake: Intake) -> None:
        if self._intake is not None and not self._intake.loop.is_closed():
            raise RuntimeError(
                f"this {type(self).__name__} already serves a server; "
                "a transport serves one server at a time"
            )
        if self._listener is not None:  # of a loop that was closed under its server
            self._listener.close()
            for peer in list(self._peers):
                peer.forget()
            self._peers = set()
        self._address.unlink()
        try:
            self._listener = self._address.listen()
        except OSError as error:
            raise RuntimeError(
                f"this {type(self).__name__} already serves a server, in another process; "
                "a transport serves one server at a time"
            ) from error
        self._intake = intake

        def accept() -> None:
            self._accept()

        # Nobody but the loop refers to this function: if it goes, the loop was closed under the
        # server, and those who wait in other processes must hear of it.
        self._loop_closed = weakref.finalize(accept, _hang_up, self._listener, self._peers)
        self._loop_closed.atexit = False
        intake.loop.add_reader(self._listener.fileno(), accept)

    async def detach(self) -> None:
        intake, self._intake = self._intake, None
        if intake is None:
            return
        self._loop_closed.detach()
        intake.loop.remove_reader(self._listener.fileno())
        self._listener.close()
        self._listener = None
        self._address.unlink()
        for peer in list(self._peers):
            peer.close(None if intake.closed is None else intake.closed())

    def _accept(self) -> None:
        intake = self._intake
        if intake is None:
            return
        try:
            connection, _ = self._listener.accept()
        except OSError:  # it has gone already, or there are no descriptors left
            return
        self._peers.add(SocketPeer(connection, intake, self._address.token, self._peers.discard))

    def _after_fork(self) -> None:
        super()._after_fork()
        for peer in self._peers:
            peer.forget()
        if self._listener is not None:
            self._loop_closed.detach()
            self._listener.close()
        self._listener = None
        self._peers = set()


def _hang_up(listener: Any, peers: set[SocketPeer]) -> None:
    listener.close()
    for peer in list(peers):
        peer.hang_up()


def _elsewhere(address: Address, inline_nbytes: int) -> MPTransport:
    """Make the transport in the process to which it was sent."""
    transport = MPTransport.__new__(MPTransport)
    transport.ctx = None
    transport._setup(address, inline_nbytes)
    return transport
