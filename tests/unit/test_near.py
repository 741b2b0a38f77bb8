"""The executor that runs what is cheap on the server's own loop."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from helpers import action, outcomes, row, wait_until
from tensordict import TensorDictBase

from aioinfer import (
    AsyncioTransport,
    InferenceServer,
    InferenceTransport,
    ModelError,
    MPTransport,
    ServerClosedError,
    ThreadingTransport,
    near,
)
from aioinfer.batch import Batch
from aioinfer.batching import Reason
from aioinfer.near import NearExecutor
from aioinfer.testing import RecordingModel


class Seconds:
    """A clock that moves only when a batch is run."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


class Used:
    """An executor, and where and when it ran what."""

    def __init__(self, clock: Seconds) -> None:
        self.clock = clock
        self.cost_s = 0.0
        self.places: list[str] = []
        self.running = 0
        self.executor = NearExecutor()
        self.executor.allowed = True
        self.executor.start(self._run, lambda batch: None)

    def _run(self, batch: Batch) -> None:
        self._note()
        assert self.executor.is_here()
        self.clock.now += self.cost_s

    def _note(self) -> None:
        self.running += 1
        assert self.running == 1, "two at once"
        here = threading.current_thread() is threading.main_thread()
        self.places.append("near" if here else "thread")
        self.running -= 1

    def place(self, cost_s: float) -> str:
        """Run a batch that takes so long; where it ran."""
        self.cost_s = cost_s
        count = len(self.places)
        self.executor.submit(Batch([], 0, Reason.FULL, 0.0))
        self.executor.call(lambda: None).result(10)  # comes after it
        assert len(self.places) == count + 1
        return self.places[-1]


@pytest.fixture
def used(monkeypatch: pytest.MonkeyPatch) -> Iterator[Used]:
    clock = Seconds()
    monkeypatch.setattr(near, "_clock", clock)
    used = Used(clock)
    yield used
    used.executor.stop().result(10)


def test_where_a_batch_is_run(used: Used):
    """The first ones on the thread, cheap ones near, and on the thread again once they are not."""
    assert used.place(0.1) == "thread"
    for _ in range(near.TRIED - 1):
        assert used.place(0.0001) == "thread"  # which shows that they are cheap
    assert [used.place(0.0001) for _ in range(3)] == ["near"] * 3
    assert used.place(0.1) == "near"  # which nobody could know
    assert used.place(0.1) == "thread"


def test_a_batch_comes_after_a_call(used: Used):
    """What was called first runs first, on the thread, and the batch behind it."""
    for _ in range(near.TRIED + 1):
        used.place(0.0)
    assert used.places[-1] == "near"
    begun, go_on = threading.Event(), threading.Event()

    def update() -> None:
        begun.set()
        assert go_on.wait(10)
        used._note()

    call = used.executor.call(update)
    assert begun.wait(10)
    used.executor.submit(Batch([], 0, Reason.FULL, 0.0))
    go_on.set()
    call.result(10)
    wait_until(lambda: len(used.places) == near.TRIED + 3, "the batch")
    assert used.places[-2:] == ["thread", "thread"]


def test_a_call_from_within_a_batch(used: Used):
    """A policy may call while it runs, near or not: it is run at once."""
    results: list[Any] = []
    run = used._run

    def calling(batch: Batch) -> None:
        run(batch)
        results.append(used.executor.call(lambda: 7).result(0))

    used._run = calling  # type: ignore[method-assign]
    used.executor.stop().result(10)
    used.executor.start(calling, lambda batch: None)
    for _ in range(near.TRIED + 1):
        used.place(0.0)
    assert used.places[-1] == "near"
    assert results == [7] * (near.TRIED + 1)


