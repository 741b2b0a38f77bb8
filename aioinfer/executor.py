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

Run = Callable[[Batch], Callable[[], None] | None]
Report = Callable[[Batch], None]


class Executor(Protocol):
    """Runs batches one after the other, away from the server's loop."""

    def start(self, run: Run, finished: Report, free: Report | None = None) -> None:
        """Get ready.

        Args:
            run: runs one batch, that is sets its outcomes and times; never raises. Where it
                returns something, it has only started the batch: calling that does the rest.
            finished: to be called, on any thread, for each batch that was run.
            free: to be called, on any thread, where another batch can be taken before this one
                is finished.
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
    """The executor of production: one thread, and one that waits for a device, if there is one.

    Args:
        in_flight: how many batches may have been started and not be finished.
    """

    def __init__(self, in_flight: int = 1) -> None:
        self._in_flight = in_flight
        self._thread: threading.Thread | None = None
        self._stopping = False
        self._lock = threading.Lock()  # between a call, a start and a stop
        self._jobs: queue.SimpleQueue[Batch | Call | None] = queue.SimpleQueue()
        self._stopped: Future[None] = Future()

    def start(self, run: Run, finished: Report, free: Report | None = None) -> None:
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
                args=(
                    self._jobs,
                    run,
                    finished,
                    Flights(finished, free, self._in_flight),
                    predecessor,
                    self._stopped,
                ),
                name="aioinfer-executor",
                daemon=True,
            )
            _threads.add(self._thread)
            self._thread.start()

    def submit(self, batch: Batch) -> None:
        self._jobs.put(batch)

    def call(self, function: Callable[[], Any]) -> Future[Any]:
        job = Call(function)
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
    jobs: queue.SimpleQueue[Batch | Call | None],
    run: Run,
    finished: Report,
    flights: Flights,
    predecessor: threading.Thread | None,
    stopped: Future[None],
) -> None:
    if predecessor is not None:
        predecessor.join()
    # OpenMP keeps the number of threads per calling thread: without this, a thread that
    # is not the main one runs its kernels on all cores, whatever the user has set.
    torch.set_num_threads(torch.get_num_threads())
    while (job := jobs.get()) is not None:
        if isinstance(job, Call):
            flights.land()
            job.run()
        else:
            rest = run(job)
            if rest is None:
                finished(job)
            else:
                flights.add(job, rest)
                del rest
        del job  # or the last batch would stay alive until the next one
    flights.end()
    stopped.set_result(None)


class Flights:
    """Batches that were started on a device, and the thread that waits for them, in order.

    Args:
        finished: told of each batch that is over.
        free: told, before that, of a batch beside which another one may be started.
        most: how many there may be.
    """

    def __init__(self, finished: Report, free: Report | None, most: int) -> None:
        self._finished = finished
        self._free = free
        self._most = most
        self._changed = threading.Condition()
        self._count = 0
        self._held: Batch | None = None  # the latest, while there may be no other beside it
        self._jobs: queue.SimpleQueue[tuple[Batch, Callable[[], None]] | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None

    def add(self, batch: Batch, rest: Callable[[], None]) -> None:
        """A batch was started; ``rest`` waits for it and never raises."""
        if self._thread is None:
            self._thread = threading.Thread(
                target=self._work, name="aioinfer-completions", daemon=True
            )
            _threads.add(self._thread)
            self._thread.start()
        with self._changed:
            self._count += 1
            crowded = self._count >= self._most
            if crowded:
                self._held = batch
        if not crowded and self._free is not None:
            self._free(batch)  # before it can be finished
        self._jobs.put((batch, rest))

    def land(self) -> None:
        """Wait until there are none."""
        with self._changed:
            self._changed.wait_for(lambda: not self._count)

    def end(self) -> None:
        """Wait until there are none and there will be none."""
        if self._thread is not None:
            self._jobs.put(None)
            self._thread.join()

    def _work(self) -> None:
        while (job := self._jobs.get()) is not None:
            batch, rest = job
            rest()
            with self._changed:
                held, self._held = self._held, None
            if held is not None and held is not batch and self._free is not None:
                self._free(held)
            self._finished(batch)
            with self._changed:
                self._count -= 1
                self._changed.notify_all()
            del job, batch, rest, held


# The interpreter kills daemon threads where they are, and one that is inside of torch, or on
# its way out of it, takes the process down with it. So it waits for them, for a while.
_threads: weakref.WeakSet[threading.Thread] = weakref.WeakSet()


@atexit.register
def _join_threads() -> None:
    for thread in list(_threads):
        thread.join(timeout=_JOIN_S)


_JOIN_S = 5.0


class Call:
    """A function to run between batches."""

    def __init__(self, function: Callable[[], Any]) -> None:
        self.future: Future[Any] = Future()
        self._function = function

    def run_after(self, thread: threading.Thread) -> None:
        """Run it once a thread has ended."""
        thread.join()
        self.run()

    def run(self) -> None:
        """Run it here, unless nobody wants to know any more; the future tells what came of it."""
        if not self.future.set_running_or_notify_cancel():
            return
        try:
            self.future.set_result(self._function())
        except BaseException as error:
            self.future.set_exception(error)
