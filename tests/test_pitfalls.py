"""Known ways to get this wrong, each proven absent.

The numbers are those of the list of bugs found in systems that do this job. Where another
test holds one already, it is named here:

====  =============================================================================
 8    conformance: test_first_come_first_served, test_a_larger_priority_is_served_sooner
 9    conformance: test_max_batch_size_counts_rows
10    test_server.py: test_a_bad_argument_is_named
13    conformance: test_cancelled_during_the_forward, test_out_of_time_during_the_forward
14    conformance: test_cancelled_in_the_queue, test_what_was_asked_is_not_kept (and here)
15    conformance: test_asking_again_after_a_cancellation
16    conformance: test_cancelled_at_the_moment_of_the_answer,
      test_a_cancellation_at_the_door_wakes_the_next
17    conformance: test_a_policy_that_raises_for_one_row
18    conformance: test_every_caller_gets_an_exception_of_its_own
19    conformance: test_whatever_the_policy_raises
20    conformance: test_an_answer_that_is_none, test_too_few_rows_never_mean_the_rows_of_others
21    test_server.py: test_clients_of_this_process_stay_in_it
23    conformance: test_use_after_close, test_closing_without_draining;
      test_server.py: test_starting_after_a_stuck_forward_never_runs_two
24    conformance: test_two_event_loops_one_after_the_other, test_a_client_on_the_wrong_loop
25    conformance: test_clients_that_join_late
30    conformance: test_a_sampling_mode_per_request, test_the_process_wide_mode_is_left_alone
31    conformance: test_the_reply_holds_the_out_keys_and_the_version_only
32    test_server.py: test_ctrl_c
====  =============================================================================

26 and 28 are about links between processes.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import itertools
import threading
import time
import weakref
from collections.abc import AsyncIterator
from typing import Any, NamedTuple

import pytest
from helpers import InThread, action, doubling, outcomes, row, rows, seen, until, within

from aioinfer import InferenceClient, InferenceServer, QueueFullError
from aioinfer.batching import Batcher, Dispatch
from aioinfer.request import Request, Source
from aioinfer.testing import ManualClock, PuppetExecutor, RecordingModel, settle


class Stage(NamedTuple):
    """A server whose clock and whose forwards only move when the test says so."""

    clock: ManualClock
    puppet: PuppetExecutor
    model: RecordingModel
    server: InferenceServer
    client: InferenceClient

    def ask(self, *values: float) -> list[asyncio.Future[Any]]:
        return [self.client.submit(row(value)) for value in values]

    async def forward(self, seconds: float = 0.0) -> None:
        """Let the batch that was dispatched compute for ``seconds``."""
        self.clock.advance(seconds)
        self.puppet.run_next()
        await settle()


@contextlib.asynccontextmanager
async def stage(**options: Any) -> AsyncIterator[Stage]:
    clock, puppet, model = ManualClock(), PuppetExecutor(), RecordingModel()
    server = InferenceServer(model, clock=clock, executor=puppet, **options)
    async with server:
        with puppet:
            yield Stage(clock, puppet, model, server, server.async_client())


# -- deadlines --------------------------------------------------------------


async def test_1_time_that_passed_counts_once():
    """The delay that is left is the timeout less the time that passed, once.

    Pitfall 1: elapsed time subtracted twice, so that the batch leaves early.
    """
    async with stage(min_batch_size=8, timeout=1.0) as on:
        on.ask(1)
        for passed in (0.25, 0.25, 0.25):
            await settle()
            on.clock.advance(passed)
            on.ask(2)  # makes the server look at the time
        await settle()
        assert on.puppet.batch_sizes == []
        on.clock.advance(0.25)
        await settle()
        assert on.puppet.batch_sizes == [4]


async def test_2_arrivals_do_not_move_the_deadline():
    """A batch leaves one timeout after its oldest request, whatever arrives meanwhile.

    Pitfall 2: the whole delay is armed again at each arrival.
    """
    async with stage(min_batch_size=64, timeout=1.0) as on:
        for _ in range(8):
            on.ask(1)
            await settle()
            assert on.puppet.batch_sizes == []
            on.clock.advance(0.125)
        await settle()
        assert on.puppet.batch_sizes == [8]


async def test_3_the_deadline_counts_from_the_submission():
    """A request that came during a forward leaves one timeout after it was submitted.

    Pitfall 3: the timer starts when the previous batch ends, or when the server looks.
    """
    async with stage(min_batch_size=2, timeout=1.0) as on:
        on.ask(1, 2)
        await settle()
        on.clock.advance(0.25)
        on.ask(3)
        await on.forward(0.5)
        on.clock.advance(0.375)
        await settle()
        assert on.puppet.batch_sizes == [2]  # 0.875 s after it came
        on.clock.advance(0.125)
        await settle()
        assert on.puppet.batch_sizes == [2, 1]


async def test_3_a_deadline_that_passed_during_a_forward():
    """A request whose timeout passed during a forward leaves as soon as that ends."""
    async with stage(min_batch_size=2, timeout=1.0) as on:
        on.ask(1, 2)
        await settle()
        on.ask(3)
        await on.forward(3.0)
        assert on.puppet.batch_sizes == [2, 1]


async def test_4_a_full_batch_waits_for_nothing():
    """A batch that is full, or has its minimum, leaves without any time passing.

    Pitfall 4: a fixed sleep, and no wake-up when the batch is full.
    """
    async with stage(max_batch_size=4, min_batch_size=3, timeout=1e6) as on:
        on.ask(1, 2, 3)
        await settle()
        assert on.puppet.batch_sizes == [3]
        on.ask(4, 5, 6, 7, 8, 9, 10)
        await on.forward()
        assert on.puppet.batch_sizes == [3, 4]
        await on.forward()
        assert on.puppet.batch_sizes == [3, 4, 3]


async def test_5_the_wall_clock_may_jump(monkeypatch: pytest.MonkeyPatch):
    """Nothing depends on the time of day.

    Pitfall 5: a wall clock instead of a monotonic one.
    """
    days = itertools.cycle([1e9, 0.0, -1e9, 5e8])
    now = time.time
    monkeypatch.setattr(time, "time", lambda: now() + next(days))
    async with InferenceServer(doubling(), timeout=0.01) as server:
        clients = [server.async_client() for _ in range(3)]
        for _ in range(5):
            replies = await outcomes(*(client(row(2), timeout=30) for client in clients))
            assert [action(reply) for reply in replies] == [4, 4, 4]


async def test_6_a_timeout_is_noticed_during_a_forward():
    """A queued request's own timeout ends it when it passes, whatever the forward does.

    Pitfall 6: noticed only after the running forward ends.
    """
    async with stage(timeout=0.0) as on:
        on.ask(1)
        await settle()
        late = on.client.submit(row(2), timeout=5.0)
        on.clock.advance(4.9)
        await settle()
        assert not late.done()
        on.clock.advance(0.1)
        await settle()
        assert type(late.exception()) is TimeoutError
        await on.forward()
        assert on.puppet.batch_sizes == [1]


# -- forming batches --------------------------------------------------------


async def test_7_a_batch_is_chosen_when_the_executor_is_free():
    """What arrives one by one during a forward leaves together after it.

    Pitfall 7: the batch is frozen while the device is busy; batches of 1.2 instead of 30.
    """
    async with stage(timeout=0.0) as on:
        on.ask(0)
        await settle()
        for value in range(1, 31):
            on.ask(value)
            await settle()
        await on.forward(1.0)
        assert on.puppet.batch_sizes == [1, 30]


async def test_8_what_does_not_fit_keeps_its_place():
    """A request that does not fit into a batch is the first of the next one.

    Pitfall 8: a deferred item is put at the back of the queue.
    """
    async with stage(max_batch_size=4, timeout=0.0) as on:
        on.ask(0)
        await settle()
        on.client.submit(rows([1, 2, 3]))
        on.client.submit(rows([4, 5, 6]))
        on.ask(7)
        on.client.submit(rows([8, 9]))
        for _ in range(4):
            await on.forward()
        assert [value for batch in seen(on.model) for value in batch] == list(range(10))
        assert on.puppet.batch_sizes == [1, 3, 4, 2]


class Ticking(ManualClock):
    """A clock that counts how often it is read."""

    def __init__(self) -> None:
        super().__init__()
        self.ticks = 0

    def __call__(self) -> float:
        self.ticks += 1
        return super().__call__()


@pytest.mark.parametrize("options", [{"timeout": 0}, {"timeout": 5.0, "min_batch_size": 8}])
async def test_11_no_busy_loop(options: dict[str, Any]):
    """While requests wait, for the executor or for company, the server does nothing.

    Pitfall 11: a busy loop at timeout 0.
    """
    clock, puppet = Ticking(), PuppetExecutor()
    async with InferenceServer(doubling(), clock=clock, executor=puppet, **options) as server:
        with puppet:
            client = server.async_client()
            for value in range(3):
                client.submit(row(value))
                await settle()
            ticks = clock.ticks
            await settle(300)
            assert clock.ticks == ticks


async def test_12_wake_ups_do_not_drift():
    """After thousands of rounds with cancellations, no answer needs a timer to come.

    Pitfall 12: wake-up counts that drift until throughput decays.
    """
    clock = ManualClock()  # stands still: what waits for a timeout waits for ever
    async with InferenceServer(doubling(), clock=clock, timeout=60.0) as server:
        clients = [server.async_client() for _ in range(4)]
        for value in range(500):
            asked = [client.submit(row(value)) for client in clients]
            if value % 3 == 0:  # one changes its mind and asks again
                asked[value % 4].cancel()
                asked[value % 4] = clients[value % 4].submit(row(value))
            replies = await outcomes(*asked)
            assert [action(reply) for reply in replies] == [2 * value] * 4


# -- cancellation and overload ----------------------------------------------


def test_14_nothing_is_kept_of_requests_that_left():
    """Under a queue that never empties, what was served or withdrawn is forgotten.

    Pitfall 14: bookkeeping that leaks.
    """

    class Data:
        """Something that says when it is gone."""

    alive: weakref.WeakSet[Data] = weakref.WeakSet()
    batcher = Batcher(max_batch_size=4, min_batch_size=1, timeout=1e6, max_queue_size=10**6)
    source = Source()
    batcher.join(source)
    waiting: list[Request] = []
    now = 0.0

    def push(number: int) -> None:
        data = Data()
        alive.add(data)
        timeout = 1e5 if number % 2 else None
        request = Request(data, 1, False, "kind", timeout, number % 3, source, None)
        request.submitted_at = now
        request.deadline = None if timeout is None else now + timeout
        waiting.append(request)
        batcher.push(request)

    for number in range(8):
        push(number)
    for number in range(3000):
        now += 1.0
        for _ in range(5):
            push(number)
        batcher.discard(waiting.pop(number % len(waiting)))
        left = batcher.next_action(now)
        assert isinstance(left, Dispatch)
        assert batcher.rows > 0
        batcher.forward_ended(left.requests, now)
        waiting = [request for request in waiting if request not in left.requests]
        del left
    gc.collect()
    assert len(alive) <= 500


async def test_15_an_answer_never_goes_to_a_successor():
    """Requests that come and go in the same place in memory are not mixed up.

    Pitfall 15: a recycled request id cancels its successor.
    """
    model = RecordingModel()
    async with InferenceServer(model, timeout=0.0) as server:
        client = server.async_client()
        with model.held():
            first = client.submit(row(0))
            await model.entered()
            for value in range(1, 200):
                client.submit(row(-value)).cancel()
                await asyncio.sleep(0)
                gc.collect(0)
            last = client.submit(row(1000))
            await settle()
        assert [action(reply) for reply in await outcomes(first, last)] == [0, 2000]


async def test_22_the_queue_is_bounded_by_default():
    """Without any setting, the queue has an end, and says where.

    Pitfall 22: unbounded queues.
    """
    async with stage() as on:
        on.ask(0)
        await settle()
        with pytest.raises(QueueFullError, match="max_queue_size=4096"):
            for value in range(5000):
                on.client.submit(row(value), block=False)
        on.puppet.run_freely()


async def test_22_a_slow_first_forward_is_forgiven():
    """After a first forward that took very long, requests with a timeout are served again.

    Pitfall 22: a learnt delay blown up by slow first requests; a scheduler that drops for
    ever and does no work.
    """
    async with stage(timeout=0.0) as on:
        on.ask(0)
        await settle()
        await on.forward(100.0)  # a warm-up, a compilation
        served = 0
        for value in range(1, 20):
            asked = on.client.submit(row(value), timeout=5.0)
            await settle()
            if on.puppet.waiting:
                await on.forward(0.01)
                served += action(await within(asked)) == 2 * value
            else:
                on.clock.advance(5.0)
                await settle()
                assert type(asked.exception()) is TimeoutError
        assert served >= 15


# -- futures ----------------------------------------------------------------


def test_27_done_does_not_wait_for_another_thread():
    """``done()`` of a sync future answers at once while another thread waits in ``result()``.

    Pitfall 27.
    """
    model = RecordingModel()
    with InferenceServer(model) as server:
        with model.held():
            future = server.sync_client().submit(row(1))
            model.wait_until_entered()
            waiting = InThread(future.result, 30)
            assert InThread(future.done).result() is False
            assert not waiting.done
        assert action(waiting.result()) == 2
        assert future.done()


async def test_27_replies_that_nobody_takes_are_not_kept():
    """The reply to an abandoned request is forgotten.

    Pitfall 27: replies to abandoned requests are kept for ever.
    """
    replies: list[weakref.ref[Any]] = []

    def policy(td: Any) -> Any:
        answer = td.select()
        answer["action"] = td["observation"] * 2
        replies.append(weakref.ref(answer["action"]))
        return answer

    async with InferenceServer(policy) as server:
        client, sync_client = server.async_client(), server.sync_client()
        client.submit(row(1))
        client.submit(row(2)).cancel()
        await InThread(sync_client.submit, row(3))
        with pytest.raises(TimeoutError):
            await InThread(sync_client, row(4), timeout=0)
        await within(client(row(5)))
        await until(
            lambda: gc.collect() >= 0 and all(ref() is None for ref in replies), "all to be gone"
        )


# -- the policy and its weights ---------------------------------------------


@pytest.mark.parametrize(
    "kind", [ValueError, SystemExit, KeyboardInterrupt, asyncio.CancelledError]
)
async def test_29_an_update_that_fails_fails_alone(kind: type[BaseException]):
    """Whatever an update raises, the server lives and requests are answered.

    Pitfall 29: a weight-sync error outside the loop's try.
    """

    def broken(_: Any) -> None:
        raise kind("no such weights")

    async with InferenceServer(doubling()) as server:
        client = server.async_client()
        for update in (
            asyncio.ensure_future(_caught(server.aupdate_model(broken))),
            InThread(_caught_here, server.update_model, broken),
        ):
            assert type(await update) is kind
            assert action(await within(client(row(1)))) == 2
        assert server.is_alive
        assert server.policy_version == 0


async def _caught(awaitable: Any) -> BaseException | None:
    try:
        await awaitable
    except BaseException as error:
        return error
    return None


def _caught_here(function: Any, *args: Any) -> BaseException | None:
    try:
        function(*args)
    except BaseException as error:
        return error
    return None


async def test_29_an_update_whose_caller_left():
    """An update whose caller is cancelled while it waits for its turn does not run.

    And one that has begun runs to its end; the server goes on in both cases.
    """
    model, began = RecordingModel(), threading.Event()
    finish = threading.Event()

    def slow(_: Any) -> None:
        began.set()
        finish.wait(10)

    async with InferenceServer(model) as server:
        client = server.async_client()
        with model.held():
            first = client.submit(row(1))
            await model.entered()
            ran: list[Any] = []
            update = asyncio.create_task(server.aupdate_model(ran.append))
            await settle()
            update.cancel()
            await settle()
        assert action(await within(first)) == 2
        update = asyncio.create_task(server.aupdate_model(slow))
        await until(began.is_set)
        update.cancel()
        await settle()
        finish.set()
        assert action(await within(client(row(2)))) == 4
        assert ran == []
        assert server.policy_version == 1
