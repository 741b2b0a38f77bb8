"""The server's constructor and its life in threads and processes."""

from __future__ import annotations

import asyncio
import gc
import math
import pickle
import signal
import textwrap
import threading
import weakref
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
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
    rows,
    seen,
    wait_until,
    within,
)
from programs import Program, Programs

from aioinfer import (
    AsyncioTransport,
    InferenceServer,
    ServerClosedError,
    ServerDiedError,
    ThreadingTransport,
)
from aioinfer.clock import MonotonicClock
from aioinfer.executor import ThreadExecutor
from aioinfer.testing import ManualClock, RecordingModel

# -- arguments --------------------------------------------------------------

BAD_ARGUMENTS = [
    ({"model": 3}, TypeError, ["model", "3", "callable"]),
    ({"model": None}, TypeError, ["model", "None", "callable"]),
    ({"transport": "auto"}, TypeError, ["transport", "'auto'", "InferenceTransport", "None"]),
    ({"transport": ThreadingTransport}, TypeError, ["transport", "InferenceTransport", "None"]),
    ({"transport": [ThreadingTransport(), None]}, TypeError, ["transport", "InferenceTransport"]),
    ({"transport": []}, ValueError, ["transport", "empty", "at least one"]),
    ({"transport": [AsyncioTransport()] * 2}, ValueError, ["transport", "twice"]),
    ({"max_batch_size": 0}, ValueError, ["max_batch_size", "0", "at least 1"]),
    ({"max_batch_size": -5}, ValueError, ["max_batch_size", "-5", "at least 1"]),
    ({"max_batch_size": 2.0}, TypeError, ["max_batch_size", "2.0", "int"]),
    ({"max_batch_size": True}, TypeError, ["max_batch_size", "True", "int"]),
    ({"max_batch_size": None}, TypeError, ["max_batch_size", "None", "int"]),
    ({"min_batch_size": 0}, ValueError, ["min_batch_size", "0", "at least 1"]),
    ({"min_batch_size": 1.5}, TypeError, ["min_batch_size", "1.5", "int"]),
    (
        {"min_batch_size": 9, "max_batch_size": 8},
        ValueError,
        ["min_batch_size", "9", "between 1 and max_batch_size=8"],
    ),
    ({"timeout": -0.1}, ValueError, ["timeout", "-0.1", ">= 0"]),
    ({"timeout": math.nan}, ValueError, ["timeout", "nan", ">= 0"]),
    ({"timeout": math.inf}, ValueError, ["timeout", "inf", "finite"]),
    ({"timeout": "10ms"}, TypeError, ["timeout", "10ms", "seconds"]),
    ({"timeout": False}, TypeError, ["timeout", "False", "seconds"]),
    ({"max_queue_size": 0}, ValueError, ["max_queue_size", "0", "at least 1"]),
    ({"max_queue_size": 2.5}, TypeError, ["max_queue_size", "2.5", "int"]),
    ({"collate_fn": "stack"}, TypeError, ["collate_fn", "stack", "callable"]),
    ({"device": "nonsense"}, ValueError, ["device", "nonsense"]),
    ({"output_device": "nonsense"}, ValueError, ["output_device", "nonsense"]),
    ({"policy_version": "one"}, TypeError, ["policy_version", "one", "int"]),
    ({"policy_version": True}, TypeError, ["policy_version", "True", "int"]),
    ({"policy_version_key": 3}, TypeError, ["policy_version_key", "3", "str"]),
    ({"policy_version_key": ("a", 3)}, TypeError, ["policy_version_key", "('a', 3)", "str"]),
    ({"policy_version_key": ()}, TypeError, ["policy_version_key", "()", "str"]),
    ({"objective": "speed"}, ValueError, ["objective", "speed", "throughput", "latency"]),
    ({"batch_sizes": []}, ValueError, ["batch_sizes", "[]", "ascending", "max_batch_size=64"]),
    ({"batch_sizes": [8, 4, 64]}, ValueError, ["batch_sizes", "[8, 4, 64]", "ascending"]),
    ({"batch_sizes": [4, 8]}, ValueError, ["batch_sizes", "[4, 8]", "max_batch_size=64"]),
    ({"batch_sizes": [0, 64]}, ValueError, ["batch_sizes", "0", "at least 1"]),
    ({"batch_sizes": 64}, TypeError, ["batch_sizes", "64"]),
]


