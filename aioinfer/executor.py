"""The forward thread: it owns the device, and runs one batch at a time."""

from __future__ import annotations

import atexit
import queue
import threading
import weakref
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, Protocol

import torch

from aioinfer.batch import Batch


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
