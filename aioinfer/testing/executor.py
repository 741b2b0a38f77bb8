"""An executor that runs a batch when a test says so."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from types import TracebackType
from typing import Any, Self

from aioinfer.batch import Batch
from aioinfer.executor import Call
from aioinfer.testing.bell import PATIENCE_S, Bell


class PuppetExecutor:
    """An executor that takes batches and runs none of them until it is told to.

    Give it to a server as ``executor``; each forward then begins and ends when the test says
    so, on the test's own thread::

        puppet = PuppetExecutor()
        async with InferenceServer(model, executor=puppet) as server:
            with puppet:
                answer = server.async_client().submit(td)
                await settle()
                assert puppet.waiting[0].rows == 1
                puppet.run_next()
                await answer

    A server that is closed waits for its last batches, so a test whose last batch is still
    here would hang: ``with puppet:``, inside, runs them however the block ends. With
    :meth:`run_freely` from the start, it is an executor without a thread.

    It has no thread, so :attr:`waiting` is all there is, and what it runs has been run when
    :meth:`run_next` returns; the server's loop still has to be told, see :func:`settle`.
    """

    def __init__(self) -> None:
        self._run: Callable[[Batch], Any] | None = None
        self._finished: Callable[[Batch], None] | None = None
        self._jobs: deque[Batch | Call] = deque()
        self._taken: list[Batch] = []
        self._free = False
        self._stopped: Future[None] = Future()
        self._stopping = True
        self._bell = Bell()

    # -- for the test -------------------------------------------------------

    @property
    def waiting(self) -> list[Batch]:
        """The batches that were dispatched and have not been run, in order."""
        with self._bell.lock:
            return [job for job in self._jobs if isinstance(job, Batch)]

    @property
    def batches(self) -> list[Batch]:
        """All batches that were ever dispatched, in order."""
        with self._bell.lock:
            return list(self._taken)

    @property
    def batch_sizes(self) -> list[int]:
        """The rows of all batches that were ever dispatched, in order."""
        return [batch.rows for batch in self.batches]

    @property
    def is_started(self) -> bool:
        """Whether a server has started it and not stopped it since."""
        return not self._stopping

    def run_next(self, answers: Sequence[Any] | BaseException | None = None) -> Batch:
        """Run the batch that has waited longest, and report it finished.

        Args:
            answers: for each request in the batch its result or its exception; or one
                exception, of which the first request gets this object and the others copies
                of it; ``None`` runs the server's policy.

        Returns:
            The batch, with its outcomes.

        Raises:
            RuntimeError: no batch waits.
            ValueError: not one answer per request.
        """
        with self._bell.lock:
            batch = next((job for job in self._jobs if isinstance(job, Batch)), None)
            run, finished = self._run, self._finished
        if batch is None or run is None or finished is None:
            raise RuntimeError("no batch waits; `await settle()` or wait_until_submitted() first")
        if answers is None:
            rest = run(batch)
            if rest is not None:
                rest()
        else:
            _answer(batch, answers)
        with self._bell.lock:
            self._jobs.remove(batch)
        finished(batch)
        self._run_calls()
        return batch

    def run_freely(self) -> None:
        """Run what waits and, from now on, every batch as soon as it is dispatched."""
        self._free = True
        while self.waiting:
            self.run_next()

    def wait_until_submitted(self, timeout: float = PATIENCE_S) -> None:
        """Block this thread until a batch waits; for servers that run in another thread.

        Args:
            timeout: real seconds.

        Raises:
            TimeoutError: no batch was dispatched in time.
        """
        self._bell.wait(self._has_waiting, timeout, "no batch was dispatched")

    async def submitted(self, timeout: float = PATIENCE_S) -> None:
        """Wait until a batch waits, without blocking the event loop.

        Arguments and errors are those of :meth:`wait_until_submitted`.
        """
        await self._bell.wait_async(self._has_waiting, timeout, "no batch was dispatched")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.run_freely()

    # -- for the server -----------------------------------------------------

    def start(
        self,
        run: Callable[[Batch], Any],
        finished: Callable[[Batch], None],
        free: Callable[[Batch], None] | None = None,
    ) -> None:
        """Get ready for a server; forget the batches of an earlier one."""
        with self._bell.lock:
            self._run, self._finished = run, finished
            self._jobs.clear()
            self._stopped = Future()
            self._stopped.set_running_or_notify_cancel()
            self._stopping = False

    def submit(self, batch: Batch) -> None:
        """Take a batch."""
        with self._bell.lock:
            self._jobs.append(batch)
            self._taken.append(batch)
            self._bell.ring()
        if self._free:
            self.run_next()

    def call(self, function: Callable[[], Any]) -> Future[Any]:
        """Run a function after the batches that wait; at once if none does."""
        job = Call(function)
        with self._bell.lock:
            self._jobs.append(job)
        self._run_calls()
        return job.future

    def is_here(self) -> bool:
        """Whether the calling thread runs the batches: never exclusively, so no."""
        return False

    def stop(self) -> Future[None]:
        """End, once the batches that wait have been run; functions that wait run now."""
        with self._bell.lock:
            self._stopping = True
            stopped = self._stopped
            calls = [job for job in self._jobs if isinstance(job, Call)]
            self._jobs = deque(job for job in self._jobs if isinstance(job, Batch))
        for call in calls:
            call.run()
        self._run_calls()
        return stopped

    # -- inside -------------------------------------------------------------

    def _has_waiting(self) -> bool:
        return any(isinstance(job, Batch) for job in self._jobs)

    def _run_calls(self) -> None:
        """Run the functions that no batch stands before; end if that was all."""
        while True:
            with self._bell.lock:
                first = self._jobs[0] if self._jobs else None
                if not isinstance(first, Call):
                    if first is None and self._stopping and not self._stopped.done():
                        self._stopped.set_result(None)
                    return
                self._jobs.popleft()
            first.run()


def _answer(batch: Batch, answers: Sequence[Any] | BaseException) -> None:
    requests = batch.requests
    if isinstance(answers, BaseException):
        answers = [answers, *(_copy_of(answers) for _ in requests[1:])]
    if len(answers) != len(requests):
        raise ValueError(
            f"answers must be one per request of the batch, {len(requests)}, got {len(answers)}"
        )
    batch.outcomes = list(zip(requests, answers, strict=True))
    batch.failed = any(isinstance(answer, BaseException) for answer in answers)
    batch.answered_at = batch.dispatched_at


def _copy_of(error: BaseException) -> BaseException:
    return type(error)(*error.args)
