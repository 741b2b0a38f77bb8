"""The sender's side of schemes in which each receiver pulls a snapshot that nobody writes to.

A snapshot is a whole set of weights in one piece of memory. It is made available once, however
many receivers there are, and its memory is used again once nobody reads it: as long as receivers
keep up there are two. A cluster says where the sender is, and the weights travel through whatever
that cluster has; the connections between the ends only carry what is said about them.
"""

from __future__ import annotations

import abc
import asyncio
import concurrent.futures
import functools
import logging
import socket
import threading
from collections.abc import Callable
from typing import Any

import torch

from aioinfer.errors import WeightSyncError
from aioinfer.intake import running_loop
from aioinfer.transports.direct import keep_alive
from aioinfer.transports.remote import RemoteTransport
from aioinfer.weights import threads
from aioinfer.weights.copying import copy_tensors
from aioinfer.weights.delivery import Delivery
from aioinfer.weights.distant import DistantScheme
from aioinfer.weights.hub import Hub, Peer
from aioinfer.weights.manifest import Manifest
from aioinfer.weights.reading import Weights
from aioinfer.weights.sending import Ticket

_log = logging.getLogger("aioinfer")

CHUNK_NBYTES = 1 << 20
"""Bytes of a snapshot in one message, where it travels on the connection itself."""
_ALIGNMENT = 64
_ANNOUNCE_S = 30.0
"""Seconds in which the cluster must have taken note of a sender."""
_JOIN_S = 5.0


class SnapshotScheme(DistantScheme):
    """A scheme whose ends meet in a cluster.

    A transport that serves no requests is what tells receivers where the sender is, and what
    holds the secret that both must know.
    """

    _address: RemoteTransport


