"""MPTransport across processes: what travels, and what happens when somebody dies."""

from __future__ import annotations

import asyncio
import gc
import multiprocessing
import os
import signal
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from multiprocessing import resource_tracker
from pathlib import Path
from typing import Any

import pytest
import torch
from children import Child, Said
from helpers import (
    PATIENCE_S,
    InThread,
    action,
    doubling,
    encode_request,
    row,
    rows,
    until,
    wait_until,
)
from tensordict import NonTensorData, TensorDict, TensorDictBase, tensorclass

from aioinfer import (
    InferenceServer,
    InvalidRequestError,
    ModelError,
    MPTransport,
    ServerClosedError,
    ServerDiedError,
    SyncInferenceClient,
    ThreadingTransport,
)
from aioinfer.testing import RecordingModel
from aioinfer.transports import peer, socket_peer, wire
from aioinfer.transports.wire.layouts import LayoutSender
from aioinfer.transports.wire.payload import pack

pytestmark = [
    pytest.mark.timeout(60),
    # Python warns of what can happen; that it does not is what is tested here.
    pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning"),
]

LARGE = 60_000
"""Numbers in an observation of 240 kB."""


def _outcome(client: SyncInferenceClient, td: TensorDictBase) -> Any:
    try:
        return action(client(td))
    except Exception as error:
        return type(error).__name__


# -- what actors do in their processes ----------------------------------------


def one(said: Said, client: SyncInferenceClient, value: float) -> Any:
    """Ask once."""
    return action(client(row(value)))


def one_when_told(said: Said, client: SyncInferenceClient) -> Any:
    """Ask once the server runs."""
    said.say("ready")
    return action(client(row(said.hear())))


def one_awaited(said: Said, transport: MPTransport, value: float) -> Any:
    """Ask on an event loop."""

    async def main() -> Any:
        client = transport.client()
        replies = await asyncio.gather(client(row(value)), client(rows([value, 2 * value])))
        return [action(reply) for reply in replies]

    return asyncio.run(main())


def ask_and_stay(said: Said, client: SyncInferenceClient, width: int) -> None:
    """Ask once, then do nothing until killed."""
    said.say(action(client(row(1, width))))
    said.hear()


def ask_whenever_told(said: Said, client: SyncInferenceClient) -> None:
    """Ask what one is told to ask, and say what came of it."""
    while True:
        said.say(_outcome(client, row(said.hear())))


def ask_everything(said: Said, client: SyncInferenceClient) -> None:
    """Ask in every way that there is."""
    futures = [client.submit(row(value)) for value in range(50)]
    assert [action(future.result(10)) for future in futures] == [2 * v for v in range(50)]
    assert action(client(rows(range(7)))) == [2 * v for v in range(7)]
    assert action(client(rows([3]))) == [6]
    for step in range(3):  # through shared memory
        reply = client(row(step, LARGE))
        assert reply["action"].shape == (LARGE,)
        assert reply["action"].unique().tolist() == [2 * step]
    futures = [client.submit(row(value, LARGE)) for value in range(8)]
    assert [action(future.result(10)) for future in futures] == [2 * v for v in range(8)]
    for width in range(1, 40):  # another layout every time
        assert client(row(width, width))["action"].tolist() == [2.0 * width] * width
    for number, kind in enumerate([torch.float64, torch.int64, torch.bfloat16]):
        reply = client(TensorDict({"observation": torch.full((3,), number, dtype=kind)}))
        assert reply["action"].dtype == kind
        assert action(reply) == 2 * number
    named = row(4)
    named["name"] = "an actor"
    assert client(named)["action"].tolist() == [8, 8, 8]


# -- fixtures -----------------------------------------------------------------


@pytest.fixture(scope="module", autouse=True)
def _tracker() -> None:
    resource_tracker.ensure_running()  # started with the first spawned process; it stays


@pytest.fixture(autouse=True)
def _shared_memory_is_given_back() -> Iterator[None]:
    before = set(os.listdir("/dev/shm"))
    yield
    left = {name for name in set(os.listdir("/dev/shm")) - before if "aioinfer" in name}
    assert not left


def peers_of(transport: MPTransport) -> int:
    return len(transport._peers)


# -- where clients may be -----------------------------------------------------


