"""The client's side of a connection to a server in another process.

Coroutines share one connection per event loop, read when the loop says that something came. A
thread has a connection of its own and reads it while it waits: no other thread has to be woken
on the way to its answer.
"""

from __future__ import annotations

import abc
import asyncio
import contextlib
import itertools
import math
import os
import select
import socket
import threading
import weakref
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import InvalidStateError
from typing import Any, NamedTuple

from aioinfer.clock import MonotonicClock
from aioinfer.errors import (
    InferenceError,
    InvalidRequestError,
    ModelError,
    ServerClosedError,
    ServerDiedError,
)
from aioinfer.intake import running_loop
from aioinfer.request import GivenUp, Request, Source
from aioinfer.signature import Signature, describe
from aioinfer.transports import wire
from aioinfer.transports.payload import (
    Layout,
    LayoutReceiver,
    LayoutSender,
    NotDenseError,
    Packed,
    decode_layout,
    pack_described,
    unpack_object,
)
from aioinfer.transports.slots import Slots
from aioinfer.transports.wire import FrameReader, Kind, Slot, WireError

MAX_PAYLOAD = wire.MAX_BODY - wire.REQUEST_NBYTES
"""Bytes of the largest request that a message can hold."""

_clock = MonotonicClock()
_REMEMBERED = 256


class _Asked(NamedTuple):
    """A request on its way, and the slot that it and its reply may lie in."""

    request: Request
    slot: Slot | None


