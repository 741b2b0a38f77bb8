"""Whether to wait: the judgement, with callers and costs that are known exactly."""

from __future__ import annotations

from aioinfer.patience import Patience
from aioinfer.request import Source

KIND = "kind"


def experienced(think_s: float, fixed: float, per_row: float, **options: bool) -> Patience:
    """A patience that has learnt a constant think time and a cost."""
    patience = Patience(**{"far_sighted": True, **options})
    for rows in (1, 2, 8, 32, 64) * 4:
        seconds = fixed + per_row * rows
        patience.ended(KIND, rows, 1, seconds, now=seconds)
    for _ in range(64):
        patience.think.learn(think_s)
    patience.forget()
    return patience


def answered(patience: Patience, callers: int, at: float) -> list[Source]:
    """So many callers get their answers."""
    sources = [Source() for _ in range(callers)]
    cohort = patience.ended(KIND, 1, callers, 0.0, at)
    for source in sources:
        patience.expect(source, cohort)
    return sources


def test_waits_for_those_who_are_about_to_come():
    """Thirty callers are due in a tenth of a forward: one row waits for them."""
    patience = experienced(0.010, fixed=0.005, per_row=0.0)
    answered(patience, 30, at=0.0)
    verdict = patience.wait(KIND, 1, 1, 63, now=0.0095)
    assert verdict is not None
    until, arrivals = verdict
    assert 0.010 <= until < 0.0102
    assert arrivals == 30


def test_does_not_wait_for_who_comes_after_the_end_of_the_forward():
    """A forward takes 5 ms, the others think for 9 ms more: nothing is gained by waiting."""
    patience = experienced(0.010, fixed=0.005, per_row=0.0)
    answered(patience, 30, at=0.0)
    assert patience.wait(KIND, 1, 1, 63, now=0.001) is None


def test_does_not_wait_for_stragglers():
    """Callers that are out for longer than any think time are not waited for."""
    patience = experienced(0.002, fixed=0.005, per_row=0.0)
    answered(patience, 4, at=0.0)
    assert patience.wait(KIND, 16, 16, 48, now=0.0021) is None


def test_many_rows_do_not_wait_for_one():
    """Sixty waiting rows would lose more than the one that comes in a millisecond gains."""
    patience = experienced(0.010, fixed=0.005, per_row=0.0)
    answered(patience, 1, at=0.0)
    assert patience.wait(KIND, 60, 60, 4, now=0.009) is None


def test_groups_where_thinking_takes_longer_than_the_fixed_cost():
    """Thinking for 6 ms at a fixed cost of 3 ms, two groups in turns are faster than one."""
    assert experienced(0.006, fixed=0.003, per_row=0.00005).groups(KIND, 64) == 2


def test_one_group_where_thinking_is_short():
    """Thinking for 2 ms at a fixed cost of 5 ms, everybody goes together."""
    assert experienced(0.002, fixed=0.005, per_row=0.00001).groups(KIND, 64) == 1


def test_a_group_is_divided_again_while_the_others_think():
    """Where rows cost more than forwards do, 16 that wait leave in turns though 16 are out."""
    patience = experienced(0.005, fixed=0.0001, per_row=0.00012)
    assert patience.groups(KIND, 16, out=16) > 1
    assert patience.groups(KIND, 2, out=30) == 1  # 16 such groups are what keeps it busy


def test_near_the_limit_of_the_executor_nobody_is_divided_while_others_are_out():
    """Smaller batches cost more, and rows that come at random need what they cost."""
    for busy, groups in ((0.8, 2), (0.95, 1)):
        patience = experienced(0.005, fixed=0.0001, per_row=0.00012)
        for turn in range(100):
            patience.saturated(float(turn))
            patience.freed(turn + busy)
        assert min(patience.groups(KIND, 16, out=16), 2) == groups


def test_callers_of_the_same_interpreter_are_divided_for_long_forwards_only():
    """Ten times shorter, the same forwards would be waiting for the interpreter."""
    for scale, groups in ((1.0, 2), (0.1, 1)):
        patience = experienced(
            0.006 * scale, fixed=0.003 * scale, per_row=0.00005 * scale, independent=False
        )
        assert patience.groups(KIND, 64) == groups


def test_callers_of_the_same_interpreter_that_hardly_think_are_not_divided():
    """A gain of a few per cent would go into waking the loop once more."""
    for think_s, groups in ((0.0003, 1), (0.002, 2)):
        patience = experienced(think_s, fixed=0.0001, per_row=0.00006, independent=False)
        assert patience.groups(KIND, 64) >= groups
        assert (patience.groups(KIND, 64) == 1) == (groups == 1)


