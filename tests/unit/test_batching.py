"""The batcher alone: every rule at the top of aioinfer/batching.py, on times the test makes up."""

from __future__ import annotations

import gc
import heapq
import itertools
import math
import types
from collections.abc import Iterator

import pytest

from aioinfer.batching import AGEING_S, ANY_NUMBER, Batcher, Dispatch, Reason, Wait
from aioinfer.patience import COLD_TIMEOUT_S
from aioinfer.request import Request, Source, State

FOREVER = 1e9
COLD = COLD_TIMEOUT_S
"""For how long a batch is held while nothing is known about its clients."""


class Scene:
    """A batcher, and shorthand for telling it what happens."""

    def __init__(
        self,
        max_batch_size: int = 4,
        min_batch_size: int | None = None,
        timeout: float = 1.0,
        max_queue_size: int = 1_000_000,
        *,
        batch_sizes: tuple[int, ...] | None = None,
        clients: int = 0,
    ) -> None:
        self.batcher = Batcher(
            max_batch_size=max_batch_size,
            min_batch_size=min_batch_size,
            timeout=timeout,
            max_queue_size=max_queue_size,
            batch_sizes=batch_sizes,
        )
        self.stranger = Source()  # a client that never joined: nobody expects it
        self.clients = [self.join() for _ in range(clients)]

    def join(self) -> Source:
        source = Source()
        self.batcher.join(source)
        return source

    def push(
        self,
        at: float = 0.0,
        *,
        rows: int = 1,
        deadline: float | None = None,
        priority: int = 0,
        signature: str = "s",
        source: Source | None = None,
    ) -> Request:
        request = make_request(
            at,
            rows=rows,
            deadline=deadline,
            priority=priority,
            signature=signature,
            source=self.stranger if source is None else source,
        )
        self.batcher.push(request)
        return request

    def wait(self, now: float) -> Wait:
        """Ask, and expect to be told to wait."""
        action = self.batcher.next_action(now)
        assert isinstance(action, Wait), action
        return action

    def leave(self, now: float) -> Dispatch:
        """Ask, and expect a batch to leave."""
        action = self.batcher.next_action(now)
        assert isinstance(action, Dispatch), action
        return action

    def end(self, dispatch: Dispatch, now: float) -> None:
        """The forward of ``dispatch`` is over and its callers have their answers."""
        self.batcher.forward_ended(dispatch.requests, now)
        for request in dispatch.requests:
            request.state = State.DONE

    def run(self, now: float, forward_s: float = 0.0) -> Dispatch:
        """Let a batch leave and its forward end."""
        dispatch = self.leave(now)
        if dispatch.requests:
            self.end(dispatch, now + forward_s)
        return dispatch

    @property
    def expected(self) -> int:
        """How many requests like those of :meth:`push` may soon arrive."""
        return self.batcher._patience.expected("s")

    def requests_held(self) -> int:
        """How many requests the batcher keeps alive, wherever in it they are."""
        return sum(isinstance(found, Request) for found in reachable(self.batcher))


def make_request(
    at: float = 0.0,
    *,
    rows: int = 1,
    deadline: float | None = None,
    priority: int = 0,
    signature: str = "s",
    source: Source,
) -> Request:
    timeout = None if deadline is None else deadline - at
    request = Request(None, rows, rows > 1, signature, timeout, priority, source, None)
    request.submitted_at = at
    request.deadline = deadline
    return request


def reachable(root: object) -> Iterator[object]:
    """Every object that ``root`` keeps alive, without walking into classes and modules."""
    seen = {id(root)}
    found = [root]
    while found:
        thing = found.pop()
        yield thing
        for referent in gc.get_referents(thing):
            if id(referent) not in seen and not isinstance(
                referent, type | types.ModuleType | types.FunctionType
            ):
                seen.add(id(referent))
                found.append(referent)


class TestLateBinding:
    """Rule 1."""

    def test_nothing_is_decided_while_the_executor_is_busy(self) -> None:
        """During a forward the batcher waits, however much is waiting and however late it is."""
        scene = Scene()
        scene.push(0.0)
        scene.leave(0.0)
        for _ in range(20):
            scene.push(0.0)
        assert scene.wait(0.0) == Wait(None, ANY_NUMBER)
        assert scene.wait(FOREVER) == Wait(None, ANY_NUMBER)

    def test_what_arrives_during_a_forward_joins_the_next_batch(self) -> None:
        """Requests that arrive while the device is busy leave together after it (pitfall 7)."""
        scene = Scene(max_batch_size=32)
        first = scene.leave(0.0) if scene.push(0.0) else None
        assert first is not None
        during = [scene.push(0.001 * i) for i in range(30)]
        scene.end(first, 0.03)
        assert scene.leave(0.03).requests == during

    def test_the_batch_in_the_forward_is_not_changed_by_arrivals(self) -> None:
        """A dispatched list stays as it was when it left."""
        scene = Scene()
        request = scene.push(0.0)
        dispatch = scene.leave(0.0)
        scene.push(0.1)
        assert dispatch.requests == [request]
        assert dispatch.rows == 1

    def test_a_more_urgent_late_arrival_still_makes_the_next_batch(self) -> None:
        """What a batch holds is chosen when it leaves, not when its requests arrived."""
        scene = Scene(max_batch_size=2)
        running = scene.run(0.0) if scene.push(0.0) else None
        assert running is not None
        scene.push(0.1)
        scene.push(0.1)
        late = scene.push(0.2, priority=1)
        assert late in scene.leave(0.2).requests

    def test_a_dispatch_makes_the_executor_busy_and_its_end_frees_it(self) -> None:
        """Exactly one batch is out at a time."""
        scene = Scene()
        scene.push(0.0)
        scene.push(0.0, signature="other")
        dispatch = scene.leave(0.0)
        assert scene.batcher.busy
        scene.end(dispatch, 0.5)
        assert not scene.batcher.busy
        assert scene.leave(0.5).rows == 1


class TestFull:
    """Rule 2."""

    def test_a_full_batch_leaves_at_once(self) -> None:
        """``max_batch_size`` rows leave without a timer (pitfall 4)."""
        scene = Scene(max_batch_size=4, timeout=60.0, clients=9)
        for client in scene.clients[:3]:
            scene.push(0.0, source=client)
        scene.wait(0.0)
        scene.push(0.0, source=scene.clients[3])
        dispatch = scene.leave(0.0)
        assert (dispatch.rows, dispatch.reason) == (4, Reason.FULL)

    def test_the_arrival_that_fills_the_batch_is_one_to_wake_for(self) -> None:
        """``Wait.arrivals`` is never larger than what is missing for a full batch."""
        scene = Scene(max_batch_size=4, timeout=60.0, clients=9)
        scene.push(0.0, source=scene.clients[0])
        assert scene.wait(0.0).arrivals == 3

    def test_rows_are_counted_and_not_requests(self) -> None:
        """Three requests of 32 rows are not one batch of 32 (pitfall 9)."""
        scene = Scene(max_batch_size=32, min_batch_size=32)
        requests = [scene.push(0.0, rows=32) for _ in range(3)]
        for request in requests:
            dispatch = scene.run(0.0)
            assert dispatch.requests == [request]
            assert (dispatch.rows, dispatch.reason) == (32, Reason.FULL)

    def test_a_batch_never_holds_more_rows_than_allowed(self) -> None:
        """However the rows come, no batch exceeds ``max_batch_size``, and all get out."""
        scene = Scene(max_batch_size=8)
        for rows in (3, 5, 1, 8, 2, 2, 2, 2, 7, 1, 1):
            scene.push(0.0, rows=rows)
        sizes = []
        while scene.batcher.rows:
            sizes.append(scene.run(0.0).rows)
        assert sizes == [8, 1, 8, 8, 8, 1]

    def test_a_request_that_does_not_fit_stays_first(self) -> None:
        """What does not fit leaves first next time, and nothing slips past it (pitfall 8)."""
        scene = Scene(max_batch_size=4)
        first, big, small = scene.push(0.0, rows=3), scene.push(0.0, rows=3), scene.push(0.0)
        assert scene.run(0.0).requests == [first]
        assert scene.run(0.0).requests == [big, small]

    def test_a_special_request_that_does_not_fit_stays_first(self) -> None:
        """Requests with a deadline are not passed either because they are large."""
        scene = Scene(max_batch_size=4)
        small = scene.push(0.0)
        first = scene.push(0.0, rows=2, deadline=2.0)
        big = scene.push(0.0, rows=3, deadline=3.0)
        assert scene.run(0.0).requests == [first]
        assert scene.run(0.0).requests == [big, small]

    def test_a_batch_that_cannot_be_filled_exactly_counts_as_full(self) -> None:
        """Enough rows wait but the next request does not fit: waiting longer would not help."""
        scene = Scene(max_batch_size=4, timeout=60.0, clients=5)
        scene.push(0.0, rows=3, source=scene.clients[0])
        scene.push(0.0, rows=3, source=scene.clients[1])
        dispatch = scene.leave(0.0)
        assert (dispatch.rows, dispatch.reason) == (3, Reason.FULL)