class Layout:
    """Where each leaf of a manifest is in the memory of a snapshot."""

    def __init__(self, manifest: Manifest) -> None:
        self.manifest = manifest
        self._offsets = []
        offset = 0
        for leaf in manifest.leaves:
            self._offsets.append(offset)
            offset += -(-leaf.nbytes // _ALIGNMENT) * _ALIGNMENT
        self.nbytes = max(offset, _ALIGNMENT)

    def empty(self) -> torch.Tensor:
        """Memory for a snapshot, as bytes."""
        return torch.empty(self.nbytes, dtype=torch.uint8)

    def tensors(self, memory: torch.Tensor) -> list[torch.Tensor]:
        """One for each leaf; they are in that memory."""
        return [
            memory[offset : offset + leaf.nbytes].view(leaf.dtype).view(leaf.shape)
            if leaf.nbytes
            else torch.empty(leaf.shape, dtype=leaf.dtype)
            for leaf, offset in zip(self.manifest.leaves, self._offsets, strict=True)
        ]


class Snapshot:
    """A whole set of weights."""

    def __init__(self, layout: Layout) -> None:
        self.memory = layout.empty()
        self.tensors = layout.tensors(self.memory)
        self.version = 0
        self.extra: dict[str, Any] = {}
        self.exported: Any = None
        """What makes it available to receivers, once it is."""
        self.busy = False
        """Whether it is about to be."""
        self.abandoned = False
        """Whether a receiver was lost that may read it still."""


class SnapshotSender(Hub):
    """Keeps snapshots, and tells receivers of the newest.

    Args:
        meeting: where receivers learn of this sender.
        ticket: of this sender.
        weights: to start with.
        overtaken: called with versions of receivers, which may be newer than the sender's.

    Raises:
        OSError: it cannot listen.
        WeightSyncError: there is another sender. On an event loop, which must not be blocked, it
            is :meth:`write` and :meth:`wait_for_receiver` that raise this.
    """

    reusable: bool
    """Whether a snapshot that was exported can be written to, and is then exported again."""

    def __init__(
        self,
        meeting: RemoteTransport,
        ticket: Ticket,
        weights: Weights,
        overtaken: Callable[[int], None],
    ) -> None:
        host = meeting._host_of_this_process() if meeting._host is None else meeting._host
        listener = socket.create_server((host, meeting._port), backlog=128)
        keep_alive(listener)  # and so the connections that it accepts
        super().__init__(listener, meeting._secret, ticket.version, overtaken)
        self._meeting = meeting
        self._place: tuple[str, int] = host, listener.getsockname()[1]
        self._ticket = ticket
        self._layout = Layout(weights.manifest)
        self._snapshots: list[Snapshot] = []
        self._given_up: list[Any] = []  # what was exported and is needed no more
        self._newest = self._filled(weights, ticket.version)
        self._announced: concurrent.futures.Future[None] = concurrent.futures.Future()
        self._telling: threading.Thread | None = None
        self.listen()  # first, for the other thread may find that it must close this
        self._telling = threads.start(self._tell_everybody, self.close)
        if running_loop() is None:
            self._announced.result()

    @property
    def newest(self) -> Weights:
        """What was sent last."""
        return Weights(self._layout.manifest, self._newest.tensors, self._newest.extra)

    def write(self, weights: Weights, delivery: Delivery) -> None:
        """Keep a copy of the weights, for receivers to pull; by one thread at a time.

        Raises:
            WeightSyncError: another process is the sender.
        """
        self._announced.result()
        snapshot = self._filled(weights, delivery.version)
        with self.state:
            before, self._newest = self._newest, snapshot
            self.version = delivery.version
            self.expect_answers(delivery)
            self._forget_if_abandoned(before)
            self._settle()
            self.state.notify_all()

    def wait_for_receiver(self, timeout: float) -> bool:
        """Block until there is one; false if there is none in time.

        Raises:
            WeightSyncError: another process is the sender.
        """
        try:
            self._announced.result(timeout)
        except TimeoutError:
            return False
        return super().wait_for_receiver(timeout)

    def _filled(self, weights: Weights, version: int) -> Snapshot:
        with self.state:
            used = [peer.reading for peer in self.peers]
            if self._snapshots:
                used.append(self._newest)
            free = [s for s in self._snapshots if s not in used and not s.busy]
            if not free:
                free = [Snapshot(self._layout)]
                self._snapshots += free
            snapshot = free[0]
        snapshot.version, snapshot.extra = version, dict(weights.extra)
        copy_tensors(snapshot.tensors, weights.tensors)
        return snapshot

    # -- on a thread of its own ---------------------------------------------

    def _tell_everybody(self) -> None:
        with asyncio.Runner() as runner:
            try:
                runner.run(self._announce())
            except Exception as error:
                why = f"the cluster did not take note of this sender: {error!r}"
                if isinstance(error, RuntimeError):
                    why = "another sender of this scheme is at work"
                self._announced.set_exception(WeightSyncError(why))
                self.close()
                return
            self._announced.set_result(None)
            while not self.closed:
                self._tell_of_newest()
            with self.state:
                for snapshot in self._snapshots:
                    self._give_up(snapshot)
            self._release_what_is_given_up()
            try:
                runner.run(self._meeting._close())
            except Exception as error:
                _log.debug("a sender of weights could not say that it ends: %r", error)

    async def _announce(self) -> None:
        async with asyncio.timeout(_ANNOUNCE_S):
            await self._meeting._publish(self._place, None)

    def _tell_of_newest(self) -> None:
        """Wait for receivers that need the newest weights, and tell them."""
        with self.state:
            self.state.wait_for(lambda: self.closed or self._given_up or self._idle())
            snapshot = self._newest
            snapshot.busy = not self.closed and bool(self._idle())
        self._release_what_is_given_up()
        if snapshot.busy:
            where = self._available(snapshot)
            with self.state:
                snapshot.busy = False
                if not self._forget_if_abandoned(snapshot):
                    for peer in self._idle():
                        if snapshot.version > peer.told:
                            self._tell(peer, snapshot, where)
                self._settle()

    def _release_what_is_given_up(self) -> None:
        with self.state:
            given_up, self._given_up = self._given_up, []
        for exported in given_up:
            try:
                self._release(exported)
            except Exception as error:
                _log.debug("weights could not be released: %r", error)

    def _idle(self) -> list[Peer]:
        """Receivers that read nothing, and have not been told of the newest weights."""
        return [p for p in self.peers if p.reading is None and self.version > p.told]

    def _available(self, snapshot: Snapshot) -> Any:
        """Where receivers find the snapshot; ``None`` if it must be sent to each of them."""
        try:
            return self._export(snapshot)
        except Exception as error:
            _log.warning("weights are sent to each receiver by itself: %r", error)
            return None

    def _tell(self, peer: Peer, snapshot: Snapshot, where: Any) -> None:
        peer.reading, peer.told = snapshot, snapshot.version
        message = ("weights", snapshot.version, self.hurry(peer), where, snapshot.extra)
        if self.send(peer, message) and where is None:
            threads.start(functools.partial(self._stream, peer, snapshot), self.close)

    def _stream(self, peer: Peer, snapshot: Snapshot) -> None:
        memory = memoryview(snapshot.memory.numpy())  # type: ignore[arg-type]
        for at in range(0, len(memory), CHUNK_NBYTES):
            if not self.send(peer, ("more", bytes(memory[at : at + CHUNK_NBYTES]))):
                return

    # -- who reads what; the state is held ----------------------------------

    def _settle(self) -> None:
        """Give up what was exported and has been read by everybody who was to read it."""
        if self.reusable:
            return
        used = [peer.reading for peer in self.peers]
        if self._idle():
            used.append(self._newest)
        for snapshot in self._snapshots:
            if snapshot.exported is not None and not snapshot.busy and snapshot not in used:
                self._give_up(snapshot)

    def _give_up(self, snapshot: Snapshot) -> None:
        if snapshot.exported is not None:
            self._given_up.append(snapshot.exported)
            snapshot.exported = None
            self.state.notify_all()

    def _welcome(self, peer: Peer) -> None:
        peer.doorbell.send((self._ticket.epoch, self._layout.manifest))

    def _is_free(self, peer: Peer) -> None:
        self._settle()
        self.state.notify_all()

    def _dropped(self, peer: Peer) -> None:
        """Let it read on where it reads: nobody writes there any more."""
        snapshot = peer.reading
        if snapshot in self._snapshots:
            snapshot.abandoned = True
            self._forget_if_abandoned(snapshot)
        self._settle()

    def _forget_if_abandoned(self, snapshot: Snapshot) -> bool:
        """Write there no more, nor tell anybody of it, as soon as there is a newer one."""
        over = snapshot.abandoned and snapshot is not self._newest and not snapshot.busy
        if over and snapshot in self._snapshots:
            self._snapshots.remove(snapshot)
            self._give_up(snapshot)
        return over

    def _end(self) -> None:
        telling = self._telling
        if telling is not None and telling is not threading.current_thread():
            telling.join(_JOIN_S)

    # -- what a scheme adds -------------------------------------------------

    @abc.abstractmethod
    def _export(self, snapshot: Snapshot) -> Any:
        """Make a snapshot available, unless it is, and say where; no event loop runs here.

        Raises:
            Exception: it cannot be.
        """

    @abc.abstractmethod
    def _release(self, exported: Any) -> None:
        """Nobody needs any more what was exported; no event loop runs here."""
