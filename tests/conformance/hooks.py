"""What the conformance suite asks of a transport's test class, and how it talks to it."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Sequence
from typing import Any

import pytest
import torch
from helpers import InThread, row, until
from tensordict import TensorDict

from aioinfer import (
    InferenceClient,
    InferenceServer,
    InferenceTransport,
    ServerClosedError,
    SyncInferenceClient,
)
from aioinfer.testing import RecordingModel, settle

try:
    from uvloop import new_event_loop as _uvloop
except ImportError:  # there is none for every platform
    _uvloop = None

LOOPS: dict[str, Any] = {"asyncio": asyncio.SelectorEventLoop}
"""The event loops that there are, by name."""
if _uvloop is not None:
    LOOPS["uvloop"] = _uvloop

both_loops = pytest.mark.parametrize(
    "new_loop",
    [
        pytest.param(asyncio.SelectorEventLoop, id="asyncio"),
        pytest.param(
            _uvloop, id="uvloop", marks=pytest.mark.skipif(_uvloop is None, reason="no uvloop")
        ),
    ],
)
"""For a test that runs event loops of its own, made by its argument ``new_loop``."""


class Link:
    """A running server as its actors see it: where they get their clients.

    Args:
        server: the server; it lives in the test's process.
    """

    def __init__(self, server: InferenceServer) -> None:
        self.server = server

    def client(self) -> InferenceClient:
        """A new client for coroutines of the test's event loop."""
        return self.server.async_client()

    def sync_client(self) -> SyncInferenceClient:
        """A new client for threads of the test's process."""
        return self.server.sync_client()

    async def queued(self, rows: int) -> None:
        """Wait until ``rows`` rows have arrived at the server and wait there."""
        await until(lambda: self.server.stats().queue_depth >= rows, f"{rows} rows waiting")

    async def fill(
        self, client: InferenceClient, model: RecordingModel
    ) -> tuple[asyncio.Future[Any], asyncio.Future[Any]]:
        """Have ``client`` ask 0, which the held ``model`` is busy with, and 1, which waits."""
        first = client.submit(row(0))
        await model.entered()
        second = client.submit(row(1))
        await self.queued(1)
        return first, second

    async def accepted(self) -> None:
        """Wait until the server has accepted what its clients have sent; here it did at once."""

    async def refusing(self) -> None:
        """Wait until the server, which is being closed, accepts nothing more."""
        client = self.client()

        def refused() -> bool:
            try:
                client.submit(TensorDict({"observation": torch.zeros(3)})).cancel()
            except ServerClosedError:
                return True
            return False

        await until(refused, "a refusal")

    async def told(self) -> None:
        """Wait until the server has heard what its clients have said so far."""
        await settle()


class Hooks:
    """What a transport's test class overrides.

    :meth:`transport` is all that a link between actors and a server of this process needs.
    """

    def transport(self) -> InferenceTransport | None:
        """A new transport; what is given to the server."""
        raise NotImplementedError

    def link(self, server: InferenceServer) -> Link:
        """The actors' side of ``server``, which serves a transport of this class."""
        return Link(server)

    @contextlib.asynccontextmanager
    async def running(self, server: InferenceServer) -> AsyncIterator[Link]:
        """Run ``server`` where servers of this link usually run, and close it in the end."""
        async with server:
            yield self.link(server)

    def check_cause(
        self,
        error: BaseException,
        kind: type[BaseException],
        one_of: Sequence[BaseException] | None = None,
    ) -> None:
        """Check that ``error`` shows what the policy raised: a ``kind``, of these objects."""
        cause = error.__cause__
        assert type(cause) is kind
        assert cause.__traceback__ is not None
        assert one_of is None or any(cause is raised for raised in one_of)

    @contextlib.asynccontextmanager
    async def serve(self, policy: Any, **options: Any) -> AsyncIterator[Link]:
        """Serve ``policy`` on a new transport."""
        async with self.running(InferenceServer(policy, self.transport(), **options)) as link:
            yield link


class InBackground(Hooks):
    """Runs the servers on an event loop of their own: the callers' loop is a foreign one."""

    @contextlib.asynccontextmanager
    async def running(self, server: InferenceServer) -> AsyncIterator[Link]:
        await InThread(server.start)
        try:
            yield self.link(server)
        finally:
            await InThread(server.shutdown)