@pytest.mark.timeout(100)
def test_spawned_processes():
    """Clients and transports are pickled into spawned processes, before and after the start."""
    transport = MPTransport(multiprocessing.get_context("spawn"))
    early = Child(one_when_told, transport.sync_client(), method="spawn")
    with early, InferenceServer(doubling(), transport) as server:
        with Child(one_awaited, transport, 5.0, method="spawn") as late:
            assert early.hear(60) == "ready"
            assert early.ask(3.0) == 6
            assert late.hear(60) == [10, [10, 20]]
        assert server.is_alive
        wait_until(lambda: peers_of(transport) == 0, "the end of the connections")


def test_forked_processes():
    """Clients are inherited by fork, before and after the start, used and unused."""
    transport = MPTransport()
    client = transport.sync_client()
    with Child(one_when_told, client) as early, InferenceServer(doubling(), transport):
        assert early.hear() == "ready"
        assert action(client(row(1))) == 2  # and so is in use when the next process is forked
        with Child(one, client, 4.0) as late, Child(one_awaited, transport, 5.0) as awaiting:
            assert action(client(row(2))) == 4
            assert late.hear() == 8
            assert awaiting.hear() == [10, [10, 20]]
        assert early.ask(3.0) == 6
        assert action(client(row(6))) == 12
        early.kill()
        wait_until(lambda: peers_of(transport) == 1, "the end of the connections")


@pytest.mark.parametrize("inline", [None, 0, 1 << 30])
def test_everything_travels(inline: int | None):
    """In-flight requests, rows, large tensors, changing layouts, objects: on every way there is."""
    transport = MPTransport(inline_bytes=inline)
    server = InferenceServer(doubling(), transport, max_batch_size=8)
    with server, Child(ask_everything, transport.sync_client()) as child:
        assert child.hear(30) is None


@tensorclass
class Seen:
    """A request of a type of its own."""

    observation: torch.Tensor


def ask_with_a_tensorclass(said: Said, client: SyncInferenceClient) -> Any:
    return action(client(Seen(observation=torch.full((LARGE,), 4.0), batch_size=[])))


def test_a_tensorclass_from_another_process():
    """A tensorclass arrives as what it is."""
    kinds = []

    def policy(seen: Any) -> TensorDictBase:
        kinds.append(type(seen))
        return TensorDict({"action": seen.observation * 2}, seen.batch_size)

    transport = MPTransport()
    with (
        InferenceServer(policy, transport),
        Child(ask_with_a_tensorclass, transport.sync_client()) as child,
    ):
        assert child.hear() == 8
    assert kinds == [Seen]


def ask_rows_when_told(said: Said, client: SyncInferenceClient) -> Any:
    assert action(client(row(1))) == 2
    said.say("ready")
    said.hear()
    return action(client(rows([5, 6])))


@pytest.mark.parametrize("options", [{}, {"batch_sizes": [1, 16]}, {"return_inputs": True}])
def test_one_batch_of_rows_from_everywhere(options: dict[str, Any]):
    """Rows of this process and of others, bare and not, share a batch, and all get their own."""
    elsewhere, here = MPTransport(), ThreadingTransport()
    model = RecordingModel()
    with (
        InferenceServer(model, [here, elsewhere], max_batch_size=16, **options) as server,
        Child(ask_rows_when_told, elsewhere.sync_client()) as child,
    ):
        assert child.hear() == "ready"
        clients = [here.sync_client(), elsewhere.sync_client()]
        with model.held():
            first = InThread(clients[0], row(0))
            model.wait_until_entered()
            asked = [InThread(client, td) for client in clients for td in (row(3), rows([4, 7]))]
            child.pipe.send("go")
            wait_until(lambda: server.stats().queue_depth == 8, "the requests")
        assert action(first.result()) == 0
        answers = [each.result() for each in asked]
        assert [action(answer) for answer in answers] == [6, [8, 14], 6, [8, 14]]
        assert child.hear() == [10, 12]
        keys = {"action", "policy_version"} | (
            {"observation"} if "return_inputs" in options else set()
        )
        assert all(set(answer.keys()) == keys for answer in answers)
        assert model.batch_sizes[-1] == (16 if "batch_sizes" in options else 8)


# -- clients that die ---------------------------------------------------------