class Channel(abc.ABC):
    """A client's conversation with a server: requests to frames, frames to answers.

    What carries the frames is up to subclasses.

    Args:
        inline_nbytes: payloads larger than this go through shared memory; ``None`` where the
            two sides share none.
    """

    def __init__(self, inline_nbytes: int | None) -> None:
        self.gone: InferenceError | None = None
        """Why this connection has ended."""
        self.load: int | None = None
        """Rows, of whomever, that the server had under way when it last answered."""
        self.room: int | None = None
        """Rows that it is worth filling with, as far as it knows."""
        self._inline_nbytes = math.inf if inline_nbytes is None else inline_nbytes
        self._closing: Exception | None = None
        self._reader = FrameReader()
        self._ids = itertools.count()
        self._asked: dict[int, _Asked] = {}
        self._sources: dict[Source, int] = {}
        self._source_ids = itertools.count()
        self._layouts = LayoutSender()
        # How plain requests begin, and their layout.
        self._known: dict[tuple[Signature, Source], tuple[bytes, Layout]] = {}
        self._their_layouts = LayoutReceiver()
        self._slots = Slots()
        self._reply_nbytes: dict[Any, int] = {}  # per row, where replies are large
        self._usual_nbytes = wire.REPLY_FRAME_NBYTES  # of the frame of the latest reply

    # -- requests -----------------------------------------------------------

    def send(self, request: Request, *, block: bool) -> None:
        """Set a request on its way.

        Raises:
            InvalidRequestError: it cannot leave the process.
            ServerDiedError: the server went away.
        """
        signature: Signature = request.signature  # type: ignore[assignment]
        frames: list[bytes] = []
        slot = None
        looks = b""
        buffers: Sequence[Any] | None = None
        if block and not request.special:
            known = self._known.get((signature, request.source))
            if known is not None:
                looks, layout = known
                try:
                    buffers = layout.buffers(request.data)
                except NotDenseError:
                    pass
        if buffers is None:
            looks, buffers, slot = self._look_at(request, signature, block, frames)
        request_id = request.number = next(self._ids)
        request.submitted_at = _clock()
        if request.timeout is not None:
            request.deadline = request.submitted_at + request.timeout
        frames.append(wire.complete_request(looks, request_id, request.submitted_at, buffers))
        request.data = None
        request.port = self  # type: ignore[assignment]
        self._asked[request_id] = _Asked(request, slot)
        self._put(frames[0] if len(frames) == 1 else b"".join(frames))
        if self.gone is not None:
            self._asked.pop(request_id, None)
            raise self._gone()

    def _look_at(
        self, request: Request, signature: Signature, block: bool, frames: list[bytes]
    ) -> tuple[bytes, Sequence[Any], Slot | None]:
        """Work out how a request travels, and remember it where the next goes the same way.

        Returns:
            The beginning of its frame, what follows of its payload, and its slot. What must be
            sent before is appended to ``frames``.
        """
        packed = pack_described(request.data, request.rows, request.batched, signature)
        if packed.nbytes > MAX_PAYLOAD and self._inline_nbytes > MAX_PAYLOAD:
            raise InvalidRequestError(
                f"a request of {packed.nbytes} bytes is too large to be sent; "
                f"allowed are {MAX_PAYLOAD}"
            )
        source = self._sources.get(request.source)
        if source is None:
            source = self._sources[request.source] = next(self._source_ids)
            frames.append(wire.encode(wire.Join(source)))
        layout_id, news = self._layouts.id_of(packed.layout)
        if news is not None:
            frames.append(news)
            self._known.clear()  # an id may have another meaning now
        slot, in_slot = self._place(packed, self._reply_nbytes.get(signature, 0) * request.rows)
        looks = wire.encode_looks(
            source,
            layout_id,
            packed.nbytes,
            request.rows,
            request.batched,
            timeout=request.timeout,
            priority=request.priority,
            mode=signature.mode,
            block=block,
            slot=slot,
            in_slot=in_slot,
            reply_in_slot=slot is not None,
        )
        if packed.layout is not None and slot is None and block and not request.special:
            if len(self._known) > _REMEMBERED:
                self._known.clear()
            self._known[signature, request.source] = looks, packed.layout
        return looks, () if in_slot else packed.buffers, slot

    def give_up(self, request: Request, why: GivenUp) -> None:
        """The caller of a request no longer wants its answer. Never raises."""
        request.given_up = why
        asked = self._asked.get(request.number)
        if asked is not None and asked.request is request:
            self._put(wire.encode(wire.GiveUp(request.number, why)))

    def leave(self, source: Source) -> None:
        """A client is gone; the last one takes the connection with it."""
        number = self._sources.pop(source, None)
        self._known.clear()
        if number is None or self.gone is not None:
            return
        if self._sources or self._asked:
            self._put(wire.encode(wire.Leave(number)))
        else:
            self.close()

    def close(self) -> None:
        """End the connection."""
        self.lose(ServerClosedError("the client was closed"))

    def forget(self) -> None:
        """Let go of what a forked child has inherited."""
        self.gone = ServerClosedError("the connection belongs to the parent process")

    def _place(self, packed: Packed, reply_nbytes: int) -> tuple[Slot | None, bool]:
        """Find the slot that the request is in, or its reply may be, and fill it."""
        in_slot = packed.nbytes > self._inline_nbytes
        nbytes = max(packed.nbytes if in_slot else 0, reply_nbytes)
        if nbytes <= self._inline_nbytes or self._slots.exhausted:
            return None, False
        slot, new = self._slots.take(nbytes)
        if new is not None:
            size, descriptor = new
            try:
                self._put(wire.encode(wire.Arena(slot.arena, size)), descriptor)
            finally:
                os.close(descriptor)
        if in_slot:
            with self._slots.view(slot) as view:
                packed.write(view)
        return slot, in_slot

    # -- answers ------------------------------------------------------------

    def hear(self, data: wire.Buffer) -> None:
        """Take bytes that have come, and answer those who wait for what is in them."""
        try:
            for kind, body in self._reader.feed(data):
                self._handle(kind, body)
        except WireError as error:
            self._not_understood(error)

    def _not_understood(self, error: WireError) -> None:
        self.lose(ServerDiedError(f"the server sent what is not a message: {error}"))

    def _handle(self, kind: Kind, body: bytearray) -> None:
        if kind is Kind.REPLY:
            head = wire.decode_reply(body)
            self.load, self.room = head.load, head.room or None
            asked = self._asked.pop(head.request_id, None)
            if asked is not None:
                self._settle(asked, self._read(head, asked, body))
        elif kind is Kind.ERROR:
            request_id, error = wire.decode_error(body)
            asked = self._asked.pop(request_id, None)
            if asked is not None:
                self._settle(asked, error)
        elif kind is Kind.DROPPED:
            asked = self._asked.pop(wire.decode(kind, body).request_id, None)
            if asked is not None and asked.slot is not None:
                self._slots.give_back(asked.slot)
        elif kind is Kind.LAYOUT:
            self._their_layouts.define(*decode_layout(body))
        elif kind is Kind.CLOSING:
            self._closing = wire.decode_error(body)[1]
        else:
            wire.decode(kind, body)

    def _read(self, head: wire.ReplyHead, asked: _Asked, body: bytearray) -> Any:
        layout = self._their_layouts.get(head.layout_id)
        start = wire.REPLY_NBYTES
        self._usual_nbytes = min(8 + len(body), 1 << 16)
        if head.in_slot:
            if asked.slot is None:
                raise WireError("a reply lies in a slot that was not offered")
            with self._slots.view(asked.slot) as view:
                nbytes = len(view) if layout is None else layout.nbytes(head.rows)
                body, start = bytearray(view[:nbytes]), 0
        elif len(body) > self._inline_nbytes:
            # The next request like this one offers a slot to its reply.
            if len(self._reply_nbytes) > _REMEMBERED:
                self._reply_nbytes.clear()
            self._known.clear()
            self._reply_nbytes[asked.request.signature] = len(body) // asked.request.rows + 1
        if layout is None:
            try:
                return unpack_object(body, start, exact=not head.in_slot)
            except InferenceError as error:
                failed = ModelError(f"the answer cannot be rebuilt in this process: {error}")
                failed.__cause__ = error.__cause__
                return failed
        leaves = layout.read(body, head.rows, head.batched, start)
        return layout.tensordict(leaves, head.rows, head.batched)

    def _settle(self, asked: _Asked, outcome: Any) -> None:
        if asked.slot is not None:
            self._slots.give_back(asked.slot)
        handle = asked.request.handle
        if asked.request.given_up is not None or handle.done():
            return
        try:
            if isinstance(outcome, BaseException):
                handle.set_exception(outcome)
            else:
                handle.set_result(outcome)
        except InvalidStateError:  # given up in this moment, on another thread
            pass

    # -- the end ------------------------------------------------------------

    def lose(self, error: InferenceError) -> None:
        """The connection has ended; tell everybody who waits, with the server's words if any."""
        if self.gone is not None:
            return
        self.gone = self._closing if isinstance(self._closing, InferenceError) else error
        self._end()
        asked, self._asked = self._asked, {}
        for each in asked.values():
            self._settle(each, self._gone())

    def _gone(self) -> InferenceError:
        """A fresh error that says why the connection has ended."""
        assert self.gone is not None
        return type(self.gone)(*self.gone.args)

    @abc.abstractmethod
    def _put(self, data: bytes, descriptor: int | None = None) -> None:
        """Send a frame; whoever cannot learns it from :attr:`gone`."""

    @abc.abstractmethod
    def _end(self) -> None:
        """Let go of what carries the frames."""


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


