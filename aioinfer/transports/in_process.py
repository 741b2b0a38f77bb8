"""Links to actors in the server's own process: coroutines and threads."""

from __future__ import annotations

import asyncio
import threading
import weakref
from collections.abc import Callable, Sequence
from typing import Any

from aioinfer.clock import Clock, RemoteTimer, TimerHandle
from aioinfer.errors import ServerClosedError
from aioinfer.intake import Intake, running_loop
from aioinfer.request import GivenUp, ReplyPort, Request, Source
from aioinfer.transports.base import InferenceTransport
from aioinfer.waiting import answer_threads


class _LoopPort:
    """Resolves asyncio futures; one callback on their loop per batch, whatever its size."""

    takes_columns = False

    def __init__(self, loop: asyncio.AbstractEventLoop, *, on_loop: bool) -> None:
        self.on_loop = on_loop
        self._loop = weakref.ref(loop)

    def deliver(self, outcomes: Sequence[tuple[Request, Any]]) -> None:
        if self.on_loop:
            self._resolve(outcomes)
            return
        loop = self._loop()
        if loop is not None and not loop.is_closed():
            try:
                loop.call_soon_threadsafe(self._resolve, outcomes)
            except RuntimeError:  # closed since: there is nobody left to tell
                pass

    def _resolve(self, outcomes: Sequence[tuple[Request, Any]]) -> None:
        for request, outcome in outcomes:
            future: asyncio.Future[Any] = request.handle
            if future.done():  # cancelled or timed out
                continue
            if isinstance(outcome, BaseException):
                future.set_exception(outcome)
            else:
                future.set_result(outcome)


class _ThreadPort:
    """Resolves what threads block on, straight from the executor thread."""

    on_loop = False
    takes_columns = False

    def deliver(self, outcomes: Sequence[tuple[Request, Any]]) -> None:
        answer_threads(outcomes)


class InProcessTransport(InferenceTransport, default=True):
    """Serves coroutines of any event loop and threads alike; what ``transport=None`` means."""

    in_process = True

    def __init__(self) -> None:
        self._intake: Intake | None = None
        self._sources: weakref.WeakSet[Source] = weakref.WeakSet()
        self._lock = threading.Lock()  # for the set, and for attaching while clients join
        self._abroad: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, ReplyPort] = (
            weakref.WeakKeyDictionary()
        )
        self._threads = _ThreadPort()
        self._home: ReplyPort = self._threads  # until attached

    def __reduce__(self) -> Any:
        raise TypeError(
            f"a {type(self).__name__} and its clients cannot be sent to another process; "
            "they serve actors of the server's own process"
        )

    # -- used by clients ----------------------------------------------------

    @property
    def clock(self) -> Clock:
        return self._attached().clock

    def send(
        self, request: Request, loop: asyncio.AbstractEventLoop | None, *, block: bool = True
    ) -> None:
        intake = self._intake
        if intake is None or intake.closed is not None:
            intake = self._attached()
        if loop is intake.loop:
            request.port = self._home
        elif loop is None:
            if running_loop() is intake.loop:
                raise RuntimeError(
                    "a sync client was called on the server's own event loop, which it would "
                    "block for ever; use `await client(td)` with an async client there"
                )
            request.port = self._threads
        else:
            request.port = self._port_abroad(loop)
        intake.submit(request, block=block)

    def give_up(self, request: Request, why: GivenUp) -> None:
        intake = self._intake
        if intake is not None:
            intake.give_up(request, why)

    def wait_for_room(self, rows: int, timeout: float | None) -> bool:
        return self._attached().wait_for_room(rows, timeout)

    def call_at(self, when: float, callback: Callable[[], object]) -> TimerHandle:
        intake = self._attached()
        return RemoteTimer(intake.clock, intake.loop, when, callback)

    def join(self, source: Source) -> None:
        with self._lock:
            self._sources.add(source)
            intake = self._intake
        if intake is not None:
            intake.join(source)

    def leave(self, source: Source) -> None:
        # No lock here: this runs from finalizers, which may interrupt a thread that holds it.
        intake = self._intake
        if intake is not None:
            intake.leave(source)

    # -- used by the server -------------------------------------------------

    async def attach(self, intake: Intake) -> None:
        with self._lock:
            if self._intake is not None and not self._intake.loop.is_closed():
                raise RuntimeError(
                    f"this {type(self).__name__} already serves a server; "
                    "a transport serves one server at a time"
                )
            self._home = _LoopPort(intake.loop, on_loop=True)
            self._intake = intake
            sources = [source for source in self._sources if not source.closed]
        for source in sources:
            intake.join(source)

    async def detach(self) -> None:
        self._intake = None
        self._home = self._threads

    # -- inside -------------------------------------------------------------

    def _attached(self) -> Intake:
        intake = self._intake
        if intake is None:
            raise ServerClosedError(
                f"no running server is attached to this {type(self).__name__}; "
                "start one (`async with server`, or `server.start()`) before calling a client"
            )
        if intake.closed is not None:
            intake.refused()
            raise intake.closed()
        return intake

    def _port_abroad(self, loop: asyncio.AbstractEventLoop) -> ReplyPort:
        port = self._abroad.get(loop)
        if port is None:
            port = self._abroad[loop] = _LoopPort(loop, on_loop=False)
        return port
