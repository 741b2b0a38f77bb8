"""RayInferenceServer on a real Ray: replicas that share the load, die, come and go.

An actor takes seconds to start, so the tests share one server, and one actor that asks. Each test
leaves two replicas, or none.
"""

from __future__ import annotations

import asyncio
import gc
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
import torch
from certificates import contexts
from helpers import action, outcomes, row, stop, wait_until, within
from rays import start_ray

from aioinfer import (
    InProcessWeightSyncScheme,
    RayInferenceServer,
    RayWeightSyncScheme,
    ServerClosedError,
    ServerDiedError,
)
from aioinfer.transports.ray_replicas import RayReplicas

pytestmark = [pytest.mark.xdist_group("ray"), pytest.mark.timeout(100)]

NOTICED_S = 5.0
"""Seconds in which everybody must know of a death; a tenth of that unless the machine is busy."""
START_S = 60.0
"""Seconds that an actor may take to start on a busy machine."""


class WithPid(torch.nn.Module):
    """A policy of one weight, whose answers say by which process they were computed."""

    in_keys, out_keys = ["observation"], ["action", "pid"]

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.tensor(2.0))

    def forward(self, td: Any) -> Any:
        td["action"] = self.weight * td["observation"]
        td["pid"] = torch.full(td.batch_size, os.getpid())
        return td


class Factory:
    """Makes the policy, unless there is a file that forbids it."""

    def __init__(self, forbids: Path) -> None:
        self.forbids = forbids

    def __call__(self) -> WithPid:
        if self.forbids.exists():
            raise LookupError("no policy today")
        return WithPid()


class Asking:
    """Asks from a process of its own."""

    def __init__(self) -> None:
        self.stopped = asyncio.Event()
        self.seen: list[Any] = []

    def use(self, **transports: RayReplicas) -> None:
        self.clients: Any = {how: each.client() for how, each in transports.items()}

    async def ask(self, how: str, count: int) -> list[Any]:
        """What each of so many requests at once comes to."""
        return await asyncio.gather(*[self._ask(how, value) for value in range(count)])

    async def _ask(self, how: str, value: float) -> Any:
        """The answer over what was asked, who gave it, and the version; or the error and when."""
        try:
            reply = await self.clients[how](row(value + 1))
        except Exception as error:
            return type(error).__name__, time.time()
        return action(reply) / (value + 1), int(reply["pid"]), int(reply["policy_version"])

    async def go_on(self, how: str) -> list[Any]:
        """Ask, eight at a time, until told to stop; return what all came to."""
        self.seen, outcomes = [], []
        while not self.stopped.is_set():
            self.seen = await self.ask(how, 8)
            outcomes += self.seen
        self.stopped.clear()
        return outcomes

    def stop(self) -> None:
        self.stopped.set()

    def pids(self) -> set[int]:
        """Who answered lately."""
        return {outcome[1] for outcome in self.seen}


class Stage:
    """The server, who asks it, and what the tests must know of them."""

    def __init__(self, folder: Path) -> None:
        self.forbids = folder / "forbids"
        self.trainer = RayWeightSyncScheme()
        self.server = RayInferenceServer(
            Factory(self.forbids),
            2,
            ray_options={"num_cpus": 0},
            room=2,
            weight_sync=self.trainer,
            start_timeout=START_S,
        )
        self.weights = WithPid()
        self.trainer.init_on_sender(model=self.weights)
        server = self.server
        link = server.transport
        once = RayReplicas(server._door, room=2, retry=False)
        self.links = {"auto": link, "rpc": self.by_calls(), "once": once}
        self.asking = ray.remote(num_cpus=0)(Asking).remote()

    def by_calls(self) -> RayReplicas:
        """A link that makes no connections, to the same replicas."""
        door = self.server._door
        calls = type(door).__new__(type(door))
        calls.__setstate__(door.__getstate__() | {"_connection": "rpc"})
        return RayReplicas(calls, room=2)

    def ask(self, count: int, how: str = "auto") -> list[Any]:
        return ray.get(self.asking.ask.remote(how, count))

    def pids(self, how: str = "auto") -> set[int]:
        """The processes of the replicas, once there are two, and the actor knows both."""
        found: set[int] = set()

        def both() -> bool:
            nonlocal found
            answers = self.ask(20, how)
            found = {answer[1] for answer in answers}
            assert all(len(answer) == 3 for answer in answers), answers
            return len(found) == 2

        deadline = time.monotonic() + START_S
        while not both():
            assert time.monotonic() < deadline, found
        return found


