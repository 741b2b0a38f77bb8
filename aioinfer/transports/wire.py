"""Frames and messages as bytes: what two processes say to each other.

Nothing in here does I/O: bytes go in and out, and who moves them is not its concern. All
numbers are little endian.

**Frames.** A stream is a sequence of frames, each a header of 8 bytes (u32 length of the body,
u8 kind, three zero bytes) and a body. What breaks this is a :class:`WireError`: the peer does
not speak our language, and its connection must be closed.

**Messages.** A body starts with a fixed part, one struct per :class:`Kind`. In REQUEST and REPLY
the payload follows, unless it lies in a *slot*, a stretch of memory that both processes see.
Fixed parts are multiples of 8 bytes, so a payload is aligned within its body. ``rows`` is 0
for one bare row (batch size ``[]``), else the K of ``[K]``. A REQUEST starts with its *looks*,
``LOOKS_NBYTES`` that are the same for most requests of a client: what was made of them once
need not be made again. ERROR and CLOSING carry an exception as three texts: class, message, and
the traceback of its cause.

A stream is cut into frames in :mod:`aioinfer.transports.frames`; what a payload looks like is told
in :mod:`aioinfer.transports.payload`.
"""

from __future__ import annotations

import enum
import math
import struct
import traceback
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from tensordict.nn import InteractionType

from aioinfer.arguments import MAX_SECONDS
from aioinfer.errors import (
    InferenceError,
    InvalidRequestError,
    ModelError,
    QueueFullError,
    ServerClosedError,
    ServerDiedError,
    WeightSyncError,
)
from aioinfer.request import GivenUp

if TYPE_CHECKING:
    from aioinfer.transports.payload import Packed

Buffer = bytes | bytearray | memoryview

PROTOCOL = 2
MAX_BODY = 1 << 30
MAX_TEXT = 1 << 16  # characters of each text of an error


class WireError(Exception):
    """The peer sent what is not a message; its connection must be closed."""


class RemoteTraceback(Exception):
    """The cause of an exception that came from another process: its traceback, as text."""


# -- frames -------------------------------------------------------------------


class Kind(enum.IntEnum):
    """What a frame says. Numbers are part of the protocol."""

    HELLO = 1  # from the client: the first frame
    JOIN = 2
    LEAVE = 3
    ARENA = 4
    REQUEST = 5
    GIVE_UP = 6
    LAYOUT = 16  # from both
    WELCOME = 32  # from the server: its first frame
    REPLY = 33
    ERROR = 34
    DROPPED = 35  # the last word about a request that its caller gave up
    CLOSING = 36


HEADER = struct.Struct("<II")
"""Of a frame: the length of its body, and the kind and three zero bytes as one number."""


def frame(kind: Kind, *parts: Any) -> bytes:
    """One frame of a kind, its body made of ``parts`` (buffers of single bytes)."""
    return b"".join((HEADER.pack(sum(map(len, parts)), kind), *parts))


# -- messages of fixed size ---------------------------------------------------


class Hello(NamedTuple):
    """A client introduces itself, with the secret of 32 bytes that the server gave out."""

    protocol: int
    pid: int
    token: bytes


class Welcome(NamedTuple):
    """The server's answer to it."""

    protocol: int
    pid: int
    policy_version: int


class Join(NamedTuple):
    """A new client in the process of the sender."""

    source: int


class Leave(NamedTuple):
    """A client in the process of the sender is gone."""

    source: int


class Arena(NamedTuple):
    """Shared memory; its file descriptor travels beside the frame."""

    arena: int
    nbytes: int


class GiveUp(NamedTuple):
    """Nobody wants this answer any more."""

    request_id: int
    why: GivenUp


class Dropped(NamedTuple):
    """A request that was given up is over, and its slot is free."""

    request_id: int


Fixed = Hello | Welcome | Join | Leave | Arena | GiveUp | Dropped

