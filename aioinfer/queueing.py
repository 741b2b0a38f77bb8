"""The waiting requests of one signature, in the order in which they will leave."""

from __future__ import annotations

import heapq
import itertools
import math
from collections import deque
from collections.abc import Iterator

from aioinfer.request import Request, State

AGEING_S = 10.0
"""Seconds of waiting that one level of priority is worth (rule 6 of the batcher)."""

_QUEUED = State.QUEUED
_RUNNING = State.RUNNING
_DONE = State.DONE


class Queue:
    """The waiting requests of one signature, most urgent first.

    Ordinary requests stand in a deque, where order of arrival is order of urgency; the rest
    (a priority, a deadline, a timestamp out of order) in two heaps, by urgency and by the
    time they must leave. Requests that left stay in place until they surface, or until they
    are the larger part, so that removing one costs nothing.
    """

    def __init__(self, timeout: float) -> None:
        self.rows = 0
        self.requests = 0
        self._ordinary: deque[Request] = deque()
        self._by_urgency: list[tuple[float, int, Request]] = []
        self._by_leave: list[tuple[float, int, Request]] = []
        self._arrivals = 0
        self._timeout = timeout
        self._newest = -math.inf
        """The latest submission in ``_ordinary``, which is in order of submission."""

    def __iter__(self) -> Iterator[Request]:
        special = (request for _, _, request in self._by_urgency)
        return (r for r in itertools.chain(self._ordinary, special) if r.state is _QUEUED)

    def add(self, request: Request, forward_s: float = 0.0) -> None:
        """Take a request; ``forward_s`` is what a forward is expected to take."""
        self.rows += request.rows
        self.requests += 1
        submitted_at = request.submitted_at
        if submitted_at >= self._newest and request.deadline is None and not request.priority:
            self._newest = submitted_at
            self._ordinary.append(request)
            return
        self._arrivals += 1  # ties keep the order of arrival, and requests do not compare
        leave_by = submitted_at + self._timeout
        urgency = submitted_at + AGEING_S
        if request.deadline is not None:
            # With something to spare: what takes longer than expected is late by all of it.
            leave_by = min(leave_by, request.deadline - 1.5 * forward_s - 0.001)
            urgency = min(urgency, request.deadline)
        urgency -= AGEING_S * request.priority
        heapq.heappush(self._by_urgency, (urgency, self._arrivals, request))
        heapq.heappush(self._by_leave, (leave_by, self._arrivals, request))

    def forget(self, request: Request) -> None:
        """Account for a request that is no longer ``QUEUED``."""
        self.rows -= request.rows
        self.requests -= 1
        self._compact()

    def urgency(self) -> float:
        """The urgency of the first request; infinite if there is none."""
        ordinary = self._first_ordinary()
        special = _first(self._by_urgency)
        return min(
            math.inf if ordinary is None else ordinary.submitted_at + AGEING_S,
            math.inf if special is None else special[0],
        )

    def leave_by(self) -> float:
        """When the next of its requests must leave; infinite if there is none."""
        ordinary = self._first_ordinary()
        leave_by = math.inf if ordinary is None else ordinary.submitted_at + self._timeout
        if self._by_leave and (special := _first(self._by_leave)) is not None:
            return min(leave_by, special[0])
        return leave_by

    @property
    def may_expire(self) -> bool:
        """Whether some of its requests may have a deadline."""
        return bool(self._by_leave)

    def take(
        self, max_rows: int, now: float, forward_s: float
    ) -> tuple[list[Request], int, list[Request]]:
        """Take the most urgent requests that fit; also the expired ones met on the way."""
        if not self._by_urgency and self.rows <= max_rows:
            return self._take_all()
        taken: list[Request] = []
        expired: list[Request] = []
        doomed: list[Request] = []
        rows = 0
        while rows < max_rows:
            request = self._most_urgent() if self._by_urgency else self._first_ordinary()
            if request is None:
                break
            if request.deadline is not None and request.deadline <= now + forward_s:
                request.state = _RUNNING
                (expired if request.deadline <= now else doomed).append(request)
                continue
            if taken and rows + request.rows > max_rows:
                break
            request.state = _RUNNING  # which takes it out of the queue
            rows += request.rows
            taken.append(request)
        if doomed and not taken:
            # Nothing better to do than to try: the estimate may be wrong, and stays so unless
            # something runs.
            taken.append(doomed.pop(0))
            rows = taken[0].rows
        expired += doomed
        for request in expired:
            request.state = _DONE
            self.rows -= request.rows
        self.rows -= rows
        self.requests -= len(taken) + len(expired)
        self._compact()
        return taken, rows, expired

    def _take_all(self) -> tuple[list[Request], int, list[Request]]:
        """Take everything, which is ordinary; the usual case, and all it needs."""
        taken = [request for request in self._ordinary if request.state is _QUEUED]
        for request in taken:
            request.state = _RUNNING
        rows = self.rows
        self._ordinary.clear()
        self.rows = self.requests = 0
        return taken, rows, []

    def _most_urgent(self) -> Request | None:
        ordinary = self._first_ordinary()
        special = _first(self._by_urgency)
        if special is None or (
            ordinary is not None and ordinary.submitted_at + AGEING_S <= special[0]
        ):
            return ordinary
        return special[2]

    def _compact(self) -> None:
        limit = 64 + 2 * self.requests
        if len(self._ordinary) > limit:
            self._ordinary = deque(r for r in self._ordinary if r.state is _QUEUED)
        for heap in (self._by_urgency, self._by_leave):
            if len(heap) > limit:
                heap[:] = [entry for entry in heap if entry[2].state is _QUEUED]
                heapq.heapify(heap)

    def _first_ordinary(self) -> Request | None:
        ordinary = self._ordinary
        while ordinary:
            request = ordinary[0]
            if request.state is _QUEUED:
                return request
            ordinary.popleft()
        return None


def _first(heap: list[tuple[float, int, Request]]) -> tuple[float, int, Request] | None:
    while heap:
        if heap[0][2].state is _QUEUED:
            return heap[0]
        heapq.heappop(heap)
    return None
