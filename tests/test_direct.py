"""Who may connect to a server on the network, and what everybody else can do to it: nothing."""

from __future__ import annotations

import asyncio
import dataclasses
import gc
import pickle
import socket
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from certificates import contexts
from children import Child
from conformance import remote
from conformance.remote import LocalTransport
from helpers import (
    PATIENCE_S,
    InThread,
    action,
    doubling,
    encode_request,
    row,
    until,
    wait_until,
    within,
)
from hypothesis import given
from hypothesis import strategies as st

from aioinfer import (
    InferenceServer,
    InvalidRequestError,
    ServerClosedError,
    ServerDiedError,
)
from aioinfer.blocking import new_event_loop
from aioinfer.testing import RecordingModel, settle
from aioinfer.transports import channel, direct, listener, peer, wire
from aioinfer.transports.endpoint import (
    ANSWER_NBYTES,
    CHALLENGE_NBYTES,
    OPENING_NBYTES,
    ClientHandshake,
    Endpoint,
    ServerHandshake,
    new_secret,
)
from aioinfer.transports.wire import WireError
from aioinfer.transports.wire.layouts import LayoutSender
from aioinfer.transports.wire.payload import pack

LARGE = 60_000

pytestmark = pytest.mark.timeout(60)


class Served:
    """A server that listens, and what it is about."""

    def __init__(self, transport: LocalTransport, server: InferenceServer) -> None:
        self.transport = transport
        self.server = server

    @property
    def listener(self) -> listener.Listener:
        assert self.transport._listener is not None
        return self.transport._listener

    @property
    def endpoint(self) -> Endpoint:
        assert self.listener._socket is not None
        return Endpoint(*self.listener._socket.getsockname(), self.transport._secret)

    def connect(self) -> socket.socket:
        """A connection that has said nothing yet."""
        endpoint = self.endpoint
        return socket.create_connection((endpoint.host, endpoint.port), PATIENCE_S)

    def serves(self) -> None:
        """Check that it still does."""
        client = self.transport.sync_client()
        assert action(client(row(3))) == 6
        assert self.server.is_alive


@pytest.fixture
def served() -> Iterator[Served]:
    transport = LocalTransport("direct")
    with InferenceServer(doubling(), transport) as server:
        served = Served(transport, server)
        del transport
        yield served
    served.__dict__.clear()  # pytest keeps it for longer than what is left behind is looked at


def _receive(connection: socket.socket, nbytes: int) -> bytes:
    data = b""
    while len(data) < nbytes:
        more = connection.recv(nbytes - len(data))
        if not more:
            raise EOFError(data)
        data += more
    return data


def _is_closed(connection: socket.socket) -> bool:
    """Wait for the server to end the connection; whatever it said before is no matter."""
    try:
        while connection.recv(1 << 16):
            pass
    except ConnectionResetError:
        pass
    return True


def _let_in(connection: socket.socket, secret: bytes) -> None:
    handshake = ClientHandshake(secret)
    connection.sendall(handshake.opening)
    connection.sendall(handshake.answer(_receive(connection, CHALLENGE_NBYTES), 0.0))


# -- forks --------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
@pytest.mark.parametrize("loop", [asyncio.new_event_loop, new_event_loop])
def test_a_forked_child_holds_no_connection_open(served: Served, loop: Any):
    """The server notices the end of its client, though a process forked from that one lives."""
    client = served.transport.async_client()

    async def ask() -> Any:
        return action(await client(row(3)))

    with asyncio.Runner(loop_factory=loop) as runner:
        assert runner.run(ask()) == 6
        assert len(served.listener.peers) == 1
        with Child(lambda said: said.hear()) as child:
            assert runner.run(ask()) == 6
            runner.close()
            wait_until(lambda: not served.listener.peers, "the end of the connection")
            assert child.ask("are you there?") == "are you there?"


# -- the handshake ------------------------------------------------------------


def test_both_sides_with_the_secret():
    """The server learns what the client's clock read."""
    secret = new_secret()
    client, server = ClientHandshake(secret), ServerHandshake(secret)
    assert server.check(client.answer(server.challenge(client.opening), 12.5)) == 12.5


def test_a_server_without_the_secret():
    """A client says nothing to who cannot prove that it holds the secret."""
    client, server = ClientHandshake(new_secret()), ServerHandshake(new_secret())
    with pytest.raises(WireError, match="secret"):
        client.answer(server.challenge(client.opening), 0.0)


def test_an_answer_opens_one_connection():
    """What a client said once is worth nothing to the next server handshake."""
    secret = new_secret()
    client, server, again = (
        ClientHandshake(secret),
        ServerHandshake(secret),
        ServerHandshake(secret),
    )
    answer = client.answer(server.challenge(client.opening), 0.0)
    again.challenge(client.opening)
    with pytest.raises(WireError, match="without the secret"):
        again.check(answer)


