"""Which event loops may meet: the server's, the callers', one that ends, one that is closed."""

from __future__ import annotations

import asyncio
import gc
import threading
from collections.abc import Callable
from typing import Any

import pytest
from helpers import InThread, action, doubling, outcomes, row, wait_until, within

from aioinfer import InferenceServer, ServerClosedError, ServerDiedError
from aioinfer.testing import RecordingModel

from .hooks import Hooks, both_loops

NewLoop = Callable[[], asyncio.AbstractEventLoop]


class OnTheServersLoop(Hooks):
    """For links whose server is a task of an event loop that may end without closing it."""

    @both_loops
    def test_a_loop_that_ends_without_closing(self, new_loop: NewLoop):
        """``asyncio.run`` ends over a running server: whoever waits is told, nobody hangs."""
        model = RecordingModel()
        server = InferenceServer(model, self.transport())
        link = self.link(server)
        sync_client = link.sync_client()
        waiting: list[InThread] = []

        async def main() -> None:
            await server.__aenter__()
            first = asyncio.create_task(link.client()(row(0)))  # cancelled with the loop
            await model.entered()
            assert not first.done()
            waiting.extend(InThread(sync_client, row(value)) for value in range(1, 4))
            await link.queued(3)

        with model.held():
            with asyncio.Runner(loop_factory=new_loop) as runner:
                runner.run(main())
            errors = []
            for thread in waiting:  # the forward is still held
                with pytest.raises(ServerDiedError) as caught:
                    thread.result()
                errors.append(caught.value)
        assert not server.is_alive
        with pytest.raises(ServerClosedError):
            sync_client(row(5))
        server.shutdown()  # nothing left to close
        with server:  # and it starts again
            assert action(sync_client(row(6))) == 12

    @both_loops
    def test_a_loop_that_is_closed_under_the_server(
        self, new_loop: NewLoop, logged_errors: list[str]
    ):
        """A loop that is closed without ending its tasks: every later call is an error at once."""
        server = InferenceServer(doubling(), self.transport())
        link = self.link(server)
        sync_client = link.sync_client()
        loop = new_loop()
        loop.run_until_complete(server.__aenter__())
        thread = InThread(sync_client, row(1))
        loop.run_until_complete(thread.wait())
        loop.close()
        assert not server.is_alive
        for _ in range(3):
            with pytest.raises((ServerDiedError, ServerClosedError)):
                InThread(sync_client, row(2), timeout=30).result()
        server.shutdown()
        with server:
            assert action(sync_client(row(3))) == 6
        gc.collect()
        assert all("Task was destroyed" in error for error in logged_errors)
        logged_errors.clear()

    @both_loops
    def test_a_loop_that_is_closed_during_a_forward(
        self, new_loop: NewLoop, logged_errors: list[str]
    ):
        """Threads that wait when the loop is closed are told once the forward ends."""
        model = RecordingModel()
        server = InferenceServer(model, self.transport())
        link = self.link(server)
        sync_client = link.sync_client()
        loop = new_loop()
        loop.run_until_complete(server.__aenter__())
        with model.held():
            first = InThread(sync_client, row(0))
            loop.run_until_complete(model.entered())
            second = InThread(sync_client, row(1))
            loop.run_until_complete(link.queued(1))
            loop.close()
        assert action(first.result()) == 0  # it was computed, and threads need no loop
        with pytest.raises(ServerDiedError):
            second.result()
        with server:
            assert action(sync_client(row(3))) == 6
        gc.collect()
        assert all("Task was destroyed" in error for error in logged_errors)
        logged_errors.clear()

    async def test_the_task_of_the_server_is_cancelled(self):
        """If somebody cancels the server's task, everybody who waits is told."""
        model = RecordingModel()
        server = InferenceServer(model, self.transport())
        link = self.link(server)
        client = link.client()
        with model.held():
            async with server:
                first = client.submit(row(0))
                await model.entered()
                waiting = [client.submit(row(1)), InThread(link.sync_client(), row(2))]
                await link.queued(2)
                (task,) = (t for t in asyncio.all_tasks() if t.get_name() == "InferenceServer")
                task.cancel()
                errors = await outcomes(first, *waiting)
                assert {type(error) for error in errors} == {ServerDiedError}
                assert not server.is_alive
        async with self.running(server):
            assert action(await within(client(row(3)))) == 6

    async def test_a_sync_client_on_the_servers_loop(self):
        """A sync client that would block the server's own loop is refused, not a deadlock."""
        async with self.serve(doubling()) as link:
            sync_client = link.sync_client()
            with pytest.raises(RuntimeError, match="event loop"):
                sync_client(row(1), timeout=1)
            assert action(await InThread(sync_client, row(2))) == 4


class OnAnyLoop(Hooks):
    """For links that serve coroutines of event loops other than the server's."""

    @both_loops
    def test_callers_on_several_loops(self, new_loop: NewLoop):
        """Coroutines of several event loops share a server, and even a client."""
        server = InferenceServer(doubling(), self.transport(), max_batch_size=8)
        client = self.link(server).client()

        def loop_of_actors(number: int) -> None:
            async def actor(value: float) -> None:
                for step in range(10):
                    assert action(await client(row(value + step))) == 2 * (value + step)

            async def main() -> None:
                await asyncio.gather(*(actor(1000 * number + 100 * i) for i in range(8)))

            with asyncio.Runner(loop_factory=new_loop) as runner:
                runner.run(main())

        with server:
            for thread in [InThread(loop_of_actors, number) for number in range(3)]:
                thread.result()

    @both_loops
    def test_a_loop_of_callers_that_ends(self, new_loop: NewLoop):
        """A loop that ends with requests under way leaves the server to the others."""
        model = RecordingModel()
        server = InferenceServer(model, self.transport())
        link = self.link(server)
        client, sync_client = link.client(), link.sync_client()

        async def leave(futures: list[Any]) -> None:
            futures.append(client.submit(row(0)))
            await model.entered()
            futures += [client.submit(row(1)), asyncio.create_task(client(row(2)))]
            await link.queued(2)

        with server, model.held():
            futures: list[Any] = []
            with asyncio.Runner(loop_factory=new_loop) as runner:
                runner.run(leave(futures))
            thread = InThread(sync_client, row(3))
            wait_until(lambda: server.stats().queue_depth >= 2)
            model.release()
            assert action(thread.result()) == 6
            assert action(sync_client(row(4))) == 8
            assert server.is_alive

    @both_loops
    def test_a_loop_of_callers_that_is_closed(self, new_loop: NewLoop):
        """A loop that is closed while its answer is on the way is no trouble to the server."""
        model = RecordingModel()
        server = InferenceServer(model, self.transport())
        client, sync_client = self.link(server).client(), self.link(server).sync_client()
        loop = new_loop()

        async def leave() -> None:
            client.submit(row(0))
            await model.entered()

        with server, model.held():
            loop.run_until_complete(leave())
            loop.close()
            model.release()
            assert action(sync_client(row(4))) == 8

    @both_loops
    def test_closing_from_another_loop(self, new_loop: NewLoop):
        """``await aclose()`` on any loop closes the server, whichever loop it runs on."""
        server = InferenceServer(doubling(), self.transport())
        client = self.link(server).client()

        async def main() -> None:
            assert action(await client(row(1))) == 2
            await within(server.aclose())
            with pytest.raises(ServerClosedError):
                await client(row(1))

        with server:
            with asyncio.Runner(loop_factory=new_loop) as runner:
                runner.run(main())
            assert not server.is_alive
            assert not any(
                thread.name.startswith("aioinfer-loop") for thread in threading.enumerate()
            )
