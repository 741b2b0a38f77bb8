"""Starting, closing, starting again; and requests that meet a server that is not there."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest
from helpers import InThread, action, all_well, doubling, outcomes, row, rows, seen, until, within

from aioinfer import InferenceServer, InferenceTransport, ServerClosedError
from aioinfer.testing import RecordingModel, settle

from .hooks import Hooks, both_loops


class Lifecycle(Hooks):
    """Whoever asks gets an answer or an error, at any moment of a server's life."""

    # -- no server ----------------------------------------------------------

    async def test_use_before_start(self):
        """A client asks before any server runs: ServerClosedError that says what to do."""
        link = self.link(InferenceServer(doubling(), self.transport()))
        client, sync_client = link.client(), link.sync_client()
        for error in await outcomes(
            client(row(1)),
            client(row(1), timeout=5),
            InThread(sync_client, row(1)),
            InThread(sync_client.submit, row(1), timeout=5),
        ):
            assert type(error) is ServerClosedError
            assert "start" in str(error)

    async def test_clients_from_before_the_start(self):
        """Clients that were handed out before the server ran work once it does."""
        server = InferenceServer(doubling(), self.transport())
        link = self.link(server)
        client, sync_client = link.client(), link.sync_client()
        async with self.running(server):
            assert action(await client(row(1))) == 2
            assert action(await InThread(sync_client, row(2))) == 4

    async def test_clients_that_join_late(self):
        """A client that joins while others are being served is served too."""
        model = RecordingModel()
        async with self.serve(model) as link:
            early = link.client()
            await early(row(0))
            with model.held():
                first = early.submit(row(1))
                await model.entered()
                late = link.client().submit(row(2))
                thread = InThread(link.sync_client(), row(3))
                await link.queued(2)
            replies = await outcomes(first, late, thread)
        assert [action(reply) for reply in replies] == [2, 4, 6]

    async def test_use_after_close(self):
        """After closing, every call is a ServerClosedError of its own, and nothing hangs."""
        async with self.serve(doubling()) as link:
            client, sync_client = link.client(), link.sync_client()
            await client(row(1))
        errors = await outcomes(
            client(row(1)),
            client(row(1), timeout=5),
            InThread(sync_client, row(1)),
            InThread(sync_client.submit, row(1)),
        )
        assert {type(error) for error in errors} == {ServerClosedError}
        assert len({id(error) for error in errors}) == len(errors)
        assert not link.server.is_alive

    # -- closing ------------------------------------------------------------

    async def test_closing_answers_what_was_accepted(self):
        """``aclose()`` drains: what waits is answered, what comes later is refused."""
        model = RecordingModel()
        async with self.serve(model, max_batch_size=4) as link:
            client, sync_client = link.client(), link.sync_client()
            with model.held():
                first = client.submit(row(0))
                await model.entered()
                waiting = [client.submit(row(value)) for value in range(1, 7)]
                large = client.submit(rows(range(9)))
                threads = [InThread(sync_client, row(value)) for value in range(7, 10)]
                await link.queued(18)
                closing = asyncio.create_task(link.server.aclose())
                accepted = await self._until_refused(client)
            replies = await outcomes(first, *waiting, *threads, large)
            assert [action(reply) for reply in replies[:-1]] == [2 * v for v in range(10)]
            assert action(replies[-1]) == [2 * v for v in range(9)]
            await all_well(*accepted)
            await within(closing)
            assert not link.server.is_alive

    async def test_closing_without_draining(self):
        """``aclose(drain=False)`` fails what waits, at once, even if the forward never ends."""
        model = RecordingModel()
        async with self.serve(model) as link:
            client, sync_client = link.client(), link.sync_client()
            with model.held():
                first = client.submit(row(0))
                await model.entered()
                waiting = [client.submit(row(1)), client.submit(rows(range(200)))]
                threads = [InThread(sync_client, row(2)), InThread(sync_client, row(3))]
                await link.queued(203)
                closing = asyncio.create_task(link.server.aclose(drain=False))
                errors = await outcomes(first, *waiting, *threads)  # the forward is still held
                assert {type(error) for error in errors} == {ServerClosedError}
                assert len({id(error) for error in errors}) == len(errors)
            await within(closing)
            assert seen(model) == [[0]]

    async def test_closing_an_idle_server_wakes_nobody(self):
        """Closing a server that nobody ever asked, or that is idle, just ends."""
        async with self.serve(doubling()) as link:
            await within(link.server.aclose())
        async with self.serve(doubling()) as link:
            await link.client()(row(1))
            await within(link.server.aclose(drain=False))
            assert not link.server.is_alive

    async def test_closing_twice(self):
        """Closing again, or at the same time, is harmless; and so is closing before a start."""
        server = InferenceServer(doubling(), self.transport())
        await within(server.aclose())
        async with self.running(server) as link:
            await link.client()(row(1))
            await all_well(server.aclose(), server.aclose(drain=False), server.aclose())
            await within(server.aclose())
        await within(server.aclose())

    async def test_a_closing_that_is_cancelled(self):
        """Cancelling ``aclose()`` gives up the wait and not the closing."""
        model = RecordingModel()
        async with self.serve(model) as link:
            client = link.client()
            with model.held():
                first = client.submit(row(0))
                await model.entered()
                closing = asyncio.create_task(link.server.aclose())
                await self._until_refused(client)
                closing.cancel()
                await asyncio.wait([closing], timeout=0.01)
            assert action(await within(first)) == 0
            await within(link.server.aclose())
            assert not link.server.is_alive

    async def test_an_error_in_the_body(self):
        """If the block of ``async with`` raises, the server is closed and the error comes out."""
        with pytest.raises(ZeroDivisionError):
            async with self.serve(doubling()) as link:
                future = link.client().submit(row(1))
                await link.accepted()
                raise ZeroDivisionError
        assert action(await within(future)) == 2
        assert not link.server.is_alive

    async def _until_refused(self, client: Any) -> list[asyncio.Future[Any]]:
        """Ask until the server says that it is closing; return what it still accepted."""
        asked: list[asyncio.Future[Any]] = []
        accepted: list[asyncio.Future[Any]] = []

        def refused() -> bool:
            for number, future in enumerate(asked):
                if future.done() and isinstance(future.exception(), ServerClosedError):
                    accepted[:] = asked[:number]  # whatever came after it is refused, too
                    for later in asked[number:]:
                        later.add_done_callback(lambda refused: refused.exception())
                    return True
            try:
                asked.append(client.submit(row(-1)))
            except ServerClosedError:
                accepted[:] = asked
                return True
            return False

        await until(refused, "a refusal")
        return accepted

    # -- again --------------------------------------------------------------

    async def test_starting_again(self):
        """A closed server starts again, on the same transport, with the same clients."""
        server = InferenceServer(doubling(), self.transport())
        link = self.link(server)
        client, sync_client = link.client(), link.sync_client()
        for value in (1, 2, 3):
            assert not server.is_alive
            async with self.running(server):
                assert server.is_alive
                assert action(await within(client(row(value)))) == 2 * value
                assert action(await InThread(sync_client, row(value))) == 2 * value
                assert server.stats().requests == 2  # of this life
            assert type((await outcomes(client(row(1))))[0]) is ServerClosedError

    async def test_starting_again_while_a_forward_is_stuck(self):
        """A server that was closed over a stuck forward starts, and never runs two at once."""
        model = RecordingModel()
        server = InferenceServer(model, self.transport())
        async with self.running(server) as link:
            client = link.client()
            with model.held():
                stuck = client.submit(row(0))
                await model.entered()
                closing = asyncio.create_task(server.aclose(drain=False))
                with pytest.raises(ServerClosedError):
                    await within(stuck)
                await within(closing)
                await model.entered()  # still in there
                async with self.running(server):
                    again = client.submit(row(1))
                    await settle()
                    assert seen(model) == [[0]]
                    model.release()
                    assert action(await within(again)) == 2
            assert model.most_at_once == 1
            assert seen(model) == [[0], [1]]

    async def test_starting_twice(self):
        """Starting a server that runs is an error, and does not disturb it."""
        async with self.serve(doubling()) as link:
            with pytest.raises(RuntimeError, match="already running"):
                async with link.server:
                    pass
            with pytest.raises(RuntimeError, match="already running"):
                await InThread(link.server.start)
            assert action(await within(link.client()(row(1)))) == 2

    async def test_a_transport_serves_one_server_at_a_time(self):
        """A second server on the same transport is refused, and the first one goes on."""
        transport = self.transport() or InferenceTransport.default()
        first, second = (InferenceServer(doubling(), transport) for _ in range(2))
        async with self.running(first) as link:
            client = link.client()
            with pytest.raises(RuntimeError, match="already serves"):
                async with self.running(second):
                    pass
            assert not second.is_alive
            assert action(await within(client(row(1)))) == 2
            assert action(await InThread(link.sync_client(), row(2))) == 4
        async with self.running(second):  # free now
            assert action(await within(client(row(3)))) == 6

    @both_loops
    def test_two_event_loops_one_after_the_other(
        self, new_loop: Callable[[], asyncio.AbstractEventLoop]
    ):
        """Server, transport and clients outlive ``asyncio.run`` and work in the next one."""
        server = InferenceServer(doubling(), self.transport())
        link = self.link(server)
        client, sync_client = link.client(), link.sync_client()

        async def main(value: float) -> None:
            async with self.running(server):
                replies = await outcomes(
                    client(row(value)), client.submit(row(value)), InThread(sync_client, row(value))
                )
                assert [action(reply) for reply in replies] == [2 * value] * 3

        for value in (1, 2, 3):
            with asyncio.Runner(loop_factory=new_loop) as runner:
                runner.run(main(value))
