"""One pending request, who sent it, and where its answer goes.

These are plain records: every other module reads them, none of them reads the others.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Hashable, Sequence
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    import torch

    from aioinfer.estimates import Cohort

    Take = Callable[[tuple[int, ...], torch.dtype], torch.Tensor | None]


class State(enum.IntEnum):
    """Where a request is on its way; it only ever moves forward."""

    SUBMITTED = 0  # handed over, not yet seen by the batcher
    QUEUED = 1  # waiting in the batcher
    RUNNING = 2  # chosen for a batch
    DONE = 3  # answered, or given up by its caller before the forward


class GivenUp(enum.Enum):
    """Why a caller no longer wants its answer."""

    CANCELLED = "cancelled"
    TIMED_OUT = "timed out"


class Source:
    """A client as the batcher sees it: how many of its callers may soon ask again.

    ``expected`` counts the answers it has received and not yet followed by a new request, and
    ``cohort`` is the batch that the latest of them came with (see :mod:`aioinfer.patience`).
    """

    __slots__ = ("__weakref__", "closed", "cohort", "competes", "expected", "live")

    def __init__(self, *, competes: bool = False) -> None:
        self.competes = competes
        """Whether its callers are threads of the server's interpreter."""
        self.expected = 0
        self.cohort: Cohort | None = None
        self.live = False
        """Whether the batcher knows of it; set by the batcher."""
        self.closed = False
        """Whether the client is gone; set by its transport."""


class ReplyPort(Protocol):
    """Takes the answers of one batch to the callers behind one link."""

    on_loop: bool
    """True: :meth:`deliver` must run on the server's loop. False: any thread may call it."""
    takes_columns: bool
    """Whether it has :meth:`~aioinfer.replies.ColumnPort.deliver_columns`, too."""

    def deliver(self, outcomes: Sequence[tuple[Request, Any]]) -> None:
        """Answer every request with its result or, if it is one, its exception.

        Must not raise, must not block, and must leave callers alone that have gone.
        """


class Encoding(Protocol):
    """How the leaves of requests lie in their data, where those are not tensors yet.

    Encodings that are alike are one object.
    """

    def join(self, data: Sequence[Any], take: Take) -> Sequence[torch.Tensor]:
        """The leaves of a batch, from the data of bare rows.

        ``take`` gives memory for a tensor, or ``None`` where new memory is as good.
        """

    def join_rows(
        self, data: Sequence[Any], rows: Sequence[int], padding: int, take: Take
    ) -> Sequence[torch.Tensor]:
        """The same from data of so many rows; the last row comes ``padding`` times more."""

    def leaves(self, data: Any, rows: int, batched: bool) -> tuple[torch.Tensor, ...]:
        """The leaves of one request."""


class Request:
    """One request: what it asks, until when, and how to answer it.

    Attributes:
        data: the tuple of leaf tensors where ``signature.plain``, else the TensorDict.
        encoding: if set, ``data`` is what came from elsewhere, and this reads the leaves.
        rows: how many rows it holds, at least 1.
        batched: whether it came with a batch dimension (``[K]``) or as a bare row (``[]``).
        signature: hashable; requests share a batch only if their signatures are equal.
        timeout: seconds from submission until nobody wants the answer, or ``None``.
        submitted_at: when it was submitted, in seconds on the server's clock.
        deadline: ``submitted_at + timeout``, or ``None``.
        priority: larger is served sooner.
        source: the client it came from.
        special: whether it is anything but one row without priority and timeout.
        port: where the answer goes.
        handle: what ``port`` needs to find the caller (a future, a message id).
        state: see :class:`State`.
        given_up: set by the caller when it no longer wants the answer.
        parts: the pieces it was split into because it was larger than a batch.
        whole: the request this is a piece of.
        number: what a link between processes calls it.
    """

    port: ReplyPort
    # What most requests never change stands on the class: setting it costs them nothing.
    submitted_at = 0.0
    deadline: float | None = None
    state = State.SUBMITTED
    given_up: GivenUp | None = None
    parts: list[Request] | None = None
    whole: Request | None = None
    number = 0
    encoding: Encoding | None = None

    def __init__(
        self,
        data: Any,
        rows: int,
        batched: bool,
        signature: Hashable,
        timeout: float | None,
        priority: int,
        source: Source,
        handle: Any,
    ) -> None:
        self.data = data
        self.rows = rows
        self.batched = batched
        self.special = batched or priority != 0 or timeout is not None
        self.signature = signature
        self.timeout = timeout
        self.priority = priority
        self.source = source
        self.handle = handle

    def __repr__(self) -> str:
        return f"<Request {self.state.name.lower()} rows={self.rows} at {id(self):#x}>"
