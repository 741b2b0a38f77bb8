"""Weights through ``torch.distributed``, for servers on other hosts.

Every receiver has a group of two with the sender, apart from the process's default group and from
those of other receivers: one that dies takes nobody along, and one that comes late needs nobody's
consent. A connection beside the group says what comes, and what became of it. Weights travel as a
header, buckets of bytes, and a footer; what follows a header is served only after its footer.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import secrets
import socket
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch

from aioinfer.clock import duration_of
from aioinfer.weights import threads
from aioinfer.weights.base import WeightSyncScheme
from aioinfer.weights.buffers import Pieces
from aioinfer.weights.copying import copy_tensors
from aioinfer.weights.delivery import Delivery
from aioinfer.weights.distant import DistantLink, DistantScheme
from aioinfer.weights.doorbell import Doorbell
from aioinfer.weights.hub import Hub, Peer
from aioinfer.weights.manifest import Manifest
from aioinfer.weights.reading import Weights
from aioinfer.weights.receiving import Receiver
from aioinfer.weights.rendezvous import dist, meet
from aioinfer.weights.sending import Ticket
from aioinfer.weights.slots import Interrupted

_log = logging.getLogger("aioinfer")

BUCKET_NBYTES = 1 << 24
"""Bytes in a bucket, about."""
_ALIGNMENT = 16
_CONNECT_S = 5.0
_PORTS = range(15_000, 30_000)
_BUCKET_TIMEOUT = duration_of(30.0)
"""For a bucket to arrive; who is gone is noticed at once, and this is for who is stuck."""
_SENDER, _RECEIVER = 0, 1


class Place(NamedTuple):
    """Where the sender is, and the secret that lets a receiver speak to it."""

    host: str
    port: int
    token: bytes


class DistributedWeightSyncScheme(DistantScheme):
    """Brings weights to servers on any host, over Gloo.

    It needs no default group, nor a store, and leaves a group alone where there is one. Copies of
    the scheme, or a ticket, are the two ends. They prove to each other that they know its secret
    before they meet in Gloo; the weights themselves travel as Gloo sends them, in the clear and
    unauthenticated, so the network between them must be one that you trust.

    Args:
        host: the sender's name or address, as receivers reach it; it listens there only.
        port: where it listens; ``None`` for one that is free now.
        **options: those of :class:`~aioinfer.WeightSyncScheme`.
    """

    _bucket_nbytes = BUCKET_NBYTES

    def __init__(self, host: str = "127.0.0.1", port: int | None = None, **options: Any) -> None:
        super().__init__(**options)
        if not dist.is_available():
            raise RuntimeError("this torch was built without torch.distributed")
        port = _free_port(host) if port is None else port
        self._address = Place(host, port, secrets.token_bytes(32))

    def _make_sender(
        self, ticket: Ticket, weights: Weights, overtaken: Callable[[int], None]
    ) -> _DistributedSender:
        listener = socket.create_server(self._address[:2], backlog=128)
        return _DistributedSender(
            listener, self._address, ticket, weights, overtaken, self._bucket_nbytes
        )

    def _make_link(self, receiver: Receiver, address: Place) -> _DistributedLink:
        return _DistributedLink(self, receiver, address)


class _Buckets:
    """How weights are divided into tensors of bytes."""

    def __init__(self, manifest: Manifest, nbytes: int) -> None:
        self.manifest = manifest
        self._parts = Pieces(manifest, nbytes).parts

    def __len__(self) -> int:
        return len(self._parts)

    def empty(self, bucket: int) -> torch.Tensor:
        """Memory for a bucket."""
        return torch.empty(self._spans(bucket)[-1], dtype=torch.uint8)

    def pack(self, bucket: int, tensors: Sequence[torch.Tensor]) -> torch.Tensor:
        """The bucket with its part of the weights; all tensors are contiguous."""
        memory = self.empty(bucket)
        pairs = list(self._places(bucket, tensors, memory))
        copy_tensors([place for place, _ in pairs], [values for _, values in pairs])
        return memory

    def unpack(
        self, bucket: int, memory: torch.Tensor, targets: Sequence[torch.Tensor | None]
    ) -> None:
        """Write the bucket into those targets that there are; they are contiguous."""
        places, sources = [], []
        for place, values in self._places(bucket, targets, memory):
            places.append(values)
            sources.append(place)
        copy_tensors(places, sources)

    def _places(
        self, bucket: int, tensors: Sequence[torch.Tensor | None], memory: torch.Tensor
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """For each part that has a tensor, its place in the bucket, and those of its values."""
        spans = self._spans(bucket)
        for (leaf, start, stop, _), at in zip(self._parts[bucket], spans, strict=False):
            tensor = tensors[leaf]
            if tensor is not None:
                dtype = self.manifest.leaves[leaf].dtype
                place = memory[at : at + (stop - start) * dtype.itemsize].view(dtype)
                yield place, tensor.view(-1)[start:stop]

    def _spans(self, bucket: int) -> list[int]:
        spans = [0]
        for leaf, start, stop, _ in self._parts[bucket]:
            nbytes = (stop - start) * self.manifest.leaves[leaf].dtype.itemsize
            spans.append(spans[-1] + -(-nbytes // _ALIGNMENT) * _ALIGNMENT)
        return spans


class _DistributedSender(Hub):
    """Sends weights to each receiver, in the receiver's own time.

    Args:
        listener: where receivers come in.
        place: where that is.
        ticket: of this sender.
        weights: to start with.
        overtaken: called with versions of receivers, which may be newer than the sender's.
        bucket_nbytes: bytes in a bucket.
    """

    def __init__(
        self,
        listener: socket.socket,
        place: Place,
        ticket: Ticket,
        weights: Weights,
        overtaken: Callable[[int], None],
        bucket_nbytes: int,
    ) -> None:
        super().__init__(listener, place.token, ticket.version, overtaken)
        self._weights = weights.clone()
        self._ticket = ticket
        self._bucket_nbytes = bucket_nbytes
        self._buckets = _Buckets(weights.manifest, bucket_nbytes)
        self.listen()

    @property
    def newest(self) -> Weights:
        """What was sent last; nobody writes to it."""
        return self._weights

    def write(self, weights: Weights, delivery: Delivery) -> None:
        """Keep a copy of the weights, for each receiver to be sent as soon as it is free."""
        kept = weights.clone()
        with self.state:
            self._weights, self.version = kept, delivery.version
            self.expect_answers(delivery)
            self.state.notify_all()

    def _join(self, peer: Peer) -> None:
        # Before anybody is told of it: from then on, it can be sent weights.
        peer.doorbell.send((self._ticket.epoch, self._ticket.manifest, self._bucket_nbytes))
        peer.channel = meet(peer.doorbell, _SENDER)
        super()._join(peer)

    def _welcome(self, peer: Peer) -> None:
        threads.start(functools.partial(self._send_to, peer), self.close)

    def _send_to(self, peer: Peer) -> None:
        """Send a receiver the newest weights, again and again; on a thread of its own."""
        try:
            while True:
                with self.state:
                    self.state.wait_for(lambda: self._is_wanted(peer))
                    if self.closed or peer not in self.peers:
                        return
                    weights, version = self._weights, self.version
                    peer.told, peer.reading = version, weights
                    message = ("weights", version, self.hurry(peer), None, dict(weights.extra))
                peer.doorbell.send(message)
                self._send_weights(peer.channel, weights, version)
        except (OSError, RuntimeError) as error:
            _log.debug("%s cannot be sent weights: %s", peer.name, error)
        finally:
            self.drop(peer)
            peer.channel = None

    def _is_wanted(self, peer: Peer) -> bool:
        over = self.closed or peer not in self.peers
        return over or (peer.reading is None and self.version > peer.told)

    def _send_weights(self, group: Any, weights: Weights, version: int) -> None:
        def send(memory: torch.Tensor) -> None:
            group.send([memory], _RECEIVER, 0).wait(_BUCKET_TIMEOUT)

        mark = torch.tensor([version, len(self._buckets)])
        send(mark)
        for bucket in range(len(self._buckets)):
            send(self._buckets.pack(bucket, weights.tensors))
            self._sent(bucket)
        send(mark)

    def _sent(self, bucket: int) -> None:
        """A bucket is sent; tests end the process here."""

    def _is_free(self, peer: Peer) -> None:
        pass  # its thread notices

    def _dropped(self, peer: Peer) -> None:
        pass  # its thread notices

    def _end(self) -> None:
        pass


class _DistributedLink(DistantLink):
    """Receives what the sender sends."""

    def __init__(self, scheme: WeightSyncScheme, receiver: Receiver, place: Place) -> None:
        self._place = place
        self._group: Any = None
        self._buckets: _Buckets | None = None
        super().__init__(scheme, receiver, place.token)

    def _connect(self) -> socket.socket:
        return socket.create_connection(self._place[:2], timeout=_CONNECT_S)

    def _welcomed(self, doorbell: Doorbell) -> int:
        (epoch, manifest, bucket_nbytes), _ = doorbell.receive()
        self._buckets = _Buckets(manifest, bucket_nbytes)
        self._group = meet(doorbell, _RECEIVER)
        return int(epoch)

    def _source(
        self, doorbell: Doorbell, version: int, where: Any, extra: Any, descriptor: int | None
    ) -> _Arriving:
        self.receiver.announce(version)
        assert self._buckets is not None
        return _Arriving(self._group, self._buckets, version, extra)

    def _taken(self, source: Any) -> None:
        source.take_the_rest()

    def _disconnected(self) -> None:
        self._group = None


class _Arriving:
    """Weights on their way here."""

    def __init__(self, group: Any, buckets: _Buckets, version: int, extra: Any) -> None:
        self.manifest = buckets.manifest
        self.extra = extra
        self._group = group
        self._buckets = buckets
        self._version = version
        self._arrived = 0
        """Of the header, the buckets and the footer."""

    def copy_into(self, targets: Sequence[torch.Tensor | None], *, whole: bool) -> None:
        """Write bucket by bucket what arrives; with ``whole`` only once the footer is there."""
        kept = []
        plain = [_contiguous(target) for target in targets]
        try:
            self._receive_mark()
            for bucket in range(len(self._buckets)):
                memory = self._buckets.empty(bucket)
                self._receive(memory)
                if whole:
                    kept.append(memory)
                else:
                    self._buckets.unpack(bucket, memory, plain)
            self._receive_mark()
        except RuntimeError as error:
            raise Interrupted(f"the sender went away: {error}") from error
        for bucket, memory in enumerate(kept):
            self._buckets.unpack(bucket, memory, plain)
        pairs = zip(targets, plain, strict=True)
        strided = [(t, p) for t, p in pairs if t is not p and t is not None and p is not None]
        copy_tensors([target for target, _ in strided], [values for _, values in strided])

    def take_the_rest(self) -> None:
        """Let what nobody wants arrive, so that the next weights can; then let go of the group."""
        count = len(self._buckets) + 2
        try:
            while self._arrived < count:
                first_or_last = self._arrived in (0, count - 1)
                memory = torch.empty(2, dtype=torch.int64)
                self._receive(memory if first_or_last else self._buckets.empty(self._arrived - 1))
        except RuntimeError as error:
            raise ConnectionError(str(error)) from error
        finally:
            self._group = None  # errors may hold this until they are collected

    def _receive(self, memory: torch.Tensor) -> None:
        self._group.recv([memory], _SENDER, 0).wait(_BUCKET_TIMEOUT)
        self._arrived += 1

    def _receive_mark(self) -> None:
        mark = torch.empty(2, dtype=torch.int64)
        self._receive(mark)
        if mark.tolist() != [self._version, len(self._buckets)]:
            raise RuntimeError(f"{mark.tolist()} instead of the mark of version {self._version}")


def _free_port(host: str) -> int:
    """A port that nobody listens on now, nor is likely to before the sender does."""
    # Not one that the system chooses: those it gives to whoever connects or listens next.
    for _ in range(100):
        port = _PORTS[secrets.randbelow(len(_PORTS))]
        with contextlib.suppress(OSError), socket.create_server((host, port)):
            return port
    raise OSError(f"no free port of {host} was found between {_PORTS[0]} and {_PORTS[-1]}")


def _contiguous(target: torch.Tensor | None) -> torch.Tensor | None:
    if target is None or target.is_contiguous():
        return target
    return torch.empty_like(target, memory_format=torch.contiguous_format)
