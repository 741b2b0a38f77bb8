"""ReplicatedTransport keeps what every link keeps, whatever the links to its replicas are."""

from __future__ import annotations

from typing import Any

import pytest
from helpers import doubling

from aioinfer import InferenceClient, InferenceServer, SyncInferenceClient, ThreadingTransport
from aioinfer.transports.replicated import ReplicatedTransport

from .hooks import Hooks, Link
from .loops import OnAnyLoop
from .suite import TransportConformance
from .test_mp_transport import OnSockets, SocketLink, turn_of


def replicated(server: InferenceServer) -> ReplicatedTransport:
    return ReplicatedTransport({"only": server._transports[0]}, clock=server._clock)


class ReplicatedLink(Link):
    """Clients of a transport that has this server as its only replica."""

    def __init__(self, server: InferenceServer) -> None:
        super().__init__(server)
        self.replicated = replicated(server)

    def client(self) -> InferenceClient:
        return self.replicated.async_client()

    def sync_client(self) -> SyncInferenceClient:
        return self.replicated.sync_client()


class ReplicatedSocketLink(ReplicatedLink, SocketLink):
    """The same, where what was sent is not yet what was read."""

    async def told(self) -> None:
        background = self.replicated._background.started
        if background is not None:  # what threads submit goes through it
            await turn_of(background.loop)
        await super().told()


class OneReplica(Hooks):
    async def test_the_natural_client(self):
        """``client()`` is for coroutines; both kinds can be had by name."""
        async with self.serve(doubling()) as link:
            transport: Any = link.replicated
            assert type(transport.client()) is InferenceClient
            assert type(transport.async_client()) is InferenceClient
            assert type(transport.sync_client()) is SyncInferenceClient


class TestOverThreads(OneReplica, TransportConformance, OnAnyLoop):
    """The replica shares the interpreter."""

    def transport(self) -> ThreadingTransport:
        return ThreadingTransport()

    def link(self, server: InferenceServer) -> ReplicatedLink:
        return ReplicatedLink(server)


class TestOverSockets(OneReplica, OnSockets, TransportConformance, OnAnyLoop):
    """The replica is behind a connection."""

    pytestmark = [pytest.mark.timeout(30)]

    def link(self, server: InferenceServer) -> ReplicatedSocketLink:
        return ReplicatedSocketLink(server)
