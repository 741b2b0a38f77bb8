"""Frames, and cutting a stream of bytes into them.

A frame is a header of 8 bytes (u32 length of the body, u8 kind, three zero bytes) and a body.
What breaks this is a :class:`WireError`: the peer does not speak our language, and its connection
must be closed.
"""

from __future__ import annotations

import enum
import struct
from collections.abc import Iterator
from typing import Any

Buffer = bytes | bytearray | memoryview

MAX_BODY = 1 << 30


class WireError(Exception):
    """The peer sent what is not a message; its connection must be closed."""


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


_KINDS = {int(kind): kind for kind in Kind}
_REQUEST = int(Kind.REQUEST)
_RECEIVE_NBYTES = 1 << 16
_SMALL_NBYTES = 1 << 14  # header included; larger frames get a buffer of their own
_FIRST_STEP_NBYTES = 1 << 20


class FrameReader:
    """Cuts a stream into frames, however it was cut on its way.

    Receive into :meth:`space`, then tell :meth:`received` how much came. A body handed out is
    memory of its own: tensors may lie in it. Frames before a fault in the stream are handed
    out; the next call raises, and so does every call after it.
    """

    def __init__(self, max_body: int = MAX_BODY) -> None:
        self.max_body = max_body
        self._small = bytearray(_RECEIVE_NBYTES)  # used again and again
        self._whole = memoryview(self._small)
        self._large: bytearray | None = None  # the body of the frame that is coming in
        self._large_head: tuple[Kind, int] = (Kind.HELLO, 0)
        self._filled = 0  # bytes in the one of both that is being filled
        self._space: memoryview | None = None
        self.broken: WireError | None = None
        """What was wrong with the stream."""

    @property
    def is_empty(self) -> bool:
        """Whether it waits for a frame to begin."""
        return not self._filled and self._large is None

    def space(self) -> memoryview:
        """Where to put what comes next; never empty. Keep no part of it after :meth:`received`."""
        if self.broken is not None:
            raise WireError(*self.broken.args)
        if self._space is None:
            if self._large is None:
                self._space = self._whole[self._filled :] if self._filled else self._whole
            else:
                with memoryview(self._large) as whole:
                    self._space = whole[self._filled :]
        return self._space

    def request(self, count: int) -> bytearray | None:
        """The body, if ``count`` bytes came into :meth:`space` and are just one REQUEST.

        Otherwise nothing is taken note of: call :meth:`received`.
        """
        if self._filled or self._large is not None or count < 8:
            return None
        length, number = HEADER.unpack_from(self._small)
        if number != _REQUEST or length + 8 != count or length > self.max_body:
            return None
        return self._small[8:count]

    def received(self, count: int) -> list[tuple[Kind, bytearray]]:
        """Take note of ``count`` bytes in :meth:`space`; return the frames now complete."""
        room = len(self._space or self.space())
        if not 0 <= count <= room:
            raise ValueError(f"count must be between 0 and {room}, got {count}")
        if self._large is None:
            self._space = None
            if count >= 8 and not self._filled:  # most often it is one whole frame
                length, number = HEADER.unpack_from(self._small)
                if length + 8 == count and number in _KINDS and length <= self.max_body:
                    return [(_KINDS[number], self._small[8:count])]
            self._filled += count
            return self._cut_small()
        if self._space is not None:
            self._space.release()  # a bytearray cannot grow while someone looks at it
        self._space = None
        self._filled += count
        return self._grow_large(self._large)

    def feed(self, data: Buffer) -> Iterator[tuple[Kind, bytearray]]:
        """Take in bytes that came some other way; yield the frames now complete."""
        view = memoryview(data)
        while len(view):
            space = self.space()
            count = min(len(space), len(view))
            space[:count] = view[:count]
            yield from self.received(count)
            if self.broken is not None:
                raise WireError(*self.broken.args)
            view = view[count:]

    def _cut_small(self) -> list[tuple[Kind, bytearray]]:
        frames: list[tuple[Kind, bytearray]] = []
        start, end, small = 0, self._filled, self._small
        while end - start >= 8:
            length, number = HEADER.unpack_from(small, start)
            kind = _KINDS.get(number)
            if kind is None or length > self.max_body:
                self.broken = self._fault(kind, length, bytes(small[start : start + 8]))
                if frames:
                    return frames
                raise WireError(*self.broken.args)
            stop = start + 8 + length
            if stop <= end:
                frames.append((kind, small[start + 8 : stop]))
                start = stop
            elif length + 8 > _SMALL_NBYTES:
                # A length is only a claim: memory grows with what really comes.
                self._large = large = bytearray(min(length, _FIRST_STEP_NBYTES))
                self._large_head = (kind, length)
                large[: end - start - 8] = small[start + 8 : end]
                self._filled = end - start - 8
                return frames
            else:
                break
        if start:
            if start < end:
                small[: end - start] = small[start:end]
            self._filled = end - start
        return frames

    def _grow_large(self, large: bytearray) -> list[tuple[Kind, bytearray]]:
        kind, length = self._large_head
        if self._filled == length:
            self._large, self._filled = None, 0
            return [(kind, large)]
        if self._filled == len(large):
            large.extend(bytes(min(len(large), length - len(large))))
        return []

    def _fault(self, kind: Kind | None, length: int, header: bytes) -> WireError:
        if kind is None:
            return WireError(
                f"no frame starts with {header!r}: its kind must be one of "
                f"{[int(known) for known in Kind]}, followed by three zero bytes"
            )
        return WireError(
            f"a {kind.name} frame of {length} bytes was announced, allowed are {self.max_body}"
        )
