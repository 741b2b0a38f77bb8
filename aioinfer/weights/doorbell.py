"""Short messages between a sender of weights and a receiver.

Both ends prove that they know the token before either reads anything that the other one says.
Each end has a thread of its own to read, so reads block; a write to who does not read gives up.
"""

from __future__ import annotations

import contextlib
import hmac
import os
import pickle
import secrets
import socket
import struct
import threading
from typing import Any

WRITE_TIMEOUT_S = 5
"""Seconds after which the other end counts as stuck."""
HELLO_TIMEOUT_S = 5.0
"""Seconds in which it must prove what it knows."""
_HEAD = struct.Struct("<I")
_INT = struct.Struct("i")
_ANCILLARY_NBYTES = socket.CMSG_SPACE(_INT.size)
_NONCE_NBYTES = 32


class Doorbell:
    """One end of the connection.

    Args:
        connection: a connected socket, Unix or TCP; owned from now on.
    """

    def __init__(self, connection: socket.socket) -> None:
        self._socket = connection
        self._sending = threading.Lock()
        connection.settimeout(None)
        interval = struct.pack("ll", WRITE_TIMEOUT_S, 0)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, interval)
        if connection.family != socket.AF_UNIX:
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    @property
    def host(self) -> str:
        """This end's address, as the other one reaches it; of TCP only."""
        return str(self._socket.getsockname()[0])

    # -- who is there -------------------------------------------------------

    def prove(self, token: bytes, who: bytes, other: bytes) -> None:
        """Exchange proofs that both ends know ``token``.

        Args:
            token: the secret.
            who: what this end is.
            other: what the other end must be.

        Raises:
            OSError: it does not know it, or went away, or took too long.
        """
        self._socket.settimeout(HELLO_TIMEOUT_S)
        mine = secrets.token_bytes(_NONCE_NBYTES)
        self._socket.sendall(mine)
        theirs = self._exactly(_NONCE_NBYTES)
        self._socket.sendall(_proof(token, who, theirs, mine))
        proof = self._exactly(32)
        if not hmac.compare_digest(proof, _proof(token, other, mine, theirs)):
            raise ConnectionError("the other end does not know the token")
        self._socket.settimeout(None)

    # -- messages -----------------------------------------------------------

    def send(self, message: Any, descriptor: int | None = None, *, urgent: bool = True) -> None:
        """Send a message, and a descriptor with it.

        Args:
            message: anything that pickles.
            descriptor: for the other end to have.
            urgent: if not, the message is left out where there is no room for it at once.

        Raises:
            OSError: the other end is gone or stuck.
        """
        body = pickle.dumps(message)
        data = _HEAD.pack(len(body)) + body
        with self._sending:
            sent = 0
            if descriptor is not None:
                sent = socket.send_fds(self._socket, [data], [descriptor])
            elif not urgent:
                # Of a short message, a Unix socket takes all or nothing, and TCP nearly always.
                with contextlib.suppress(BlockingIOError):
                    sent = self._socket.sendmsg([data], [], socket.MSG_DONTWAIT)
                if not sent:
                    return
            while sent < len(data):
                try:
                    sent += self._socket.send(memoryview(data)[sent:])
                except BlockingIOError as error:
                    raise ConnectionError(f"nothing was read for {WRITE_TIMEOUT_S} s") from error

    def receive(self) -> tuple[Any, int | None]:
        """Block this thread for a message, and the descriptor that came with it.

        Raises:
            OSError: the other end is gone, or this one was shut down.
        """
        head, ancillary, _, _ = self._socket.recvmsg(_HEAD.size, _ANCILLARY_NBYTES)
        descriptor = _INT.unpack(ancillary[0][2][: _INT.size])[0] if ancillary else None
        try:
            head += self._exactly(_HEAD.size - len(head)) if head else b""
            if not head:
                raise ConnectionError("the other end is gone")
            message = pickle.loads(self._exactly(_HEAD.unpack(head)[0]))
        except BaseException:
            if descriptor is not None:
                os.close(descriptor)
            raise
        return message, descriptor

    def fileno(self) -> int:
        """For who waits until something is said, or the other end is gone."""
        return self._socket.fileno()

    def is_over(self) -> bool:
        """Whether the other end is gone, and all that it said was read."""
        try:
            # On an event loop, too; nobody waits here.
            flags = socket.MSG_PEEK | socket.MSG_DONTWAIT
            count, *_ = self._socket.recvmsg_into([bytearray(1)], 0, flags)
        except BlockingIOError:
            return False
        except OSError:
            return True
        return not count

    def shut_down(self) -> None:
        """End the connection; who reads from it is woken. Any thread may call this."""
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Close the socket; only when nobody reads from it any more."""
        self._socket.close()

    def _exactly(self, count: int) -> bytes:
        parts = []
        while count:
            part = self._socket.recv(count)
            if not part:
                raise ConnectionError("the other end is gone")
            parts.append(part)
            count -= len(part)
        return b"".join(parts)


def _proof(token: bytes, who: bytes, theirs: bytes, mine: bytes) -> bytes:
    return hmac.digest(token, who + b"\0" + theirs + mine, "sha256")
