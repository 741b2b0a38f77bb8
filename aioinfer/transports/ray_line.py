"""What a relay takes and gives, and its line to a server, which costs a fraction of a call.

See :mod:`aioinfer.transports.ray_relay`.
This module imports nothing of the package, nor torch: it goes where relays go, by value.
"""

from __future__ import annotations

import asyncio
import hmac
import struct
from collections.abc import Callable
from typing import Any

Numbered = tuple[int, bytes]
"""A number, and a call or the answer to the call of this number."""

GOODBYE = 0
"""The number of a server's last message."""

# Formats and not Struct objects, which would not pickle.
_CALL, _CALL_NBYTES = "<16sq", struct.calcsize("<16sq")
_ANSWER, _ANSWER_NBYTES = "<q", struct.calcsize("<q")
_HEAD, _HEAD_NBYTES = "<QQ", struct.calcsize("<QQ")


def pack_call(connection: bytes, number: int, data: bytes) -> bytes:
    """The arguments of ``exchange`` as bytes, which Ray need not pickle."""
    return struct.pack(_CALL, connection, number) + data


def unpack_call(call: bytes) -> tuple[bytes, int, bytes]:
    """The arguments again."""
    return *struct.unpack_from(_CALL, call), call[_CALL_NBYTES:]


def pack_answer(number: int, data: bytes) -> bytes:
    """What ``exchange`` returns, as bytes."""
    return struct.pack(_ANSWER, number) + data


def unpack_answer(answer: bytes) -> tuple[int, bytes]:
    """What it returned."""
    return struct.unpack_from(_ANSWER, answer)[0], answer[_ANSWER_NBYTES:]


class Line(asyncio.Protocol):
    """One end of a Unix socket between a relay and a server.

    Args:
        take: called with the messages that have come, in their order.
        ended: called with this object when the other end has gone.
        token: what that one must show before anything that it says is looked at.
        admit: called with this object once it has.
    """

    def __init__(
        self,
        take: Callable[[list[Numbered]], None],
        ended: Callable[[Line], None],
        token: bytes = b"",
        admit: Callable[[Line], None] | None = None,
    ) -> None:
        self._take = take
        self._ended = ended
        self._token = token
        self._admit = admit
        self._loop = asyncio.get_running_loop()
        self._transport: Any = None
        self._unread = bytearray()
        self._unsent: list[bytes] = []
        self.over: asyncio.Future[None] = self._loop.create_future()
        """Done once it has ended."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport

    def connection_lost(self, error: Exception | None) -> None:
        if not self.over.done():
            self.over.set_result(None)
        if not self._token:
            self._ended(self)

    def data_received(self, data: bytes) -> None:
        self._unread += data
        if self._token and not self._is_shown():
            return
        messages, start = [], 0
        while len(self._unread) >= (begin := start + _HEAD_NBYTES):
            number, nbytes = struct.unpack_from(_HEAD, self._unread, start)
            if len(self._unread) < begin + nbytes:
                break
            start = begin + nbytes
            messages.append((number, bytes(self._unread[begin:start])))
        del self._unread[:start]
        if messages:
            self._take(messages)

    def _is_shown(self) -> bool:
        expected = len(self._token)
        if len(self._unread) < expected:
            return False
        if not hmac.compare_digest(self._unread[:expected], self._token):
            self.abort()
            return False
        del self._unread[:expected]
        self._token = b""
        if self._admit is not None:
            self._admit(self)
        return True

    def show(self, token: bytes) -> None:
        """Show what the other end wants to see first."""
        self._transport.write(token)

    def send(self, number: int, data: bytes) -> None:
        """Send a message, with all others of this turn of the loop."""
        if not self._unsent:
            self._loop.call_soon(self._flush)
        self._unsent += (struct.pack(_HEAD, number, len(data)), data)

    def _flush(self) -> None:
        unsent, self._unsent = self._unsent, []
        if unsent and not self._transport.is_closing():
            self._transport.write(b"".join(unsent))

    def close(self) -> None:
        """End it, once everything is sent."""
        self._flush()
        self._transport.close()

    def abort(self) -> None:
        """End it now."""
        self._transport.abort()
