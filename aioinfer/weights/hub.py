"""The sender's side of schemes that cross processes: who is there, and what became of what."""

from __future__ import annotations

import abc
import contextlib
import functools
import logging
import socket
import threading
from collections.abc import Callable
from typing import Any

from aioinfer.weights import threads
from aioinfer.weights.delivery import Delivery, Stage
from aioinfer.weights.doorbell import Doorbell

_log = logging.getLogger("aioinfer")

_JOIN_S = 5.0
MAX_HALF_OPEN = 64
"""Connections that have not shown the secret; with more than these, the oldest is closed."""


class Peer:
    """One receiver, as the sender sees it."""

    def __init__(self, name: str, doorbell: Doorbell, version: int) -> None:
        self.name = name
        self.doorbell = doorbell
        self.told = version
        """The newest version that it has, or was told of."""
        self.reading: Any = None
        """What it may be reading; it has not answered yet."""
        self.deliveries: dict[int, Delivery] = {}
        """Those that wait for its answer, by version."""
        self.channel: Any = None
        """What weights travel through, if the scheme has something for that."""


class Hub(abc.ABC):
    """Listens for receivers, and for what they answer, each in a thread of its own.

    A receiver is told of one version at a time; once it has answered, it is told of the newest,
    if that is another one by then.

    Args:
        listener: a listening socket; closed in the end.
        token: what a receiver must know.
        version: of the weights to start with.
        overtaken: called with versions of receivers, which may be newer than the sender's.
    """

    def __init__(
        self,
        listener: socket.socket,
        token: bytes,
        version: int,
        overtaken: Callable[[int], None],
    ) -> None:
        self.state = threading.Condition()
        """Around everything below, and what receivers are told of."""
        self.peers: list[Peer] = []
        self.version = version
        """The newest one, whole or being written."""
        self.closed = False
        self._doorbells: set[Doorbell] = set()
        """Of the receivers, and of those that are not known yet."""
        self._half_open: dict[Doorbell, None] = {}  # a set that keeps its order
        self._token = token
        self._overtaken = overtaken
        self._listener = listener
        listener.setblocking(True)

    def listen(self) -> None:
        """Let receivers in."""
        self._accepting = threads.start(self._accept, self.close)

    def wait_for_receiver(self, timeout: float) -> bool:
        """Block until there is one; false if there is none in time."""
        with self.state:
            return self.state.wait_for(lambda: bool(self.peers), timeout)

    def expect_answers(self, delivery: Delivery) -> None:
        """Let the delivery learn what becomes of it at each receiver; the state is held."""
        for peer in self.peers:
            delivery.expect(peer.name)
            peer.deliveries[delivery.version] = delivery

    def hurry(self, peer: Peer) -> bool:
        """Whether somebody waits for the receiver's answer; the state is held."""
        return any(delivery.wait != "none" for delivery in peer.deliveries.values())

    def send(self, peer: Peer, message: Any, descriptor: int | None = None) -> bool:
        """Tell a receiver; one that cannot be told is dropped, and the result false."""
        try:
            peer.doorbell.send(message, descriptor)
        except OSError as error:
            _log.debug("%s cannot be told: %s", peer.name, error)
            self.drop(peer)
            return False
        return True

    def drop(self, peer: Peer) -> None:
        """Forget a receiver."""
        peer.doorbell.shut_down()
        with self.state:
            if peer not in self.peers:
                return
            self.peers.remove(peer)
            for delivery in peer.deliveries.values():
                delivery.note(peer.name, Stage.GONE)
            self._dropped(peer)
            self.state.notify_all()

    def close(self) -> None:
        """Stop listening, and leave the receivers to themselves."""
        with self.state:
            if self.closed:
                return
            self.closed = True
            for doorbell in self._doorbells:
                doorbell.shut_down()
            self.state.notify_all()
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        if threading.current_thread() is not self._accepting:
            self._accepting.join(_JOIN_S)  # until then, nobody else can listen there
        self._end()

    def forget(self) -> None:
        """Let go, in a forked child, of what belongs to the parent."""
        self.closed = True
        self._listener.close()
        for doorbell in self._doorbells:
            doorbell.close()
        self._end()

    # -- on their threads ---------------------------------------------------

    def _accept(self) -> None:
        while not self.closed:
            try:
                connection, _ = self._listener.accept()
            except OSError:  # closed, or there are no descriptors left
                continue
            threads.start(functools.partial(self._listen_to, connection), self.close)
        self._listener.close()

    def _listen_to(self, connection: socket.socket) -> None:
        doorbell = Doorbell(connection)
        peer: Peer | None = None
        with self.state:
            self._doorbells.add(doorbell)
            self._half_open[doorbell] = None
            if self.closed:
                doorbell.shut_down()
            elif len(self._half_open) > MAX_HALF_OPEN:
                oldest = next(iter(self._half_open))
                del self._half_open[oldest]
                oldest.shut_down()
        try:
            doorbell.prove(self._token, b"sender", b"receiver")
            with self.state:
                self._half_open.pop(doorbell, None)
            (name, version), _ = doorbell.receive()
            peer = Peer(name, doorbell, version)
            self._join(peer)
            while True:
                message, _ = doorbell.receive()
                self._answered(peer, *message)
        except Exception as error:
            _log.debug("a receiver of weights is gone: %s", error)
        finally:
            if peer is not None:
                self.drop(peer)
            with self.state:
                self._doorbells.discard(doorbell)
                self._half_open.pop(doorbell, None)
            doorbell.close()

    def _join(self, peer: Peer) -> None:
        """Let a receiver in."""
        self._overtaken(peer.told)
        with self.state:
            if self.closed:
                raise ConnectionError("the sender is closed")
            self._welcome(peer)
            self.peers.append(peer)
            if self.version <= peer.told:
                self.send(peer, ("nothing",))
            self._is_free(peer)
            self.state.notify_all()

    def _answered(
        self, peer: Peer, done: bool, version: int, stage: int, why: str, serves: int
    ) -> None:
        """A receiver says what became of a version; ``done``: it has read it."""
        self._overtaken(serves)
        with self.state:
            for known in [known for known in peer.deliveries if known <= version]:
                delivery = peer.deliveries[known]
                delivery.note(peer.name, Stage(stage), why, serves)
                if stage > Stage.STAGED or known < version:
                    del peer.deliveries[known]
            if done:
                peer.reading = None
                self._is_free(peer)
                self.state.notify_all()

    # -- what a scheme adds -------------------------------------------------

    @abc.abstractmethod
    def _welcome(self, peer: Peer) -> None:
        """Say to a receiver what it must know; the state is held."""

    @abc.abstractmethod
    def _is_free(self, peer: Peer) -> None:
        """A receiver reads nothing, and may be told of what is newer; the state is held."""

    @abc.abstractmethod
    def _dropped(self, peer: Peer) -> None:
        """A receiver is gone; the state is held."""

    @abc.abstractmethod
    def _end(self) -> None:
        """Let go of what the scheme has besides."""
