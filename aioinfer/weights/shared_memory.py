"""Weights through shared memory, for servers in other processes of the host, or in this one."""

from __future__ import annotations

import socket
from collections.abc import Callable, Sequence
from typing import Any

import torch

from aioinfer.transports.address import Address
from aioinfer.weights.base import WeightSyncScheme
from aioinfer.weights.buffers import PIECE_NBYTES, Announcement, Buffer, Pieces
from aioinfer.weights.distant import DistantLink, DistantScheme
from aioinfer.weights.doorbell import Doorbell
from aioinfer.weights.reading import Weights
from aioinfer.weights.receiving import Receiver
from aioinfer.weights.sending import Ticket
from aioinfer.weights.shared_sender import Sender
from aioinfer.weights.slots import Interrupted


class SharedMemWeightSyncScheme(DistantScheme):
    """Brings weights to servers of the same host, in any process, through shared memory.

    One object, copies of it in other processes, or an object and a ticket, are the two ends. A
    sender that is started again finds the servers of the one before it. The memory has no name,
    so nothing can be left behind. The arguments are those of :class:`~aioinfer.WeightSyncScheme`.
    """

    _piece_nbytes = PIECE_NBYTES

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self._address = Address.new()

    def _make_sender(
        self, ticket: Ticket, weights: Weights, overtaken: Callable[[int], None]
    ) -> Sender:
        return Sender(
            self._address, ticket.epoch, weights, ticket.version, overtaken, self._piece_nbytes
        )

    def _make_link(self, receiver: Receiver, address: Address) -> _SharedMemLink:
        return _SharedMemLink(self, receiver, address)


class _SharedMemLink(DistantLink):
    """Reads what the sender has written."""

    def __init__(self, scheme: WeightSyncScheme, receiver: Receiver, address: Address) -> None:
        self._address = address
        self._pieces: Pieces | None = None
        self._buffers: dict[int, Buffer] = {}
        super().__init__(scheme, receiver, address.token)

    def _connect(self) -> socket.socket:
        return self._address.connect()

    def _welcomed(self, doorbell: Doorbell) -> int:
        (epoch, manifest, piece_nbytes), descriptor = doorbell.receive()
        self._pieces = Pieces(manifest, piece_nbytes)
        announcement = Announcement(descriptor)
        self.receiver.watch(lambda: announcement.version)
        return int(epoch)

    def _source(
        self, doorbell: Doorbell, version: int, where: Any, extra: Any, descriptor: int | None
    ) -> _Incoming:
        number, sequence, written = where
        assert self._pieces is not None
        if descriptor is not None:
            self._buffers[number] = Buffer(self._pieces, descriptor)
        return _Incoming(doorbell, self._pieces, self._buffers[number], sequence, written, extra)

    def _taken(self, source: Any) -> None:
        pass

    def _disconnected(self) -> None:
        self._buffers.clear()


class _Incoming:
    """Weights that the sender has written to a buffer, or is writing."""

    def __init__(
        self,
        doorbell: Doorbell,
        pieces: Pieces,
        buffer: Buffer,
        sequence: int,
        written: int,
        extra: Any,
    ) -> None:
        self.manifest = pieces.manifest
        self.extra = extra
        self._doorbell = doorbell
        self._count = len(pieces.parts)
        self._buffer = buffer
        self._sequence = sequence
        self._written = written

    def copy_into(self, targets: Sequence[torch.Tensor | None], *, whole: bool) -> None:
        """Copy what is there, wait for more, and in the end look whether it stayed the same."""
        try:
            while whole and self._written < self._count:
                self._wait_for_more()
            for piece in range(self._count):
                while piece >= self._written:
                    self._wait_for_more()
                self._buffer.read(piece, targets)
        except OSError as error:
            raise Interrupted(f"the sender went away: {error}") from error
        if not self._buffer.is_still(self._sequence):
            raise Interrupted("the weights were overwritten while they were read")

    def _wait_for_more(self) -> None:
        (kind, *about), _ = self._doorbell.receive()
        if kind != "more":
            raise ConnectionError(f"{kind} in the middle of weights")
        _, self._written = about
