"""What runs in an actor of a replicated server, whatever cluster the actor is of."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import anyio
import torch

from aioinfer.errors import ServerClosedError
from aioinfer.hosting.base import Answer, described, respond
from aioinfer.server import InferenceServer
from aioinfer.transports.base import InferenceTransport


class Replica:
    """Runs a server on the running event loop, and does what is asked of it."""

    def __init__(self) -> None:
        self._server: InferenceServer | None = None

    async def ask(self, what: str, *args: Any) -> Answer:
        """Return whether it worked, and the answer or the error; never raises."""
        if what == "ping":
            return True, None
        if what == "serve":
            try:
                await self._serve(*args)
            except Exception as error:
                return False, described(error)
            return True, None
        if self._server is None:
            return False, described(ServerClosedError("this replica does not serve"))
        return await respond(self._server, what, args)

    async def end(self) -> None:
        """Close the server, if there is one, at once."""
        if self._server is not None:
            with anyio.move_on_after(1.0):
                await self._server.aclose(drain=False)

    async def _serve(
        self,
        factory: Callable[[], Any],
        transport: InferenceTransport,
        options: dict[str, Any],
        weights: Mapping[str, torch.Tensor] | None = None,
    ) -> None:
        policy = factory()
        if weights is not None:
            policy.load_state_dict(weights)
        server = InferenceServer(policy, transport, **options)
        await server.astart()
        self._server = server
