"""The receiver's side of schemes that cross processes: finding the sender, and listening to it."""

from __future__ import annotations

import abc
import contextlib
import logging
import socket
import threading
import weakref
from collections.abc import Callable
from typing import Any

from aioinfer.errors import WeightSyncError
from aioinfer.forks import forgets
from aioinfer.weights import threads
from aioinfer.weights.base import Link, WeightSyncScheme
from aioinfer.weights.delivery import Delivery, Stage
from aioinfer.weights.doorbell import Doorbell
from aioinfer.weights.hub import Hub
from aioinfer.weights.reading import Weights
from aioinfer.weights.receiving import Receiver
from aioinfer.weights.sending import Ticket
from aioinfer.weights.slots import Source

_log = logging.getLogger("aioinfer")

_FIRST_DELAY_S = 0.01
_LAST_DELAY_S = 0.25
"""Seconds between two looks for a sender: the first, and in the end. Nothing would tell of a sender
that comes: it may be on another host, and on this one it leaves no trace in any folder. A look is a
connection that is refused: 8 microseconds on one host, 17 over TCP, so 0.01 % of a core."""
_REST_S = 0.002
"""Seconds between two sets of weights that nobody waits for: a thread that takes every one of
thousands a second would be in the way of those that serve."""
_GREETING_S = 5.0
"""Seconds that a server's start waits for a sender who is there."""


class DistantScheme(WeightSyncScheme):
    """A scheme whose sender is a :class:`Hub` that receivers connect to."""

    _address: Any
    """Where the sender is; a scheme has it from the beginning, and so have its copies."""

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_address": self._address}

    def _begin(self) -> None:
        super()._begin()
        self._sender: Any = None
        forgets(self)

    def _open_sender(self, weights: Weights, ticket: Ticket) -> Any:
        catch_up = weakref.WeakMethod(self._catch_up)  # a forgotten scheme ends its sender

        def overtaken(version: int) -> None:
            if (method := catch_up()) is not None:
                method(version)

        try:
            self._sender = self._make_sender(ticket, weights, overtaken)
        except OSError as error:
            raise WeightSyncError(
                f"no sender can listen here ({error}); is another sender of this scheme at work?"
            ) from error
        self._end_sender = weakref.finalize(self, self._sender.close)
        return self._address

    def _newest(self) -> Weights:
        newest: Weights = self._sender.newest
        return newest

    def _transmit(self, weights: Weights, delivery: Delivery, deadline: float) -> None:
        self._sender.write(weights, delivery)

    def _wait_for_receiver(self, timeout: float) -> bool:
        sender = self._sender
        return sender is not None and sender.wait_for_receiver(timeout)

    def _close_sender(self) -> None:
        self._end_sender()
        self._sender = None

    def _open_receiver(self, receiver: Receiver) -> Link:
        address = self._address if self._ticket is None else self._ticket.address
        return self._make_link(receiver, address)

    def _after_fork(self) -> None:
        """Forget, in a forked child, what belongs to the parent."""
        if self._sender is not None:
            self._end_sender.detach()
            self._sender.forget()
        for link in self._links:
            if isinstance(link, DistantLink):
                link.forget()
        self._begin()

    @abc.abstractmethod
    def _make_sender(
        self, ticket: Ticket, weights: Weights, overtaken: Callable[[int], None]
    ) -> Hub:
        """The sender, listening; ``overtaken`` is told the versions of receivers.

        It has a property ``newest``, and a method ``write(weights, delivery)``, which returns
        once the caller may change the weights.

        Raises:
            OSError: it cannot listen.
        """

    @abc.abstractmethod
    def _make_link(self, receiver: Receiver, address: Any) -> DistantLink:
        """The receiver's end."""


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
                version, hurry, where, extra = about
                source = self._source(doorbell, version, where, extra, descriptor)
                self._take(doorbell, source, version, epoch, hurry)
            if kind != "more":  # that is of weights which were refused before they were read
                self._offered.set()
                self._looked.set()

    def _take(
        self, doorbell: Doorbell, source: Source, version: int, epoch: int, hurry: bool
    ) -> None:
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
        if not hurry:  # the sender goes on meanwhile, and tells of its newest weights then
            self._closed.wait(_REST_S)
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
