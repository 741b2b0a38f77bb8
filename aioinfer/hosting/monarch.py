"""A server on a Monarch mesh: one replica per process, and clients that use all of them."""

from __future__ import annotations

import asyncio
import importlib
import math
from collections.abc import Callable, Mapping
from typing import Any

import aioinfer.arguments as arguments
from aioinfer.hosting.base import Answer, check
from aioinfer.hosting.replicated import ReplicatedServer
from aioinfer.transports.endpoint import TlsFactory
from aioinfer.transports.monarch import MonarchTransport, require_monarch
from aioinfer.transports.remote import ConnectionKind
from aioinfer.transports.replicated import ReplicatedTransport

_STOP_S = 10.0
"""Seconds that the processes have to end, once they have nothing left to do."""


class MonarchInferenceServer(ReplicatedServer):
    """Runs an :class:`InferenceServer` in each process of a mesh, and spreads clients over them.

    Use it as ``async with``, as ``with``, or through :meth:`start` and :meth:`shutdown`. Requests
    go to the least loaded of as few replicas as have room for them. Those of a replica that dies
    are answered by another one; a replica that has died is not replaced.

    Args:
        policy_factory: called in each process without arguments; returns the policy. It must be
            picklable.
        proc_mesh: the processes; they stay when the server is closed. ``None`` to start some on
            this host.
        per_host: how many, as ``spawn_procs(per_host=...)`` takes it; ``None`` for one. They end
            with the server.
        device: as of :class:`InferenceServer`, or a function of the replica's number, such as
            ``"cuda:{}".format``.
        room: rows that one replica has room for, before a second one is used too; ``None`` for
            what the replicas themselves find, from what their forwards cost.
        retry: whether requests of a replica that dies are sent to another one.
        connection: as of :class:`MonarchTransport`.
        host: as of :class:`MonarchTransport`.
        tls: as of :class:`MonarchTransport`.
        log_faults: as of :class:`MonarchTransport`.
        start_timeout: seconds in which all replicas must be ready.
        **options: what :class:`InferenceServer` takes besides.

    Raises:
        ImportError: Monarch is not installed.
    """

    def __init__(
        self,
        policy_factory: Callable[[], Any],
        proc_mesh: Any = None,
        *,
        per_host: Mapping[str, int] | None = None,
        device: Any = None,
        room: int | None = None,
        retry: bool = True,
        connection: ConnectionKind = "auto",
        host: str | None = None,
        tls: TlsFactory | None = None,
        log_faults: bool = True,
        start_timeout: float = 120.0,
        **options: Any,
    ) -> None:
        if proc_mesh is not None and per_host is not None:
            raise ValueError(f"per_host={per_host!r} is for when no proc_mesh is given")
        require_monarch(type(self).__name__)
        if not callable(device):
            arguments.device("device", device)
        check(policy_factory, options)
        self._factory = policy_factory
        self._procs = proc_mesh
        self._per_host = {"replicas": 1} if per_host is None else dict(per_host)
        self._own_procs = proc_mesh is None
        self._device = device
        self._options = options
        if proc_mesh is None:
            count = math.prod(arguments.count("per_host", n) for n in self._per_host.values())
        else:
            count = proc_mesh.size()
        self._transports = [
            MonarchTransport(connection, host=host, tls=tls, log_faults=log_faults)
            for _ in range(count)
        ]
        self._started: list[Any] = []
        """The processes that end with the server."""
        self._office: Any = None
        super().__init__(
            ReplicatedTransport(dict(enumerate(self._transports)), room=room, retry=retry),
            start_timeout,
        )

    # -- what the cluster does ----------------------------------------------

    async def _open(self) -> None:
        count = len(self._transports)
        self._office = self._transports[0]._office()
        if self._own_procs:
            host = importlib.import_module("monarch.actor").this_host()
            alone = dict.fromkeys(self._per_host, 1)
            procs = self._started = [host.spawn_procs(per_host=alone) for _ in range(count)]
        else:
            flat = self._procs.flatten("replica")
            procs = [flat.slice(replica=number) for number in range(count)]
        await asyncio.gather(*[self._serve(number, its) for number, its in enumerate(procs)])

    async def _serve(self, number: int, procs: Any) -> None:
        # Spawned and called as a desk is: a post is told of the end of what it has spawned, and
        # not everybody is who calls it.
        kind = importlib.import_module("aioinfer.hosting.monarch_replica").MonarchReplica
        spawned = await self._office.call(self._office.post, "spawn", procs, kind)
        self._replicas[number] = spawned
        device = self._device(number) if callable(self._device) else self._device
        options = {"device": device, **self._options}
        await self._call(number, "serve", self._factory, self._transports[number], options)

    async def _send(self, replica: Any, what: str, *args: Any) -> Answer:
        answer: Answer = await self._office.call(replica, "ask", what, *args)
        return answer

    async def _end(self) -> None:
        replicas, self._replicas = self._replicas, {}
        started, self._started = self._started, []
        ends = started or [replica.actor for replica in replicas.values() if replica is not None]
        # Some of them may have ended already.
        await asyncio.gather(*(_stopped(mesh) for mesh in ends), return_exceptions=True)


async def _stopped(mesh: Any) -> None:
    async with asyncio.timeout(_STOP_S):
        await mesh.stop()
