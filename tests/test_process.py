"""ProcessInferenceServer: a policy built and served in a process of its own."""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import pickle
import signal
from multiprocessing import resource_tracker
from typing import Any

import pytest
import torch
from helpers import action, outcomes, row, wait_until, within
from tensordict.nn import TensorDictModule
from torch import nn

from aioinfer import (
    AsyncioTransport,
    MPTransport,
    ProcessInferenceServer,
    ServerClosedError,
    ServerDiedError,
)

FORK = multiprocessing.get_context("fork")

# Spawning starts a helper process that outlives the test; it is no leak of ours.
resource_tracker.ensure_running()

pytestmark = [pytest.mark.timeout(60)]


def scaling(factor: float = 2.0) -> TensorDictModule:
    layer = nn.Linear(3, 3, bias=False).requires_grad_(False)
    layer.weight.copy_(factor * torch.eye(3))
    return TensorDictModule(layer, in_keys=["observation"], out_keys=["action"])


def large() -> TensorDictModule:
    """A policy of 4 MB."""
    layer = nn.Linear(1000, 1000)
    return TensorDictModule(layer, in_keys=["observation"], out_keys=["action"])


def broken() -> Any:
    raise LookupError("no such checkpoint")


def deadly() -> Any:
    return TensorDictModule(lambda x: os._exit(7), in_keys=["observation"], out_keys=["action"])


def stuck() -> Any:
    signal.pause()


def served(factory: Any = scaling, **options: Any) -> ProcessInferenceServer:
    return ProcessInferenceServer(factory, MPTransport(FORK), **options)


class TestLife:
    """Starting and ending."""

    def test_in_threads(self) -> None:
        """It serves sync clients, counts, and can be started again for the same clients."""
        server = served()
        client = server.sync_client()
        for _ in range(2):
            with server:
                assert server.is_alive
                assert server.pid not in (None, os.getpid())
                assert action(client(row(3))) == 6
                assert server.stats(reset=True).requests == 1
                assert server.stats().requests == 0
            assert not server.is_alive
            assert server.pid is None
            with pytest.raises(ServerClosedError):
                client(row(1))
            with pytest.raises(ServerClosedError):
                server.stats()
        server.shutdown()

    async def test_in_asyncio(self) -> None:
        """It serves coroutines, and starts and ends without blocking their loop."""
        async with served() as server:
            client = server.async_client()
            answers = await within(asyncio.gather(*[client(row(i)) for i in range(50)]))
            assert [action(answer) for answer in answers] == [2 * i for i in range(50)]
            assert (await server.astats()).requests == 50

    def test_spawned(self) -> None:
        """By default the child is spawned."""
        server = ProcessInferenceServer(scaling)
        assert server._ctx.get_start_method() == "spawn"
        with server:
            assert action(server.sync_client()(row(2))) == 4

    def test_twice(self) -> None:
        """A server that runs cannot be started."""
        with served() as server, pytest.raises(RuntimeError, match="already running"):
            server.start()

    def test_two_servers_of_one_transport(self) -> None:
        """The second is told that the transport is taken."""
        with served() as server, pytest.raises(RuntimeError, match="one server at a time"):
            ProcessInferenceServer(scaling, server.transport).start()


class TestWrong:
    """What is refused, and what fails."""

    def test_arguments(self) -> None:
        """Wrong arguments are refused before there is a process."""
        with pytest.raises(TypeError, match="policy_factory"):
            ProcessInferenceServer(None)  # type: ignore[arg-type]
        with pytest.raises(TypeError, match="MPTransport"):
            ProcessInferenceServer(scaling, AsyncioTransport())  # type: ignore[arg-type]
        with pytest.raises(ValueError, match="max_batch_size"):
            ProcessInferenceServer(scaling, max_batch_size=0)

    def test_a_factory_that_raises(self) -> None:
        """Its own exception comes from start(), and its traceback with it."""
        server = served(broken)
        with pytest.raises(LookupError, match="no such checkpoint") as caught:
            server.start()
        assert "in broken" in str(caught.value.__cause__)
        assert not server.is_alive

    def test_a_factory_that_hangs(self) -> None:
        """After start_timeout the child is ended."""
        server = served(stuck, start_timeout=0.2)
        with pytest.raises(ServerDiedError, match="start_timeout=0.2"):
            server.start()
        assert not server.is_alive

    async def test_cancelled_while_it_starts(self) -> None:
        """A start that is cancelled ends at once, and leaves no process."""
        server = served(stuck)
        starting = asyncio.ensure_future(server.__aenter__())
        await asyncio.to_thread(wait_until, lambda: server.pid is not None, "the process")
        pid = server.pid
        assert pid is not None
        starting.cancel()
        (outcome,) = await outcomes(starting)
        assert isinstance(outcome, asyncio.CancelledError)
        assert not server.is_alive
        assert not _runs(pid)

    def test_a_forward_that_ends_the_process(self) -> None:
        """The caller is told that the server died, the owner with what exit code."""
        with served(deadly) as server:
            with pytest.raises(ServerDiedError):
                server.sync_client()(row(1))
            with pytest.raises(ServerDiedError, match="exit code 7"):
                server.stats()


