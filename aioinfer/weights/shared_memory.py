"""Weights through shared memory, for servers in other processes of the host, or in this one."""

from __future__ import annotations

import contextlib
import logging
import os
import threading
import weakref
from collections.abc import Sequence
from typing import Any

import torch

from aioinfer.errors import WeightSyncError
from aioinfer.transports.address import Address
from aioinfer.weights import threads
from aioinfer.weights.base import Link, Ticket, WeightSyncScheme
from aioinfer.weights.buffers import PIECE_NBYTES, Announcement, Buffer, Pieces
from aioinfer.weights.delivery import Delivery, Stage
from aioinfer.weights.doorbell import Doorbell
from aioinfer.weights.reading import Weights
from aioinfer.weights.receiving import Receiver
from aioinfer.weights.shared_sender import Sender
from aioinfer.weights.slots import Interrupted

_log = logging.getLogger("aioinfer")

_FIRST_DELAY_S = 0.01
_LAST_DELAY_S = 0.25
"""Seconds between two looks for a sender: the first, and in the end."""
_GREETING_S = 5.0
"""Seconds that a server's start waits for a sender who is there."""


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


class _SharedMemLink(Link):
    """A thread that finds the sender, listens to it, and reads what it has written."""

    def __init__(self, scheme: WeightSyncScheme, receiver: Receiver, address: Address) -> None:
        self._taking = scheme._taking
        self._receiver = receiver
        self._address = address
        self._offered = threading.Event()
        """Set while there is a sender, once its newest weights have been dealt with."""
        self._looked = threading.Event()
        """Set once it is known whether there is a sender."""
        self._closed = threading.Event()
        self._lock = threading.Lock()
        self._doorbell: Doorbell | None = None
        self._epoch = 0
        self._buffers: dict[int, Buffer] = {}
        threads.start(self._run, self.close)

    def wait(self, timeout: float | None) -> bool:
        """Block until a sender's newest weights have been dealt with."""
        return self._offered.wait(timeout)

    def greet(self) -> None:
        """Block until they have been, if there is a sender; not for long."""
        self._looked.wait(_GREETING_S)

    def close(self) -> None:
        """Take no more weights. The thread ends by itself."""
        self._closed.set()
        with self._lock:
            if self._doorbell is not None:
                self._doorbell.shut_down()

    def forget(self) -> None:
        """Let go, in a forked child, of what belongs to the parent."""
        if self._doorbell is not None:
            self._doorbell.close()

    # -- on the thread ------------------------------------------------------

    def _run(self) -> None:
        delay_s = _FIRST_DELAY_S
        while not self._closed.is_set():
            try:
                doorbell = Doorbell(self._address.connect())
            except OSError:  # nobody is there yet
                delay_s = min(2 * delay_s, _LAST_DELAY_S)
            else:
                delay_s = _FIRST_DELAY_S
                with self._lock:
                    self._doorbell = doorbell
                try:
                    self._listen_to(doorbell)
                except OSError as error:
                    _log.debug("the sender of weights is gone: %s", error)
                except Exception as error:
                    _log.warning("what the sender of weights says makes no sense: %r", error)
                    delay_s = _LAST_DELAY_S
                with self._lock:
                    self._doorbell = None
                doorbell.close()
                self._offered.clear()
                self._buffers.clear()
            self._looked.set()
            self._closed.wait(delay_s)

    def _listen_to(self, doorbell: Doorbell) -> None:
        if self._closed.is_set():
            return
        doorbell.prove(self._address.token, b"receiver", b"sender")
        doorbell.send((self._receiver.name, self._receiver.version))
        (self._epoch, manifest, piece_nbytes), descriptor = doorbell.receive()
        pieces = Pieces(manifest, piece_nbytes)
        announcement = Announcement(descriptor)
        self._receiver.watch(lambda: announcement.version)
        while True:
            (kind, *about), descriptor = doorbell.receive()
            if kind == "weights":
                version, where, extra = about
                self._take(doorbell, pieces, version, where, extra, descriptor)
            if kind != "more":  # that is of weights which were refused before they were read
                self._offered.set()
                self._looked.set()

    def _take(
        self,
        doorbell: Doorbell,
        pieces: Pieces,
        version: int,
        where: tuple[int, int, int],
        extra: Any,
        descriptor: int | None,
    ) -> None:
        number, sequence, written = where
        if descriptor is not None:
            self._buffers[number] = Buffer(pieces, descriptor)
        source = _Incoming(doorbell, pieces, self._buffers[number], sequence, written, extra)
        notes: list[tuple[Stage, str, int]] = []
        reading = True

        def note(stage: Stage, why: str = "", serves: int = 0) -> None:
            if reading:
                notes.append((stage, why, serves))
            else:
                with contextlib.suppress(OSError):  # on anybody's thread, even an event loop's
                    doorbell.send((False, version, stage, why, serves), urgent=False)

        self._receiver.publish(source, version, self._epoch, note, taking=self._taking)
        reading = False
        doorbell.send((True, version, *notes[-1]))


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
