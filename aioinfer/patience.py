"""Whether to wait: the judgement behind ``min_batch_size=None``.

The executor is free and P rows wait. Leave now, or wait for the next arrivals?

The server is one half of a *closed loop*: each caller asks, waits for its answer, thinks, and
asks again. With N callers that think for Z on average and are answered after R, Little's law
gives the throughput N / (Z + R). Z is not ours to change, so more throughput *is* a shorter
mean time to the answer; the question is only over what horizon to look.

A forward of B rows costs a + b*B, and the time in which the j next callers will have arrived is
w (both learnt, see :mod:`aioinfer.estimates`). What changes if the batch waits for them?

*   The P rows that wait now are answered later, by w and by the b*j of the larger batch.
*   The j rows are answered sooner: they would have waited for the end of this forward and then
    paid a forward of their own; now they wait for each other, and one fixed cost a is saved.

Adding it up, the waiting time saved is ``j*(a - b*P) - w*(P + j)``: positive only for arrivals
that come within a fraction of a forward. This is the *near* view, right wherever arrivals are
spread out. Callers that come later than the end of the forward never matter.

It does not see what lasts. Two halves of the callers that alternate, each arriving while the
other computes, stay two halves for ever unless somebody waits once for long; whether that is
better depends on the time they think. If the executor has no idle time and *most* of those who
are out come back within w, waiting makes them one group from now on. The *far* view compares
rates, (P + j) rows every w + a + b*(P + j) seconds against P every a + b*P, which comes down to
``j*a > P*w``. Joining what would be better apart is avoided by the same comparison: with
thinking time Z the halves are Z behind each other, and ``j*a > P*Z`` fails for Z > a. (A batch
that is worth holding is the question of bulk-service queues, going back to Bailey 1954 and to
Neuts' "general bulk service rule" of 1967, whose single threshold this replaces; counting the
fixed cost against the delay is what Clipper and Nexus do with batch sizes, off line.)

All this takes for granted that callers think while a forward runs. Threads of the server's own
interpreter do not: they compete with the forward, and one that starts while they are on their
way delays them all. Where there are such callers the batch waits for everybody who is expected,
for ``COLD_TIMEOUT_S`` at most, and then stops expecting those who did not come.

Nor is any of this asked of forwards of less than ``SHORT_S``. Judging takes a tenth of that, being
woken for the rest takes as much again, and a timer does not ring that soon: so what is here leaves,
and what comes meanwhile is the next batch.

And where nobody is to be waited for, the reverse question: one batch of the P rows, or G batches
one after the other? If everybody came in batches of that size, the cycle would be Z + cost(P/G)
if thinking is the bottleneck, and (N/P)*G*cost(P/G) if the executor is, N being all the rows,
those that are out included. Whichever G makes the longer of the two shortest is taken: the groups
take turns from then on, one computing while the others think, and since it is asked of each of
them again, they become as many as it takes. Near the limit of the executor that stops, while others
are out: rows that come at random, unlike those of groups, need a part of its time to make up for
that. Coroutines of the server's own interpreter can
think while a forward runs, but only as far as the two leave each other room, and a short forward
is mostly Python. So for them the forwards of the groups must be long, and known well, and thinking
must be a good part of a forward, for the loop is woken once per group. Should they leave no room
all the same, the smaller batches turn out to cost more, and that is learnt.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections import deque
from collections.abc import Hashable

from aioinfer.estimates import Cohort, ForwardCost, ThinkTimes
from aioinfer.request import Source

COLD_TIMEOUT_S = 0.002
"""How long a batch is held for callers of whom nothing is known yet, or who compete."""

SHORT_S = 0.0001
"""Forwards up to here are over before it would be known whether waiting was right."""

_COHORTS = 4  # batches whose callers are expected back; who is out for longer is not waited for
_MOST = 0.7  # share of those expected that makes waiting a matter of the far view
_BUSY = 0.8  # utilisation from which the far view counts
_SATURATED = 0.97  # utilisation from which dividing cannot help: there is no idle time to fill
_FULL = 0.9  # the same where others are out: those who come at random need some of it
_IDLE = 0.8  # idle time per forward that merging may cost for ever, as a share of ``a``
_SHORTER = 0.75  # what dividing among free executors must make of a forward
_WORTH_IT = 0.98  # what dividing must make of a cycle
_THINKING = 0.25  # of a forward: less is not worth waking the loop for each group
_LEARNT = 16  # forwards after which their cost is known well
_LONG_S = 0.001  # forwards from here on leave most of the interpreter's time to others
_GROUPS = (2, 3, 4, 5, 6, 8, 12, 16)
_QUANTILES = (0.1, 0.25, 0.5, 0.75, 0.97)


class Patience:
    """Learns from what happens, and judges.

    Args:
        far_sighted: whether the far view counts (``objective="throughput"``).
        independent: whether callers think while a forward runs, however short it is. Those of
            the server's own interpreter do not.
        one_size: whether all forwards are padded to the same size, and so cost the same.
    """

    def __init__(
        self, *, far_sighted: bool, independent: bool = True, one_size: bool = False
    ) -> None:
        self.think = ThinkTimes()
        self._far_sighted = far_sighted
        self._independent = independent
        self._one_size = one_size
        self._costs: dict[Hashable, ForwardCost] = {}
        self._cohorts: deque[Cohort] = deque(maxlen=_COHORTS)
        self._newcomers: Cohort | None = None
        self._utilisation = 0.0
        self._saturated_at = -math.inf
        self._freed_at = -math.inf
        self._ended_at = -math.inf
        self._ignore_before = -math.inf
        self._pauses = 0
        self._competing = 0

    # -- what happened ------------------------------------------------------

    def join(self, source: Source) -> None:
        """A client exists and may ask."""
        self._competing += source.competes
        newcomers = self._newcomers
        if newcomers is None or newcomers not in self._cohorts:
            newcomers = self._newcomers = Cohort(None, self._ended_at, 1)
            self._cohorts.append(newcomers)
        self.expect(source, newcomers)

    def leave(self, source: Source) -> None:
        """A client is gone."""
        self._competing -= source.competes
        if source.cohort is not None:
            source.cohort.left -= source.expected
        source.expected = 0

    def returned(self, cohort: Cohort, now: float, *, idle: bool) -> None:
        """One of ``cohort`` asks again; ``idle``: it finds nobody waiting or being served."""
        if idle and self._is_pause(now):
            self._pauses += 1
            self._ignore_before = now
        if cohort is not self._newcomers and cohort.answered_at >= self._ignore_before:
            thought = now - cohort.answered_at
            if thought <= 4 * self.think.longest:
                self._pauses = 0
            self.think.learn(thought)

    def _is_pause(self, now: float) -> bool:
        """Whether everybody paused until now (an evaluation, a long update of the learner).

        That says nothing about how callers think, so who was out over a pause is not learnt
        from. After three pauses in a row, that is how they think now.
        """
        quiet = now - self._ended_at
        return self.think.known and self._pauses < 3 and quiet > 4 * self.think.longest

    def saturated(self, now: float) -> None:
        """The last free executor has got a batch."""
        if now > self._saturated_at > -math.inf:
            busy = (self._freed_at - self._saturated_at) / (now - self._saturated_at)
            self._utilisation += (min(busy, 1.0) - self._utilisation) / 10
        self._saturated_at = now

    def freed(self, now: float) -> None:
        """An executor is free, the first after all were busy."""
        self._freed_at = now

    def ended(self, kind: Hashable, size: int, callers: int, seconds: float, now: float) -> Cohort:
        """A forward ended.

        Args:
            kind: the signature of its requests.
            size: its rows, the padded ones included.
            callers: how many requests it answers.
            seconds: what it took.
            now: the time.

        Returns:
            The cohort to put the callers in.
        """
        self._ended_at = now
        cost = self._costs.get(kind)
        if cost is None:
            if len(self._costs) >= 256:  # shapes that keep changing must not fill memory
                self._costs.clear()
            cost = self._costs[kind] = ForwardCost(one_size=self._one_size)
        cost.learn(size, seconds)
        cohort = Cohort(kind, now, 1 if callers <= 16 else 4)
        self._cohorts.append(cohort)
        return cohort

    def expect(self, source: Source, cohort: Cohort) -> None:
        """One more request of ``source`` is expected, as one of ``cohort``."""
        if source.cohort is not cohort:
            if source.cohort is not None:  # several in flight: they all count from now
                source.cohort.left -= source.expected
                cohort.left += source.expected
            source.cohort = cohort
        source.expected += 1
        cohort.left += 1

    def forget(self) -> None:
        """Expect nobody who is out now."""
        self._cohorts.clear()

    # -- judgement ----------------------------------------------------------

    @property
    def can_judge(self) -> bool:
        """Whether think times are known, and mean what :meth:`wait` takes them for."""
        return self.think.known and not self._competing

    def cost(self, kind: Hashable, size: int, now: float) -> float:
        """Return what a forward is expected to cost; 0 where that is unknown or outdated.

        Outdated after a second without a forward, so that an estimate that is far too high
        cannot keep everything from running, and itself from being corrected.
        """
        cost = self._costs.get(kind)
        return 0.0 if cost is None or now - self._ended_at > 1.0 else cost.of(size)

    def learnt(self, kind: Hashable) -> ForwardCost | None:
        """What is known of the cost of forwards of this kind, once 16 were seen."""
        cost = self._costs.get(kind)
        return None if cost is None or cost.learnt < _LEARNT else cost

    def least_cost(self, kind: Hashable, now: float) -> float:
        """Return what a forward costs at least, to refuse by; 0 until three were seen.

        The first is often a warm-up, a hundred times as slow as the rest.
        """
        cost = self._costs.get(kind)
        return 0.0 if cost is None or cost.learnt < 3 else self.cost(kind, 1, now) / 2

    def expected(self, kind: Hashable) -> int:
        """Return how many requests of this kind may soon arrive."""
        expected = 0
        for cohort in self._cohorts:
            if cohort.left and (cohort.kind is kind or cohort.kind is None):
                expected += cohort.left
        return expected

    def wait(
        self, kind: Hashable, rows: int, requests: int, room: float, now: float
    ) -> tuple[float, int] | None:
        """Judge whether what waits should wait for more.

        Args:
            kind: their signature.
            rows: how many rows wait, at least 1.
            requests: how many requests those are; what is expected is counted in requests too.
            room: how many more rows fit into the batch.
            now: the time.

        Returns:
            Until when to wait, and for how many arrivals at most; ``None`` to leave now.
        """
        cost = self._costs.get(kind)
        if cost is None:
            return None
        a = cost.fixed
        horizon = a + cost.per_row * rows
        if horizon < SHORT_S:
            return None
        near_a = a - cost.per_row * rows
        far = self._far_sighted and self._utilisation > _BUSY
        if near_a <= 0.0 and not far:
            return None
        room *= requests / rows
        think = self.think.sorted
        known = len(think)
        out: list[tuple[float, float, int]] = []  # (weight, age, how many return by that age)
        largest = 0.0
        most = 0.0
        lead = 0
        for cohort in self._cohorts:
            left = cohort.left
            if left > 0 and (cohort.kind is kind or cohort.kind is None):
                age = now - cohort.answered_at
                done = bisect_right(think, age)
                if done < known:
                    out.append((left / (known - done), age, done))
                    most += left
                    if left >= largest:
                        largest, lead = left, len(out) - 1
        if not out:
            return None
        _, lead_age, lead_done = out[lead]
        first = think[lead_done + int((known - lead_done) * _QUANTILES[0])] - lead_age
        if first > horizon or most * a <= requests * first:
            return None  # neither view can be for it: the rest would come to the same
        latest = 0.0
        if far:
            # One group means this idle time after every forward.
            latest = _IDLE * a - (now - self._ended_at)
            far = False
            if latest > 0.0:
                coming = 0.0
                for weight, age, done in out:
                    coming += weight * (bisect_right(think, age + latest, done) - done)
                far = coming >= _MOST * most
            if near_a <= 0.0 and not far:
                return None
        best = 0.0
        until, arrivals = now, 1.0
        for quantile in _QUANTILES:
            wait = think[lead_done + int((known - lead_done) * quantile)] - lead_age
            if wait > horizon:
                break
            wait *= 1.001  # past the think time itself
            if (most * a if far else most * (near_a - wait)) <= requests * wait + best:
                break  # not even if everybody came
            coming = 0.0
            for weight, age, done in out:
                coming += weight * (bisect_right(think, age + wait, done) - done)
            if coming > room:
                coming = room
            if wait < latest and coming >= _MOST * most:
                saved = coming * a - requests * wait
            else:
                saved = coming * near_a - wait * (requests + coming)
            if saved > best:
                best, until, arrivals = saved, now + wait, coming
        return (until, max(1, math.ceil(arrivals - 1e-6))) if best > 0.0 else None

    def groups(self, kind: Hashable, rows: int, out: int = 0, free: int = 1) -> int:
        """Into how many batches to divide ``rows`` rows, for which nobody is to wait; at least 1.

        Args:
            kind: their signature.
            rows: how many.
            out: rows of those who are thinking, and may soon ask too.
            free: how many executors are free.
        """
        cost = self._costs.get(kind)
        if cost is None or rows < 2:
            return 1
        if free > 1:
            return 1 if out else self._groups_at_once(cost, rows, free)
        if not (self._far_sighted and self.can_judge):
            return 1
        if self._utilisation > (_FULL if out else _SATURATED):
            return 1
        think, forward = self.think.median, cost.of(rows)
        if out and forward < SHORT_S:
            return 1
        share = (rows + out) / rows
        cycle = _WORTH_IT * max(think + forward, share * forward)
        if think < cost.fixed or think + cost.fixed > cycle:
            return 1
        least, best = 0.0, 1
        if not self._independent:
            if cost.learnt < _LEARNT or think < _THINKING * forward:
                return 1
            least = _LONG_S
        for groups in _GROUPS:
            if groups > rows:
                break
            forward = cost.fixed + cost.per_row * rows / groups
            if forward < least:
                break
            turn, computing = think + forward, share * groups * forward
            if max(turn, computing) < cycle:
                best, cycle = groups, _WORTH_IT * max(turn, computing)
            if computing > turn:
                break
        return best

    @staticmethod
    def _groups_at_once(cost: ForwardCost, rows: int, free: int) -> int:
        best, shortest = 1, cost.of(rows)
        for groups in range(2, min(free, rows) + 1):
            forward = cost.fixed + cost.per_row * rows / groups
            if forward < _SHORTER * shortest:
                best, shortest = groups, forward
        return best
