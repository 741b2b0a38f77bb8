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
import weakref
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
from aioinfer.signature import Signature
from aioinfer.transports import wire
from aioinfer.transports.slots import Slots
from aioinfer.transports.wire import Kind, Slot, WireError
from aioinfer.transports.wire.dtypes import NotDenseError
from aioinfer.transports.wire.frames import FrameReader
from aioinfer.transports.wire.layouts import Layout, LayoutReceiver, LayoutSender, decode_layout
from aioinfer.transports.wire.payload import Packed, pack_described, unpack_object

MAX_PAYLOAD = wire.MAX_BODY - wire.REQUEST_NBYTES
"""Bytes of the largest request that a message can hold."""

_clock = MonotonicClock()
_REMEMBERED = 256


class Asked(NamedTuple):
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
        self._asked: dict[int, Asked] = {}
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
        self._asked[request_id] = Asked(request, slot)
        self._put(frames[0] if len(frames) == 1 else b"".join(frames))
        if self.gone is not None and self._asked.pop(request_id, None) is not None:
            raise self._gone()  # else it was told, as one of those that were under way

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

    def _read(self, head: wire.ReplyHead, asked: Asked, body: bytearray) -> Any:
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
        if not head.batched and len(body) == start + layout.row_nbytes:  # most often
            return layout.row(body, start)
        leaves = layout.read(body, head.rows, head.batched, start)
        return layout.tensordict(leaves, head.rows, head.batched)

    def _settle(self, asked: Asked, outcome: Any) -> None:
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


def no_server() -> ServerClosedError:
    """Make the error of those who ask where nobody listens."""
    return ServerClosedError(
        "no running server is attached to this transport; start one before calling a client"
    )