class TestAllClientsIn:
    """Rule 3, while nothing is known yet about how the clients think."""

    def test_leaves_at_once_when_everybody_waits(self) -> None:
        """With every live client waiting nobody else can arrive, so no timer is needed."""
        scene = Scene(max_batch_size=32, timeout=60.0, clients=3)
        for client in scene.clients[:2]:
            scene.push(0.0, source=client)
            scene.wait(0.0)
        scene.push(0.0, source=scene.clients[2])
        dispatch = scene.leave(0.0)
        assert (dispatch.rows, dispatch.reason) == (3, Reason.ALL_CLIENTS_IN)

    def test_nobody_expected_means_everybody_is_in(self) -> None:
        """A request of a client that never joined waits for nobody."""
        scene = Scene(timeout=60.0)
        scene.push(0.0)
        assert scene.leave(0.0).reason is Reason.ALL_CLIENTS_IN

    def test_a_joining_client_is_waited_for(self) -> None:
        """A client that joins while others wait is expected to ask."""
        scene = Scene(timeout=60.0, clients=1)
        scene.push(0.0, source=scene.clients[0])
        newcomer = scene.join()
        assert scene.wait(0.0).arrivals == 1
        scene.push(0.001, source=newcomer)
        assert scene.leave(0.001).rows == 2

    def test_a_client_that_leaves_is_no_longer_waited_for(self) -> None:
        """Leaving before asking lets the others go."""
        scene = Scene(timeout=60.0, clients=2)
        scene.push(0.0, source=scene.clients[0])
        scene.wait(0.0)
        scene.batcher.leave(scene.clients[1])
        assert scene.leave(0.0).reason is Reason.ALL_CLIENTS_IN

    def test_a_client_that_leaves_while_it_waits_still_gets_its_batch(self) -> None:
        """Leaving does not withdraw what was asked, and nobody waits for the leaver."""
        scene = Scene(timeout=60.0, clients=2)
        request = scene.push(0.0, source=scene.clients[0])
        scene.batcher.leave(scene.clients[0])
        assert scene.expected == 1
        scene.push(0.0, source=scene.clients[1])
        assert request in scene.leave(0.0).requests

    def test_a_client_that_leaves_during_its_forward_is_not_expected_after_it(self) -> None:
        """The end of a forward does not bring back a client that is gone."""
        scene = Scene(timeout=60.0, clients=1)
        scene.push(0.0, source=scene.clients[0])
        dispatch = scene.leave(0.0)
        scene.batcher.leave(scene.clients[0])
        scene.end(dispatch, 0.1)
        assert scene.expected == 0

    def test_answered_clients_are_expected_again(self) -> None:
        """After a forward its clients are thinking, and the next batch waits for them."""
        scene = Scene(timeout=60.0, clients=2)
        for client in scene.clients:
            scene.push(0.0, source=client)
        scene.run(0.0, forward_s=0.1)
        assert scene.expected == 2
        scene.push(0.101, source=scene.clients[0])
        scene.wait(0.101)
        scene.push(0.102, source=scene.clients[1])
        assert scene.leave(0.102).reason is Reason.ALL_CLIENTS_IN

    def test_a_client_with_many_callers_is_expected_once_per_answer(self) -> None:
        """A client shared by three coroutines comes back three times."""
        scene = Scene(timeout=60.0, clients=1)
        (client,) = scene.clients
        for _ in range(3):
            scene.push(0.0, source=client)
        scene.run(0.0)
        assert scene.expected == 3
        for left in (2, 1):
            scene.push(0.001, source=client)
            assert scene.wait(0.001).arrivals == left
        scene.push(0.001, source=client)
        assert scene.leave(0.001).rows == 3

    def test_a_client_with_callers_in_several_batches_is_expected_for_each(self) -> None:
        """Answers of different batches add up."""
        scene = Scene(max_batch_size=2, timeout=60.0, clients=1)
        for _ in range(4):
            scene.push(0.0, source=scene.clients[0])
        scene.run(0.0)
        scene.run(0.0)
        assert scene.expected == 4
        scene.push(0.0, source=scene.clients[0])
        assert scene.expected == 3
        scene.batcher.leave(scene.clients[0])
        assert scene.expected == 0

    def test_who_gave_up_in_the_queue_is_not_waited_for(self) -> None:
        """A caller that no longer wants an answer does not delay the others."""
        scene = Scene(timeout=60.0, clients=2)
        mine = scene.push(0.0, source=scene.clients[0])
        scene.push(0.0, source=scene.clients[1])
        scene.batcher.discard(mine)
        assert scene.leave(0.0).reason is Reason.ALL_CLIENTS_IN

    def test_a_caller_cancelled_during_the_forward_that_asks_again_is_not_expected_twice(
        self,
    ) -> None:
        """A caller that already waits again is not waited for (pitfall 12)."""
        scene = Scene(timeout=60.0, clients=1)
        request = scene.push(0.0, source=scene.clients[0])
        dispatch = scene.leave(0.0)
        scene.batcher.discard(request)  # cancelled while it runs
        again = scene.push(0.05, source=scene.clients[0])
        scene.end(dispatch, 0.1)
        assert scene.leave(0.1).requests == [again]

    def test_a_client_that_left_and_asks_still_changes_no_expectation(self) -> None:
        """A closed client may ask once more; the others are waited for as before."""
        scene = Scene(timeout=60.0, clients=2)
        gone, here = scene.clients
        scene.batcher.leave(gone)
        scene.push(0.0, source=gone)
        assert scene.expected == 1
        scene.wait(0.0)
        scene.push(0.0, source=here)
        assert scene.run(0.0).rows == 2
        assert scene.expected == 1

    def test_leaving_twice_counts_once(self) -> None:
        """A client closed by hand and then dropped is one client less, not two."""
        scene = Scene(clients=2)
        scene.batcher.leave(scene.clients[0])
        scene.batcher.leave(scene.clients[0])
        assert scene.expected == 1

    def test_callers_of_another_kind_are_not_waited_for(self) -> None:
        """A batch does not wait for clients that ask for something else (rule 7)."""
        scene = Scene(timeout=60.0, clients=2)
        one, other = scene.clients
        scene.push(0.0, source=one)
        scene.push(0.0, source=other, signature="other")
        scene.run(0.0)
        scene.run(0.0)
        scene.push(0.001, source=one)
        assert scene.leave(0.001).reason is Reason.ALL_CLIENTS_IN

    def test_expectations_do_not_drift_over_many_rounds(self) -> None:
        """After thousands of rounds with cancellations the count is still exact (pitfall 12)."""
        scene = Scene(max_batch_size=8, timeout=60.0, clients=5)
        now = 0.0
        for turn in range(2000):
            requests = [scene.push(now, source=client) for client in scene.clients]
            if turn % 3 == 0:
                scene.batcher.discard(requests[turn % 5])
                scene.push(now, source=scene.clients[turn % 5])
            dispatch = scene.leave(now)
            assert (dispatch.rows, dispatch.reason) == (5, Reason.ALL_CLIENTS_IN)
            cancelled = turn % 7 == 0
            if cancelled:
                scene.batcher.discard(dispatch.requests[0])
            scene.end(dispatch, now)
            assert scene.expected == 5 - cancelled
            now += 0.01


