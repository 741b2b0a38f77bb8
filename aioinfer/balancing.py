"""Which replica a request goes to: plain decisions over counts of rows.

There is no event loop in here, no thread and no clock: the caller says what was sent and what
was answered, and asks where to send next. One thread at a time may use a balancer.

Two wishes pull in opposite directions. The least loaded replica answers soonest, so requests
should be *spread*; but a forward costs a fixed amount whatever it holds, so a few requests spread
over many replicas make many forwards of almost nothing, and should be *packed*. The rules:

1.  *Room.* One forward of B rows costs ``a + b*B``. A second replica raises the throughput of B
    rows at hand by ``(a + b*B) / (a + b*B/2)``: by nothing while the fixed cost dominates, by a
    third at ``B = a/b`` (Hockney's half-performance length), by nearly all of it far above. Up to
    there, or up to the largest batch if that is less, a replica *has room*: see :func:`room_for`.
2.  *Packing.* As many replicas are open, in the order in which they were added, as have room
    together for the rows that are under way. So what one can take, one gets, and its batches are
    those of a single server; the order is the same for everybody who balances over these replicas.
3.  *Spreading.* Of the open replicas the one with the least rows under way is taken. Counting
    rows, not requests or turns, makes up for requests of different size and replicas of different
    speed: whoever is slow keeps its rows and gets no new ones.
4.  *Crowd.* In a closed loop the rows under way drop each time a batch is answered and are back a
    moment later. What counts for rule 2 is the most of them that there were, less one row for
    every eight that were sent since.
5.  *Staying.* Between equals, a caller stays where its last answer came from: the batcher of that
    replica expects it back. Who asks is not told to a balancer, but callers come back in about the
    order in which they were answered, so that is assumed.
6.  *What others send.* A balancer sees its own rows only. Many actors have one request under way
    each, and would all take the first replica. So a replica reports with its answer how many rows
    it had under way, and the share that is not ours is added to the load. A report is old when it
    is used, and if all who hear of a better place went there it would be the worse one
    (Mitzenmacher, *How useful is old information?*, 2000). So on reports a caller considers one
    of the open replicas at random, and moves there with the probability ``1 - there/here``, which
    makes the expected flow just level them (Berenbrink et al., *Distributed selfish load
    balancing*, 2006). Reports fade with every answer from elsewhere, so that a replica that was
    avoided is tried again.

Concentrating load on as few servers as it needs is what Finagle calls an aperture; load reports
with the answers are those of gRPC's ORCA.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Hashable, Iterable, Iterator
from typing import Generic, TypeVar

R = TypeVar("R", bound=Hashable)

_FADING = 1 / 32
"""The share of what is known of the others that is forgotten with each answer."""
_RECEDING = 1 / 8
"""Rows by which the crowd may shrink for each row sent."""


def room_for(max_batch_size: int, fixed_s: float, per_row_s: float) -> int:
    """How many rows one replica is worth filling with before the next is opened (rule 1).

    Args:
        max_batch_size: rows in a batch at most.
        fixed_s: what a forward costs whatever it holds, in seconds.
        per_row_s: what each of its rows adds, in seconds.
    """
    if fixed_s >= per_row_s * max_batch_size:
        return max_batch_size
    return max(1, int(fixed_s / per_row_s))


class _Load:
    __slots__ = ("others", "own", "paused", "reported", "room")

    def __init__(self, room: int) -> None:
        self.room = room
        self.own = 0
        self.others = 0.0
        self.reported: int | None = None
        """The load that the answers since the last request came with."""
        self.paused = False

    @property
    def rows(self) -> float:
        return 0.0 if self.paused else self.own + self.others


class Balancer(Generic[R]):
    """Spreads requests over replicas by the rules at the top of this module.

    Args:
        room: rows with which a replica is worth filling, at least 1, unless it is added with a
            number of its own; see :func:`room_for`.
        seed: of what chance decides; ``None`` for a different one each time, as it should be
            where several balancers share the replicas.
    """

    def __init__(self, room: int = 64, *, seed: int | None = None) -> None:
        if room < 1:
            raise ValueError(f"room must be at least 1, got {room}")
        self.room = room
        self._random = random.Random(seed)
        self._loads: dict[R, _Load] = {}
        self._answered: deque[R] = deque(maxlen=4096)
        self._crowd = 0.0

    def __len__(self) -> int:
        """The number of replicas."""
        return len(self._loads)

    def __iter__(self) -> Iterator[R]:
        """Iterate over the replicas, in the order in which they are opened."""
        return iter(self._loads)

    def __contains__(self, replica: object) -> bool:
        """Whether it is one of them."""
        return replica in self._loads

    # -- what happened ------------------------------------------------------

    def add(self, replica: R, room: int | None = None) -> None:
        """Send to this one too; if it is known, only its room changes."""
        room = self.room if room is None else room
        if room < 1:
            raise ValueError(f"room must be at least 1, got {room}")
        known = self._loads.get(replica)
        if known is None:
            self._loads[replica] = _Load(room)
        else:
            known.room = room

    def remove(self, replica: R) -> None:
        """Send nothing more to this one; harmless if it is not known."""
        self._loads.pop(replica, None)

    def arrange(self, replicas: Iterable[R]) -> None:
        """Open the replicas in this order, which names all of them, from now on."""
        self._loads = {replica: self._loads[replica] for replica in replicas}

    def pause(self, replica: R) -> None:
        """Send nothing to this one for a while; it keeps its place. Harmless if not known."""
        load = self._loads.get(replica)
        if load is not None:
            load.paused = True
            load.others = 0.0

    def resume(self, replica: R) -> None:
        """Send to this one again. Harmless if not known."""
        load = self._loads.get(replica)
        if load is not None:
            load.paused = False

    def sent(self, replica: R, rows: int) -> None:
        """These rows are on their way."""
        load = self._loads.get(replica)
        if load is not None:
            load.own += rows
            load.reported = None
            total = sum([each.rows for each in self._loads.values()])
            self._crowd = max(total, self._crowd - rows * _RECEDING)

    def answered(self, replica: R, rows: int, load: int | None = None) -> None:
        """These rows are not under way any more: answered, failed or given up.

        Args:
            replica: where they were sent; harmless if it was removed since.
            rows: how many.
            load: how many rows, whoever sent them, the replica had under way just before, these
                included; ``None`` if it does not say.
        """
        here = self._loads.get(replica)
        if here is None:
            return
        if load is not None:
            for other in self._loads.values():
                other.others *= 1 - _FADING
            # The answers of one batch come one after the other, with one load: the first tells.
            if load != here.reported:
                here.reported = load
                here.others = float(max(0, load - here.own))
        here.own = max(0, here.own - rows)
        self._answered.append(replica)

    # -- what to do ---------------------------------------------------------

    def under_way(self, replica: R) -> int:
        """Rows sent to a replica and not answered."""
        return self._loads[replica].own

    def choose(self, rows: int = 1) -> R:
        """Say where to send a request; tell :meth:`sent` if it is sent.

        Args:
            rows: how many rows it has.

        Raises:
            LookupError: there is no replica, or all of them are paused.
        """
        crowd = max(
            sum([load.rows for load in self._loads.values()]) + rows,
            self._crowd - rows * _RECEDING,
        )
        opened: dict[R, _Load] = {}
        for replica, load in self._loads.items():
            if load.paused:
                continue
            opened[replica] = load
            crowd -= load.room
            if crowd <= 0:
                break
        if not opened:
            raise LookupError("there is no replica to send to")
        best = min(opened, key=lambda replica: opened[replica].rows)
        stay = self._last_place()
        if stay is None or stay not in opened:
            return best
        there, here = opened[best], opened[stay]
        if there.rows >= here.rows:
            return stay
        if not (there.others or here.others):  # all that is known is certain
            return best
        other = self._random.choice(list(opened))
        gain = 1 - (opened[other].rows + rows) / (here.rows + rows)
        return other if self._random.random() < gain else stay

    def _last_place(self) -> R | None:
        """Where the caller that asks now was answered last, as far as one can tell."""
        while self._answered:
            replica = self._answered.popleft()
            if replica in self._loads:
                return replica
        return None
