"""One forward pass: collate, call the policy, split; and find the culprit when that fails."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence

import torch
from tensordict import TensorDictBase

from aioinfer.batch import Batch, Outcome
from aioinfer.batching import fitting_size
from aioinfer.clock import Clock
from aioinfer.collation import Collator, Columns
from aioinfer.errors import ModelError
from aioinfer.request import Request
from aioinfer.sampling import sampling
from aioinfer.signature import Signature
from aioinfer.weights.receiving import Freshness
from aioinfer.weights.slots import Slots

_AS_IS = contextlib.nullcontext()


class ForwardPass:
    """Collate, forward, split; and the search for the culprit when that fails.

    Args:
        slots: the policy, in the version that is to serve the next batch.
        collator: builds batches and takes answers apart.
        clock: measures the forward.
        sizes: the sizes a forward may have, ascending; ``None`` for any.
        freshness: where replies say whether the weights are too old, what knows that.
    """

    def __init__(
        self,
        slots: Slots,
        collator: Collator,
        clock: Clock,
        sizes: Sequence[int] | None = None,
        freshness: Freshness | None = None,
    ) -> None:
        self._sizes = sizes
        self._slots = slots
        self._freshness = freshness
        self._collator = collator
        self._clock = clock
        self._answered: dict[Signature, None] = {}

    def __call__(self, batch: Batch) -> None:
        """Set the outcomes and times of ``batch``. Never raises."""
        answers = self._answers(batch, batch.requests, batch.rows)
        if isinstance(answers, Columns):
            batch.columns = answers
        else:
            batch.outcomes = answers
        batch.answered_at = self._clock()
        for request in batch.requests:
            request.data = None  # a caller may keep its future, and with it the request

    def _answers(self, batch: Batch, requests: list[Request], rows: int) -> Columns | list[Outcome]:
        try:
            answers = self._forward(batch, requests, rows)
        except BaseException as error:  # a policy may raise SystemExit; this thread must live
            if len(requests) == 1:
                batch.failed = True
                return [(requests[0], self._model_error(requests[0], error))]
        else:
            if isinstance(answers, Columns):
                return answers
            return list(zip(requests, answers, strict=True))
        # One bad request must not fail the others: halve until it is alone.
        middle = len(requests) // 2
        outcomes: list[Outcome] = []
        for half in (requests[:middle], requests[middle:]):
            found = self._answers(batch, half, sum(r.rows for r in half))
            if isinstance(found, Columns):
                found = list(zip(half, found.results(), strict=True))
            outcomes += found
        return outcomes

    def _forward(
        self, batch: Batch, requests: list[Request], rows: int
    ) -> Columns | list[TensorDictBase]:
        size = fitting_size(self._sizes, rows)
        signature: Signature = requests[0].signature  # type: ignore[assignment]
        slot = self._slots.take()
        try:
            mode = _AS_IS if signature.mode is None else sampling(slot.model, signature.mode)
            with torch.no_grad(), mode:
                inputs = self._collator.collate(requests, rows, size)
                started = self._clock()
                answer = slot.call(inputs)
                batch.forward_s += self._clock() - started
                stale = None if self._freshness is None else self._freshness.fault() is not None
                answers = self._collator.split(answer, requests, rows, size, slot.version, stale)
        finally:
            self._slots.give_back(slot)
        if signature not in self._answered:
            self._remember(signature)
        return answers

    def _remember(self, signature: Signature) -> None:
        if len(self._answered) >= 8:
            self._answered.pop(next(iter(self._answered)))
        self._answered[signature] = None

    def _model_error(self, request: Request, error: BaseException) -> ModelError:
        message = f"the policy failed on this request ({request.signature})"
        message += f": {error}" if isinstance(error, ModelError) else f": {error!r}"
        if self._answered and request.signature not in self._answered:
            answered = "; ".join(str(signature) for signature in self._answered)
            message += f". Requests it has answered looked like: {answered}"
        wrapped = ModelError(message)
        wrapped.__cause__ = error.__cause__ if isinstance(error, ModelError) else error
        return wrapped