class TestWeights:
    """New weights for a running server."""

    def test_loaded(self) -> None:
        """They are served from the next batch on, under a new version."""
        with served() as server:
            client = server.sync_client()
            assert client(row(1))["policy_version"] == server.policy_version == 0
            assert server.load_state_dict(scaling(5.0).state_dict()) == 1
            answer = client(row(1))
            assert action(answer) == 5
            assert answer["policy_version"] == server.policy_version == 1

    def test_large(self) -> None:
        """Weights larger than the pipe's buffer arrive whole."""
        with served(large) as server:
            for version in range(1, 4):
                assert server.load_state_dict(large().state_dict()) == version

    def test_half_arrived(self) -> None:
        """Weights of which half has arrived do not hold up the batches."""
        with served() as server:
            assert server._control is not None
            message = pickle.dumps(("load_state_dict", (scaling(5.0).state_dict(),)))
            pipe = server._control.fileno()
            os.write(pipe, len(message).to_bytes(4, "big") + message[:100])
            client = server.sync_client()
            for _ in range(3):
                assert action(client(row(1))) == 2
            os.write(pipe, message[100:])
            assert pickle.loads(server._control.recv_bytes()) == (True, 1)
            assert action(client(row(1))) == 5

    def test_refused(self) -> None:
        """Weights that do not fit are refused, and the old ones stay."""
        with served() as server:
            with pytest.raises(RuntimeError, match="Missing key"):
                server.load_state_dict({"other": torch.ones(1)})
            assert action(server.sync_client()(row(1))) == 2
            assert server.policy_version == 0


class TestDeath:
    """Nobody hangs, and nothing stays behind."""

    async def test_killed(self) -> None:
        """Who waits gets ServerDiedError; the owner learns the signal; it can be started again."""
        server = served()
        async with server:
            client = server.async_client()
            await within(client(row(1)))
            assert server.pid is not None
            os.kill(server.pid, signal.SIGSTOP)
            waiting = [asyncio.ensure_future(client(row(i))) for i in range(8)]
            await asyncio.sleep(0)
            os.kill(server.pid, signal.SIGKILL)
            for outcome in await outcomes(*waiting):
                assert isinstance(outcome, ServerDiedError)
            with pytest.raises(ServerDiedError, match="SIGKILL"):
                await server.astats()
        async with server:
            assert action(await within(client(row(4)))) == 8

    def test_shutdown_of_a_stopped_process(self) -> None:
        """A child that does not react any more is killed after the timeout."""
        server = served().start()
        pid = server.pid
        assert pid is not None
        os.kill(pid, signal.SIGSTOP)
        server.shutdown(timeout=0.0)
        assert not _runs(pid)
        with server:  # and another one can be started
            assert action(server.sync_client()(row(1))) == 2

    def test_interrupted(self) -> None:
        """Ctrl-C in the terminal is for the parent; the child goes on until that ends it."""
        with served() as server:
            assert server.pid is not None
            os.kill(server.pid, signal.SIGINT)
            assert action(server.sync_client()(row(1))) == 2

    def test_the_parent_is_killed(self) -> None:
        """The child ends with it."""
        ours, theirs = FORK.Pipe()

        def parent() -> None:
            multiprocessing.current_process()._config["daemon"] = False  # type: ignore[attr-defined]
            theirs.send(served().start().pid)
            signal.pause()

        process = FORK.Process(target=parent)
        process.start()
        pid = ours.recv()
        assert process.pid is not None
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        wait_until(lambda: not _runs(pid), "the end of the child")


def _runs(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False
