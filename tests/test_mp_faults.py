"""MPTransport when the server's loop goes, when nobody reads, and when everything goes wrong."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import multiprocessing
import os
import random
import signal
from collections.abc import Callable
from typing import Any

import pytest
import torch
from children import Child, Said
from conformance.hooks import both_loops
from helpers import PATIENCE_S, InThread, action, row, rows, until, wait_until, within
from tensordict import NonTensorData, TensorDict, TensorDictBase

from aioinfer import (
    InferenceError,
    InferenceServer,
    InvalidRequestError,
    ModelError,
    MPTransport,
    ProcessInferenceServer,
    SyncInferenceClient,
)
from aioinfer.signature import describe
from aioinfer.testing import RecordingModel
from aioinfer.transports import channel, channeled, wire
from aioinfer.transports.wire.payload import pack_described, unpack_object

pytestmark = [
    pytest.mark.timeout(60),
    # Python warns of what can happen; that it does not is what is tested here.
    pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning"),
]

FORK = multiprocessing.get_context("fork")
LARGE = 60_000

NewLoop = Callable[[], asyncio.AbstractEventLoop]


def doubled(td: TensorDictBase) -> TensorDictBase:
    """A policy that has nothing to say about negative observations."""
    if bool((td["observation"] < 0).any()):
        raise ValueError("negative")
    return TensorDict({"action": td["observation"] * 2}, td.batch_size)


# -- the server's loop is closed under it -------------------------------------


def ask_whenever_told(said: Said, client: SyncInferenceClient) -> None:
    """Ask what one is told to ask, and say what came of it."""
    while True:
        value = said.hear()
        said.say("asking")
        try:
            said.say(action(client(row(value))))
        except InferenceError as error:
            said.say(type(error).__name__)


@both_loops
def test_the_loop_is_closed_under_the_server(new_loop: NewLoop, logged_errors: list[str]):
    """Who waits in another process is told, and so is who asks later; a new server serves them."""
    transport = MPTransport()
    server = InferenceServer(doubled, transport)
    with Child(ask_whenever_told, transport.sync_client()) as child:
        loop = new_loop()
        loop.run_until_complete(server.__aenter__())
        child.pipe.send(1.0)
        assert child.hear() == "asking"  # nobody reads it: the loop does not run
        loop.close()
        assert child.hear() in ("ServerDiedError", "ServerClosedError")
        assert child.ask(2.0) == "asking"
        assert child.hear() == "ServerClosedError"
        with server:
            assert child.ask(3.0) == "asking"
            assert child.hear() == 6
    gc.collect()
    assert all("Task was destroyed" in error for error in logged_errors)
    logged_errors.clear()


@both_loops
def test_the_loop_is_closed_during_a_forward(new_loop: NewLoop, logged_errors: list[str]):
    """What is being computed is still answered; who waits behind it is told, and who comes."""
    transport, model = MPTransport(), RecordingModel()
    server = InferenceServer(model, transport)
    with (
        Child(ask_whenever_told, transport.sync_client()) as running,
        Child(ask_whenever_told, transport.sync_client()) as queued,
    ):
        loop = new_loop()
        loop.run_until_complete(server.__aenter__())
        with model.held():
            assert running.ask(1.0) == "asking"
            loop.run_until_complete(model.entered())
            assert queued.ask(2.0) == "asking"
            loop.run_until_complete(until(lambda: server.stats().queue_depth == 1, "the request"))
            loop.close()
        assert running.hear() == 2
        assert queued.hear() == "ServerDiedError"
        for child in (running, queued):
            assert child.ask(3.0) == "asking"
            assert child.hear() in ("ServerDiedError", "ServerClosedError")
        with server:
            assert running.ask(4.0) == "asking"
            assert running.hear() == 8
    gc.collect()
    assert all("Task was destroyed" in error for error in logged_errors)
    logged_errors.clear()


# -- too much -----------------------------------------------------------------


async def test_submitting_without_end(monkeypatch: pytest.MonkeyPatch):
    """Of what threads submit only so much is under way; who submits more waits, or is too late."""
    monkeypatch.setattr(channeled, "MAX_SUBMITTED", 4)
    model = RecordingModel()
    async with InferenceServer(model, transport := MPTransport()):
        client = transport.sync_client()
        with model.held():
            futures = [await InThread(client.submit, row(value)) for value in range(4)]
            patient = InThread(client.submit, row(4))
            with pytest.raises(TimeoutError):
                await InThread(client.submit, row(9), timeout=0.01)
            await patient.blocked()
        futures.append(await patient)
        answers = [await within(asyncio.wrap_future(future)) for future in futures]
        assert [action(answer) for answer in answers] == [0, 2, 4, 6, 8]
        assert transport._submitted.count == 0


async def test_a_server_that_does_not_read():
    """What does not fit into the pipe waits outside of it, and the loop of its caller runs on."""
    async with ProcessInferenceServer(lambda: doubled, MPTransport(FORK)) as server:
        client = server.async_client()
        assert action(await within(client(row(1)))) == 2
        assert server.pid is not None
        os.kill(server.pid, signal.SIGSTOP)
        try:
            inline = {"observation": torch.full((4000,), 3.0)}
            waiting = [client.submit(TensorDict(inline)) for _ in range(200)]  # 3.2 MB
            timed_out = client.submit(row(2), timeout=0.01)
            with pytest.raises(TimeoutError):
                await within(timed_out)
            assert not any(future.done() for future in waiting)
        finally:
            os.kill(server.pid, signal.SIGCONT)
        answers = await within(asyncio.gather(*waiting))
        assert all(action(answer) == 6 for answer in answers)


def test_sparse_tensors_are_not_kept():
    """torch keeps what was unpickled until it was checked; here it is checked at once."""
    td = TensorDict({"observation": torch.eye(3).to_sparse()}, [3])
    packed = pack_described(*describe(td, None))
    before = len(torch._utils._sparse_tensors_to_validate)
    buffer = bytearray(b"".join(packed.buffers))
    assert unpack_object(buffer)["observation"].to_dense().equal(torch.eye(3))
    assert len(torch._utils._sparse_tensors_to_validate) == before == 0


# -- the short way of a thread's call -----------------------------------------


def interrupted(said: Said, client: SyncInferenceClient) -> None:
    """Be interrupted while waiting, then ask on."""
    assert action(client(row(1))) == 2
    said.say("ready")
    said.hear()
    with contextlib.suppress(KeyboardInterrupt):
        client(row(5))
        raise AssertionError("not interrupted")
    said.say("interrupted")
    for value in range(3):
        assert action(client(row(value))) == 2 * value


def test_a_call_is_interrupted():
    """After Ctrl-C the same client asks on, and nobody else's answer is its own."""
    transport, model = MPTransport(), RecordingModel()
    with InferenceServer(model, transport), Child(interrupted, transport.sync_client()) as child:
        assert child.hear() == "ready"
        with model.held():
            child.pipe.send("go")
            model.wait_until_entered()
            os.kill(child.process.pid, signal.SIGINT)
            assert child.hear() == "interrupted"
        assert child.hear() is None


