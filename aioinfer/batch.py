"""A batch on its way through the executor, and what becomes of its requests."""

from __future__ import annotations

import dataclasses

from aioinfer.batching import Reason
from aioinfer.errors import ServerDiedError
from aioinfer.replies import Columns, Delivery, Outcome
from aioinfer.request import ReplyPort, Request


@dataclasses.dataclass(slots=True, eq=False)
class Batch:
    """What the server sends to the executor, and what it gets back."""

    requests: list[Request]
    rows: int
    reason: Reason
    dispatched_at: float
    columns: Columns | None = None
    """The answers, where they are plain; outcomes are then made of them on demand."""
    failed: bool = False
    """Whether any outcome is an exception."""
    fatal: ServerDiedError | None = None
    """Why nothing can be run after this batch, if so."""
    forward_s: float = 0.0
    """Seconds in the policy."""
    answered_at: float = 0.0
    began_at: float | None = None
    """Since when it had its device for itself, where another batch was before it."""
    early: bool = False
    """Whether its executor took another batch before this one was finished."""
    replica: int = 0
    """Which of several replicas computes it."""
    _outcomes: list[Outcome] | None = dataclasses.field(default=None, repr=False)

    @property
    def outcomes(self) -> list[Outcome]:
        """What became of every request."""
        if self._outcomes is None:
            if self.columns is None:
                return []
            self._outcomes = list(zip(self.requests, self.columns.results(), strict=True))
        return self._outcomes

    @outcomes.setter
    def outcomes(self, outcomes: list[Outcome]) -> None:
        self._outcomes = outcomes

    def by_port(self) -> list[Delivery]:
        """Group the answers by where they go, keeping their order."""
        requests, columns = self.requests, self.columns
        first = requests[0].port
        for request in requests:
            if request.port is not first:
                break
        else:
            return [(first, columns if columns and first.takes_columns else self.outcomes)]
        ports = {request.port for request in requests}
        whole = {port for port in ports if columns is not None and port.takes_columns}
        deliveries: list[Delivery] = [(port, columns.of_port(port)) for port in whole if columns]
        if len(whole) < len(ports):
            groups: dict[ReplyPort, list[Outcome]] = {}
            for outcome in self.outcomes:
                port = outcome[0].port
                if port not in whole:
                    groups.setdefault(port, []).append(outcome)
            deliveries += groups.items()
        return deliveries
