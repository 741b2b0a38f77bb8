"""Several replicas behind one transport: where requests go, and what happens when one leaves."""

from __future__ import annotations

import asyncio
import gc
import multiprocessing
import os
import pickle
import signal
from collections.abc import AsyncIterator
from concurrent.futures import CancelledError
from contextlib import asynccontextmanager
from multiprocessing import resource_tracker
from typing import Any

import pytest
import torch
from helpers import InThread, action, all_well, doubling, outcomes, row, rows, until, within
from test_mp import Child, one, one_awaited

from aioinfer import (
    InferenceServer,
    InferenceTransport,
    InvalidRequestError,
    ModelError,
    MPTransport,
    ProcessInferenceServer,
    ServerClosedError,
    ServerDiedError,
    ThreadingTransport,
)
from aioinfer.request import GivenUp, Request, Source
from aioinfer.testing import ManualClock, RecordingModel, settle
from aioinfer.transports.replicated import FIRST_PAUSE_S, MAX_RETRIES, ReplicatedTransport
from aioinfer.waiting import answer_threads

FORK = multiprocessing.get_context("fork")

pytestmark = [
    pytest.mark.timeout(60),
    pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning"),
]


class Puppet(InferenceTransport):
    """A link on which the test answers: what was sent stays in ``sent`` until then."""

    def __init__(self) -> None:
        self.sent: list[Request] = []
        self.given_up: list[GivenUp] = []
        self.clients: list[Source] = []
        self.refuses: Exception | None = None
        self.asked = 0

    clock: Any = None

    def send(self, request: Request, loop: Any, *, block: bool = True) -> None:
        self.asked += 1
        if self.refuses is not None:
            raise self.refuses
        self.sent.append(request)

    def answer(self, result: Any = None) -> None:
        answer_threads([(self.sent.pop(0), result)])

    def die(self) -> None:
        sent, self.sent = self.sent, []
        for request in sent:
            request.handle.set_exception(ServerDiedError("killed"))

    def give_up(self, request: Request, why: GivenUp) -> None:
        self.given_up.append(why)

    def wait_for_room(self, rows: int, timeout: float | None) -> bool:
        return True

    def call_at(self, when: float, callback: Any) -> Any:
        raise AssertionError("not asked for timers")

    def join(self, source: Source) -> None:
        self.clients.append(source)

    def leave(self, source: Source) -> None:
        self.clients.remove(source)

    async def attach(self, intake: Any) -> None:
        raise AssertionError("not served")

    async def detach(self) -> None:
        pass


def puppets(count: int, **options: Any) -> tuple[ReplicatedTransport, list[Puppet]]:
    found = [Puppet() for _ in range(count)]
    return ReplicatedTransport(dict(enumerate(found)), **options), found


@pytest.fixture(scope="module", autouse=True)
def _tracker() -> None:
    resource_tracker.ensure_running()  # started with the first spawned process; it stays


@asynccontextmanager
async def serving(
    count: int, *, room: int = 2, **options: Any
) -> AsyncIterator[tuple[ReplicatedTransport, list[InferenceServer], list[RecordingModel]]]:
    """So many servers in this process, and the transport over all of them."""
    models = [RecordingModel() for _ in range(count)]
    transports = [ThreadingTransport() for _ in range(count)]
    servers = [InferenceServer(m, t) for m, t in zip(models, transports, strict=True)]
    replicated = ReplicatedTransport(dict(enumerate(transports)), room=room, **options)
    try:
        for server in servers:
            await server.__aenter__()
        yield replicated, servers, models
    finally:
        for model in models:
            model.release()
        for server in servers:
            await server.aclose()


# -- where requests go --------------------------------------------------------


async def test_requests_go_to_the_replicas_that_have_room():
    """One replica is filled first; then both have the same number of rows under way."""
    transport, (a, b) = puppets(2, room=3)
    client = transport.async_client()
    futures = [client.submit(row(value)) for value in range(3)]
    assert [len(a.sent), len(b.sent)] == [3, 0]
    futures += [client.submit(rows([1, 2])), client.submit(row(3)), client.submit(row(4))]
    assert [transport.rows_under_way(name) for name in (0, 1)] == [4, 3]
    for puppet in (a, b):
        while puppet.sent:
            puppet.answer("well")
    assert set(await outcomes(*futures)) == {"well"}
    assert [transport.rows_under_way(name) for name in (0, 1)] == [0, 0]


