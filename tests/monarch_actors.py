"""Actors for the tests of Monarch; apart from them, so that other processes can import these."""

from __future__ import annotations

import asyncio
import os
import threading
from typing import Any

import torch
from helpers import action, doubling, row, rows
from monarch.actor import Actor, concurrent_endpoint, endpoint
from tensordict import TensorDictBase

from aioinfer import InferenceServer, MonarchTransport, executor
from aioinfer.testing import RecordingModel


class Asking(Actor):
    """Awaits its client."""

    def __init__(self, client: Any) -> None:
        self.client = client

    @concurrent_endpoint
    async def ask(self, value: float) -> Any:
        """The answer, or the name of the error."""
        return await _outcome(self.client, value)

    @concurrent_endpoint
    async def ask_many(self, count: int) -> bool:
        """Whether every answer of so many is its own."""
        replies = await asyncio.gather(*(self.client(row(value)) for value in range(count)))
        some = await self.client(rows([3, 4]), timeout=30)
        return [action(reply) for reply in replies] == [2 * v for v in range(count)] and action(
            some
        ) == [6, 8]

    @concurrent_endpoint
    async def why(self, value: float) -> tuple[str, str, str]:
        """What the error of a request says."""
        try:
            await self.client(row(value))
        except Exception as error:
            return type(error).__name__, str(error), str(error.__cause__)
        return "", "", ""

    @concurrent_endpoint
    async def pid(self) -> int:
        return os.getpid()


class AskingInThreads(Actor):
    """Has sync endpoints, and threads."""

    def __init__(self, transport: MonarchTransport) -> None:
        self.client = transport.sync_client()

    @endpoint
    def ask(self, value: float) -> list[Any]:
        """The answers to the endpoint itself, to a future of it, and to a thread."""
        answers = [action(self.client(row(value), timeout=30))]
        answers.append(action(self.client.submit(row(value + 1)).result(30)))
        thread = threading.Thread(
            target=lambda: answers.append(action(self.client(row(value + 2), timeout=30)))
        )
        thread.start()
        thread.join()
        return answers


class Serving(Actor):
    """A server in an actor."""

    @concurrent_endpoint
    async def make(self, kind: Any) -> MonarchTransport:
        """A transport that is made here."""
        return MonarchTransport(kind)

    @concurrent_endpoint
    async def serve(self, transport: MonarchTransport, hold: bool = False) -> int:
        """Serve, with a policy that never answers if ``hold``; return the process's id."""
        self.model = RecordingModel()
        if hold:
            self.model.hold(limit_s=60)
            executor._JOIN_S = 0.1  # as long as the end of the process waits for that
        self.server = InferenceServer(self.model if hold else doubling(), transport)
        await self.server.__aenter__()
        return os.getpid()

    @concurrent_endpoint
    async def entered(self) -> None:
        """Return once a forward has begun."""
        await self.model.entered()

    @concurrent_endpoint
    async def close(self) -> None:
        await self.server.aclose()


async def _outcome(client: Any, value: float) -> Any:
    try:
        return action(await client(row(value)))
    except Exception as error:
        return type(error).__name__


class WithPid(torch.nn.Module):
    """A policy of one weight, whose answers say by which process they were computed."""

    in_keys, out_keys = ["observation"], ["action", "pid"]

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.tensor(2.0))

    def forward(self, td: TensorDictBase) -> TensorDictBase:
        observation = td["observation"]
        td["action"] = self.weight * observation
        td["pid"] = torch.full(td.batch_size, os.getpid())
        return td


def broken_policy() -> None:
    raise ZeroDivisionError("no policy today")
