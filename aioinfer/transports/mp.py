"""The link for actors in other processes of the same host."""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import os
import threading
import weakref
from collections.abc import Callable
from multiprocessing.context import BaseContext
from typing import Any

from aioinfer.blocking import BackgroundLoop
from aioinfer.clock import Clock, MonotonicClock, RemoteTimer
from aioinfer.intake import Intake, loop_closed, running_loop
from aioinfer.request import GivenUp, Request, Source
from aioinfer.transports.address import Address
from aioinfer.transports.base import InferenceTransport
from aioinfer.transports.channel import Channel, LoopChannel, RemoteWaiter, ThreadChannel
from aioinfer.transports.peer import Peer

MAX_SUBMITTED = 4096
"""Requests that the threads of a process may have submitted and not had answered, before
``submit`` waits: on this link nobody knows from afar how full the server's queue is."""
INLINE_NBYTES = 1 << 14
"""Payloads up to so many bytes travel in the message. With 8 processes on 2 cores
(``tests/benchmarks/processes.py --threshold``) messages are a fifth faster at 1 KiB, both are
alike at 64 KiB, and memory is twice as fast at 1 MiB."""


class _Submitted:
    """Counts what threads have submitted and not had answered."""

    def __init__(self) -> None:
        self.count = 0
        self._changed = threading.Condition()

    def begin(self, future: concurrent.futures.Future[Any]) -> None:
        with self._changed:
            self.count += 1
        future.add_done_callback(self._end)

    def _end(self, future: concurrent.futures.Future[Any]) -> None:
        with self._changed:
            self.count -= 1
            self._changed.notify()

    def wait_for_room(self, timeout: float | None) -> bool:
        """Block this thread until one more may be submitted; return whether it may."""
        with self._changed:
            return self._changed.wait_for(lambda: self.count < MAX_SUBMITTED, timeout)


class MPTransport(InferenceTransport):
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
        self._clock = MonotonicClock()
        self._listener: Any = None
        self._intake: Intake | None = None
        self._peers: set[Peer] = set()
        self._begin()
        _transports.add(self)

    def _begin(self) -> None:
        """Start without connections."""
        # The loop owns its channel, by the reader; it ends with the loop, whoever still waits.
        self._loops: weakref.WeakKeyDictionary[
            asyncio.AbstractEventLoop, weakref.ref[LoopChannel]
        ] = weakref.WeakKeyDictionary()
        self._thread = threading.local()
        self._threads: weakref.WeakSet[ThreadChannel] = weakref.WeakSet()
        self._background: BackgroundLoop | None = None
        self._lock = threading.Lock()
        self._submitted = _Submitted()

    # -- used by clients ----------------------------------------------------

    @property
    def clock(self) -> Clock:
        return self._clock

    def waiter(self) -> RemoteWaiter:
        return RemoteWaiter()

    def send(
        self, request: Request, loop: asyncio.AbstractEventLoop | None, *, block: bool = True
    ) -> None:
        if self._intake is not None and self._intake.loop.is_closed():
            raise loop_closed()
        if loop is not None:
            self._loop_channel(loop).send(request, block=block)
        elif isinstance(request.handle, RemoteWaiter):
            if self._intake is not None and running_loop() is self._intake.loop:
                raise RuntimeError(
                    "a sync client was called on the server's own event loop, which it would "
                    "block for ever; use `await client(td)` with an async client there"
                )
            self._thread_channel().send(request, block=block)
        else:
            background = self._background_loop()

            async def send() -> None:
                self._loop_channel(background.loop).send(request, block=block)

            background.call(send)
            self._submitted.begin(request.handle)

    def exchange(self, td: Any, source: Source) -> Any:
        """Ask for a plain row on the calling thread's connection, and wait; ``None`` if not so."""
        channel: ThreadChannel | None = getattr(self._thread, "channel", None)
        if channel is None or self._intake is not None:
            return None
        return channel.exchange(td, source)

    def give_up(self, request: Request, why: GivenUp) -> None:
        channel: Any = getattr(request, "port", None)
        if isinstance(channel, Channel):
            channel.give_up(request, why)

    def wait_for_room(self, rows: int, timeout: float | None) -> bool:
        return self._submitted.wait_for_room(timeout)

    def call_at(self, when: float, callback: Callable[[], object]) -> RemoteTimer:
        return RemoteTimer(self._clock, self._background_loop().loop, when, callback)

    def join(self, source: Source) -> None:
        pass  # it joins with its first request

    def leave(self, source: Source) -> None:
        for channel in self._channels():
            channel.leave(source)

    def _channels(self) -> list[Channel]:
        of_loops = [channel() for channel in self._loops.values()]
        return [*[channel for channel in of_loops if channel is not None], *self._threads]

    def _loop_channel(self, loop: asyncio.AbstractEventLoop) -> LoopChannel:
        known = self._loops.get(loop)
        channel = None if known is None else known()
        if channel is None or channel.gone is not None:
            channel = LoopChannel(self._address, self._inline_nbytes, loop)
            self._loops[loop] = weakref.ref(channel)
        return channel

    def _thread_channel(self) -> ThreadChannel:
        channel: ThreadChannel | None = getattr(self._thread, "channel", None)
        if channel is not None:
            channel.look()
        if channel is None or channel.gone is not None:
            channel = self._thread.channel = ThreadChannel(self._address, self._inline_nbytes)
            self._threads.add(channel)
        return channel

    def _background_loop(self) -> BackgroundLoop:
        with self._lock:
            if self._background is None:
                self._background = BackgroundLoop()
                self._end_background = weakref.finalize(self, self._background.close_soon)
                self._end_background.atexit = False  # its thread is a daemon
            return self._background

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
        self._peers.add(Peer(connection, intake, self._address.token, self._peers.discard))

    def _after_fork(self) -> None:
        """Forget, in a forked child, what belongs to the parent."""
        # The sockets are closed, or the parent's end would not be noticed. Nothing else is
        # touched: the child shares the parent's epoll instance.
        for channel in self._channels():
            channel.forget()
        for peer in self._peers:
            peer.forget()
        if self._listener is not None:
            self._loop_closed.detach()
            self._listener.close()
        if self._background is not None:
            self._end_background.detach()
        self._listener = self._intake = None
        self._peers = set()
        self._begin()


def _hang_up(listener: Any, peers: set[Peer]) -> None:
    listener.close()
    for peer in list(peers):
        peer.hang_up()


def _elsewhere(address: Address, inline_nbytes: int) -> MPTransport:
    """Make the transport in the process to which it was sent."""
    transport = MPTransport.__new__(MPTransport)
    transport.ctx = None
    transport._setup(address, inline_nbytes)
    return transport


_transports: weakref.WeakSet[MPTransport] = weakref.WeakSet()


def _after_fork() -> None:
    for transport in list(_transports):
        with contextlib.suppress(Exception):
            transport._after_fork()


os.register_at_fork(after_in_child=_after_fork)