def changing(said: Said, client: SyncInferenceClient) -> None:
    """Ask for answers of other sizes and kinds in turn, with errors in between."""
    for turn in range(3):
        for width in (3, 5000, 40_000, 7):
            assert client(row(turn, width))["action"].tolist() == [2.0 * turn] * width
        assert action(client(rows([turn, 7]))) == [2 * turn, 14]
        with contextlib.suppress(ModelError):
            client(row(-1))
            raise AssertionError("no error")
        assert action(client(row(turn))) == 2 * turn


def test_answers_of_changing_sizes():
    """Whatever the last answer looked like, the next one is read as what it is."""
    transport = MPTransport()
    with InferenceServer(doubled, transport), Child(changing, transport.sync_client()) as child:
        assert child.hear() is None


# -- chaos --------------------------------------------------------------------


def wreak_havoc(said: Said, transport: MPTransport, seed: int, *, deadly: bool) -> int:
    """Ask, cancel, time out, send what cannot be served, perhaps die; check every answer."""
    said.hear()
    chance = random.Random(seed)
    handle = channel.Channel._handle

    def counting(self: Any, kind: wire.Kind, body: bytearray) -> None:
        if kind in (wire.Kind.REPLY, wire.Kind.ERROR, wire.Kind.DROPPED):
            ends = vars(self).setdefault("_ends", set())
            number = bytes(body[:8])
            assert number not in ends, "answered twice"
            ends.add(number)
        handle(self, kind, body)

    channel.Channel._handle = counting  # type: ignore[method-assign]  # this process is a fork
    resolved = asyncio.run(_havoc(transport, chance, deadly))
    client = transport.sync_client()
    for value in range(5):
        assert action(client(row(value))) == 2 * value
    return resolved


