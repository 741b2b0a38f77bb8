"""One request on its way to one of several replicas, and the replicas themselves.

Which replica it goes to, and whether it is sent on if that one goes away, is decided in
:mod:`aioinfer.transports.replicated`.
"""

from __future__ import annotations

import asyncio
import weakref
from collections.abc import Callable, Hashable
from concurrent.futures import InvalidStateError
from typing import Any, Protocol

from aioinfer.clock import Clock
from aioinfer.errors import InferenceError, ServerClosedError, ServerDiedError
from aioinfer.request import GivenUp, Request, Source
from aioinfer.transports.base import InferenceTransport
from aioinfer.waiting import Answered

GONE = (ServerClosedError, ServerDiedError)
"""What a replica that is not there comes to."""


class Replicas(Protocol):
    """What an attempt needs of the transport that made it."""

    @property
    def clock(self) -> Clock:
        """The clock on which requests are stamped."""

    def settled(self, attempt: Attempt, *, well: bool = False) -> bool:
        """The replica no longer has this request; return whether that is news."""

    def again(self, attempt: Attempt, error: InferenceError) -> BaseException | None:
        """Send a request to another replica than the one that went; its error if that cannot be."""


class Replica:
    """One server: its link, who of ours it knows, and whether it is there."""

    def __init__(self, name: Hashable, transport: InferenceTransport, room: int | None) -> None:
        self.name = name
        self.transport = transport
        self.room = room
        self.sources: weakref.WeakKeyDictionary[Source, Source] = weakref.WeakKeyDictionary()
        self.rows = 0
        """Rows sent to it and not answered."""
        self.removed = False
        self.back_at = 0.0
        """Until when it is left alone."""
        self.pause_s = 0.0
        """How long it was left alone since it last answered."""

    def leave(self, source: Source) -> None:
        """One of our clients is gone."""
        known = self.sources.pop(source, None)
        if known is not None:
            known.closed = True
            self.transport.leave(known)

    def let_go(self) -> Callable[[], None]:
        """Forget all of our clients; return what says goodbye for them, to be called unlocked."""
        sources, self.sources = list(self.sources.values()), weakref.WeakKeyDictionary()

        def say_goodbye() -> None:
            for source in sources:
                source.closed = True
                self.transport.leave(source)

        return say_goodbye


class Attempt:
    """One request on its way to one replica, and the handle that this replica answers."""

    __slots__ = ("data", "deadline", "failure", "given_up", "handle", "inner", "loop", "over",
                 "replica", "retries", "source", "transport", "tried")  # fmt: skip

    def __init__(
        self,
        transport: Replicas,
        request: Request,
        loop: asyncio.AbstractEventLoop | None,
    ) -> None:
        self.transport = transport
        self.handle = request.handle
        self.data = request.data
        self.source = request.source
        self.deadline = request.deadline
        self.loop = loop
        self.inner: Any = request
        """The request as its replica has it; before that, the one it is made after."""
        self.replica: Replica
        self.tried: list[Replica] = []
        self.retries = 0
        self.over = True
        """Whether no replica has it; set once per replica, under the transport's lock."""
        self.given_up: GivenUp | None = None
        self.failure: InferenceError | None = None
        """What the replicas that went have come to."""

    def failed(self, error: InferenceError) -> InferenceError:
        """A replica has gone; return what to tell of all that have.

        That one died says more than that one is closed, which is said of the dead as well once
        they are known to be.
        """
        if not isinstance(self.failure, ServerDiedError):
            self.failure = error
        return self.failure

    def end(self) -> None:
        """Keep nothing that was asked, and no cycle of references."""
        self.inner = self.data = self.failure = None

    # -- as a handle --------------------------------------------------------

    def done(self) -> bool:
        """Whether nobody waits for it any more."""
        return self.given_up is not None or bool(self.handle.done())

    def set_result(self, result: Any) -> None:
        """The replica has answered."""
        if self.transport.settled(self, well=True):
            self.end()
            _answer(self.handle, result, None)

    def set_exception(self, error: BaseException) -> None:
        """The replica has failed it, or has gone."""
        if not self.transport.settled(self):
            return
        if isinstance(error, GONE):
            failure = self.transport.again(self, error)
            if failure is None:
                return
            error = failure
        self.end()
        _answer(self.handle, None, error)


def _answer(handle: Any, result: Any, error: BaseException | None) -> None:
    if handle.done():
        return
    try:
        if error is None:
            handle.set_result(result)
        else:
            handle.set_exception(error)
    except InvalidStateError:  # given up in this moment, on another thread
        pass


class ReplicatedWaiter(Answered):
    """What a thread waits on: what its replica's link made for the purpose, one after the other."""

    __slots__ = ("attempt",)

    def __init__(self) -> None:
        super().__init__()
        self.attempt: Attempt | None = None

    def wait(self, timeout: float | None) -> bool:
        """Block until answered or ``timeout`` seconds have passed; return whether answered."""
        attempt = self.attempt
        assert attempt is not None
        transport = attempt.transport
        give_up_at = None if timeout is None else transport.clock() + timeout
        while True:
            left = None if give_up_at is None else max(0.0, give_up_at - transport.clock())
            waiter = attempt.inner.handle
            error: BaseException | None = None
            try:
                if not waiter.wait(left):
                    return False
                self._result = waiter.result()
            except Exception as failure:
                error = failure
            transport.settled(attempt, well=error is None)
            if isinstance(error, GONE):
                error = transport.again(attempt, error)
                if error is None:
                    continue
            attempt.end()
            self._error = error
            return True
