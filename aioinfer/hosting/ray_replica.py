"""The actor in which a replica of a :class:`~aioinfer.RayInferenceServer` runs."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import Callable, Mapping
from typing import Any

from aioinfer.hosting.replica import Replica
from aioinfer.transports.ray import MAX_CONCURRENCY
from aioinfer.transports.ray_line import pack_answer, unpack_call
from aioinfer.transports.ray_replicas import ReplicaTransport

_NOT_FOR_REPLICAS = {
    *("concurrency_groups", "get_if_exists", "lifetime", "max_concurrency", "max_task_retries"),
    *("name", "namespace"),
}
"""Options that would make a replica something else."""


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
        await super()._serve(factory, transport, {"own_loop": True, **options}, weights)
        gc.collect()
        gc.freeze()  # modules and policy stay; looking through them would hold up a batch

    async def exchange(self, call: bytes) -> bytes:
        """Take a call of a client that makes no connection."""
        return pack_answer(*await self._transport.take_call(*unpack_call(call)))

    async def stay(self) -> None:
        """Never return: who awaits the outcome learns when the actor has ended."""
        await asyncio.Event().wait()


def new_actors(ray: Any, options: Mapping[str, Any] | None) -> tuple[Callable[[], Any], int]:
    """What starts an actor that is a replica, and how often one is to be replaced.

    Args:
        ray: the module.
        options: what a user wants of Ray.

    Raises:
        TypeError: they are no mapping, or of a wrong type.
        ValueError: some are not for a replica, or unknown to Ray.
    """
    if options is not None and not isinstance(options, Mapping):
        raise TypeError(f"ray_options must be a mapping or None, got {options!r}")
    known = dict(options or {})
    for name in sorted(_NOT_FOR_REPLICAS.intersection(known)):
        raise ValueError(f"ray_options must not have {name!r}, which the server decides itself")
    max_restarts = known.pop("max_restarts", -1)
    if isinstance(max_restarts, bool) or not isinstance(max_restarts, int) or max_restarts < -1:
        raise ValueError(
            f"max_restarts of ray_options must be an int >= 0, or -1, got {max_restarts!r}"
        )
    try:
        actors = ray.remote(RayReplica).options(**known, max_concurrency=MAX_CONCURRENCY)
        return actors.remote, max_restarts
    except (TypeError, ValueError) as error:
        raise type(error)(f"ray_options={known!r} is refused by Ray: {error}") from error
