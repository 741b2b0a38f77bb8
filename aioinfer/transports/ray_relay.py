"""The meeting points of servers and clients: a Ray actor for each transport.

It tells clients where the server listens and, for those that cannot connect to it, forwards their
calls (:mod:`aioinfer.transports.rpc`). Ray can call actors but no program that drives them, so
the server does not wait to be called. To one of its own host the relay has a line, a Unix socket;
elsewhere the server asks it for calls, and brings the answers to earlier ones along. For a server
with replicas one actor, the desk, does this for all of them, and tells clients which there are.

This module imports nothing that needs torch: it is sent to the cluster by value, with
:mod:`aioinfer.transports.ray_line`, and the actor needs neither the memory nor the seconds that
torch takes.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import socket
from collections import deque
from collections.abc import Awaitable
from typing import Any, NamedTuple

from aioinfer.transports.ray_line import (
    GOODBYE,
    Line,
    Numbered,
    pack_answer,
    pack_call,
    unpack_call,
)

LEAVE, DIED = -1, -2  # as in aioinfer.transports.rpc
PROBE_S = 0.2
"""Seconds after which a server that owes an answer is looked after."""


class Announced(NamedTuple):
    """A server that runs."""

    name: bytes
    """Nothing else has it."""
    where: Any
    """What clients are told."""
    process: Any
    """Differs from one process to the next."""
    actor: Any
    """The handle of the actor that it runs in; ``None`` in a driver."""


class Relay:
    """What the actor does; all of it on its event loop."""

    def __init__(self) -> None:
        self._server: Announced | None = None
        self._line: Line | None = None
        self._calls: deque[Numbered] = deque()
        self._waiting: dict[int, asyncio.Future[bytes]] = {}
        self._numbers = 0
        self._asking: deque[asyncio.Future[None]] = deque()
        self._busy = False
        self._probe: asyncio.TimerHandle | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._served = asyncio.Event()
        self._kept: dict[bytes, list[Any]] = {}
        self._watched: dict[bytes, asyncio.Task[None]] = {}
        self._forever: dict[bytes, asyncio.Future[None]] = {}

    # -- for servers --------------------------------------------------------

    async def announce(
        self,
        name: bytes,
        where: Any,
        process: Any,
        actor: Any,
        alive: list[Awaitable[Any]],
        address: tuple[str, bytes] | None,
    ) -> tuple[bool, bool]:
        """A server runs; it may unless another one does.

        Args:
            name: its own.
            where: what clients are told.
            process: differs from one process to the next.
            actor: the handle of its actor, or ``None``.
            alive: fails if its process ends; a handle on the actor says so sooner.
            address: a Unix socket at which it listens for a line, and what must be shown there.

        Returns:
            Whether it may, and whether there is a line; if not, it must ask for calls.
        """
        other = self._server
        if other is not None:
            restarted = actor is not None and actor == other.actor and process != other.process
            if not restarted and await self._lives(other):
                return False, False
            self._without(other.name, DIED)
        self._server = Announced(name, where, process, actor)
        self._served.set()
        self._start(self._watch_server(name, alive))
        has_line = address is not None and await self._connect(name, *address)
        return self._is(name), has_line

    async def withdraw(self, name: bytes, replies: list[Numbered], says_goodbye: bool) -> None:
        """A server is closed.

        Args:
            name: its own.
            replies: its last answers.
            says_goodbye: whether its line brings them, and then its goodbye.
        """
        if says_goodbye and self._is(name) and self._line is not None:
            await self._line.over
        if self._is(name):
            self._answer(replies)
            self._without(name, LEAVE)

    def _without(self, name: bytes, number: int) -> None:
        """A server is closed, or has died, as those hear who wait."""
        if not self._is(name):
            return
        self._server = None
        line, self._line = self._line, None
        if line is not None:
            line.abort()
        self._served.clear()
        self._kept.clear()
        self._let_go(name)
        self._look_after(False)
        self._calls.clear()
        waiting, self._waiting = self._waiting, {}
        for answer in waiting.values():
            if not answer.done():
                answer.set_result(pack_answer(number, b""))
        self._let_ask_again()

    async def serve(self, name: bytes, replies: list[Numbered], busy: bool) -> list[Numbered]:
        """Take answers to earlier calls; return new calls, once there are any.

        Who asks again while this is held gets nothing from the first.

        Args:
            name: the server's.
            replies: the answers.
            busy: whether somebody waits for an answer of this server.
        """
        if not self._is(name):
            return []
        self._answer(replies)
        self._look_after(busy)
        self._let_ask_again()
        if not self._calls:
            asking = asyncio.get_running_loop().create_future()
            self._asking.append(asking)
            await asking
        if not self._is(name):
            return []
        calls, self._calls = list(self._calls), deque()
        if calls:
            self._look_after(True)
        return calls

    def _is(self, name: bytes) -> bool:
        return self._server is not None and self._server.name == name

    def _answer(self, replies: list[Numbered]) -> None:
        for number, data in replies:
            answer = self._waiting.pop(number, None)
            if answer is not None and not answer.done():
                answer.set_result(data)

    def _let_ask_again(self) -> None:
        while self._asking:
            asking = self._asking.popleft()
            if not asking.done():
                asking.set_result(None)

    # -- the line to a server -----------------------------------------------

    async def _connect(self, name: bytes, path: str, token: bytes) -> bool:
        """Make a line; return whether that could be done."""
        connection = socket.socket(socket.AF_UNIX)
        try:
            connection.setblocking(False)
            connection.connect(path)
            _, line = await asyncio.get_running_loop().create_unix_connection(
                lambda: Line(
                    functools.partial(self._hear, name), lambda _: self._without(name, DIED)
                ),
                sock=connection,
            )
        except OSError:  # it is on another host
            connection.close()
            return False
        if not self._is(name):
            line.abort()
            return False
        line.show(token)
        self._line = line
        while self._calls:
            line.send(*self._calls.popleft())
        return True

    def _hear(self, name: bytes, replies: list[Numbered]) -> None:
        if self._is(name):
            self._answer(replies)
            if replies[-1][0] == GOODBYE:
                self._without(name, LEAVE)

    # -- whether a server lives ---------------------------------------------

    def _look_after(self, busy: bool) -> None:
        """While a server owes an answer, see every moment that it still lives."""
        self._busy = busy
        if busy and self._probe is None and self._actor() is not None:
            self._probe = asyncio.get_running_loop().call_later(PROBE_S, self._probe_now)

    def _actor(self) -> Any:
        return None if self._server is None else self._server.actor

    def _probe_now(self) -> None:
        self._probe = None
        if self._busy and self._server is not None:
            self._start(self._probed(self._server))

    async def _probed(self, server: Announced) -> None:
        try:
            await server.actor.__ray_ready__.remote()
        except Exception:
            self._without(server.name, DIED)
        else:
            self._look_after(self._busy)

    async def _lives(self, server: Announced) -> bool:
        if server.actor is None:
            return True
        try:
            await asyncio.wait_for(server.actor.__ray_ready__.remote(), 1.0)
        except TimeoutError:  # it is busy
            return True
        except Exception:
            return False
        return True

    async def _watch_server(self, name: bytes, alive: list[Awaitable[Any]]) -> None:
        with contextlib.suppress(Exception):
            await alive[0]
        self._without(name, DIED)

    def _start(self, coroutine: Any) -> asyncio.Task[None]:
        task = asyncio.get_running_loop().create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    # -- for weights --------------------------------------------------------

    async def served(self) -> None:
        """Return once there is a server; one that sends weights is a server here."""
        await self._served.wait()

    async def hold(self, key: bytes, kept: list[Any]) -> None:
        """Hold what is in the list (references, which Ray counts), for others to take."""
        self._kept[key] = kept

    async def take(self, key: bytes) -> list[Any] | None:
        """What is held under this key; ``None`` if nothing is."""
        return self._kept.get(key)

    async def let_go(self, key: bytes) -> None:
        """Hold it no longer."""
        self._kept.pop(key, None)

    # -- for clients --------------------------------------------------------

    async def find(self) -> tuple[bytes, Any] | None:
        """The name of the server, and where it is; ``None`` if there is none."""
        return None if self._server is None else (self._server.name, self._server.where)

    async def exchange(self, call: bytes) -> bytes:
        """Forward a call to the server, and return its answer."""
        connection, number, _ = unpack_call(call)
        if number == LEAVE:
            watching = self._watched.pop(connection, None)
            if watching is not None:
                watching.cancel()
            self._let_go(connection)
        if self._server is None:
            return pack_answer(LEAVE, b"")
        self._numbers += 1
        answer: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()
        self._waiting[self._numbers] = answer
        if self._line is not None:
            self._line.send(self._numbers, call)
        else:
            self._calls.append((self._numbers, call))
            self._let_ask_again()
        return await answer

    async def watch(self, connection: bytes, alive: list[Awaitable[Any]]) -> None:
        """End a connection once the process of its client has ended."""
        self._watched[connection] = self._start(self._watch_client(connection, alive))

    async def _watch_client(self, connection: bytes, alive: list[Awaitable[Any]]) -> None:
        with contextlib.suppress(Exception):
            await alive[0]
        self._watched.pop(connection, None)
        await self.exchange(pack_call(connection, LEAVE, b""))

    async def stay(self, name: bytes) -> None:
        """Return when the server or connection of this name has ended.

        Who awaits the outcome of this call learns, too, when the process has ended that made it.
        """
        self._forever[name] = asyncio.get_running_loop().create_future()
        await self._forever[name]

    async def end(self) -> None:
        """Its server has ended, and there will be no other."""
        if self._server is not None:
            self._without(self._server.name, DIED)
        for watching in self._watched.values():
            watching.cancel()
        self._watched.clear()
        for name in list(self._forever):
            self._let_go(name)

    def _let_go(self, name: bytes) -> None:
        stay = self._forever.pop(name, None)
        if stay is not None and not stay.done():
            stay.set_result(None)


class Desk:
    """What the actor of a server with replicas does: a relay for each, and the list of them."""

    def __init__(self) -> None:
        self._relays: dict[Any, Relay] = {}
        self._version = 0
        self._names: tuple[Any, ...] = ()
        self._open = False
        self._news: asyncio.Future[None] | None = None

    # -- for the server that has the replicas -------------------------------

    async def open(self, name: Any) -> None:
        """A replica is about to start."""
        self._relays[name] = Relay()

    async def publish(self, version: int, names: tuple[Any, ...], is_open: bool) -> None:
        """These replicas serve; or none, as the server is closed or all of them have died."""
        if version <= self._version:  # overtaken
            return
        self._version, self._names, self._open = version, names, is_open
        news, self._news = self._news, None
        if news is not None:
            news.set_result(None)

    async def drop(self, name: Any) -> None:
        """A replica has ended, and nobody will have its name again."""
        relay = self._relays.pop(name, None)
        if relay is not None:
            await relay.end()

    # -- for clients --------------------------------------------------------

    async def changed(self, version: int) -> tuple[int, tuple[Any, ...]]:
        """The names of the replicas that serve, once they are other than at this version."""
        while self._version <= version:
            if self._news is None:
                self._news = asyncio.get_running_loop().create_future()
            await asyncio.shield(self._news)
        return self._version, self._names

    async def find_any(self) -> tuple[bool, tuple[Any, bytes, Any] | None]:
        """Whether the server is open; and of a replica that serves its name and what finds it."""
        for name in self._names:
            relay = self._relays.get(name)
            found = None if relay is None else await relay.find()
            if found is not None:
                return True, (name, *found)
        return self._open, None

    # -- for both -----------------------------------------------------------

    async def relay(self, name: Any, method: str, *args: Any) -> Any:
        """Do what the relay of a replica does."""
        relay = self._relays.get(name)
        if relay is None:  # it has ended; its relay knows of no server, and waits for none
            return None if method == "stay" else await getattr(Relay(), method)(*args)
        return await getattr(relay, method)(*args)
