"""Where servers and clients on Monarch find each other and, where they must, call.

*   A *desk*, in each process that is called: that of whoever made a transport, which knows where
    its server is; that of a server; and those of clients that call.
*   The *registrar*, in the driver, which outlives them all. It has the desks spawned, one in each
    process, and so hears of their end; see :mod:`aioinfer.transports.monarch_post`. It is also
    the desk of the driver.

This module needs Monarch; :mod:`aioinfer.transports.monarch` imports it when it is used.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Awaitable, Generator
from typing import Any, NamedTuple

from monarch.actor import context, get_or_spawn_controller

from aioinfer.errors import InferenceError, ServerClosedError, ServerDiedError
from aioinfer.transports import monarch_post as posts
from aioinfer.transports import wire
from aioinfer.transports.monarch_post import Office, Place, Post, Ref, answering
from aioinfer.transports.pending_calls import PendingCalls
from aioinfer.transports.rpc import DIED, LEAVE, Answer, RpcHub
from aioinfer.transports.wire import Kind

PING_TIMEOUT_S = 2.0
"""Seconds in which a server must show that it lives, before another one takes its place."""
REGISTRAR = "aioinfer_registrar"


class Announced(NamedTuple):
    """A server that runs."""

    name: bytes
    """Nothing else has it."""
    address: tuple[str, int] | None
    """Where it listens for connections."""
    desk: Ref
    """Of its process."""
    callable: bool
    """Whether it takes calls."""


meetings: dict[bytes, Announced | None] = {}
"""The transports that were made in this process, by their key, and the server of each."""
hubs: dict[bytes, RpcHub] = {}
"""The servers of this process that take calls, by their name."""
alive: set[bytes] = set()
"""The servers of this process and the connections of its clients, by their names; and, by their
key, the transports that were made in this process and have no server."""

_stays: dict[bytes, list[tuple[asyncio.AbstractEventLoop, asyncio.Future[None]]]] = {}
_lock = threading.Lock()


# -- those who call -----------------------------------------------------------


async def desk(of: Office, where: Place) -> Ref:
    """The desk of a process.

    Raises:
        Exception: there is none, as the process has ended.
    """
    found = of.found.get(where.name)
    if found is None:
        registrar = await _registrar(of)
        spawned = await of.call(registrar, "desk", where)
        found = registrar if spawned is None else spawned._replace(owner=registrar)
        of.found[where.name] = found
    return found


async def _registrar(of: Office) -> Ref:
    found = of.found.get(REGISTRAR)
    if found is None:
        started = await posts.within(of.started)
        async with asyncio.timeout(posts.SPAWN_TIMEOUT_S):
            actor = await started.copy().run(get_or_spawn_controller, REGISTRAR, Registrar)
        found = of.found[REGISTRAR] = Ref(REGISTRAR, actor)
    return found


class Exchanger:
    """Calls a server, until that has ended.

    Args:
        of: who calls.
        server: who is called.
    """

    def __init__(self, of: Office, server: Announced) -> None:
        self._office = of
        self._server = server
        self._over = False

    def __call__(self, connection: bytes, number: int, data: bytes) -> Awaitable[Answer]:
        if number != LEAVE:
            return self._call(connection, number, data)
        forget(connection)
        if not self._over:  # to call in vain can do harm
            self._office.tell(
                self._server.desk, "exchange", self._server.name, connection, number, data
            )
        return _NoAnswer()

    async def _call(self, *args: Any) -> Answer:
        desk, name = self._server.desk, self._server.name
        try:
            answer: Answer = await self._office.call(desk, "exchange", name, *args)
        except Exception:
            self._over = True
            raise
        self._over = self._over or answer[0] in (LEAVE, DIED)
        return answer

    def watched(self, connection: bytes, desk: Ref) -> None:
        """Let the server know when this process, whose desk is given, has ended."""
        if desk.name == self._server.desk.name:  # it ends with the server
            return
        alive.add(connection)
        self._office.tell(self._server.desk, "watch", self._server.name, connection, desk)


class _NoAnswer:
    """What need not be awaited, but can be."""

    def __await__(self) -> Generator[Any, None, Answer]:
        return _nothing().__await__()


async def _nothing() -> Answer:
    return LEAVE, b""


# -- those who are called -----------------------------------------------------


class Desk(Post):
    """Takes the calls of other processes. It is the post of an office of its own.

    Args:
        name: of the office; ``None`` for any that nothing else has.
    """

    def __init__(self, name: str | None = None) -> None:
        super().__init__(name or str(context().actor_instance.actor_id))
        self._calls = PendingCalls()
        if name is None:
            self._office.later(_registrar, self._office)

    async def __cleanup__(self, error: Exception | None) -> None:
        registrar = self._office.found.get(REGISTRAR)
        if registrar is not None:  # of what is stopped, and does not fail, Monarch tells nobody
            registrar.actor.stopped.broadcast(self._office.place)
        await super().__cleanup__(error)

    @answering
    async def ping(self, name: bytes) -> bool:
        """Whether this server, or this connection of a client, is one of this process."""
        return name in alive

    @answering
    async def exchange(self, name: bytes, connection: bytes, number: int, data: bytes) -> Answer:
        """A call of a client to a server."""
        hub = hubs.get(name)
        if hub is None:
            return last_words(ServerClosedError("the server is closed"))
        return await self._calls.exchange(hub, connection, number, data)

    @answering
    async def watch(self, name: bytes, connection: bytes, client: Ref) -> None:
        """End a connection once the process of its client has ended."""
        hub = hubs.get(name)
        if hub is None:
            return
        with contextlib.suppress(Exception):
            await self._office.call(client, "stay", connection)
        with contextlib.suppress(Exception):
            await hub.exchange(connection, LEAVE, b"")

    @answering
    async def stay(self, name: bytes) -> None:
        """Return once what is in :data:`alive` is over; fail with the end of this process."""
        loop = asyncio.get_running_loop()
        stay = loop.create_future()
        with _lock:
            if name not in alive:
                return
            _stays.setdefault(name, []).append((loop, stay))
        await stay

    @answering
    async def announce(self, key: bytes, server: Announced) -> bool:
        """A server of another process runs; return whether it may."""
        may = await announce(self._office, key, server)
        if may:
            self._office.later(self._watch_server, key, server)
        return may

    @answering
    async def withdraw(self, key: bytes, name: bytes) -> None:
        """A server is closed."""
        withdraw(key, name)

    @answering
    async def find(self, key: bytes) -> Announced | None:
        """The server of a transport."""
        return meetings.get(key)

    async def _watch_server(self, key: bytes, server: Announced) -> None:
        with contextlib.suppress(Exception):
            await self._office.call(server.desk, "stay", server.name)
        withdraw(key, server.name)


class Registrar(Desk):
    """Has the desks spawned, and hears of their end; there is one, in the driver."""

    def __init__(self) -> None:
        super().__init__(REGISTRAR)
        self._desks: dict[str, asyncio.Task[Ref]] = {}
        """By the name of their place."""

    @answering
    async def desk(self, where: Place) -> Ref | None:
        """The desk of a process; ``None`` for this one."""
        if where.name == self._office.place:
            return None
        spawning = self._desks.get(where.name)
        if spawning is None:
            spawning = self._desks[where.name] = asyncio.create_task(
                self._office.spawn(where.process, Desk)
            )
        desk = await asyncio.shield(spawning)
        if desk.name not in self._office.spawned:
            raise ServerDiedError("the process has ended")
        return desk

    @answering
    async def stopped(self, place: str) -> None:
        """The desk of this place has been stopped."""
        desk = self._desks.get(place)
        if desk is not None:
            self._office.failed((await desk).name)

    @answering
    async def outlive(self, whom: str, asker: str) -> None:
        """Return once a desk has gone, or who asks: the name of its place."""
        spawned = self._office.spawned
        waited = [spawned[whom]] if whom in spawned else []
        known = self._desks.get(asker)
        if waited and known is not None and known.done() and not known.exception():
            waited += [spawned[name] for name in [known.result().name] if name in spawned]
        if waited:
            await asyncio.wait(waited, return_when=asyncio.FIRST_COMPLETED)


def last_words(error: InferenceError) -> Answer:
    """The answer to a call that no server takes."""
    return LEAVE, wire.encode_error(0, error, Kind.CLOSING)


async def announce(at: Office, key: bytes, server: Announced) -> bool:
    """A server runs; in the process that made the transport. Return whether it may."""
    other = meetings.get(key)
    if other is not None:
        with contextlib.suppress(Exception):
            async with asyncio.timeout(PING_TIMEOUT_S):
                if await at.call(other.desk, "ping", other.name):
                    return False
    meetings[key] = server
    forget(key)  # who waits for a server may ask for it
    return True


def vacate(key: bytes) -> None:
    """A transport has no server; in the process that made it."""
    alive.add(key)
    meetings[key] = None


def withdraw(key: bytes, name: bytes) -> None:
    """A server is closed or gone; in the process that made the transport."""
    announced = meetings.get(key)
    if announced is not None and announced.name == name:
        vacate(key)


def forget(name: bytes) -> None:
    """A server of this process, or a connection of one of its clients, is over."""
    hubs.pop(name, None)
    with _lock:
        alive.discard(name)
        stays = _stays.pop(name, [])
    for loop, stay in stays:
        with contextlib.suppress(RuntimeError):  # closed since
            loop.call_soon_threadsafe(_over, stay)


def _over(stay: asyncio.Future[None]) -> None:
    if not stay.done():
        stay.set_result(None)
