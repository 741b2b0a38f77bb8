"""RayTransport among real actors: where clients and servers may be, and what happens when they die.

Actors take seconds to start, so each kind is started once and given one transport after the other.
"""

from __future__ import annotations

import asyncio
import os
import pickle
import signal
import sys
import time
from typing import Any

import pytest
import ray
from helpers import action, doubling, row, rows, stop, wait_until
from rays import nothing_left as nothing_left
from rays import start_ray

from aioinfer import InferenceServer, RayTransport
from aioinfer.testing import RecordingModel
from aioinfer.transports import ray_pump

pytestmark = [pytest.mark.xdist_group("ray"), pytest.mark.timeout(100)]

NOTICED_S = 5.0
"""Seconds in which everybody must know of a death; a tenth of that unless the machine is busy."""


class AsyncActor:
    """Asks on the event loop of its actor."""

    async def use(self, transport: RayTransport) -> int:
        self.client: Any = transport.client()
        return os.getpid()

    async def ask(self, value: float) -> Any:
        """The answer, or the error and when it came."""
        try:
            return action(await self.client(row(value)))
        except Exception as error:
            return type(error).__name__, time.time()

    async def ask_for(self, value: float, timeout: float) -> Any:
        try:
            return action(await self.client(row(value), timeout=timeout))
        except TimeoutError:
            return "TimeoutError"

    async def ask_often(self, tasks: int, times: int) -> int:
        async def act(number: int) -> None:
            for step in range(times):
                assert action(await self.client(row(number + step))) == 2 * (number + step)

        await asyncio.gather(*[act(100 * number) for number in range(tasks)])
        return tasks * times

    async def give_up(self) -> Any:
        """Ask, and cancel that while the forward runs."""
        task = asyncio.ensure_future(self.client(row(7)))
        await asyncio.sleep(0.2)
        task.cancel()
        try:
            return action(await task)
        except asyncio.CancelledError:
            return "cancelled"


class SyncActor:
    """Asks from the thread of its actor."""

    def use(self, transport: RayTransport) -> int:
        self.client: Any = transport.sync_client()
        return os.getpid()

    def ask(self, value: float) -> Any:
        """The answer, or the error and when it came."""
        try:
            return action(self.client(rows([value, value + 1])))
        except Exception as error:
            return type(error).__name__, time.time()


class Serving:
    """Runs a server."""

    def serve(self, transport: RayTransport, kind: str) -> int:
        if kind == FAR:
            ray_pump._Entrance.open = no_entrance  # type: ignore[method-assign]
        self.server = InferenceServer(doubling(), transport).start()
        return os.getpid()

    def close(self) -> None:
        self.server.shutdown()


def ask_once(transport: RayTransport, value: float) -> Any:
    """What a task does."""
    return action(transport.sync_client()(row(value)))


class Cast:
    """The actors that the tests of this module share."""

    def __init__(self) -> None:
        light = ray.remote(num_cpus=0)
        self.asyncs = [light(AsyncActor).remote() for _ in range(2)]
        self.sync = light(SyncActor).remote()

    def of(self, kind: Any) -> RayTransport:
        """A new transport, which all of them use from now on."""
        transport = RayTransport(kind.removeprefix("far "))
        ray.get([each.use.remote(transport) for each in [*self.asyncs, self.sync]])
        return transport

    def ask_all(self, value: float) -> list[Any]:
        """What all of them get; they ask at once."""
        return [each.ask.remote(value) for each in [*self.asyncs, self.sync]]


@pytest.fixture(scope="module")
def cast() -> Cast:
    start_ray()
    return Cast()


both_kinds = pytest.mark.parametrize("kind", ["direct", "rpc"])
FAR = "far rpc"
"""Calls to a server on another host than its relay, so that it has no line and asks for them."""
kinds = pytest.mark.parametrize("kind", ["direct", "rpc", FAR])


async def no_entrance(_: Any) -> None:
    """In place of what lets the relay in that is on the same host."""


