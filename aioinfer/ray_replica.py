"""The actor in which a replica of a :class:`~aioinfer.RayInferenceServer` runs."""

from __future__ import annotations

import asyncio
import gc
from typing import Any

from aioinfer.hosted import near_executor
from aioinfer.replica import Replica


class RayReplica(Replica):
    """Runs a server on the loop of its actor, which nobody else needs."""

    async def _serve(
        self, factory: Any, transport: Any, options: dict[str, Any], weights: Any = None
    ) -> None:
        options = {"executor": near_executor(options), **options}
        await super()._serve(factory, transport, options, weights)
        gc.collect()
        gc.freeze()  # modules and policy stay; looking through them would hold up a batch

    async def stay(self) -> None:
        """Never return: who awaits the outcome learns when the actor has ended."""
        await asyncio.Event().wait()
