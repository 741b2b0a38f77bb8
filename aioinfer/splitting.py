"""Requests larger than a batch: split on the way in, joined on the way out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from tensordict import TensorDictBase

from aioinfer.collation import leaves_of
from aioinfer.errors import ModelError
from aioinfer.request import Request, Source, State
from aioinfer.signature import Signature


def split(request: Request, max_rows: int) -> list[Request]:
    """Cut a request into parts of at most ``max_rows`` rows, remembered in its ``parts``.

    The parts are answered like any request; the last answer, or the first error, answers
    the whole.
    """
    port = _JoiningPort(request)
    parts = cut(request, max_rows)
    for part in parts:
        part.submitted_at = request.submitted_at
        part.deadline = request.deadline
        part.port = port
        part.whole = request
    request.parts = parts
    request.data = None
    request.encoding = None
    request.state = State.QUEUED
    return parts


def cut(request: Request, max_rows: int) -> list[Request]:
    """Return requests for at most ``max_rows`` of the rows each, in order; nothing else happens."""
    signature: Signature = request.signature  # type: ignore[assignment]
    leaves = leaves_of(request) if signature.plain else ()
    parts: list[Request] = []
    for start in range(0, request.rows, max_rows):
        rows = slice(start, min(start + max_rows, request.rows))
        part = Request(
            tuple(leaf[rows] for leaf in leaves) if signature.plain else request.data[rows],
            rows.stop - rows.start,
            True,
            signature,
            request.timeout,
            request.priority,
            # One caller waits, until the last part is here; the others are nobody's.
            request.source if rows.stop == request.rows else Source(),
            handle=len(parts),
        )
        parts.append(part)
    return parts


class _JoiningPort:
    """Collects the answers to the parts and answers the whole, once."""

    takes_columns = False

    def __init__(self, whole: Request) -> None:
        self.on_loop = whole.port.on_loop
        self._whole = whole
        self._results: dict[int, TensorDictBase] = {}

    def deliver(self, outcomes: Sequence[tuple[Request, Any]]) -> None:
        whole = self._whole
        for part, outcome in outcomes:
            if whole.state is State.DONE:
                return
            if isinstance(outcome, BaseException):
                self._answer(outcome)
            else:
                self._results[part.handle] = outcome
                if len(self._results) == len(whole.parts or ()):
                    self._answer(self._joined())

    def _joined(self) -> TensorDictBase | ModelError:
        results = [self._results[i] for i in sorted(self._results)]
        try:
            return torch.cat(results)
        except Exception as error:
            joined = ModelError(
                f"the request was split into {len(results)} parts, and the policy's answers to "
                f"them cannot be concatenated: {error}"
            )
            joined.__cause__ = error
            return joined

    def _answer(self, outcome: Any) -> None:
        self._whole.state = State.DONE
        self._results.clear()
        if not isinstance(outcome, BaseException):
            self._whole.parts = None  # they refer to the whole
        self._whole.port.deliver([(self._whole, outcome)])
