"""The actor in which a replica of a :class:`~aioinfer.MonarchInferenceServer` runs."""

from __future__ import annotations

from typing import Any

from monarch.actor import Actor, concurrent_endpoint

from aioinfer.hosting.base import Answer
from aioinfer.hosting.replica import Replica


class MonarchReplica(Actor):  # type: ignore[misc]  # Monarch is not typed
    """Runs a server on the loop of its actor."""

    def __init__(self) -> None:
        self._replica = Replica()

    @concurrent_endpoint  # type: ignore[untyped-decorator]
    async def ask(self, what: str, *args: Any) -> Answer:
        """Do something; return whether it worked, and the answer or the error."""
        return await self._replica.ask(what, *args)

    async def __cleanup__(self, error: Exception | None) -> None:
        await self._replica.end()