@pytest.mark.parametrize(
    ("options", "error", "said"),
    BAD_ARGUMENTS,
    ids=[f"{next(iter(bad[0]))}-{number}" for number, bad in enumerate(BAD_ARGUMENTS)],
)
def test_a_bad_argument_is_named(options: dict[str, Any], error: type[Exception], said: list[str]):
    """A bad argument is an error that names it, what was given, and what is allowed."""
    with pytest.raises(error) as caught:
        InferenceServer(**{"model": doubling(), **options})
    assert type(caught.value) is error
    for words in said:
        assert words in str(caught.value)


def test_a_bad_timeout_of_shutdown_is_named():
    """``shutdown(timeout=...)`` checks its argument, and the server goes on."""
    with InferenceServer(doubling()) as server:
        for timeout, error in ((-1, ValueError), (math.nan, ValueError), ("5", TypeError)):
            with pytest.raises(error, match="timeout"):
                server.shutdown(timeout)
        assert action(server.sync_client()(row(1))) == 2


def test_batches_no_larger_than_one():
    """The smallest bounds there are work together."""
    options = {"max_batch_size": 1, "min_batch_size": 1, "max_queue_size": 1, "timeout": 0}
    with InferenceServer(doubling(), **options) as server:
        client = server.sync_client()
        assert action(client(rows([1, 2, 3]))) == [2, 4, 6]


def test_a_very_long_timeout_is_no_timeout():
    """A timeout of decades is accepted wherever a timeout is."""
    decades = 1e9
    with InferenceServer(doubling(), timeout=decades, min_batch_size=1) as server:
        client = server.sync_client()
        assert action(client(row(1), timeout=decades)) == 2
        assert action(client.submit(row(2), timeout=decades).result(PATIENCE_S)) == 4


@pytest.mark.parametrize(
    "make", [AsyncioTransport, ThreadingTransport, lambda: InferenceServer(doubling())]
)
def test_clients_of_this_process_stay_in_it(make: Any):
    """What cannot be sent to another process says so, instead of failing over there."""
    source = make()
    things = [source.async_client(), source.sync_client()]
    if not isinstance(source, InferenceServer):
        things.append(source)
    for thing in things:
        with pytest.raises(TypeError, match="another process"):
            pickle.dumps(thing)


# -- life in threads --------------------------------------------------------


def test_start_and_shutdown():
    """``start()`` returns the running server, ``shutdown()`` ends it; again and again."""
    transport = ThreadingTransport()
    server = InferenceServer(doubling(), transport)
    client = transport.client()
    for value in (1, 2, 3):
        assert not server.is_alive
        assert server.start() is server
        assert server.is_alive
        assert action(client(row(value))) == 2 * value
        server.shutdown()
    assert not server.is_alive
    with pytest.raises(ServerClosedError):
        client(row(1))


def test_with():
    """``with`` starts and ends the server, and lets an error of the block out."""
    server = InferenceServer(doubling())
    with pytest.raises(ZeroDivisionError), server as entered:
        assert entered is server
        assert action(server.sync_client()(row(1))) == 2
        raise ZeroDivisionError
    assert not server.is_alive


def test_shutdown_is_harmless():
    """Shutting down before a start, twice, and with any timeout does nothing more."""
    server = InferenceServer(doubling())
    server.shutdown()
    server.shutdown(timeout=1)
    server.start()
    server.shutdown()
    server.shutdown()
    server.shutdown(timeout=0)
    server.shutdown(drain=False)


def test_starting_twice():
    """A second ``start()`` is an error and does not disturb the first, nor leave anything."""
    with InferenceServer(doubling()) as server:
        with pytest.raises(RuntimeError, match="already running"):
            server.start()
        assert action(server.sync_client()(row(1))) == 2


def test_a_start_that_fails_leaves_nothing():
    """If the transport is taken, ``start()`` raises and no thread of it stays."""
    transport = ThreadingTransport()
    with InferenceServer(doubling(), transport):
        before = threading.active_count()
        second = InferenceServer(doubling(), transport)
        with pytest.raises(RuntimeError, match="already serves"):
            second.start()
        wait_until(lambda: threading.active_count() == before, "the end of its threads")
        assert not second.is_alive
        second.shutdown()


def test_the_loop_in_the_background():
    """The server of ``start()`` runs on a loop of its own, uvloop where it is installed."""
    loops = []

    class Clock(MonotonicClock):
        def call_at(self, loop: Any, when: float, callback: Any) -> Any:
            loops.append(loop)
            return super().call_at(loop, when, callback)

    with InferenceServer(doubling(), clock=Clock()) as server:
        server.sync_client().submit(row(1), timeout=5).result(PATIENCE_S)
    try:
        from uvloop import Loop
    except ImportError:
        from asyncio import AbstractEventLoop as Loop
    assert loops
    assert all(isinstance(loop, Loop) for loop in loops)


