"""The batcher with several executors, and with one that stages while it computes."""

from __future__ import annotations

from aioinfer.batching import ANY_NUMBER, Batcher, Dispatch, Reason, Wait
from aioinfer.patience import Patience
from aioinfer.request import Request, Source
from aioinfer.simulation import Clients, Exponential, simulate


def batcher(executors: int = 2, max_batch_size: int = 4, minimum: int | None = 1) -> Batcher:
    return Batcher(
        max_batch_size=max_batch_size,
        min_batch_size=minimum,
        timeout=1.0,
        max_queue_size=1000,
        executors=executors,
    )


def push(to: Batcher, count: int, source: Source | None = None, at: float = 0.0) -> None:
    for _ in range(count):
        request = Request(None, 1, False, "kind", None, 0, source or Source(), None)
        request.submitted_at = at
        to.push(request)


def leave(of: Batcher, now: float) -> Dispatch:
    action = of.next_action(now)
    assert isinstance(action, Dispatch), action
    return action


def test_as_many_batches_as_executors():
    """Two leave, the third waits until one of them ends, whichever that is."""
    b = batcher()
    push(b, 12)
    first, second = leave(b, 0.0), leave(b, 0.0)
    assert (first.rows, second.rows) == (4, 4)
    assert b.busy
    assert b.next_action(0.0) == Wait(None, ANY_NUMBER)
    b.forward_ended(second.requests, 0.1)
    assert leave(b, 0.1).rows == 4
    assert b.busy


def test_late_binding_for_each():
    """What arrives while all are busy leaves together, with the one that is free first."""
    b = batcher()
    push(b, 1)
    first = leave(b, 0.0)
    push(b, 1)
    leave(b, 0.0)
    for _ in range(3):
        push(b, 1)
        assert b.next_action(0.0) == Wait(None, ANY_NUMBER)
    b.forward_ended(first.requests, 0.1)
    assert leave(b, 0.1).rows == 3


def test_a_second_one_that_is_free_makes_no_batch_thinner():
    """Without a reason to leave, what waits is held back though two executors are free."""
    b = batcher(minimum=3)
    push(b, 2)
    assert isinstance(b.next_action(0.0), Wait)
    push(b, 1)
    assert leave(b, 0.0).rows == 3


def test_those_who_are_being_answered_are_not_waited_for():
    """Of four clients two are in a forward: the others leave together, at once, once both ask."""
    b = batcher(minimum=None)
    clients = [Source() for _ in range(4)]
    for client in clients:
        b.join(client)
    for client in clients[:2]:
        push(b, 1, client)
    assert isinstance(b.next_action(0.0), Wait)
    assert leave(b, 0.01).reason is Reason.DEADLINE  # the other two did not come
    push(b, 1, clients[2], at=0.01)
    push(b, 1, clients[3], at=0.01)
    action = leave(b, 0.01)
    assert (action.rows, action.reason) == (2, Reason.ALL_CLIENTS_IN)


def test_what_waits_is_divided_only_where_that_makes_it_shorter():
    """A forward that costs by the row is shared by two executors; one that hardly does, is not."""

    def groups(fixed: float, per_row: float, free: int) -> int:
        patience = Patience(far_sighted=True)
        for rows in (1, 2, 8, 32, 64) * 4:
            patience.ended("kind", rows, 1, fixed + per_row * rows, now=0.0)
        return patience.groups("kind", 64, free=free)

    assert groups(fixed=0.001, per_row=0.001, free=1) == 1
    assert groups(fixed=0.001, per_row=0.001, free=2) == 2
    assert groups(fixed=0.001, per_row=0.001, free=4) == 3  # a fourth saves less than a quarter
    assert groups(fixed=0.001, per_row=0.00001, free=2) == 1


def test_a_cost_is_that_of_its_own_forward():
    """Forwards that overlap are not added up."""
    b = batcher()
    for i in range(20):
        now = float(i)
        push(b, 8, at=now)
        first, second = leave(b, now), leave(b, now)
        b.forward_ended(first.requests, now + 0.1)
        b.forward_ended(second.requests, now + 0.1)
    assert abs(b._patience.cost("kind", 4, 19.1) - 0.1) < 1e-6


def test_an_executor_that_can_stage_is_free():
    """It takes a second batch while it computes the first, and no third until one is over."""
    b = batcher(executors=1)
    push(b, 12)
    first = leave(b, 0.0)
    assert b.busy
    b.executor_free(first.requests, 0.1)
    second = leave(b, 0.1)
    assert b.busy
    b.forward_ended(first.requests, 1.0)
    assert b.busy
    b.executor_free(second.requests, 1.0)
    assert leave(b, 1.0).rows == 4


def test_an_executor_is_free_once():
    """The end of a forward that was staged early frees nothing a second time."""
    b = batcher(executors=1)
    push(b, 4)
    first = leave(b, 0.0)
    b.executor_free(first.requests, 0.1)
    b.executor_free(first.requests, 0.1)
    b.forward_ended(first.requests, 1.0)
    push(b, 8)
    leave(b, 1.0)
    assert b.busy


def test_waiting_behind_another_batch_is_no_cost():
    """A batch costs what it takes from when it had the device for itself."""
    b = batcher(executors=1)
    for i in range(20):
        now = 10.0 * i
        push(b, 8, at=now)
        first = leave(b, now)
        b.executor_free(first.requests, now)
        second = leave(b, now)
        b.forward_ended(first.requests, now + 1.0)
        b.forward_ended(second.requests, now + 2.0, began_at=now + 1.0)
    assert abs(b._patience.cost("kind", 4, now + 2.0) - 1.0) < 1e-6


def test_two_replicas_serve_nearly_twice_as_much():
    """Where the forward is the bottleneck, without thin batches."""

    def rate(executors: int) -> tuple[float, float]:
        found = simulate(
            [Clients(64, Exponential(0.002))],
            forward_cost=lambda rows: 0.002 + 0.0005 * rows,
            duration=5.0,
            executors=executors,
        )
        return found.throughput, found.mean_batch_size

    (one, _), (two, size) = rate(1), rate(2)
    assert two > 1.6 * one
    assert size > 16
