"""How a server gets calls from its relay, which cannot call the program that drives a cluster."""

from __future__ import annotations

import asyncio
import importlib
import logging
import os
import secrets
import socket
from typing import Any

from aioinfer.transports.address import Address
from aioinfer.transports.ray_line import GOODBYE, Line, Numbered, pack_answer, unpack_call
from aioinfer.transports.rpc import RpcHub

_log = logging.getLogger("aioinfer")


class Pump:
    """Gets calls for a hub from a relay, and brings it the answers.

    Over a line, where both are on one host; else by asking for calls, again and again.

    Args:
        relay: the handle of the actor.
        hub: answers the calls; ``None`` if there will be none.
    """

    def __init__(self, relay: Any, hub: RpcHub | None) -> None:
        self._relay = relay
        self._hub = hub
        self._loop = asyncio.get_running_loop()
        self._name = secrets.token_bytes(16)
        self._stay: Any = None
        self._line: Line | None = None
        self._replies: list[Numbered] = []
        self._scheduled = False
        self._asks = 0
        self._tasks: set[asyncio.Task[None]] = set()
        self._answering: set[asyncio.Task[None]] = set()

    async def announce(self, where: Any) -> bool:
        """Let clients find the server; return whether it may serve."""
        ray = importlib.import_module("ray")
        context = ray.get_runtime_context()
        actor = None if context.get_actor_id() is None else context.current_actor
        self._stay = self._relay.stay.remote(self._name)
        entrance = _Entrance(self._take, self._lost)
        address = None if self._hub is None else await entrance.open()
        try:
            may, has_line = await self._relay.announce.remote(
                self._name,
                where,
                (context.get_worker_id(), os.getpid()),
                actor,
                [self._stay],
                address,
            )
            if has_line:
                self._line = await entrance.line
        finally:
            entrance.close()
        if may and self._hub is not None and not has_line:
            self._ask()
        return bool(may)

    async def withdraw(self) -> None:
        """Let nobody find it any more. The hub is closed, and so answers all calls."""
        ray = importlib.import_module("ray")
        is_here = self._loop is asyncio.get_running_loop()
        if is_here and self._answering:
            await asyncio.wait(self._answering)
        line, self._line = self._line, None
        if is_here and line is not None:
            line.send(GOODBYE, b"")
            line.close()
        replies, self._replies = self._replies, []
        try:
            await self._relay.withdraw.remote(self._name, replies, is_here)
        except ray.exceptions.RayError:  # the relay has gone, and everybody knows
            pass
        if not self._loop.is_closed():
            for task in self._tasks:
                task.cancel()

    def _take(self, calls: list[Numbered]) -> None:
        for number, call in calls:
            task = self._loop.create_task(self._answer(number, call), name="aioinfer answers")
            self._answering.add(task)
            task.add_done_callback(self._answering.discard)

    async def _answer(self, number: int, call: bytes) -> None:
        assert self._hub is not None
        said = pack_answer(*await self._hub.exchange(*unpack_call(call)))
        if self._line is not None:
            self._line.send(number, said)
            return
        self._replies.append((number, said))
        if not self._scheduled:
            self._scheduled = True
            self._loop.call_soon(self._ask)  # with what else is answered

    # -- over a line --------------------------------------------------------

    def _lost(self, line: Line) -> None:
        if self._line is line:
            _log.error("no more calls reach the server: the relay has gone")

    # -- without one --------------------------------------------------------

    def _ask(self) -> None:
        assert self._hub is not None
        self._scheduled = False
        replies, self._replies = self._replies, []
        calls = self._relay.serve.remote(self._name, replies, self._hub.busy)
        self._asks += 1
        task = self._loop.create_task(self._asked(calls), name="aioinfer asks")
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _asked(self, asked: Any) -> None:
        try:
            calls = await asked
        except Exception as error:
            _log.error("no more calls reach the server: %s", error)
            return
        self._asks -= 1
        self._take(calls)
        if not self._asks:
            self._ask()


class _Entrance:
    """Where a relay finds a server of its host, for as long as it is told of it.

    Args:
        take: as of :class:`Line`.
        lost: as of :class:`Line`.
    """

    def __init__(self, take: Any, lost: Any) -> None:
        self._take = take
        self._lost = lost
        self._came: list[Line] = []
        self._server: asyncio.Server | None = None
        self._address: Address | None = None
        self.line: asyncio.Future[Line] = asyncio.get_running_loop().create_future()
        """The relay's, once that has shown the token."""

    async def open(self) -> tuple[str, bytes] | None:
        """Begin to listen; return where, and the token. ``None`` where that is not possible."""
        if not hasattr(socket, "AF_UNIX"):
            return None
        address = Address.new()
        try:
            listener = address.listen()
        except OSError:  # no room in the file system, where there are no abstract names
            return None
        loop = asyncio.get_running_loop()
        self._server = await loop.create_unix_server(self._new_line, sock=listener)
        self._address = address
        return address.path, address.token  # without our class, which would import torch there

    def _new_line(self) -> Line:
        assert self._address is not None
        line = Line(self._take, self._lost, self._address.token, self._admit)
        self._came.append(line)
        return line

    def _admit(self, line: Line) -> None:
        if not self.line.done():
            self.line.set_result(line)

    def close(self) -> None:
        """Listen no longer."""
        if self._server is None or self._address is None:
            return
        self._server.close()
        self._address.unlink()
        for line in self._came:
            if not (self.line.done() and self.line.result() is line):
                line.abort()
