"""Conversations over a Unix socket: one for the coroutines of an event loop, one for a thread."""

from __future__ import annotations

import asyncio
import contextlib
import math
import os
import select
import socket
import threading
import weakref
from collections import deque
from typing import Any

from aioinfer.errors import ServerDiedError
from aioinfer.intake import running_loop
from aioinfer.request import GivenUp, Request, Source
from aioinfer.signature import describe
from aioinfer.transports import channel as channels
from aioinfer.transports import wire
from aioinfer.transports.channel import Asked, Channel, OnLoop
from aioinfer.transports.wire import WireError
from aioinfer.transports.wire.dtypes import NotDenseError
from aioinfer.waiting import Answered


class SocketChannel(Channel):
    """A conversation over a stream socket.

    Args:
        connection: connected to the server; closed in the end.
        inline_nbytes: payloads larger than this go through shared memory.
        hello: what is said first.
    """

    def __init__(
        self, connection: socket.socket, inline_nbytes: int | None, hello: bytes = b""
    ) -> None:
        super().__init__(inline_nbytes)
        self.socket = connection
        if hello:
            self._put(hello)

    def forget(self) -> None:
        super().forget()
        self.socket.close()

    def receive(self) -> None:
        """Take what has come, and answer those who wait for it."""
        try:
            count = self.socket.recv_into(self._reader.space())
        except (BlockingIOError, InterruptedError):
            return
        except OSError:
            count = 0
        self._received(count)

    def _received(self, count: int) -> None:
        """Handle what has come into the reader's space; nothing at all is the end."""
        if not count:
            self.lose(ServerDiedError("the connection to the server has ended"))
            return
        try:
            for kind, body in self._reader.received(count):
                self._handle(kind, body)
        except WireError as error:
            self._not_understood(error)
        else:
            if self._reader.broken is not None:
                self._not_understood(self._reader.broken)


class Outbox:
    """Sends on a non-blocking socket; what does not fit now goes when there is room."""

    def __init__(self, connection: socket.socket) -> None:
        self.waiting: deque[tuple[memoryview, int | None]] = deque()
        self.nbytes = 0
        """Bytes that wait for room."""
        self._socket = connection

    def put(self, data: bytes | memoryview, descriptor: int | None = None) -> bool:
        """Send, and return whether all of it went.

        Raises:
            OSError: the connection is broken.
        """
        if not self.waiting and descriptor is None:
            try:
                sent = self._socket.send(data)
            except (BlockingIOError, InterruptedError):
                sent = 0
            if sent == len(data):
                return True
            data = data[sent:]
        self.waiting.append((memoryview(data), None if descriptor is None else os.dup(descriptor)))
        self.nbytes += len(data)
        return self.flush()

    def flush(self) -> bool:
        """Send what waits; return whether all of it went."""
        while self.waiting:
            data, descriptor = self.waiting[0]
            try:
                if descriptor is None:
                    sent = self._socket.send(data)
                else:
                    sent = socket.send_fds(self._socket, [data], [descriptor])
            except (BlockingIOError, InterruptedError):
                return False
            self.nbytes -= sent
            if descriptor is not None:
                os.close(descriptor)
            if sent < len(data):
                self.waiting[0] = (data[sent:], None)
            else:
                self.waiting.popleft()
        return True

    def clear(self) -> None:
        """Forget what waits."""
        while self.waiting:
            _, descriptor = self.waiting.popleft()
            if descriptor is not None:
                os.close(descriptor)
        self.nbytes = 0


class LoopChannel(OnLoop, SocketChannel):
    """The connection of the coroutines of one event loop."""

    def __init__(
        self,
        connection: socket.socket,
        inline_nbytes: int | None,
        hello: bytes,
        loop: asyncio.AbstractEventLoop,
    ) -> None:
        self._loop = weakref.ref(loop)
        self._outbox: Outbox | None = None
        super().__init__(connection, inline_nbytes, hello)
        loop.add_reader(self.socket.fileno(), self.receive)

    def _put(self, data: bytes, descriptor: int | None = None) -> None:
        if self.gone is not None:
            return
        if self._outbox is None:
            self.socket.setblocking(False)
            self._outbox = Outbox(self.socket)
        try:
            if not self._outbox.put(data, descriptor) and (loop := self.loop) is not None:
                loop.add_writer(self.socket.fileno(), self._flush)
        except OSError:
            self._broken()

    def _flush(self) -> None:
        assert self._outbox is not None
        try:
            if self._outbox.flush() and (loop := self.loop) is not None:
                loop.remove_writer(self.socket.fileno())
        except OSError:
            self._broken()

    def _broken(self) -> None:
        # The server may have said why before it went.
        while self.gone is None:
            self.receive()

    def _end(self) -> None:
        loop = self.loop
        if loop is not None and self.socket.fileno() >= 0:
            loop.remove_reader(self.socket.fileno())
            loop.remove_writer(self.socket.fileno())
        if self._outbox is not None:
            self._outbox.clear()
        self.socket.close()


