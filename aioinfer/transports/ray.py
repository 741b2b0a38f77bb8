"""The link for actors and servers on a Ray cluster."""

from __future__ import annotations

import asyncio
import importlib
import logging
import os
import secrets
from typing import Any

from aioinfer.errors import ServerDiedError
from aioinfer.transports import ray_relay as relays
from aioinfer.transports.channel import no_server
from aioinfer.transports.direct import PendingChannel
from aioinfer.transports.endpoint import TlsFactory
from aioinfer.transports.remote import ConnectionKind, Found, RemoteTransport
from aioinfer.transports.rpc import RpcCarrier, RpcHub

_log = logging.getLogger("aioinfer")

MAX_CONCURRENCY = 100_000
"""Calls that the relay may hold; each waiting client process holds one."""


class RayTransport(RemoteTransport):
    """Serves Ray actors, tasks and the driver, on one host or many.

    Transport and clients can be sent to actors and tasks, before or after the server starts. The
    server may run in the driver or in an actor, on any event loop. Requests travel on a direct
    connection to it, which is authenticated by a secret in the handle; see :doc:`/ray`.

    Create it once, in a process that outlives its use: with it comes a small actor (no CPUs,
    some 60 MB) that lets clients and server find each other. If Ray does not run yet, it is
    initialised.

    Args:
        connection: ``"direct"`` for a TCP connection of each event loop and each thread to the
            server, ``"rpc"`` for calls of that actor, in which what is asked at the same time
            travels together; ``"auto"`` for the first, and the second where it cannot be made.
        host: the address at which the server listens, and at which the actors reach it. ``None``
            for the one by which Ray knows the server's node.
        port: the port it listens at; 0 for any that is free.
        tls: makes the TLS context of each side; ``None`` for no TLS. It is called with
            ``ssl.Purpose.CLIENT_AUTH`` in the server's process and with
            ``ssl.Purpose.SERVER_AUTH`` in its clients', and must be picklable.

    Raises:
        ImportError: Ray is not installed.
    """

    def __init__(
        self,
        connection: ConnectionKind = "auto",
        *,
        host: str | None = None,
        port: int = 0,
        tls: TlsFactory | None = None,
    ) -> None:
        ray = require_ray(type(self).__name__)
        super().__init__(connection, host=host, port=port, tls=tls)
        self._relay = self._new_relay(ray)

    def _new_relay(self, ray: Any) -> Any:
        return _new_relay(ray)

    def _start(self) -> None:
        super()._start()
        self._pump: _Pump | None = None

    def __getstate__(self) -> dict[str, Any]:
        return super().__getstate__() | {"_relay": self._relay}

    def _host_of_this_process(self) -> str:
        host: str = importlib.import_module("ray").util.get_node_ip_address()
        return host

    async def _publish(self, address: tuple[str, int] | None, hub: RpcHub | None) -> None:
        if self._pump is not None:  # of a loop that was closed under its server
            await self._pump.withdraw()
        self._pump = _Pump(self._relay, hub)
        callee = None if hub is None else self._own_actor() or True
        if not await self._pump.announce((address, callee)):
            self._pump = None
            raise RuntimeError(
                f"this {type(self).__name__} already serves a server, in another process; "
                "a transport serves one server at a time"
            )

    def _own_actor(self) -> Any:
        """The actor of the server, if it takes calls; else the relay does."""
        return None

    async def _withdraw(self) -> None:
        pump, self._pump = self._pump, None
        if pump is not None:
            await pump.withdraw()

    async def _call(self, channel: PendingChannel, found: Found) -> RpcCarrier:
        carrier = await super()._call(channel, found)
        relay = self._relay_of(found)
        stay = relay.stay.remote(carrier.id)
        relay.watch.remote(carrier.id, [stay])
        return carrier

    def _relay_of(self, found: Found) -> Any:
        return self._relay

    async def _find(self) -> Found:
        found = await self._told(self._relay.find.remote())
        if found is None:
            raise no_server()
        server, where = found
        return found_at(server, where, self._relay)

    async def _told(self, answer: Any) -> Any:
        """What a call of the relay returns.

        Raises:
            ServerDiedError: it has gone.
        """
        ray = importlib.import_module("ray")
        try:
            return await answer
        except ray.exceptions.RayError as error:
            raise ServerDiedError(
                "the actor by which server and clients find each other has gone; the process "
                f"that made this {type(self).__name__} must outlive its use"
            ) from error


