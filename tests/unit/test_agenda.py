"""Virtual time: events happen in order, and what follows them once a moment is over."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from aioinfer.simulation.agenda import Agenda

TIMES = st.lists(st.floats(0, 0.02) | st.sampled_from([0.001, 0.002, 0.0025]), max_size=40)


@given(TIMES, TIMES)
def test_events_happen_in_order(times: list[float], delays: list[float]):
    """By time, then by when they were added, also those that are added on the way."""
    agenda = Agenda(1.0)
    seen: list[tuple[float, int]] = []
    added: list[tuple[float, int]] = []

    def add(when: float) -> None:
        number = len(added)
        added.append((when, number))
        agenda.add(when, happen, number)

    def happen(number: int) -> None:
        seen.append((agenda.now, number))
        if len(added) < len(times) + len(delays):
            add(agenda.now + delays[len(added) - len(times)])

    for when in times:
        add(when)
    agenda.run()
    assert seen == sorted(added)


def test_nothing_happens_after_the_end():
    """An event at the end happens, a later one does not, and then it is the end."""
    agenda = Agenda(2.0)
    seen: list[str] = []
    agenda.add(2.0, seen.append, "end")
    agenda.add(2.1, seen.append, "later")
    agenda.add(float("inf"), seen.append, "never")
    agenda.run()
    assert seen == ["end"]
    assert agenda.now == 2.0


def test_what_follows_a_moment_sees_all_of_it():
    """It is called once two events of the same moment have both happened, before the next one."""
    agenda = Agenda(2.0)
    seen: list[str] = []

    def first(_: None) -> None:
        agenda.afterwards(lambda: seen.append(f"after {agenda.now}"))
        agenda.add(agenda.now, seen.append, "same moment")

    agenda.add(1.0, first, None)
    agenda.add(1.5, seen.append, "next")
    agenda.run()
    assert seen == ["same moment", "after 1.0", "next"]
