"""What a transport is, to its clients and to the server."""

from __future__ import annotations

import abc
import asyncio
from collections.abc import Callable
from typing import Any, ClassVar

from aioinfer.client import InferenceClient, SyncInferenceClient
from aioinfer.clock import Clock
from aioinfer.intake import Intake
from aioinfer.request import GivenUp, Request, Source
from aioinfer.waiting import Waiter


class InferenceTransport(abc.ABC):
    """Carries requests from clients to a server and answers back.

    A transport may be created, and its clients handed out, before a server exists. It serves
    one server at a time and may serve another one later. What a client asks while no server
    is attached is refused with :class:`~aioinfer.errors.ServerClosedError`.

    Subclasses implement the abstract methods; ``class Mine(InferenceTransport, default=True)``
    makes a subclass the one that ``transport=None`` stands for.
    """

    in_process: ClassVar[bool] = False
    """Whether its clients share the server's interpreter, and so compete with the forward."""

    exchange: Callable[[Any, Source], Any] | None = None
    """A shorter way for the simplest call of a thread: takes the TensorDict and the source, waits,
    and returns the answer, or ``None`` if this call has to go the usual way."""

    _default: ClassVar[type[InferenceTransport]]

    def __init_subclass__(cls, *, default: bool = False, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if default:
            InferenceTransport._default = cls

    @staticmethod
    def default() -> InferenceTransport:
        """Return a new transport of the kind that ``transport=None`` stands for."""
        return InferenceTransport._default()

    # -- handing out clients ------------------------------------------------

    def client(self) -> InferenceClient | SyncInferenceClient:
        """Return a new client of the kind that is natural for this transport's actors."""
        return self.async_client()

    def async_client(self) -> InferenceClient:
        """Return a new client for coroutines."""
        return InferenceClient(self)

    def sync_client(self) -> SyncInferenceClient:
        """Return a new client for threads."""
        return SyncInferenceClient(self)

    # -- used by clients ----------------------------------------------------

    @property
    @abc.abstractmethod
    def clock(self) -> Clock:
        """The clock on which requests are stamped.

        Raises:
            ServerClosedError: no server is attached.
        """

    @abc.abstractmethod
    def send(
        self, request: Request, loop: asyncio.AbstractEventLoop | None, *, block: bool = True
    ) -> None:
        """Set the request on its way.

        Args:
            request: ``request.handle`` is an :class:`asyncio.Future` of ``loop`` or, for
                threads, anything with ``set_result`` and ``set_exception``.
            loop: the running loop of the caller; ``None`` for a thread.
            block: if false, refuse the request where the queue is full.

        Raises:
            InferenceError: the request was not accepted; it will not be answered.
        """

    def waiter(self) -> Any:
        """Return what a thread waits on for one answer, the handle of its request."""
        return Waiter()

    @abc.abstractmethod
    def give_up(self, request: Request, why: GivenUp) -> None:
        """The caller of a sent request no longer wants its answer. Never raises."""

    @abc.abstractmethod
    def wait_for_room(self, rows: int, timeout: float | None) -> bool:
        """Block this thread until ``rows`` more rows fit into the queue."""

    @abc.abstractmethod
    def call_at(self, when: float, callback: Any) -> Any:
        """Run ``callback`` once the clock reads ``when``, on any thread; for sync clients."""

    @abc.abstractmethod
    def join(self, source: Source) -> None:
        """A client exists."""

    @abc.abstractmethod
    def leave(self, source: Source) -> None:
        """A client is gone."""

    # -- used by the server -------------------------------------------------

    @abc.abstractmethod
    async def attach(self, intake: Intake) -> None:
        """Start carrying requests to ``intake``.

        Raises:
            RuntimeError: the transport already serves a server.
        """

    @abc.abstractmethod
    async def detach(self) -> None:
        """Stop; every request that was accepted has been answered. Harmless if stopped."""
