"""What the links to actors in other processes share: a channel per event loop and per thread."""

from __future__ import annotations

import abc
import asyncio
import concurrent.futures
import threading
import weakref
from collections.abc import Callable
from typing import Any

from aioinfer.blocking import BackgroundLoop, OwnLoop
from aioinfer.clock import Clock, MonotonicClock, RemoteTimer
from aioinfer.forks import forgets
from aioinfer.intake import Intake, loop_closed, running_loop
from aioinfer.request import GivenUp, Request, Source
from aioinfer.transports.base import InferenceTransport
from aioinfer.transports.channel import Channel, OnLoop
from aioinfer.transports.sockets import RemoteWaiter, ThreadChannel

MAX_SUBMITTED = 4096
"""Requests that the threads of a process may have submitted and not had answered, before
``submit`` waits: on this link nobody knows from afar how full the server's queue is."""


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


class ChannelTransport(InferenceTransport):
    """A link whose clients hold conversations with the server over connections of their own.

    Coroutines share one channel per event loop; each thread has its own. Subclasses make the
    channels, and serve the other end of them.
    """

    def __init__(self) -> None:
        self._clock: Clock = MonotonicClock()
        self._intake: Intake | None = None
        self._begin()
        forgets(self)

    def _begin(self) -> None:
        """Start without connections."""
        # The loop owns its channel, by the reader; it ends with the loop, whoever still waits.
        self._loops: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, weakref.ref[OnLoop]] = (
            weakref.WeakKeyDictionary()
        )
        self._thread = threading.local()
        self._threads: weakref.WeakSet[ThreadChannel] = weakref.WeakSet()
        self._background = OwnLoop(self)
        self._submitted = _Submitted()

    @abc.abstractmethod
    def _new_loop_channel(self, loop: asyncio.AbstractEventLoop) -> OnLoop:
        """A channel for the coroutines of ``loop``, which runs in the calling thread.

        Raises:
            ServerClosedError: no server is attached.
        """

    @abc.abstractmethod
    def _new_thread_channel(self) -> ThreadChannel:
        """A channel for the calling thread.

        Raises:
            ServerClosedError: no server is attached.
        """

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
                channel = await self._ready_channel(background.loop)
                channel.send(request, block=block)

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

    def _loop_channel(self, loop: asyncio.AbstractEventLoop) -> OnLoop:
        known = self._loops.get(loop)
        channel = None if known is None else known()
        if channel is None or channel.gone is not None:
            channel = self._new_loop_channel(loop)
            self._loops[loop] = weakref.ref(channel)
        return channel

    async def _ready_channel(self, loop: asyncio.AbstractEventLoop) -> OnLoop:
        """The channel of the running loop, once it has reached the server."""
        return self._loop_channel(loop)

    def _thread_channel(self) -> ThreadChannel:
        channel: ThreadChannel | None = getattr(self._thread, "channel", None)
        if channel is not None:
            channel.look()
        if channel is None or channel.gone is not None:
            channel = self._thread.channel = self._new_thread_channel()
            self._threads.add(channel)
        return channel

    def _background_loop(self) -> BackgroundLoop:
        return self._background.get()

    # -- forks --------------------------------------------------------------

    def _after_fork(self) -> None:
        """Forget, in a forked child, what belongs to the parent."""
        # Connections are closed, or the parent's end would not be noticed. Nothing else is
        # touched: the child shares the parent's epoll instance.
        for channel in self._channels():
            channel.forget()
        self._background.forget()
        self._intake = None
        self._begin()
