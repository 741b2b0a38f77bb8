"""What servers in several actors share, with actors that are only pretended."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
import torch
from helpers import action, outcomes, row, within

from aioinfer import ServerClosedError, ServerDiedError, ThreadingTransport
from aioinfer.hosting import replicated
from aioinfer.hosting.replica import Replica
from aioinfer.hosting.replicated import ReplicatedServer
from aioinfer.transports.replicated import ReplicatedTransport


class Pretended(ReplicatedServer):
    """Its actors are objects of this loop; those in ``lost`` answer no call, nor do they fail."""

    def __init__(self, factory: Any, count: int = 2, start_timeout: float = 10.0) -> None:
        self.factory = factory
        self.transports = {number: ThreadingTransport() for number in range(count)}
        self.lost: set[Any] = set()
        self.ended = 0
        super().__init__(ReplicatedTransport(self.transports, room=100), start_timeout)

    async def _open(self) -> None:
        self._replicas = {number: Replica() for number in self.transports}
        for number, transport in self.transports.items():
            await self._call(number, "serve", self.factory, transport, {})

    async def _send(self, replica: Any, what: str, *args: Any) -> Any:
        if replica in self.lost:
            await asyncio.Event().wait()
        return await replica.ask(what, *args)

    async def _end(self) -> None:
        replicas, self._replicas = self._replicas, {}
        for replica in [each for each in replicas.values() if each is not None]:
            await replica.end()
            self.ended += 1


def linear() -> torch.nn.Module:
    model: Any = torch.nn.Linear(3, 3, bias=False)
    torch.nn.init.eye_(model.weight)
    model.forward = lambda td: td.set("action", td["observation"] @ model.weight.T)
    return model


class TestReplicas:
    """Asking them."""

    async def test_all_are_asked(self) -> None:
        """Each says what it did, and gets the weights."""
        async with Pretended(linear) as server:
            client = server.async_client()
            assert action(await within(client(row(3)))) == 3
            stats = await server.astats()
            assert {number: each.rows for number, each in stats.items()} == {0: 1, 1: 0}
            assert await server.aload_state_dict({"weight": 2 * torch.eye(3)}) == {0: 1, 1: 1}
            assert action(await within(client(row(3)))) == 6
            with pytest.raises(RuntimeError, match="size mismatch"):
                await server.aload_state_dict({"weight": torch.eye(2)})
            with pytest.raises(RuntimeError, match="called on an event loop"):
                server.stats()
        with pytest.raises(ServerClosedError, match="not running"):
            await server.astats()

    async def test_one_that_never_answers(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """A replica that gives no sign of life is not waited for, nor asked again."""
        monkeypatch.setattr(replicated, "SILENCE_S", 0.01)
        async with Pretended(linear) as server:
            server.lost.add(server._replicas[1])
            assert list(await within(server.astats())) == [0]
            assert server._replicas[1] is None
            server.lost.add(server._replicas[0])
            (error,) = await outcomes(server.astats())
            assert isinstance(error, ServerDiedError)
            assert str(error) == "all replicas have died"
        assert server.ended == 0
        for replica in server.lost:
            await replica.end()

    async def test_one_that_takes_long(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """A replica that says that it lives is waited for."""
        monkeypatch.setattr(replicated, "SILENCE_S", 0.01)
        async with Pretended(linear, 1) as server:
            replica, pings, answered = server._replicas[0], 0, asyncio.Event()

            async def ask(what: str, *args: Any) -> Any:
                nonlocal pings
                if what == "ping":
                    pings += 1
                    if pings == 3:
                        answered.set()
                    return True, None
                await answered.wait()
                return await Replica.ask(replica, what, *args)

            replica.ask = ask
            assert list(await within(server.astats())) == [0]
            assert pings == 3


class TestStart:
    """Starts that fail."""

    async def test_too_late(self) -> None:
        """Replicas that are not ready in time are ended."""

        class Slow(Pretended):
            async def _open(self) -> None:
                await super()._open()
                await asyncio.Event().wait()

        server = Slow(linear, start_timeout=0.05)
        with pytest.raises(ServerDiedError, match=r"start_timeout=0\.05 s"):
            await within(server.__aenter__())
        assert server.ended == 2
        assert not server.is_alive

    async def test_a_timeout_of_the_policy(self) -> None:
        """What the factory raises comes through, even if it is a timeout."""

        def factory() -> Any:
            raise TimeoutError("no checkpoint came")

        server = Pretended(factory)
        with pytest.raises(TimeoutError, match="no checkpoint came") as caught:
            await within(server.__aenter__())
        assert "in factory" in str(caught.value.__cause__)
        assert server.ended == 2

    def test_in_threads(self) -> None:
        """Threads start a server and close it; once closed, it can be started again."""

        class OnTransports(Pretended):
            async def _open(self) -> None:
                self._replicas = dict.fromkeys(self.transports, Replica())

        server = OnTransports(linear)
        for _ in range(2):
            with server, pytest.raises(RuntimeError, match="already running"):
                server.start()
            server.shutdown()
