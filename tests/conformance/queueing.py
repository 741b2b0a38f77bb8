"""A bounded queue, and who comes first."""

from __future__ import annotations

import asyncio
from concurrent.futures import Future

import pytest
from helpers import InThread, action, all_well, doubling, outcomes, row, rows, seen, until, within

from aioinfer import QueueFullError, ServerClosedError
from aioinfer.testing import ManualClock, RecordingModel

from .hooks import Hooks


class Queueing(Hooks):
    """``max_queue_size``, priorities and deadlines."""

    # -- a full queue -------------------------------------------------------

    async def test_await_waits_for_room(self):
        """While the queue is full, ``await`` waits and is answered in the end."""
        model = RecordingModel()
        async with self.serve(model, max_queue_size=2, max_batch_size=2) as link:
            client = link.client()
            with model.held():
                first = client.submit(row(0))
                await model.entered()
                rest = [asyncio.create_task(client(row(value))) for value in range(1, 10)]
                await link.queued(2)
                assert not any(task.done() for task in rest)
            replies = await outcomes(first, *rest)
        assert [action(reply) for reply in replies] == [2 * value for value in range(10)]

    async def test_without_blocking_a_full_queue_refuses(self):
        """``submit(block=False)`` raises QueueFullError, which names the bound; others stay."""
        model = RecordingModel()
        async with self.serve(model, max_queue_size=3) as link:
            client, sync_client = link.client(), link.sync_client()
            with model.held():
                first = client.submit(row(0), block=False)
                await model.entered()
                rest = [client.submit(rows([1, 2]), block=False)]
                rest.append(client.submit(row(3), block=False))
                await link.queued(3)
                refusals = await outcomes(
                    _submitted(client, row(4)),
                    _submitted(client, rows([5, 6])),
                    InThread(sync_client.submit, row(7), block=False),
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
        """While the queue is full, ``submit`` blocks its thread until there is room."""
        model = RecordingModel()
        async with self.serve(model, max_queue_size=1) as link:
            client, sync_client = link.client(), link.sync_client()
            with model.held():
                first, second = await link.fill(client, model)
                thread = InThread(sync_client.submit, row(2))
                await thread.blocked()
                impatient = InThread(sync_client.submit, row(3), timeout=0.05)
                with pytest.raises(TimeoutError, match="0.05"):
                    await impatient
                assert not thread.done
            future: Future = await thread
            assert action(await within(asyncio.wrap_future(future))) == 4
            await all_well(first, second)

    async def test_waiting_for_room_counts_as_waiting(self):
        """A ``timeout`` counts from the call of ``submit``, the wait for room included."""
        clock, model = ManualClock(), RecordingModel()
        options = {"max_queue_size": 1, "max_batch_size": 1, "timeout": 0.0, "clock": clock}
        async with self.serve(model, **options) as link:
            client = link.client()
            with model.held():
                first, second = await link.fill(client, model)
                thread = InThread(link.sync_client().submit, row(2), timeout=8)
                await thread.blocked()
                clock.advance(5.0)
                model.step()
                await model.entered()  # the second one; now there is room
                future: Future = await thread
                clock.advance(3.0)
                with pytest.raises(TimeoutError):
                    await within(asyncio.wrap_future(future))
            await all_well(first, second)
            assert seen(model) == [[0], [1]]

    async def test_room_is_made_by_a_cancellation(self):
        """A thread that waits for room gets it when the request that filled the queue goes."""
        model = RecordingModel()
        async with self.serve(model, max_queue_size=1) as link:
            client = link.client()
            with model.held():
                first, second = await link.fill(client, model)
                thread = InThread(link.sync_client().submit, row(2))
                await thread.blocked()
                second.cancel()
                await link.told()
            assert action(await within(first)) == 0
            future: Future = await thread
            assert action(await within(asyncio.wrap_future(future))) == 4
            assert seen(model) == [[0], [2]]

    async def test_a_cancellation_at_the_door_wakes_the_next(self):
        """If the first of those who wait for room is cancelled, the others still get in."""
        model = RecordingModel()
        async with self.serve(model, max_queue_size=1, max_batch_size=1) as link:
            client = link.client()
            with model.held():
                first = client.submit(row(0))
                await model.entered()
                tasks = [asyncio.create_task(client(row(value))) for value in range(1, 5)]
                await link.queued(1)
                tasks[1].cancel()
                tasks[2].cancel()
                await link.told()
            replies = await outcomes(first, tasks[0], tasks[3])
            assert [action(reply) for reply in replies] == [0, 2, 8]
            assert seen(model) == [[0], [1], [4]]

    async def test_a_full_queue_leaves(self):
        """Nothing waits for more than the queue can hold: a full queue is a full batch."""
        async with self.serve(doubling(), max_queue_size=2, timeout=60.0) as link:
            clients = [link.client() for _ in range(8)]
            replies = await outcomes(*(client(row(1)) for client in clients))
        assert [action(reply) for reply in replies] == [2] * 8

    async def test_a_request_larger_than_the_queue(self):
        """A request of more rows than the queue may hold is served when the queue is empty."""
        model = RecordingModel()
        async with self.serve(model, max_queue_size=4, max_batch_size=2) as link:
            client, sync_client = link.client(), link.sync_client()
            replies = await outcomes(
                client(rows(range(9))),
                client(row(1)),
                InThread(sync_client, rows(range(9))),
                client.submit(rows(range(9))),
            )
            future: Future = await InThread(sync_client.submit, rows(range(9)), block=False)
            await link.accepted()
        nine = [2 * value for value in range(9)]
        assert [action(reply) for reply in replies] == [nine, 2, nine, nine]
        assert action(await within(asyncio.wrap_future(future))) == nine

    async def test_closing_while_threads_wait_for_room(self):
        """A server that closes tells the threads that wait for room."""
        model = RecordingModel()
        async with self.serve(model, max_queue_size=1) as link:
            client = link.client()
            with model.held():
                first, second = await link.fill(client, model)
                thread = InThread(link.sync_client().submit, row(2))
                await thread.blocked()
                closing = asyncio.create_task(link.server.aclose())
                with pytest.raises(ServerClosedError):
                    await thread  # and the forward is still held
            await all_well(first, second, closing)

    # -- order --------------------------------------------------------------

    async def test_first_come_first_served(self):
        """Requests without priority or timeout are served in the order they came."""
        model = RecordingModel()
        async with self.serve(model, max_batch_size=3) as link:
            client = link.client()
            with model.held():
                first = client.submit(row(0))
                await model.entered()
                rest = [client.submit(row(value)) for value in range(1, 21)]
                await link.queued(20)
            await all_well(first, *rest)
        assert [value for batch in seen(model) for value in batch] == list(range(21))

    async def test_a_larger_priority_is_served_sooner(self):
        """Priorities decide, from threads too; within one, the order of arrival."""
        clock, model = ManualClock(), RecordingModel()
        async with self.serve(model, max_batch_size=1, clock=clock, timeout=0.0) as link:
            client, sync_client = link.client(), link.sync_client()
            with model.held():
                first = client.submit(row(0))
                await model.entered()
                rest = [
                    client.submit(row(value), priority=priority)
                    for value, priority in ((1, 0), (2, 1), (3, 5), (4, -1), (5, 0), (6, 1))
                ]
                await link.queued(6)
                rest.append(InThread(sync_client, row(7), priority=9))
                await link.queued(7)
            await all_well(first, *rest)
        assert seen(model) == [[0], [7], [3], [2], [6], [1], [5], [4]]

    async def test_an_earlier_deadline_is_served_sooner(self):
        """Of requests with the same priority the one whose time ends first goes first."""
        clock, model = ManualClock(), RecordingModel()
        async with self.serve(model, max_batch_size=1, clock=clock, timeout=0.0) as link:
            client = link.client()
            with model.held():
                first = client.submit(row(0))
                await model.entered()
                rest = [
                    client.submit(row(value), timeout=timeout)
                    for value, timeout in ((1, None), (2, 8.0), (3, 4.0), (4, 6.0), (5, None))
                ]
                await link.queued(5)
            await all_well(first, *rest)
        assert seen(model) == [[0], [3], [4], [2], [1], [5]]

    async def test_nobody_starves(self):
        """A request of low priority is overtaken for a bounded time only."""
        clock, model = ManualClock(), RecordingModel()
        async with self.serve(model, max_batch_size=1, clock=clock, timeout=0.0) as link:
            client = link.client()
            with model.held():
                futures = [client.submit(row(0))]
                await model.entered()
                futures.append(client.submit(row(-1)))  # the one that must not starve
                await link.queued(1)
                for value in range(1, 40):
                    futures.append(client.submit(row(value), priority=1))
                    await link.queued(2)
                    clock.advance(1.0)
                    model.step()
                    await model.entered()
                    if [-1] in seen(model):
                        break
                else:
                    pytest.fail(f"never served: {seen(model)}")
            await all_well(*futures)

    async def test_the_queue_is_empty_in_the_end(self):
        """The depth of the queue goes up and comes back to nothing."""
        model = RecordingModel()
        async with self.serve(model) as link:
            client = link.client()
            with model.held():
                first = client.submit(row(0))
                await model.entered()
                assert link.server.stats().queue_depth == 0
                rest = [client.submit(td) for td in (row(1), rows([2, 3, 4]))]
                await link.queued(4)
                assert link.server.stats().queue_depth == 4
            await all_well(first, *rest)
            await until(lambda: link.server.stats().queue_depth == 0)


async def _submitted(client, td):
    return await client.submit(td, block=False)
