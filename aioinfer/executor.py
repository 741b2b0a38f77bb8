"""The forward thread: it owns the model and the device, and runs one batch at a time."""

from __future__ import annotations

import atexit
import contextlib
import dataclasses
import queue
import threading
import weakref
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any, Protocol

import torch

from aioinfer.batching import Reason, fitting_size
from aioinfer.clock import Clock
from aioinfer.collation import Collator
from aioinfer.errors import ModelError
from aioinfer.request import Request
from aioinfer.sampling import sampling
from aioinfer.shortcut import shortcut
from aioinfer.signature import Signature

_AS_IS = contextlib.nullcontext()

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


class Executor(Protocol):
    """Runs batches one after the other, away from the server's loop."""

    def start(self, run: Callable[[Batch], None], finished: Callable[[Batch], None]) -> None:
        """Get ready.

        Args:
            run: runs one batch, that is sets its outcomes and times; never raises.
            finished: to be called, on any thread, for each batch that was run.
        """

    def submit(self, batch: Batch) -> None:
        """Run a batch and report it finished."""

    def call(self, function: Callable[[], Any]) -> Future[Any]:
        """Run a function between batches, at once if the executor is not started."""

    def is_here(self) -> bool:
        """Whether the calling thread is the one that runs the batches."""

    def stop(self) -> Future[None]:
        """Finish what was submitted, then end. Does not wait; the future does."""


class ThreadExecutor:
    """The executor of production: one thread."""

    def __init__(self) -> None:
        self._thread: threading.Thread | None = None
        self._stopping = False
        self._lock = threading.Lock()  # between a call, a start and a stop
        self._jobs: queue.SimpleQueue[Batch | _Call | None] = queue.SimpleQueue()
        self._stopped: Future[None] = Future()

    def start(self, run: Callable[[Batch], None], finished: Callable[[Batch], None]) -> None:
        with self._lock:
            self._stopping = False
            self._jobs = queue.SimpleQueue()
            self._stopped = Future()
            self._stopped.set_running_or_notify_cancel()  # so that nobody can cancel it
            # The thread of an earlier start may still be in a forward that nobody waits for;
            # two threads must never use the model at once.
            predecessor = self._thread
            self._thread = threading.Thread(
                target=_work,
                args=(self._jobs, run, finished, predecessor, self._stopped),
                name="aioinfer-executor",
                daemon=True,
            )
            _threads.add(self._thread)
            self._thread.start()

    def submit(self, batch: Batch) -> None:
        self._jobs.put(batch)

    def call(self, function: Callable[[], Any]) -> Future[Any]:
        job = _Call(function)
        if self.is_here():
            job.run()
            return job.future
        with self._lock:
            thread = self._thread
            if thread is not None and not self._stopping:
                self._jobs.put(job)
                return job.future
            if thread is not None and thread.is_alive():
                # Stopping, and perhaps still in a last forward. What starts next waits for
                # this in turn.
                self._thread = threading.Thread(target=job.run_after, args=(thread,), daemon=True)
                self._thread.start()
                return job.future
        job.run()
        return job.future

    def is_here(self) -> bool:
        return threading.current_thread() is self._thread

    def stop(self) -> Future[None]:
        with self._lock:
            self._stopping = True
            self._jobs.put(None)
        return self._stopped


def _work(
    jobs: queue.SimpleQueue[Batch | _Call | None],
    run: Callable[[Batch], None],
    finished: Callable[[Batch], None],
    predecessor: threading.Thread | None,
    stopped: Future[None],
) -> None:
    if predecessor is not None:
        predecessor.join()
    # OpenMP keeps the number of threads per calling thread: without this, a thread that
    # is not the main one runs its kernels on all cores, whatever the user has set.
    torch.set_num_threads(torch.get_num_threads())
    while (job := jobs.get()) is not None:
        if isinstance(job, _Call):
            job.run()
        else:
            run(job)
            finished(job)
        del job  # or the last batch would stay alive until the next one
    stopped.set_result(None)


# The interpreter kills daemon threads where they are, and one that is inside of torch, or on
# its way out of it, takes the process down with it. So it waits for them, for a while.
_threads: weakref.WeakSet[threading.Thread] = weakref.WeakSet()


@atexit.register
def _join_threads() -> None:
    for thread in list(_threads):
        thread.join(timeout=_JOIN_S)


_JOIN_S = 5.0


class _Call:
    """A function to run between batches."""

    def __init__(self, function: Callable[[], Any]) -> None:
        self.future: Future[Any] = Future()
        self._function = function

    def run_after(self, thread: threading.Thread) -> None:
        thread.join()
        self.run()

    def run(self) -> None:
        if not self.future.set_running_or_notify_cancel():
            return
        try:
            self.future.set_result(self._function())
        except BaseException as error:
            self.future.set_exception(error)


class ForwardPass:
    """Collate, forward, split; and the search for the culprit when that fails.

    Args:
        model: maps a TensorDict of ``[B]`` rows to one.
        collator: builds batches and takes answers apart.
        version: reads the version of the weights; called on the executor thread.
        clock: measures the forward.
        sizes: the sizes a forward may have, ascending; ``None`` for any.
    """

    def __init__(
        self,
        model: Callable[[Any], Any],
        collator: Collator,
        version: Callable[[], int],
        clock: Clock,
        sizes: Sequence[int] | None = None,
    ) -> None:
        self._sizes = sizes
        self._model = model
        self._call = shortcut(model)
        self._collator = collator
        self._version = version
        self._clock = clock
        self._answered: dict[Signature, None] = {}

    def __call__(self, batch: Batch) -> None:
        """Set the outcomes and times of ``batch``. Never raises."""
        batch.outcomes = self._outcomes(batch, batch.requests, batch.rows)
        batch.answered_at = self._clock()
        for request in batch.requests:
            request.data = None  # a caller may keep its future, and with it the request

    def _outcomes(self, batch: Batch, requests: list[Request], rows: int) -> list[Outcome]:
        try:
            results = self._forward(batch, requests, rows)
        except BaseException as error:  # a policy may raise SystemExit; this thread must live
            if len(requests) == 1:
                batch.failed = True
                return [(requests[0], self._model_error(requests[0], error))]
        else:
            return list(zip(requests, results, strict=True))
        # One bad request must not fail the others: halve until it is alone.
        middle = len(requests) // 2
        return [
            outcome
            for half in (requests[:middle], requests[middle:])
            for outcome in self._outcomes(batch, half, sum(r.rows for r in half))
        ]

    def _forward(self, batch: Batch, requests: list[Request], rows: int) -> Sequence[Any]:
        size = fitting_size(self._sizes, rows)
        signature: Signature = requests[0].signature  # type: ignore[assignment]
        mode = _AS_IS if signature.mode is None else sampling(self._model, signature.mode)
        with torch.no_grad(), mode:
            inputs = self._collator.collate(requests, rows, size)
            started = self._clock()
            answer = self._call(inputs)
            batch.forward_s += self._clock() - started
            results = self._collator.split(answer, requests, rows, size, self._version())
        if signature not in self._answered:
            self._remember(signature)
        return results

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
