"""MPTransport keeps what every link keeps: here through real sockets, from the same process."""

from __future__ import annotations

import array
import asyncio
import contextlib
import fcntl
import gc
import select
import termios
from collections.abc import AsyncIterator, Sequence
from typing import Any

import pytest
from helpers import InThread, action, all_well, doubling, outcomes, row, rows, seen, until, within

from aioinfer import (
    InferenceClient,
    InferenceServer,
    ModelError,
    MPTransport,
    QueueFullError,
    SyncInferenceClient,
)
from aioinfer.testing import ManualClock, RecordingModel, settle
from aioinfer.transports import channel
from aioinfer.transports.wire import RemoteTraceback

from .hooks import Hooks, InBackground, Link
from .loops import OnAnyLoop, OnTheServersLoop
from .suite import TransportConformance


class SocketLink(Link):
    """A link on which what was sent is not yet what was read."""

    @property
    def transport(self) -> MPTransport:
        return self.server._transports[0]

    async def told(self) -> None:
        background = self.transport._background.started
        if background is not None:  # what threads submit goes through it
            await turn_of(background.loop)
        await until(self._everything_is_read, "everything to be read")
        intake = self.transport._intake
        if intake is not None:
            await turn_of(intake.loop)

    async def accepted(self) -> None:
        await self.told()

    async def refusing(self) -> None:
        intake = self.transport._intake
        await until(lambda: intake is None or intake.closed is not None, "a refusal")

    def _everything_is_read(self) -> bool:
        listener = self.transport._listener
        if listener is not None and select.select([listener], [], [], 0)[0]:
            return False
        return not any(_unread(peer.socket) for peer in list(self.transport._peers))


def _unread(connection: Any) -> int:
    if connection.fileno() < 0:
        return 0
    count = array.array("i", [0])
    fcntl.ioctl(connection.fileno(), termios.FIONREAD, count)
    return count[0]


async def turn_of(loop: asyncio.AbstractEventLoop) -> None:
    if loop is asyncio.get_running_loop():
        await settle()
    else:
        await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(settle(), loop))


