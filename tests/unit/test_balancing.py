"""Which replica a request goes to: the rules one by one, then a closed loop in virtual time."""

from __future__ import annotations

import heapq
import itertools
import random
from collections import deque
from typing import Any

import pytest

from aioinfer.balancing import Balancer, room_for


def balancer(*replicas: str, room: int = 4) -> Balancer[str]:
    found: Balancer[str] = Balancer(room, seed=0)
    for replica in replicas:
        found.add(replica)
    return found


def send(balancer: Balancer[str], *requests: int) -> list[str]:
    chosen = []
    for rows in requests:
        chosen.append(balancer.choose(rows))
        balancer.sent(chosen[-1], rows)
    return chosen


# -- the rules ----------------------------------------------------------------


def test_one_replica_is_filled_before_the_next_is_opened():
    """What one replica has room for goes to one replica."""
    assert send(balancer("a", "b", "c"), 1, 1, 1, 1) == ["a"] * 4


def test_beyond_the_room_the_least_loaded_open_replica_is_taken():
    """Rows beyond one's room go to two replicas, and level them; the third stays closed."""
    assert send(balancer("a", "b", "c"), 1, 1, 1, 1, 1, 1, 1, 1) == ["a"] * 4 + ["b"] * 4
    levelled = balancer("a", "b", "c")
    send(levelled, 4, 2)
    assert send(levelled, 1, 1) == ["b", "b"]
    assert levelled.under_way("c") == 0


def test_all_are_open_when_none_has_room():
    """Under load the rows, not the requests, are the same everywhere."""
    loaded = balancer("a", "b")
    send(loaded, 4, 4, *[1] * 40)
    assert loaded.under_way("a") == loaded.under_way("b") == 24
    assert send(loaded, 7, 1, 1, 1) == ["a", "b", "b", "b"]


def test_a_replica_that_does_not_answer_gets_nothing_more():
    """Who is slow keeps its rows under way, so what follows goes to the others."""
    loaded = balancer("slow", "quick")
    send(loaded, 4, 4)
    for _ in range(20):
        loaded.answered("quick", 4)
        assert send(loaded, 4) == ["quick"]


def test_a_batch_that_was_just_answered_does_not_close_a_replica():
    """Between an answer and the next request of its caller the crowd is still there."""
    loaded = balancer("a", "b")
    assert send(loaded, *[1] * 8) == ["a"] * 4 + ["b"] * 4
    for _ in range(10):
        for replica in "aaaabbbb":  # both batches at the same time
            loaded.answered(replica, 1)
        assert sorted(send(loaded, *[1] * 8)) == ["a"] * 4 + ["b"] * 4


def test_a_crowd_that_has_gone_is_packed_again():
    """Once fewer callers are left than one replica has room for, one replica has them all."""
    loaded = balancer("a", "b")
    for replica in send(loaded, *[1] * 8):
        loaded.answered(replica, 1)
    chosen = []
    for _ in range(40):
        chosen += (pair := send(loaded, 1, 1))
        for replica in pair:
            loaded.answered(replica, 1)
    assert "b" not in chosen[-20:]


def test_callers_stay_where_they_were_answered():
    """Of replicas with the same load, a caller takes the one that its last answer came from."""
    loaded = balancer("a", "b")
    send(loaded, *[1] * 8)
    for replica in "abab":
        loaded.answered(replica, 1)
    assert send(loaded, 1, 1, 1, 1) == ["a", "b", "a", "b"]


def test_rooms_of_their_own():
    """A replica added with a larger room takes more before the next is opened."""
    mixed: Balancer[str] = Balancer(2, seed=0)
    mixed.add("large", room=6)
    mixed.add("small")
    assert send(mixed, *[1] * 7) == ["large"] * 6 + ["small"]
    mixed.add("large", room=8)  # known: only its room changes
    assert list(mixed) == ["large", "small"]
    assert mixed.under_way("large") == 6


def test_what_others_send_counts():
    """A replica that reports rows of others has less room, though all of ours were answered."""
    mine = balancer("a", "b")
    send(mine, 1)
    mine.answered("a", 1, load=100)
    assert [mine.choose() for _ in range(50)].count("b") > 10