@pytest.fixture(autouse=True)
def _far(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    callspec = getattr(request.node, "callspec", None)
    if callspec is not None and callspec.params.get("kind") == FAR:
        monkeypatch.setattr(ray_pump._Entrance, "open", no_entrance)


def connections(transport: RayTransport) -> list[Any]:
    """Those of the server in this process with its clients."""
    assert transport._listener is not None or transport._hub is not None
    found = [] if transport._listener is None else list(transport._listener.peers)
    return found + ([] if transport._hub is None else list(transport._hub._peers.values()))


WELL = [6, 6, [6, 8]]
"""What the cast gets if it asks for 3."""


def errors_within(outcomes: list[Any], since: float) -> set[str]:
    """The names of the errors, all of which came soon enough."""
    assert all(isinstance(outcome, tuple) for outcome in outcomes), outcomes
    assert max(when for _, when in outcomes) - since < NOTICED_S
    return {name for name, _ in outcomes}


@kinds
def test_a_server_in_the_driver(cast: Cast, kind: str):
    """Async and sync actors, tasks and the driver are served, before, during and after a server."""
    transport = cast.of(kind)
    assert {name for name, _ in ray.get(cast.ask_all(3))} == {"ServerClosedError"}
    for _ in range(2):
        with InferenceServer(doubling(), transport):
            assert kind == "direct" or (transport._pump._line is None) == (kind == FAR)
            assert ray.get(cast.ask_all(3)) == WELL
            assert ray.get([a.ask_often.remote(16, 10) for a in cast.asyncs]) == [160, 160]
            task = ray.remote(num_cpus=0)(ask_once)
            assert ray.get(task.remote(transport, 4)) == 8
            assert action(transport.sync_client()(row(5))) == 10
        assert {name for name, _ in ray.get(cast.ask_all(3))} == {"ServerClosedError"}


@both_kinds
async def test_a_server_on_the_drivers_loop(cast: Cast, kind: str):
    """The server may be a task of an event loop of the driver, with clients beside it."""
    transport = cast.of(kind)
    async with InferenceServer(doubling(), transport) as server:
        assert [await each for each in cast.ask_all(3)] == WELL
        assert action(await server.client()(row(5))) == 10


@kinds
def test_a_server_in_an_actor(cast: Cast, kind: str):
    """A server in an actor serves the same clients; killed, it is missed at once by everybody.

    Another one takes its place, wherever it runs.
    """
    transport = cast.of(kind)
    serving = ray.remote(num_cpus=0, max_restarts=0)(Serving).remote()
    pid = ray.get(serving.serve.remote(transport, kind))
    assert ray.get(cast.ask_all(3)) == WELL
    with pytest.raises(RuntimeError, match="in another process"):
        InferenceServer(doubling(), transport).start()
    stop(pid)  # so that it is asked, and does not answer
    asked = cast.ask_all(3)
    ready, _ = ray.wait(asked, timeout=0.3)
    assert not ready
    os.kill(pid, signal.SIGKILL)
    killed_at = time.time()
    assert errors_within(ray.get(asked), killed_at) == {"ServerDiedError"}
    with InferenceServer(doubling(), transport):
        assert ray.get(cast.ask_all(3)) == WELL


@kinds
def test_the_server_is_closed_over_its_clients(cast: Cast, kind: str):
    """Who waits when the server is closed is told at once, as is who asks later."""
    transport = cast.of(kind)
    model = RecordingModel()
    server = InferenceServer(model, transport, max_batch_size=1)
    with model.held():
        server.start()
        asked = cast.ask_all(3)
        model.wait_until_entered()
        wait_until(lambda: server.stats().queue_depth == 3, "the rows of all but one")
        closed_at = time.time()
        asyncio.run(server.aclose(drain=False))
        assert errors_within(ray.get(asked), closed_at) == {"ServerClosedError"}
        asked_at = time.time()
        assert errors_within(ray.get(cast.ask_all(3)), asked_at) == {"ServerClosedError"}


@both_kinds
def test_a_client_is_killed(cast: Cast, kind: Any):
    """A client actor that is killed while it waits is forgotten, and nobody else notices."""
    transport = RayTransport(kind)
    model = RecordingModel()
    doomed = ray.remote(num_cpus=0)(SyncActor).remote()
    with InferenceServer(model, transport, max_batch_size=1) as server:
        pid = ray.get(doomed.use.remote(transport))
        client = transport.sync_client()
        with model.held():
            first = client.submit(row(1))
            model.wait_until_entered()
            doomed.ask.remote(5)
            wait_until(lambda: server.stats().queue_depth == 2, "its request")
            os.kill(pid, signal.SIGKILL)
            wait_until(lambda: len(connections(transport)) == 1, "the news of its death")
        assert action(first.result(10)) == 2
        assert action(client(row(2))) == 4
        assert model.rows == 2  # nothing was computed for who was dead


@both_kinds
def test_a_caller_gives_up(cast: Cast, kind: str):
    """A call that is cancelled, or out of time, leaves the actor's other calls alone."""
    transport = cast.of(kind)
    model = RecordingModel()
    with InferenceServer(model, transport, max_batch_size=1) as server:
        asked, other = cast.asyncs
        with model.held():
            cancelled = asked.give_up.remote()
            model.wait_until_entered()
            late = other.ask_for.remote(4, 0.1)
            waiting = asked.ask.remote(3)
            assert ray.get([cancelled, late]) == ["cancelled", "TimeoutError"]
            owed = lambda: sum(len(peer._open) for peer in connections(transport))  # noqa: E731
            wait_until(lambda: owed() == 1, "the news")
        assert ray.get(waiting) == 6
        wait_until(
            lambda: (server.stats().cancelled, server.stats().timed_out) == (1, 1), "the count"
        )


@both_kinds
def test_what_travels(cast: Cast, kind: str):
    """Transport and client pickle; the secret is no part of what they print."""
    transport = cast.of(kind)
    assert repr(transport._secret) not in repr(transport)
    again = ray.get(ray.put(transport))
    assert again._secret == transport._secret
    assert pickle.loads(pickle.dumps(again._host)) == transport._host


def test_without_ray(monkeypatch: pytest.MonkeyPatch):
    """Where Ray is not installed, the error says what to install."""
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ImportError, match=r"aioinfer\[ray\]"):
        RayTransport()