async def test_all_kinds_of_callers_are_served_by_several_servers():
    """Coroutines, futures and threads get their own rows, whoever computes them."""
    async with serving(3, room=2) as (transport, _, models):
        client, sync_client = transport.async_client(), transport.sync_client()

        async def ask(value: float) -> None:
            assert action(await client(row(value))) == 2 * value
            assert action(await client.submit(row(value), timeout=30)) == 2 * value

        def ask_in_thread(value: float) -> None:
            assert action(sync_client(row(value), timeout=30)) == 2 * value
            assert action(sync_client.submit(row(value)).result(10)) == 2 * value

        await all_well(*map(ask, range(20)), *(InThread(ask_in_thread, v) for v in range(20, 30)))
        assert all(model.batches for model in models)
        assert not any(transport.rows_under_way(name) for name in range(3))


async def test_a_bad_request_is_not_sent_on():
    """What a replica refuses or its policy fails on is answered with that, and not sent on."""
    async with serving(2) as (transport, _, models):
        models[0].fail_when(lambda td: True)
        client = transport.async_client()
        with pytest.raises(ModelError):
            await within(client(row(1)))
        models[0].fail_when(None)
        with pytest.raises(InvalidRequestError):
            await within(client(rows([])))
        assert models[1].batches == []
        assert action(await within(client(row(2)))) == 4


def test_callers_who_know_nothing_of_each_other_spread_by_what_replicas_report():
    """Threads with transports of their own, one request each, do not all stay with the first."""
    transports = {name: MPTransport() for name in "ab"}
    original = ReplicatedTransport(transports, room=4)
    first, second = (InferenceServer(RecordingModel(), each) for each in transports.values())

    def actor(number: int) -> None:
        client = pickle.loads(pickle.dumps(original)).sync_client()
        for step in range(40):
            assert action(client(row(number + step))) == 2 * (number + step)

    with first, second:
        for thread in [InThread(actor, number) for number in range(24)]:
            thread.result()
        rows_of = [server.stats().rows for server in (first, second)]
    assert sum(rows_of) == 24 * 40
    assert min(rows_of) > 24 * 40 / 10, rows_of


def test_replicas_say_how_many_rows_they_have_room_for():
    """A policy that costs as much per row as per forward leaves room for a row or two."""
    transport = MPTransport()
    replicated = ReplicatedTransport({0: transport})
    clock = ManualClock()

    class Slow:
        def __call__(self, td: Any) -> Any:
            clock.advance(0.01 * len(td) + 0.02)
            td["action"] = 2 * td["observation"]
            return td

    with InferenceServer(Slow(), transport, clock=clock, timeout=0.0, min_batch_size=1):
        client = replicated.sync_client()
        for rounds in range(40):
            client(rows(range(1 + rounds % 8)))
    (load,) = replicated._balancer._loads.values()
    assert load.room in (1, 2, 3)


# -- replicas that leave ------------------------------------------------------


async def test_requests_of_a_replica_that_closes_are_answered_by_another():
    """Coroutines, futures and threads whose replica goes away do not notice."""
    async with serving(2, room=100) as (transport, servers, models):
        client, sync_client = transport.async_client(), transport.sync_client()
        with models[0].held():
            first = client.submit(row(0))
            await models[0].entered()
            waiting = [asyncio.create_task(client(row(1), timeout=30)), client.submit(rows([2, 3]))]
            waiting += [InThread(sync_client, row(4)), InThread(sync_client, row(5), timeout=30)]
            of_a_thread = await InThread(sync_client.submit, row(6))
            await until(lambda: servers[0].stats().queue_depth == 6)
            closing = asyncio.create_task(servers[0].aclose(drain=False))
            replies = await outcomes(first, *waiting, asyncio.wrap_future(of_a_thread))
            assert [action(reply) for reply in replies] == [0, 2, [4, 6], 8, 10, 12]
        await within(closing)
        assert sum(models[1].batch_sizes) == 7
        assert transport.rows_under_way(0) == transport.rows_under_way(1) == 0


async def test_without_retry_the_error_comes_through():
    """``retry=False``: whoever waits for a replica that goes away is told."""
    async with serving(2, room=100, retry=False) as (transport, servers, models):
        client, sync_client = transport.async_client(), transport.sync_client()
        with models[0].held():
            first = client.submit(row(0))
            await models[0].entered()
            waiting = [client.submit(row(1)), InThread(sync_client, row(2))]
            await until(lambda: servers[0].stats().queue_depth == 2)
            closing = asyncio.create_task(servers[0].aclose(drain=False))
            errors = await outcomes(first, *waiting)
            assert {type(error) for error in errors} == {ServerClosedError}
        await within(closing)
        assert models[1].batches == []
        # What was never accepted was not lost either: it goes where there is somebody.
        assert action(await within(client(row(3)))) == 6