def test_callers_of_the_same_interpreter_are_divided_once_forwards_are_known_well():
    """The first forwards of a policy, which are slow, divide nobody."""
    patience = Patience(far_sighted=True, independent=False)
    for _ in range(64):
        patience.think.learn(0.006)
    for seen in range(20):
        assert (patience.groups(KIND, 64) > 1) == (seen >= 16)
        patience.ended(KIND, (8, 64)[seen % 2], 1, 0.003 + 0.00005 * (8, 64)[seen % 2], now=1.0)


def test_threads_of_the_same_interpreter_are_not_divided():
    """They would compute during each other's forwards, however long those are."""
    patience = experienced(0.006, fixed=0.003, per_row=0.00005, independent=False)
    patience.join(Source(competes=True))
    assert patience.groups(KIND, 64) == 1


def test_latency_does_not_divide_either():
    """``objective="latency"`` looks at the requests at hand."""
    patience = experienced(0.006, fixed=0.003, per_row=0.00005, far_sighted=False)
    assert patience.groups(KIND, 64) == 1


def test_competing_threads_make_judgement_impossible_until_they_leave():
    """While threads of the server's interpreter live, think times mean nothing."""
    patience = experienced(0.002, fixed=0.005, per_row=0.0)
    assert patience.can_judge
    thread = Source(competes=True)
    patience.join(thread)
    assert not patience.can_judge
    patience.leave(thread)
    assert patience.can_judge


def test_a_pause_is_not_learnt_from_but_a_lasting_change_is():
    """Everybody stops for a second: think times stay. The fourth time it is how they think."""
    patience = experienced(0.002, fixed=0.001, per_row=0.0)
    now = 1.0
    before = list(patience.think._latest)
    for _ in range(3):
        cohort = patience.ended(KIND, 1, 1, 0.0, now)
        now += 1.0
        patience.returned(cohort, now, idle=True)
        assert list(patience.think._latest) == before
    for _ in range(400):
        cohort = patience.ended(KIND, 1, 1, 0.0, now)
        now += 1.0
        patience.returned(cohort, now, idle=True)
    assert patience.think.median == 1.0


def test_requests_in_flight_of_one_client_are_expected_together():
    """A client with three callers is expected three times, from its latest answer."""
    patience = experienced(0.002, fixed=0.001, per_row=0.0)
    source = Source()
    first = patience.ended(KIND, 1, 1, 0.0, 1.0)
    patience.expect(source, first)
    second = patience.ended(KIND, 2, 2, 0.0, 2.0)
    patience.expect(source, second)
    patience.expect(source, second)
    assert (first.left, second.left) == (0, 3)
    assert patience.expected(KIND) == 3
    patience.leave(source)
    assert patience.expected(KIND) == 0


def test_ever_new_signatures_do_not_fill_memory():
    """Costs are kept for some hundred signatures at most."""
    patience = experienced(0.002, fixed=0.001, per_row=0.0)
    for i in range(2000):
        patience.ended(f"kind {i}", 1, 1, 0.5, i + 0.5)
    assert len(patience._costs) <= 256


def test_a_cost_without_recent_forwards_is_not_relied_on():
    """A second after the last forward, nothing is refused by what forwards used to cost."""
    patience = experienced(0.002, fixed=0.5, per_row=0.0)
    ended = patience._ended_at
    assert patience.least_cost(KIND, ended + 0.5) > 0.0
    assert patience.least_cost(KIND, ended + 1.5) == 0.0


def test_short_forwards_wait_for_nobody():
    """What is judged right at 5 ms is over at 50 us before anybody could be woken for it."""
    for scale, waits in ((1.0, True), (0.01, False)):
        patience = experienced(0.010 * scale, fixed=0.005 * scale, per_row=0.0)
        answered(patience, 30, at=0.0)
        verdict = patience.wait(KIND, 1, 1, 63, now=0.0095 * scale)
        assert (verdict is not None) == waits


def test_short_forwards_are_divided_only_where_everybody_is_in():
    """While others are out they make the next batch; only if nobody is, taking turns must begin."""
    for scale, out, divided in ((1.0, 16, True), (0.01, 16, False), (0.01, 0, True)):
        patience = experienced(0.005 * scale, fixed=0.0001 * scale, per_row=0.00012 * scale)
        assert (patience.groups(KIND, 16, out=out) > 1) == divided
