"""The actor in which a replica of a :class:`~aioinfer.MonarchInferenceServer` runs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import anyio
from monarch.actor import Actor, concurrent_endpoint

from aioinfer.errors import ServerClosedError
from aioinfer.process import described
from aioinfer.server import InferenceServer


class Replica(Actor):  # type: ignore[misc]  # Monarch is not typed
    """Runs a server on the loop of its actor."""

    def __init__(self) -> None:
        self._server: InferenceServer | None = None

    @concurrent_endpoint  # type: ignore[untyped-decorator]
    async def ask(self, what: str, *args: Any) -> tuple[bool, Any]:
        """Do one of the things below; return whether it worked, and the answer or the error."""
        try:
            return True, await getattr(self, f"_{what}")(*args)
        except Exception as error:
            return False, described(error)

    async def __cleanup__(self, error: Exception | None) -> None:
        if self._server is not None:
            with anyio.move_on_after(1.0):
                await self._server.aclose(drain=False)

    async def _serve(
        self, factory: Callable[[], Any], transport: Any, options: dict[str, Any]
    ) -> None:
        server = InferenceServer(factory(), transport, **options)
        await server.__aenter__()
        self._server = server

    async def _stats(self, reset: bool) -> Any:
        return self._running().stats(reset=reset)

    async def _load_state_dict(self, state_dict: dict[str, Any]) -> int:
        server = self._running()
        await server.aupdate_model(lambda model: model.load_state_dict(state_dict))
        return server.policy_version

    async def _close(self, timeout: float | None, drain: bool) -> None:
        with anyio.move_on_after(timeout):
            await self._running().aclose(drain=drain)

    def _running(self) -> InferenceServer:
        if self._server is None:
            raise ServerClosedError("this replica does not serve")
        return self._server