async def test_without_any_replica_left_the_error_comes_through():
    """When nobody is there: the last one's error for those who wait, and then a refusal."""
    async with serving(1) as (transport, servers, _):
        client = transport.async_client()
        assert action(await within(client(row(1)))) == 2
        await servers[0].aclose()
        with pytest.raises(ServerClosedError, match="no running server"):
            await within(client(row(1)))
        with pytest.raises(ServerClosedError):
            await InThread(transport.sync_client(), row(1))
        with pytest.raises(ServerClosedError):
            await InThread(transport.sync_client().submit, row(1))
        await servers[0].__aenter__()  # and it is found again as soon as somebody asks
        assert action(await within(client(row(2)))) == 4
    with pytest.raises(ServerClosedError, match="no replica"):
        await ReplicatedTransport().async_client()(row(1))


async def test_a_request_that_takes_replicas_down_is_sent_on_a_few_times_only():
    """A request is retried ``MAX_RETRIES`` times; the other replicas never see it."""
    transport, found = puppets(MAX_RETRIES + 3)
    future = transport.async_client().submit(row(1))
    for puppet in found:
        puppet.die()
    assert type((await outcomes(future))[0]) is ServerDiedError
    assert [puppet.asked for puppet in found] == [1] * (MAX_RETRIES + 1) + [0, 0]


@pytest.mark.parametrize("at_once", [True, False])
async def test_of_the_dead_it_is_said_that_they_died(at_once: bool):
    """A caller whose replica died is told so, even if those asked next say that they are closed."""
    transport, found = puppets(3)
    future = transport.async_client().submit(row(1))
    if at_once:
        found[1].refuses = found[2].refuses = ServerClosedError("closed")
    found[0].die()
    for puppet in () if at_once else found[1:]:
        puppet.answer(ServerClosedError("closed"))
    assert type((await outcomes(future))[0]) is ServerDiedError
    assert [puppet.asked for puppet in found] == [1, 1, 1]


async def test_a_retry_keeps_the_deadline():
    """What is sent on has the time that is left to it, and nothing is sent on too late."""
    clock = ManualClock()
    transport, (a, b, c) = puppets(3, clock=clock)
    client = transport.async_client()
    future = client.submit(row(1), timeout=10, priority=3)
    clock.advance(4)
    a.die()
    (again,) = b.sent
    assert (again.timeout, again.priority, again.rows) == (6, 3, 1)
    assert torch.equal(again.data[0], row(1)["observation"])
    clock.advance(6)
    assert type((await outcomes(future))[0]) is TimeoutError
    assert b.given_up == [GivenUp.TIMED_OUT]
    b.die()
    assert c.asked == 0


async def test_a_cancelled_request_is_not_sent_on():
    """Cancelling withdraws a request where it is; if that replica then dies, nothing happens."""
    transport, (a, b) = puppets(2)
    client, sync_client = transport.async_client(), transport.sync_client()
    task = asyncio.create_task(client(row(1)))
    of_a_thread = await InThread(sync_client.submit, row(2))
    await settle()
    task.cancel()
    assert of_a_thread.cancel()
    await settle()
    assert a.given_up == [GivenUp.CANCELLED] * 2
    a.die()
    assert b.asked == 0
    assert task.cancelled()
    with pytest.raises(CancelledError):
        of_a_thread.result(0)
    assert transport.rows_under_way(0) == 0


async def test_a_replica_that_left_is_tried_again_less_and_less_often():
    """After a pause that doubles, and at once where nobody else is left."""
    clock = ManualClock()
    transport, (a, b) = puppets(2, clock=clock)
    client = transport.async_client()

    def ask() -> None:
        future = client.submit(row(1))
        b.answer()
        assert future.done()

    a.refuses = ServerClosedError("closed")
    ask()
    pause = FIRST_PAUSE_S
    for asked in (1, 2, 3):
        assert a.asked == asked
        clock.advance(pause * 0.9)
        ask()
        assert a.asked == asked
        clock.advance(pause * 0.2)
        ask()
        pause *= 2
    a.refuses, b.refuses = None, ServerClosedError("closed")
    future = client.submit(row(1))  # the pause of ``a`` is not over
    a.answer("back")
    assert await within(future) == "back"
    b.refuses = None
    assert not client.submit(row(1)).done()
    assert len(a.sent) == 1  # it counts as there again


@pytest.mark.timeout(100)
def test_a_server_process_that_is_killed():
    """Requests under way in a process that is killed are answered by the other process."""
    servers = [ProcessInferenceServer(_slow_doubling, ctx=FORK) for _ in range(2)]
    transport = ReplicatedTransport({n: s.transport for n, s in enumerate(servers)}, room=100)

    async def main() -> None:
        client, sync_client = transport.async_client(), transport.sync_client()
        assert action(await within(client(row(1)))) == 2
        waiting = [client.submit(row(value)) for value in range(8)]
        threads = [InThread(sync_client, row(value)) for value in range(8, 12)]
        await until(lambda: transport.rows_under_way(0) == 12)
        os.kill(servers[0].pid or 0, signal.SIGKILL)
        replies = await outcomes(*waiting, *threads)
        assert [action(reply) for reply in replies] == [2 * value for value in range(12)]

    with servers[0], servers[1]:
        asyncio.run(main())


