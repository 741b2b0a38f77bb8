"""The batcher: which requests leave together, and when.

Plain decisions over plain records. There is no event loop in here, no thread, no clock and
no tensor: the caller says what happened and what time it is, and asks what to do next. One
thread at a time may use a batcher.

The rules, in the order in which they decide:

1.  *Late binding.* While no executor is free nothing is decided. What a batch holds is
    chosen at the moment it leaves, so whatever arrives during a forward joins the next one.
2.  A full batch waiting leaves at once; so does what there is once the queue is full (rule
    9), for more cannot join it.
3.  Without a ``min_batch_size``: if everybody who is expected is already waiting, the batch
    leaves at once, for nobody else can arrive. Otherwise the batch is held for as long as that
    is worth while, which is judged in :mod:`aioinfer.patience`. Either way a part of it leaves
    alone where taking turns is faster. Expected are clients that joined and have not
    asked yet, and clients that got one of the latest answers and have not asked again.
4.  ``timeout`` bounds the delay added here. It counts from the submission of the oldest
    waiting request, is not re-armed by later arrivals, and is cut short for a request whose
    own deadline would otherwise pass before the forward is done.
5.  With ``min_batch_size=n``: n waiting rows leave at once; rule 3 does not apply.
6.  Within a queue the most urgent request is first. Urgency is a point in time: the
    request's deadline, or ``AGEING_S`` after its submission if that is sooner (or if it has
    none), moved ``AGEING_S`` earlier per level of priority. Urgency does not change while
    time passes, so requests of equal priority and no deadline keep their order of arrival,
    and everyone is overtaken for a bounded time only.
7.  Requests of different signatures never share a batch. Each signature has a queue; of the
    queues that may leave, the one with the most urgent head does.
8.  A request that was given up, or whose deadline has passed, is not put into a batch; nor
    is one that has not even half the time left that a forward of it alone is expected to
    take, unless there is nothing else to run.
9.  At most ``max_queue_size`` rows wait; :meth:`Batcher.has_room` says whether one more
    request fits. A request larger than the whole queue fits an empty one.
10. With ``batch_sizes``, a forward has one of these sizes: the next larger one, padded, or the
    next smaller one, leaving the rest for the next batch, whichever costs less per real row.
11. With several executors, what waits leaves by the same rules for the next free one: that
    another is free is no reason to leave earlier, and thinner. If everybody is waiting already
    (rule 3) and several are free, the batch is divided among them where that makes the forward
    shorter by a quarter or more.
12. An executor that stages one batch while it computes another is free once it can stage; see
    :meth:`Batcher.executor_free`.

The form of this file, rules as prose and code as their plain form, is that of h11's state
machine; deciding only when the executor is free is Clipper's and Triton's lesson learnt.
"""

from __future__ import annotations

import enum
import itertools
import math
import sys
from bisect import bisect_left
from collections.abc import Hashable, Iterator, Sequence
from typing import NamedTuple

from aioinfer.balancing import room_for
from aioinfer.patience import COLD_TIMEOUT_S, Patience
from aioinfer.queueing import AGEING_S as AGEING_S
from aioinfer.queueing import Queue
from aioinfer.request import Request, Source, State

_QUEUED = State.QUEUED
_DONE = State.DONE

DEFAULT_TIMEOUT_S = 0.05
"""The default ``timeout`` where the batcher decides: a bound that is rarely reached."""

DEFAULT_STATIC_TIMEOUT_S = 0.01
"""The default ``timeout`` with a ``min_batch_size``."""

ANY_NUMBER = sys.maxsize
"""As ``Wait.arrivals``: no number of arrivals changes the decision."""


class Reason(enum.Enum):
    """Why a batch left."""

    FULL = "full"
    ALL_CLIENTS_IN = "all clients in"
    NOT_WORTH_WAITING = "not worth waiting"
    DEADLINE = "deadline"
    MINIMUM = "minimum reached"
    CLOSING = "closing"


_BY_CHOICE = (Reason.NOT_WORTH_WAITING, Reason.ALL_CLIENTS_IN)


