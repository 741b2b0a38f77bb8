"""One forward pass: collate, call the policy, split; and find the culprit when that fails."""

from __future__ import annotations

import contextlib
import sys
from bisect import bisect_left
from collections.abc import Callable, Sequence
from typing import Any

import torch

from aioinfer.batch import Batch
from aioinfer.batching import fitting_size
from aioinfer.clock import Clock
from aioinfer.collation import Collator
from aioinfer.devices.faults import Room, copy_of, device_died, is_out_of_memory
from aioinfer.errors import ModelError, ServerDiedError
from aioinfer.replies import Columns, Outcome
from aioinfer.request import Request
from aioinfer.sampling import sampling
from aioinfer.signature import Signature
from aioinfer.splitting import cut
from aioinfer.weights.receiving import Freshness
from aioinfer.weights.slots import Policy, Slots

_AS_IS = contextlib.nullcontext()


class _DeviceDiedError(Exception):
    """There is no point in trying anything else."""

    def __init__(self, died: ServerDiedError) -> None:
        self.died = died


class ForwardPass:
    """Collate, forward, split; and the search for the culprit when that fails.

    Args:
        slots: the policy, in the version that is to serve the next batch.
        collator: builds batches and takes answers apart.
        clock: measures the forward.
        sizes: the sizes a forward may have, ascending; ``None`` for any.
    """

    def __init__(
        self,
        slots: Slots,
        collator: Collator,
        clock: Clock,
        sizes: Sequence[int] | None = None,
    ) -> None:
        self._sizes = sizes
        self._slots = slots
        self._freshness: Freshness | None = None
        self._collator = collator
        self._clock = clock
        self._answered: dict[Signature, None] = {}
        self._room = Room()

    def __call__(self, batch: Batch) -> Callable[[], None] | None:
        """Set the outcomes and times of ``batch``. Never raises.

        Returns:
            ``None``; or, of a subclass, what does so when called, on another thread: then the
            batch was only started, and this thread can start the next.
        """
        answers: Columns | list[Outcome]
        try:
            answers = self._answers(batch, batch.requests, batch.rows)
        except _DeviceDiedError as error:
            batch.fatal, batch.failed = error.died, True
            answers = [(request, copy_of(error.died)) for request in batch.requests]
        self._set_answers(batch, answers)
        batch.answered_at = self._clock()
        for request in batch.requests:
            request.data = None  # a caller may keep its future, and with it the request
        return None

    @staticmethod
    def _set_answers(batch: Batch, answers: Columns | list[Outcome]) -> None:
        if isinstance(answers, Columns):
            batch.columns = answers
        else:
            batch.outcomes = answers

    def tag(self, freshness: Freshness) -> None:
        """Let replies say whether the weights are too old."""
        self._freshness = freshness

    def warm_up(self, request: Request) -> None:
        """Run a forward of each size and slot, the largest first, on rows like ``request``.

        Raises:
            Exception: what the policy raised.
        """
        for size in reversed(self._sizes or (1, 2)):

            def run(call: Policy, size: int = size) -> None:
                call(self._collator.collate([request], 1, size))

            try:
                with torch.no_grad():
                    self._slots.rehearse(run)
            except Exception as error:
                if not is_out_of_memory(error) or size == 1:
                    raise
                self._room.exceeded(size, self._fewer(size))

    def _answers(self, batch: Batch, requests: list[Request], rows: int) -> Columns | list[Outcome]:
        out_of_memory = False
        if rows <= self._room.rows:
            try:
                answers = self._forward(batch, requests, rows)
            except BaseException as error:  # a policy may raise SystemExit; this thread must live
                if (died := device_died(error)) is not None:
                    raise _DeviceDiedError(died) from error
                if out_of_memory := is_out_of_memory(error):
                    self._room.exceeded(rows, self._fewer(rows))
                if len(requests) == 1 and not (out_of_memory and rows > 1):
                    batch.failed = True
                    return [(requests[0], self._model_error(requests[0], error))]
            else:
                if isinstance(answers, Columns):
                    return answers
                return list(zip(requests, answers, strict=True))
        # Not in the except clause, where the failed forward still holds its memory.
        if out_of_memory and torch.cuda.is_initialized():
            torch.cuda.empty_cache()
        if len(requests) == 1:
            return [(requests[0], self._in_halves(batch, requests[0]))]
        # One bad request must not fail the others: halve until it is alone.
        middle = len(requests) // 2
        outcomes: list[Outcome] = []
        for half in (requests[:middle], requests[middle:]):
            outcomes += self._outcomes(batch, half)
        return outcomes

    def _outcomes(self, batch: Batch, requests: list[Request]) -> list[Outcome]:
        answers = self._answers(batch, requests, sum(r.rows for r in requests))
        if isinstance(answers, Columns):
            return list(zip(requests, answers.results(), strict=True))
        return answers

    def _in_halves(self, batch: Batch, request: Request) -> Any:
        """The result of a request of several rows that do not fit together, or its error."""
        results = []
        try:
            for half in cut(request, (request.rows + 1) // 2):
                ((_, result),) = self._outcomes(batch, [half])
                if isinstance(result, BaseException):
                    return result
                results.append(result)
            return self._collator.handed_over(torch.cat(results))
        except Exception as error:  # rows that cannot be cut, or joined
            if isinstance(error, _DeviceDiedError):
                raise
            batch.failed = True
            return self._model_error(request, error)

    def _fewer(self, rows: int) -> int:
        """The rows to try after a forward of so many ran out of memory."""
        if self._sizes is None:
            return rows // 2
        at = bisect_left(self._sizes, rows)
        return self._sizes[at - 1] if at else rows // 2

    def _forward(self, batch: Batch, requests: list[Request], rows: int) -> Columns | list[Any]:
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
                answers = self._collator.split(
                    answer, requests, rows, size, slot.version, self._is_stale()
                )
        finally:
            self._slots.give_back(slot)
        self._note_success(signature, size)
        return answers

    def _is_stale(self) -> bool | None:
        return None if self._freshness is None else self._freshness.fault() is not None

    def _note_success(self, signature: Signature, size: int) -> None:
        if signature not in self._answered:
            self._remember(signature)
        if size <= self._room.rows < sys.maxsize:
            self._room.worked(size)

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