def found_at(server: Any, where: Any, relay: Any) -> Found:
    """A server as its relay tells of it."""
    address, callee = where
    if callee is True:
        callee = relay
    return Found(server, address, None if callee is None else callee.exchange.remote)


def require_ray(who: str) -> Any:
    """Import Ray.

    Raises:
        ImportError: it is not installed; the message says what to install.
    """
    try:
        return importlib.import_module("ray")
    except ImportError as error:
        raise ImportError(f"{who} needs Ray: pip install 'aioinfer[ray]'") from error


def _new_relay(ray: Any) -> Any:
    return light_actor(ray, relays.Relay)


def light_actor(ray: Any, kind: type) -> Any:
    """A new actor, near this process, of a class of :mod:`aioinfer.transports.ray_relay`."""
    if not ray.is_initialized():
        ray.init()
    here = ray.get_runtime_context().get_node_id()
    near = ray.util.scheduling_strategies.NodeAffinitySchedulingStrategy(here, soft=True)
    # By value: an actor that had to import this package would import torch as well.
    ray.cloudpickle.register_pickle_by_value(relays)
    try:
        return (
            ray.remote(kind)
            .options(num_cpus=0, max_concurrency=MAX_CONCURRENCY, scheduling_strategy=near)
            .remote()
        )
    finally:
        ray.cloudpickle.unregister_pickle_by_value(relays)


class _Pump:
    """Asks the relay for calls on behalf of a hub, and brings it the answers."""

    def __init__(self, relay: Any, hub: RpcHub | None) -> None:
        self._relay = relay
        self._hub = hub
        self._loop = asyncio.get_running_loop()
        self._name = secrets.token_bytes(16)
        self._stay: Any = None
        self._replies: list[tuple[int, int, bytes]] = []
        self._scheduled = False
        self._asks = 0
        self._tasks: set[asyncio.Task[None]] = set()
        self._answering: set[asyncio.Task[None]] = set()

    async def announce(self, where: Any) -> bool:
        """Let clients find the server; return whether it may serve."""
        ray = importlib.import_module("ray")
        context = ray.get_runtime_context()
        actor = None if context.get_actor_id() is None else context.current_actor
        self._stay = self._relay.stay.remote(self._name)
        may = await self._relay.announce.remote(
            self._name, where, (context.get_worker_id(), os.getpid()), actor, [self._stay]
        )
        if may and self._hub is not None:
            self._ask()
        return bool(may)

    async def withdraw(self) -> None:
        """Let nobody find it any more. The hub is closed, and so answers all calls."""
        ray = importlib.import_module("ray")
        if self._loop is asyncio.get_running_loop() and self._answering:
            await asyncio.wait(self._answering)
        replies, self._replies = self._replies, []
        try:
            await self._relay.withdraw.remote(self._name, replies)
        except ray.exceptions.RayError:  # the relay has gone, and everybody knows
            pass
        if not self._loop.is_closed():
            for task in self._tasks:
                task.cancel()

    def _ask(self) -> None:
        assert self._hub is not None
        self._scheduled = False
        replies, self._replies = self._replies, []
        calls = self._relay.serve.remote(self._name, replies, self._hub.busy)
        self._asks += 1
        task = self._loop.create_task(self._take(calls), name="aioinfer asks")
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _take(self, asked: Any) -> None:
        assert self._hub is not None
        try:
            calls = await asked
        except Exception as error:
            _log.error("no more calls reach the server: %s", error)
            return
        self._asks -= 1
        for number, connection, place, data in calls:
            answer = self._answer(number, self._hub.exchange(connection, place, data))
            task = self._loop.create_task(answer, name="aioinfer answers")
            self._answering.add(task)
            task.add_done_callback(self._answering.discard)
        if not self._asks:
            self._ask()

    async def _answer(self, number: int, answer: Any) -> None:
        place, data = await answer
        self._replies.append((number, place, data))
        if not self._scheduled:
            self._scheduled = True
            self._loop.call_soon(self._ask)  # with what else is answered
