"""The actors of ``monarch_actors.py``; apart from it, so that other processes can import them."""

from __future__ import annotations

import asyncio
import itertools
from typing import Any

import torch
from _counting import ECHO_NBYTES, Ask, Window, count, count_echoes
from monarch.actor import Actor, concurrent_endpoint
from tensordict import TensorDict


class Echo(Actor):
    """Answers with what it was asked."""

    @concurrent_endpoint
    async def echo(self, data: bytes) -> bytes:
        return data


class Load(Actor):
    """Asks from so many coroutines at once, without a pause."""

    def __init__(self, client: Any) -> None:
        torch.set_num_threads(1)
        self._client = client

    @concurrent_endpoint
    async def ask_server(self, coroutines: int, window: Window) -> int:
        """Ask the policy."""
        observation = torch.arange(8.0)

        def start(number: int) -> Ask:
            return lambda: self._client(TensorDict({"observation": observation}))

        return await count([start(number) for number in range(coroutines)], window)

    @concurrent_endpoint
    async def ask_endpoint(self, echo: Any, coroutines: int, window: Window) -> int:
        """Ask an endpoint of another actor, one call per request."""
        data = bytes(ECHO_NBYTES)

        async def ask() -> None:
            await echo.echo.call_one(data)

        return await count([ask] * coroutines, window)

    @concurrent_endpoint
    async def ask_stream(self, port: int, coroutines: int, window: Window) -> int:
        """Ask a bare TCP server, over a connection per coroutine."""
        return await count_echoes(("127.0.0.1", port), coroutines, window)

    @concurrent_endpoint
    async def ask_with_ids(self, port: int, coroutines: int, window: Window) -> int:
        """Ask a bare TCP server over one connection, answers found by the number they bear."""
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        waiting: dict[bytes, asyncio.Future[None]] = {}
        numbers = itertools.count()
        loop = asyncio.get_running_loop()
        rest = bytes(ECHO_NBYTES - 8)

        async def listen() -> None:
            while True:
                answer = await reader.readexactly(ECHO_NBYTES)
                waiting.pop(answer[:8]).set_result(None)

        async def ask() -> None:
            number = next(numbers).to_bytes(8, "little")
            waiting[number] = answer = loop.create_future()
            writer.write(number + rest)
            await answer

        listening = asyncio.create_task(listen())
        try:
            return await count([ask] * coroutines, window)
        finally:
            listening.cancel()
            writer.close()
