"""What holds for the batcher whatever happens to it, in whatever order.

Hypothesis plays the world around a batcher: clients that join, ask, give up and leave, time
that passes, forwards that end, a queue that is full. The driver in between does what the
server does, and no more: it asks the batcher again only when ``Wait`` says that it may matter.
"""

from __future__ import annotations

import copy
import sys
from collections import deque

import hypothesis.strategies as st
import pytest
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from aioinfer.batching import ANY_NUMBER, Batcher, Dispatch, Wait
from aioinfer.patience import COLD_TIMEOUT_S
from aioinfer.request import Request, Source, State

# The same examples in every run: what a run finds, the next one finds too.
settings.register_profile(
    "batcher",
    derandomize=True,
    database=None,
    deadline=None,
    max_examples=200,
    stateful_step_count=40,
)

# Times are multiples of a power of two, so that sums of them are exact.
TICK = 1 / 256
ticks = st.integers(0, 400).map(lambda n: n * TICK)


class World(RuleBasedStateMachine):
    """Everything around one batcher."""

    @initialize(
        max_batch_size=st.sampled_from([8, 4, 16, 2, 1]),
        minimum=st.none() | st.integers(1, 8),
        timeout=st.sampled_from([0.0, TICK, 64 * TICK]),
        max_queue_size=st.sampled_from([1000, 1000, 1000, 12, 3, 1]),
        sizes=st.none() | st.sets(st.integers(1, 7)),
        far_sighted=st.booleans(),
        executors=st.sampled_from([1, 1, 2, 3]),
        clients=st.integers(0, 6),
    )
    def begin(
        self,
        max_batch_size: int,
        minimum: int | None,
        timeout: float,
        max_queue_size: int,
        sizes: set[int] | None,
        far_sighted: bool,
        executors: int,
        clients: int,
    ) -> None:
        self.now = 0.0
        self.timeout = timeout
        self.sizes: list[int] | None = None
        if sizes is not None:
            self.sizes = sorted({s for s in sizes if s < max_batch_size} | {max_batch_size})
        self.batcher = Batcher(
            max_batch_size=max_batch_size,
            min_batch_size=None if minimum is None else min(minimum, max_batch_size),
            timeout=timeout,
            max_queue_size=max_queue_size,
            batch_sizes=self.sizes,
            far_sighted=far_sighted,
            executors=executors,
        )
        self.free = executors
        self.dispatched: list[Dispatch] = []  # and not ended, each with whether it holds
        self.holding: list[bool] = []
        self.order: dict[Request, int] = {}  # all requests ever, by arrival
        self.outside: deque[Request] = deque()  # sent while the queue was full
        self.queued: set[Request] = set()
        self.running: list[Request] = []
        self.ended: set[Request] = set()
        self.clients: list[Source] = []
        self.action = Wait(None, 1)
        self.unseen = 0  # arrivals since the batcher was asked
        for _ in range(clients):
            self.a_client_joins()

    # -- what happens -------------------------------------------------------

    @rule()
    def a_client_joins(self) -> None:
        source = Source()
        self.clients.append(source)
        self.batcher.join(source)
        self.ask()

    @precondition(lambda self: self.clients)
    @rule(data=st.data())
    def a_client_leaves(self, data: st.DataObject) -> None:
        self.batcher.leave(data.draw(st.sampled_from(self.clients)))
        self.ask()

    @rule(data=st.data(), rows=st.integers(1, 8) | st.just(1), signature=st.sampled_from("aab"))
    def a_plain_request(self, data: st.DataObject, rows: int, signature: str) -> None:
        self.send(data, rows, signature, None, 0, 0.0)

    @rule(data=st.data(), n=st.integers(1, 6))
    def a_burst(self, data: st.DataObject, n: int) -> None:
        for _ in range(n):
            self.send(data, 1, "a", None, 0, 0.0)

    @rule(
        data=st.data(),
        rows=st.integers(1, 4),
        signature=st.sampled_from("ab"),
        patience=st.none() | ticks,
        priority=st.integers(-1, 2),
        late=st.sampled_from([0.0, TICK, 5 * TICK]),
    )
    def a_special_request(
        self,
        data: st.DataObject,
        rows: int,
        signature: str,
        patience: float | None,
        priority: int,
        late: float,
    ) -> None:
        self.send(data, rows, signature, patience, priority, late)

    @precondition(lambda self: self.order)
    @rule(data=st.data())
    def a_request_is_given_up(self, data: st.DataObject) -> None:
        request = data.draw(st.sampled_from(list(self.order)))
        was_queued = request in self.queued
        was_running = request in self.running
        assert self.batcher.discard(request) == was_queued
        self.queued.discard(request)
        if was_running:
            self.running.remove(request)
        if request in self.outside:
            self.outside.remove(request)
        self.ended.add(request)
        self.ask()

    @rule(seconds=ticks)
    def time_passes(self, seconds: float) -> None:
        """Stop at every moment at which the batcher wants to be asked."""
        end = self.now + seconds
        while self.action.until is not None and self.action.until <= end:
            self.now = max(self.now, self.action.until)
            self.ask()
            assert self.action.until is None or self.action.until > self.now, "a busy loop"
        self.now = end

    @precondition(lambda self: self.clients)
    @rule(times=st.integers(1, 8), think=st.integers(0, 8), forward=st.integers(0, 8))
    def the_clients_play(self, times: int, think: int, forward: int) -> None:
        """For a while all clients ask, wait and think, which is what the batcher learns from."""
        for _ in range(times):
            for source in self.clients:
                if source.live:
                    self.send_from(source, 1, "a", None, 0, 0.0)
            self.time_passes(forward * TICK)
            while self.dispatched:
                self.end_a_forward(0)
            self.time_passes(think * TICK)

    @precondition(lambda self: self.dispatched)
    @rule(data=st.data())
    def a_forward_ends(self, data: st.DataObject) -> None:
        self.end_a_forward(data.draw(st.integers(0, len(self.dispatched) - 1)))

    @precondition(lambda self: any(self.holding))
    @rule()
    def a_batch_is_staged(self) -> None:
        """Its executor can take another."""
        which = self.holding.index(True)
        self.holding[which] = False
        self.batcher.executor_free(self.dispatched[which].requests, self.now)
        self.free += 1
        self.ask()

    def end_a_forward(self, which: int) -> None:
        dispatch = self.dispatched.pop(which)
        self.batcher.forward_ended(dispatch.requests, self.now)
        self.free += self.holding.pop(which)
        over = [r for r in self.running if r in set(dispatch.requests)]
        self.running = [r for r in self.running if r not in set(over)]
        self.ended.update(over)
        self.ask()

    # -- the driver ---------------------------------------------------------

    def send(
        self,
        data: st.DataObject,
        rows: int,
        signature: str,
        patience: float | None,
        priority: int,
        late: float,
    ) -> None:
        source = Source()  # of a client that never joined
        if self.clients and data.draw(st.booleans() | st.just(True)):
            source = data.draw(st.sampled_from(self.clients))
        self.send_from(source, rows, signature, patience, priority, late)

    def send_from(
        self,
        source: Source,
        rows: int,
        signature: str,
        patience: float | None,
        priority: int,
        late: float,
    ) -> None:
        rows = min(rows, self.batcher.max_batch_size)
        signature = sys.intern(signature)  # equal signatures are one object
        request = Request(None, rows, rows > 1, signature, patience, priority, source, None)
        request.submitted_at = self.now - late
        if patience is not None:
            request.deadline = request.submitted_at + patience
        self.order[request] = len(self.order)
        self.outside.append(request)
        self.unseen += 1
        if self.unseen >= self.action.arrivals or request.special or late:
            self.ask()
        elif not self.batcher.busy:
            # Not asked, because Wait said that this arrival changes nothing. Is that so? (Once
            # something is learnt from arrivals, they may change what is worth while. And while
            # everybody is expected back, one of another kind waits for them, if not for long.)
            double, outside = copy.deepcopy((self.batcher, self.outside))
            self.take_in(double, outside)
            action = double.next_action(self.now)
            until, among_others = self.action.until, signature is not self.batcher._kind
            assert (
                isinstance(action, Wait)
                or double._patience.can_judge
                or (among_others and until is not None and until <= self.now + COLD_TIMEOUT_S)
            )

    def take_in(self, batcher: Batcher, outside: deque[Request]) -> list[Request]:
        taken = []
        while outside and batcher.has_room(outside[0].rows):
            batcher.push(outside[0])
            taken.append(outside.popleft())
        batcher.crowded = bool(outside)
        return taken

    def ask(self) -> None:
        while True:
            for request in self.take_in(self.batcher, self.outside):
                self.queued.add(request)
            self.unseen = 0
            busy = self.batcher.busy
            action = self.batcher.next_action(self.now)
            if isinstance(action, Wait):
                break
            assert not busy, "a batch more than there are executors"
            self.check_dispatch(action)
        self.action = action
        self.check_wait(action)

    # -- what must hold -----------------------------------------------------

    def check_dispatch(self, dispatch: Dispatch) -> None:
        left, batch = [*dispatch.requests, *dispatch.expired], dispatch.requests
        assert len(set(left)) == len(left), "the same request twice"
        assert set(left) <= self.queued, "a request that does not wait (any more)"
        assert left, "nothing left"
        assert len({r.signature for r in left}) == 1
        assert dispatch.rows == sum(r.rows for r in batch) <= self.batcher.max_batch_size
        assert all(r.deadline is None or r.deadline > self.now for r in batch)
        assert all(r.deadline is not None for r in dispatch.expired)
        if batch:
            assert dispatch.rows <= dispatch.size <= self.batcher.max_batch_size
            assert dispatch.size in (self.sizes or [dispatch.rows])
        self.queued.difference_update(left)
        self.check_order(batch)
        if batch:
            self.dispatched.append(dispatch)
            self.holding.append(True)
            self.free -= 1
        assert self.batcher.busy == (self.free == 0)
        assert self.free >= 0
        self.running += batch
        self.ended.update(dispatch.expired)

    def check_order(self, batch: list[Request]) -> None:
        """Among equals, first come first served, within the batch and beyond it."""
        for priority in {r.priority for r in batch}:
            equals = [r for r in batch if r.priority == priority and r.deadline is None]
            places = [(r.submitted_at, self.place(r)) for r in equals]
            assert places == sorted(places)
            behind = [
                (r.submitted_at, self.place(r))
                for r in self.queued
                if r.priority == priority
                and r.deadline is None
                and r.signature == batch[0].signature
            ]
            assert not places or not behind or max(places) < min(behind)

    def place(self, request: Request) -> int:
        return self.order[request]

    def check_wait(self, wait: Wait) -> None:
        if self.batcher.busy:
            assert wait == Wait(None, ANY_NUMBER)
            return
        assert wait.arrivals >= 1
        assert not self.outside, "a queue that is full holds a batch back"
        assert self.batcher.rows < self.batcher.max_batch_size * 2, "a full batch held back"
        for request in self.queued:
            assert wait.until is not None
            assert self.now < wait.until <= request.submitted_at + self.timeout
            assert request.deadline is None or wait.until <= request.deadline
        if not self.queued:
            assert wait.until is None or wait.until > self.now

    @invariant()
    def nothing_is_lost(self) -> None:
        waiting = list(self.batcher.waiting())
        assert len(waiting) == len(set(waiting))
        assert set(waiting) == self.queued
        everywhere = [*self.outside, *self.queued, *self.running, *self.ended]
        assert sorted(map(self.place, everywhere)) == list(range(len(self.order)))

    @invariant()
    def rows_are_those_that_wait(self) -> None:
        assert self.batcher.rows == sum(r.rows for r in self.batcher.waiting())

    @invariant()
    def nobody_is_expected_twice(self) -> None:
        """Those who are expected add up, client by client, and nobody owes a request."""
        patience = self.batcher._patience
        assert all(source.expected >= 0 for source in self.clients)
        for cohort in patience._cohorts:
            assert cohort.left == sum(s.expected for s in self.clients if s.cohort is cohort)
        assert min(patience.expected("a"), patience.expected("b")) >= 0

    @invariant()
    def states_are_right(self) -> None:
        assert all(r.state is State.SUBMITTED for r in self.outside)
        assert all(r.state is State.QUEUED for r in self.queued)
        assert all(r.state is State.RUNNING for r in self.running)

    def teardown(self) -> None:
        """A batcher that is closed gives away all it has, in a bounded number of steps."""
        if not hasattr(self, "batcher"):
            return
        self.batcher.close()
        for _ in range(len(self.order) + 1):
            if self.dispatched:
                self.end_a_forward(0)
            else:
                self.ask()
        assert not self.queued
        assert not self.outside
        assert self.batcher.rows == 0
        assert self.ended == set(self.order)


World.TestCase.settings = settings.get_profile("batcher")


@pytest.mark.timeout(400)  # a failure is made smaller first, which takes its time
class TestBatcherInAnyWorld(World.TestCase):  # type: ignore[name-defined,misc]
    """Nothing lost, nothing twice, nothing late, nothing mixed, whatever happens."""