async def _havoc(transport: MPTransport, chance: random.Random, deadly: bool) -> int:
    client = transport.async_client()
    resolved = 0
    last = chance.randrange(10, 40) if deadly else 40
    under_way: list[tuple[Any, Any]] = []
    for step in range(41):
        if step == last:
            if deadly:
                os.kill(os.getpid(), signal.SIGKILL)
            break
        value = chance.randrange(1000)
        what = chance.choice(["row", "row", "rows", "large", "negative", "unpicklable", "empty"])
        timeout = chance.choice([None, None, None, 0.0, 1e-4, 30.0])
        expected: Any
        if what == "rows":
            values = [value, *[chance.randrange(1000) for _ in range(chance.randrange(40))]]
            td, expected = rows(values), [2 * v for v in values]
        elif what == "large":
            td, expected = row(value, LARGE), 2 * value
        elif what == "negative":
            td, expected = row(-1 - value), ModelError
        elif what == "unpicklable":
            td, expected = row(value), InvalidRequestError
            td["name"] = NonTensorData(lambda: None)
        elif what == "empty":
            td, expected = TensorDict({"other": torch.ones(3)}), ModelError
        else:
            td, expected = row(value), 2 * value
        try:
            future = client.submit(td, timeout=timeout, priority=chance.randrange(-1, 2))
        except InvalidRequestError:
            assert expected is InvalidRequestError
            resolved += 1
            continue
        if chance.random() < 0.15:
            future.cancel()
        elif chance.random() < 0.5:
            resolved += await _check(future, expected, timeout)
        else:
            under_way.append((future, (expected, timeout)))
    for future, (expected, timeout) in under_way:
        resolved += await _check(future, expected, timeout)
    return resolved


async def _check(future: Any, expected: Any, timeout: float | None) -> int:
    answer: Any
    try:
        answer = await within(future)
    except TimeoutError:
        answer = TimeoutError
    except InferenceError as error:
        answer = type(error)
    else:
        answer = action(answer)
    if answer is TimeoutError:
        assert timeout in (0.0, 1e-4)
    else:
        assert answer == expected
    return 1


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("place", ["here", "in a process"])
def test_chaos(place: str, seed: int):
    """Every accepted request of a live client is resolved once, with its own rows or its error."""
    transport = MPTransport(FORK)
    server: Any
    if place == "here":
        server = InferenceServer(doubled, transport, max_batch_size=16)
    else:
        server = ProcessInferenceServer(lambda: doubled, transport, max_batch_size=16)
    with contextlib.ExitStack() as stack:
        actors = [
            stack.enter_context(
                Child(wreak_havoc, transport, 100 * seed + number, deadly=number % 3 == 2)
            )
            for number in range(6)
        ]
        stack.enter_context(server)
        for actor in actors:
            actor.pipe.send("go")
        for number, actor in enumerate(actors):
            if number % 3 == 2:
                actor.process.join(PATIENCE_S)
                assert actor.process.exitcode == -signal.SIGKILL
            else:
                assert actor.hear(30) > 0
        assert action(transport.sync_client()(row(3))) == 6
        assert server.stats().queue_depth == 0
        if place == "here":
            wait_until(lambda: len(transport._peers) <= 1, "the end of the connections")
