"""The line between a relay and a server of one host: who is let in, and that nothing is lost."""

from __future__ import annotations

import asyncio
import random
import socket
from collections.abc import Callable
from typing import Any

import pytest
from helpers import within

from aioinfer.transports.address import Address
from aioinfer.transports.ray_line import (
    GOODBYE,
    Line,
    Numbered,
    pack_answer,
    pack_call,
    unpack_answer,
    unpack_call,
)
from aioinfer.transports.ray_pump import _Entrance
from aioinfer.transports.ray_relay import DIED, LEAVE, Relay

CONNECTION = bytes(range(16))


def call(data: bytes, number: int = 1) -> bytes:
    return pack_call(CONNECTION, number, data)


class Served:
    """A server of the line of a relay, which answers as it is told."""

    def __init__(self) -> None:
        self.calls: asyncio.Queue[Numbered] = asyncio.Queue()
        self.lost: asyncio.Future[Line] = asyncio.get_running_loop().create_future()

    def take(self, calls: list[Numbered]) -> None:
        for each in calls:
            self.calls.put_nowait(each)

    async def connect(self, relay: Relay, name: bytes) -> Line:
        """The server's end, once the relay has connected."""
        entrance = _Entrance(self.take, self.lost.set_result)
        forever = asyncio.get_running_loop().create_future()
        address = await entrance.open()
        try:
            outcome = await within(relay.announce(name, "here", 0, None, [forever], address))
            assert outcome == (True, True)
            return await within(entrance.line)
        finally:
            entrance.close()


async def ended(relay: Relay) -> None:
    """Let go of the tasks of a relay, as the end of its actor does."""
    await relay.end()
    for task in list(relay._tasks):
        task.cancel()
    await asyncio.gather(*relay._tasks, return_exceptions=True)


async def test_calls_and_their_answers():
    """Each answer goes to its own call, however many there are and in whatever order."""
    relay, served = Relay(), Served()
    line = await served.connect(relay, b"one")
    asked = [asyncio.ensure_future(relay.exchange(call(b"%d" % i))) for i in range(50)]
    calls = [await within(served.calls.get()) for _ in asked]
    random.Random(0).shuffle(calls)
    for number, its_call in calls:
        connection, _, data = unpack_call(its_call)
        assert connection == CONNECTION
        line.send(number, pack_answer(7, data * 10_000))
    answers = [unpack_answer(answer) for answer in await within(asyncio.gather(*asked))]
    assert answers == [(7, b"%d" % i * 10_000) for i in range(50)]
    await ended(relay)
    assert await within(served.lost) is line


async def test_a_goodbye():
    """What was answered before it arrives; who still waits hears that the server is closed."""
    relay, served = Relay(), Served()
    line = await served.connect(relay, b"one")
    asked = [asyncio.ensure_future(relay.exchange(call(b"x"))) for _ in range(2)]
    number, _ = await within(served.calls.get())
    line.send(number, pack_answer(1, b"last"))
    line.send(GOODBYE, b"")
    line.close()
    await within(relay.withdraw(b"one", [], True))
    answers = [unpack_answer(answer) for answer in await within(asyncio.gather(*asked))]
    assert answers == [(1, b"last"), (LEAVE, b"")]
    assert await relay.find() is None
    await ended(relay)


async def test_a_line_that_breaks():
    """Without a goodbye it is a death, of which those hear who wait; the next server is welcome."""
    relay, served = Relay(), Served()
    line = await served.connect(relay, b"one")
    asked = asyncio.ensure_future(relay.exchange(call(b"x")))
    await within(served.calls.get())
    line.abort()
    assert unpack_answer(await within(asked)) == (DIED, b"")
    assert unpack_answer(await within(relay.exchange(call(b"x")))) == (LEAVE, b"")
    again = Served()
    line = await again.connect(relay, b"two")
    asked = asyncio.ensure_future(relay.exchange(call(b"y")))
    number, _ = await within(again.calls.get())
    line.send(number, pack_answer(3, b"y"))
    assert unpack_answer(await within(asked)) == (3, b"y")
    await ended(relay)


async def test_who_is_not_there():
    """A relay that cannot reach the socket, as on another host, says that there is no line."""
    relay = Relay()
    forever = asyncio.get_running_loop().create_future()
    nowhere = Address.new()
    outcome = await within(relay.announce(b"one", "here", 0, None, [forever], tuple(nowhere)))
    assert outcome == (True, False)
    asked = asyncio.ensure_future(relay.exchange(call(b"x")))
    ((number, _),) = await within(relay.serve(b"one", [], False))
    asking = asyncio.ensure_future(relay.serve(b"one", [(number, pack_answer(1, b"x"))], False))
    assert unpack_answer(await within(asked)) == (1, b"x")
    await within(relay.withdraw(b"one", [], False))
    assert await within(asking) == []
    await ended(relay)


@pytest.mark.parametrize(
    "said",
    [
        pytest.param(lambda token: b"", id="nothing"),
        pytest.param(lambda token: token[:31], id="half of it"),
        pytest.param(lambda token: bytes(32) + call(b"x"), id="another one"),
        pytest.param(lambda token: token[::-1] * 1000, id="garbage"),
    ],
)
async def test_strangers(said: Callable[[bytes], bytes]):
    """Who does not show the token is not listened to, and is gone when the relay is in."""
    served = Served()
    entrance = _Entrance(served.take, served.lost.set_result)
    address = await entrance.open()
    assert address is not None
    path, token = address
    stranger = await _dial(path)
    stranger.show(said(token))
    relay = await _dial(path)
    relay.show(token)
    relay.send(1, b"a call")
    line = await within(entrance.line)
    entrance.close()
    await within(stranger.over)
    assert await within(served.calls.get()) == (1, b"a call")
    assert served.calls.empty()
    assert not served.lost.done()
    relay.close()
    assert await within(served.lost) is line
    with pytest.raises(ConnectionRefusedError):
        await _dial(path)


async def _dial(path: str) -> Line:
    connection = socket.socket(socket.AF_UNIX)
    try:
        connection.setblocking(False)
        connection.connect(path)
        _, line = await asyncio.get_running_loop().create_unix_connection(
            lambda: Line(lambda messages: None, lambda line: None), sock=connection
        )
    except BaseException:
        connection.close()
        raise
    return line


class _Plug(asyncio.Transport):
    """A connection of which only the data that it brings matters."""


@pytest.mark.parametrize("seed", range(5))
async def test_messages_in_pieces(seed: int):
    """Messages are the same however the bytes are divided, the token's included."""
    rng = random.Random(seed)
    messages = [(rng.randrange(1 << 60), rng.randbytes(rng.choice([0, 1, 30, 5000])))
                for _ in range(30)]  # fmt: skip
    sent: list[bytes] = []

    class Into(_Plug):
        def write(self, data: Any) -> None:
            sent.append(bytes(data))

        def is_closing(self) -> bool:
            return False

    sender = Line(lambda messages: None, lambda line: None)
    sender.connection_made(Into())
    sender.show(bytes(32))
    for message in messages:
        sender.send(*message)
    sender._flush()
    stream, taken = b"".join(sent), []
    receiver = Line(taken.extend, lambda line: None, bytes(32))
    receiver.connection_made(_Plug())
    while stream:
        size = rng.choice([1, 2, 7, 40, 3000])
        receiver.data_received(stream[:size])
        stream = stream[size:]
    assert taken == messages
