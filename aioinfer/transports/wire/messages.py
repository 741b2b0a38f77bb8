"""Messages: the bodies of frames.

A body starts with a fixed part, one struct per :class:`Kind`. In REQUEST and REPLY the payload
follows, unless it lies in a *slot*, a stretch of memory that both processes see. Fixed parts are
multiples of 8 bytes, so a payload is aligned within its body. ``rows`` is 0 for one bare row
(batch size ``[]``), else the K of ``[K]``. A REQUEST starts with its *looks*, ``LOOKS_NBYTES``
that are the same for most requests of a client: what was made of them once need not be made again.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from tensordict.nn import InteractionType

from aioinfer.arguments import MAX_SECONDS
from aioinfer.request import GivenUp
from aioinfer.transports.wire.frames import Buffer, Kind, WireError, frame

if TYPE_CHECKING:
    from aioinfer.transports.wire.payload import Packed

PROTOCOL = 2


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
