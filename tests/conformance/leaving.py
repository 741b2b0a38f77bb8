"""Callers that leave before their answer comes: cancelled, out of time, or just gone."""

from __future__ import annotations

import asyncio
import gc
import weakref
from concurrent.futures import CancelledError

import pytest
from helpers import InThread, action, all_well, outcomes, row, rows, seen, until, within

from aioinfer.testing import ManualClock, RecordingModel

from .hooks import Hooks, Link


class Leaving(Hooks):
    """Nothing is computed for those who left, and nobody else notices."""

    # -- cancelled ----------------------------------------------------------

    async def test_cancelled_in_the_queue(self):
        """A request that is cancelled while it waits never comes to the policy."""
        model = RecordingModel()
        async with self.serve(model) as link:
            client, sync_client = link.client(), link.sync_client()
            with model.held():
                first = client.submit(row(0))
                await model.entered()
                task = asyncio.create_task(client(row(1)))
                future = client.submit(row(2))
                of_a_thread = await InThread(sync_client.submit, row(3))
                neighbour = client.submit(row(4))
                await link.queued(4)
                task.cancel()
                future.cancel()
                assert of_a_thread.cancel()
                await link.told()
                assert task.cancelled()
                with pytest.raises(CancelledError):
                    of_a_thread.result(0)
            assert [action(reply) for reply in await outcomes(first, neighbour)] == [0, 8]
            assert seen(model) == [[0], [4]]
            await until(lambda: link.server.stats().cancelled == 3)

    async def test_cancelled_during_the_forward(self):
        """A request that is cancelled during its forward is dropped; its neighbours are not."""
        model = RecordingModel()
        async with self.serve(model) as link:
            client, sync_client = link.client(), link.sync_client()
            with model.held():
                first = client.submit(row(0))
                await model.entered()
                task = asyncio.create_task(client(row(1)))
                future = client.submit(row(2))
                of_a_thread = await InThread(sync_client.submit, row(3))
                neighbours = [client.submit(row(4)), InThread(sync_client, row(5))]
                await link.queued(5)
                model.step()
                await model.entered()
                task.cancel()
                future.cancel()
                of_a_thread.cancel()
                await link.told()
                assert task.cancelled()
            assert [action(reply) for reply in await outcomes(first, *neighbours)] == [0, 8, 10]
            assert action(await within(client(row(6)))) == 12
            assert model.batch_sizes == [1, 5, 1]

    async def test_a_cancellation_during_the_forward_costs_nothing(self):
        """If callers leave during a forward, however the server learns of it, it is not repeated.

        Here it learns of it because it is asked to close; a timer can do the same.
        """
        model = RecordingModel(out_keys=["action"])
        async with self.serve(model, return_inputs=True) as link:
            client = link.client()
            with model.held():
                first = client.submit(row(0))
                await model.entered()
                doomed = client.submit(row(1))
                neighbours = [client.submit(row(2)), client.submit(row(3))]
                await link.queued(3)
                model.step()
                await model.entered()
                doomed.cancel()
                await link.told()
                closing = asyncio.create_task(link.server.aclose())
                await link.told()
                if link.server.is_alive:  # closing on another loop: let it begin
                    await link.refusing()
            await all_well(first, *neighbours, closing)
            assert [action(future.result()) for future in neighbours] == [4, 6]
            assert model.batch_sizes == [1, 3]

    async def test_a_split_request_is_cancelled(self):
        """Of a split request that is cancelled during its first forward, the rest is spared."""
        model = RecordingModel()
        async with self.serve(model, max_batch_size=2) as link:
            client = link.client()
            with model.held():
                large = client.submit(rows(range(100)))
                await model.entered()
                neighbour = client.submit(row(7))
                await link.queued(99)
                large.cancel()
                await link.told()
            assert action(await within(neighbour)) == 14
            assert seen(model) == [[0, 1], [7]]
            assert link.server.stats().queue_depth == 0

    async def test_cancelled_at_the_moment_of_the_answer(self):
        """A cancellation that crosses the answer is neither swallowed nor harmful."""
        model = RecordingModel()
        async with self.serve(model) as link:
            client = link.client()
            for rounds in range(12):  # the answer and the cancellation pass each other
                with model.held():
                    task = asyncio.create_task(client(row(1)))
                    await model.entered()
                for _ in range(rounds):
                    await asyncio.sleep(0)
                asked = task.cancel()
                (outcome,) = await outcomes(task)
                if asked:
                    assert isinstance(outcome, asyncio.CancelledError)
                else:
                    assert action(outcome) == 2
            assert action(await within(client(row(2)))) == 4

    async def test_asking_again_after_a_cancellation(self):
        """What is asked right after a cancelled request is answered, and is not cancelled."""
        model = RecordingModel()
        async with self.serve(model) as link:
            client = link.client()
            with model.held():
                first = client.submit(row(0))
                await model.entered()
                futures = []
                for value in range(1, 20):
                    client.submit(row(-value)).cancel()
                    futures.append(client.submit(row(value)))
                await link.told()
            await outcomes(first)
            assert [action(reply) for reply in await outcomes(*futures)] == [
                2 * value for value in range(1, 20)
            ]
        assert not any(value < 0 for batch in seen(model) for value in batch)

    async def test_an_asyncio_timeout_is_a_cancellation(self):
        """``asyncio.timeout`` and ``wait_for`` withdraw the request; the server goes on."""
        model = RecordingModel()
        async with self.serve(model) as link:
            client = link.client()
            with model.held():
                first = client.submit(row(0))
                await model.entered()
                with pytest.raises(TimeoutError):
                    await asyncio.wait_for(client(row(1)), 0.01)
                with pytest.raises(TimeoutError):
                    async with asyncio.timeout(0.01):
                        await client(row(2))
                await link.told()
            assert action(await within(first)) == 0
            assert action(await within(client(row(3)))) == 6
            assert seen(model) == [[0], [3]]

    # -- out of time --------------------------------------------------------

    async def test_out_of_time_in_the_queue(self):
        """``timeout`` passes while the request waits: TimeoutError at once, never computed."""
        model = RecordingModel()
        async with self.serve(model) as link:
            client, sync_client = link.client(), link.sync_client()
            with model.held():
                first = client.submit(row(0))
                await model.entered()
                of_a_thread = await InThread(sync_client.submit, row(4), timeout=0.02)
                errors = await outcomes(
                    client(row(1), timeout=0.02),
                    client.submit(row(2), timeout=0.02),
                    InThread(sync_client, row(3), timeout=0.02),
                    asyncio.wrap_future(of_a_thread),
                )
                for error in errors:  # and the forward is still held
                    assert type(error) is TimeoutError
                    assert "0.02" in str(error)
                await link.told()
            assert action(await within(first)) == 0
            assert action(await within(client(row(5), timeout=30))) == 10
            assert seen(model) == [[0], [5]]
            assert link.server.stats().timed_out == 4

    async def test_out_of_time_during_the_forward(self):
        """``timeout`` passes during the forward: TimeoutError at once, neighbours are fine."""
        clock, model = ManualClock(), RecordingModel()
        async with self.serve(model, clock=clock, timeout=0.0) as link:
            client, sync_client = link.client(), link.sync_client()
            with model.held():
                first = client.submit(row(0))
                await model.entered()
                called = asyncio.create_task(client(row(1), timeout=5))
                future = client.submit(row(2), timeout=5)
                of_a_thread = await InThread(sync_client.submit, row(3), timeout=5)
                patient = client.submit(row(4), timeout=6)
                await link.queued(4)
                model.step()
                await model.entered()
                clock.advance(5)
                for error in await outcomes(called, future, asyncio.wrap_future(of_a_thread)):
                    assert type(error) is TimeoutError  # and the forward is still held
                await link.told()
            assert [action(reply) for reply in await outcomes(first, patient)] == [0, 8]
            assert model.batch_sizes == [1, 4]
            assert action(await within(client(row(5)))) == 10
            await until(lambda: link.server.stats().timed_out == 3)

    async def test_a_thread_is_out_of_time_during_the_forward(self):
        """A thread that waits for its answer waits no longer than its ``timeout``."""
        model = RecordingModel()
        async with self.serve(model) as link:
            with model.held():
                late = InThread(link.sync_client(), row(1), timeout=0.5)
                await model.entered()
                with pytest.raises(TimeoutError, match="0.5"):
                    await late
                await link.told()
            assert action(await within(link.client()(row(2)))) == 4
            await until(lambda: link.server.stats().timed_out == 1)

    async def test_no_time_at_all(self):
        """``timeout=0`` is a TimeoutError, and nothing is computed."""
        clock, model = ManualClock(), RecordingModel()
        async with self.serve(model, clock=clock, timeout=0.0) as link:
            client, sync_client = link.client(), link.sync_client()
            for error in await outcomes(
                client(row(1), timeout=0),
                client.submit(row(1), timeout=0),
                InThread(sync_client, row(1), timeout=0),
            ):
                assert type(error) is TimeoutError
            assert action(await within(client(row(2)))) == 4
            assert seen(model) == [[2]]

    async def test_time_enough(self):
        """An answer within ``timeout`` is an answer, and no timer is left behind."""
        clock, model = ManualClock(), RecordingModel()
        async with self.serve(model, clock=clock, timeout=0.0) as link:
            client, sync_client = link.client(), link.sync_client()
            replies = await outcomes(
                client(row(1), timeout=5),
                client.submit(row(2), timeout=5),
                InThread(sync_client, row(3), timeout=30),
                InThread(lambda: sync_client.submit(row(4), timeout=5).result(10)),
            )
            assert [action(reply) for reply in replies] == [2, 4, 6, 8]
            await until(lambda: clock() + 5 not in clock.timers, "every timer to be cancelled")

    async def test_a_split_request_is_out_of_time(self):
        """A split request has one ``timeout``; what is left of it is not computed."""
        clock, model = ManualClock(), RecordingModel()
        async with self.serve(model, clock=clock, timeout=0.0, max_batch_size=2) as link:
            client = link.client()
            with model.held():
                large = client.submit(rows(range(10)), timeout=5)
                await model.entered()
                neighbour = client.submit(row(7))
                await link.queued(9)
                clock.advance(5)
                await link.told()
            with pytest.raises(TimeoutError):
                await within(large)
            assert action(await within(neighbour)) == 14
            assert seen(model) == [[0, 1], [7]]
            await until(lambda: link.server.stats().timed_out == 1)

    # -- gone ---------------------------------------------------------------

    async def test_a_dropped_client_is_not_waited_for(self):
        """A client without references holds no batch back, and no more does a closed one."""
        clock, model = ManualClock(), RecordingModel()  # no timeout of the server ever passes
        async with self.serve(model, clock=clock, timeout=60.0) as link:
            stays = link.client()
            dropped = [link.client(), link.sync_client()]
            closed = [link.client(), link.sync_client()]
            replies = asyncio.gather(*(client(row(1)) for client in (stays, dropped[0], closed[0])))
            threads = [InThread(client, row(1)) for client in (dropped[1], closed[1])]
            await outcomes(replies, *threads)
            for client in closed:
                client.close()
            dropped.clear()
            threads.clear()
            del client
            gc.collect()
            await link.told()
            for value in (2, 3):
                assert action(await within(stays(row(value)))) == 2 * value

    async def test_a_dropped_client_still_gets_its_answer(self):
        """A client may be dropped while its request is under way; the future comes true."""
        model = RecordingModel()
        async with self.serve(model) as link:
            with model.held():
                first = link.client().submit(row(0))
                await model.entered()
                queued = link.client().submit(row(1))
                of_a_thread = await InThread(link.sync_client().submit, row(2))
                await link.queued(2)
                gc.collect()
            replies = await outcomes(first, queued, asyncio.wrap_future(of_a_thread))
            assert [action(reply) for reply in replies] == [0, 2, 4]

    async def test_abandoned_futures(self):
        """Futures that nobody keeps are answered into the void; the server goes on."""
        model = RecordingModel()
        async with self.serve(model) as link:
            client, sync_client = link.client(), link.sync_client()
            with model.held():
                client.submit(row(0))
                await model.entered()
                for value in range(5):
                    client.submit(row(value))
                    await InThread(sync_client.submit, row(value))
                await link.queued(10)
                gc.collect()
            assert action(await within(client(row(9)))) == 18
            await until(lambda: link.server.stats().rows == 12)

    async def test_what_was_asked_is_not_kept(self):
        """Once a request is answered, cancelled or abandoned, nothing keeps its tensors.

        Not even a reference cycle: frames are large and the collector comes rarely.
        """
        model = RecordingModel()
        async with self.serve(_Forgetful(model), max_batch_size=4) as link:
            gc.disable()
            try:
                refs = await self._ask_in_every_way(link, model)
                await until(
                    lambda: not any(ref() is not None for ref in refs), "everything to be forgotten"
                )
            finally:
                gc.enable()

    async def _ask_in_every_way(self, link: Link, model: RecordingModel) -> list[weakref.ref]:
        client, sync_client = link.client(), link.sync_client()
        requests = [row(0), rows([1, 2]), rows(range(9)), row(3), row(4), row(5), row(6), row(7)]
        refs = [weakref.ref(request["observation"]) for request in requests]
        await client(requests[0])
        await client(requests[1])
        await client(requests[2])
        await InThread(sync_client, requests[3])
        with model.held():
            first = client.submit(requests[4], timeout=30)
            await model.entered()
            client.submit(requests[5], priority=1).cancel()
            client.submit(requests[6])  # nobody keeps the future
            (await InThread(sync_client.submit, requests[7])).cancel()
            await link.told()
        await first
        return refs


class _Forgetful:
    """A RecordingModel that does not keep its batches."""

    def __init__(self, model: RecordingModel) -> None:
        self._model = model

    def __call__(self, td: object) -> object:
        try:
            return self._model(td)
        finally:
            self._model._batches.clear()
