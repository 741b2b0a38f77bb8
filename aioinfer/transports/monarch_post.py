"""Monarch actors by which servers and clients find each other and, where they must, call.

*   A *post*, of each actor that uses a transport and of the program that drives them: an actor of
    its own, in their process. That of whoever made the transport knows where its server is.
*   A *caller*, of a post, for each actor that it calls. Monarch ends an actor that calls another
    one which has been stopped, whoever wrote the code that calls. So nothing is ever called on
    behalf of the user's actor: a caller has nothing to lose, and its post takes note of its end
    and goes on. An actor that sends need not be the one whose code runs: what Monarch takes for
    the sender is in a context variable, and so calls are made in a copy of the caller's context,
    on any thread.
*   A *desk*, in each process that is called: that of a server, and those of clients that call. It
    is spawned from afar, by the post of whoever made the transport. Monarch tells the end of an
    actor by asking who spawned it, and one that was spawned in its own process would take the
    answer along. And it tells it reliably to nobody else: who calls an actor on a part of a mesh
    that does not begin where the mesh does is not told, as Monarch counts the places of the part
    in two ways. So those who call a desk ask the post that spawned it, once, and that answers
    when the desk has gone.

This module needs Monarch; :mod:`aioinfer.transports.monarch` imports it when it is used.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import contextvars
import logging
import secrets
import threading
from collections.abc import Awaitable, Callable, Coroutine, Generator
from typing import Any, NamedTuple

import anyio
from monarch.actor import Actor, concurrent_endpoint, context, this_proc

from aioinfer.errors import InferenceError, ServerClosedError, ServerDiedError
from aioinfer.transports import wire
from aioinfer.transports.rpc import DIED, LEAVE, Answer, RpcHub
from aioinfer.transports.wire import Kind

_log = logging.getLogger("aioinfer")

SPAWN_TIMEOUT_S = 30.0
"""Seconds in which an actor of this process must come up."""
MEETING_TIMEOUT_S = 30.0
"""Seconds in which whoever made a transport must say where its server is."""
PROBE_S = 0.2
"""Seconds after which a server that owes an answer is looked after."""
PING_TIMEOUT_S = 2.0
"""Seconds in which a server must show that it lives, before another one takes its place."""


class Ref(NamedTuple):
    """Somebody who is called: a post, a desk, or what else a post has spawned."""

    name: str
    """Nothing else has it."""
    actor: Any
    owner: Any = None
    """The post that spawned it, and hears of its end; that of a post is not told."""


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
hubs: dict[bytes, tuple[RpcHub, Office]] = {}
"""The servers of this process that take calls, by their name, and who watches their clients."""
alive: set[bytes] = set()
"""The servers of this process and the connections of its clients, by their names; and, by their
key, the transports that were made in this process and have no server."""

_offices: dict[str, Office] = {}
_stays: dict[bytes, list[tuple[asyncio.AbstractEventLoop, asyncio.Future[None]]]] = {}
_lock = threading.Lock()


# -- those who call -----------------------------------------------------------


def office(of: contextvars.Context) -> Office:
    """The office of the actor whose context this is; of the driver, in any other context."""
    owner = str(of.copy().run(context).actor_instance.actor_id)
    with _lock:
        found = _offices.get(owner)
        if found is None:
            found = _offices[owner] = Office()
            post = of.copy().run(lambda: this_proc().spawn("aioinfer_post", Post, owner))
            found.post = Ref(owner, post)
    return found


class Office:
    """What one actor, or the driver, has of Monarch: its post, its callers, its desks."""

    post: Ref
    follow: Callable[[Ref], object]
    """Called on any thread, sees to it that this hears of somebody's end."""

    def __init__(self) -> None:
        self.started: concurrent.futures.Future[contextvars.Context] = concurrent.futures.Future()
        """The context of the post, once it runs."""
        self.callers: dict[str, concurrent.futures.Future[contextvars.Context]] = {}
        """Contexts to call in, by who is called."""
        self.desks: dict[str, Ref] = {}
        """Those of this process, by the name of who spawned them."""
        self._lives: dict[str, _Life] = {}

    async def call(self, whom: Ref, endpoint: str, *args: Any) -> Any:
        """Call somebody, from any event loop of this process.

        Raises:
            Exception: it has gone.
        """
        caller = await self.caller(whom.name)
        if whom.owner is None:
            return await caller.copy().run(getattr(whom.actor, endpoint).call_one, *args)
        life = self._life(whom)
        running = asyncio.get_running_loop(), anyio.CancelScope()
        with life.lock:
            life.calls.add(running)
        try:
            with running[1]:
                if not life.over:
                    return await caller.copy().run(getattr(whom.actor, endpoint).call_one, *args)
        finally:
            with life.lock:
                life.calls.discard(running)
        raise ServerDiedError("the process that was called has ended")

    def tell(self, whom: Ref, endpoint: str, *args: Any) -> None:
        """Call somebody who was called before, and do not care what comes of it."""
        caller = self.callers[whom.name].result()
        caller.copy().run(getattr(whom.actor, endpoint).broadcast, *args)

    async def desk(self, meeting: Ref, *, here: bool) -> Ref:
        """The desk of this process for the transports that were made there.

        Args:
            meeting: the post of whoever made them.
            here: whether it is one of this process.
        """
        if here:
            return meeting
        desk = self.desks.get(meeting.name)
        if desk is None:
            process = (await _within(self.started)).copy().run(this_proc)
            desk = self.desks[meeting.name] = await self.call(meeting, "spawn", process)
        return desk

    def ended(self, name: str) -> None:
        """Somebody who may have been called has gone: fail these calls, and those to come."""
        with _lock:
            life = self._lives.setdefault(name, _Life())
        with life.lock:
            life.over = True
            calls = list(life.calls)
        for loop, call in calls:
            with contextlib.suppress(RuntimeError):  # closed since
                loop.call_soon_threadsafe(call.cancel)

    def _life(self, whom: Ref) -> _Life:
        with _lock:
            new = whom.name not in self._lives
            life = self._lives.setdefault(whom.name, _Life())
        if new:
            self.follow(whom)
        return life

    async def caller(self, name: str) -> contextvars.Context:
        """The context of the caller of this name, by convention that of whom it calls."""
        with _lock:
            caller = self.callers.get(name)
            new = caller is None
            if caller is None:
                caller = self.callers[name] = concurrent.futures.Future()
        if new:
            (await _within(self.started)).copy().run(
                lambda: this_proc().spawn("aioinfer_caller", Caller, self.post.name, name)
            )
        return caller.result() if caller.done() else await _within(caller)


