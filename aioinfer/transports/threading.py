"""The link for threads, and for coroutines of other event loops."""

from __future__ import annotations

from aioinfer.client import SyncInferenceClient
from aioinfer.transports.in_process import InProcessTransport


class ThreadingTransport(InProcessTransport):
    """Serves threads, and coroutines of any event loop, in the server's process.

    Its ``client()`` is a :class:`~aioinfer.SyncInferenceClient`; ``async_client()`` serves
    coroutines, whichever loop they run on.
    """

    def client(self) -> SyncInferenceClient:
        return self.sync_client()
