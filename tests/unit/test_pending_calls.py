"""Calls to a server whose event loop may be closed under it."""

from __future__ import annotations

import asyncio
import struct
import threading
from collections.abc import Iterator

import pytest
from helpers import until, within

from aioinfer.clock import MonotonicClock
from aioinfer.errors import ServerClosedError
from aioinfer.intake import Intake
from aioinfer.transports import pending_calls, wire
from aioinfer.transports.pending_calls import PendingCalls
from aioinfer.transports.rpc import DIED, RpcHub

CONNECTION = b"one"
OPEN = struct.pack("<I", wire.PROTOCOL)


class Hub(RpcHub):
    """A server's end of calls, which counts how often it was looked after."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.intake = Intake(
            loop,
            MonotonicClock(),
            wake=lambda: None,
            admit=lambda signature: None,
            refused=lambda: None,
            queued_rows=lambda: 0,
            max_queue_size=8,
        )
        self.probes = 0
        super().__init__(self.intake)

    @property
    def is_lost(self) -> bool:
        self.probes += 1
        return super().is_lost


class Elsewhere:
    """An event loop on a thread of its own."""

    def __init__(self) -> None:
        self.loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self.loop.run_forever)

    def start(self) -> None:
        self._thread.start()

    def end(self) -> None:
        """End the loop in the midst of things, and close it."""
        if self._thread.is_alive():
            self.loop.call_soon_threadsafe(self.loop.stop)
            self._thread.join(10)
        for task in asyncio.all_tasks(self.loop):
            task._log_destroy_pending = False  # type: ignore[attr-defined]
        self.loop.close()


@pytest.fixture
def elsewhere(monkeypatch: pytest.MonkeyPatch) -> Iterator[Elsewhere]:
    monkeypatch.setattr(pending_calls, "PROBE_S", 0.001)
    elsewhere = Elsewhere()
    yield elsewhere
    elsewhere.end()


async def test_a_call_that_the_loop_never_comes_to(elsewhere: Elsewhere):
    """A loop that has stopped, and is closed long afterwards, takes no call with it."""
    calls, hub = PendingCalls(), Hub(elsewhere.loop)
    call = asyncio.create_task(calls.exchange(hub, CONNECTION, 0, OPEN))
    await until(lambda: hub.probes > 2, "it to be looked after")
    assert not call.done()
    elsewhere.loop.close()
    assert await within(call) == (DIED, b"")


async def test_a_call_to_a_server_that_does_not_come_to_closing(elsewhere: Elsewhere):
    """Nor does one that stops while it closes, whatever it owed."""
    await asyncio.to_thread(elsewhere.start)
    calls, hub = PendingCalls(), Hub(elsewhere.loop)
    assert await within(calls.exchange(hub, CONNECTION, 0, OPEN)) == (0, b"")
    call = asyncio.create_task(calls.exchange(hub, CONNECTION, 1, struct.pack("<d", 0.0)))
    await until(lambda: hub._peers[CONNECTION]._held, "the call to be held")
    hub.intake.close(lambda: ServerClosedError("closing"))
    probes = hub.probes
    second = asyncio.create_task(calls.exchange(hub, b"another", 0, OPEN))
    await within(second)
    await until(lambda: hub.probes > probes + 2, "it to be looked after")
    assert not call.done()
    await asyncio.to_thread(elsewhere.end)
    assert await within(call) == (DIED, b"")


async def test_a_server_that_owes_nothing_is_left_alone(elsewhere: Elsewhere):
    """A call that is held costs nothing; nothing is kept of one that was answered."""
    await asyncio.to_thread(elsewhere.start)
    calls, hub = PendingCalls(), Hub(elsewhere.loop)
    assert await within(calls.exchange(hub, CONNECTION, 0, OPEN)) == (0, b"")
    await until(lambda: not calls._probing, "the last look")
    assert not calls._calls
    call = asyncio.create_task(calls.exchange(hub, CONNECTION, 1, struct.pack("<d", 0.0)))
    await until(lambda: not calls._probing and hub.probes, "the last look")
    assert not call.done()
    await asyncio.to_thread(elsewhere.end)
    answer = await within(calls.exchange(hub, CONNECTION, 2, b""))  # which asks after it again
    assert answer[0] == -1
    assert await within(call) == (DIED, b"")