def no_server() -> ServerClosedError:
    """Make the error of those who ask where nobody listens."""
    return ServerClosedError(
        "no running server is attached to this transport; start one before calling a client"
    )


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


class OnLoop(Channel):
    """The conversation of the coroutines of one event loop; other threads may enter it."""

    _loop: weakref.ref[asyncio.AbstractEventLoop]  # it refers to this channel, not the reverse

    @property
    def loop(self) -> asyncio.AbstractEventLoop | None:
        """The event loop; ``None`` once it is closed."""
        loop = self._loop()
        return None if loop is None or loop.is_closed() else loop

    def give_up(self, request: Request, why: GivenUp) -> None:
        self._on_loop(super().give_up, request, why)

    def leave(self, source: Source) -> None:
        self._on_loop(super().leave, source)

    def _on_loop(self, function: Callable[..., None], *args: Any) -> None:
        loop = self.loop
        if loop is None:
            return
        if running_loop() is loop:
            function(*args)
        else:
            with contextlib.suppress(RuntimeError):  # closed since
                loop.call_soon_threadsafe(function, *args)


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


class RemoteWaiter:
    """What a thread waits on: its own connection."""

    __slots__ = ("_done", "_error", "_result", "channel")

    def __init__(self) -> None:
        self.channel: ThreadChannel | None = None
        self._done = False
        self._result: Any = None
        self._error: BaseException | None = None

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

    def result(self) -> Any:
        """Return the answer, or raise it; once."""
        error, self._error = self._error, None
        if error is not None:
            try:
                raise error
            finally:
                del error  # its traceback refers to this frame
        return self._result


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
        frame = wire.complete_request(looks, request_id, _clock(), buffers)
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
        self._asked[request_id] = _Asked(request, None)
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

    def _arrived(self, timeout_ms: int) -> bool:
        """Wait until something can be read; return whether it can."""
        return bool(self._poll.poll(timeout_ms))

    def wait(self, waiter: RemoteWaiter, timeout: float | None) -> bool:
        """Read until the waiter has its answer."""
        give_up_at = None if timeout is None else _clock() + timeout
        while not waiter.done():
            if give_up_at is not None:
                left = give_up_at - _clock()
                if left <= 0 or not self._arrived(math.ceil(left * 1e3)):
                    return waiter.done()
            else:
                self._poll.poll()
            if self.gone is not None:
                raise self._gone()
            self.receive()
        if self._left:
            self._let_go()
        return True

    def leave(self, source: Source) -> None:
        self._left.append(source)
        self._let_go()

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
