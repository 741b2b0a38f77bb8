"""The link for actors and servers on a Ray cluster."""

from __future__ import annotations

import importlib
from collections.abc import Generator
from typing import Any

from aioinfer.errors import ServerDiedError
from aioinfer.transports import ray_line, ray_relay
from aioinfer.transports.channel import no_server
from aioinfer.transports.direct import PendingChannel
from aioinfer.transports.endpoint import TlsFactory
from aioinfer.transports.ray_pump import Pump
from aioinfer.transports.remote import ConnectionKind, Found, RemoteTransport
from aioinfer.transports.rpc import Answer, RpcCarrier, RpcHub

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
        self._pump: Pump | None = None

    def __getstate__(self) -> dict[str, Any]:
        return super().__getstate__() | {"_relay": self._relay}

    def _host_of_this_process(self) -> str:
        host: str = importlib.import_module("ray").util.get_node_ip_address()
        return host

    async def _publish(self, address: tuple[str, int] | None, hub: RpcHub | None) -> None:
        if self._pump is not None:  # of a loop that was closed under its server
            await self._pump.withdraw()
        self._pump = Pump(self._relay, hub)
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
    return Found(server, address, None if callee is None else _Exchange(callee))


class _Exchange:
    """Calls an actor, with bytes, at once; whoever wants to know awaits the answer."""

    def __init__(self, callee: Any) -> None:
        self._callee = callee

    def __call__(self, connection: bytes, number: int, data: bytes) -> _Called:
        return _Called(self._callee.exchange.remote(ray_line.pack_call(connection, number, data)))


class _Called:
    def __init__(self, answer: Any) -> None:
        self._answer = answer

    def __await__(self) -> Generator[Any, None, Answer]:
        answer: bytes = yield from self._answer.__await__()
        return ray_line.unpack_answer(answer)


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
    return light_actor(ray, ray_relay.Relay)


def light_actor(ray: Any, kind: type) -> Any:
    """A new actor, near this process, of a class of :mod:`aioinfer.transports.ray_relay`."""
    if not ray.is_initialized():
        ray.init()
    here = ray.get_runtime_context().get_node_id()
    near = ray.util.scheduling_strategies.NodeAffinitySchedulingStrategy(here, soft=True)
    # By value: an actor that had to import this package would import torch as well.
    modules = ray_relay, ray_line
    for module in modules:
        ray.cloudpickle.register_pickle_by_value(module)
    try:
        return (
            ray.remote(kind)
            .options(num_cpus=0, max_concurrency=MAX_CONCURRENCY, scheduling_strategy=near)
            .remote()
        )
    finally:
        for module in modules:
            ray.cloudpickle.unregister_pickle_by_value(module)