@pytest.mark.parametrize("when", ["idle", "in the queue", "during the forward"])
@pytest.mark.parametrize("width", [3, LARGE])
def test_a_client_is_killed(when: str, width: int):
    """A killed client is forgotten, whatever it was about; others do not notice."""
    transport, model = MPTransport(), RecordingModel()
    client = transport.sync_client()
    with InferenceServer(model, transport) as server:
        assert action(client(row(0))) == 0
        if when == "idle":
            with Child(ask_and_stay, transport.sync_client(), width) as child:
                assert child.hear() == 2
                child.kill()
                wait_until(lambda: peers_of(transport) == 1, "the end of the connection")
        else:
            with model.held():
                others = []
                if when == "in the queue":
                    others = [InThread(client, row(5))]
                    model.wait_until_entered()
                with Child(ask_and_stay, transport.sync_client(), width) as child:
                    if when == "in the queue":
                        wait_until(lambda: server.stats().queue_depth == 1, "the request")
                    else:
                        model.wait_until_entered()
                    child.kill()
                    left = 1 + len(others)  # the connections of this process
                    wait_until(lambda: peers_of(transport) == left, "the end of the connection")
            for other in others:
                assert action(other.result()) == 10
        assert action(client(row(3))) == 6
        assert server.is_alive
        assert model.rows == 3  # nothing was computed for who was killed in the queue


def test_two_hundred_clients_are_killed():
    """Neither descriptors nor memory grow with the clients that were killed."""
    transport = MPTransport()
    with InferenceServer(doubling(), transport):
        client = transport.sync_client()

        def kill_clients(count: int) -> tuple[int, int]:
            for number in range(count):
                with Child(ask_and_stay, client, LARGE if number % 2 else 3) as child:
                    assert child.hear() == 2
            wait_until(lambda: peers_of(transport) == 0, "the end of the connections")
            gc.collect()
            resident = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf(
                "SC_PAGE_SIZE"
            )
            return len(os.listdir("/proc/self/fd")), resident

        descriptors, resident = kill_clients(10)
        descriptors_then, resident_then = kill_clients(200)
        assert descriptors_then == descriptors
        assert resident_then - resident < 20e6  # 100 arenas of 1 MB and more came and went


def test_a_client_that_is_stopped():
    """A client that is stopped for a while holds nobody up, and gets its answer afterwards."""
    transport, model = MPTransport(), RecordingModel()
    client = transport.sync_client()
    with InferenceServer(model, transport, timeout=0.01) as server:
        with Child(ask_whenever_told, transport.sync_client()) as child:
            assert child.ask(1.0) == 2
            with model.held():
                child.pipe.send(2.0)
                model.wait_until_entered()
                os.kill(child.process.pid, signal.SIGSTOP)
            for value in range(20):
                assert action(client(row(value))) == 2 * value
            os.kill(child.process.pid, signal.SIGCONT)
            assert child.hear() == 4
        assert server.is_alive


def test_a_forked_process_does_not_keep_connections():
    """The sockets that a process inherits by fork are not kept open in it."""
    transport = MPTransport()
    client = transport.sync_client()
    with InferenceServer(doubling(), transport):
        assert action(client(row(1))) == 2
        with Child(lambda said: said.hear()) as child:  # it lives on and knows of nothing
            client.close()
            wait_until(lambda: peers_of(transport) == 0, "the end of the connection")
            assert action(client(row(2))) == 4
            again = transport.sync_client()
            with Child(lambda said: said.hear()):
                assert action(again(row(3))) == 6
            assert child.process.is_alive()
    for _ in range(2):
        with pytest.raises(ServerClosedError):
            again(row(4))


# -- servers that end ---------------------------------------------------------


def test_the_server_is_closed_and_another_one_started():
    """Clients that wait are told, later calls too; a new server serves the same clients."""
    transport, model = MPTransport(), RecordingModel()
    with Child(ask_whenever_told, transport.sync_client()) as child:
        assert child.ask(0.0) == "ServerClosedError"  # not yet
        server = InferenceServer(model, transport)
        with model.held():
            server.start()
            child.pipe.send(1.0)
            model.wait_until_entered()
            closing = InThread(asyncio.run, server.aclose(drain=False))
            assert child.hear() == "ServerClosedError"  # the forward is still held
        closing.result()
        assert child.ask(2.0) == "ServerClosedError"
        assert child.ask(3.0) == "ServerClosedError"
        with InferenceServer(doubling(), transport):
            assert child.ask(4.0) == 8
            assert child.ask(5.0) == 10
        assert child.ask(6.0) == "ServerClosedError"