def test_shutdown_drains():
    """``shutdown()`` answers what was accepted and refuses what comes later."""
    model = RecordingModel()
    with InferenceServer(model, max_batch_size=2) as server:
        client = server.sync_client()
        with model.held():
            accepted = [client.submit(row(value)) for value in range(6)]
            model.wait_until_entered()
            closing = InThread(server.shutdown)
            wait_until(lambda: _refused(client, accepted), "a refusal")
            assert not closing.done
        closing.result()
        assert [action(future.result(0)) for future in accepted] == [
            2 * value for value in range(len(accepted))
        ]


def _refused(client: Any, accepted: list[Future[Any]]) -> bool:
    try:
        accepted.append(client.submit(row(len(accepted))))
    except ServerClosedError:
        return True
    return False


def test_shutdown_with_a_timeout():
    """``shutdown(timeout)`` does not wait for a stuck forward; whoever waits is told."""
    model = RecordingModel()
    server = InferenceServer(model).start()
    with model.held():
        client = server.sync_client()
        first = client.submit(row(0))
        model.wait_until_entered()
        waiting = [client.submit(row(1)), client.submit(rows(range(100)))]
        InThread(server.shutdown, timeout=0.05).result()  # the forward is still held
        errors = [future.exception(PATIENCE_S) for future in (first, *waiting)]
        assert {type(error) for error in errors} == {ServerClosedError}
        assert len({id(error) for error in errors}) == len(errors)
        assert not server.is_alive
    assert seen(model) == [[0]]


def test_starting_after_a_stuck_forward_never_runs_two():
    """After ``shutdown(timeout)`` over a stuck forward, ``start()`` waits for that forward."""
    model = RecordingModel()
    server = InferenceServer(model)
    client = server.sync_client()
    with model.held():
        server.start()
        stuck = client.submit(row(0))
        model.wait_until_entered()
        for life in range(1, 4):
            InThread(server.shutdown, timeout=0.01).result()
            assert type(stuck.exception(PATIENCE_S)) is ServerClosedError
            server.start()
            stuck = client.submit(row(life))
        assert seen(model) == [[0]]
    assert action(stuck.result(PATIENCE_S)) == 6
    server.shutdown()
    assert model.most_at_once == 1
    assert seen(model)[-1] == [3]


def test_an_update_between_two_lives_never_meets_a_forward():
    """An update that waits for a stuck forward runs before or after those of the next life."""
    events: list[str] = []
    model = RecordingModel(lambda td: (events.append("forward"), td)[1])

    def update(_: Any) -> None:
        events.append("update begins")
        threading.Event().wait(0.05)
        events.append("update ends")

    server = InferenceServer(model).start()
    client = server.sync_client()
    with model.held():
        client.submit(row(0))
        model.wait_until_entered()
        InThread(server.shutdown, timeout=0.01).result()
        updating = InThread(server.update_model, update)
        wait_until(lambda: updating.thread.is_alive())
        server.start()
        answers = [client.submit(row(value)) for value in (1, 2)]
    updating.result()
    for answer in answers:
        answer.result(PATIENCE_S)
    server.shutdown()
    begins = events.index("update begins")
    assert events[begins + 1] == "update ends", events


def test_shutdown_from_two_threads():
    """Threads that shut down at the same time all return, when the server has ended."""
    model = RecordingModel()
    server = InferenceServer(model).start()
    client = server.sync_client()
    with model.held():
        first = client.submit(row(1))
        model.wait_until_entered()
        threads = [InThread(server.shutdown) for _ in range(4)]
    for thread in threads:
        thread.result()
    assert action(first.result(0)) == 2
    assert not server.is_alive


def test_shutdown_under_load():
    """While threads keep asking, a shutdown answers or refuses each call; nobody hangs."""
    server = InferenceServer(doubling(), ThreadingTransport(), max_batch_size=4)

    def actor(number: int) -> int:
        client = server.client()
        answered = 0
        while True:
            try:
                assert action(client(row(number))) == 2 * number
            except ServerClosedError:
                return answered
            answered += 1

    for _ in range(5):
        server.start()
        actors = [InThread(actor, number) for number in range(6)]
        wait_until(lambda: server.stats().requests > 20, "some traffic")
        server.shutdown()
        assert sum(thread.result() for thread in actors) > 0