def test_a_proof_does_not_prove_the_other_side():
    """A client that sends the server's own proof back does not get in."""
    secret = new_secret()
    client, server = ClientHandshake(secret), ServerHandshake(secret)
    challenge = server.challenge(client.opening)
    with pytest.raises(WireError, match="without the secret"):
        server.check(struct.pack("<dI", 0.0, 1) + challenge[-32:])


@given(flipped=st.integers(0, 8 * ANSWER_NBYTES - 1))
def test_every_bit_of_an_answer_counts(flipped: int):
    """An answer in which one bit was changed on its way is refused."""
    secret = new_secret()
    client, server = ClientHandshake(secret), ServerHandshake(secret)
    answer = bytearray(client.answer(server.challenge(client.opening), 1.0))
    answer[flipped // 8] ^= 1 << flipped % 8
    with pytest.raises(WireError):
        server.check(bytes(answer))


@given(opening=st.binary(min_size=OPENING_NBYTES, max_size=OPENING_NBYTES))
def test_any_opening(opening: bytes):
    """Whatever opens a connection is either one of ours or a WireError."""
    with pytest.raises(WireError):
        ServerHandshake(new_secret()).challenge(opening)


@given(answer=st.binary(min_size=ANSWER_NBYTES, max_size=ANSWER_NBYTES))
def test_any_answer(answer: bytes):
    """Whatever answers a challenge without the secret is a WireError."""
    server = ServerHandshake(new_secret())
    server.challenge(ClientHandshake(new_secret()).opening)
    with pytest.raises(WireError):
        server.check(answer)


def test_the_secret_is_not_shown():
    """An endpoint pickles, and prints without its secret."""
    endpoint = Endpoint("127.0.0.1", 80, new_secret())
    assert pickle.loads(pickle.dumps(endpoint)) == endpoint
    assert repr(endpoint.secret) not in repr(endpoint)
    assert repr(endpoint.secret) not in str(endpoint)


# -- strangers ----------------------------------------------------------------


def _garbage(served: Served, connection: socket.socket) -> None:
    connection.sendall(bytes(range(7, 7 + OPENING_NBYTES)))


def _http(served: Served, connection: socket.socket) -> None:
    connection.sendall(b"GET / HTTP/1.1\r\nHost: example.org\r\nAccept: */*\r\n\r\n")


def _another_version(served: Served, connection: socket.socket) -> None:
    connection.sendall(struct.pack("<8sI32s", b"aioinfer", wire.PROTOCOL + 1, bytes(32)))


def _out_of_turn(served: Served, connection: socket.socket) -> None:
    connection.sendall(ClientHandshake(served.endpoint.secret).opening + bytes(100))


def _no_secret(served: Served, connection: socket.socket) -> None:
    connection.sendall(ClientHandshake(bytes(32)).opening)
    _receive(connection, CHALLENGE_NBYTES)
    connection.sendall(bytes(ANSWER_NBYTES))


def _frames_instead(served: Served, connection: socket.socket) -> None:
    hello = wire.encode(wire.Hello(wire.PROTOCOL, 1, bytes(32)))
    connection.sendall(hello + wire.encode(wire.Join(0)))


def _replayed(served: Served, connection: socket.socket) -> None:
    handshake = ClientHandshake(served.endpoint.secret)
    with served.connect() as first:
        first.sendall(handshake.opening)
        answer = handshake.answer(_receive(first, CHALLENGE_NBYTES), 0.0)
        first.sendall(answer)
    connection.sendall(handshake.opening)
    _receive(connection, CHALLENGE_NBYTES)
    connection.sendall(answer)


@pytest.mark.parametrize(
    "strange",
    [_garbage, _http, _another_version, _out_of_turn, _no_secret, _frames_instead, _replayed],
)
def test_strangers(served: Served, strange: Callable[[Served, socket.socket], None]):
    """Who does not hold the secret is disconnected; nothing it says reaches the server."""
    with served.connect() as connection:
        strange(served, connection)
        assert _is_closed(connection)
    wait_until(lambda: not served.listener.half_open, "the end of the connection")
    served.serves()


def test_a_wrong_secret(served: Served):
    """A client with another server's secret is told, in a thread at once; the server serves on."""
    endpoint = dataclasses.replace(served.endpoint, secret=new_secret())
    with pytest.raises(ConnectionError, match="secret"):
        direct.connect_thread(endpoint)
    other = LocalTransport("direct")
    other.__setstate__(served.transport.__getstate__())
    other._secret = served.transport._secret
    assert action(other.sync_client()(row(1))) == 2
    served.serves()


def test_who_says_nothing(served: Served, monkeypatch: pytest.MonkeyPatch):
    """Who connects and says nothing is disconnected in time."""
    monkeypatch.setattr(listener, "HANDSHAKE_TIMEOUT_S", 0.05)
    with served.connect() as silent, served.connect() as slow:
        slow.sendall(ClientHandshake(served.endpoint.secret).opening[:-1])
        assert _is_closed(silent)
        assert _is_closed(slow)
    served.serves()


def test_a_handshake_byte_by_byte(served: Served):
    """A handshake may come in as many pieces as it likes."""
    handshake = ClientHandshake(served.endpoint.secret)
    with served.connect() as connection:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for byte in handshake.opening:
            connection.sendall(bytes([byte]))
        for byte in handshake.answer(_receive(connection, CHALLENGE_NBYTES), 0.0):
            connection.sendall(bytes([byte]))
        wait_until(lambda: served.listener.peers, "the welcome")


def test_a_thousand_half_open_connections(served: Served, monkeypatch: pytest.MonkeyPatch):
    """However many connect without showing the secret, a bounded number is kept."""
    monkeypatch.setattr(listener, "MAX_HALF_OPEN", 20)
    strangers = []
    try:
        for number in range(1000):
            strangers.append(served.connect())
            if number >= 100:
                strangers.pop(0).close()
            assert len(served.listener.half_open) <= 20
            if number % 250 == 0:
                served.serves()
        served.serves()
    finally:
        for stranger in strangers:
            stranger.close()
    wait_until(lambda: not served.listener.half_open, "the end of the connections")


# -- who has the secret, and misuses it ----------------------------------------


NONSENSE = {
    "random bytes": bytes(range(7, 207)),
    "an oversized frame": struct.pack("<II", wire.MAX_BODY + 1, wire.Kind.REQUEST),
    "a hello": wire.encode(wire.Hello(wire.PROTOCOL, 1, bytes(32))),
    "a frame for clients": wire.encode(wire.Dropped(1)),
    "an arena": wire.encode(wire.Arena(0, 4096)),
    "a frame that is cut off": wire.encode(wire.Join(0))[:-4] + bytes(200),
    "garbage after a frame": wire.encode(wire.Join(0)) + bytes(range(7, 207)),
}


@pytest.mark.parametrize("kind", NONSENSE)
def test_nonsense_ends_the_connection(served: Served, kind: str):
    """Who does not speak the language is disconnected, and others do not notice."""
    with served.connect() as connection:
        _let_in(connection, served.endpoint.secret)
        connection.sendall(NONSENSE[kind])
        assert _is_closed(connection)
    served.serves()


def test_a_huge_frame_takes_no_memory_before_it_comes(served: Served):
    """Memory is taken for what has come, not for what was announced."""
    with served.connect() as connection:
        _let_in(connection, served.endpoint.secret)
        connection.sendall(struct.pack("<II", wire.MAX_BODY, wire.Kind.REQUEST) + bytes(1000))
        wait_until(lambda: served.listener.peers, "the welcome")
        (known,) = served.listener.peers
        wait_until(lambda: known._reader._large is not None, "the frame")
        assert len(known._reader._large) <= 1 << 20
    served.serves()


@pytest.mark.parametrize("limit", [1 << 28, 1 << 20])
def test_a_client_that_does_not_read(limit: int, monkeypatch: pytest.MonkeyPatch):
    """Who does not read its answers waits for them alone, and not for ever."""
    monkeypatch.setattr(peer, "MAX_WAITING_NBYTES", limit)

    def policy(td: Any) -> Any:
        td["action"] = td["observation"][:, :1].expand(-1, LARGE).clone()
        return td.select("action")

    transport = LocalTransport("direct")
    with InferenceServer(policy, transport) as server:
        served = Served(transport, server)
        with served.connect() as connection:
            _let_in(connection, served.endpoint.secret)
            packed = pack(row(7))
            number, layout = LayoutSender().id_of(packed.layout)
            asked = b"".join(
                encode_request(n, 0, number, packed, submitted_at=0.0) for n in range(100)
            )
            connection.sendall(wire.encode(wire.Join(0)) + (layout or b"") + asked)
            wait_until(lambda: server.stats().requests >= 100, "the requests")
            client = transport.sync_client()
            for value in range(5):
                assert action(client(row(value))) == value
            if limit == 1 << 20:  # less than its answers
                wait_until(lambda: len(served.listener.peers) == 1, "the end of the connection")
            else:
                assert len(served.listener.peers) == 2
            assert action(client(row(9))) == 9


# -- clients ------------------------------------------------------------------


def test_clocks_of_one_host_agree(served: Served):
    """A client of the same host is believed when it says when it asked; another one is not."""
    with served.connect() as connection:
        _let_in(connection, served.endpoint.secret)  # its clock reads 0.0
        wait_until(lambda: served.listener.peers, "the welcome")
        (stranger,) = served.listener.peers
        assert not stranger._clocks_agree
        client = served.transport.sync_client()
        assert action(client(row(1))) == 2
        (known,) = served.listener.peers - {stranger}
        assert known._clocks_agree


def test_somebody_else_has_taken_the_port():
    """A client whose server has gone, and whose port answers to another one, is told so."""
    transport, other = LocalTransport("direct"), LocalTransport("direct")
    with InferenceServer(doubling(), other) as server:
        _, port = Served(other, server).endpoint.host, Served(other, server).endpoint.port
        with InferenceServer(doubling(), transport):
            client = transport.sync_client()
            assert action(client(row(1))) == 2
            found = remote._servers[transport._secret]
            remote._servers[transport._secret] = found._replace(address=("127.0.0.1", port))
            stranger = LocalTransport("direct")
            stranger.__setstate__(transport.__getstate__())
            with pytest.raises(ServerDiedError, match="secret"):
                stranger.sync_client()(row(1))


@pytest.mark.parametrize("reachable", [True, False])
def test_direct_where_possible_and_calls_where_not(reachable: bool):
    """``auto`` connects, and calls a server that it cannot connect to."""
    transport = LocalTransport("auto")
    with InferenceServer(doubling(), transport), socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        if not reachable:
            found = remote._servers[transport._secret]
            remote._servers[transport._secret] = found._replace(address=unused.getsockname())
        client = transport.sync_client()
        for value in range(3):
            assert action(client(row(value))) == 2 * value
        assert transport._hub is not None
        assert bool(transport._hub._peers) is not reachable


def test_a_request_that_is_too_large(monkeypatch: pytest.MonkeyPatch):
    """What no message can hold is refused, and the connection is none the worse for it."""
    monkeypatch.setattr(channel, "MAX_PAYLOAD", 1 << 16)
    transport = LocalTransport("direct")
    with InferenceServer(doubling(), transport):
        client = transport.sync_client()
        with pytest.raises(InvalidRequestError, match="too large"):
            client(row(1, 1 << 16))
        assert action(client(row(2))) == 4


def test_a_server_that_is_closed():
    """Who waits is told that the server was closed, and later callers too."""
    transport, model = LocalTransport("direct"), RecordingModel()
    client = transport.sync_client()
    server = InferenceServer(model, transport).start()
    assert action(client(row(1))) == 2
    server.shutdown()
    for _ in range(2):
        with pytest.raises(ServerClosedError):
            client(row(2))


# -- TLS ----------------------------------------------------------------------


async def test_a_connection_that_ended_leaves_no_task_to_the_loop(served: Served):
    """What ends a connection with its loop is over with the connection, not one turn later.

    An event loop that is being closed has no such turn: "Task was destroyed but it is pending".
    """
    made: list[str] = []

    def record(loop: asyncio.AbstractEventLoop, coroutine: Any, **options: Any) -> Any:
        made.append(repr(coroutine))
        return asyncio.Task(coroutine, loop=loop, **options)

    asyncio.get_running_loop().set_task_factory(record)
    client = served.transport.client()
    assert action(await within(client(row(1)))) == 2
    await InThread(served.server.shutdown)
    await until(lambda: not served.transport._channels(), "the end of the connection")
    gc.collect()
    await settle()
    assert not [name for name in made if "_until_the_loop_ends" in name or "throw" in name]


def test_over_tls(tmp_path: Path):
    """Threads and coroutines are served over TLS, and nobody without it."""
    transport = LocalTransport("direct", tls=contexts(tmp_path))
    with InferenceServer(doubling(), transport) as server:
        served = Served(transport, server)
        client = transport.sync_client()
        for value in range(20):
            assert action(client(row(value, LARGE))) == 2 * value
        with pytest.raises(TimeoutError):
            client(row(1), timeout=0.0)

        async def main() -> Any:
            awaited = transport.client()
            return await asyncio.gather(*[awaited(row(value)) for value in range(20)])

        assert [action(reply) for reply in asyncio.run(main())] == [2 * v for v in range(20)]
        with served.connect() as plain:
            _garbage(served, plain)
            assert _is_closed(plain)
        assert action(client(row(4))) == 8


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ({"connection": "zeromq"}, ValueError),
        ({"host": 1}, TypeError),
        ({"port": "80"}, TypeError),
        ({"port": 1 << 16}, ValueError),
        ({"tls": "yes"}, TypeError),
    ],
)
def test_arguments(arguments: dict[str, Any], error: type[Exception]):
    """A wrong argument is refused by name and value."""
    ((name, value),) = arguments.items()
    with pytest.raises(error, match=name) as caught:
        LocalTransport(**arguments)
    assert repr(value) in str(caught.value)
