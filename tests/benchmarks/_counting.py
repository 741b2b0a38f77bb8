"""Closed loops in many processes, counted between the same two moments."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, NamedTuple

ECHO_NBYTES = 64
Ask = Callable[[], Awaitable[Any]]


class Window(NamedTuple):
    """What counts: requests between two moments of ``time.monotonic``, one for all processes.

    Everybody asks before it begins, so that nobody is alone at first.
    """

    begin: float
    end: float

    @classmethod
    def soon(cls, warm_up_s: float, seconds: float) -> Window:
        begin = time.monotonic() + warm_up_s
        return cls(begin, begin + seconds)


async def count(asks: Sequence[Ask], window: Window) -> int:
    """How many requests were made in the window, by so many coroutines that ask without a pause.

    Each counts when it is made, and not the one under way when the window ends as well as the
    one when it begins: with many callers and few answers that would be a good part of them.
    """

    async def one(ask: Ask) -> int:
        made = 0
        while (now := time.monotonic()) < window.end:
            await ask()
            made += now >= window.begin
        return made

    return sum(await asyncio.gather(*map(one, asks)))


async def count_echoes(address: tuple[str, int], coroutines: int, window: Window) -> int:
    """:func:`count` of a bare TCP echo, over a connection per coroutine."""
    data = bytes(ECHO_NBYTES)
    streams = [await asyncio.open_connection(*address) for _ in range(coroutines)]

    def start(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> Ask:
        async def ask() -> None:
            writer.write(data)
            await reader.readexactly(ECHO_NBYTES)

        return ask

    try:
        return await count([start(*stream) for stream in streams], window)
    finally:
        for _, writer in streams:
            writer.close()
