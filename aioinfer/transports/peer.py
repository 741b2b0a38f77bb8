"""The server's side of one connection from another process."""

from __future__ import annotations

import abc
import asyncio
import logging
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from aioinfer.errors import InferenceError, InvalidRequestError, ModelError
from aioinfer.intake import Intake
from aioinfer.replies import Columns
from aioinfer.request import Encoding, GivenUp, Request, Source
from aioinfer.signature import Signature, describe
from aioinfer.transports import wire
from aioinfer.transports.slots import Arenas
from aioinfer.transports.wire import Kind, Slot, WireError
from aioinfer.transports.wire.frames import FrameReader
from aioinfer.transports.wire.layouts import Layout, LayoutReceiver, LayoutSender, decode_layout
from aioinfer.transports.wire.payload import Packed, pack, unpack_object
from aioinfer.transports.wire.rows import Bodies, PackedColumns

_log = logging.getLogger("aioinfer")

MAX_WAITING_NBYTES = 1 << 28
"""Bytes that may wait for a client that does not read, before it is disconnected."""
_SMALL_NBYTES = 1 << 12
"""Replies up to this size are sent, even where there is a slot for them."""
_REMEMBERED = 256
_REQUEST = Kind.REQUEST


class _Looks(NamedTuple):
    """What a client's requests have in common, once it was checked."""

    begins: bytes
    """How the body begins: ``LOOKS_NBYTES`` of it."""
    nbytes: int
    """Bytes of the body."""
    data: Any
    """The request's data; ``None`` where that is the body itself."""
    encoding: Encoding | None
    rows: int
    batched: bool
    signature: Signature
    timeout: float | None
    priority: int
    source: Source
    block: bool
    reply_slot: Slot | None


