"""ThreadingTransport keeps what every link keeps: for threads, and for a foreign event loop."""

from __future__ import annotations

from helpers import action, doubling, row

from aioinfer import InferenceClient, InferenceServer, SyncInferenceClient, ThreadingTransport

from .hooks import InBackground
from .loops import OnAnyLoop
from .suite import TransportConformance


class TestThreadingTransport(InBackground, TransportConformance, OnAnyLoop):
    """Callers in threads and on the test's loop; the server runs on a loop of its own."""

    def transport(self) -> ThreadingTransport:
        return ThreadingTransport()

    def test_the_natural_client(self):
        """``client()`` is for threads; both kinds can be had by name."""
        transport = self.transport()
        with InferenceServer(doubling(), transport) as server:
            for source in (transport, server):
                assert type(source.client()) is SyncInferenceClient
                assert type(source.async_client()) is InferenceClient
                assert type(source.sync_client()) is SyncInferenceClient
            assert action(transport.client()(row(1))) == 2