class Dispatch(NamedTuple):
    """Run these now, then call :meth:`Batcher.forward_ended`.

    ``requests`` may be empty when everything that was due had expired; there is no forward
    to report then.
    """

    requests: list[Request]
    rows: int
    size: int
    """Rows of the forward: ``rows``, or more where the batch is to be padded."""
    reason: Reason
    expired: list[Request]
    """Requests whose deadline cannot be met any more; answer them with TimeoutError."""


class Wait(NamedTuple):
    """Do nothing until ``until``, or until at least ``arrivals`` more requests were pushed.

    ``until`` is ``None`` where only an arrival, or the end of the forward, changes anything.
    Fewer arrivals than ``arrivals`` cannot change the decision as long as each is one row
    without priority and deadline; any other arrival is a reason to ask again. (While callers are
    expected back of whom too little is known, one of another signature waits with them, for
    ``COLD_TIMEOUT_S`` at most.)
    """

    until: float | None
    arrivals: int


class Batcher:
    """Forms batches by the rules at the top of this module.

    Args:
        max_batch_size: rows in a batch at most, at least 1.
        min_batch_size: rows worth leaving for, between 1 and ``max_batch_size``; ``None``
            lets the batcher decide.
        timeout: seconds a batch may be held back, at least 0.
        max_queue_size: rows that may wait, at least 1.
        batch_sizes: the sizes a forward may have, ascending up to ``max_batch_size``; ``None``
            for any.
        far_sighted: whether throughput in the long run counts, rather than the mean latency
            of the requests at hand.
        independent: whether clients can think while a forward runs, because they do not share
            the interpreter with it.
        executors: how many batches can run at a time, at least 1.
    """

    def __init__(
        self,
        *,
        max_batch_size: int,
        min_batch_size: int | None,
        timeout: float,
        max_queue_size: int,
        batch_sizes: Sequence[int] | None = None,
        far_sighted: bool = True,
        independent: bool = True,
        executors: int = 1,
    ) -> None:
        self.max_batch_size = max_batch_size
        self.min_batch_size = min_batch_size
        self.timeout = timeout
        self.max_queue_size = max_queue_size
        self.rows = 0
        """Rows waiting."""
        self.crowded = False
        """Whether requests wait outside because the queue is full."""
        self._sizes = batch_sizes
        self._queues: dict[Hashable, Queue] = {}
        self._closing = False
        self._patience = Patience(
            far_sighted=far_sighted,
            independent=independent,
            one_size=batch_sizes is not None and len(batch_sizes) == 1,
        )
        self._free = executors
        self._running: list[_Forward] = []
        self._kind: Hashable = None
        self._ended_at = -math.inf

    @property
    def busy(self) -> bool:
        """Whether no executor is free."""
        return not self._free

    # -- what happened ------------------------------------------------------

    def join(self, source: Source) -> None:
        """A client exists and may ask."""
        source.live = True
        source.expected = 0
        source.cohort = None
        self._patience.join(source)

    def leave(self, source: Source) -> None:
        """A client is gone and will not ask again. Its requests stay until discarded."""
        if source.live:
            self._patience.leave(source)
        source.live = False

    def push(self, request: Request) -> None:
        """Take a request of at most ``max_batch_size`` rows."""
        kind = request.signature
        queue = self._queues.get(kind)
        if queue is None:
            queue = self._queues[kind] = Queue(self.timeout)
        source = request.source
        if source.expected and (cohort := source.cohort) is not None:
            source.expected -= 1
            cohort.left -= 1
            if not (cohort.left % cohort.stride and self.rows):
                idle = not self.rows and not self._running
                self._patience.returned(cohort, request.submitted_at, idle=idle)
        request.state = _QUEUED
        self.rows += request.rows
        if request.deadline is None:
            queue.add(request)
        else:
            forward_s = self._patience.cost(kind, queue.rows + request.rows, request.submitted_at)
            queue.add(request, forward_s)

    def discard(self, request: Request) -> bool:
        """Nobody wants the answer any more; return whether the request was still waiting."""
        if request.state is not _QUEUED:
            request.state = _DONE
            return False
        request.state = _DONE
        self.rows -= request.rows
        queue = self._queues[request.signature]
        queue.forget(request)
        if not queue.rows:
            del self._queues[request.signature]
        return True

    def executor_free(self, requests: Sequence[Request], now: float) -> None:
        """The executor that runs these, those of one dispatch, can take a batch already."""
        for forward in self._running:
            if forward.requests is requests and forward.holds:
                forward.holds = False
                self._release(now)

    def forward_ended(
        self, requests: Sequence[Request], now: float, began_at: float | None = None
    ) -> None:
        """A forward is over, and its executor free.

        Args:
            requests: those of the dispatch; unless discarded meanwhile, they were answered.
            now: when.
            began_at: since when it had its executor for itself; ``None`` for its dispatch.
        """
        running = self._running
        forward = running[0]
        if forward.requests is not requests:
            forward = next(forward for forward in running if forward.requests is requests)
        running.remove(forward)
        if forward.holds:
            self._release(now)
        self._ended_at = now
        seconds = now - (forward.started_at if began_at is None else began_at)
        cohort = self._patience.ended(forward.kind, forward.size, len(requests), seconds, now)
        for request in requests:
            if request.state is _DONE:
                continue
            request.state = _DONE
            source = request.source
            if source.live:
                if source.expected:
                    self._patience.expect(source, cohort)
                else:  # the usual case, spelt out
                    source.cohort = cohort
                    source.expected = 1
                    cohort.left += 1

    def close(self) -> None:
        """Stop waiting for anything: what is here leaves as soon as the executor is free."""
        self._closing = True

    # -- what to do ---------------------------------------------------------

    def has_room(self, rows: int) -> bool:
        """Whether ``rows`` more rows may wait (rule 9)."""
        return self.rows + rows <= self.max_queue_size or not self.rows

    @property
    def room(self) -> int:
        """Rows of the latest kind worth having before another server is used too; 0: unknown."""
        cost = self._patience.learnt(self._kind)
        return 0 if cost is None else room_for(self.max_batch_size, cost.fixed, cost.per_row)

    def waiting(self) -> Iterator[Request]:
        """Iterate over the waiting requests, in no particular order."""
        return itertools.chain.from_iterable(self._queues.values())

    def next_action(self, now: float) -> Dispatch | Wait:
        """Decide what to do at ``now``; a :class:`Dispatch` makes an executor busy."""
        if not self._free:
            return Wait(None, ANY_NUMBER)
        if not self.rows:
            return self._idle(now)
        if len(self._queues) == 1:  # spelt out, for this is the usual case
            for kind, queue in self._queues.items():
                verdict = self._verdict(kind, queue, now)
                if isinstance(verdict, Wait):
                    return verdict
                return self._dispatch(queue, kind, verdict, now)
        chosen: Queue | None = None
        chosen_kind: Hashable = None
        reason = Reason.FULL
        until = math.inf
        arrivals = ANY_NUMBER
        for kind, queue in self._queues.items():
            verdict = self._verdict(kind, queue, now)
            if isinstance(verdict, Wait):
                until = min(until, verdict.until or until)
                arrivals = min(arrivals, verdict.arrivals)
            elif chosen is None or queue.urgency() < chosen.urgency():
                chosen, chosen_kind, reason = queue, kind, verdict
        if chosen is None:
            return Wait(until, arrivals)
        return self._dispatch(chosen, chosen_kind, reason, now)

    # -- inside -------------------------------------------------------------

    def _release(self, now: float) -> None:
        if not self._free:
            self._patience.freed(now)
        self._free += 1

    def _verdict(self, kind: Hashable, queue: Queue, now: float) -> Reason | Wait:
        rows = queue.rows
        if self._closing:
            return Reason.CLOSING if rows < self.max_batch_size else Reason.FULL
        least = self.min_batch_size
        if least is None and not self._patience.expected(kind):
            return Reason.ALL_CLIENTS_IN
        room = self.max_batch_size - rows
        if room > (outside := self.max_queue_size - self.rows):
            room = outside
        if room <= 0 or self.crowded:
            return Reason.FULL
        leave_by = queue.leave_by()
        if leave_by <= now:
            if least is None and not self._patience.can_judge:
                self._patience.forget()
            return Reason.DEADLINE
        if least is not None:
            return Reason.MINIMUM if rows >= least else Wait(leave_by, min(least - rows, room))
        if not self._patience.can_judge:
            return self._verdict_when_cold(kind, leave_by, room, now)
        wait = self._patience.wait(kind, rows, queue.requests, room, now)
        if wait is None:
            return Reason.NOT_WORTH_WAITING
        until, arrivals = wait
        return Wait(until if until < leave_by else leave_by, arrivals if arrivals < room else room)

    def _verdict_when_cold(
        self, kind: Hashable, leave_by: float, room: int, now: float
    ) -> Reason | Wait:
        until = leave_by - max(0.0, self.timeout - COLD_TIMEOUT_S)
        if until <= now:
            self._patience.forget()  # one client that is away costs the others this once
            return Reason.DEADLINE
        return Wait(until, min(self._patience.expected(kind), room))

    def _idle(self, now: float) -> Wait:
        # Threads that come back one by one after a forward: sleep through the first of them
        # rather than wake, and take the interpreter from the others, for each. Callers on an
        # event loop need no such thing, for all that are ready run before the server does.
        if self.min_batch_size is None and not self._patience.can_judge:
            until = self._ended_at + min(self.timeout, COLD_TIMEOUT_S)
            room = min(self.max_batch_size, self.max_queue_size)
            expected = min(self._patience.expected(self._kind), room)
            if now < until and expected > 1:
                return Wait(until, expected)
        return Wait(None, 1)

    def _dispatch(self, queue: Queue, kind: Hashable, reason: Reason, now: float) -> Dispatch:
        limit = queue.rows
        if limit > self.max_batch_size:
            limit = self.max_batch_size
        if reason in _BY_CHOICE:
            out = self._patience.expected(kind) * queue.rows // queue.requests
            limit = -(-limit // self._patience.groups(kind, limit, out, self._free))
        if self._sizes is not None:
            limit = self._fitting(self._sizes, kind, limit, now)
        least_s = self._patience.least_cost(kind, now) if queue.may_expire else 0.0
        requests, rows, expired = queue.take(limit, now, least_s)
        self.rows -= rows
        if expired:
            self.rows -= sum([request.rows for request in expired])
        if not queue.rows:
            del self._queues[kind]
        size = fitting_size(self._sizes, rows) if self._sizes and rows else rows
        if requests:
            self._kind = kind
            self._running.append(_Forward(requests, kind, size, now))
            self._free -= 1
            if not self._free:
                self._patience.saturated(now)
        return Dispatch(requests, rows, size, reason, expired)

    def _fitting(self, sizes: Sequence[int], kind: Hashable, rows: int, now: float) -> int:
        """How many of ``rows`` rows to take (rule 10)."""
        above = bisect_left(sizes, rows)
        if sizes[above] == rows or above == 0:
            return rows
        up, down = sizes[above], sizes[above - 1]
        cost_up = self._patience.cost(kind, up, now)
        cost_down = self._patience.cost(kind, down, now)
        return down if cost_down / down < cost_up / rows else rows


class _Forward:
    """A batch that was dispatched and has not ended."""

    __slots__ = ("holds", "kind", "requests", "size", "started_at")

    def __init__(
        self, requests: Sequence[Request], kind: Hashable, size: int, started_at: float
    ) -> None:
        self.requests = requests
        self.kind = kind
        self.size = size
        self.started_at = started_at
        self.holds = True
        """Whether its executor can take no other."""


def fitting_size(sizes: Sequence[int] | None, rows: int) -> int:
    """Return the smallest of the allowed sizes that holds ``rows`` rows."""
    return rows if sizes is None else sizes[bisect_left(sizes, rows)]
