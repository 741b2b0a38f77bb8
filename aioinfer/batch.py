"""A batch on its way through the executor, and what becomes of its requests."""

from __future__ import annotations

import dataclasses
from typing import Any

from aioinfer.batching import Reason
from aioinfer.request import Request

Outcome = tuple[Request, Any]
"""A request and its result or, if it is one, its exception."""


@dataclasses.dataclass(slots=True)
class Batch:
    """What the server sends to the executor, and what it gets back."""

    requests: list[Request]
    rows: int
    reason: Reason
    dispatched_at: float
    outcomes: list[Outcome] = dataclasses.field(default_factory=list)
    failed: bool = False
    """Whether any outcome is an exception."""
    forward_s: float = 0.0
    """Seconds in the policy."""
    answered_at: float = 0.0
