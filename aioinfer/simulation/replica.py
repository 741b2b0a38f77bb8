"""A server in virtual time: the real batcher, and an executor that only takes time."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence

from aioinfer.batching import Batcher, Dispatch
from aioinfer.request import Request, State
from aioinfer.simulation.agenda import Agenda

_DONE = State.DONE


class Replica:
    """Serves, and counts what happens after ``count_from``.

    Args:
        index: its number among the replicas.
        batcher: decides when what leaves.
        cost: seconds that a forward of so many rows takes.
        agenda: the time, and what is to come.
        count_from: when the warm-up ends.
        answer: called with this replica, the requests of a forward that ended, and how many
            rows were under way just before.
        refuse: called with this replica and a request whose deadline cannot be met.
    """

    def __init__(
        self,
        index: int,
        batcher: Batcher,
        cost: Callable[[int], float],
        agenda: Agenda,
        count_from: float,
        answer: Callable[[Replica, Sequence[Request], int], None],
        refuse: Callable[[Replica, Request], None],
    ) -> None:
        self.index = index
        self.batcher = batcher
        self.longest_hold = 0.0
        self.sizes: Counter[int] = Counter()
        self.reasons: Counter[str] = Counter()
        self._cost = cost
        self._agenda = agenda
        self._count_from = count_from
        self._answer = answer
        self._refuse = refuse
        self._wake_at = math.inf
        self._arrivals = 0
        self._arrivals_wanted = 1
        self._asked = False
        self._deciding = False
        self._free_since = 0.0
        self._busy_since = math.inf
        self._busy_time = 0.0
        self._running = 0  # rows of the forward that runs

    def take(self, request: Request) -> None:
        """A request arrives."""
        request.submitted_at = self._agenda.now
        self.batcher.push(request)
        self._arrivals += 1
        self._asked = self._asked or request.special
        self._something_happened()

    def withdraw(self, request: Request) -> None:
        """Nobody wants the answer any more."""
        if request.state in (State.QUEUED, State.RUNNING):
            self.batcher.discard(request)

    def utilisation(self) -> float:
        """The share of the counted time until now in which the executor was busy."""
        now = self._agenda.now
        busy = self._busy_time + max(0.0, now - max(self._busy_since, self._count_from))
        return busy / (now - self._count_from)

    def _wake(self, when: float) -> None:
        if when == self._wake_at:
            self._wake_at = math.inf
            self._asked = True
            self._something_happened()

    def _forward_ends(self, requests: list[Request]) -> None:
        now = self._agenda.now
        wanted = [request for request in requests if request.state is not _DONE]
        load = self.batcher.rows + self._running
        self.batcher.forward_ended(requests, now)
        if now > self._count_from:
            self._busy_time += now - max(self._busy_since, self._count_from)
        self._busy_since = math.inf
        self._free_since = now
        self._asked = True
        self._something_happened()
        self._answer(self, wanted, load)

    def _something_happened(self) -> None:
        # Whatever happens at one moment is seen by one decision, as on a real loop.
        if not self._deciding:
            self._deciding = True
            self._agenda.afterwards(self._decide)

    def _decide(self) -> None:
        self._deciding = False
        # As the server does: no question unless something happened that may matter.
        if not self._asked and self._arrivals < self._arrivals_wanted:
            return
        now = self._agenda.now
        while True:
            self._asked = False
            self._arrivals = 0
            action = self.batcher.next_action(now)
            if not isinstance(action, Dispatch):
                break
            for request in action.expired:
                self._refuse(self, request)
            if action.requests:
                self._start(action)
        self._arrivals_wanted = action.arrivals
        if action.until is not None and action.until < self._wake_at:
            self._wake_at = max(action.until, math.nextafter(now, math.inf))
            self._agenda.add(self._wake_at, self._wake, self._wake_at)

    def _start(self, action: Dispatch) -> None:
        now = self._agenda.now
        if now > self._count_from:
            oldest = min([request.submitted_at for request in action.requests])
            held = now - max(oldest, self._free_since)
            self.longest_hold = max(self.longest_hold, held)
            self.sizes[action.rows] += 1
            self.reasons[action.reason.value] += 1
        self._running = action.rows
        self._busy_since = now
        seconds = self._cost(action.size)
        if not 0 < seconds < math.inf:
            raise ValueError(
                "forward_cost must be a function that returns > 0 and finite seconds, "
                f"got {seconds!r} for {action.size} rows"
            )
        self._agenda.add(now + seconds, self._forward_ends, action.requests)