class RemoteWaiter(Answered):
    """What a thread waits on: its own connection."""

    __slots__ = ("_done", "channel")

    def __init__(self) -> None:
        super().__init__()
        self.channel: ThreadChannel | None = None
        self._done = False

    def done(self) -> bool:
        """Whether the answer is here."""
        return self._done

    def set_result(self, result: Any) -> None:
        """Take the answer."""
        self._result, self._done = result, True

    def set_exception(self, error: BaseException) -> None:
        """Take the error."""
        self._error, self._done = error, True

    def wait(self, timeout: float | None) -> bool:
        """Block until answered or ``timeout`` seconds have passed; return whether answered."""
        assert self.channel is not None
        return self.channel.wait(self, timeout)


class ThreadChannel(SocketChannel):
    """The connection of one thread."""

    def __init__(
        self, connection: socket.socket, inline_nbytes: int | None, hello: bytes = b""
    ) -> None:
        self._lock = threading.RLock()  # a client may leave on any thread
        self._left: deque[Source] = deque()
        super().__init__(connection, inline_nbytes, hello)
        self.socket.settimeout(None)
        self._poll = select.poll()
        self._poll.register(self.socket, select.POLLIN)

    def send(self, request: Request, *, block: bool) -> None:
        with self._lock:
            super().send(request, block=block)
        request.handle.channel = self

    def exchange(self, td: Any, source: Source) -> Any:
        """Ask for one plain row and wait, with nothing else under way; ``None`` if that is not so.

        This is :meth:`send` and :meth:`wait` for the call that actors make all the time. Of eight
        processes that share two cores none finds its code in a cache, so every function that is
        not called counts.
        """
        if self._asked or self._left or self.gone is not None or not self._reader.is_empty:
            return None
        leaves, _, batched, signature = describe(td, None)
        known = None if batched else self._known.get((signature, source))
        if known is None:
            return None
        looks, layout = known
        try:
            buffers = layout.buffers(leaves)
        except NotDenseError:
            return None
        request_id = next(self._ids)
        frame = wire.complete_request(looks, request_id, channels._clock(), buffers)
        with self._lock:
            try:
                self.socket.sendall(frame)
            except OSError:  # the server has gone, perhaps for another one
                return None
        buffer = bytearray(self._usual_nbytes)
        try:
            # Blocked in recv, this thread would also wake up when the server has taken the request.
            self._poll.poll()
            count = self.socket.recv_into(buffer)
        except OSError:
            count = 0
        except BaseException:  # KeyboardInterrupt
            self._put(wire.encode(wire.GiveUp(request_id, GivenUp.CANCELLED)))
            raise
        found = wire.decode_reply_frame(buffer, count)
        if found is not None and found[0] == request_id:
            try:
                their_layout = self._their_layouts.get(found[1])
            except WireError:  # which is found again below
                their_layout = None
            if their_layout and their_layout.row_nbytes == count - wire.REPLY_FRAME_NBYTES:
                return their_layout.row(buffer, wire.REPLY_FRAME_NBYTES)
        # It is something else, or not all of it.
        waiter = RemoteWaiter()
        waiter.channel = self
        request = Request(None, 1, False, signature, None, 0, source, waiter)
        request.number, request.port = request_id, self  # type: ignore[assignment]
        self._asked[request_id] = Asked(request, None)
        self._reader.space()[:count] = memoryview(buffer)[:count]
        self._received(count)
        try:
            waiter.wait(None)
        except BaseException:
            self.give_up(request, GivenUp.CANCELLED)
            raise
        return waiter.result()

    def look(self) -> None:
        """Take what came while nobody waited: perhaps that the server has gone."""
        while self.gone is None and self._arrived(0):
            self.receive()

    def _arrived(self, timeout_ms: int | None) -> bool:
        """Wait until something can be read, for ever if ``None``; return whether it can."""
        return bool(self._poll.poll(timeout_ms))

    def wait(self, waiter: RemoteWaiter, timeout: float | None) -> bool:
        """Read until the waiter has its answer."""
        give_up_at = None if timeout is None else channels._clock() + timeout
        while not waiter.done():
            if give_up_at is not None:
                left = give_up_at - channels._clock()
                if left <= 0 or not self._arrived(math.ceil(left * 1e3)):
                    return waiter.done()
            else:
                self._arrived(None)
            if self.gone is not None:
                raise self._gone()
            self.receive()
        if self._left:
            self._let_go()
        return True

    def leave(self, source: Source) -> None:
        if source not in self._sources:  # it was never asked for here
            return
        self._left.append(source)
        if running_loop() is None:
            self._let_go()
        else:  # a finalizer, on a loop that must not be blocked, however short the message is
            with contextlib.suppress(RuntimeError):  # the interpreter ends
                threading.Thread(target=self._let_go, name="aioinfer-leaves", daemon=True).start()

    def _let_go(self) -> None:
        # From a finalizer, perhaps in the middle of anything: never wait here.
        if self._lock.acquire(blocking=False):
            try:
                while self._left:
                    super().leave(self._left.popleft())
            finally:
                self._lock.release()

    def _put(self, data: bytes, descriptor: int | None = None) -> None:
        if self.gone is not None:
            return
        try:
            if descriptor is None:
                self.socket.sendall(data)
            else:
                sent = socket.send_fds(self.socket, [data], [descriptor])
                self.socket.sendall(data[sent:])
        except OSError:
            # The server may have said why before it went.
            while self.gone is None:
                self.receive()

    def _end(self) -> None:
        self.socket.close()