class Peer(abc.ABC):
    """The server's conversation with a client: frames to requests, answers to frames.

    What carries the frames is up to subclasses.

    Args:
        intake: where requests go.
        closed: called, on the loop, with this object once the connection has ended.
    """

    port: Port
    """Takes the answers of a batch."""

    def __init__(self, intake: Intake, closed: Callable[[Any], None]) -> None:
        self._intake = intake
        self._loop: asyncio.AbstractEventLoop = intake.loop
        self._closed = closed
        self._reader = FrameReader()
        self._arenas = Arenas()
        self._clocks_agree = True
        """Whether the client reads the clock that the server reads."""
        self._sources: dict[int, Source] = {}
        self._open: dict[int, Request] = {}
        self._their_layouts = LayoutReceiver()
        self._known: dict[bytes, _Looks] = {}
        self._usual: _Looks | None = None  # of the latest request
        self._layouts = LayoutSender()
        self.last_layout: tuple[Layout | None, int] = (None, 0)
        """The layout of the latest replies, and its id."""
        self._over = False

    # -- requests -----------------------------------------------------------

    def hear(self, data: wire.Buffer) -> None:
        """Take bytes that have come; on the loop."""
        try:
            for kind, body in self._reader.feed(data):
                if self._over:
                    return
                self._handle(kind, body)
        except WireError as error:
            self._not_understood(error)

    def _handle(self, kind: Kind, body: bytearray) -> None:
        if kind is _REQUEST:
            self._ask(body)
        elif kind is Kind.LAYOUT:
            self._forget_looks()
            self._their_layouts.define(*decode_layout(body))
        elif kind is Kind.GIVE_UP:
            request_id, why = wire.decode(kind, body)
            request = self._open.pop(request_id, None)
            if request is not None:
                self._intake.give_up(request, why)
                self.send(wire.encode(wire.Dropped(request_id)))
        elif kind is Kind.JOIN:
            number = wire.decode(kind, body).source
            if number in self._sources:
                raise WireError(f"client {number} joined twice")
            self._sources[number] = source = Source()
            self._intake.join(source)
        elif kind is Kind.LEAVE:
            self._forget_looks()
            left = self._sources.pop(wire.decode(kind, body).source, None)
            if left is not None:
                self._leave(left)
        elif kind is Kind.ARENA:
            arena, nbytes = wire.decode(kind, body)
            self._arenas.add(arena, nbytes, self._descriptor())
        else:
            raise WireError(f"{kind.name} is for servers to say")

    def _descriptor(self) -> int:
        """The descriptor that came beside the frames."""
        raise WireError("an arena without its descriptor")

    def _ask(self, body: bytearray) -> None:
        request_id, submitted_at = wire.decode_number(body)
        if request_id in self._open:
            raise WireError(f"request {request_id} was asked twice")
        try:
            looks = self._usual
            if looks is None or looks.nbytes != len(body) or not body.startswith(looks.begins):
                looks = self._known.get(bytes(body[: wire.LOOKS_NBYTES]))
                if looks is None or looks.nbytes != len(body):
                    looks = self._look_at(body)
                self._usual = looks if looks.encoding is not None else None
            request = Request(
                body if looks.data is None else looks.data,
                looks.rows,
                looks.batched,
                looks.signature,
                looks.timeout,
                looks.priority,
                looks.source,
                (self, request_id, looks.reply_slot),
            )
            request.encoding = looks.encoding
            request.port = self.port
            self._open[request_id] = request
            self._intake.submit(
                request,
                block=looks.block,
                submitted_at=submitted_at if self._clocks_agree else None,
            )
        except (InferenceError, TypeError, ValueError) as error:
            self._open.pop(request_id, None)
            self.send(wire.encode_error(request_id, error))

    def _look_at(self, body: bytearray) -> _Looks:
        """Check all of a request, and remember the outcome where the next may look the same."""
        head = wire.decode_request(body)
        source = self._sources.get(head.source)
        if source is None:
            raise WireError(
                f"request {head.request_id} of client {head.source}, which never joined"
            )
        layout = self._their_layouts.get(head.layout_id)
        buffer: Any = body
        start = wire.REQUEST_NBYTES
        view = None if head.slot is None else self._arenas.view(head.slot)
        if view is not None and head.in_slot:
            buffer, start = view, 0
            if layout is not None:
                buffer = view[: layout.nbytes(head.rows)]
        encoding = None
        if layout is None:
            td = unpack_object(buffer, start, exact=not head.in_slot)
        else:
            leaves = layout.read(buffer, head.rows, head.batched, start)
            td = layout.tensordict(leaves, head.rows, head.batched)
        data, rows, batched, signature = describe(td, head.mode)
        if rows != head.rows or batched != head.batched:
            raise WireError(f"an object of {rows} rows was announced with {head.rows}")
        if layout is not None and signature.plain and signature.keys == layout.keys:
            encoding = Bodies.of(layout, start)
            data = None if buffer is body else buffer
        begins = bytes(body[: wire.LOOKS_NBYTES])
        looks = _Looks(
            begins,
            len(body),
            data,
            encoding,
            rows,
            batched,
            signature,
            head.timeout,
            head.priority,
            source,
            head.block,
            head.slot if head.reply_in_slot else None,
        )
        if encoding is not None:
            if len(self._known) > _REMEMBERED:
                self._known.clear()
            self._known[begins] = looks
        return looks

    def _forget_looks(self) -> None:
        self._known.clear()
        self._usual = None

    # -- answers ------------------------------------------------------------

    def deliver(self, outcomes: Sequence[tuple[Request, Any]]) -> None:
        """Send the answers to requests that came from here; on any thread."""
        self.send(b"".join([self._encode(request, outcome) for request, outcome in outcomes]))

    def _encode(self, request: Request, outcome: Any) -> bytes:
        request_id = request.handle[1]
        if self._open.pop(request_id, None) is None:  # its caller has gone
            return b""
        if isinstance(outcome, BaseException):
            return wire.encode_error(request_id, outcome)
        try:
            packed = pack(outcome)
        except Exception as error:
            failed = ModelError(f"the policy's answer cannot be sent to another process: {error}")
            failed.__cause__ = error
            return wire.encode_error(request_id, failed)
        return self.reply(request, packed)

    def reply(self, request: Request, packed: Packed) -> bytes:
        """The frames of a reply, less what is written to the request's slot."""
        _, request_id, slot = request.handle
        in_slot = slot is not None and _SMALL_NBYTES < packed.nbytes <= slot.capacity
        if in_slot:
            with self._arenas.view(slot) as view:
                packed.write(view)
        elif packed.nbytes > wire.MAX_BODY - wire.REPLY_NBYTES:
            large = ModelError(
                f"the policy's answer is too large to be sent: {packed.nbytes} bytes"
            )
            return wire.encode_error(request_id, large)
        layout_id, news = self._layouts.id_of(packed.layout)
        if news is not None:
            self.last_layout = None, 0  # an id may have another meaning now
        room, load = self.standing
        reply = wire.encode_reply(
            request_id,
            layout_id,
            packed,
            request.rows,
            request.batched,
            in_slot=in_slot,
            room=room,
            load=load,
        )
        return reply if news is None else news + reply

    @property
    def standing(self) -> tuple[int, int]:
        """The rows that the server has room for and those that it has under way, for replies."""
        intake = getattr(self, "_intake", None)  # it goes with a loop that is closed
        return (0, 0) if intake is None else (intake.room, intake.load)

    def layout_id(self, layout: Layout) -> int:
        """The id of a layout of replies; the client hears of it before what is sent next."""
        layout_id, news = self._layouts.id_of(layout)
        if news is not None:
            self.send(news)
        self.last_layout = layout, layout_id
        return layout_id

    def take(self, request_id: int) -> bool:
        """Whether the request is still to be answered, which the caller will do now."""
        return self._open.pop(request_id, None) is not None

    @abc.abstractmethod
    def send(self, data: bytes | memoryview) -> None:
        """Send frames, never blocking; on the loop, or on any thread if the port is."""

    def _not_understood(self, error: WireError) -> None:
        # As text: a record that keeps the error would keep all that its traceback refers to.
        _log.warning("a client process was disconnected: %s", str(error))
        self.close(InvalidRequestError(f"the server did not understand this process: {error}"))

    # -- the end ------------------------------------------------------------

    def _leave(self, source: Source) -> None:
        source.closed = True
        self._intake.leave(source)

    def close(self, error: InferenceError | None) -> None:
        """End the connection, saying why if that is known; on the loop."""
        if self._over:
            return
        if error is not None:
            self.send(wire.encode_error(0, error, Kind.CLOSING))
        self._over = True
        self._end()
        requests, self._open = list(self._open.values()), {}
        for request in requests:
            self._intake.give_up(request, GivenUp.CANCELLED)
        for source in self._sources.values():
            self._leave(source)
        self._closed(self)

    @abc.abstractmethod
    def _end(self) -> None:
        """Let go of what carries the frames."""