class TestStragglersWhenCold:
    """Rule 3: those left behind are not waited for again, while little is known."""

    def test_a_batch_is_held_for_a_moment_only(self) -> None:
        """Before anything is known about the clients, a long ``timeout`` is not used up."""
        scene = Scene(timeout=60.0, clients=9)
        scene.push(5.0)
        assert scene.wait(5.0).until == pytest.approx(5.0 + COLD)

    def test_a_shorter_timeout_rules(self) -> None:
        """``timeout`` is the bound, also while nothing is known."""
        scene = Scene(timeout=COLD / 2, clients=9)
        scene.push(5.0)
        assert scene.wait(5.0).until == 5.0 + COLD / 2

    def test_a_straggler_costs_one_delay_and_not_one_per_batch(self) -> None:
        """After one batch left without it, a client that is away delays nobody."""
        scene = Scene(timeout=COLD, clients=3)
        here = scene.clients[:2]
        for client in here:
            scene.push(0.0, source=client)
        assert scene.wait(0.0).until == COLD
        assert scene.run(COLD).reason is Reason.DEADLINE
        for turn in range(2, 6):
            for client in here:
                scene.push(turn, source=client)
            assert scene.run(turn).reason is Reason.ALL_CLIENTS_IN

    def test_the_members_of_the_late_batch_are_expected_again(self) -> None:
        """Those who were in time stay in the count; only the absent leave it."""
        scene = Scene(timeout=COLD, clients=3)
        for client in scene.clients[:2]:
            scene.push(0.0, source=client)
        dispatch = scene.leave(COLD)
        assert scene.expected == 0
        scene.end(dispatch, 1.0)
        assert scene.expected == 2

    def test_a_straggler_that_asks_again_is_expected_again(self) -> None:
        """Asking brings a client back into the count, from its answer on."""
        scene = Scene(timeout=COLD, clients=2)
        scene.push(0.0, source=scene.clients[0])
        scene.run(COLD)
        scene.push(1.0, source=scene.clients[0])
        scene.push(1.0, source=scene.clients[1])
        scene.run(1.0)
        assert scene.expected == 2
        scene.push(1.0, source=scene.clients[0])
        scene.wait(1.0)

    def test_a_straggler_that_asks_during_the_forward_takes_nobodys_place(self) -> None:
        """An arrival from before the count was reset does not count as one of the others."""
        scene = Scene(timeout=COLD, clients=3)
        for client in scene.clients[:2]:
            scene.push(0.0, source=client)
        dispatch = scene.leave(COLD)
        scene.push(0.5, source=scene.clients[2])
        scene.end(dispatch, 1.0)
        assert scene.expected == 2

    def test_a_forgotten_straggler_that_leaves_changes_no_count(self) -> None:
        """Leaving after being left behind is not subtracted a second time."""
        scene = Scene(timeout=COLD, clients=3)
        for client in scene.clients[:2]:
            scene.push(0.0, source=client)
        scene.run(COLD)
        scene.batcher.leave(scene.clients[2])
        assert scene.expected == 2

    def test_a_newcomer_after_the_deadline_is_expected(self) -> None:
        """Joining counts from the moment of joining, whatever happened before."""
        scene = Scene(timeout=COLD, clients=2)
        scene.push(0.0, source=scene.clients[0])
        scene.run(COLD)
        scene.join()
        assert scene.expected == 2

    def test_a_full_batch_forgets_nobody(self) -> None:
        """Leaving because it is full is not leaving without somebody."""
        scene = Scene(max_batch_size=2, timeout=COLD, clients=3)
        for client in scene.clients[:2]:
            scene.push(0.0, source=client)
        assert scene.run(0.0).reason is Reason.FULL
        assert scene.expected == 3


class TestLearntPatience:
    """Rule 3, once the clients are known; the judgement itself is tested with its module."""

    def learn(self, scene: Scene, think_s: float, forward_s: float, turns: int = 40) -> float:
        """Let all clients ask, wait, and think, in step; return when the last answer came."""
        now = 0.0
        for _ in range(turns):
            for client in scene.clients:
                scene.push(now, source=client)
            while scene.batcher.rows:
                scene.run(now, forward_s)
                now += forward_s
            now += think_s
        return now - think_s

    def test_callers_that_come_soon_are_waited_for(self) -> None:
        """With a costly forward and quick callers, the first one waits for the others."""
        scene = Scene(max_batch_size=8, timeout=60.0, clients=4)
        answered = self.learn(scene, think_s=0.001, forward_s=0.1)
        scene.push(answered + 0.0009, source=scene.clients[0])
        wait = scene.wait(answered + 0.0009)
        assert wait.arrivals == 3
        assert wait.until == pytest.approx(answered + 0.001, rel=1e-3)

    def test_callers_that_come_late_are_not_waited_for(self) -> None:
        """Where thinking takes much longer than a forward, nobody waits for it to end."""
        scene = Scene(max_batch_size=8, timeout=60.0, clients=4)
        answered = self.learn(scene, think_s=1.0, forward_s=0.001)
        scene.push(answered + 0.1, source=scene.clients[0])
        assert scene.leave(answered + 0.1).reason is Reason.NOT_WORTH_WAITING

    def test_never_beyond_the_timeout(self) -> None:
        """Whatever was learnt, ``timeout`` is the bound (rule 4)."""
        scene = Scene(max_batch_size=8, timeout=0.05, clients=4)
        answered = self.learn(scene, think_s=0.2, forward_s=10.0)
        scene.push(answered, source=scene.clients[0])
        assert scene.wait(answered).until == answered + 0.05
        assert scene.leave(answered + 0.05).reason is Reason.DEADLINE

    def test_a_split_into_groups_takes_whole_requests(self) -> None:
        """Where the waiting rows are divided to take turns, a request of more rows than a
        group still leaves.
        """
        scene = Scene(max_batch_size=8, timeout=60.0, clients=2)
        now = 0.0
        sizes = []
        for _ in range(60):
            for client in scene.clients:
                scene.push(now, rows=4, source=client)
            while scene.batcher.rows:
                action = scene.batcher.next_action(now)
                if isinstance(action, Wait):
                    assert action.until is not None
                    now = action.until
                    continue
                sizes.append(action.rows)
                now += 0.001 + 0.01 * action.rows
                scene.end(action, now)
            now += 0.1
        assert set(sizes[-20:]) == {4}
        assert sum(sizes) == 60 * 8


