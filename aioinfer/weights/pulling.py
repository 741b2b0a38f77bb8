"""The receiver's side of schemes in which each receiver pulls a snapshot of the weights."""

from __future__ import annotations

import abc
import asyncio
import contextlib
import socket
from collections.abc import Coroutine, Sequence
from typing import Any, TypeVar

import torch

from aioinfer.errors import InferenceError
from aioinfer.transports.direct import keep_alive
from aioinfer.transports.remote import RemoteTransport
from aioinfer.weights.base import WeightSyncScheme
from aioinfer.weights.copying import copy_tensors
from aioinfer.weights.distant import DistantLink
from aioinfer.weights.doorbell import Doorbell
from aioinfer.weights.receiving import Receiver
from aioinfer.weights.slots import Interrupted
from aioinfer.weights.snapshots import Layout

T = TypeVar("T")

_CONNECT_S = 5.0


class SnapshotLink(DistantLink):
    """Finds the sender through its cluster, and pulls the snapshots that it tells of.

    What the cluster is asked is awaited on an event loop of the link's own thread, so that the
    end of the link ends the wait.
    """

    def __init__(
        self, scheme: WeightSyncScheme, receiver: Receiver, meeting: RemoteTransport
    ) -> None:
        self._meeting = meeting
        self._layout: Layout | None = None
        self._memory: torch.Tensor | None = None
        self._runner: asyncio.Runner | None = None
        self._task: asyncio.Task[Any] | None = None
        super().__init__(scheme, receiver, meeting._secret)

    def close(self) -> None:
        """Take no more weights. The thread ends by itself."""
        super().close()
        runner = self._runner
        if runner is not None:
            with contextlib.suppress(RuntimeError):  # it has ended
                runner.get_loop().call_soon_threadsafe(self._cancel)

    def _cancel(self) -> None:
        if self._task is not None:
            self._task.cancel()

    # -- on the thread ------------------------------------------------------

    def _run(self) -> None:
        # Not uvloop: what it watches no longer blocks whoever reads it.
        with asyncio.Runner(loop_factory=asyncio.SelectorEventLoop) as runner:
            runner.get_loop()  # makes it
            self._runner = runner
            super()._run()

    def wait_for(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """Block this thread for what a coroutine returns, or the end of the link or the sender.

        Raises:
            ConnectionError: one of them has ended.
        """
        assert self._runner is not None
        try:
            return self._runner.run(self._run_until_the_end(coroutine))
        except asyncio.CancelledError:
            raise ConnectionError("the other end is gone, or this one was closed") from None
        finally:
            self._task = None

    async def _run_until_the_end(self, coroutine: Coroutine[Any, Any, T]) -> T:
        self._task = asyncio.current_task()
        loop, doorbell = asyncio.get_running_loop(), self._doorbell
        if self._closed.is_set():
            coroutine.close()
            raise asyncio.CancelledError

        def look() -> None:
            assert doorbell is not None
            if doorbell.is_over():
                self._cancel()
            loop.remove_reader(doorbell)  # what it says is read later

        if doorbell is None:
            return await coroutine
        loop.add_reader(doorbell, look)
        try:
            return await coroutine
        finally:
            loop.remove_reader(doorbell)

    def _connect(self) -> socket.socket:
        if self._looked.is_set():
            self.wait_for(self._sender_comes())
        try:
            found = self.wait_for(self._meeting._find())
        except InferenceError as error:
            raise ConnectionError(str(error)) from error
        assert found.address is not None
        connection = socket.create_connection(found.address, _CONNECT_S)
        keep_alive(connection)
        return connection

    def _welcomed(self, doorbell: Doorbell) -> int:
        (epoch, manifest), _ = doorbell.receive()
        self._layout = Layout(manifest)
        return int(epoch)

    def _source(
        self, doorbell: Doorbell, version: int, where: Any, extra: Any, descriptor: int | None
    ) -> Pulled:
        self.receiver.announce(version)
        assert self._layout is not None
        return Pulled(self, doorbell, self._layout, where, extra)

    def _taken(self, source: Any) -> None:
        if source.failure is not None:  # come again, and be told of the newest
            raise ConnectionError(f"weights could not be pulled: {source.failure!r}")

    def _disconnected(self) -> None:
        self._layout = self._memory = None

    def memory(self, layout: Layout) -> torch.Tensor:
        """Memory for a snapshot; the same each time, as one is pulled at a time."""
        if self._memory is None:
            self._memory = layout.empty()
        return self._memory

    # -- what a scheme adds -------------------------------------------------

    @abc.abstractmethod
    async def _sender_comes(self) -> None:
        """Return once there is, or may be, a sender.

        Raises:
            OSError: the cluster cannot say.
        """

    @abc.abstractmethod
    def pull(self, layout: Layout, where: Any) -> torch.Tensor:
        """Bring the bytes of a snapshot here; to be read only.

        Raises:
            Exception: that failed.
        """


class Pulled:
    """Weights that are to be pulled."""

    def __init__(
        self, link: SnapshotLink, doorbell: Doorbell, layout: Layout, where: Any, extra: Any
    ) -> None:
        self.manifest = layout.manifest
        self.extra = extra
        self.failure: Exception | None = None
        """Why they could not be."""
        self._link = link
        self._doorbell = doorbell
        self._layout = layout
        self._where = where

    def copy_into(self, targets: Sequence[torch.Tensor | None], *, whole: bool) -> None:
        """Pull them, then write each leaf into its target."""
        try:
            if self._where is None:
                memory = self._receive()
            else:
                memory = self._link.pull(self._layout, self._where)
        except Exception as error:
            self.failure = error
            raise Interrupted(f"the weights could not be pulled: {error!r}") from error
        pairs = zip(targets, self._layout.tensors(memory), strict=True)
        wanted = [(target, tensor) for target, tensor in pairs if target is not None]
        copy_tensors([target for target, _ in wanted], [tensor for _, tensor in wanted])

    def _receive(self) -> torch.Tensor:
        """Take them from the connection, piece after piece."""
        memory = self._link.memory(self._layout)
        view: Any = memoryview(memory.numpy())  # type: ignore[arg-type]
        at = 0
        while at < len(view):
            (kind, *about), _ = self._doorbell.receive()
            if kind != "more":
                raise ConnectionError(f"{kind} in the middle of weights")
            (chunk,) = about
            view[at : at + len(chunk)] = chunk
            at += len(chunk)
        return memory
