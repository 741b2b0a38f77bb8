"""What runs in the Ray actors of ``ray_actors.py``; apart, so that they can import it."""

from __future__ import annotations

import asyncio
import threading
import time
from concurrent.futures import Future
from typing import Any

import torch
from _counting import ECHO_NBYTES, Window, count, count_echoes
from tensordict import TensorDict, TensorDictBase
from tensordict.nn import TensorDictModule
from torch import nn

from aioinfer import InferenceServer, InferenceTransport


def make_policy() -> TensorDictModule:
    """The policy that everybody serves, 8 floats in."""
    torch.set_num_threads(1)
    network = nn.Sequential(nn.Linear(8, 64), nn.Tanh(), nn.Linear(64, 4))
    return TensorDictModule(network, in_keys=["observation"], out_keys=["action"])


class Sleeping(nn.Module):
    """A policy whose forward leaves the CPU alone, as that of a GPU would."""

    in_keys, out_keys = ["observation"], ["action"]

    def forward(self, td: TensorDictBase) -> TensorDictBase:
        time.sleep(0.005)
        return td.set("action", td["observation"])


def request() -> TensorDict:
    return TensorDict({"observation": torch.zeros(8)})


class Actor:
    """Asks for as long as it is told, in several coroutines at once; says how often."""

    def __init__(self) -> None:
        torch.set_num_threads(1)

    async def use(self, transport: InferenceTransport) -> None:
        self.client: Any = transport.client()
        await self.client(request())

    async def ask(self, coroutines: int, window: Window) -> int:
        return await count([lambda: self.client(request())] * coroutines, window)

    async def ask_bare(self, server: Any, coroutines: int, window: Window) -> int:
        """A remote call for each request, and nothing else."""

        async def ask() -> None:
            await server.echo.remote(bytes(ECHO_NBYTES))

        return await count([ask] * coroutines, window)

    async def ask_echo(
        self, address: tuple[str, int], coroutines: int, window: Window, plain: bool
    ) -> int:
        """A connection for each coroutine, on this loop or, ``plain``, on one of asyncio's own."""
        if plain:
            return await asyncio.to_thread(
                _on_plain_loop, count_echoes(address, coroutines, window)
            )
        return await count_echoes(address, coroutines, window)

    async def use_theirs(self, client: Any) -> None:
        """Ask TorchRL's server once, whose start takes long."""
        self.theirs = client
        await asyncio.to_thread(client, request())

    async def ask_theirs(self, window: Window) -> int:
        async def ask() -> None:
            self.theirs(request())

        # It blocks, so it is the only one here, on a thread and a loop of its own.
        return await asyncio.to_thread(_on_plain_loop, count([ask], window))


def _on_plain_loop(coroutine: Any) -> Any:
    with asyncio.Runner(loop_factory=asyncio.SelectorEventLoop) as runner:
        return runner.run(coroutine)


async def _listen() -> tuple[asyncio.Server, tuple[str, int]]:
    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(1 << 16):
            writer.write(data)
        writer.close()

    server = await asyncio.start_server(answer, "127.0.0.1", 0)
    return server, server.sockets[0].getsockname()


class Echo:
    """Answers with what it is sent, on a connection and in calls."""

    async def listen(self) -> tuple[str, int]:
        self.server, address = await _listen()
        return address

    async def listen_plain(self) -> tuple[str, int]:
        """Do so on an event loop of asyncio's own, for ever."""
        listening: Future[tuple[str, int]] = Future()

        async def serve() -> None:
            server, address = await _listen()
            listening.set_result(address)
            await server.serve_forever()

        threading.Thread(target=_on_plain_loop, args=(serve(),), daemon=True).start()
        return await asyncio.wrap_future(listening)

    async def echo(self, data: bytes) -> bytes:
        return data


class Server:
    """A server in an actor of one's own."""

    def serve(self, transports: list[InferenceTransport]) -> None:
        self.server = InferenceServer(make_policy(), transports, max_batch_size=64).start()