@pytest.fixture
def all_cheap(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every forward counts as cheap, however busy this machine is."""
    monkeypatch.setattr(near, "NEAR_S", 1e9)


@pytest.mark.usefixtures("all_cheap")
@pytest.mark.parametrize("kind", [MPTransport, AsyncioTransport])
async def test_a_server_with_a_loop_of_its_own(kind: type[InferenceTransport]):
    """It answers everybody, near and not, takes updates, and computes on the loop's thread."""
    model, transport = RecordingModel(), kind()
    async with InferenceServer(model, transport, own_loop=True) as server:
        client = transport.async_client()
        for value in range(20):
            assert action(await client(row(value))) == 2 * value
        await server.aupdate_model(lambda policy: None)
        answers = [client.submit(row(value)) for value in range(50)]
        assert [action(await answer) for answer in answers] == [2 * v for v in range(50)]
    assert server.policy_version == 1
    assert threading.get_ident() in model.threads


def _doubled_unless_negative(td: TensorDictBase) -> TensorDictBase:
    if (td["observation"] < 0).any():
        raise ArithmeticError("a negative observation")
    return td.replace({"action": 2 * td["observation"]}).select("action")


@pytest.mark.usefixtures("all_cheap")
async def test_faults_on_the_loop():
    """There too a bad request fails alone, cancelling works, and closing answers the rest."""
    model = RecordingModel(_doubled_unless_negative)
    async with InferenceServer(model, AsyncioTransport(), own_loop=True) as server:
        client = server.async_client()
        for value in range(near.TRIED + 2):
            await client(row(value))
        answers = [client.submit(row(value)) for value in (1, 2, -3, 4, 5)]
        answers[3].cancel()
        replies = await outcomes(*answers[:3], answers[4])
        assert [action(replies[i]) for i in (0, 1, 3)] == [2, 4, 10]
        assert type(replies[2]) is ModelError
        assert type(replies[2].__cause__) is ArithmeticError
        assert server.stats().cancelled == 1
        left = [client.submit(row(value)) for value in range(5)]
    assert [action(await answer) for answer in left] == [2 * value for value in range(5)]
    assert threading.get_ident() in model.threads


class Module(torch.nn.Module):
    """A model that is a module."""

    def __init__(self, model: RecordingModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, td: TensorDictBase) -> TensorDictBase:
        return self.model(td)


def _as_it_is(model: RecordingModel) -> RecordingModel:
    return model


@pytest.mark.usefixtures("all_cheap")
@pytest.mark.parametrize(
    ("wrap", "kind", "own_loop", "near_too"),
    [
        pytest.param(Module, ThreadingTransport, False, True, id="a module"),
        pytest.param(_as_it_is, ThreadingTransport, False, False, id="a callable"),
        pytest.param(_as_it_is, ThreadingTransport, True, True, id="a callable, on request"),
        pytest.param(_as_it_is, MPTransport, False, True, id="for other processes"),
    ],
)
def test_a_started_server_has_a_loop_of_its_own(
    wrap: Any, kind: type[InferenceTransport], own_loop: bool, near_too: bool
):
    """So it computes there; a callable that callers of its own process may hold up does not."""
    model = RecordingModel()
    with InferenceServer(wrap(model), kind(), own_loop=own_loop) as server:
        client = server.sync_client()
        for value in range(near.TRIED + 2):
            assert action(client(row(value))) == 2 * value
    assert len(model.threads) == 1 + near_too  # the first forward is on a thread


@pytest.mark.usefixtures("all_cheap")
@pytest.mark.parametrize("kind", [MPTransport, AsyncioTransport])
async def test_the_loop_of_others_is_never_blocked(kind: type[InferenceTransport]):
    """Nobody having said that a loop may be blocked, batches run on the thread."""
    model, transport = RecordingModel(), kind()
    async with InferenceServer(Module(model), transport):
        client = transport.async_client()
        for value in range(near.TRIED + 2):
            assert action(await client(row(value))) == 2 * value
    assert len(model.threads) == 1
    assert threading.get_ident() not in model.threads


@pytest.mark.usefixtures("all_cheap")
def test_a_forward_that_does_not_end_holds_up_no_shutdown():
    """Even where it keeps the loop itself from closing anything: its caller hears of the end."""
    model = RecordingModel()
    before = threading.active_count()
    server = InferenceServer(model, MPTransport()).start()
    client = server.sync_client()
    for value in range(near.TRIED + 2):
        client(row(value))
    assert len(model.threads) == 2, "it did not compute on the loop"
    model.hold()
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(client, row(5))
        model.wait_until_entered()
        server.shutdown(timeout=0.1)
        with pytest.raises(ServerClosedError):
            answer.result(10)
    model.release()
    wait_until(lambda: threading.active_count() == before, "the end of the loop and its thread")
    assert not server.is_alive
    with server:  # and it can be started again
        assert action(server.sync_client()(row(1))) == 2
