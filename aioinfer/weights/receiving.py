"""Who weights are sent to: above all, a server that serves them."""

from __future__ import annotations

import abc
import dataclasses
import itertools
import os
from collections.abc import Callable
from typing import Literal, Protocol

import aioinfer.arguments as arguments
from aioinfer.clock import Clock
from aioinfer.weights.delivery import Stage
from aioinfer.weights.slots import Interrupted, Mode, Outdated, Slots, Source


class Note(Protocol):
    """Tells the sender how far its weights have come."""

    def __call__(self, stage: Stage, why: str = "", serves: int = 0) -> None:
        """Note it."""


@dataclasses.dataclass(frozen=True)
class Taking:
    """How weights are taken; see :class:`~aioinfer.WeightSyncScheme`."""

    mode: Mode = "slots"
    cast: bool = False
    partial: bool = False


_numbers = itertools.count(1)


class Receiver(abc.ABC):
    """Takes weights. A scheme calls these methods, from any thread, one version at a time.

    Args:
        model_id: what the weights are called.
    """

    def __init__(self, model_id: str) -> None:
        self.model_id = model_id
        self.name = f"{model_id}#{next(_numbers)}@{os.getpid()}"
        """Names it in a :class:`~aioinfer.SendReport`."""

    @property
    @abc.abstractmethod
    def version(self) -> int:
        """The version it has."""

    @abc.abstractmethod
    def announce(self, version: int) -> None:
        """There is such a version, which will come if nothing goes wrong."""

    @abc.abstractmethod
    def watch(self, announced: Callable[[], int]) -> None:
        """``announced()`` is the newest version that there is or will be."""

    def publish(
        self,
        source: Source,
        version: int,
        epoch: int,
        note: Note,
        *,
        taking: Taking,
        timeout: float | None = None,
    ) -> None:
        """Take the weights, and note how far they came. Never raises.

        Args:
            source: the weights; not used any more once this returns.
            version: theirs.
            epoch: of their sender.
            note: told how far they came, at least once.
            taking: how to take them.
            timeout: seconds that this may wait for batches; ``None`` for as long as they take.
        """
        try:
            self._take(source, version, epoch, note, taking, timeout)
        except TimeoutError:
            return  # whoever waits notices
        except Interrupted as error:
            note(Stage.GONE, str(error))
        except Exception as error:
            self._refused()
            serves = error.serves if isinstance(error, Outdated) else 0
            note(Stage.REFUSED, str(error) or repr(error), serves)

    @abc.abstractmethod
    def _take(
        self,
        source: Source,
        version: int,
        epoch: int,
        note: Note,
        taking: Taking,
        timeout: float | None,
    ) -> None:
        """Take the weights, and note that.

        Raises:
            Exception: they were not taken, and why.
        """

    @abc.abstractmethod
    def _refused(self) -> None:
        """Weights were refused."""


StalenessPolicy = Literal["reject", "wait", "tag"]


class Freshness:
    """How old the weights in service are, and what that means.

    Args:
        slots: what serves.
        clock: tells the time.
        max_staleness: versions that the weights in service may be behind the newest one that
            was announced; ``None`` for any number.
        max_age_s: seconds that they may be in service; ``None`` for any time.
        policy: what to do once they are older.
    """

    def __init__(
        self,
        slots: Slots,
        clock: Clock,
        max_staleness: int | None,
        max_age_s: float | None,
        policy: StalenessPolicy,
    ) -> None:
        if max_staleness is not None:
            if isinstance(max_staleness, bool) or not isinstance(max_staleness, int):
                raise TypeError(f"max_staleness must be an int or None, got {max_staleness!r}")
            if max_staleness < 0:
                raise ValueError(f"max_staleness must be at least 0, got {max_staleness}")
        if max_age_s is not None:
            max_age_s = arguments.duration("max_age_s", max_age_s)
        if policy not in ("reject", "wait", "tag"):
            raise ValueError(f"staleness_policy must be 'reject', 'wait' or 'tag', got {policy!r}")
        self.policy: StalenessPolicy = policy
        self.limited = max_staleness is not None or max_age_s is not None
        """Whether there is a limit."""
        self._slots = slots
        self._clock = clock
        self._max_staleness = max_staleness
        self._max_age_s = max_age_s
        self._announced = 0
        self._watched: Callable[[], int] | None = None
        self._since = clock()

    def announce(self, version: int) -> None:
        """There is such a version."""
        self._announced = max(self._announced, version)

    def watch(self, announced: Callable[[], int]) -> None:
        """``announced()`` is the newest version that there is or will be."""
        self._watched = announced

    def renewed(self) -> None:
        """New weights are in service."""
        self._since = self._clock()

    @property
    def staleness(self) -> int:
        """Versions that the weights in service are behind the newest one announced."""
        return max(0, self._newest() - self._slots.current.version)

    def _newest(self) -> int:
        if self._watched is not None:
            self._announced = max(self._announced, self._watched())
        return self._announced

    @property
    def age_s(self) -> float:
        """Seconds that they have been in service."""
        return self._clock() - self._since

    def fault(self) -> str | None:
        """Why the weights in service are too old; ``None`` if they are not."""
        if self._max_staleness is not None and self.staleness > self._max_staleness:
            return (
                f"version {self._slots.current.version} of the weights serves and version "
                f"{self._announced} exists; max_staleness={self._max_staleness} allows to be "
                f"{self._max_staleness} behind"
            )
        if self._max_age_s is not None and self.age_s > self._max_age_s:
            return (
                f"version {self._slots.current.version} of the weights has served for "
                f"{self.age_s:.3g} s; max_age_s={self._max_age_s} allows less"
            )
        return None


class ServedWeights(Receiver):
    """What a server gives to a scheme.

    Args:
        model_id: what the weights are called.
        slots: what serves.
        freshness: learns of versions.
        count: called with what was published, refused or skipped, and how often.
        changed: called after the weights, or what is known of them, changed.
    """

    def __init__(
        self,
        model_id: str,
        slots: Slots,
        freshness: Freshness,
        count: Callable[[str, int], None],
        changed: Callable[[], None],
    ) -> None:
        super().__init__(model_id)
        self._slots = slots
        self._freshness = freshness
        self._count = count
        self._changed = changed

    @property
    def slots(self) -> Slots:
        """What serves."""
        return self._slots

    @property
    def version(self) -> int:
        """The version that serves."""
        return self._slots.current.version

    def announce(self, version: int) -> None:
        """There is such a version."""
        self._freshness.announce(version)

    def watch(self, announced: Callable[[], int]) -> None:
        """``announced()`` is the newest version that there is or will be."""
        self._freshness.watch(announced)

    def _take(
        self,
        source: Source,
        version: int,
        epoch: int,
        note: Note,
        taking: Taking,
        timeout: float | None,
    ) -> None:
        """Serve the weights from the next batch on."""
        skipped = self._slots.publish(
            source,
            version,
            epoch=epoch,
            mode=taking.mode,
            cast=taking.cast,
            partial=taking.partial,
            timeout=timeout,
        )
        self._freshness.announce(version)
        self._freshness.renewed()
        self._count("weight_updates", 1)
        self._count("weights_skipped", skipped)
        note(Stage.APPLIED)
        self._changed()

    def _refused(self) -> None:
        self._count("weights_refused", 1)
