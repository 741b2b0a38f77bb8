"""Where transports hand requests to the server.

Any thread may append; one thread, the server's loop, takes. An append costs a deque append
and, only if the server sleeps and this arrival is one it wants to hear of, one wake-up. So
threads are crossed once per batch and not once per request.
"""

from __future__ import annotations

import asyncio
import enum
import threading
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING

from aioinfer.batching import ANY_NUMBER
from aioinfer.errors import QueueFullError, ServerClosedError, ServerDiedError
from aioinfer.request import GivenUp, Request, Source

if TYPE_CHECKING:
    from aioinfer.clock import Clock
    from aioinfer.signature import Signature


class Notice(enum.Enum):
    """What a transport may tell the server besides a request."""

    JOINED = enum.auto()
    LEFT = enum.auto()
    GIVEN_UP = enum.auto()


class Intake:
    """The transports' side of a running server.

    Args:
        loop: the server's event loop.
        clock: the server's clock.
        wake: called on ``loop`` when there is something to take.
        admit: raises :class:`~aioinfer.errors.InvalidRequestError` for a signature that the
            policy cannot serve; called once per signature, on the submitting thread.
        refused: called, on the submitting thread, for each request that is not accepted.
        queued_rows: the rows waiting in the batcher; read from any thread.
        max_queue_size: the rows that may wait.
    """

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        clock: Clock,
        *,
        wake: Callable[[], None],
        admit: Callable[[Signature], None],
        refused: Callable[[], None],
        queued_rows: Callable[[], int],
        max_queue_size: int,
    ) -> None:
        self.loop = loop
        self.clock = clock
        self.pending: deque[Request] = deque()
        """Requests not yet in the batcher; while the queue is full they wait here."""
        self.notices: deque[tuple[Notice, Source | Request]] = deque()
        self.closed_because: str | None = None
        self.refused = refused
        self._now = clock.__call__
        self._wake = wake
        self._admit = admit
        self._admitted: set[Signature] = set()
        self._queued_rows = queued_rows
        self._max_queue_size = max_queue_size
        self._wake_at = 1
        self._room = threading.Condition()
        self._room_wanted = 0

    # -- for transports -----------------------------------------------------

    def submit(self, request: Request, *, block: bool = True) -> None:
        """Stamp and accept a request; from here on it will be answered.

        Raises:
            ServerClosedError: the server is closing or closed.
            ServerDiedError: the server's loop is gone.
            InvalidRequestError: the policy cannot serve such requests.
            QueueFullError: ``block`` is false and there is no room.
        """
        signature = request.signature
        if signature not in self._admitted:
            self._check(signature)  # type: ignore[arg-type]
        if not block and not self.has_room(request.rows):
            self.refused()
            raise QueueFullError(
                f"the queue holds {self._queued_rows()} of max_queue_size="
                f"{self._max_queue_size} rows and block=False was given"
            )
        request.submitted_at = now = self._now()
        if request.timeout is not None:
            request.deadline = now + request.timeout
        pending = self.pending
        pending.append(request)
        if self.closed_because is not None:
            self._take_back(request)
        if len(pending) >= self._wake_at or request.special:
            self._wake_server()

    def has_room(self, rows: int) -> bool:
        """Whether ``rows`` more rows fit into the queue now."""
        waiting = self._queued_rows()
        if waiting + rows <= self._max_queue_size:
            waiting += sum(request.rows for request in self.pending.copy())
        return waiting + rows <= self._max_queue_size or not waiting

    def wait_for_room(self, rows: int, timeout: float | None) -> bool:
        """Block this thread until ``rows`` more rows fit; return whether they do."""
        if self.has_room(rows):
            return True
        with self._room:
            self._room_wanted += 1
            try:
                return self._room.wait_for(
                    lambda: self.closed_because is not None or self.has_room(rows), timeout
                )
            finally:
                self._room_wanted -= 1

    def give_up(self, request: Request, why: GivenUp) -> None:
        """The caller of ``request`` no longer wants an answer."""
        request.given_up = why
        self._notify(Notice.GIVEN_UP, request)

    def join(self, source: Source) -> None:
        """A client exists."""
        self._notify(Notice.JOINED, source)

    def leave(self, source: Source) -> None:
        """A client is gone."""
        self._notify(Notice.LEFT, source)

    # -- for the server -----------------------------------------------------

    def sleep_until(self, arrivals: int) -> bool:
        """Ask to be woken once ``arrivals`` requests are pending.

        Returns whether the server may sleep: false where they already are.
        """
        self._wake_at = arrivals
        # After the assignment: an append that came before it did not wake anybody.
        if len(self.pending) < arrivals or arrivals == ANY_NUMBER:
            return True
        self._wake_at = ANY_NUMBER
        return False

    def made_room(self) -> None:
        """Wake the threads that wait for room."""
        if self._room_wanted:
            with self._room:
                self._room.notify_all()

    def close(self, why: str) -> None:
        """Accept nothing more."""
        self.closed_because = why
        with self._room:
            self._room.notify_all()

    # -- inside -------------------------------------------------------------

    def _check(self, signature: Signature) -> None:
        try:
            self._admit(signature)
        except Exception:
            self.refused()
            raise
        if len(self._admitted) > 4096:  # shapes that keep changing must not fill memory
            self._admitted.clear()
        self._admitted.add(signature)

    def _take_back(self, request: Request) -> None:
        """Refuse a request that was appended while the server closed.

        If it is no longer here the server took it in time, and answers it.
        """
        try:
            self.pending.remove(request)
        except ValueError:
            return
        self.refused()
        raise ServerClosedError(self.closed_because)

    def _notify(self, notice: Notice, about: Source | Request) -> None:
        self.notices.append((notice, about))
        if self._wake_at != ANY_NUMBER:
            self._wake_server()

    def _wake_server(self) -> None:
        if self._wake_at == ANY_NUMBER:
            return  # awake, about to wake, or busy with a forward whose end wakes it
        self._wake_at = ANY_NUMBER
        try:
            if _running_loop() is self.loop:
                self.loop.call_soon(self._wake)
            else:
                self.loop.call_soon_threadsafe(self._wake)
        except RuntimeError as error:
            if not self.loop.is_closed():
                raise
            raise ServerDiedError("the event loop of the server was closed") from error


def _running_loop() -> asyncio.AbstractEventLoop | None:
    try:
        return asyncio.get_running_loop()
    except RuntimeError:
        return None
