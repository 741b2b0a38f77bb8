"""Monarch actors and their server: where either may be, and what happens when one ends."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import pickle
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import pytest
import torch
from helpers import (
    PATIENCE_S,
    InThread,
    action,
    doubling,
    outcomes,
    row,
    seen,
    threads_end,
    until,
    within,
)

from aioinfer import (
    InferenceServer,
    ModelError,
    MonarchInferenceServer,
    MonarchTransport,
    ServerClosedError,
    ServerDiedError,
)
from aioinfer.testing import RecordingModel
from aioinfer.transports import direct
from aioinfer.transports.monarch import _host_in

pytest.importorskip("monarch.actor")

from monarch.actor import this_host
from monarch_actors import Asking, AskingInThreads, Serving, WithPid, broken_policy

pytestmark = [
    pytest.mark.xdist_group("monarch"),
    pytest.mark.usefixtures("monarch"),
    pytest.mark.timeout(100),
]

kinds = pytest.mark.parametrize("kind", ["direct", "rpc"])


@contextlib.asynccontextmanager
async def new_procs(before: int = 0) -> AsyncIterator[Any]:
    """One process for actors, ended with the block if it has not ended before.

    Args:
        before: how many others come before it in its mesh; of the end of an actor on a part that
            does not begin where the mesh does, Monarch does not tell who calls it.
    """
    procs = this_host().spawn_procs(per_host={"procs": before + 1})
    try:
        yield procs.slice(procs=before) if before else procs
    finally:
        with contextlib.suppress(Exception):
            await done(procs.stop())


@pytest.fixture(scope="module")
def procs(monarch: None) -> Iterator[Any]:
    """A process in which actors live that are not killed."""
    procs = this_host().spawn_procs(per_host={"procs": 1})
    yield procs
    procs.stop().get(timeout=PATIENCE_S)


@pytest.fixture
def nothing_left() -> Iterator[None]:
    """Fail a test after which a thread of the library is left.

    Monarch keeps descriptors of its processes, and what it sent to them, for a while. That
    transports leave none behind is tested in ``conformance/test_monarch_transport.py``.
    """
    yield from threads_end()


async def done(future: Any) -> Any:
    """What a Monarch future comes to; it must not hang."""

    async def wait() -> Any:
        return await future

    return await within(wait(), 60)


# -- where clients and servers may be -----------------------------------------


@kinds
async def test_actors_and_a_server_in_the_driver(procs: Any, kind: Any):
    """Async and sync endpoints, their threads and the driver ask; some before the server starts."""
    transport = MonarchTransport(kind)
    early = procs.spawn("early", Asking, transport.client())
    client = transport.client()
    async with InferenceServer(doubling(), transport) as server:
        late = procs.spawn("late", AskingInThreads, transport)
        assert await done(early.ask_many.call_one(100))
        assert await done(late.ask.call_one(1)) == [2, 4, 6]
        assert action(await within(client(row(3)))) == 6
        assert action(await InThread(transport.sync_client(), row(4))) == 8
        assert server.stats().rows == 102 + 3 + 2


@kinds
async def test_a_server_in_an_actor(procs: Any, kind: Any):
    """The server lives in an actor; it is closed and started again, and its clients go on."""
    transport = MonarchTransport(kind)
    asking = procs.spawn("asking", Asking, transport.client())
    serving = procs.spawn("serving", Serving)
    client = transport.client()
    for _ in range(2):
        assert await done(asking.ask.call_one(1)) == "ServerClosedError"
        await done(serving.serve.call_one(transport))
        assert await done(asking.ask_many.call_one(20))
        assert action(await within(client(row(3)))) == 6
        with pytest.raises(RuntimeError, match="already serves"):
            async with InferenceServer(doubling(), transport):
                pass
        await done(serving.close.call_one())
        with pytest.raises(ServerClosedError):
            await within(client(row(3)))
    async with InferenceServer(doubling(), transport):
        assert await done(asking.ask.call_one(2)) == 4


@kinds
async def test_what_the_policy_raises_travels_as_data(procs: Any, kind: Any):
    """An exception that cannot be pickled arrives as a ModelError with its traceback as text."""

    class Unpicklable(Exception):
        def __init__(self, one: object, two: object) -> None:
            super().__init__("of no use elsewhere")
            self.lock = [asyncio.Lock(), one, two, lambda: None]

    transport, model = MonarchTransport(kind), RecordingModel()
    model.fail_when(lambda td: True, lambda: Unpicklable(1, 2))
    asking = procs.spawn("asking", Asking, transport.client())
    async with InferenceServer(model, transport):
        name, _, cause = await done(asking.why.call_one(1))
        assert name == ModelError.__name__
        assert "Unpicklable: of no use elsewhere" in cause
        model.fail_when(None)
        assert await done(asking.ask.call_one(1)) == 2


async def test_calls_where_no_connection_can_be_made(monkeypatch: pytest.MonkeyPatch):
    """``"auto"`` calls where connecting fails; ``"direct"`` says that it cannot connect."""

    async def fail(*_: Any, **__: Any) -> Any:
        raise ConnectionRefusedError("a firewall")

    monkeypatch.setattr(direct, "connect", fail)
    auto, only = MonarchTransport(), MonarchTransport("direct")
    async with InferenceServer(doubling(), [auto, only]):
        assert action(await within(auto.client()(row(1)))) == 2
        with pytest.raises(ServerDiedError, match="a firewall"):
            await within(only.client()(row(1)))


def test_a_copy_in_the_same_process():
    """A transport that was pickled and unpickled here finds the server, and is refused as one."""
    transport = MonarchTransport()
    copy = pickle.loads(pickle.dumps(transport))
    with InferenceServer(doubling(), transport):
        assert action(copy.sync_client()(row(1))) == 2
        with pytest.raises(RuntimeError, match="already serves"):
            InferenceServer(doubling(), copy).start()
    with InferenceServer(doubling(), copy):
        assert action(transport.sync_client()(row(1))) == 2


# -- who ends -----------------------------------------------------------------


@pytest.fixture
def faults(caplog: pytest.LogCaptureFixture) -> Callable[[], list[str]]:
    """What Monarch has reported to this program."""
    caplog.set_level(logging.WARNING, "aioinfer")
    return lambda: [
        record.getMessage() for record in caplog.records if "nobody handled" in record.msg
    ]


@kinds
def test_a_client_actor_that_is_killed(kind: Any, faults: Callable[[], list[str]]):
    """The driver is told by a line in its log, and the server forgets that client."""
    transport, model = MonarchTransport(kind), RecordingModel()

    def connections() -> int:
        return len(transport._hub._peers if kind == "rpc" else transport._listener.peers)

    async def main() -> None:
        async with InferenceServer(model, transport) as server:
            async with new_procs(before=int(kind == "rpc")) as procs:
                model.hold()
                asking = procs.spawn("asking", Asking, transport.client())
                pid = await done(asking.pid.call_one())
                waiting = [asking.ask.call_one(0)]
                await model.entered()
                waiting += [asking.ask.call_one(value) for value in range(1, 4)]
                await until(lambda: server.stats().queue_depth == 3)
                assert connections() == 1
                os.kill(pid, signal.SIGKILL)
                await until(lambda: not connections(), "the end of its connection")
                await until(faults, "a report of the fault")
                del waiting
                model.release()
            assert action(await within(transport.client()(row(7)))) == 14
            assert seen(model) == [[0], [7]]  # nothing was computed for who was killed

    asyncio.run(main())


@pytest.mark.parametrize(
    ("kind", "how"),
    [
        ("direct", "killed"),
        ("direct", "stopped"),
        ("rpc", "killed"),
        ("rpc", "stopped"),
        ("rpc", "stopped with its process"),
    ],
)
def test_a_server_that_ends(kind: Any, how: str):
    """Everybody who waits is told, whoever calls lives on, and another server takes over."""
    transport = MonarchTransport(kind)

    async def main() -> None:
        async with new_procs() as procs:  # Monarch spawns nothing more where an actor has failed
            await ask(procs)

    async def ask(procs: Any) -> None:
        client = transport.client()
        asking = procs.spawn("asking", Asking, transport.client())
        pid = await done(asking.pid.call_one())
        async with new_procs(before=int((kind, how) == ("rpc", "killed"))) as others:
            serving = others.spawn("serving", Serving)
            server_pid = await done(serving.serve.call_one(transport, hold=True))
            waiting = [client.submit(row(value)) for value in range(4)]
            theirs = [asyncio.create_task(done(asking.ask.call_one(v))) for v in range(4)]
            await done(serving.entered.call_one())
            if how == "killed":
                os.kill(server_pid, signal.SIGKILL)
            elif how == "stopped":
                await done(serving.stop())
            else:
                await done(others.stop())
            errors = await outcomes(*waiting)
            assert {type(error) for error in errors} <= {ServerDiedError, ServerClosedError}
            names = set(await asyncio.gather(*theirs))
            assert names <= {"ServerDiedError", "ServerClosedError"}
            for _ in range(3):
                assert str(await done(asking.ask.call_one(1))).startswith("Server")
                assert isinstance((await outcomes(client(row(1))))[0], Exception)
        assert await done(asking.pid.call_one()) == pid
        async with InferenceServer(doubling(), transport):
            assert await done(asking.ask.call_one(2)) == 4
            assert action(await within(client(row(3)))) == 6

    asyncio.run(main())


def test_who_made_the_transport_is_stopped_with_its_process():
    """Clients that look for a server are told that its process has gone."""

    async def main() -> None:
        procs = this_host().spawn_procs(per_host={"procs": 2})
        serving = procs.slice(procs=1).spawn("serving", Serving)
        client = (await done(serving.make.call_one("rpc"))).client()
        with pytest.raises(ServerClosedError):
            await within(client(row(1)))
        await done(procs.stop())
        with pytest.raises(ServerDiedError, match="must outlive its use"):
            await within(client(row(1)))

    asyncio.run(main())


def test_who_made_the_transport_is_killed():
    """In calls too, who waits for a server there is told, and a server elsewhere can be closed."""

    async def main() -> None:
        async with new_procs(before=1) as procs:
            serving = procs.spawn("serving", Serving)
            here, there = [await done(serving.make.call_one("rpc")) for _ in range(2)]
            pid = await done(serving.serve.call_one(there, hold=True))
            waiting = [there.client().submit(row(value)) for value in range(4)]
            await done(serving.entered.call_one())
            async with InferenceServer(doubling(), here):
                client = here.client()
                assert action(await within(client(row(1)))) == 2
                os.kill(pid, signal.SIGKILL)
                assert {type(error) for error in await outcomes(*waiting)} == {ServerDiedError}
                assert action(await within(client(row(2)))) == 4  # who has found it needs no more
            with pytest.raises(ServerDiedError, match="must outlive its use"):
                await within(there.client()(row(1)))
            with pytest.raises(ServerDiedError, match="must outlive its use"):
                async with InferenceServer(doubling(), here):
                    pass

    asyncio.run(main())


# -- a server on a mesh -------------------------------------------------------


def test_a_server_with_replicas(procs: Any):
    """Actors and driver use several processes; one that is killed is not missed."""

    async def main() -> None:
        server = MonarchInferenceServer(WithPid, per_host={"replicas": 2}, room=2)
        asking = procs.spawn("asking", Asking, server.client())
        async with server:
            client = server.client()
            assert await done(asking.ask_many.call_one(50))
            burst = await outcomes(*(client.submit(row(value)) for value in range(20)))
            assert [action(reply) for reply in burst] == [2 * value for value in range(20)]
            pids = [int((await within(t.client()(row(0))))["pid"]) for t in server._transports]
            assert {int(reply["pid"]) for reply in burst} == set(pids)
            stats = await within(server.astats(reset=True))
            assert sum(of_replica.rows for of_replica in stats.values()) == 74
            versions = await within(server.aload_state_dict({"weight": torch.tensor(3.0)}))
            assert versions == {0: 1, 1: 1}
            assert await done(asking.ask.call_one(1)) == 3
            waiting = [client.submit(row(value)) for value in range(20)]
            os.kill(pids.pop(), signal.SIGKILL)  # its actor is not the first of its mesh
            replies = await outcomes(*waiting, *(client.submit(row(v)) for v in range(20)))
            assert [action(reply) for reply in replies] == [3 * value for value in range(20)] * 2
            assert await done(asking.ask.call_one(2)) == 6
            assert {int((await within(client(row(1))))["pid"]) for _ in range(3)} == set(pids)
            assert await within(server.aload_state_dict({"weight": torch.tensor(4.0)})) == {0: 2}
            assert list(await within(server.astats())) == [0]
        with pytest.raises(ServerClosedError):
            await within(client(row(1)))
        with pytest.raises(ServerClosedError, match="not running"):
            await server.astats()

    asyncio.run(main())


def test_a_server_on_a_mesh_of_ones_own():
    """Started for threads on given processes, closed, and started again on them."""
    procs = this_host().spawn_procs(per_host={"procs": 2})
    try:
        server = MonarchInferenceServer(WithPid, procs, max_batch_size=4)
        for _ in range(2):
            with server:
                assert action(server.sync_client()(row(2))) == 4
                assert [(n, stats.rows) for n, stats in server.stats().items()] == [(0, 1), (1, 0)]
                with pytest.raises(RuntimeError, match="already running"):
                    server.start()
            assert not server.is_alive
        server.shutdown()
        broken = MonarchInferenceServer(broken_policy, procs)
        with pytest.raises(ZeroDivisionError, match="no policy today") as caught:
            broken.start()
        assert "broken_policy" in str(caught.value.__cause__)
        assert not broken.is_alive
        with server:  # the second one is killed while nobody asks it anything
            second = server._transports[1].sync_client()
            os.kill(int(second(row(1))["pid"]), signal.SIGKILL)
            with pytest.raises(ServerDiedError):
                while True:
                    second(row(1))
            assert list(server.stats()) == [0]
    finally:
        procs.stop().get(timeout=PATIENCE_S)


async def test_wrong_arguments_of_a_server():
    """What is wrong is refused with its name, before any process is started."""
    with pytest.raises(TypeError, match="policy_factory must be callable, got 3"):
        MonarchInferenceServer(3)
    with pytest.raises(ValueError, match="per_host=.* is for when no proc_mesh is given"):
        MonarchInferenceServer(WithPid, object(), per_host={"replicas": 1})
    with pytest.raises(ValueError, match="per_host must be at least 1, got 0"):
        MonarchInferenceServer(WithPid, per_host={"replicas": 0})
    with pytest.raises(TypeError, match="max_batch"):
        MonarchInferenceServer(WithPid, max_batch=3)
    server = MonarchInferenceServer(WithPid)
    with pytest.raises(RuntimeError, match="called on an event loop"):
        server.start()


@pytest.mark.parametrize(
    ("process", "host"),
    [
        ("local<uMeL9erV6H5>@ipc://@yFjMKol5GPrGaZRGiFH7rpEE", "127.0.0.1"),
        ("anon-0<8xGBg7d>@anon-0<8xGBg7d>.ipc://@epoMepxLA6RZucMHwlP0j8Yt", "127.0.0.1"),
        ("local<rcprDGqN2Ue>@tcp://[::1]:41287", "::1"),
        ("anon-0<rcprDGq>@anon-0<rcprDGq>.tcp://10.0.3.7:41287", "10.0.3.7"),
    ],
)
def test_where_the_server_listens(process: str, host: str):
    """On loopback where Monarch stays on the host, else where Monarch reaches the process."""
    assert _host_in(process) == host


# -- without Monarch ----------------------------------------------------------


def test_monarch_is_not_needed_until_it_is_used():
    """Importing the package imports neither Monarch nor anything that needs it."""
    code = (
        "import sys, aioinfer; "
        "assert not {name for name in sys.modules if name.partition('.')[0] == 'monarch'}; "
        "sys.modules['monarch.actor'] = sys.modules['monarch'] = None; "
        "aioinfer.MonarchTransport()"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "ImportError: MonarchTransport needs Monarch: pip install 'aioinfer[monarch]'" in (
        ended.stderr
    )


def test_arguments():
    """A wrong argument is refused with its name and value."""
    with pytest.raises(TypeError, match="log_faults must be a bool, got 1"):
        MonarchTransport(log_faults=1)
    with pytest.raises(ValueError, match="connection must be one of .* got 'tcp'"):
        MonarchTransport("tcp")