def serve_for_ever(said: Said, transport: MPTransport) -> None:
    def policy(td: TensorDictBase) -> TensorDictBase:
        if bool((td["observation"] < 0).any()):
            said.say("stuck")
            threading.Event().wait()
        return TensorDict({"action": td["observation"] * 2}, td.batch_size)

    with InferenceServer(policy, transport, max_batch_size=8):
        said.say("serving")
        said.hear()


def test_the_process_of_the_server_is_killed():
    """Whoever waits when the server dies gets a ServerDiedError of its own; a new one serves."""
    transport = MPTransport()
    client = transport.sync_client()
    with Child(serve_for_ever, transport) as child:
        assert child.hear() == "serving"
        assert action(client(row(1))) == 2
        waiting = [InThread(transport.sync_client(), row(-1)) for _ in range(8)]
        futures = [client.submit(row(-1)) for _ in range(3)]
        assert child.hear() == "stuck"
        assert not any(each.done for each in waiting)
        child.kill()
        errors = []
        for each in waiting:
            with pytest.raises(ServerDiedError) as caught:
                each.result()
            errors.append(caught.value)
        errors += [future.exception(PATIENCE_S) for future in futures]
        assert {type(error) for error in errors} <= {ServerDiedError}
        assert len({id(error) for error in errors}) == len(errors)
        with pytest.raises(ServerClosedError):  # nobody listens
            client(row(2))
    with InferenceServer(doubling(), transport):
        assert action(client(row(3))) == 6


# -- what cannot travel -------------------------------------------------------


def test_a_request_that_cannot_be_pickled():
    """Its caller is told, nobody else; the same client can ask on."""
    transport = MPTransport()
    bad = row(1)
    bad["name"] = NonTensorData(lambda: None)
    with InferenceServer(doubling(), transport):
        client = transport.sync_client()
        neighbours = [InThread(transport.sync_client(), row(value)) for value in range(4)]
        with pytest.raises(InvalidRequestError, match="pickle"):
            client(bad)
        with pytest.raises(InvalidRequestError, match="pickle"):
            client.submit(bad)
        assert [action(each.result()) for each in neighbours] == [0, 2, 4, 6]
        assert action(client(row(5))) == 10


def test_a_reply_that_cannot_be_pickled():
    """Its caller is told, nobody else."""

    def policy(td: TensorDictBase) -> TensorDictBase:
        reply = TensorDict({"action": td["observation"] * 2}, td.batch_size)
        if bool((td["observation"] < 0).any()):
            reply["why"] = NonTensorData(lambda: None, td.batch_size)
        return reply

    transport = MPTransport()
    with InferenceServer(policy, transport, max_batch_size=1):
        client = transport.sync_client()
        neighbours = [InThread(transport.sync_client(), row(value)) for value in range(4)]
        with pytest.raises(ModelError, match="cannot be sent to another process"):
            client(row(-1))
        assert [action(each.result()) for each in neighbours] == [0, 2, 4, 6]
        assert action(client(row(5))) == 10


# -- who does not speak the language ------------------------------------------


def _hello(transport: MPTransport, token: bytes | None = None) -> bytes:
    token = transport._address.token if token is None else token
    return wire.encode(wire.Hello(wire.PROTOCOL, os.getpid(), token))


NONSENSE: dict[str, Callable[[MPTransport], bytes]] = {
    "random bytes": lambda transport: bytes(range(7, 207)),
    "no hello": lambda transport: wire.encode(wire.Join(0)),
    "a wrong token": lambda transport: _hello(transport, bytes(32)),
    "random bytes after the hello": lambda transport: _hello(transport) + bytes(range(7, 207)),
    "random bytes after a frame": lambda transport: (
        _hello(transport) + wire.encode(wire.Join(0)) + bytes(range(7, 207))
    ),
    "an oversized frame": lambda transport: (
        _hello(transport) + struct.pack("<II", wire.MAX_BODY + 1, wire.Kind.REQUEST)
    ),
    "an oversized hello": lambda transport: (
        struct.pack("<II", 1 << 20, wire.Kind.HELLO) + bytes(1000)
    ),
    "a reply": lambda transport: _hello(transport) + wire.frame(wire.Kind.REPLY, bytes(24)),
    "a request of nobody": lambda transport: (
        _hello(transport) + wire.frame(wire.Kind.REQUEST, bytes(wire.REQUEST_NBYTES))
    ),
    "an arena without a descriptor": lambda transport: (
        _hello(transport) + wire.encode(wire.Arena(0, 4096))
    ),
    "joined twice": lambda transport: _hello(transport) + 2 * wire.encode(wire.Join(1)),
}