_FIXED: dict[Kind, tuple[Any, struct.Struct]] = {
    Kind.HELLO: (Hello, struct.Struct("<II32s")),
    Kind.WELCOME: (Welcome, struct.Struct("<IIq")),
    Kind.JOIN: (Join, struct.Struct("<I")),
    Kind.LEAVE: (Leave, struct.Struct("<I")),
    Kind.ARENA: (Arena, struct.Struct("<IQ")),
    Kind.GIVE_UP: (GiveUp, struct.Struct("<QB")),
    Kind.DROPPED: (Dropped, struct.Struct("<Q")),
}
_KIND_OF = {message: kind for kind, (message, _) in _FIXED.items()}
_REASONS = (GivenUp.CANCELLED, GivenUp.TIMED_OUT)


def encode(message: Fixed) -> bytes:
    """The frame of a message that has a fixed size."""
    kind = _KIND_OF[type(message)]
    fields: Sequence[Any] = message
    if isinstance(message, GiveUp):
        fields = (message.request_id, _REASONS.index(message.why))
    elif isinstance(message, Hello) and len(message.token) != 32:
        raise ValueError(f"token must have 32 bytes, got {len(message.token)}")
    return frame(kind, _FIXED[kind][1].pack(*fields))


def decode(kind: Kind, body: Buffer) -> Any:
    """The message of a kind that has a fixed size."""
    message, layout = _FIXED[kind]
    if len(body) != layout.size:
        raise WireError(f"{kind.name} has {len(body)} bytes, it must have {layout.size}")
    fields = layout.unpack(body)
    if message is not GiveUp:
        return message._make(fields)
    request_id, why = fields
    if why >= len(_REASONS):
        raise WireError(f"GIVE_UP with reason {why}, allowed are 0 to {len(_REASONS) - 1}")
    return GiveUp(request_id, _REASONS[why])


# -- requests and replies -----------------------------------------------------


class Slot(NamedTuple):
    """A stretch of an arena. Whoever receives one must check it against the arena's size."""

    arena: int
    offset: int
    capacity: int


class RequestHead(NamedTuple):
    """A REQUEST without its payload, which is at ``REQUEST_NBYTES`` or in the slot."""

    request_id: int
    source: int
    layout_id: int
    rows: int
    batched: bool
    priority: int
    timeout: float | None
    submitted_at: float
    mode: InteractionType | None
    block: bool
    slot: Slot | None
    in_slot: bool
    reply_in_slot: bool


class ReplyHead(NamedTuple):
    """A REPLY without its payload, which is at ``REPLY_NBYTES`` or in the request's slot."""

    request_id: int
    layout_id: int
    rows: int
    batched: bool
    in_slot: bool
    room: int = 0
    """Rows that the server is worth filling with (:mod:`aioinfer.balancing`); 0: not known."""
    load: int = 0
    """Rows that it had under way just before, those of this batch included."""


# source, layout id, rows, priority, timeout, mode, flags, slot
_LOOKS = struct.Struct("<IIIidBB2xIQQ")
_LOOKS_FRAME = struct.Struct("<IIIIIidBB2xIQQ")
_NUMBER = struct.Struct("<Qd")  # id, submitted at
_REPLY_FIELDS = "QIIBxHI"  # id, layout id, rows, flags, room, load
_REPLY = struct.Struct("<" + _REPLY_FIELDS)
_REPLY_FRAME = struct.Struct("<II" + _REPLY_FIELDS)
LOOKS_NBYTES = _LOOKS.size
REQUEST_NBYTES = _LOOKS.size + _NUMBER.size
REPLY_NBYTES = _REPLY.size
REPLY_FRAME_NBYTES = _REPLY_FRAME.size

_BLOCK, _IN_SLOT, _REPLY_IN_SLOT = 1, 2, 4
_NO_SLOT = Slot(0, 0, 0)
_NO_TIMEOUT = math.nan
_MODES = (
    None,
    *[InteractionType(m) for m in ("mode", "median", "mean", "random", "deterministic")],
)
_MODE_NUMBERS = {mode: number for number, mode in enumerate(_MODES)}


