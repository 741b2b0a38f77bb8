"""How a Monarch actor, or the driver, calls actors of this library, and hears of their end.

*   A *post*, of each actor that uses a transport and of the program that drives them: an actor of
    its own, in their process, whose event loop runs what nobody waits for.
*   A *caller*, of a post, for each actor that it calls. Monarch ends an actor that calls another
    one which has been stopped, whoever wrote the code that calls. So nothing is ever called on
    behalf of the user's actor: a caller has nothing to lose, and its post takes note of its end
    and goes on. An actor that sends need not be the one whose code runs: what Monarch takes for
    the sender is in a context variable, and so calls are made in a copy of the caller's context,
    on any thread.

Monarch tells the end of an actor by asking who spawned it, and one that was spawned in its own
process takes the answer along. And it tells it reliably to nobody else: who calls an actor on a
part of a mesh that does not begin where the mesh does is not told, as Monarch counts the places
of the part in two ways. So whoever is called was spawned from another process, by an *owner*; and
those who call ask the owner, once, and that answers when who is called has gone. A post owns the
replicas of its actor; see :mod:`aioinfer.transports.monarch_desk` for who owns the others.

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
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, NamedTuple

import anyio
from monarch.actor import Actor, concurrent_endpoint, context, this_proc

from aioinfer.errors import ServerDiedError

_log = logging.getLogger("aioinfer")

SPAWN_TIMEOUT_S = 30.0
"""Seconds in which an actor of this process must come up."""


class Ref(NamedTuple):
    """Somebody who is called."""

    name: str
    """Nothing else has it."""
    actor: Any
    owner: Any = None
    """Who spawned it, and hears of its end; that of a post and of the registrar is not told."""


class Place(NamedTuple):
    """A process, as others find it."""

    name: str
    """Nothing else has it."""
    process: Any


def place(of: contextvars.Context) -> Place:
    """The process of the actor whose context this is; of the driver, in any other context."""
    return of.copy().run(lambda: Place(_place_name(), this_proc()))


def _place_name() -> str:
    return str(context().actor_instance.proc_id)


# -- those who call -----------------------------------------------------------

_offices: dict[str, Office] = {}
_lock = threading.Lock()


def office(of: contextvars.Context) -> Office:
    """The office of the actor whose context this is; of the driver, in any other context."""
    owner = str(of.copy().run(context).actor_instance.actor_id)
    with _lock:
        found = _offices.get(owner)
        if found is None:
            found = _offices[owner] = Office(owner, of.copy().run(_place_name))
            post = of.copy().run(lambda: this_proc().spawn("aioinfer_post", Post, owner))
            found.post = Ref(owner, post)
    return found


class Office:
    """What one actor, or the driver, has of Monarch: its post, its callers, those it spawned.

    Args:
        name: nothing else has it.
        place: the name of the process.
    """

    post: Ref
    loop: asyncio.AbstractEventLoop
    """Of the post, once that runs."""

    def __init__(self, name: str, place: str) -> None:
        self.name, self.place = name, place
        self.started: concurrent.futures.Future[contextvars.Context] = concurrent.futures.Future()
        """The context of the post, once it runs."""
        self.callers: dict[str, concurrent.futures.Future[contextvars.Context]] = {}
        """Contexts to call in, by who is called."""
        self.found: dict[str, Ref] = {}
        """Those who were found to be called, by where they are."""
        self.spawned: dict[str, asyncio.Future[None]] = {}
        """Those that were spawned from here and live, by their name."""
        self._lives: dict[str, _Life] = {}
        self._tasks: set[asyncio.Task[None]] = set()

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

    async def caller(self, name: str) -> contextvars.Context:
        """The context of the caller of this name, by convention that of whom it calls."""
        with _lock:
            caller = self.callers.get(name)
            new = caller is None
            if caller is None:
                caller = self.callers[name] = concurrent.futures.Future()
        if new:
            (await within(self.started)).copy().run(
                lambda: this_proc().spawn("aioinfer_caller", Caller, self.name, name)
            )
        return caller.result() if caller.done() else await within(caller)

    def later(self, work: Callable[..., Coroutine[Any, Any, Any]], *args: Any) -> None:
        """Do something on the post's loop, from any thread; nobody cares what comes of it."""

        def begin() -> None:
            task = asyncio.create_task(quietly())
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

        async def quietly() -> None:
            try:
                await work(*args)
            except Exception:
                _log.debug("what a post had to do failed", exc_info=True)

        def post_runs(_: object) -> None:
            with contextlib.suppress(RuntimeError):  # closed since
                self.loop.call_soon_threadsafe(begin)

        self.started.add_done_callback(post_runs)

    async def spawn(self, process: Any, kind: type[Actor]) -> Ref:
        """Start an actor there, of whose end this hears; on the post's loop."""
        name = secrets.token_hex(16)
        self.spawned[name] = asyncio.get_running_loop().create_future()
        actor = process.spawn(f"aioinfer_{kind.__name__.lower()}_{name}", kind)
        try:
            # An answer with an actor that has not come up would hold up all that is sent after it.
            await actor.initialized
        except BaseException:
            self.spawned.pop(name, None)
            raise
        return Ref(name, actor)

    def failed(self, mesh_name: str) -> None:
        """Somebody who was spawned from here may have gone; on the post's loop."""
        for name in [name for name in self.spawned if name in mesh_name]:
            self.spawned.pop(name).set_result(None)
            self._ended(name)

    def _life(self, whom: Ref) -> _Life:
        with _lock:
            new = whom.name not in self._lives
            life = self._lives.setdefault(whom.name, _Life())
        if new:
            self.later(self._follow, whom)
        return life

    async def _follow(self, whom: Ref) -> None:
        """Hear of somebody's end."""
        if whom.owner.name != self.name:
            await self.call(whom.owner, "outlive", whom.name, self.place)
            self._ended(whom.name)
        elif whom.name not in self.spawned:
            self._ended(whom.name)

    def _ended(self, name: str) -> None:
        """Somebody who may have been called has gone: fail these calls, and those to come."""
        with _lock:
            life = self._lives.setdefault(name, _Life())
        with life.lock:
            life.over = True
            calls = list(life.calls)
        for loop, call in calls:
            with contextlib.suppress(RuntimeError):  # closed since
                loop.call_soon_threadsafe(call.cancel)


