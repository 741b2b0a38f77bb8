"""The link to the replicas of a server on a Ray cluster, which come and go.

All of them have one meeting point, the desk (:mod:`aioinfer.transports.ray_relay`). Each is
found like the server of a :class:`~aioinfer.RayTransport` whose relay is the desk, asked by the
replica's name; but calls, where they are made, go to the actor of the replica. A link that is
used follows the list of names that the desk keeps; until it has heard, and if none of those it
knows is there, the desk names one.
"""

from __future__ import annotations

import asyncio
import importlib
import threading
import weakref
from collections.abc import Iterable
from typing import Any, NamedTuple

from aioinfer.errors import ServerDiedError
from aioinfer.request import Request
from aioinfer.transports import ray_relay as relays
from aioinfer.transports.channel import no_server
from aioinfer.transports.endpoint import TlsFactory
from aioinfer.transports.ray import RayTransport, found_at, light_actor
from aioinfer.transports.remote import ConnectionKind, Found
from aioinfer.transports.replicated import ReplicatedTransport
from aioinfer.transports.rpc import LEAVE, Answer


class Name(NamedTuple):
    """Of a replica; nothing else ever has it."""

    number: int
    """Its user's name for it, which the replica that takes its place will have, too."""
    serial: int


class RayReplicas(ReplicatedTransport):
    """Spreads requests over the replicas of a :class:`~aioinfer.RayInferenceServer`.

    Args:
        door: the way to any of them.
        room: as of :class:`ReplicatedTransport`.
        retry: as of :class:`ReplicatedTransport`.
    """

    def __init__(self, door: Door, *, room: int | None = None, retry: bool = True) -> None:
        super().__init__(room=room, retry=retry, otherwise=door)
        self._door = door
        self._version = 0
        self._names: tuple[Name, ...] = ()
        self._updating = threading.Lock()
        self._follows = False

    def __reduce__(self) -> Any:
        with self._updating:
            known = self._version, self._names
        return _elsewhere, (self._door, self._room, self._retry, *known)

    def update(self, version: int, names: Iterable[Name]) -> None:
        """These replicas serve, at this version of the list."""
        with self._updating:
            if version <= self._version:  # old news
                return
            known, self._names = set(self._names), tuple(names)
            self._version = version
            for name in known.difference(self._names):
                self.remove(name)
            for name in self._names:
                if name not in known:
                    self.add(name, self._door.to(name))
            self.arrange(self._names)

    def send(
        self, request: Request, loop: asyncio.AbstractEventLoop | None, *, block: bool = True
    ) -> None:
        if not self._follows:
            self._follow()
        super().send(request, loop, block=block)

    def _follow(self) -> None:
        with self._updating:
            if self._follows:
                return
            self._follows = True
        # Starting a loop takes a moment, for which the caller's loop must not wait.
        threading.Thread(target=self._begin_to_follow, name="aioinfer-follow", daemon=True).start()

    def _begin_to_follow(self) -> None:
        following = _follow(weakref.ref(self), self._door.desk)
        asyncio.run_coroutine_threadsafe(following, self._background_loop().loop)

    def _after_fork(self) -> None:
        super()._after_fork()
        self._updating = threading.Lock()
        self._follows = False


async def _follow(reference: weakref.ref[RayReplicas], desk: Any) -> None:
    ray = importlib.import_module("ray")
    version = 0
    while True:
        try:
            version, names = await desk.changed.remote(version)
        except ray.exceptions.RayError:  # the process with the server has ended, and so has that
            return
        transport = reference()
        if transport is None:
            return
        transport.update(version, [Name(*name) for name in names])
        del transport  # while this waits, nothing keeps it alive


def _elsewhere(
    door: Door, room: int | None, retry: bool, version: int, names: tuple[Name, ...]
) -> RayReplicas:
    """Make the transport in the process to which it was sent."""
    transport = RayReplicas(door, room=room, retry=retry)
    transport.update(version, names)
    return transport


class Door(RayTransport):
    """The way to whichever replica the desk names; the desk comes with it."""

    def __init__(
        self, connection: ConnectionKind, *, host: str | None = None, tls: TlsFactory | None = None
    ) -> None:
        super().__init__(connection, host=host, tls=tls)

    @property
    def desk(self) -> Any:
        """The handle of its actor."""
        return self._relay

    def to(self, name: Name) -> ReplicaTransport:
        """The way to this replica, for its clients and for itself."""
        transport = ReplicaTransport.__new__(ReplicaTransport)
        transport.__setstate__(self.__getstate__() | {"_relay": _RelayOf(self.desk, name)})
        return transport

    def _new_relay(self, ray: Any) -> Any:
        return light_actor(ray, relays.Desk)

    async def _find(self) -> Found:
        is_open, found = await self._told(self.desk.find_any.remote())
        if found is None:
            raise ServerDiedError("all replicas have died") if is_open else no_server()
        name, server, where = found
        return found_at((name, server), where, _RelayOf(self.desk, name))

    def _relay_of(self, found: Found) -> Any:
        name, _ = found.server
        return _RelayOf(self.desk, name)


class ReplicaTransport(RayTransport):
    """The way to one replica; its own actor takes the calls, where calls are made."""

    def _own_actor(self) -> Any:
        return importlib.import_module("ray").get_runtime_context().current_actor

    async def take_call(self, connection: bytes, number: int, data: bytes) -> Answer:
        """Take a call, in the actor of the replica."""
        if self._hub is None:  # closed
            return LEAVE, b""
        return await self._hub.exchange(connection, number, data)


class _RelayOf:
    """The relay of a replica, called as if it were an actor."""

    def __init__(self, desk: Any, name: Name) -> None:
        self._desk = desk
        self._name = name

    def __getattr__(self, method: str) -> _Method:
        if method.startswith("_"):
            raise AttributeError(method)
        return _Method(self._desk, self._name, method)


class _Method:
    def __init__(self, desk: Any, name: Name, method: str) -> None:
        self._desk = desk
        self._name = name
        self._method = method

    def remote(self, *args: Any) -> Any:
        return self._desk.relay.remote(tuple(self._name), self._method, *args)