def encode_looks(
    source: int,
    layout_id: int,
    nbytes: int,
    rows: int = 1,
    batched: bool = False,
    *,
    timeout: float | None = None,
    priority: int = 0,
    mode: InteractionType | None = None,
    block: bool = True,
    slot: Slot | None = None,
    in_slot: bool = False,
    reply_in_slot: bool = False,
) -> bytes:
    """The beginning of a REQUEST with a payload of ``nbytes``; the same for all that look alike."""
    return _LOOKS_FRAME.pack(
        REQUEST_NBYTES if in_slot else REQUEST_NBYTES + nbytes,
        Kind.REQUEST,
        source,
        layout_id,
        rows if batched else 0,
        priority,
        _NO_TIMEOUT if timeout is None else timeout,
        _MODE_NUMBERS[mode],
        block * _BLOCK | in_slot * _IN_SLOT | reply_in_slot * _REPLY_IN_SLOT,
        *(_NO_SLOT if slot is None else slot),
    )


def complete_request(
    looks: bytes, request_id: int, submitted_at: float, buffers: Sequence[Any] = ()
) -> bytes:
    """A REQUEST, from how it begins on; its payload is left out if it lies in a slot."""
    return b"".join((looks, _NUMBER.pack(request_id, submitted_at), *buffers))


def decode_number(body: Buffer) -> tuple[int, float]:
    """The id of a REQUEST, and when it was submitted."""
    request_id, at = _NUMBER.unpack_from(body, LOOKS_NBYTES)
    if at - at != 0.0:  # infinite, or not a number
        raise WireError(f"REQUEST submitted at {at}")
    return request_id, at


def decode_request(body: Buffer) -> RequestHead:
    """All of a REQUEST but its payload."""
    if len(body) < REQUEST_NBYTES:
        raise WireError(f"REQUEST has {len(body)} bytes, it must have {REQUEST_NBYTES} or more")
    source, layout_id, rows, priority, timeout, mode, flags, *place = _LOOKS.unpack_from(body)
    request_id, at = decode_number(body)
    if mode >= len(_MODES) or flags > 7:
        raise WireError(f"REQUEST with sampling mode {mode} and flags {flags:#x}")
    if timeout != timeout:
        timeout = None
    elif not 0 <= timeout <= MAX_SECONDS:
        raise WireError(f"REQUEST with timeout {timeout}, allowed are 0 to {MAX_SECONDS:.0f}")
    slot = None
    if flags & (_IN_SLOT | _REPLY_IN_SLOT):
        slot = Slot._make(place)
        if slot.offset % 8:
            raise WireError(f"{slot} does not start at a multiple of 8")
        if flags & _IN_SLOT and len(body) != REQUEST_NBYTES:
            raise WireError(f"REQUEST has {len(body)} bytes and its payload in a slot")
    return RequestHead(
        request_id,
        source,
        layout_id,
        rows or 1,
        rows != 0,
        priority,
        timeout,
        at,
        _MODES[mode],
        flags & _BLOCK != 0,
        slot,
        flags & _IN_SLOT != 0,
        flags & _REPLY_IN_SLOT != 0,
    )


def reply_heads(
    request_ids: Iterable[int], layout_ids: Iterable[int], nbytes: int, room: int, load: int
) -> list[bytes]:
    """REPLYs to bare rows, whose payloads of ``nbytes`` follow."""
    length, kind = REPLY_NBYTES + nbytes, int(Kind.REPLY)
    room, load = min(room, 0xFFFF), min(load, 0xFFFFFFFF)
    return [
        _REPLY_FRAME.pack(length, kind, request_id, layout_id, 0, 0, room, load)
        for request_id, layout_id in zip(request_ids, layout_ids, strict=True)
    ]


def encode_reply(
    request_id: int,
    layout_id: int,
    payload: Packed,
    rows: int = 1,
    batched: bool = False,
    *,
    in_slot: bool = False,
    room: int = 0,
    load: int = 0,
) -> bytes:
    """A REPLY; with ``in_slot`` the payload was written there and is left out here."""
    head = _REPLY_FRAME.pack(
        REPLY_NBYTES if in_slot else REPLY_NBYTES + payload.nbytes,
        Kind.REPLY,
        request_id,
        layout_id,
        rows if batched else 0,
        in_slot,
        min(room, 0xFFFF),
        min(load, 0xFFFFFFFF),
    )
    return head if in_slot else b"".join((head, *payload.buffers))


