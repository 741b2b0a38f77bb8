"""ProcessInferenceServer: a policy built and served in a process of its own."""

from __future__ import annotations

import asyncio
import contextlib
import multiprocessing
import os
import pickle
import signal
import subprocess
import sys
import threading
from multiprocessing import connection, resource_tracker
from typing import Any

import pytest
import torch
from children import Child
from helpers import PATIENCE_S, InThread, action, outcomes, row, wait_until, within
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from torch import nn

from aioinfer import (
    AsyncioTransport,
    MPTransport,
    ProcessInferenceServer,
    ServerClosedError,
    ServerDiedError,
    near,
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


def on_the_loop() -> Any:
    """A policy that says whether it computes on the thread of the loop, where all are cheap."""
    near.NEAR_S = 1e9
    loop = threading.current_thread()

    def answer(td: Any) -> Any:
        here = threading.current_thread() is loop
        return TensorDict({"action": torch.full((*td.shape, 3), float(here))}, td.shape)

    return answer


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

    @pytest.mark.parametrize(("options", "last"), [({}, 1), ({"own_loop": False}, 0)])
    def test_the_loop_of_the_child(self, options: dict[str, bool], last: int) -> None:
        """It is the server's own, and computes what is cheap, unless told otherwise."""
        with served(on_the_loop, **options) as server:
            client = server.sync_client()
            places = [action(client(row(1))) for _ in range(near.TRIED + 2)]
        assert (places[0], places[-1]) == (0, last)

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
            message = pickle.dumps((99, "load_state_dict", (scaling(5.0).state_dict(),)))
            pipe = server._control.fileno()
            os.write(pipe, len(message).to_bytes(4, "big") + message[:100])
            client = server.sync_client()
            for _ in range(3):
                assert action(client(row(1))) == 2
            os.write(pipe, message[100:])
            assert pickle.loads(server._control.recv_bytes()) == (99, True, 1)
            assert action(client(row(1))) == 5

    async def test_loaded_in_asyncio(self) -> None:
        """The same without blocking the loop of the caller."""
        async with served() as server:
            assert await within(server.aload_state_dict(scaling(3.0).state_dict())) == 1
            assert action(await within(server.async_client()(row(2)))) == 6

    def test_refused(self) -> None:
        """Weights that do not fit are refused, and the old ones stay."""
        with served() as server:
            with pytest.raises(RuntimeError, match="Missing key"):
                server.load_state_dict({"other": torch.ones(1)})
            assert action(server.sync_client()(row(1))) == 2
            assert server.policy_version == 0


def slow_for_negatives() -> Any:
    """A policy that, once asked about a negative observation, waits for a line on its stdin."""

    def policy(td: Any) -> Any:
        if bool((td["observation"] < 0).any()):
            assert os.read(_GO_ON[0], 1) == b"x"
        return td.empty().set("action", td["observation"] * 2)

    return policy


_GO_ON = (-1, -1)


@pytest.fixture
def go_on(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A pipe: each byte written to it lets one forward of ``slow_for_negatives`` end."""
    read, write = os.pipe()
    monkeypatch.setattr(sys.modules[__name__], "_GO_ON", (read, write))
    yield write
    os.close(read)
    os.close(write)


class TestClosing:
    """What is answered when it is closed."""

    def test_drained(self, go_on: int) -> None:
        """Accepted requests are answered first."""
        server = served(slow_for_negatives).start()
        client = server.sync_client()
        waiting = InThread(client, row(-1))
        wait_until(lambda: server.stats().requests == 1, "the request")
        closing = InThread(server.shutdown)
        os.write(go_on, b"x")
        assert action(waiting.result()) == -2
        closing.result()

    @pytest.mark.parametrize("how", [{"drain": False}, {"timeout": 0.05}])
    def test_not_drained(self, go_on: int, how: dict[str, Any]) -> None:
        """Without draining, or once the time for it is over, who waits is told at once."""
        server = served(slow_for_negatives, max_batch_size=1).start()
        client = server.sync_client()
        waiting = [InThread(client, row(-1)) for _ in range(2)]
        wait_until(lambda: server.stats().queue_depth == 1, "the requests")
        closing = InThread(server.shutdown, **how)
        for each in waiting:
            with pytest.raises(ServerClosedError):
                each.result()
        os.write(go_on, b"xx")
        closing.result()
        assert not server.is_alive


class TestQuestions:
    """What the parent asks of the child."""

    def test_an_interrupted_question(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """After Ctrl-C while it waits for an answer, later questions get their own."""
        with served() as server:
            real = connection.wait

            def interrupted(*args: Any) -> Any:
                monkeypatch.setattr(connection, "wait", real)
                raise KeyboardInterrupt

            monkeypatch.setattr(connection, "wait", interrupted)
            with pytest.raises(KeyboardInterrupt):
                server.stats()
            assert server.policy_version == 0
            assert server.load_state_dict(scaling(3.0).state_dict()) == 1
            assert server.stats().requests == 0

    def test_an_answer_that_is_an_os_error(self) -> None:
        """An OSError of the child's is that, and not the end of the child."""
        with served(unloadable) as server:
            with pytest.raises(FileNotFoundError, match="no such file"):
                server.load_state_dict({})
            assert server.is_alive

    def test_a_process_forked_meanwhile(self) -> None:
        """One that another thread forks during start() keeps no pipe open that matters here."""
        server = served(deadly_later)
        others = []

        class Ctx:
            Pipe = staticmethod(FORK.Pipe)

            @staticmethod
            def Process(**kwargs: Any) -> Any:
                process = FORK.Process(**kwargs)
                start = process.start

                def start_two() -> None:
                    start()
                    others.append(Child(lambda said: said.hear()))  # has all of our descriptors

                process.start = start_two
                return process

        server._ctx = Ctx
        try:
            with pytest.raises(ServerDiedError, match="exit code 3"):
                server.start()
        finally:
            for other in others:
                other.__exit__()


def deadly_later() -> Any:
    os._exit(3)


class Unloadable(nn.Module):
    def forward(self, td: Any) -> Any:
        return td

    def load_state_dict(self, *_: Any, **__: Any) -> Any:
        raise FileNotFoundError("no such file")


def unloadable() -> Any:
    return Unloadable()


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

    @pytest.mark.parametrize("where", ["in the factory", "in a forward"])
    def test_the_parent_of_a_stuck_process_is_killed(self, where: str) -> None:
        """The child ends with it even then."""
        ours, theirs = FORK.Pipe()

        def stick() -> Any:
            theirs.send(os.getpid())
            signal.pause()

        def policy() -> Any:
            return lambda td: stick() if bool((td["observation"] < 0).any()) else td

        def parent() -> None:
            multiprocessing.current_process()._config["daemon"] = False  # type: ignore[attr-defined]
            with served(stick if where == "in the factory" else policy) as server:
                client = server.sync_client()
                for _ in range(5):  # so that forwards are known to be cheap
                    client(row(1))
                client(row(-1))

        process = FORK.Process(target=parent)
        process.start()
        pid = ours.recv()
        process.kill()
        process.join()
        wait_until(lambda: not _runs(pid), "the end of the child")
        ours.close()
        theirs.close()

    @pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
    def test_a_whole_program(self, how: signal.Signals) -> None:
        """Ctrl-C in its terminal, or the death of its parent, ends all of it; nothing is left."""
        before = _shared_memory()
        program = subprocess.Popen(
            [sys.executable, "-c", _PROGRAM],
            cwd=os.path.dirname(__file__),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,  # its group is what a terminal would send Ctrl-C to
        )
        assert program.stdout is not None
        with program:
            try:
                pids = [int(pid) for pid in program.stdout.readline().split()]
                assert len(pids) == 4  # a server and three actors
                if how is signal.SIGINT:
                    os.killpg(program.pid, how)
                else:
                    program.kill()
                program.stdout.read()  # until the last one has let go of it
                program.wait(PATIENCE_S)
                wait_until(lambda: not any(_runs(pid) for pid in pids), "the end of all")
            finally:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(program.pid, signal.SIGKILL)
        assert _shared_memory() <= before


_PROGRAM = """
import signal
from test_process import FORK, row, served

def act(client, pipe):
    client(row(1))
    pipe.send(0)
    while True:
        client(row(1))

if __name__ == "__main__":
    with served() as server:
        actors = []
        for _ in range(3):
            ours, theirs = FORK.Pipe()
            args = server.sync_client(), theirs
            actors.append(FORK.Process(target=act, args=args, daemon=True))
            actors[-1].start()
            ours.recv()
        print(server.pid, *[actor.pid for actor in actors], flush=True)
        signal.pause()
"""


def _shared_memory() -> set[str]:
    """Names of it; not semaphores, which we do not make, but tests beside this one do."""
    return {name for name in os.listdir("/dev/shm") if not name.startswith("sem.")}


def _runs(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False