class OnSockets(Hooks):
    """What differs where client and server do not share memory."""

    def transport(self) -> MPTransport:
        return MPTransport()

    def link(self, server: InferenceServer) -> SocketLink:
        return SocketLink(server)

    @contextlib.asynccontextmanager
    async def serve(self, policy: Any, **options: Any) -> AsyncIterator[Link]:
        """Serve ``policy``; the clients read the clock of the server, if it has one of its own."""
        transport, clock = self.transport(), options.get("clock")
        with pytest.MonkeyPatch.context() as patch:
            if clock is not None:
                patch.setattr(transport, "_clock", clock)
                patch.setattr(channel, "_clock", clock)
            async with self.running(InferenceServer(policy, transport, **options)) as link:
                yield link

    def check_cause(
        self,
        error: BaseException,
        kind: type[BaseException],
        one_of: Sequence[BaseException] | None = None,
    ) -> None:
        """An exception crosses as the text of its traceback."""
        cause = error.__cause__
        assert type(cause) is RemoteTraceback
        assert kind.__name__ in str(cause)
        assert "Traceback (most recent call last)" in str(cause)
        assert one_of is None or any(str(raised) in str(cause) for raised in one_of)

    # -- claims that read differently on this link --------------------------

    async def test_a_dropped_client_is_not_waited_for(self):
        """A client without references holds no batch back, and no more does a closed one."""
        # A client joins with its first request, so here they ask one after the other.
        clock, model = ManualClock(), RecordingModel()  # no timeout passes but the one below
        async with self.serve(model, clock=clock, timeout=60.0) as link:
            stays = link.client()
            dropped = [link.client(), link.sync_client()]
            closed = [link.client(), link.sync_client()]
            with model.held():
                asked = [stays.submit(row(1))]
                await model.entered()
                asked += [client.submit(row(1)) for client in (dropped[0], closed[0])]
                threads = [InThread(client, row(1)) for client in (dropped[1], closed[1])]
                await link.queued(4)
            await within(asked[0])
            await link.told()
            clock.advance(60.0)  # for the first of them might have come back
            await outcomes(*asked, *threads)
            for client in closed:
                client.close()
            dropped.clear()
            threads.clear()
            del client
            gc.collect()
            await link.told()
            for value in (2, 3):
                assert action(await within(stays(row(value)))) == 2 * value

    async def test_the_natural_client(self):
        """``client()`` is for coroutines; both kinds can be had by name."""
        transport = self.transport()
        async with self.running(InferenceServer(doubling(), transport)) as link:
            for source in (transport, link.server):
                assert type(source.client()) is InferenceClient
                assert type(source.async_client()) is InferenceClient
                assert type(source.sync_client()) is SyncInferenceClient

    async def test_without_blocking_a_full_queue_refuses(self):
        """``submit(block=False)`` comes to QueueFullError, which names the bound; others stay."""
        model = RecordingModel()
        async with self.serve(model, max_queue_size=3) as link:
            client, sync_client = link.client(), link.sync_client()
            with model.held():
                first = client.submit(row(0), block=False)
                await model.entered()
                rest = [client.submit(rows([1, 2]), block=False)]
                rest.append(client.submit(row(3), block=False))
                await link.queued(3)
                of_a_thread = await InThread(sync_client.submit, row(7), block=False)
                refusals = await outcomes(
                    client.submit(row(4), block=False),
                    client.submit(rows([5, 6]), block=False),
                    asyncio.wrap_future(of_a_thread),
                )
                for error in refusals:
                    assert type(error) is QueueFullError
                    assert "max_queue_size=3" in str(error)
                assert link.server.stats().refused == 3
            replies = await outcomes(first, *rest)
            assert [action(reply) for reply in replies] == [0, [2, 4], 6]
            assert action(await within(client.submit(row(8), block=False))) == 16
            in_thread = await InThread(sync_client.submit, row(9), block=False)
            assert action(await within(asyncio.wrap_future(in_thread))) == 18

    async def test_a_thread_waits_for_room(self):
        """While the queue is full, what a thread submits waits, as long as its ``timeout``."""
        model = RecordingModel()
        async with self.serve(model, max_queue_size=1) as link:
            client, sync_client = link.client(), link.sync_client()
            with model.held():
                first, second = await link.fill(client, model)
                patient = await InThread(sync_client.submit, row(2))
                impatient = await InThread(sync_client.submit, row(3), timeout=0.05)
                with pytest.raises(TimeoutError, match=r"0\.05"):
                    await within(asyncio.wrap_future(impatient))
                assert not patient.done()
            assert action(await within(asyncio.wrap_future(patient))) == 4
            await all_well(first, second)
        assert seen(model) == [[0], [1], [2]] or seen(model) == [[0], [1, 2]]

    async def test_waiting_for_room_counts_as_waiting(self):
        """A ``timeout`` counts from the call of ``submit``, the wait for room included."""
        clock, model = ManualClock(), RecordingModel()
        options = {"max_queue_size": 1, "max_batch_size": 1, "timeout": 0.0, "clock": clock}
        async with self.serve(model, **options) as link:
            client = link.client()
            with model.held():
                first, second = await link.fill(client, model)
                future = await InThread(link.sync_client().submit, row(2), timeout=8)
                await link.told()
                clock.advance(5.0)
                model.step()
                await model.entered()  # the second one; now there is room
                assert not future.done()
                clock.advance(3.0)
                with pytest.raises(TimeoutError):
                    await within(asyncio.wrap_future(future))
                await link.told()
            await all_well(first, second)
            assert action(await within(client(row(3)))) == 6
            assert seen(model) == [[0], [1], [3]]

    async def test_room_is_made_by_a_cancellation(self):
        """What waits for room gets it when the request that filled the queue goes."""
        model = RecordingModel()
        async with self.serve(model, max_queue_size=1) as link:
            client = link.client()
            with model.held():
                first, second = await link.fill(client, model)
                future = await InThread(link.sync_client().submit, row(2))
                await link.told()
                second.cancel()
                await link.told()
            assert action(await within(first)) == 0
            assert action(await within(asyncio.wrap_future(future))) == 4
            assert seen(model) == [[0], [2]]

    async def test_closing_while_threads_wait_for_room(self):
        """A server that closes answers what waits for room: it was accepted."""
        model = RecordingModel()
        async with self.serve(model, max_queue_size=1) as link:
            client = link.client()
            with model.held():
                first, second = await link.fill(client, model)
                future = await InThread(link.sync_client().submit, row(2))
                await link.told()
                closing = asyncio.create_task(link.server.aclose())
                await link.refusing()
            assert action(await within(asyncio.wrap_future(future))) == 4
            await all_well(first, second, closing)

    async def test_device(self):
        """``device`` moves the policy and every batch; an answer without values cannot be sent."""
        model = RecordingModel()
        async with self.serve(model, device="cpu") as link:
            assert (await link.client()(row(1)))["action"].device.type == "cpu"
        await self._has_no_values(device="meta", output_device=None)

    async def test_output_device(self):
        """``output_device`` is where an answer is when it is sent; it arrives on the CPU."""
        async with self.serve(doubling(), output_device="cpu") as link:
            assert (await link.client()(row(1)))["action"].device.type == "cpu"
        await self._has_no_values(output_device="meta")

    async def _has_no_values(self, **options: Any) -> None:
        async with self.serve(doubling(), **options) as link:
            for error in await outcomes(
                link.client()(row(1)), InThread(link.sync_client(), row(1))
            ):
                assert type(error) is ModelError
                assert "meta" in str(error)


class TestOnTheServersLoop(OnSockets, TransportConformance, OnTheServersLoop, OnAnyLoop):
    """Callers on the server's own event loop, and threads."""


class TestOnAnotherLoop(OnSockets, InBackground, TransportConformance, OnAnyLoop):
    """Callers on another event loop than the server's, and threads."""


class TestThroughSharedMemory(OnSockets, InBackground, TransportConformance):
    """Every request and every reply through shared memory, however small."""

    def transport(self) -> MPTransport:
        return MPTransport(inline_bytes=0)