def test_of_many_who_hear_of_a_better_place_some_stay():
    """As many callers move on a report as level the two replicas, not all of them."""
    moved = 0
    for seed in range(400):
        one: Balancer[str] = Balancer(4, seed=seed)
        one.add("a")
        one.add("b")
        one.sent("a", 1)
        one.answered("a", 1, load=40)
        moved += one.choose() == "b"
    assert 150 < moved < 250


def test_a_report_fades():
    """A replica that was avoided for its load is tried again after some answers from elsewhere."""
    mine = balancer("a", "b", room=1)
    mine.sent("a", 1)
    mine.answered("a", 1, load=30)
    tried = []
    for _ in range(400):
        tried.append(mine.choose())
        mine.sent(tried[-1], 1)
        mine.answered(tried[-1], 1, load=30 if tried[-1] == "a" else 20)
    assert tried.count("b") > tried.count("a") > 10


def test_a_replica_that_was_removed():
    """It is not chosen, what it had under way is forgotten, and its late answers are harmless."""
    loaded = balancer("a", "b")
    send(loaded, 1, 1)
    loaded.remove("a")
    loaded.remove("a")
    loaded.answered("a", 1, load=3)
    loaded.sent("a", 1)
    assert send(loaded, 1, 1) == ["b", "b"]
    assert "a" not in loaded
    assert len(loaded) == 1
    loaded.remove("b")
    with pytest.raises(LookupError):
        loaded.choose()


def test_answers_of_one_batch_tell_the_load_once():
    """Rows answered one after another, with the load their batch had, are not taken for others'."""
    mine = balancer("a", "b", room=4)
    for _ in range(10):
        assert send(mine, 1, 1, 1, 1) == ["a"] * 4
        for _ in range(4):
            mine.answered("a", 1, load=4)


def test_an_order_that_is_given():
    """Replicas are opened in the order that was given last; what they have stays."""
    loaded = balancer("a", "b")
    loaded.arrange(["b", "a"])
    assert list(loaded) == ["b", "a"]
    assert send(loaded, 1, 1) == ["b", "b"]
    loaded.arrange(["a", "b"])
    assert loaded.under_way("b") == 2
    assert send(loaded, 1) == ["a"]


def test_a_replica_that_is_paused():
    """It is not chosen and not counted until it is resumed, and keeps its place before others."""
    loaded = balancer("a", "b")
    assert send(loaded, 1, 1) == ["a", "a"]
    loaded.pause("a")
    assert send(loaded, 1, 1, 1) == ["b"] * 3
    loaded.answered("a", 1)
    loaded.resume("a")
    assert loaded.under_way("a") == 1
    for _ in range(3):
        loaded.answered("b", 1)
    assert send(loaded, 1) == ["a"]
    loaded.pause("a")
    loaded.pause("b")
    with pytest.raises(LookupError):
        loaded.choose()


def test_a_replica_that_is_added_while_others_are_full():
    """A new one is used at once where there is more than the others have room for."""
    loaded = balancer("a")
    send(loaded, *[1] * 20)
    loaded.add("b")
    assert send(loaded, *[1] * 20) == ["b"] * 20


@pytest.mark.parametrize("room", [0, -1])
def test_room_must_be_positive(room: int):
    """No room at all is refused, with the argument and its value."""
    with pytest.raises(ValueError, match=f"room must be at least 1, got {room}"):
        Balancer(room)
    with pytest.raises(ValueError, match=f"room must be at least 1, got {room}"):
        balancer("a").add("b", room=room)


@pytest.mark.parametrize(
    ("fixed_s", "per_row_s", "room"),
    [(0.005, 0.0, 64), (0.0, 0.0, 64), (0.001, 0.0001, 10), (0.0, 0.001, 1), (1.0, 0.001, 64)],
)
def test_room_is_the_half_performance_length(fixed_s: float, per_row_s: float, room: int):
    """A replica is filled until its rows cost what the forward costs, or the batch is full."""
    assert room_for(64, fixed_s, per_row_s) == room


# -- in a closed loop ---------------------------------------------------------


