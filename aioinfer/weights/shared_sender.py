"""The sender's end of :class:`~aioinfer.SharedMemWeightSyncScheme`.

There are as many buffers as it takes for the sender never to wait for a reader and never to write
what somebody may be reading: one more than receivers that are reading, two as a rule. A receiver
is told of one version at a time; once it has answered, it is told of the newest, if that is
another one by then.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import socket
import threading
from collections.abc import Callable
from typing import Any

from aioinfer.transports.address import Address
from aioinfer.weights import threads
from aioinfer.weights.buffers import Announcement, Buffer, Pieces
from aioinfer.weights.delivery import Delivery, Stage
from aioinfer.weights.doorbell import Doorbell
from aioinfer.weights.reading import Weights

_log = logging.getLogger("aioinfer")


_JOIN_S = 5.0


class Peer:
    """One receiver, as the sender sees it."""

    def __init__(self, name: str, doorbell: Doorbell, version: int) -> None:
        self.name = name
        self.doorbell = doorbell
        self.told = version
        """The newest version that it has, or was told of."""
        self.reading: Buffer | None = None
        """What it may be reading; it has not answered yet."""
        self.known: set[int] = set()
        """The buffers that it has."""
        self.deliveries: dict[int, Delivery] = {}
        """Those that wait for its answer, by version."""


class Sender:
    """Listens for receivers, and tells them of weights.

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
        self._address = address
        self._epoch = epoch
        self._overtaken = overtaken
        self._piece_nbytes = piece_nbytes
        self._pieces = Pieces(weights.manifest, piece_nbytes)
        self._state = threading.Condition()  # around everything below
        self._peers: list[Peer] = []
        self._buffers: list[Buffer] = []
        self._writing: Buffer | None = None
        self._latest: Buffer | None = None
        self._version = version
        self._sequence = 0
        self._extra: dict[str, Any] = {}
        self._closed = False
        self._listener = address.listen()
        self._announcement = Announcement()
        self._listener.setblocking(True)
        self.write(weights, Delivery(version, "none"))
        self._accepting = threads.start(self._accept, self.close)

    @property
    def newest(self) -> Weights:
        """What was written last."""
        assert self._latest is not None
        return Weights(self._pieces.manifest, self._latest.tensors, self._extra)

    # -- one set of weights -------------------------------------------------

    def write(self, weights: Weights, delivery: Delivery) -> None:
        """Write weights into shared memory, and tell everybody; by one thread at a time."""
        version = delivery.version
        self._announcement.version = version
        pieces = len(self._pieces.parts)
        with self._state:
            buffer = self._writing = self._free_buffer()
            self._sequence = buffer.begin()
            self._extra = dict(weights.extra)
            self._version = version
            following = []
            for peer in list(self._peers):
                delivery.expect(peer.name)
                peer.deliveries[version] = delivery
                # With several pieces, who has nothing else to do may read while this is written.
                if pieces > 1 and peer.reading is None and self._tell(peer, 0):
                    following.append(peer)
        for piece in range(pieces):
            buffer.write(piece, weights.tensors)
            self._wrote(piece)
            if piece + 1 < pieces:
                for peer in following:
                    with contextlib.suppress(OSError):  # its own thread notices
                        peer.doorbell.send(("more", version, piece + 1), urgent=False)
        with self._state:
            buffer.end()
            self._latest, self._writing = buffer, None
            for peer in list(self._peers):
                if peer in following:
                    self._send(peer, ("more", version, pieces))
                elif peer.reading is None:
                    self._tell(peer, pieces)

    def _wrote(self, piece: int) -> None:
        """A piece is written; tests end the process here."""

    def _free_buffer(self) -> Buffer:
        read = [peer.reading for peer in self._peers]
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
        new = buffer.number not in peer.known
        about = buffer.number, self._sequence, written
        message = ("weights", self._version, about, self._extra)
        if not self._send(peer, message, buffer.descriptor if new else None):
            return False
        peer.known.add(buffer.number)
        peer.reading, peer.told = buffer, self._version
        return True

    def _send(self, peer: Peer, message: Any, descriptor: int | None = None) -> bool:
        try:
            peer.doorbell.send(message, descriptor)
        except OSError as error:
            _log.debug("%s cannot be told: %s", peer.name, error)
            self._drop(peer)
            return False
        return True

    # -- receivers ----------------------------------------------------------

    def wait_for_receiver(self, timeout: float) -> bool:
        """Block until there is one; false if there is none in time."""
        with self._state:
            return self._state.wait_for(lambda: bool(self._peers), timeout)

    def _accept(self) -> None:
        while not self._closed:
            try:
                connection, _ = self._listener.accept()
            except OSError:  # closed, or there are no descriptors left
                continue
            threads.start(functools.partial(self._listen_to, connection), self.close)
        self._listener.close()

    def _listen_to(self, connection: socket.socket) -> None:
        doorbell = Doorbell(connection)
        peer: Peer | None = None
        try:
            doorbell.prove(self._address.token, b"sender", b"receiver")
            (name, version), _ = doorbell.receive()
            peer = self._join(Peer(name, doorbell, version))
            while True:
                message, _ = doorbell.receive()
                self._answered(peer, *message)
        except Exception as error:
            _log.debug("a receiver of weights is gone: %s", error)
        finally:
            if peer is not None:
                self._drop(peer)
            doorbell.close()

    def _join(self, peer: Peer) -> Peer:
        self._overtaken(peer.told)
        with self._state:
            if self._closed:
                raise ConnectionError("the sender is closed")
            welcome = self._epoch, self._pieces.manifest, self._piece_nbytes
            peer.doorbell.send(welcome, self._announcement.descriptor)
            self._peers.append(peer)
            if self._writing is None:
                if self._version > peer.told:
                    self._tell(peer, len(self._pieces.parts))
                else:
                    self._send(peer, ("nothing",))
            self._state.notify_all()
        return peer

    def _answered(
        self, peer: Peer, done: bool, version: int, stage: Stage, why: str, serves: int
    ) -> None:
        """A receiver says what became of a version; ``done``: it has read it."""
        self._overtaken(serves)
        with self._state:
            for known in [known for known in peer.deliveries if known <= version]:
                delivery = peer.deliveries[known]
                delivery.note(peer.name, stage, why, serves)
                if stage > Stage.STAGED or known < version:
                    del peer.deliveries[known]
            if done:
                peer.reading = None
                if self._writing is None and self._version > peer.told:
                    self._tell(peer, len(self._pieces.parts))

    def _drop(self, peer: Peer) -> None:
        """Forget a receiver, and let it read on where it reads: nobody writes there any more."""
        peer.doorbell.shut_down()
        with self._state:
            if peer not in self._peers:
                return
            self._peers.remove(peer)
            for delivery in peer.deliveries.values():
                delivery.note(peer.name, Stage.GONE)
            buffer = peer.reading
            if buffer in self._buffers and buffer not in (self._writing, self._latest):
                self._buffers.remove(buffer)
                buffer.close()

    # -- the end ------------------------------------------------------------

    def close(self) -> None:
        """Stop listening, and leave the receivers to themselves."""
        with self._state:
            if self._closed:
                return
            self._closed = True
            for peer in self._peers:
                peer.doorbell.shut_down()
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        if threading.current_thread() is not self._accepting:
            self._accepting.join(_JOIN_S)  # until then, nobody else can listen there
        self._address.unlink()
        self._close_descriptors()

    def forget(self) -> None:
        """Let go, in a forked child, of what belongs to the parent."""
        self._closed = True
        self._listener.close()
        for peer in self._peers:
            peer.doorbell.close()
        self._close_descriptors()

    def _close_descriptors(self) -> None:
        self._announcement.close()
        for buffer in self._buffers:
            buffer.close()