class Port:
    """Answers a whole batch, however many peers its requests came from.

    Args:
        on_loop: whether all of them send on the server's loop, and not on any thread.
    """

    takes_columns = True

    def __init__(self, *, on_loop: bool) -> None:
        self.on_loop = on_loop

    def deliver(self, outcomes: Sequence[tuple[Request, Any]]) -> None:
        by_peer: dict[Peer, list[tuple[Request, Any]]] = {}
        for outcome in outcomes:
            by_peer.setdefault(outcome[0].handle[0], []).append(outcome)
        for peer, mine in by_peer.items():
            peer.deliver(mine)

    def deliver_columns(self, columns: Columns) -> None:
        packed = PackedColumns.of(columns.by_name)
        if packed is None:
            self.deliver(list(zip(columns.requests, columns.results(), strict=True)))
        elif columns.bare and packed.layout.row_nbytes <= _SMALL_NBYTES:
            _send_bare(columns.requests, packed)
        else:
            _send_rows(columns, packed)


def _send_bare(requests: Sequence[Request], packed: PackedColumns) -> None:
    """Answer bare rows from one table of frames."""
    layout = packed.layout
    handles = [request.handle for request in requests]
    layout_ids = [
        peer.last_layout[1] if peer.last_layout[0] is layout else peer.layout_id(layout)
        for peer, _, _ in handles
    ]
    room, load = handles[0][0].standing
    numbers = [request_id for _, request_id, _ in handles]
    frames = packed.replies(numbers, layout_ids, room=room, load=load)
    if len({peer for peer, _, _ in handles}) == len(handles):
        for (peer, request_id, _), frame in zip(handles, frames, strict=True):
            if peer.take(request_id):
                peer.send(frame)
        return
    by_peer: dict[Peer, list[bytes]] = {}
    for (peer, request_id, _), frame in zip(handles, frames, strict=True):
        if peer.take(request_id):
            by_peer.setdefault(peer, []).append(frame)
    for peer, mine in by_peer.items():
        peer.send(b"".join(mine))


def _send_rows(columns: Columns, packed: PackedColumns) -> None:
    """Answer any requests, each with its own part of the columns."""
    by_peer: dict[Peer, list[bytes]] = {}
    for request, start in zip(columns.requests, columns.starts, strict=True):
        peer, request_id, _ = request.handle
        if peer.take(request_id):
            reply = peer.reply(request, packed.rows(start, request.rows))
            by_peer.setdefault(peer, []).append(reply)
    for peer, mine in by_peer.items():
        peer.send(b"".join(mine))


ANY_THREAD = Port(on_loop=False)
ON_LOOP = Port(on_loop=True)