def test_a_server_in_asyncio_is_shut_down_from_a_thread():
    """``shutdown()`` in a thread closes a server that runs on somebody's event loop."""

    async def main() -> None:
        server = InferenceServer(doubling())
        async with server:
            assert action(await server.async_client()(row(1))) == 2
            await InThread(server.shutdown)
            assert not server.is_alive
            with pytest.raises(ServerClosedError):
                await server.async_client()(row(1))

    asyncio.run(main())


async def test_what_would_block_the_servers_loop_is_an_error():
    """``update_model`` and ``shutdown`` on the server's own loop name what to await instead."""
    async with InferenceServer(doubling()) as server:
        with pytest.raises(RuntimeError, match="await aupdate_model"):
            server.update_model(lambda policy: None)
        with pytest.raises(RuntimeError, match="await aclose"):
            server.shutdown()
        assert server.policy_version == 0
        assert action(await server.async_client()(row(1))) == 2


def test_what_would_wait_for_itself_is_an_error():
    """An update that shuts its own server down would wait for itself: an error instead."""
    server = InferenceServer(doubling()).start()
    updating = InThread(server.update_model, lambda policy: server.shutdown())
    with pytest.raises(RuntimeError):
        updating.result()
    assert action(server.sync_client()(row(1))) == 2
    server.shutdown()


def test_an_update_within_an_update():
    """An update may update: it is already where updates run."""
    with InferenceServer(doubling()) as server:
        inner = InThread(
            server.update_model, lambda policy: server.update_model(lambda policy: "done")
        )
        assert inner.result() == "done"
        assert server.policy_version == 2


def test_a_closed_server_can_be_forgotten():
    """Nothing keeps a server that was shut down and dropped, nor its policy."""
    policy = torch.nn.Linear(3, 3)
    server = InferenceServer(lambda td: td.set("action", policy(td["observation"])))
    with server:
        server.sync_client()(row(1))
    forgotten = weakref.ref(server)
    del server
    wait_until(lambda: gc.collect() >= 0 and forgotten() is None, "the server to be gone")


# -- a server that fails ----------------------------------------------------


class _Broken(ThreadExecutor):
    """An executor that fails, in a way that no policy can make it."""

    broken = True

    def submit(self, batch: Any) -> None:
        if self.broken:
            raise ZeroDivisionError("an error of the library itself")
        super().submit(batch)


def test_a_server_that_dies_tells_everybody(logged_errors: list[str]):
    """An error of the server itself is told to all who wait, with its cause, and logged."""
    executor = _Broken()
    server = InferenceServer(doubling(), executor=executor, min_batch_size=3, timeout=60)
    server.start()
    client = server.sync_client()
    errors = [future.exception(PATIENCE_S) for future in [client.submit(row(1)) for _ in range(3)]]
    assert {type(error) for error in errors} == {ServerDiedError}
    assert len({id(error) for error in errors}) == len(errors)
    assert all(type(error.__cause__) is ZeroDivisionError for error in errors if error)
    wait_until(lambda: not server.is_alive, "the end of the server")
    with pytest.raises((ServerDiedError, ServerClosedError)):
        client(row(1))
    assert len(logged_errors) == 1
    assert "an error of the library itself" in logged_errors[0]
    logged_errors.clear()
    executor.broken = False
    server.start()  # without a shutdown in between
    assert [action(client(rows([1, 2, 3])))] == [[2, 4, 6]]
    server.shutdown()


async def test_a_server_that_dies_in_asyncio(logged_errors: list[str]):
    """The same on the callers' own loop; leaving ``async with`` is harmless."""
    executor = _Broken()
    async with InferenceServer(doubling(), executor=executor) as server:
        client = server.async_client()
        errors = await outcomes(
            client(row(1)), client(row(2)), InThread(server.sync_client(), row(3))
        )
        for error in errors:
            assert isinstance(error, ServerDiedError | ServerClosedError)
        assert any(isinstance(error, ServerDiedError) for error in errors)
        assert not server.is_alive
    logged_errors.clear()
    executor.broken = False
    async with server:
        assert action(await within(client(row(4)))) == 8


# -- without waste ----------------------------------------------------------


async def test_an_idle_server_does_nothing():
    """A server that nobody asks reads no clock and arms no timer, however long."""
    ticks = 0

    class Clock(ManualClock):
        def __call__(self) -> float:
            nonlocal ticks
            ticks += 1
            return super().__call__()

    clock = Clock()
    async with InferenceServer(doubling(), clock=clock, timeout=0) as server:
        clients = [server.async_client() for _ in range(4)]
        await outcomes(*(client(row(1)) for client in clients))
        before = ticks
        for _ in range(200):
            await asyncio.sleep(0)
        assert ticks == before
        assert clock.timers == []


# -- life in processes ------------------------------------------------------


