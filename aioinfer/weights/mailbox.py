"""Where weights wait for somebody who has no server."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Callable, Mapping

import torch
from torch import nn

from aioinfer.weights.copying import copy_tensors
from aioinfer.weights.delivery import Stage
from aioinfer.weights.manifest import plan
from aioinfer.weights.reading import Weights, read_module, set_extra_state
from aioinfer.weights.receiving import Note, Receiver, Taking
from aioinfer.weights.slots import Outdated, Source


class Staged:
    """Weights that have arrived whole, and are not applied yet.

    Attributes:
        version: theirs.
        epoch: of their sender.
        manifest: what they consist of.
    """

    def __init__(
        self, weights: Weights, version: int, epoch: int, apply: Callable[[Staged], None]
    ) -> None:
        self.version = version
        self.epoch = epoch
        self.manifest = weights.manifest
        self._weights = weights
        self._apply = apply

    @property
    def weights(self) -> Mapping[str, torch.Tensor]:
        """The tensors by name, every leaf once."""
        names = (leaf.name for leaf in self.manifest.leaves)
        return dict(zip(names, self._weights.tensors, strict=True))

    def apply(self) -> None:
        """Write them into the model that was given to ``init_on_receiver``, in place."""
        self._apply(self)


class Mailbox(Receiver):
    """Keeps the newest weights until somebody asks for them.

    Args:
        model_id: what the weights are called.
        model: what they must fit, and where they go when they are applied.
    """

    def __init__(self, model_id: str, model: nn.Module) -> None:
        super().__init__(model_id)
        self._model = model
        self._newest: tuple[Staged, Note] | None = None
        self._version = 0
        self._epoch = 0
        self.closed = False
        """Whether nothing more will come."""
        self._waiting: list[asyncio.Future[None]] = []
        self._lock = threading.Lock()
        read_module(model)  # refuses what has no weights yet

    @property
    def version(self) -> int:
        """The newest version that arrived."""
        return self._version

    def announce(self, version: int) -> None:
        """Nothing follows from it here."""

    def watch(self, announced: Callable[[], int]) -> None:
        """Nothing follows from it here."""

    def _take(
        self,
        source: Source,
        version: int,
        epoch: int,
        note: Note,
        taking: Taking,
        timeout: float | None,
    ) -> None:
        """Keep a copy of the weights."""
        if epoch < self._epoch or version <= self._version:
            message = f"version {version} is not newer than {self._version}, which arrived"
            raise Outdated(message, self._version)
        served = read_module(self._model)
        found = plan(served.manifest, source.manifest, cast=taking.cast, partial=taking.partial)
        mine = served.clone()
        targets: list[torch.Tensor | None] = [None] * len(source.manifest.leaves)
        for tensor, index in zip(mine.tensors, found, strict=True):
            if index is not None:
                targets[index] = tensor
        source.copy_into(targets, whole=False)
        mine.extra = {**mine.extra, **source.extra}
        with self._lock:
            replaced, self._newest = self._newest, (Staged(mine, version, epoch, self._apply), note)
            self._version, self._epoch = version, epoch
        if replaced is not None:
            replaced[1](Stage.SUPERSEDED)
        note(Stage.STAGED)
        self._wake()

    def _refused(self) -> None:
        pass  # nobody counts

    def arrival(self, loop: asyncio.AbstractEventLoop) -> asyncio.Future[None]:
        """Return a future of ``loop`` that is done once something arrives after this call."""
        future = loop.create_future()
        with self._lock:
            self._waiting.append(future)
        return future

    def take(self) -> Staged | None:
        """Return what has arrived and was not taken yet."""
        with self._lock:
            if self._newest is None:
                return None
            (staged, self._note), self._newest = self._newest, None
            return staged

    def close(self) -> None:
        """Nothing more will come."""
        self.closed = True
        self._wake()

    def _wake(self) -> None:
        with self._lock:
            waiting, self._waiting = self._waiting, []
        for future in waiting:
            with contextlib.suppress(RuntimeError):  # its loop is closed
                future.get_loop().call_soon_threadsafe(_wake, future)

    def _apply(self, staged: Staged) -> None:
        served = read_module(self._model)
        copy_tensors(served.tensors, staged._weights.tensors)
        set_extra_state(self._model, staged._weights.extra)
        self._note(Stage.APPLIED)


def _wake(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)