class TestTimeout:
    """Rule 4."""

    def test_counts_from_the_oldest_submission(self) -> None:
        """The timer ends ``timeout`` after the submission, not after it was noticed (pitfall 3)."""
        scene = Scene(timeout=1.0, min_batch_size=4)
        scene.push(10.0)
        assert scene.wait(10.7).until == 11.0

    def test_is_not_rearmed_by_later_arrivals(self) -> None:
        """Arrivals do not move the deadline of the batch (pitfall 2)."""
        scene = Scene(max_batch_size=32, timeout=1.0, min_batch_size=32)
        for i in range(9):
            scene.push(0.1 * i)
            assert scene.wait(0.1 * i).until == 1.0
        assert scene.leave(1.0).rows == 9

    def test_nothing_leaves_early(self) -> None:
        """Up to the last moment the batch waits, then it leaves: no time is counted twice
        (pitfall 1).
        """
        scene = Scene(timeout=1.0, min_batch_size=4)
        scene.push(5.0)
        scene.wait(math.nextafter(6.0, 0.0))
        assert scene.leave(6.0).reason is Reason.DEADLINE

    def test_asking_often_changes_nothing(self) -> None:
        """Deciding is a pure function of what happened and the time (pitfall 1)."""
        scene = Scene(timeout=1.0, min_batch_size=4)
        scene.push(0.0)
        assert {scene.wait(0.01 * i) for i in range(100)} == {Wait(1.0, 3)}

    def test_runs_on_during_a_forward(self) -> None:
        """The clock of a request runs while the previous batch is computed: forward 0.3 s,
        timeout 0.3 s, and the second request waits 0.3 s and not 0.6 (pitfall 3).
        """
        scene = Scene(timeout=0.3, min_batch_size=4)
        scene.push(0.0)
        first = scene.leave(0.3)
        scene.push(0.31)
        scene.end(first, 0.6)
        assert scene.wait(0.6).until == 0.31 + 0.3
        assert scene.leave(0.31 + 0.3).reason is Reason.DEADLINE

    def test_is_over_at_the_end_of_a_long_forward(self) -> None:
        """A request older than ``timeout`` when the executor comes free leaves at once, it is
        not anchored to the end of the previous batch (pitfall 3).
        """
        scene = Scene(timeout=0.3, min_batch_size=4)
        scene.push(0.0)
        first = scene.leave(0.3)
        scene.push(0.31)
        scene.end(first, 5.0)
        assert scene.leave(5.0).reason is Reason.DEADLINE

    def test_zero_never_waits_with_requests_in_the_queue(self) -> None:
        """With timeout 0 every request leaves at once, and an empty queue waits for an
        arrival: there is no action that a loop could spin on (pitfall 11).
        """
        scene = Scene(timeout=0.0, clients=9)
        for turn in range(5):
            scene.push(turn)
            assert scene.run(turn).rows == 1
            assert scene.wait(turn) == Wait(None, 1)

    def test_of_several_queues_the_first_deadline_is_the_timer(self) -> None:
        """The timer is that of the oldest request of any signature."""
        scene = Scene(timeout=1.0, min_batch_size=4)
        scene.push(0.5, signature="a")
        scene.push(0.2, signature="b")
        scene.push(0.9, signature="c")
        assert scene.wait(0.9).until == 1.2

    def test_a_requests_own_deadline_cuts_it_short(self) -> None:
        """A batch does not wait longer than the most impatient of its requests."""
        scene = Scene(timeout=1.0, min_batch_size=4)
        scene.push(0.0)
        scene.push(0.0, deadline=0.4)
        until = scene.wait(0.0).until
        assert until is not None
        assert 0.2 < until <= 0.4

    def test_a_forward_is_allowed_for_before_a_deadline(self) -> None:
        """What a forward is known to take is left in hand, and the request is then served."""
        scene = Scene(timeout=1.0, min_batch_size=4)
        scene.push(0.0)
        scene.run(1.0, forward_s=0.1)
        request = scene.push(1.2, deadline=1.8)
        until = scene.wait(1.2).until
        assert until is not None
        assert 1.5 < until <= 1.7
        assert scene.leave(until + 0.001).requests == [request]

    def test_a_deadline_later_than_the_timeout_does_not_extend_it(self) -> None:
        """``timeout`` bounds the delay of patient requests too."""
        scene = Scene(timeout=1.0, min_batch_size=4)
        scene.push(0.0, deadline=50.0)
        assert scene.wait(0.0).until == 1.0

    def test_an_older_request_that_arrives_late_counts_from_its_submission(self) -> None:
        """Threads may be overtaken between stamp and queue; the oldest stamp still rules."""
        scene = Scene(timeout=1.0, min_batch_size=4)
        scene.push(5.0)
        scene.push(4.5)
        assert scene.wait(5.0).until == 5.5

    def test_discarding_the_oldest_moves_the_timer_to_the_next(self) -> None:
        """The timer follows the oldest request that still waits."""
        scene = Scene(timeout=1.0, min_batch_size=4)
        oldest = scene.push(0.0)
        special = scene.push(0.1, priority=1)
        scene.push(0.5)
        scene.batcher.discard(oldest)
        assert scene.wait(0.5).until == 1.1
        scene.batcher.discard(special)
        assert scene.wait(0.5).until == 1.5


class TestMinimum:
    """Rule 5."""

    def test_n_rows_leave_at_once(self) -> None:
        """The n-th row lets the batch go."""
        scene = Scene(max_batch_size=8, min_batch_size=3, timeout=60.0)
        scene.push(0.0)
        assert scene.wait(0.0).arrivals == 2
        scene.push(0.0)
        assert scene.wait(0.0).arrivals == 1
        scene.push(0.0)
        dispatch = scene.leave(0.0)
        assert (dispatch.rows, dispatch.reason) == (3, Reason.MINIMUM)

    def test_fewer_rows_wait_for_the_timeout(self) -> None:
        """Below the minimum only the timeout lets a batch go."""
        scene = Scene(min_batch_size=3, timeout=1.0)
        scene.push(0.0)
        scene.wait(0.999)
        dispatch = scene.leave(1.0)
        assert (dispatch.rows, dispatch.reason) == (1, Reason.DEADLINE)

    def test_who_is_expected_does_not_matter(self) -> None:
        """With a minimum given, all clients in is no reason to leave."""
        scene = Scene(min_batch_size=3, timeout=1.0, clients=1)
        scene.push(0.0, source=scene.clients[0])
        scene.wait(0.5)

    def test_more_than_the_minimum_leave_together(self) -> None:
        """What is there when the executor comes free leaves, not just the minimum."""
        scene = Scene(max_batch_size=8, min_batch_size=2, timeout=60.0)
        scene.push(0.0)
        scene.push(0.0)
        first = scene.leave(0.0)
        for _ in range(5):
            scene.push(0.1)
        scene.end(first, 0.2)
        assert scene.leave(0.2).rows == 5

    def test_one_is_dispatch_at_once(self) -> None:
        """``min_batch_size=1`` never holds a request back."""
        scene = Scene(min_batch_size=1, timeout=60.0, clients=9)
        scene.push(0.0)
        assert scene.leave(0.0).reason is Reason.MINIMUM

    def test_equal_to_the_maximum_is_full(self) -> None:
        """``min_batch_size == max_batch_size`` waits for exactly full batches."""
        scene = Scene(max_batch_size=3, min_batch_size=3, timeout=60.0)
        for _ in range(2):
            scene.push(0.0)
            scene.wait(0.0)
        scene.push(0.0)
        assert scene.leave(0.0).reason is Reason.FULL

    def test_is_counted_per_signature(self) -> None:
        """Rows of different kinds do not add up to a minimum."""
        scene = Scene(max_batch_size=8, min_batch_size=2, timeout=60.0)
        scene.push(0.0, signature="a")
        scene.push(0.0, signature="b")
        assert scene.wait(0.0).arrivals == 1
        scene.push(0.0, signature="b")
        assert [r.signature for r in scene.leave(0.0).requests] == ["b", "b"]

    def test_k_rows_count_as_k(self) -> None:
        """One request of K rows can reach the minimum by itself."""
        scene = Scene(max_batch_size=8, min_batch_size=3, timeout=60.0)
        scene.push(0.0, rows=3)
        assert scene.leave(0.0).rows == 3


