"""The actor in which a replica of a :class:`~aioinfer.RayInferenceServer` runs."""

from __future__ import annotations

import asyncio
import gc
from typing import Any

from aioinfer.hosted import near_executor
from aioinfer.replica import Replica
from aioinfer.transports.ray_replicas import ReplicaTransport
from aioinfer.transports.rpc import Answer as CallAnswer


class RayReplica(Replica):
    """Runs a server on the loop of its actor, which nobody else needs."""

    async def _serve(
        self,
        factory: Any,
        transport: Any,
        options: dict[str, Any],
        weights: Any = None,
    ) -> None:
        self._transport: ReplicaTransport = transport
        options = {"executor": near_executor(options), **options}
        await super()._serve(factory, transport, options, weights)
        gc.collect()
        gc.freeze()  # modules and policy stay; looking through them would hold up a batch

    async def exchange(self, connection: bytes, number: int, data: bytes) -> CallAnswer:
        """Take a call of a client that makes no connection."""
        return await self._transport.exchange(connection, number, data)

    async def stay(self) -> None:
        """Never return: who awaits the outcome learns when the actor has ended."""
        await asyncio.Event().wait()
