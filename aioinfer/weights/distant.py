"""The receiver's side of schemes that cross processes: finding the sender, and listening to it."""

from __future__ import annotations

import abc
import contextlib
import logging
import socket
import threading
from typing import Any

from aioinfer.weights import threads
from aioinfer.weights.base import Link, WeightSyncScheme
from aioinfer.weights.delivery import Stage
from aioinfer.weights.doorbell import Doorbell
from aioinfer.weights.receiving import Receiver
from aioinfer.weights.slots import Source

_log = logging.getLogger("aioinfer")

_FIRST_DELAY_S = 0.01
_LAST_DELAY_S = 0.25
"""Seconds between two looks for a sender: the first, and in the end."""
_GREETING_S = 5.0
"""Seconds that a server's start waits for a sender who is there."""


class DistantLink(Link):
    """A thread that finds the sender, listens to it, and takes what it sends.

    Args:
        scheme: whose link this is.
        receiver: who takes the weights.
        token: what both ends must know.
    """

    def __init__(self, scheme: WeightSyncScheme, receiver: Receiver, token: bytes) -> None:
        self.receiver = receiver
        self._taking = scheme._taking
        self._token = token
        self._offered = threading.Event()
        """Set while there is a sender, once its newest weights have been dealt with."""
        self._looked = threading.Event()
        """Set once it is known whether there is a sender."""
        self._closed = threading.Event()
        self._lock = threading.Lock()
        self._doorbell: Doorbell | None = None
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
                doorbell = Doorbell(self._connect())
            except OSError:  # nobody is there yet
                delay_s = min(2 * delay_s, _LAST_DELAY_S)
            else:
                delay_s = _FIRST_DELAY_S
                with self._lock:
                    self._doorbell = doorbell
                try:
                    if not self._closed.is_set():
                        self._listen_to(doorbell)
                except OSError as error:
                    _log.debug("the sender of weights is gone: %s", error)
                except Exception as error:
                    _log.warning("the sender of weights was not understood: %r", error)
                    delay_s = _LAST_DELAY_S
                with self._lock:
                    self._doorbell = None
                doorbell.close()
                self._offered.clear()
                self._disconnected()
            self._looked.set()
            self._closed.wait(delay_s)

    def _listen_to(self, doorbell: Doorbell) -> None:
        doorbell.prove(self._token, b"receiver", b"sender")
        doorbell.send((self.receiver.name, self.receiver.version))
        epoch = self._welcomed(doorbell)
        while True:
            (kind, *about), descriptor = doorbell.receive()
            if kind == "weights":
                version, where, extra = about
                source = self._source(doorbell, version, where, extra, descriptor)
                self._take(doorbell, source, version, epoch)
            if kind != "more":  # that is of weights which were refused before they were read
                self._offered.set()
                self._looked.set()

    def _take(self, doorbell: Doorbell, source: Source, version: int, epoch: int) -> None:
        notes: list[tuple[int, str, int]] = []
        reading = True

        def note(stage: Stage, why: str = "", serves: int = 0) -> None:
            if reading:
                notes.append((int(stage), why, serves))
            else:
                with contextlib.suppress(OSError):  # on anybody's thread, even an event loop's
                    doorbell.send((False, version, int(stage), why, serves), urgent=False)

        self.receiver.publish(source, version, epoch, note, taking=self._taking)
        self._taken(source)
        reading = False
        doorbell.send((True, version, *notes[-1]))

    # -- what a scheme adds -------------------------------------------------

    @abc.abstractmethod
    def _connect(self) -> socket.socket:
        """A connection to the sender.

        Raises:
            OSError: there is none.
        """

    @abc.abstractmethod
    def _welcomed(self, doorbell: Doorbell) -> int:
        """Receive what the sender says first; return its epoch."""

    @abc.abstractmethod
    def _source(
        self, doorbell: Doorbell, version: int, where: Any, extra: Any, descriptor: int | None
    ) -> Source:
        """The weights that the sender tells of."""

    @abc.abstractmethod
    def _taken(self, source: Any) -> None:
        """They were taken, or refused."""

    @abc.abstractmethod
    def _disconnected(self) -> None:
        """Let go of what belongs to a sender that is gone."""