class _Life:
    """What is under way to somebody who is called, and whether that is in vain."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.over = False
        self.calls: set[tuple[asyncio.AbstractEventLoop, anyio.CancelScope]] = set()


async def within(started: concurrent.futures.Future[contextvars.Context]) -> contextvars.Context:
    """Wait for an actor of this process to come up.

    Raises:
        ServerDiedError: it does not.
    """
    try:
        async with asyncio.timeout(SPAWN_TIMEOUT_S):
            return await asyncio.shield(asyncio.wrap_future(started))
    except TimeoutError:
        raise ServerDiedError(
            f"Monarch did not start an actor of this process within {SPAWN_TIMEOUT_S} s"
        ) from None


# -- their actors -------------------------------------------------------------


def answering(method: Callable[..., Awaitable[Any]]) -> Any:
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


class Caller(Actor):  # type: ignore[misc]  # Monarch is not typed
    """Sends on behalf of others, to one that is called."""

    def __init__(self, office: str, whom: str) -> None:
        _offices[office].callers[whom].set_result(contextvars.copy_context())

    def _handle_undeliverable_message(self, message: Any) -> bool:
        return True  # whoever made the call is told by its outcome

    @concurrent_endpoint  # type: ignore[untyped-decorator]
    async def idle(self) -> None:
        """What makes this an actor of the async kind."""


class Post(Actor):  # type: ignore[misc]
    """Owns the callers of an office, and who is spawned from there."""

    def __init__(self, name: str) -> None:
        with _lock:
            self._office = _offices.setdefault(name, Office(name, _place_name()))
        self._office.loop = asyncio.get_running_loop()
        self._office.started.set_result(contextvars.copy_context())

    def _handle_undeliverable_message(self, message: Any) -> bool:
        return True  # who asked has left

    def __supervise__(self, failure: Any) -> bool:
        self._office.failed(failure.mesh_name)
        return True

    async def __cleanup__(self, error: Exception | None) -> None:
        with _lock:
            _offices.pop(self._office.name, None)

    @answering
    async def spawn(self, process: Any, kind: type[Actor]) -> Ref:
        """Start an actor there that is called by this office only."""
        return (await self._office.spawn(process, kind))._replace(owner=self._office.post)
