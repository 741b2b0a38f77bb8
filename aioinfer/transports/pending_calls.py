"""Calls to a server of another event loop, which may be closed before it has answered them."""

from __future__ import annotations

import asyncio

from aioinfer.transports.rpc import DIED, Answer, RpcHub

PROBE_S = 0.2
"""Seconds after which a server that owes an answer is looked after."""


class PendingCalls:
    """The calls that an actor has taken for the servers of its process; for one event loop.

    A loop that ends says nothing to those who wait for what it should have done. So it is looked
    after, but only while something is owed: calls that a server holds until it has something to
    say cost nothing.
    """

    def __init__(self) -> None:
        self._calls: dict[RpcHub, set[asyncio.Future[Answer]]] = {}
        self._probing = False

    async def exchange(self, hub: RpcHub, connection: bytes, number: int, data: bytes) -> Answer:
        """A call of a client; ``DIED`` if the loop of its server has ended."""
        calls = self._calls.setdefault(hub, set())
        call = asyncio.ensure_future(hub.exchange(connection, number, data))
        calls.add(call)
        if not self._probing:
            self._probe_later()
        try:
            return await call
        except asyncio.CancelledError:  # the server's event loop ended, or this actor
            return DIED, b""
        finally:
            calls.discard(call)
            if not calls:
                self._calls.pop(hub, None)

    def _probe_later(self) -> None:
        self._probing = True
        asyncio.get_running_loop().call_later(PROBE_S, self._probe)

    def _probe(self) -> None:
        self._probing = False
        owing = False
        for hub, calls in list(self._calls.items()):
            if hub.is_lost:
                for call in list(calls):
                    call.cancel()
            elif hub.busy:
                owing = True
        if owing:
            self._probe_later()
