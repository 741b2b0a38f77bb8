"""Weights through Ray's object store, for servers in the driver, in actors, and in replicas."""

from __future__ import annotations

import ctypes
import importlib
import secrets
from collections.abc import Callable
from typing import Any

import torch

from aioinfer.transports.ray import RayTransport, require_ray
from aioinfer.weights.pulling import SnapshotLink
from aioinfer.weights.reading import Weights
from aioinfer.weights.receiving import Receiver
from aioinfer.weights.sending import Ticket
from aioinfer.weights.snapshots import Layout, Snapshot, SnapshotScheme, SnapshotSender


class RayWeightSyncScheme(SnapshotScheme):
    """Brings weights to servers anywhere on a Ray cluster, through its object store.

    The trainer is the driver or an actor, and so are the servers. Each version is put into the
    object store once; every host of servers fetches it once, and servers read it there. What is
    said about it travels on a connection of each server to the trainer, which is authenticated.

    Create it once, in a process that outlives its use, and send it to where the trainer and the
    servers are: with it comes a small actor (no CPUs, some 60 MB) that lets them find each other.
    If Ray does not run yet, it is initialised.

    Args:
        host: the address at which the sender listens, and at which servers reach it. ``None`` for
            the one by which Ray knows the sender's node.
        port: the port it listens at; 0 for any that is free.
        **options: those of :class:`~aioinfer.WeightSyncScheme`.

    Raises:
        ImportError: Ray is not installed.
    """

    def __init__(self, *, host: str | None = None, port: int = 0, **options: Any) -> None:
        super().__init__(**options)
        require_ray(type(self).__name__)
        self._address = RayTransport("direct", host=host, port=port)

    def _make_sender(
        self, ticket: Ticket, weights: Weights, overtaken: Callable[[int], None]
    ) -> _RaySender:
        return _RaySender(self._address, ticket, weights, overtaken)

    def _make_link(self, receiver: Receiver, address: RayTransport) -> _RayLink:
        return _RayLink(self, receiver, address)


class _RaySender(SnapshotSender):
    reusable = False
    _meeting: RayTransport

    def _export(self, snapshot: Snapshot) -> bytes:
        if snapshot.exported is None:
            ray = importlib.import_module("ray")
            key = secrets.token_bytes(16)
            # The relay hands it out: only what travels in a call of Ray's own is counted by Ray,
            # and let go of when nobody has it any more.
            ray.get(self._meeting._relay.hold.remote(key, [ray.put(snapshot.memory.numpy())]))
            snapshot.exported = key
        exported: bytes = snapshot.exported
        return exported

    def _release(self, exported: bytes) -> None:
        self._meeting._relay.let_go.remote(exported)


class _RayLink(SnapshotLink):
    _meeting: RayTransport

    async def _sender_comes(self) -> None:
        ray = importlib.import_module("ray")
        try:
            await self._meeting._relay.served.remote()
        except ray.exceptions.RayError as error:
            raise ConnectionError(str(error)) from error

    def pull(self, layout: Layout, where: bytes) -> torch.Tensor:
        """Map the snapshot where it is in the object store of this host."""
        return _as_tensor(self.wait_for(self._pull(where)))

    async def _pull(self, key: bytes) -> Any:
        kept = await self._meeting._relay.take.remote(key)
        if kept is None:
            raise ConnectionError("the sender is gone")
        return await kept[0]


def _as_tensor(array: Any) -> torch.Tensor:
    """The bytes of an array that must not be written to; torch has no name for such memory."""
    memory = (ctypes.c_ubyte * array.nbytes).from_address(array.ctypes.data)
    memory.array = array  # lives as long as the tensor
    return torch.frombuffer(memory, dtype=torch.uint8)