def decode_reply_frame(buffer: Buffer, count: int) -> tuple[int, int] | None:
    """Request id and layout id, if the first ``count`` bytes are the reply to one bare row."""
    if count < REPLY_FRAME_NBYTES:
        return None
    length, kind, request_id, layout_id, rows, flags, _, _ = _REPLY_FRAME.unpack_from(buffer)
    if kind != Kind.REPLY or length + 8 != count or rows or flags:
        return None
    return request_id, layout_id


def decode_reply(body: Buffer) -> ReplyHead:
    """All of a REPLY but its payload."""
    if len(body) < REPLY_NBYTES:
        raise WireError(f"REPLY has {len(body)} bytes, it must have {REPLY_NBYTES} or more")
    request_id, layout_id, rows, flags, room, load = _REPLY.unpack_from(body)
    if flags > 1 or (flags and len(body) != REPLY_NBYTES):
        raise WireError(f"REPLY with flags {flags:#x} and {len(body)} bytes")
    return ReplyHead(request_id, layout_id, rows or 1, rows != 0, flags != 0, room, load)


# -- errors -------------------------------------------------------------------

_ERROR = struct.Struct("<QIII4x")
_REBUILT: dict[str, type[Exception]] = {
    found.__name__: found
    for found in (
        *(InferenceError, InvalidRequestError, ModelError),
        *(QueueFullError, ServerClosedError, ServerDiedError, WeightSyncError),
        *(TimeoutError, ValueError, TypeError, RuntimeError),
    )
}


def encode_error(request_id: int, error: BaseException, kind: Kind = Kind.ERROR) -> bytes:
    """An ERROR, or a CLOSING (whose request id says nothing). Whatever the error, this works."""
    texts = [_text(make, error) for make in (_class_of, str, _cause_of)]
    return frame(kind, _ERROR.pack(request_id, *map(len, texts)), *texts)


def _text(make: Callable[[BaseException], str], error: BaseException) -> bytes:
    try:
        text = make(error)
        if len(text) > MAX_TEXT:
            half = MAX_TEXT // 2 - 50
            left_out = f"\n[... {len(text) - 2 * half} characters left out ...]\n"
            text = text[:half] + left_out + text[-half:]
        return text.encode("utf-8", "backslashreplace")
    except Exception as fault:  # it is the policy's exception: its __str__ may do anything
        return f"<{type(error).__name__} failed to say: {type(fault).__name__}>".encode()


def _class_of(error: BaseException) -> str:
    found = type(error)
    known = found is _REBUILT.get(found.__name__)
    return found.__name__ if known else f"{found.__module__}.{found.__qualname__}"


def _cause_of(error: BaseException) -> str:
    cause = error.__cause__
    return "" if cause is None else "".join(traceback.format_exception(cause))


def decode_error(body: Buffer) -> tuple[int, Exception]:
    """The request id and a fresh exception, of the class that it had if we know that class."""
    cursor = Cursor(body)
    request_id, *lengths = cursor.take(_ERROR)
    name, message, trace = [cursor.text(length) for length in lengths]
    cursor.end()
    known = _REBUILT.get(name)
    error = InferenceError(f"{name}: {message}") if known is None else known(message)
    if trace:
        error.__cause__ = RemoteTraceback(trace)
    return request_id, error


class Cursor:
    """Reads a body from front to back; running off its end is a :class:`WireError`."""

    def __init__(self, body: Buffer) -> None:
        self._body = body
        self._at = 0

    def take(self, layout: struct.Struct) -> tuple[Any, ...]:
        return layout.unpack(self.bytes(layout.size))

    def bytes(self, size: int) -> Buffer:
        start, self._at = self._at, self._at + size
        if self._at > len(self._body):
            raise WireError(f"a body of {len(self._body)} bytes ends before its byte {self._at}")
        return self._body[start : self._at]

    def text(self, size: int) -> str:
        try:
            return str(self.bytes(size), "utf-8", "surrogatepass")
        except UnicodeDecodeError as error:
            raise WireError(f"a text is not UTF-8: {error}") from error

    def end(self) -> None:
        if self._at != len(self._body):
            raise WireError(f"a body has {len(self._body)} bytes, its content {self._at}")
