"""Where transports hand requests to the server.

Any thread may append; one thread, the server's loop, takes. An append costs a deque append
and, only if the server sleeps and this arrival is one it wants to hear of, one wake-up. So
threads are crossed once per batch and not once per request.
"""

from __future__ import annotations

import asyncio
import contextlib
import enum
import threading
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING

from aioinfer.batching import ANY_NUMBER
from aioinfer.errors import InferenceError, QueueFullError, ServerDiedError
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
        self.closed: Callable[[], InferenceError] | None = None
        """Makes the error of what is not accepted any more; ``None`` while open."""
        self.load = 0
        """Rows under way when the latest batch was answered, those of this batch included."""
        self.room = 0
        """Rows worth filling this server with before another one; 0 while that is not known."""
        self.refused = refused
        self._now = clock.__call__
        self._wake = wake
        self._admit = admit
        self._admitted: set[Signature] = set()
        self._queued_rows = queued_rows
        self._max_queue_size = max_queue_size
        self._wake_at = 1
        self._extra_rows = 0
        """Rows in ``pending`` beyond one per request."""
        self._room = threading.Condition()
        self._room_wanted = 0

    # -- for transports -----------------------------------------------------

    def submit(
        self, request: Request, *, block: bool = True, submitted_at: float | None = None
    ) -> None:
        """Stamp and accept a request; from here on it will be answered.

        Args:
            request: the request.
            block: if false, refuse it where there is no room.
            submitted_at: when its caller sent it, where that was in another process.

        Raises:
            ServerClosedError: the server is closing or closed.
            ServerDiedError: the server went away.
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
        now = self._now()
        if submitted_at is not None:
            now = min(now, submitted_at)  # nobody has sent anything in the future
        request.submitted_at = now
        if request.timeout is not None:
            request.deadline = now + request.timeout
        if request.batched:
            self._count_extra(request.rows - 1)
        pending = self.pending
        pending.append(request)
        if self.closed is not None:
            self._take_back(request)
        if len(pending) >= self._wake_at or request.special:
            self._wake_server()

    def has_room(self, rows: int) -> bool:
        """Whether ``rows`` more rows fit into the queue now."""
        waiting = self._queued_rows() + self.pending_rows
        return waiting + rows <= self._max_queue_size or not waiting

    @property
    def pending_rows(self) -> int:
        """Rows not yet in the batcher."""
        return len(self.pending) + self._extra_rows

    def wait_for_room(self, rows: int, timeout: float | None) -> bool:
        """Block this thread until ``rows`` more rows fit; return whether they do."""
        if self.has_room(rows):
            return True
        with self._room:
            self._room_wanted += 1
            try:
                return self._room.wait_for(
                    lambda: self.closed is not None or self.has_room(rows), timeout
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

    def take(self) -> Request:
        """Take the request that has been pending longest."""
        request = self.pending.popleft()
        if request.batched:
            self._count_extra(1 - request.rows)
        return request

    def put_back(self, request: Request) -> None:
        """Undo :meth:`take`."""
        if request.batched:
            self._count_extra(request.rows - 1)
        self.pending.appendleft(request)

    def close(self, closed: Callable[[], InferenceError]) -> None:
        """Accept nothing more; ``closed`` makes the error that says why."""
        self.closed = closed
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
        if request.batched:
            self._count_extra(1 - request.rows)
        self.refused()
        assert self.closed is not None
        raise self.closed()

    def _count_extra(self, rows: int) -> None:
        with self._room:
            self._extra_rows += rows

    def _notify(self, notice: Notice, about: Source | Request) -> None:
        self.notices.append((notice, about))
        with contextlib.suppress(ServerDiedError):  # then there is nobody to notify
            self._wake_server()

    def _wake_server(self) -> None:
        if self._wake_at == ANY_NUMBER:
            return  # awake, about to wake, or busy with a forward whose end wakes it
        self._wake_at = ANY_NUMBER
        try:
            if running_loop() is self.loop:
                self.loop.call_soon(self._wake)
            else:
                self.loop.call_soon_threadsafe(self._wake)
        except RuntimeError:
            if not self.loop.is_closed():
                raise
            # Nobody was told, and nobody will be: this and every later request ends here.
            self.close(loop_closed)
            raise loop_closed() from None


def loop_closed() -> ServerDiedError:
    """Make the error of those who ask a server whose event loop is no more."""
    return ServerDiedError("the event loop of the server was closed under it")


def running_loop() -> asyncio.AbstractEventLoop | None:
    """Return the event loop that runs on this thread, if one does."""
    try:
        return asyncio.get_running_loop()
    except RuntimeError:
        return None
