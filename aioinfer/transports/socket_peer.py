"""The server's side of a Unix socket."""

from __future__ import annotations

import contextlib
import hmac
import logging
import os
import socket
import threading
from collections import deque
from collections.abc import Callable

from aioinfer.intake import Intake
from aioinfer.request import State
from aioinfer.transports import peer as peers
from aioinfer.transports import wire
from aioinfer.transports.peer import ANY_THREAD, Peer
from aioinfer.transports.sockets import Outbox
from aioinfer.transports.wire import Kind, WireError

_log = logging.getLogger("aioinfer")

HELLO_TIMEOUT_S = 5.0
"""Seconds in which who connects must show the token."""
_MAX_DESCRIPTORS = 8
_HELLO_NBYTES = len(wire.encode(wire.Hello(0, 0, bytes(32))))
_ANCILLARY_NBYTES = socket.CMSG_SPACE(_MAX_DESCRIPTORS * 4)


class SocketPeer(Peer):
    """A conversation over a Unix socket.

    Reads on the server's loop, and answers from whatever thread has the answer.

    Args:
        connection: the connected socket; closed in the end.
        intake: where requests go.
        token: what the client must show first.
        closed: called, on the loop, with this object once the connection has ended.
    """

    def __init__(
        self,
        connection: socket.socket,
        intake: Intake,
        token: bytes,
        closed: Callable[[SocketPeer], None],
    ) -> None:
        super().__init__(intake, closed)
        self.port = ANY_THREAD
        self.socket = connection
        self._token = token
        self._greeting_nbytes = _HELLO_NBYTES
        """Bytes still to come of the first frame; nothing more is read before it is checked."""
        self._descriptors: deque[int] = deque()
        self._lock = threading.Lock()  # around everything that is sent
        connection.setblocking(False)
        self._outbox = Outbox(connection)
        self._hung_up = False
        self._welcome = False
        self._timer = self._loop.call_later(HELLO_TIMEOUT_S, self._expect_hello)
        self._loop.add_reader(connection.fileno(), self._readable)

    # -- requests -----------------------------------------------------------

    def _readable(self) -> None:
        space = self._reader.space()
        if not self._welcome:
            space = space[: self._greeting_nbytes]
        try:
            count, ancillary, _, _ = self.socket.recvmsg_into([space], _ANCILLARY_NBYTES)
        except (BlockingIOError, InterruptedError):
            return
        except OSError:
            count, ancillary = 0, []
        try:
            if count and not ancillary and self._welcome:  # most often it is one whole request
                body = self._reader.request(count)
                if body is not None:
                    self._ask(body)
                    return
            for level, kind, data in ancillary:
                if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
                    usable = len(data) - len(data) % 4
                    numbers = memoryview(data[:usable]).cast("i")
                    self._descriptors.extend(numbers)
            if len(self._descriptors) > _MAX_DESCRIPTORS:
                raise WireError("more descriptors than arenas")
            if not count:
                self.close(None)
                return
            for kind_, body in self._reader.received(count):
                self._handle(kind_, body)
                if self._over:
                    return
            if not self._welcome:
                self._greeting_nbytes -= count
                if not self._greeting_nbytes:
                    raise WireError("the first frame is no HELLO")
            if self._reader.broken is not None:
                raise self._reader.broken
        except WireError as error:
            self._not_understood(error)

    def _handle(self, kind: Kind, body: bytearray) -> None:
        if self._welcome:
            super()._handle(kind, body)
        else:
            self._greet(kind, body)

    def _greet(self, kind: Kind, body: bytearray) -> None:
        if kind is not Kind.HELLO:
            raise WireError(f"{kind.name} before HELLO")
        hello = wire.decode(kind, body)
        if not hmac.compare_digest(hello.token, self._token):
            raise WireError("a HELLO with the wrong token")
        if hello.protocol != wire.PROTOCOL:
            raise WireError(f"protocol {hello.protocol}, this server speaks {wire.PROTOCOL}")
        self._welcome = True
        self._timer.cancel()

    def _descriptor(self) -> int:
        return self._descriptors.popleft() if self._descriptors else super()._descriptor()

    # -- answers ------------------------------------------------------------

    def send(self, data: bytes | memoryview) -> None:
        """Send frames, never blocking; on any thread."""
        with self._lock:
            if not (self._over or self._outbox.waiting):
                try:
                    sent = self.socket.send(data)
                except OSError:  # full, or gone
                    sent = 0
                if sent < len(data):
                    self._put(data[sent:])
            else:
                self._put(data)
        if self._hung_up and not self._open:
            self.forget()

    def _put(self, data: bytes | memoryview) -> None:
        """Send, never blocking; the lock is held."""
        if self._over or not data:
            return
        try:
            if self._outbox.put(data):
                return
        except OSError:  # it has gone; the loop will read that
            return
        slow = self._outbox.nbytes > peers.MAX_WAITING_NBYTES
        # Not here: this may be another thread than the loop's, and the lock is held.
        with contextlib.suppress(RuntimeError):  # the loop was closed
            self._loop.call_soon_threadsafe(self._give_in if slow else self._wait_for_room)

    def _wait_for_room(self) -> None:
        if not self._over:
            self._loop.add_writer(self.socket.fileno(), self._flush)

    def _flush(self) -> None:
        with self._lock:
            try:
                done = self._outbox.flush()
            except OSError:
                done = True
        if done:
            self._loop.remove_writer(self.socket.fileno())

    def _give_in(self) -> None:
        _log.warning("a client process that does not read its answers was disconnected")
        self.close(None)

    # -- the end ------------------------------------------------------------

    def _expect_hello(self) -> None:
        if not self._welcome:
            self.close(None)

    def _end(self) -> None:
        with self._lock:
            self._outbox.clear()
        self._timer.cancel()
        descriptor = self.socket.fileno()
        self._loop.remove_reader(descriptor)
        self._loop.remove_writer(descriptor)
        self.socket.close()
        while self._descriptors:
            os.close(self._descriptors.popleft())

    def forget(self) -> None:
        """Let go of what a forked child has inherited."""
        self.socket.close()

    def hang_up(self) -> None:
        """The loop was closed under the server: end the connection after what still runs."""
        self._hung_up = True
        if not any([request.state is State.RUNNING for request in list(self._open.values())]):
            self.forget()
