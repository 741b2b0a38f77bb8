"""The sender's end of :class:`~aioinfer.SharedMemWeightSyncScheme`.

There are as many buffers as it takes for the sender never to wait for a reader and never to write
what somebody may be reading: one more than receivers that are reading, two as a rule.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

from aioinfer.transports.address import Address
from aioinfer.weights.buffers import Announcement, Buffer, Pieces
from aioinfer.weights.delivery import Delivery
from aioinfer.weights.doorbell import Doorbell
from aioinfer.weights.hub import Hub, Peer
from aioinfer.weights.reading import Weights


class Sender(Hub):
    """Writes weights into shared memory, and tells receivers of them.

    Args:
        address: where to listen.
        epoch: the sender's.
        weights: to start with.
        version: theirs.
        overtaken: called with versions of receivers, which may be newer than the sender's.
        piece_nbytes: bytes in a piece.

    Raises:
        OSError: somebody else listens there.
    """

    def __init__(
        self,
        address: Address,
        epoch: int,
        weights: Weights,
        version: int,
        overtaken: Callable[[int], None],
        piece_nbytes: int,
    ) -> None:
        super().__init__(address.listen(), address.token, version, overtaken)
        self._address = address
        self._epoch = epoch
        self._piece_nbytes = piece_nbytes
        self._pieces = Pieces(weights.manifest, piece_nbytes)
        self._known: dict[Doorbell, set[int]] = {}  # which buffers a receiver has
        self._buffers: list[Buffer] = []
        self._writing: Buffer | None = None
        self._latest: Buffer | None = None
        self._sequence = 0
        self._extra: dict[str, Any] = {}
        self._announcement = Announcement()
        self.write(weights, Delivery(version, "none"))
        self.listen()

    @property
    def newest(self) -> Weights:
        """What was written last."""
        assert self._latest is not None
        return Weights(self._pieces.manifest, self._latest.tensors, self._extra)

    def write(self, weights: Weights, delivery: Delivery) -> None:
        """Write weights into shared memory, and tell everybody; by one thread at a time."""
        version = delivery.version
        self._announcement.version = version
        pieces = len(self._pieces.parts)
        with self.state:
            buffer = self._writing = self._free_buffer()
            self._sequence = buffer.begin()
            self._extra = dict(weights.extra)
            self.version = version
            self.expect_answers(delivery)
            # With several pieces, who has nothing else to do may read while this is written.
            idle = [peer for peer in self.peers if peer.reading is None] if pieces > 1 else []
            following = [peer for peer in idle if self._tell(peer, 0)]
        for piece in range(pieces):
            buffer.write(piece, weights.tensors)
            self._wrote(piece)
            if piece + 1 < pieces:
                for peer in following:
                    with contextlib.suppress(OSError):  # its own thread notices
                        peer.doorbell.send(("more", version, piece + 1), urgent=False)
        with self.state:
            buffer.end()
            self._latest, self._writing = buffer, None
            for peer in list(self.peers):
                if peer in following:
                    self.send(peer, ("more", version, pieces))
                elif peer.reading is None:
                    self._tell(peer, pieces)

    def _wrote(self, piece: int) -> None:
        """A piece is written; tests end the process here."""

    def _free_buffer(self) -> Buffer:
        read = [peer.reading for peer in self.peers]
        free = [buffer for buffer in self._buffers if buffer not in read]
        if len(self._buffers) > 1:
            for buffer in free:
                if buffer is not self._latest:
                    return buffer
            if free:  # the newest weights, which nobody has begun to read
                return free[0]
        self._buffers.append(Buffer(self._pieces))
        return self._buffers[-1]

    def _tell(self, peer: Peer, written: int) -> bool:
        """Ring for the newest weights, of which ``written`` pieces are there."""
        buffer = self._writing or self._latest
        assert buffer is not None
        known = self._known[peer.doorbell]
        where = buffer.number, self._sequence, written
        message = ("weights", self.version, self.hurry(peer), where, self._extra)
        descriptor = None if buffer.number in known else buffer.descriptor
        if not self.send(peer, message, descriptor):
            return False
        known.add(buffer.number)
        peer.reading, peer.told = buffer, self.version
        return True

    def _welcome(self, peer: Peer) -> None:
        welcome = self._epoch, self._pieces.manifest, self._piece_nbytes
        peer.doorbell.send(welcome, self._announcement.descriptor)
        self._known[peer.doorbell] = set()

    def _is_free(self, peer: Peer) -> None:
        if self._writing is None and self.version > peer.told:
            self._tell(peer, len(self._pieces.parts))

    def _dropped(self, peer: Peer) -> None:
        """Let it read on where it reads: nobody writes there any more."""
        del self._known[peer.doorbell]
        buffer = peer.reading
        if buffer in self._buffers and buffer not in (self._writing, self._latest):
            self._buffers.remove(buffer)
            buffer.close()

    def _end(self) -> None:
        self._address.unlink()
        self._announcement.close()
        for buffer in self._buffers:
            buffer.close()
