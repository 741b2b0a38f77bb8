"""The executor that runs what is cheap on the server's own loop."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import pytest
from helpers import action, row, wait_until

from aioinfer import AsyncioTransport, InferenceServer, near
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
    assert used.place(0.0001) == "thread"  # which shows that they are cheap
    assert [used.place(0.0001) for _ in range(3)] == ["near"] * 3
    assert used.place(0.1) == "near"  # which nobody could know
    assert used.place(0.1) == "thread"


def test_a_batch_comes_after_a_call(used: Used):
    """What was called first runs first, on the thread, and the batch behind it."""
    for _ in range(3):
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
    wait_until(lambda: len(used.places) == 5, "the batch")
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
    for _ in range(4):
        used.place(0.0)
    assert used.places[-1] == "near"
    assert results == [7] * 4


async def test_a_server():
    """A server with this executor answers everybody, near and not, and takes updates."""
    model = RecordingModel()
    server = InferenceServer(model, AsyncioTransport(), executor=NearExecutor())
    async with server:
        client = server.async_client()
        for value in range(20):
            assert action(await client(row(value))) == 2 * value
        await server.aupdate_model(lambda policy: None)
        answers = [client.submit(row(value)) for value in range(50)]
        assert [action(await answer) for answer in answers] == [2 * v for v in range(50)]
    assert server.policy_version == 1