class _Life:
    """What is under way to somebody who is called, and whether that is in vain."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.over = False
        self.calls: set[tuple[asyncio.AbstractEventLoop, anyio.CancelScope]] = set()


async def _within(started: concurrent.futures.Future[contextvars.Context]) -> contextvars.Context:
    try:
        async with asyncio.timeout(SPAWN_TIMEOUT_S):
            return await asyncio.shield(asyncio.wrap_future(started))
    except TimeoutError:
        raise ServerDiedError(
            f"Monarch did not start an actor of this process within {SPAWN_TIMEOUT_S} s"
        ) from None


class Caller(Actor):  # type: ignore[misc]  # Monarch is not typed
    """Sends on behalf of others, to one post or desk."""

    def __init__(self, owner: str, whom: str) -> None:
        _offices[owner].callers[whom].set_result(contextvars.copy_context())

    def _handle_undeliverable_message(self, message: Any) -> bool:
        return True  # whoever made the call is told by its outcome

    @concurrent_endpoint  # type: ignore[untyped-decorator]
    async def idle(self) -> None:
        """What makes this an actor of the async kind."""


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
        alive.add(connection)
        self._office.tell(self._server.desk, "watch", self._server.name, connection, desk)


class _NoAnswer:
    """What need not be awaited, but can be."""

    def __await__(self) -> Generator[Any, None, Answer]:
        return _nothing().__await__()


async def _nothing() -> Answer:
    return LEAVE, b""


# -- those who are called -----------------------------------------------------


def _answering(method: Callable[..., Awaitable[Any]]) -> Any:
    """An endpoint whose answers are dropped if who asked has left.

    Otherwise they would come back, and Monarch would end the actor that answered.
    """

    async def endpoint(self: Any, port: Any, *args: Any) -> None:
        with contextlib.suppress(AttributeError):  # of who does not care for the answer
            port.return_undeliverable = False
        try:
            port.send(await method(self, *args))
        except Exception as error:  # it is data, or this actor would end
            _log.debug("a call failed", exc_info=True)
            port.exception(RuntimeError(f"{type(error).__name__}: {error}"))

    endpoint.__name__ = method.__name__
    endpoint.__doc__ = method.__doc__
    return concurrent_endpoint(endpoint, explicit_response_port=True)


class Desk(Actor):  # type: ignore[misc]
    """Takes the calls of other processes."""

    def __init__(self) -> None:
        self._calls: dict[bytes, set[asyncio.Future[Answer]]] = {}
        self._probing = False

    def _handle_undeliverable_message(self, message: Any) -> bool:
        return True  # who asked has left

    @_answering
    async def ping(self, name: bytes) -> bool:
        """Whether this server, or this connection of a client, is one of this process."""
        return name in alive

    @_answering
    async def exchange(self, name: bytes, connection: bytes, number: int, data: bytes) -> Answer:
        """A call of a client to a server."""
        hub, _ = hubs.get(name, (None, None))
        if hub is None:
            return last_words(ServerClosedError("the server is closed"))
        calls = self._calls.setdefault(name, set())
        call = asyncio.ensure_future(hub.exchange(connection, number, data))
        calls.add(call)
        if not self._probing:
            self._probing = True
            call.get_loop().call_later(PROBE_S, self._probe)
        try:
            return await call
        except asyncio.CancelledError:  # the server's event loop ended, or this actor
            return DIED, b""
        finally:
            calls.discard(call)

    def _probe(self) -> None:
        """See whether the loop of a server that owes answers was closed under it."""
        self._probing = False
        for name, calls in list(self._calls.items()):
            hub, _ = hubs.get(name, (None, None))
            if not calls:
                del self._calls[name]
            elif hub is not None and hub._intake.loop.is_closed():
                for call in list(calls):
                    call.cancel()
            elif hub is not None and hub.busy:
                self._probing = True
        if self._probing:
            asyncio.get_running_loop().call_later(PROBE_S, self._probe)

    @_answering
    async def watch(self, name: bytes, connection: bytes, client: Ref) -> None:
        """End a connection once the process of its client has ended."""
        hub, watching = hubs.get(name, (None, None))
        if hub is None or watching is None:
            return
        with contextlib.suppress(Exception):
            await watching.call(client, "stay", connection)
        with contextlib.suppress(Exception):
            await hub.exchange(connection, LEAVE, b"")

    @_answering
    async def stay(self, name: bytes) -> None:
        """Return once what is in :data:`alive` is over; fail with the end of this process."""
        loop = asyncio.get_running_loop()
        stay = loop.create_future()
        with _lock:
            if name not in alive:
                return
            _stays.setdefault(name, []).append((loop, stay))
        await stay


class Post(Desk):
    """Owns callers and desks, and knows the servers of the transports that were made here."""

    def __init__(self, owner: str) -> None:
        super().__init__()
        self._office = _offices[owner]
        self._owner = owner
        self._watches: set[asyncio.Task[None]] = set()
        self._spawned: dict[str, asyncio.Future[None]] = {}
        """Those that were spawned here and live, by their name."""
        loop = asyncio.get_running_loop()
        self._office.follow = lambda whom: loop.call_soon_threadsafe(self._follow, whom)
        self._office.started.set_result(contextvars.copy_context())

    def __supervise__(self, failure: Any) -> bool:
        """Somebody who was spawned here has ended."""
        for name in [name for name in self._spawned if name in failure.mesh_name]:
            self._spawned.pop(name).set_result(None)
            self._office.ended(name)
        return True

    async def __cleanup__(self, error: Exception | None) -> None:
        with _lock:
            _offices.pop(self._owner, None)

    @_answering
    async def spawn(self, process: Any, kind: type[Actor] = Desk) -> Ref:
        """A new desk in that process, or another actor that is called."""
        name = secrets.token_hex(16)
        self._spawned[name] = asyncio.get_running_loop().create_future()
        actor = process.spawn(f"aioinfer_{kind.__name__.lower()}_{name}", kind)
        return Ref(name, actor, self._office.post)

    @_answering
    async def outlive(self, whom: str, asker: str | None) -> None:
        """Return once who was spawned here has gone, or the desk of who asks."""
        known = [self._spawned[name] for name in (whom, asker) if name in self._spawned]
        if whom in self._spawned:
            await asyncio.wait(known, return_when=asyncio.FIRST_COMPLETED)

    def _follow(self, whom: Ref) -> None:
        if whom.owner.name != self._owner:
            self._watch(self._outlive(whom))
        elif whom.name not in self._spawned:
            self._office.ended(whom.name)

    async def _outlive(self, whom: Ref) -> None:
        own = self._office.desks.get(whom.owner.name)
        with contextlib.suppress(Exception):  # if it has gone itself, nobody else can tell
            await self._office.call(
                whom.owner, "outlive", whom.name, None if own is None else own.name
            )
            self._office.ended(whom.name)

    def _watch(self, watch: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(watch)
        self._watches.add(task)
        task.add_done_callback(self._watches.discard)

    @_answering
    async def announce(self, key: bytes, server: Announced) -> bool:
        """A server of another process runs; return whether it may."""
        may = await announce(self._office, key, server)
        if may:
            self._watch(self._watch_server(key, server))
        return may

    @_answering
    async def withdraw(self, key: bytes, name: bytes) -> None:
        """A server is closed."""
        withdraw(key, name)

    @_answering
    async def find(self, key: bytes) -> Announced | None:
        """The server of a transport."""
        return meetings.get(key)

    async def _watch_server(self, key: bytes, server: Announced) -> None:
        with contextlib.suppress(Exception):
            await self._office.call(server.desk, "stay", server.name)
        withdraw(key, server.name)


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
