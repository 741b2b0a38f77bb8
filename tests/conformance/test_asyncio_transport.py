"""AsyncioTransport keeps what every link keeps."""

from __future__ import annotations

import asyncio

import pytest
from helpers import InThread, action, doubling, row, within

from aioinfer import AsyncioTransport, InferenceClient, InferenceServer, SyncInferenceClient

from .loops import OnTheServersLoop
from .suite import TransportConformance


class TestAsyncioTransport(TransportConformance, OnTheServersLoop):
    """Callers on the server's own event loop, and threads."""

    def transport(self) -> AsyncioTransport:
        return AsyncioTransport()

    async def test_the_natural_client(self):
        """``client()`` is for coroutines; both kinds can be had by name."""
        transport = self.transport()
        async with InferenceServer(doubling(), transport) as server:
            for source in (transport, server):
                assert type(source.client()) is InferenceClient
                assert type(source.async_client()) is InferenceClient
                assert type(source.sync_client()) is SyncInferenceClient

    async def test_a_client_on_the_wrong_loop(self):
        """A coroutine of another event loop is refused, and told what serves it."""
        async with self.serve(doubling()) as link:
            client = link.client()

            def elsewhere() -> None:
                async def main() -> None:
                    await client(row(1))

                asyncio.run(main())

            with pytest.raises(RuntimeError, match="ThreadingTransport"):
                await InThread(elsewhere)
            assert action(await within(client(row(2)))) == 4
