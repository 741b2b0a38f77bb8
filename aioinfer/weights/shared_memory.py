"""Weights through shared memory, for servers in other processes of the host, or in this one."""

from __future__ import annotations

import contextlib
import os
import socket
import weakref
from collections.abc import Sequence
from typing import Any

import torch

from aioinfer.errors import WeightSyncError
from aioinfer.transports.address import Address
from aioinfer.weights.base import Link, Ticket, WeightSyncScheme
from aioinfer.weights.buffers import PIECE_NBYTES, Announcement, Buffer, Pieces
from aioinfer.weights.delivery import Delivery
from aioinfer.weights.distant import DistantLink
from aioinfer.weights.doorbell import Doorbell
from aioinfer.weights.reading import Weights
from aioinfer.weights.receiving import Receiver
from aioinfer.weights.shared_sender import Sender
from aioinfer.weights.slots import Interrupted


class SharedMemWeightSyncScheme(WeightSyncScheme):
    """Brings weights to servers of the same host, in any process, through shared memory.

    One object, copies of it in other processes, or an object and a ticket, are the two ends. A
    sender that is started again finds the servers of the one before it. The memory has no name,
    so nothing can be left behind. The arguments are those of :class:`~aioinfer.WeightSyncScheme`.
    """

    _piece_nbytes = PIECE_NBYTES

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self._address = Address.new()

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_address": self._address}

    def _begin(self) -> None:
        super()._begin()
        self._sender: Sender | None = None
        _schemes.add(self)

    # -- the sender's end ---------------------------------------------------

    def _open_sender(self, weights: Weights, ticket: Ticket) -> Address:
        catch_up = weakref.WeakMethod(self._catch_up)

        def overtaken(version: int) -> None:
            if (method := catch_up()) is not None:
                method(version)

        try:
            self._sender = self._make_sender(
                self._address, ticket.epoch, weights, ticket.version, overtaken, self._piece_nbytes
            )
        except OSError as error:
            raise WeightSyncError(
                "another sender of this scheme is at work; close it, or start another scheme"
            ) from error
        self._end_sender = weakref.finalize(self, self._sender.close)
        return self._address

    _make_sender = Sender

    def _newest(self) -> Weights:
        assert self._sender is not None
        return self._sender.newest

    def _transmit(self, weights: Weights, delivery: Delivery, deadline: float) -> None:
        assert self._sender is not None
        self._sender.write(weights, delivery)

    def _wait_for_receiver(self, timeout: float) -> bool:
        sender = self._sender
        return sender is not None and sender.wait_for_receiver(timeout)

    def _close_sender(self) -> None:
        self._end_sender()
        self._sender = None

    # -- the receiver's end -------------------------------------------------

    def _open_receiver(self, receiver: Receiver) -> Link:
        address = self._address if self._ticket is None else self._ticket.address
        return _SharedMemLink(self, receiver, address)

    def _after_fork(self) -> None:
        if self._sender is not None:
            self._end_sender.detach()
            self._sender.forget()
        for link in self._links:
            if isinstance(link, _SharedMemLink):
                link.forget()
        self._begin()


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


_schemes: weakref.WeakSet[SharedMemWeightSyncScheme] = weakref.WeakSet()


def _after_fork() -> None:
    for scheme in list(_schemes):
        with contextlib.suppress(Exception):
            scheme._after_fork()


os.register_at_fork(after_in_child=_after_fork)
