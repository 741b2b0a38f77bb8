"""MonarchTransport keeps what every link keeps, on connections and in calls of endpoints."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator

import pytest
from helpers import until

from aioinfer import InferenceServer, MonarchTransport
from aioinfer.testing import settle

from .hooks import InBackground, Link
from .loops import OnAnyLoop
from .suite import TransportConformance
from .test_remote_transport import InCalls, OnConnections, RemoteLink

pytestmark = [pytest.mark.xdist_group("monarch"), pytest.mark.usefixtures("monarch")]


class MonarchLink(RemoteLink):
    """A link on which nothing arrives at once."""

    async def told(self) -> None:
        await settle()  # what is to be said is said in a callback
        await super().told()


class TestOnConnections(OnConnections, InBackground, TransportConformance, OnAnyLoop):
    """Direct connections, callers on another event loop than the server's, and threads.

    What both kinds of event loop do with them is in ``test_remote_transport.py``.
    """

    pytestmark = [pytest.mark.event_loop("uvloop")]

    def transport(self) -> MonarchTransport:
        return MonarchTransport("direct")


class TestInCalls(InCalls, InBackground, TransportConformance):
    """Calls of endpoints, callers on another event loop than the server's, and threads."""

    pytestmark = [pytest.mark.event_loop("asyncio")]

    def transport(self) -> MonarchTransport:
        return MonarchTransport("rpc")

    def link(self, server: InferenceServer) -> MonarchLink:
        return MonarchLink(server)

    @contextlib.asynccontextmanager
    async def running(self, server: InferenceServer) -> AsyncIterator[Link]:
        """Run a server; clients hear a moment after it that it was closed."""
        async with super().running(server) as link:
            yield link
        transport = server._transports[0]
        await until(
            lambda: all(channel.gone is not None for channel in transport._channels()),
            "news of the end",
        )