class Loop:
    """``actors`` ask ``replicas`` servers that run what waits, at most ``batch``, in ``fixed_s``.

    Args:
        shared: whether one balancer sees what all of them send; otherwise each actor has its own
            and goes by what the replicas report.
    """

    fixed_s, think_s, batch = 0.005, 0.0005, 8

    def __init__(self, actors: int, replicas: int, *, shared: bool) -> None:
        self.random = random.Random(0)
        self.shared = shared
        self.queues: list[deque[int]] = [deque() for _ in range(replicas)]
        self.running: list[list[int]] = [[] for _ in range(replicas)]
        balancers = [Balancer[int](self.batch, seed=seed) for seed in range(actors)]
        for each in balancers:
            for replica in range(replicas):
                each.add(replica)
        self.balancers = [balancers[0]] * actors if shared else balancers
        self.order = itertools.count()
        self.events: list[Any] = []
        self.now = 0.0
        self.rows = 0
        self.sizes: list[int] = []
        for actor in range(actors):
            self.at(self.random.uniform(0, self.fixed_s), self.ask, actor)

    def at(self, when: float, event: Any, *args: int) -> None:
        heapq.heappush(self.events, (when, next(self.order), event, args))

    def ask(self, actor: int) -> None:
        balancer = self.balancers[actor]
        replica = balancer.choose()
        balancer.sent(replica, 1)
        self.queues[replica].append(actor)
        self.start(replica)

    def start(self, replica: int) -> None:
        queue = self.queues[replica]
        if queue and not self.running[replica]:
            self.running[replica] = [queue.popleft() for _ in range(min(len(queue), self.batch))]
            self.at(self.now + self.fixed_s, self.end, replica)

    def end(self, replica: int) -> None:
        batch, self.running[replica] = self.running[replica], []
        load = None if self.shared else len(batch) + len(self.queues[replica])
        self.rows += len(batch)
        self.sizes.append(len(batch))
        for actor in batch:
            self.balancers[actor].answered(replica, 1, load)
            think_s = self.think_s * self.random.uniform(0.5, 1.5)
            self.at(self.now + think_s, self.ask, actor)
        self.start(replica)

    def run(self, seconds: float = 2.0) -> tuple[float, float]:
        """Rows per second and mean batch in the second half of ``seconds``."""
        counted = False
        while self.events[0][0] < seconds:
            self.now, _, event, args = heapq.heappop(self.events)
            if not counted and self.now > seconds / 2:
                counted, self.rows, self.sizes = True, 0, []
            event(*args)
        return self.rows / (seconds / 2), sum(self.sizes) / len(self.sizes)


KNOWN = pytest.mark.parametrize("shared", [True, False], ids=["shared", "by-reports"])


@KNOWN
@pytest.mark.parametrize("replicas", [2, 4])
def test_under_load_throughput_grows_with_the_replicas(replicas: int, shared: bool):
    """N replicas answer nearly N times what one does, whether actors share a balancer or not."""
    alone, _ = Loop(128, 1, shared=shared).run()
    together, batch = Loop(128, replicas, shared=shared).run()
    assert together > 0.93 * replicas * alone
    assert batch > 0.93 * Loop.batch


@KNOWN
@pytest.mark.parametrize("actors", [1, 3, 8])
def test_at_low_load_batches_are_those_of_one_replica(actors: int, shared: bool):
    """As long as one replica has room for all actors, more replicas make no batch smaller."""
    assert Loop(actors, 4, shared=shared).run() == Loop(actors, 1, shared=shared).run()


@KNOWN
def test_between_the_two_nothing_is_lost(shared: bool):
    """With somewhat more actors than one has room for, two replicas are no slower than one."""
    for actors in (9, 12, 16, 24):
        alone, _ = Loop(actors, 1, shared=shared).run()
        together, _ = Loop(actors, 2, shared=shared).run()
        assert together > 0.97 * alone, actors


def test_actors_that_know_only_reports_settle():
    """Actors with balancers of their own end up level, though all began with the same replica."""
    loop = Loop(64, 2, shared=False)
    loop.run()
    for _ in range(20):
        loop.run(loop.now + 0.05)
        here = [
            len(queue) + len(batch) for queue, batch in zip(loop.queues, loop.running, strict=True)
        ]
        assert min(here) > 16, here
