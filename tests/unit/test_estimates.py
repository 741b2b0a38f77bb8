"""What a server learns: forward costs and think times."""

from __future__ import annotations

import random

import pytest

from aioinfer.estimates import ForwardCost, ThinkTimes


def test_a_line_is_learnt_under_noise():
    """Both parts of the cost are found from forwards of several sizes with ten per cent noise."""
    rng = random.Random(0)
    cost = ForwardCost()
    for _ in range(400):
        rows = rng.choice((1, 4, 16, 64))
        cost.learn(rows, (0.002 + 0.0001 * rows) * rng.uniform(0.9, 1.1))
    assert cost.of(1) == pytest.approx(0.0021, rel=0.15)
    assert cost.of(64) == pytest.approx(0.0084, rel=0.15)


def test_slow_first_forwards_are_forgotten_at_the_next_one():
    """A warm-up that is a hundred times as slow leaves no trace once a normal forward ran."""
    cost = ForwardCost()
    cost.learn(8, 1.0)
    cost.learn(8, 0.01)
    assert cost.of(8) == pytest.approx(0.01)


def test_an_outlier_counts_for_little():
    """One forward that takes a hundred times as long moves the estimate by an eighth at most."""
    cost = ForwardCost()
    for _ in range(50):
        cost.learn(8, 0.01)
    cost.learn(8, 1.0)
    for _ in range(8):
        cost.learn(8, 0.01)
    assert cost.of(8) <= 0.01 * 1.13


def test_a_change_is_followed():
    """A forward that becomes three times as slow is known to be after some dozens."""
    cost = ForwardCost()
    for _ in range(50):
        cost.learn(8, 0.01)
    for _ in range(60):
        cost.learn(8, 0.03)
    assert cost.of(8) == pytest.approx(0.03, rel=0.1)


def test_half_of_the_only_size_seen_is_taken_to_be_fixed():
    """With one size nothing tells the parts apart; the cost of that size is right."""
    cost = ForwardCost()
    for _ in range(20):
        cost.learn(32, 0.008)
    assert cost.fixed == pytest.approx(0.004)
    assert cost.of(32) == pytest.approx(0.008)


@pytest.mark.parametrize("slope", [-0.001, 0.01])
def test_no_part_is_negative(slope: float):
    """Whatever the durations, neither the fixed part nor the part per row is below zero."""
    cost = ForwardCost()
    for rows in (1, 2, 4, 8, 16) * 5:
        cost.learn(rows, max(1e-4, 0.02 + slope * rows - 0.02 * (slope > 0)))
    assert cost.fixed >= 0
    assert cost.per_row >= 0


def test_think_times_are_known_after_sixteen():
    """Fewer than sixteen of them are not enough to judge by."""
    think = ThinkTimes()
    for _ in range(15):
        think.learn(0.01)
    assert not think.known
    for _ in range(8):
        think.learn(0.01)
    assert think.known
    assert think.median == 0.01


def test_only_the_latest_think_times_count():
    """Memory is bounded, and what callers did long ago is forgotten."""
    think = ThinkTimes()
    for _ in range(1000):
        think.learn(1.0)
    for _ in range(384):
        think.learn(2.0)
    assert len(think.sorted) == 256
    assert think.sorted[0] == 2.0
    assert think.returned(1.9) == 0
    assert think.returned(2.0) == 256
