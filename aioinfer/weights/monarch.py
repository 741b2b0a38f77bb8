"""Weights through Monarch's RDMA buffers, for servers in the driver, in actors, and in replicas."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from typing import Any

import torch

from aioinfer.transports.monarch import MonarchTransport, require_monarch
from aioinfer.weights.pulling import SnapshotLink
from aioinfer.weights.reading import Weights
from aioinfer.weights.receiving import Receiver
from aioinfer.weights.sending import Ticket
from aioinfer.weights.snapshots import Layout, Snapshot, SnapshotScheme, SnapshotSender

_PULL_S = 60
_RELEASE_S = 5.0
_READER = "weights"
"""The caller on whose behalf an actor, or the driver, reads: the actor has nothing to do with
what becomes of the sender."""


class MonarchWeightSyncScheme(SnapshotScheme):
    """Brings weights to servers anywhere on Monarch meshes, which pull them from the trainer.

    The trainer is the driver or an actor, and so are the servers. Each version is a snapshot in
    an ``RDMABuffer``, which every server reads when it likes: through RDMA hardware where there
    is some, else through Monarch's own TCP transport. What is said about it travels on a
    connection of each server to the trainer, which is authenticated; if Monarch has no buffers on
    this platform at all, so do the weights.

    Create it once, in an actor or driver that outlives its use, and send it to where the trainer
    and the servers are.

    Args:
        host: the address at which the sender listens, and at which servers reach it. ``None`` for
            loopback where Monarch itself stays on the host, and otherwise for the address by
            which Monarch knows the sender's process.
        port: the port it listens at; 0 for any that is free.
        log_faults: as of :class:`~aioinfer.MonarchTransport`.
        **options: those of :class:`~aioinfer.WeightSyncScheme`.

    Raises:
        ImportError: Monarch is not installed.
    """

    def __init__(
        self,
        *,
        host: str | None = None,
        port: int = 0,
        log_faults: bool = True,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        require_monarch(type(self).__name__)
        self._address = MonarchTransport("direct", host=host, port=port, log_faults=log_faults)

    def _make_sender(
        self, ticket: Ticket, weights: Weights, overtaken: Callable[[int], None]
    ) -> _MonarchSender:
        return _MonarchSender(self._address, ticket, weights, overtaken)

    def _make_link(self, receiver: Receiver, address: MonarchTransport) -> _MonarchLink:
        return _MonarchLink(self, receiver, address)


class _MonarchSender(SnapshotSender):
    reusable = True
    _meeting: MonarchTransport

    def _export(self, snapshot: Snapshot) -> Any:
        if snapshot.exported is None:
            rdma = importlib.import_module("monarch.rdma")
            snapshot.exported = self._on_monarch(rdma.RDMABuffer, snapshot.memory)
        return snapshot.exported

    def _release(self, exported: Any) -> None:
        self._on_monarch(exported.drop).get(timeout=_RELEASE_S)

    def _on_monarch(self, function: Callable[..., Any], *args: Any) -> Any:
        """Call it as an actor; threads are none."""
        context = self._meeting._office().started.result(_RELEASE_S)
        return context.copy().run(function, *args)


class _MonarchLink(SnapshotLink):
    _meeting: MonarchTransport

    async def _sender_comes(self) -> None:
        try:
            await self._meeting._served()
        except Exception as error:
            raise ConnectionError(f"where the sender would be found has gone: {error}") from error

    def pull(self, layout: Layout, where: Any) -> torch.Tensor:
        """Read the snapshot into memory of this end."""
        memory = self.memory(layout)
        self.wait_for(self._pull(where, memory))
        return memory

    async def _pull(self, buffer: Any, memory: torch.Tensor) -> None:
        reader = await self._meeting._office().caller(_READER)
        await reader.copy().run(functools.partial(buffer.read_into, memory, timeout=_PULL_S))