_PRELUDE = """
    import asyncio, os, signal, sys, threading
    import torch
    from tensordict import TensorDict
    from aioinfer import InferenceServer, ThreadingTransport

    def row(value):
        return TensorDict({"observation": torch.full((3,), float(value))})

    def double(td):
        return TensorDict({"action": td["observation"] * 2}, td.batch_size)
"""


@pytest.fixture
def run(programs: Programs, tmp_path: Path) -> Callable[[str], Program]:
    """Run a script in a process of its own."""

    def run(script: str) -> Program:
        path = tmp_path / "script.py"
        path.write_text(textwrap.dedent(_PRELUDE) + textwrap.dedent(script), encoding="utf-8")
        return programs.start(path, strict=False)

    return run


def test_a_program_that_forgets_shutdown_ends(run: Callable[[str], Program]):
    """A program ends by itself and cleanly over a server it forgot, and actors that still ask."""
    program = run("""
        server = InferenceServer(double).start()
        client = server.sync_client()
        asked = row(1)  # a daemon thread that is inside of torch takes the program down with it

        def actor():
            while True:
                client(asked)

        threading.excepthook = lambda *_: None  # actors are told that the server is closed
        for _ in range(3):
            threading.Thread(target=actor, daemon=True).start()
        print(client(row(1))["action"].tolist())
    """)
    result = program.result()
    assert (result.returncode, result.stdout.strip(), result.stderr) == (0, "[2.0, 2.0, 2.0]", "")


def test_a_program_with_a_stuck_forward_ends(run: Callable[[str], Program]):
    """A program ends by itself even if the policy of a server that it forgot never returns."""
    program = run("""
        from aioinfer import executor

        executor._JOIN_S = 0.1  # seconds in which it might have returned
        entered = threading.Event()

        def stuck(td):
            entered.set()
            threading.Event().wait()

        server = InferenceServer(stuck).start()
        future = server.sync_client().submit(row(1))
        entered.wait()
        print("leaving")
    """)
    result = program.result()
    assert (result.returncode, result.stdout.strip()) == (0, "leaving"), result.stderr


def test_a_loop_that_is_left_running_ends_with_the_program(run: Callable[[str], Program]):
    """A program whose ``asyncio.run`` ended without closing the server ends cleanly."""
    program = run("""
        async def main():
            server = await InferenceServer(double).__aenter__()
            print((await server.async_client()(row(1)))["action"].tolist())

        asyncio.run(main())
    """)
    result = program.result()
    assert (result.returncode, result.stdout.strip(), result.stderr) == (0, "[2.0, 2.0, 2.0]", "")


@pytest.mark.parametrize("kind", ["thread", "asyncio"])
def test_ctrl_c(kind: str, run: Callable[[str], Program]):
    """Ctrl-C ends a program that waits for an answer, quickly and with a traceback of its own.

    Pitfall 32.
    """
    program = run(f"""
        go = threading.Event()

        def slow(td):
            print("entered", flush=True)
            go.wait(1)
            return double(td)

        async def main():
            async with InferenceServer(slow) as server:
                await server.async_client()(row(1))

        if {kind!r} == "thread":
            with InferenceServer(slow) as server:
                server.sync_client()(row(1))
        else:
            asyncio.run(main())
    """)
    assert program.stdout.readline() == "entered\n"
    program.kill(signal.SIGINT)
    result = program.result()
    assert result.returncode in (1, -signal.SIGINT, 130)
    assert result.stderr.rstrip().endswith("KeyboardInterrupt")


def test_started_again_by_who_learns_that_its_loop_was_closed(logged_errors: list[str]):
    """A caller that is told, and starts the server again at once, meets no half-ended executor."""
    model, transport = RecordingModel(), ThreadingTransport()
    server = InferenceServer(model, transport)
    client = transport.sync_client()
    loop = asyncio.new_event_loop()
    loop.run_until_complete(server.__aenter__())

    started = threading.Event()

    def start_again(told: Future[Any]) -> None:
        assert isinstance(told.exception(), ServerDiedError)
        InThread(server.start).result()  # before who tells it does anything else
        started.set()

    with model.held():
        first = InThread(client, row(0))
        loop.run_until_complete(model.entered())
        second = client.submit(row(1))
        second.add_done_callback(start_again)
        loop.close()
    assert action(first.result()) == 0
    assert started.wait(PATIENCE_S)
    assert action(InThread(client, row(3)).result()) == 6
    server.shutdown()
    gc.collect()
    assert all("Task was destroyed" in error for error in logged_errors)
    logged_errors.clear()
