"""The link for coroutines on the server's own event loop."""

from __future__ import annotations

import asyncio

from aioinfer.request import ReplyPort
from aioinfer.transports.in_process import InProcessTransport


class AsyncioTransport(InProcessTransport):
    """Serves coroutines that run on the server's own event loop. The fastest link.

    Its ``client()`` is an :class:`~aioinfer.InferenceClient`; a call from a coroutine of
    another loop is a :class:`RuntimeError`. ``sync_client()`` serves threads.
    """

    def _port_abroad(self, loop: asyncio.AbstractEventLoop) -> ReplyPort:
        raise RuntimeError(
            "this client was called on an event loop that is not the server's; an "
            "AsyncioTransport serves the coroutines of the server's own loop only. Use "
            "ThreadingTransport().async_client(), or transport=None, for other loops"
        )
