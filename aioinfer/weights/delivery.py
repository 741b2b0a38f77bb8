"""What became of weights that were sent: the sender's note-pad, and the report made of it."""

from __future__ import annotations

import dataclasses
import enum
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from typing import Literal

Wait = Literal["applied", "staged", "none"]


class Stage(enum.IntEnum):
    """How far weights have come at one receiver."""

    SENT = 0
    STAGED = 1  # the receiver has them whole
    APPLIED = 2  # it serves them
    SUPERSEDED = 3  # it serves newer ones, and never had these
    REFUSED = 4
    GONE = 5  # it went away before it answered


WAITED_FOR = {"none": Stage.SENT, "staged": Stage.STAGED, "applied": Stage.APPLIED}


@dataclasses.dataclass(frozen=True)
class SendReport:
    """What became of the weights of one ``send``, receiver by receiver.

    Every receiver that was connected at the time of the call is in exactly one of the fields.
    """

    version: int
    """The version that the weights were given."""
    applied: Sequence[str] = ()
    """Serve these weights, or newer ones."""
    staged: Sequence[str] = ()
    """Have them whole, and do not serve them yet."""
    pending: Sequence[str] = ()
    """Were told; the call did not wait for them."""
    refused: Mapping[str, str] = dataclasses.field(default_factory=dict)
    """Do not take them, and why. They go on with what they have."""
    timed_out: Sequence[str] = ()
    """Did not answer in time. They catch up if they can."""
    gone: Sequence[str] = ()
    """Went away before they answered."""

    @property
    def ok(self) -> bool:
        """Whether nobody refused, timed out or went away."""
        return not (self.refused or self.timed_out or self.gone)


class Delivery:
    """Follows the weights of one ``send``. Any thread may note what it learns.

    Args:
        version: of the weights.
        wait: what the caller waits for.
    """

    def __init__(self, version: int, wait: Wait) -> None:
        self.version = version
        self.wait = wait
        self.settled: Future[None] = Future()
        """Done once there is nothing left to wait for."""
        self.serves = 0
        """The newest version that a receiver was found to serve already."""
        self._wanted = WAITED_FOR[wait]
        self._stages: dict[str, Stage] = {}
        self._reasons: dict[str, str] = {}
        self._open = True  # receivers may still be added
        self._lock = threading.Lock()

    def expect(self, receiver: str) -> None:
        """Add a receiver."""
        with self._lock:
            self._stages[receiver] = Stage.SENT

    def begun(self) -> None:
        """Every receiver was added."""
        with self._lock:
            self._open = False
            self._settle()

    def note(self, receiver: str, stage: Stage, why: str = "", serves: int = 0) -> None:
        """A receiver came further; what comes after its end, or of others, says nothing."""
        with self._lock:
            if self._stages.get(receiver, Stage.GONE) > Stage.STAGED:
                return
            self._stages[receiver] = stage
            if stage is Stage.REFUSED:
                self._reasons[receiver] = why
                self.serves = max(self.serves, serves)
            self._settle()

    def _settle(self) -> None:
        waiting = any(stage < self._wanted for stage in self._stages.values())
        if not self._open and not waiting and not self.settled.done():
            self.settled.set_result(None)

    def report(self) -> SendReport:
        """What is known by now."""
        with self._lock:
            stages, reasons = dict(self._stages), dict(self._reasons)

        def at(*wanted: Stage) -> tuple[str, ...]:
            return tuple(name for name, stage in stages.items() if stage in wanted)

        late = tuple(name for name, stage in stages.items() if stage < self._wanted)
        nothing = self._wanted is Stage.SENT
        return SendReport(
            version=self.version,
            applied=at(Stage.APPLIED, Stage.SUPERSEDED),
            staged=() if self._wanted is Stage.APPLIED else at(Stage.STAGED),
            pending=at(Stage.SENT) if nothing else (),
            refused=reasons,
            timed_out=late,
            gone=at(Stage.GONE),
        )