class TestOrder:
    """Rule 6."""

    def test_first_come_first_served(self) -> None:
        """Without priorities the order of arrival is the order of service (pitfall 8)."""
        scene = Scene(max_batch_size=4)
        requests = [scene.push(0.001 * i) for i in range(12)]
        served = list(itertools.chain.from_iterable(scene.run(1.0).requests for _ in range(3)))
        assert served == requests

    def test_arrival_order_is_kept_within_a_priority(self) -> None:
        """Equal priority and equal time keep the order of arrival (pitfall 8)."""
        scene = Scene(max_batch_size=4)
        requests = [scene.push(0.0, priority=3) for _ in range(12)]
        served = list(itertools.chain.from_iterable(scene.run(1.0).requests for _ in range(3)))
        assert served == requests

    def test_a_higher_priority_goes_first(self) -> None:
        """Priority orders requests of about the same age."""
        scene = Scene(max_batch_size=1)
        low, high, middle = (
            scene.push(0.0),
            scene.push(0.1, priority=2),
            scene.push(0.2, priority=1),
        )
        assert [scene.run(0.3).requests[0] for _ in range(3)] == [high, middle, low]

    def test_a_negative_priority_goes_last(self) -> None:
        """A request may let the others pass."""
        scene = Scene(max_batch_size=1)
        polite, other = scene.push(0.0, priority=-1), scene.push(0.1)
        assert [scene.run(0.3).requests[0] for _ in range(2)] == [other, polite]

    def test_an_earlier_deadline_goes_first(self) -> None:
        """Of two deadlines the earlier is more urgent, and both are before none."""
        scene = Scene(max_batch_size=1)
        none = scene.push(0.0)
        late, soon = scene.push(0.0, deadline=5.0), scene.push(0.0, deadline=3.0)
        assert [scene.run(0.1).requests[0] for _ in range(3)] == [soon, late, none]

    def test_a_distant_deadline_is_no_disadvantage(self) -> None:
        """A request with a deadline far away is served no later than one without."""
        scene = Scene(max_batch_size=1)
        patient, other = scene.push(0.0, deadline=FOREVER), scene.push(0.1)
        assert [scene.run(0.2).requests[0] for _ in range(2)] == [patient, other]

    def test_timestamps_out_of_order_are_served_in_order_of_submission(self) -> None:
        """A request overtaken between its stamp and the queue gets its place back."""
        scene = Scene(max_batch_size=1)
        stamps = [0.5, 0.2, 0.9, 0.1, 0.7, 0.2]
        requests = [scene.push(stamp) for stamp in stamps]
        served = [scene.run(1.0).requests[0] for _ in stamps]
        assert [r.submitted_at for r in served] == sorted(stamps)
        assert served[1:3] == [requests[1], requests[5]]  # equal stamps: order of arrival

    def test_a_low_priority_is_not_starved(self) -> None:
        """A stream of higher priority overtakes a request for ``AGEING_S`` per level, not for
        ever.
        """
        scene = Scene(max_batch_size=1)
        low = scene.push(0.0)
        now, overtaken = 0.0, 0
        while True:
            scene.push(now, priority=2)
            if scene.run(now).requests == [low]:
                break
            overtaken += 1
            now += 0.1
            assert now < 3 * AGEING_S
        assert now == pytest.approx(2 * AGEING_S, abs=0.2)
        assert overtaken > 0

    def test_a_stream_of_deadlines_does_not_starve_those_without(self) -> None:
        """Requests with deadlines overtake one without for ``AGEING_S`` at most."""
        scene = Scene(max_batch_size=1)
        plain = scene.push(0.0)
        now = 0.0
        while True:
            scene.push(now, deadline=now + 1.0)
            if scene.run(now).requests == [plain]:
                break
            now += 0.1
            assert now < 2 * AGEING_S
        assert now <= AGEING_S

    def test_a_batch_mixes_ordinary_and_special_requests_in_their_order(self) -> None:
        """One batch takes from both kinds, most urgent first."""
        scene = Scene(max_batch_size=8)
        a, b = scene.push(0.0), scene.push(1.0)
        high, timed = scene.push(2.0, priority=1), scene.push(2.0, deadline=10.5)
        c = scene.push(3.0)
        assert scene.leave(3.0).requests == [high, a, timed, b, c]

    def test_requests_that_tie_are_never_compared(self) -> None:
        """Two requests alike in everything do not raise for lack of an order (pitfall 8)."""
        scene = Scene(max_batch_size=64)
        requests = [scene.push(0.0, deadline=5.0, priority=1) for _ in range(64)]
        assert scene.leave(0.0).requests == requests


class TestSignatures:
    """Rule 7."""

    def test_never_share_a_batch(self) -> None:
        """A batch holds one signature, in arrival order of that signature."""
        scene = Scene(max_batch_size=8)
        requests = [scene.push(0.01 * i, signature="ab"[i % 2]) for i in range(6)]
        assert scene.run(1.0).requests == requests[0::2]
        assert scene.run(1.0).requests == requests[1::2]

    def test_the_most_urgent_head_goes_first(self) -> None:
        """Of the queues that may leave, the one with the oldest request does."""
        scene = Scene(max_batch_size=8)
        for at, signature in ((0.3, "a"), (0.1, "b"), (0.2, "c")):
            scene.push(at, signature=signature)
        order = [scene.run(1.0).requests[0].signature for _ in range(3)]
        assert order == ["b", "c", "a"]

    def test_one_kind_does_not_block_another(self) -> None:
        """A kind that has to wait does not hold up a full batch of another kind."""
        scene = Scene(max_batch_size=2, min_batch_size=2, timeout=60.0)
        lonely = scene.push(0.0, signature="rare")
        scene.push(1.0, signature="common")
        scene.push(1.0, signature="common")
        assert lonely not in scene.leave(1.0).requests

    def test_a_rare_kind_is_not_starved_by_full_batches_of_another(self) -> None:
        """Once its timeout has passed, the older head goes before younger full batches."""
        scene = Scene(max_batch_size=2, min_batch_size=2, timeout=1.0)
        lonely = scene.push(0.0, signature="rare")
        for _ in range(6):
            scene.push(0.5, signature="common")
        assert lonely not in scene.run(0.9).requests
        assert scene.run(1.0).requests == [lonely]

    def test_a_priority_counts_across_signatures(self) -> None:
        """The urgency of a queue is that of its head, special requests included."""
        scene = Scene(max_batch_size=8)
        scene.push(0.0, signature="a")
        scene.push(0.5, signature="b", priority=1)
        assert scene.leave(1.0).requests[0].signature == "b"

    def test_arrivals_that_matter_are_counted_for_the_fullest_queue(self) -> None:
        """The next batch is at the earliest that of the queue with the most rows."""
        scene = Scene(max_batch_size=8, min_batch_size=5, timeout=60.0)
        for signature, rows in (("a", 1), ("b", 3), ("c", 2)):
            scene.push(0.0, rows=rows, signature=signature)
        assert scene.wait(0.0).arrivals == 2

    def test_a_kind_that_is_gone_leaves_nothing_behind(self) -> None:
        """Thousands of signatures that were served are not remembered."""
        scene = Scene(max_batch_size=8)
        for i in range(3000):
            scene.push(float(i), signature=f"shape {i}")
            scene.run(float(i))
        assert sum(isinstance(found, str) for found in reachable(scene.batcher)) < 50

    def test_a_kind_whose_requests_were_all_discarded_leaves_nothing_behind(self) -> None:
        """Signatures of withdrawn requests are forgotten as well (pitfall 14)."""
        scene = Scene(max_batch_size=8)
        for i in range(3000):
            scene.batcher.discard(scene.push(float(i), signature=f"shape {i}"))
        assert sum(isinstance(found, str) for found in reachable(scene.batcher)) < 50