@pytest.fixture(scope="module")
def _stage(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    start_ray()
    threads = set(threading.enumerate())
    stage = Stage(tmp_path_factory.mktemp("ray_server"))
    # An actor that has its client, and has asked, before there is a server.
    ray.get(stage.asking.use.remote(**stage.links))
    for how in stage.links:
        assert {name for name, _ in stage.ask(2, how)} == {"ServerClosedError"}
    yield stage
    stage.trainer.close()
    stage.server.shutdown(5.0)
    vars(stage).clear()  # pytest keeps the fixture itself

    def left() -> list[str]:
        gc.collect()
        names = {thread.name for thread in set(threading.enumerate()) - threads}
        return [name for name in names if name.startswith("aioinfer-")]

    wait_until(lambda: not left(), "the end of the threads")


@pytest.fixture(autouse=True)
def nothing_left() -> None:
    """The server outlives each test; its threads are looked for at the end of the module."""


@pytest.fixture
def stage(_stage: Stage) -> Stage:
    """All of it, with a server that runs."""
    if not _stage.server.is_alive:
        _stage.server.start()
    return _stage


def names_within(outcomes: list[Any], since: float) -> set[str]:
    """The names of the errors, all of which came soon enough."""
    errors = [outcome for outcome in outcomes if len(outcome) == 2]
    assert max(when for _, when in errors) - since < NOTICED_S
    return {name for name, _ in errors}


def test_replicas_share_the_load(stage: Stage):
    """One replica gets what it has room for, both get more; async, in calls, and for threads."""
    pids = stage.pids()
    assert stage.pids("rpc") == pids
    few = [{answer[1] for answer in stage.ask(2)} for _ in range(100)]
    assert len(set.union(*few[-3:])) == 1, few
    server = stage.server
    server.stats(reset=True)
    client = server.sync_client()
    replies = [client.submit(row(value)) for value in range(20)]
    assert [action(reply.result(10)) for reply in replies] == [2 * value for value in range(20)]
    rows = {number: stats.rows for number, stats in server.stats().items()}
    assert set(rows) == {0, 1}
    assert sum(rows.values()) == 20
    assert min(rows.values()) > 4


async def test_a_client_on_the_drivers_loop(stage: Stage):
    """The server is asked, and gives answers, on any event loop, which it does not block."""
    client = stage.server.client()
    replies = await outcomes(*[client(row(value)) for value in range(20)])
    assert [action(reply) for reply in replies] == [2 * value for value in range(20)]
    assert set(await within(stage.server.astats())) == {0, 1}
    with pytest.raises(RuntimeError, match="called on an event loop"):
        stage.server.stats()
    with pytest.raises(RuntimeError, match="already running"):
        await stage.server.__aenter__()


def test_a_replica_is_killed(stage: Stage):
    """Its requests are answered by the other one, unless there is no retry; then it is replaced.

    The new one has the newest weights from its first answer on, and takes its number.
    """
    server = stage.server
    versions = server.load_state_dict({"weight": torch.tensor(3.0)})
    assert set(versions) == {0, 1}
    (version,) = set(versions.values())
    assert {(answer[0], answer[2]) for answer in stage.ask(20)} == {(3.0, version)}
    pids = stage.pids()
    stage.pids("once")
    doomed = min(pids)
    (other,) = pids - {doomed}
    stop(doomed)  # so that it is asked, and does not answer
    asked = [stage.asking.ask.remote(how, 20) for how in stage.links]
    ready, _ = ray.wait(asked, num_returns=3, timeout=0.3)
    assert not ready
    os.kill(doomed, signal.SIGKILL)
    killed_at = time.time()
    of_links = dict(zip(stage.links, ray.get(asked), strict=True))
    assert names_within(of_links["once"], killed_at) == {"ServerDiedError"}
    for how in ("auto", "rpc"):
        assert {answer[:2] for answer in of_links[how]} == {(3.0, other)}
    wait_until(lambda: len(server.transport.replicas) == 1, "the news of its death")
    assert server.num_replicas == 2
    new = stage.pids()
    assert new > {other}
    assert doomed not in new
    assert {(answer[0], answer[2]) for answer in stage.ask(20)} == {(3.0, version)}
    assert set(server.stats()) == {0, 1}


def test_more_and_fewer(stage: Stage):
    """While it is asked, replicas join and leave: clients elsewhere hear of it, and none waits.

    A new one that fails is not added, says why, and leaves the others alone.
    """
    server = stage.server
    stage.pids()
    report = stage.trainer.send({"weight": torch.tensor(4.0)})
    assert len(report.applied) == 2, report
    traffic = [stage.asking.go_on.remote("auto")]
    stage.forbids.touch()
    with pytest.raises(LookupError, match="no policy today") as caught:
        server.sync_scale(3)
    assert "in __call__" in str(caught.value.__cause__)
    assert server.num_replicas == len(server.transport.replicas) == 2
    stage.forbids.unlink()
    server.sync_scale(3)
    assert server.num_replicas == len(server.transport.replicas) == 3
    wait_until(lambda: len(ray.get(stage.asking.pids.remote())) == 3, "the third's answers")
    server.sync_scale(2)
    wait_until(lambda: len(ray.get(stage.asking.pids.remote())) == 2, "the third's leave")
    ray.get(stage.asking.stop.remote())
    (answers,) = ray.get(traffic)
    assert len({answer[1] for answer in answers}) == 3
    assert {(answer[0], answer[2]) for answer in answers} == {(4.0, report.version)}
    assert set(server.stats()) == {0, 1}


def test_both_are_killed_at_once(stage: Stage):
    """Requests that find no replica to go to fail, soon; both are replaced, with the weights."""
    server = stage.server
    versions = server.load_state_dict({"weight": torch.tensor(5.0)})
    doomed = stage.pids()
    for how in stage.links:
        stage.pids(how)
    for pid in doomed:
        stop(pid)
    asked = [stage.asking.ask.remote(how, 20) for how in stage.links]
    ready, _ = ray.wait(asked, num_returns=3, timeout=0.3)
    assert not ready
    for pid in doomed:
        os.kill(pid, signal.SIGKILL)
    killed_at = time.time()
    for outcomes_ in ray.get(asked):
        assert {len(outcome) for outcome in outcomes_} == {2}
        assert names_within(outcomes_, killed_at) == {"ServerDiedError"}
    assert server.num_replicas == 2
    wait_until(lambda: len(server.transport.replicas) == 2, "their replacement")
    assert not stage.pids() & doomed
    (version,) = set(versions.values())
    assert {(answer[0], answer[2]) for answer in stage.ask(20)} == {(5.0, version)}


def test_all_are_killed(stage: Stage):
    """Who waits for an answer is told at once, as is who asks next; closed, they hear that.

    If fewer are wanted while one is being replaced, the one that is left stays.
    """
    server = stage.server
    pids = stage.pids()
    for how in stage.links:
        stage.pids(how)
    os.kill(pids.pop(), signal.SIGKILL)
    wait_until(lambda: len(server.transport.replicas) == 1, "the news of its death")
    server.sync_scale(1)
    assert {answer[1] for answer in stage.ask(20)} == pids
    (last,) = pids
    stage.forbids.touch()  # or another one might answer, on a machine so busy that it is in time
    stop(last)
    asked = [stage.asking.ask.remote(how, 20) for how in stage.links]
    ready, _ = ray.wait(asked, num_returns=3, timeout=0.3)
    assert not ready
    os.kill(last, signal.SIGKILL)
    killed_at = time.time()
    for outcomes_ in ray.get(asked):
        assert {len(outcome) for outcome in outcomes_} == {2}
        assert names_within(outcomes_, killed_at) == {"ServerDiedError"}
    asked_at = time.time()
    for how in stage.links:
        assert names_within(stage.ask(2, how), asked_at) == {"ServerDiedError"}
    with pytest.raises(ServerDiedError, match="all replicas have died"):
        server.stats()
    server.shutdown()  # while it is being replaced
    stage.forbids.unlink()
    asked_at = time.time()
    for how in stage.links:
        assert names_within(stage.ask(2, how), asked_at) == {"ServerClosedError"}
    with pytest.raises(ServerClosedError):
        server.sync_client()(row(1))
    for ask in (server.stats, lambda: server.sync_scale(3)):
        with pytest.raises(ServerClosedError, match="not running"):
            ask()
    assert not server.is_alive
    server.shutdown()


@pytest.mark.usefixtures("_stage")
def test_replicas_that_are_not_replaced(tmp_path: Path):
    """After max_restarts the others go on; after the last one every call fails, and none waits.

    More are started when asked for. All of it over TLS, at an address of the user's choice.
    """
    server = RayInferenceServer(
        WithPid,
        2,
        ray_options={"num_cpus": 0, "max_restarts": 0},
        room=2,
        connection="direct",
        host="127.0.0.1",
        tls=contexts(tmp_path),
        start_timeout=START_S,
    )
    with server:
        for link in server.transport.replicas.values():
            found = link._background_loop().call(link._find)
            assert found.address[0] == "127.0.0.1"
            assert found.exchange is None
        client = server.sync_client()

        def ask() -> set[int]:
            replies = [client.submit(row(value)) for value in range(20)]
            return {int(reply.result(10)["pid"]) for reply in replies}

        while len(pids := ask()) < 2:  # the first may have answered all of it by then
            pass
        doomed, last = pids
        for number, (pid, left) in enumerate([(doomed, {last}), (last, set())]):
            stop(pid)
            asked = [client.submit(row(value)) for value in range(20)]
            os.kill(pid, signal.SIGKILL)
            for reply in asked:
                error = reply.exception(10)
                assert type(error) is (type(None) if left else ServerDiedError), error
            wait_until(lambda n=number: server.num_replicas == 1 - n, "the end of its keeper")
            assert len(server.transport.replicas) == len(left)
            if left:
                assert ask() == left
                assert len(server.stats()) == 1
        with pytest.raises(ServerDiedError, match="all replicas have died"):
            client(row(1))
        with pytest.raises(ServerDiedError, match="all replicas have died"):
            server.stats()
        server.sync_scale(1)
        assert not ask() & pids
        assert set(server.stats()) == {0}


@pytest.mark.usefixtures("_stage")
def test_a_start_that_takes_too_long():
    """After start_timeout there is an error, and no actor."""
    server = RayInferenceServer(WithPid, ray_options={"num_cpus": 0}, start_timeout=0.01)
    with pytest.raises(ServerDiedError, match=r"start_timeout=0\.01 s"):
        server.start()
    assert not server.is_alive


def test_wrong_arguments():
    """What is wrong is refused with its name, before any actor is started."""
    for error, match, wrong in [
        (TypeError, "policy_factory must be callable, got 3", {"policy_factory": 3}),
        (ValueError, "num_replicas must be at least 1, got 0", {"num_replicas": 0}),
        (TypeError, "ray_options must be a mapping or None, got 1", {"ray_options": 1}),
        (ValueError, "must not have 'name'", {"ray_options": {"name": "mine"}}),
        (ValueError, "max_restarts .* got -2", {"ray_options": {"max_restarts": -2}}),
        (ValueError, "ray_options=.*num_gpu.* is refused", {"ray_options": {"num_gpu": 1}}),
        (ValueError, "device must be a torch device or None", {"device": "gpu"}),
        (ValueError, "connection must be one of", {"connection": "tcp"}),
        (ValueError, "start_timeout must be", {"start_timeout": -1}),
        (TypeError, "max_batch", {"max_batch": 3}),
        (TypeError, "another process", {"weight_sync": InProcessWeightSyncScheme()}),
    ]:
        with pytest.raises(error, match=match):
            RayInferenceServer(**{"policy_factory": WithPid, **wrong})


def test_without_ray(monkeypatch: pytest.MonkeyPatch):
    """Where Ray is not installed, the error says what to install."""
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ImportError, match=r"RayInferenceServer needs Ray: .*aioinfer\[ray\]"):
        RayInferenceServer(WithPid)
