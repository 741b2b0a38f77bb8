"""Cutting a stream of bytes into frames. There is no I/O in here."""

from __future__ import annotations

from collections.abc import Iterator

from aioinfer.transports.wire import HEADER, MAX_BODY, Buffer, Kind, WireError

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