class TestGivenUp:
    """Rule 8, requests that their callers withdrew."""

    def test_a_discarded_request_is_not_dispatched(self) -> None:
        """What was withdrawn while it waited is never computed (pitfall 14)."""
        scene = Scene()
        first, second, third = scene.push(0.0), scene.push(0.0), scene.push(0.0)
        assert scene.batcher.discard(second)
        assert scene.leave(0.0).requests == [first, third]
        assert second.state is State.DONE

    def test_a_discarded_special_request_is_not_dispatched(self) -> None:
        """The same for requests with a priority or a deadline."""
        scene = Scene()
        first, timed = scene.push(0.0), scene.push(0.0, deadline=9.0)
        urgent = scene.push(0.0, priority=1)
        assert scene.batcher.discard(timed)
        assert scene.batcher.discard(urgent)
        assert scene.leave(0.0).requests == [first]

    def test_discarding_one_strands_nobody(self) -> None:
        """The others of what would have been its batch leave as they would have (pitfall 14)."""
        scene = Scene(min_batch_size=2, timeout=1.0)
        scene.batcher.discard(scene.push(0.0))
        other = scene.push(0.5)
        assert scene.wait(0.5) == Wait(1.5, 1)
        assert scene.leave(1.5).requests == [other]

    def test_discarding_twice_counts_once(self) -> None:
        """The second withdrawal finds nothing to withdraw."""
        scene = Scene()
        scene.push(0.0)
        request = scene.push(0.0)
        assert scene.batcher.discard(request)
        assert not scene.batcher.discard(request)
        assert scene.batcher.rows == 1

    def test_discarding_a_running_request_leaves_its_batch_alone(self) -> None:
        """A request in a forward is no longer the batcher's to withdraw."""
        scene = Scene()
        request, other = scene.push(0.0), scene.push(0.0)
        dispatch = scene.leave(0.0)
        assert not scene.batcher.discard(request)
        assert dispatch.requests == [request, other]
        assert scene.batcher.rows == 0

    def test_discarding_an_answered_request_changes_nothing(self) -> None:
        """A withdrawal that comes after the answer is ignored."""
        scene = Scene(clients=1)
        request = scene.push(0.0, source=scene.clients[0])
        scene.run(0.0)
        assert not scene.batcher.discard(request)
        assert (scene.batcher.rows, scene.expected) == (0, 1)

    def test_discarding_a_request_the_batcher_never_saw_changes_nothing(self) -> None:
        """A request withdrawn before it came this far is refused."""
        scene = Scene()
        stray = make_request(source=scene.stranger)
        assert not scene.batcher.discard(stray)
        assert scene.batcher.rows == 0

    def test_an_emptied_queue_asks_for_no_timer(self) -> None:
        """With everything withdrawn the batcher is idle."""
        scene = Scene(min_batch_size=4)
        for request in [scene.push(0.0), scene.push(0.0, deadline=5.0)]:
            scene.batcher.discard(request)
        assert scene.wait(0.0) == Wait(None, 1)
        assert list(scene.batcher.waiting()) == []

    def test_discarding_from_a_full_queue_makes_it_wait_again(self) -> None:
        """Rows that were withdrawn do not count towards a full batch."""
        scene = Scene(max_batch_size=3, min_batch_size=3, timeout=60.0)
        requests = [scene.push(0.0) for _ in range(3)]
        scene.batcher.discard(requests[1])
        assert scene.wait(0.0).arrivals == 1

    def test_the_head_can_be_discarded_over_and_over(self) -> None:
        """Whichever request is withdrawn, the rest keeps its order."""
        scene = Scene(max_batch_size=1)
        requests = [scene.push(0.1 * i, priority=i % 2) for i in range(40)]
        for request in requests[::3]:
            scene.batcher.discard(request)
        left = [request for i, request in enumerate(requests) if i % 3]
        served = [scene.run(9.0).requests[0] for _ in left]
        assert served == [r for r in left if r.priority] + [r for r in left if not r.priority]