def _until_the_end(connection: socket.socket) -> bytes:
    connection.settimeout(PATIENCE_S)
    said = b""
    try:
        while more := connection.recv(1 << 16):
            said += more
    except ConnectionResetError:
        pass
    return said


@pytest.mark.parametrize("kind", NONSENSE)
def test_nonsense_ends_the_connection(kind: str):
    """Who sends what is no message is disconnected; the others are served as before."""
    transport = MPTransport()
    with InferenceServer(doubling(), transport):
        client = transport.sync_client()
        assert action(client(row(1))) == 2
        with transport._address.connect() as connection:
            connection.settimeout(PATIENCE_S)
            connection.sendall(NONSENSE[kind](transport))
            assert b"did not understand" in _until_the_end(connection)
        wait_until(lambda: peers_of(transport) == 1, "the end of the connection")
        assert action(client(row(2))) == 4


def test_silence_ends_the_connection(monkeypatch: pytest.MonkeyPatch):
    """Who connects and does not introduce itself is disconnected."""
    monkeypatch.setattr(socket_peer, "HELLO_TIMEOUT_S", 0.05)
    transport = MPTransport()
    with InferenceServer(doubling(), transport):
        client = transport.sync_client()
        with transport._address.connect() as connection:
            assert action(client(row(1))) == 2
            assert _until_the_end(connection) == b""
        assert action(client(row(2))) == 4


def test_half_a_message_and_then_nothing(monkeypatch: pytest.MonkeyPatch):
    """A frame that is cut off by the end of its sender leaves nothing behind."""
    transport = MPTransport()
    with InferenceServer(doubling(), transport):
        client = transport.sync_client()
        assert action(client(row(1))) == 2
        with transport._address.connect() as connection:
            connection.settimeout(PATIENCE_S)
            connection.sendall(_hello(transport) + wire.encode(wire.Join(0))[:-2])
            wait_until(lambda: peers_of(transport) == 2, "the connection")
        wait_until(lambda: peers_of(transport) == 1, "the end of the connection")
        assert action(client(row(2))) == 4


@pytest.mark.parametrize("limit", [1 << 28, 1 << 20])
def test_a_client_that_does_not_read(limit: int, monkeypatch: pytest.MonkeyPatch):
    """Who does not read its answers waits for them alone, and not for ever."""
    monkeypatch.setattr(peer, "MAX_WAITING_NBYTES", limit)

    def policy(td: TensorDictBase) -> TensorDictBase:
        return TensorDict({"action": td["observation"][:, :1].expand(-1, LARGE)}, td.batch_size)

    transport = MPTransport()
    with InferenceServer(policy, transport) as server, transport._address.connect() as connection:
        connection.settimeout(PATIENCE_S)
        packed = pack(row(7))
        number, layout = LayoutSender().id_of(packed.layout)
        asked = b"".join(encode_request(n, 0, number, packed, submitted_at=0.0) for n in range(20))
        connection.sendall(_hello(transport) + wire.encode(wire.Join(0)) + layout + asked)
        wait_until(lambda: server.stats().requests >= 20, "the answers")
        client = transport.sync_client()
        for value in range(5):
            assert action(client(row(value))) == value
        wait_until(lambda: server.stats().rows >= 25, "the last batch")
        if limit == 1 << 20:  # less than its answers
            wait_until(lambda: peers_of(transport) == 1, "the end of the connection")
        else:
            assert peers_of(transport) == 2
        assert action(client(row(9))) == 9


async def test_sync_clients_that_are_collected_on_a_loop(monkeypatch: pytest.MonkeyPatch):
    """Their goodbye might block, so another thread says it; who never asked says none."""
    transport = MPTransport()
    async with InferenceServer(doubling(), transport):
        clients = [transport.sync_client() for _ in range(3)]
        over = threading.Event()

        def ask() -> None:
            assert [action(client(row(1))) for client in clients] == [2, 2, 2]
            over.wait(PATIENCE_S)  # the thread keeps its connection

        asking = InThread(ask)
        await until(lambda: [len(c._sources) for c in transport._channels()] == [3])
        (channel,) = transport._channels()
        idle = transport.sync_client()
        with monkeypatch.context() as patched:
            patched.setattr(threading, "Thread", None)  # to start one is an error
            del idle
            gc.collect()
        del clients[1:]
        gc.collect()
        await until(lambda: len(channel._sources) == 1)
        over.set()
        await asking