def _slow_doubling() -> Any:
    import time

    def forward(td: Any) -> Any:
        time.sleep(0.2)  # so that the requests are under way when the process is killed
        td["action"] = 2 * td["observation"]
        return td.select("action")

    return forward


# -- replicas that come and go on purpose -------------------------------------


async def test_removing_drains():
    """A replica that is removed gets nothing more, answers what it has, and then forgets us."""
    transport, (a, b) = puppets(2)
    client = transport.async_client()
    first, second = client.submit(row(1)), client.submit(row(2))
    transport.remove(0)
    transport.remove(0)
    third = client.submit(row(3))
    assert [len(a.sent), len(b.sent)] == [2, 1]
    assert list(transport.replicas) == [1]
    a.answer(1)
    assert len(a.clients) == 1
    a.answer(2)
    assert a.clients == []
    b.answer(3)
    assert [await within(future) for future in (first, second, third)] == [1, 2, 3]
    transport.remove(1)
    assert b.clients == []


async def test_adding_while_running():
    """A replica that is added takes its share of the next requests; a name is not taken twice."""
    transport, (a,) = puppets(1, room=2)
    client = transport.async_client()
    futures = [client.submit(row(value)) for value in range(4)]
    late, later = Puppet(), Puppet()
    transport.add("late", late)
    futures += [client.submit(row(value)) for value in range(4)]
    assert [len(a.sent), len(late.sent)] == [4, 4]
    transport.add("late", later, room=8)  # in its place
    futures.append(client.submit(row(0)))
    assert [len(a.sent), len(late.sent), len(later.sent)] == [4, 4, 1]
    for puppet in (a, late, later):
        while puppet.sent:
            puppet.answer()
    assert late.clients == []
    await all_well(*futures)


async def test_clients_join_a_replica_with_their_first_request_there():
    """No batch waits for clients that ask elsewhere, nor for those that have gone."""
    transport, (a, b) = puppets(2)
    client, other = transport.async_client(), transport.sync_client()
    assert a.clients == b.clients == []
    future = client.submit(row(1))
    thread = InThread(other, row(2))
    await until(lambda: len(a.sent) == 2)
    assert len(a.clients) == 2
    a.answer()
    a.answer()
    await all_well(future, thread)
    other.close()
    assert len(a.clients) == 1
    del client, future, thread
    gc.collect()
    assert a.clients == b.clients == []


# -- in other processes -------------------------------------------------------


@pytest.mark.timeout(100)
def test_clients_in_other_processes():
    """Transport and clients are inherited and pickled, and find all replicas there."""
    transports = {name: MPTransport() for name in "ab"}
    replicated = ReplicatedTransport(transports, room=1)
    first, second = (InferenceServer(doubling(), each) for each in transports.values())
    with first, second:
        assert action(replicated.sync_client()(row(1))) == 2  # connected before the fork
        with Child(one, replicated.sync_client(), 3.0) as forked:
            assert forked.hear() == 6
        with Child(one_awaited, replicated, 5.0, method="spawn") as spawned:
            assert spawned.hear(90) == [10, [10, 20]]
        assert first.stats().rows
        assert second.stats().rows


def test_a_copy_is_made_of_the_replicas_of_the_moment():
    """Names, order, rooms and settings are those of the original; what comes later is not."""
    transport = ReplicatedTransport({"a": MPTransport(), "b": MPTransport()}, room=7, retry=False)
    transport.add("c", MPTransport(), room=9)
    transport.remove("a")
    copy = pickle.loads(pickle.dumps(transport))
    transport.remove("b")
    assert list(copy.replicas) == ["b", "c"]
    assert (copy._room, copy._retry) == (7, False)
    assert copy._replicas["c"].room == 9
    with pytest.raises(TypeError, match="ThreadingTransport"):
        pickle.dumps(ReplicatedTransport({"a": ThreadingTransport()}))


# -- arguments ----------------------------------------------------------------


async def test_arguments():
    """Wrong arguments are refused with their name, and the transport cannot be served."""
    with pytest.raises(ValueError, match="room must be at least 1, got 0"):
        ReplicatedTransport(room=0)
    with pytest.raises(TypeError, match="retry must be a bool, got 1"):
        ReplicatedTransport(retry=1)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="transport must be an InferenceTransport, got 'b'"):
        ReplicatedTransport({"a": "b"})  # type: ignore[dict-item]
    with pytest.raises(RuntimeError, match="for clients"):
        async with InferenceServer(doubling(), ReplicatedTransport()):
            pass