class TestMemory:
    """Withdrawn and answered requests are let go of (pitfall 14)."""

    @pytest.mark.parametrize("kind", [{}, {"deadline": FOREVER}, {"priority": 1}])
    def test_discarded_requests_are_let_go_while_others_wait(self, kind: dict[str, float]) -> None:
        """Memory stays flat when clients keep cancelling behind a request that waits."""
        scene = Scene(max_batch_size=64, min_batch_size=64, timeout=FOREVER)
        oldest = scene.push(0.0)
        most = 0
        for i in range(5000):
            scene.batcher.discard(scene.push(1.0 + i, **kind))  # type: ignore[arg-type]
            if i % 50 == 0:
                most = max(most, scene.requests_held())
        assert most < 300
        assert list(scene.batcher.waiting()) == [oldest]

    def test_discarded_requests_are_let_go_during_a_long_forward(self) -> None:
        """Nothing is asked of the batcher during a forward, and still memory stays flat."""
        scene = Scene()
        scene.push(0.0)
        scene.leave(0.0)
        for i in range(5000):
            scene.batcher.discard(scene.push(float(i), deadline=FOREVER if i % 2 else None))
        scene.push(6000.0)
        assert scene.requests_held() < 300

    def test_answered_requests_are_let_go(self) -> None:
        """After its forward the batcher keeps nothing of a batch, even if others wait."""
        scene = Scene(max_batch_size=2)
        for i in range(2000):
            scene.push(float(i), priority=i % 3)
        while scene.batcher.rows > 2:
            scene.run(3000.0)
        assert scene.requests_held() < 300

    def test_requests_with_deadlines_are_let_go_under_sustained_load(self) -> None:
        """With a full batch always waiting, as when the server is overloaded, requests with
        deadlines are let go of as they are answered.
        """
        scene = Scene(max_batch_size=4, min_batch_size=4)
        for _ in range(8):
            scene.push(0.0, deadline=100.0)
        for turn in range(1, 1000):
            now = 0.01 * turn
            dispatch = scene.run(now)
            assert (dispatch.rows, dispatch.reason) == (4, Reason.FULL)
            for _ in range(4):
                scene.push(now, deadline=now + 100.0)
        assert scene.batcher.rows == 8
        assert scene.requests_held() < 300

    def test_expired_requests_are_let_go(self) -> None:
        """Those that ran out of time leave no trace that would let others pile up."""
        scene = Scene(max_batch_size=1, min_batch_size=1)
        scene.push(0.0)
        for turn in range(3000):
            scene.push(float(turn))
            scene.push(float(turn), deadline=turn + 0.5)
            assert len(scene.run(turn + 1.0).expired) == 1
        for i in range(5000):
            scene.batcher.discard(scene.push(3000.0 + i, deadline=FOREVER))
        assert scene.batcher.rows == 1
        assert scene.requests_held() < 300

    def test_discarding_costs_the_same_however_many_wait(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Withdrawing all of many requests takes work in proportion to their number."""
        sifted = 0
        heapify = heapq.heapify

        def counting(heap: list[object]) -> None:
            nonlocal sifted
            sifted += len(heap)
            heapify(heap)

        monkeypatch.setattr(heapq, "heapify", counting)
        scene = Scene()
        requests = [scene.push(float(i), deadline=FOREVER) for i in range(10_000)]
        for request in requests:
            scene.batcher.discard(request)
        assert sifted < 8 * len(requests)

    def test_compaction_loses_nobody_and_keeps_the_order(self) -> None:
        """After thousands of withdrawals those who stayed are served, in order."""
        scene = Scene(max_batch_size=1)
        requests = [scene.push(float(i), priority=(i // 7) % 2) for i in range(3000)]
        stay = [r for i, r in enumerate(requests) if i % 10 == 0]
        for i, request in enumerate(requests):
            if i % 10:
                scene.batcher.discard(request)
        assert set(scene.batcher.waiting()) == set(stay)
        assert scene.batcher.rows == len(stay)
        served = [scene.run(FOREVER).requests[0] for _ in stay]
        assert served == sorted(stay, key=lambda r: r.submitted_at - AGEING_S * r.priority)


class TestExpiry:
    """Rule 8, requests whose own deadline passed."""

    def test_an_expired_request_is_not_dispatched(self) -> None:
        """What is too late is handed back and does not waste a row."""
        scene = Scene()
        late, other = scene.push(0.0, deadline=1.0), scene.push(0.5)
        dispatch = scene.leave(2.0)
        assert (dispatch.requests, dispatch.expired) == ([other], [late])
        assert (late.state, dispatch.rows, scene.batcher.rows) == (State.DONE, 1, 0)

    def test_the_moment_of_the_deadline_is_too_late(self) -> None:
        """At the deadline itself nobody wants the answer any more."""
        scene = Scene()
        request = scene.push(0.0, deadline=1.0)
        assert scene.leave(1.0).expired == [request]

    def test_just_before_the_deadline_is_in_time(self) -> None:
        """A request is dispatched up to its deadline."""
        scene = Scene()
        request = scene.push(0.0, deadline=1.0)
        assert scene.leave(math.nextafter(1.0, 0.0)).requests == [request]

    def test_expiry_takes_no_place_in_the_batch(self) -> None:
        """A batch is filled up with others where some have expired."""
        scene = Scene(max_batch_size=2)
        for _ in range(5):
            scene.push(0.0, deadline=1.0)
        good = [scene.push(0.5), scene.push(0.5)]
        dispatch = scene.leave(2.0)
        assert (dispatch.requests, len(dispatch.expired)) == (good, 5)

    def test_if_all_have_expired_there_is_no_forward(self) -> None:
        """An empty batch keeps the executor free."""
        scene = Scene(timeout=1.0, clients=3)
        late = [scene.push(0.0, deadline=0.5), scene.push(0.0, rows=2, deadline=0.5)]
        dispatch = scene.leave(5.0)
        assert (dispatch.requests, dispatch.rows, dispatch.expired) == ([], 0, late)
        assert not scene.batcher.busy
        assert scene.batcher.rows == 0
        request = scene.push(5.0)
        assert scene.leave(6.0).requests == [request]

    def test_an_expired_request_is_noticed_by_its_deadline(self) -> None:
        """The timer is never later than a waiting request's own deadline (pitfall 6)."""
        scene = Scene(min_batch_size=4, timeout=60.0)
        scene.push(0.0, deadline=2.0)
        until = scene.wait(0.0).until
        assert until is not None
        assert until <= 2.0

    def test_a_request_that_cannot_be_answered_in_time_is_not_computed(self) -> None:
        """With a forward known to take 0.1 s, a request for within 0.04 s is handed back."""
        scene = Scene()
        now = 0.0
        for _ in range(20):
            scene.push(now)
            scene.run(now, forward_s=0.1)
            now += 0.1
        hopeless, hopeful = (
            scene.push(now, deadline=now + 0.05),
            scene.push(now, deadline=now + 0.2),
        )
        dispatch = scene.leave(now)
        assert (dispatch.expired, dispatch.requests) == ([hopeless], [hopeful])

    def test_one_slow_forward_does_not_turn_requests_away(self) -> None:
        """The first forward compiles and allocates; what it took is no reason to refuse those
        who come next.
        """
        scene = Scene()
        scene.push(0.0)
        scene.run(0.0, forward_s=5.0)
        request = scene.push(5.0, deadline=6.0)
        assert scene.leave(5.0).requests == [request]

    def test_a_forward_that_became_fast_again_serves_again(self) -> None:
        """Requests with a deadline are not turned away for ever after a slow time."""
        scene = Scene()
        now = 0.0
        for _ in range(50):
            scene.push(now)
            scene.run(now, forward_s=1.0)
            now += 1.0
        served = []
        for _ in range(300):
            scene.push(now, deadline=now + 0.5)
            dispatch = scene.leave(now)
            served.append(len(dispatch.requests))
            now += 0.05
            if dispatch.requests:
                scene.end(dispatch, now)
        assert served[-100:] == [1] * 100

    def test_expired_rows_do_not_stay_in_the_queue(self) -> None:
        """K rows that expired make room for K."""
        scene = Scene(max_queue_size=4)
        scene.push(0.0, rows=3, deadline=1.0)
        assert not scene.batcher.has_room(2)
        scene.leave(2.0)
        assert scene.batcher.has_room(4)


class TestRoom:
    """Rule 9."""

    def test_rows_are_counted(self) -> None:
        """Room is counted in rows, to the last one."""
        scene = Scene(max_queue_size=5)
        scene.push(0.0, rows=3)
        assert scene.batcher.has_room(2)
        assert not scene.batcher.has_room(3)

    def test_rows_of_all_signatures_count_together(self) -> None:
        """The bound is on the whole queue."""
        scene = Scene(max_queue_size=2)
        scene.push(0.0, signature="a")
        scene.push(0.0, signature="b")
        assert not scene.batcher.has_room(1)

    def test_a_request_larger_than_the_queue_fits_an_empty_one(self) -> None:
        """A large request is not refused for ever."""
        scene = Scene(max_queue_size=2)
        assert scene.batcher.has_room(100)
        scene.push(0.0)
        assert not scene.batcher.has_room(100)

    def test_a_dispatch_makes_room(self) -> None:
        """Rows in the forward no longer wait."""
        scene = Scene(max_batch_size=2, max_queue_size=2)
        scene.push(0.0)
        scene.push(0.0)
        assert not scene.batcher.has_room(1)
        scene.leave(0.0)
        assert scene.batcher.has_room(2)

    def test_a_withdrawal_makes_room(self) -> None:
        """A cancelled request gives its rows back (pitfall 14)."""
        scene = Scene(max_queue_size=2)
        request = scene.push(0.0, rows=2)
        scene.batcher.discard(request)
        assert scene.batcher.has_room(2)

    def test_a_full_queue_leaves_at_once(self) -> None:
        """Nobody can join a full queue, so its batch waits for nobody."""
        scene = Scene(max_batch_size=8, min_batch_size=8, max_queue_size=3, timeout=60.0)
        for _ in range(3):
            scene.push(0.0)
        dispatch = scene.leave(0.0)
        assert (dispatch.rows, dispatch.reason) == (3, Reason.FULL)

    def test_the_arrival_that_fills_the_queue_is_one_to_wake_for(self) -> None:
        """``Wait.arrivals`` is never larger than the room there is."""
        scene = Scene(max_batch_size=8, max_queue_size=3, timeout=60.0, clients=8)
        scene.push(0.0, source=scene.clients[0])
        assert scene.wait(0.0).arrivals == 2
        scene.push(0.0, source=scene.clients[1])
        assert scene.wait(0.0).arrivals == 1

    def test_a_queue_with_requests_outside_leaves_at_once(self) -> None:
        """While requests that do not fit wait outside, a batch leaves to make room for them."""
        scene = Scene(max_batch_size=8, min_batch_size=8, max_queue_size=10, timeout=60.0)
        scene.push(0.0, rows=4)
        scene.push(0.5, rows=4, signature="b")
        scene.wait(0.5)
        scene.batcher.crowded = True
        assert scene.run(0.5).requests[0].signature == "s"
        scene.batcher.crowded = False
        assert scene.wait(0.5).until == 60.5


class TestBatchSizes:
    """Rule 10."""

    def test_a_batch_is_padded_to_the_next_size(self) -> None:
        """As long as nothing is known about cost, all rows go, padded."""
        scene = Scene(max_batch_size=8, batch_sizes=(2, 4, 8))
        for _ in range(3):
            scene.push(0.0)
        dispatch = scene.leave(0.0)
        assert (dispatch.rows, dispatch.size, len(dispatch.requests)) == (3, 4, 3)

    @pytest.mark.parametrize("rows", [1, 2, 4, 8])
    def test_an_exact_size_is_not_padded(self, rows: int) -> None:
        """A batch that has one of the sizes goes as it is."""
        scene = Scene(max_batch_size=8, batch_sizes=(1, 2, 4, 8))
        for _ in range(rows):
            scene.push(0.0)
        dispatch = scene.leave(0.0)
        assert (dispatch.rows, dispatch.size) == (rows, rows)

    def test_without_sizes_nothing_is_padded(self) -> None:
        """The size of a forward is its rows."""
        scene = Scene(max_batch_size=8)
        for _ in range(3):
            scene.push(0.0)
        assert scene.leave(0.0).size == 3

    def run_both_sizes(self, scene: Scene, small_s: float, large_s: float) -> float:
        """Let forwards of 4 and of 8 rows run until their costs are known."""
        now = 0.0
        for _ in range(30):
            for rows, forward_s in ((4, small_s), (8, large_s)):
                for _ in range(rows):
                    scene.push(now)
                scene.run(now, forward_s)
                now += forward_s
        return now

    def test_rows_are_left_for_the_next_batch_where_padding_costs_more(self) -> None:
        """5 rows as 4 and 1, if a forward of 8 takes ten times one of 4."""
        scene = Scene(max_batch_size=8, batch_sizes=(4, 8))
        now = self.run_both_sizes(scene, 0.01, 0.1)
        requests = [scene.push(now) for _ in range(5)]
        dispatch = scene.run(now)
        assert (dispatch.requests, dispatch.size) == (requests[:4], 4)
        assert scene.run(now).requests == requests[4:]

    def test_rows_are_padded_where_that_costs_less(self) -> None:
        """5 rows as 8, if that takes hardly longer than 4."""
        scene = Scene(max_batch_size=8, batch_sizes=(4, 8))
        now = self.run_both_sizes(scene, 0.1, 0.101)
        for _ in range(5):
            scene.push(now)
        dispatch = scene.run(now)
        assert (dispatch.rows, dispatch.size) == (5, 8)

    def test_a_request_of_more_rows_than_the_smaller_size_still_leaves(self) -> None:
        """A request is not torn apart, and does not hold up the queue for ever."""
        scene = Scene(max_batch_size=8, batch_sizes=(4, 8))
        now = self.run_both_sizes(scene, 0.01, 0.1)
        request = scene.push(now, rows=5)
        dispatch = scene.leave(now)
        assert (dispatch.requests, dispatch.size) == ([request], 8)


class TestClosing:
    """A batcher that is closed holds nothing back."""

    def test_what_waits_leaves_at_once(self) -> None:
        """Closing ends the wait for more."""
        scene = Scene(min_batch_size=4, timeout=60.0)
        request = scene.push(0.0)
        scene.wait(0.0)
        scene.batcher.close()
        dispatch = scene.leave(0.0)
        assert (dispatch.requests, dispatch.reason) == ([request], Reason.CLOSING)

    def test_expected_clients_are_not_waited_for(self) -> None:
        """The same without a minimum."""
        scene = Scene(timeout=60.0, clients=3)
        scene.push(0.0, source=scene.clients[0])
        scene.batcher.close()
        assert scene.leave(0.0).reason is Reason.CLOSING

    def test_everything_leaves_batch_by_batch(self) -> None:
        """All that waits is served, in full batches where there are enough rows."""
        scene = Scene(max_batch_size=4, min_batch_size=4, timeout=60.0)
        scene.push(0.0, signature="other")
        for i in range(1, 7):
            scene.push(0.1 * i)
        scene.batcher.close()
        left = []
        while scene.batcher.rows:
            dispatch = scene.run(1.0)
            left.append((dispatch.rows, dispatch.reason))
        assert left == [(1, Reason.CLOSING), (4, Reason.FULL), (2, Reason.CLOSING)]

    def test_not_during_a_forward(self) -> None:
        """Closing does not put a second batch beside the one that runs."""
        scene = Scene()
        scene.push(0.0)
        scene.leave(0.0)
        scene.push(0.0)
        scene.batcher.close()
        assert scene.wait(0.0) == Wait(None, ANY_NUMBER)


class TestIdle:
    """An empty batcher asks for nothing that would keep a loop awake."""

    def test_a_new_batcher_waits_for_an_arrival_only(self) -> None:
        """No timer before the first request."""
        assert Scene(clients=5).wait(0.0) == Wait(None, 1)
        assert Scene(min_batch_size=2, clients=5).wait(0.0) == Wait(None, 1)

    def test_after_a_forward_the_clients_may_come_back_together(self) -> None:
        """The first of many returning clients does not wake the loop; the last does, or the
        end of the time within which none of them can be due.
        """
        scene = Scene(max_batch_size=8, timeout=COLD, clients=5)
        for client in scene.clients:
            scene.push(0.0, source=client)
        scene.run(0.0, forward_s=0.5)
        assert scene.wait(0.5) == Wait(0.5 + COLD, 5)

    def test_that_sleep_ends(self) -> None:
        """If nobody comes back there is no second timer, so an idle server sleeps for good."""
        scene = Scene(max_batch_size=8, timeout=1.0, clients=5)
        for client in scene.clients:
            scene.push(0.0, source=client)
        scene.run(0.0, forward_s=0.5)
        for now in (1.5, 1.6, 10.0, FOREVER):
            assert scene.wait(now) == Wait(None, 1)

    def test_with_a_minimum_no_timer_is_asked_for(self) -> None:
        """Without a request there is nothing to be on time for."""
        scene = Scene(min_batch_size=2, timeout=1.0, clients=5)
        for client in scene.clients[:2]:
            scene.push(0.0, source=client)
        scene.run(0.0)
        assert scene.wait(0.0) == Wait(None, 1)

    def test_every_wait_with_requests_has_an_end(self) -> None:
        """While anything waits and the executor is free, a time is named, and it is enough:
        at that time the batch leaves, so no one asks for a timer for ever.
        """
        for minimum in (None, 4):
            scene = Scene(min_batch_size=minimum, timeout=COLD, clients=9)
            scene.push(0.0, deadline=7.0)
            until = scene.wait(COLD / 2).until
            assert until is not None
            assert scene.leave(until).rows == 1

    def test_one_expected_client_is_not_slept_through(self) -> None:
        """With a single client each arrival is one to wake for."""
        scene = Scene(timeout=1.0, clients=1)
        scene.push(0.0, source=scene.clients[0])
        scene.run(0.0)
        assert scene.wait(0.0) == Wait(None, 1)


class TestWhatIsWaiting:
    """The counters and ``waiting()``."""

    def test_waiting_lists_what_is_queued_and_nothing_else(self) -> None:
        """Running, discarded and expired requests are not listed."""
        scene = Scene(max_batch_size=1, clients=3)
        running = scene.push(0.0, priority=5)
        kept = [scene.push(0.0), scene.push(0.0, signature="b"), scene.push(0.0, priority=1)]
        gone = [scene.push(0.0), scene.push(0.0, deadline=FOREVER)]
        assert scene.leave(0.0).requests == [running]
        for request in gone:
            scene.batcher.discard(request)
        assert set(scene.batcher.waiting()) == set(kept)

    def test_rows_is_what_waits(self) -> None:
        """``rows`` goes up with a push and down with a dispatch or a withdrawal."""
        scene = Scene(max_batch_size=4)
        scene.push(0.0, rows=4)
        small = scene.push(0.0, rows=2)
        scene.push(0.0, rows=3, signature="b")
        assert scene.batcher.rows == 9
        scene.leave(0.0)
        assert scene.batcher.rows == 5
        scene.batcher.discard(small)
        assert scene.batcher.rows == 3

    def test_a_request_moves_forward_through_its_states(self) -> None:
        """Queued, running, and done where the batcher is who ends it."""
        scene = Scene()
        request = make_request(source=scene.stranger)
        assert request.state is State.SUBMITTED
        scene.batcher.push(request)
        assert request.state is State.QUEUED
        scene.leave(0.0)
        assert request.state is State.RUNNING
