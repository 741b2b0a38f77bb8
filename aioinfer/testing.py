"""Fakes for tests of code that uses this library, and of the library itself.

They take what makes such tests slow and flaky out of them: real time, real threads, and
forwards that begin and end whenever they like. A test with pytest-asyncio that decides all
three::

    async def test_a_lonely_request_leaves_after_the_timeout():
        clock, model = ManualClock(), RecordingModel()
        puppet = PuppetExecutor()
        async with InferenceServer(
            model, timeout=0.5, min_batch_size=8, clock=clock, executor=puppet
        ) as server:
            with puppet:
                td = TensorDict({"observation": torch.ones(3)})
                answer = server.async_client().submit(td)
                clock.advance(0.4)
                await settle()
                assert not puppet.waiting  # nothing has left yet
                clock.advance(0.1)
                await settle()
                puppet.run_next()
                assert (await answer)["action"].tolist() == [2.0, 2.0, 2.0]

With the real executor thread instead of a :class:`PuppetExecutor`, hold the forward itself::

    async def test_what_arrives_during_a_forward_joins_the_next_batch():
        model = RecordingModel()
        async with InferenceServer(model) as server:
            client = server.async_client()
            with model.held():
                first = client.submit(td)
                await model.entered()
                rest = [client.submit(td) for _ in range(3)]
            await asyncio.gather(first, *rest)
            assert model.batch_sizes == [1, 3]
"""

from __future__ import annotations

import asyncio
import contextlib
import heapq
import itertools
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from types import TracebackType
from typing import Any, Self

from tensordict import TensorDict, TensorDictBase

from aioinfer.batch import Batch
from aioinfer.clock import TimerHandle

__all__ = ["ManualClock", "PuppetExecutor", "RecordingModel", "settle"]

PATIENCE_S = 30.0
"""Seconds after which a fake that waits for the test gives up, so that no test hangs."""


async def settle(rounds: int = 50) -> None:
    """Let the running event loop do all it can do now, without any time passing.

    What is due on the loop runs, and what that makes due, and so on for ``rounds`` rounds. It
    does not wait for other threads; see :meth:`RecordingModel.entered` for that.

    Args:
        rounds: how many times the loop goes round. A request needs fewer than ten from its
            submission to a :class:`PuppetExecutor`.
    """
    for _ in range(rounds):
        await asyncio.sleep(0)


class ManualClock:
    """A clock that stands still until the test moves it.

    Give it to a server as ``clock``: every timeout and every deadline then passes exactly
    when :meth:`advance` says so::

        clock = ManualClock()
        async with InferenceServer(policy, clock=clock, timeout=60.0) as server:
            ...
            clock.advance(60.0)

    Any thread may use it. (A thread that blocks in a :class:`~aioinfer.SyncInferenceClient`
    call waits in real time, whatever the server's clock is.)

    Args:
        now: what it reads at first.
    """

    def __init__(self, now: float = 1000.0) -> None:
        self._now = float(now)
        self._timers: list[tuple[float, int, _ManualTimer]] = []
        self._armed = itertools.count()
        self._lock = threading.Lock()

    def __call__(self) -> float:
        """Return the present, in seconds."""
        return self._now

    def call_at(
        self, loop: asyncio.AbstractEventLoop, when: float, callback: Callable[[], object]
    ) -> TimerHandle:
        """Run ``callback`` on ``loop`` once the clock reads ``when`` or later."""
        timer = _ManualTimer(loop, callback)
        with self._lock:
            due = when <= self._now
            if not due:
                heapq.heappush(self._timers, (when, next(self._armed), timer))
        if due:
            timer.fire_soon()
        return timer

    def advance(self, seconds: float) -> None:
        """Let ``seconds`` pass, and fire the timers that come due, in their order.

        A timer of the event loop that this is called on has fired when this returns, at the
        very moment it was armed for: what it arms in turn is fired too if it comes due. A
        timer of another loop is handed to that loop, and fires there as soon as it may.

        Args:
            seconds: at least 0.

        Raises:
            ValueError: ``seconds`` is negative; this clock is monotonic.
        """
        if not seconds >= 0:
            raise ValueError(f"seconds must be at least 0 on a monotonic clock, got {seconds!r}")
        target = self._now + seconds
        while (timer := self._next_due(target)) is not None:
            timer.fire()
        with self._lock:
            self._now = max(self._now, target)

    @property
    def timers(self) -> list[float]:
        """When the timers that are armed will fire, soonest first."""
        with self._lock:
            return sorted(when for when, _, timer in self._timers if not timer.cancelled)

    def _next_due(self, target: float) -> _ManualTimer | None:
        with self._lock:
            while self._timers and self._timers[0][0] <= target:
                when, _, timer = heapq.heappop(self._timers)
                if not timer.cancelled:
                    self._now = max(self._now, when)
                    return timer
        return None


class _ManualTimer:
    """One armed timer."""

    def __init__(self, loop: asyncio.AbstractEventLoop, callback: Callable[[], object]) -> None:
        self._loop = loop
        self._callback: Callable[[], object] | None = callback

    @property
    def cancelled(self) -> bool:
        return self._callback is None

    def cancel(self) -> None:
        self._callback = None  # and keep nothing that it refers to

    def fire(self) -> None:
        if _running_loop() is self._loop:
            self._run()
        else:
            self.fire_soon()

    def fire_soon(self) -> None:
        try:
            self._loop.call_soon_threadsafe(self._run)
        except RuntimeError:
            if not self._loop.is_closed():  # like a loop's own timer, it dies with the loop
                raise

    def _run(self) -> None:
        callback = self._callback
        if callback is not None:
            callback()


class RecordingModel:
    """A policy that remembers its batches, and that a test can hold, wait for and break.

    It maps a TensorDict to a TensorDict and can be served as it is. Any thread may use it.
    By default it doubles ``"observation"`` into ``"action"``::

        model = RecordingModel()
        async with InferenceServer(model) as server:
            ...
        assert model.batch_sizes == [1, 31]

    Every forward is recorded when it begins, one that fails too: the server repeats a batch
    that failed in halves, so after a failure more rows are recorded than were asked for.

    Args:
        function: what it computes.
        in_keys: what a request must have; ``None`` leaves the attribute ``None``, which lets
            every request through to the model.
        out_keys: what a reply holds; ``None`` stands for all that ``function`` returns.
    """

    def __init__(
        self,
        function: Callable[[TensorDictBase], Any] | None = None,
        *,
        in_keys: Sequence[Any] | None = None,
        out_keys: Sequence[Any] | None = None,
    ) -> None:
        self.in_keys = None if in_keys is None else list(in_keys)
        self.out_keys = None if out_keys is None else list(out_keys)
        self._function = _double if function is None else function
        self._bell = _Bell()
        self._batches: list[TensorDictBase] = []
        self._threads: set[int] = set()
        self._inside = 0
        self._most_inside = 0
        self._gate: threading.Event | None = None
        self._at_gate = 0
        self._limit_s = PATIENCE_S
        self._predicate: Callable[[TensorDictBase], object] | None = None
        self._make_error: Callable[[], BaseException] = _told_to_fail

    # -- what it saw --------------------------------------------------------

    @property
    def batches(self) -> list[TensorDictBase]:
        """A copy of what each forward was given, in order."""
        with self._bell.lock:
            return list(self._batches)

    @property
    def batch_sizes(self) -> list[int]:
        """The rows of each forward, in order."""
        return [batch.batch_size.numel() for batch in self.batches]

    @property
    def rows(self) -> int:
        """The rows of all forwards."""
        return sum(self.batch_sizes)

    @property
    def threads(self) -> set[int]:
        """The identifiers of the threads that ran a forward."""
        with self._bell.lock:
            return set(self._threads)

    @property
    def most_at_once(self) -> int:
        """How many forwards ran at the same time, at most. A server runs one."""
        with self._bell.lock:
            return self._most_inside

    # -- holding ------------------------------------------------------------

    def hold(self, limit_s: float = PATIENCE_S) -> None:
        """Make every forward from now on wait, at its beginning, for :meth:`release`.

        Do not hold a model that runs on the test's own thread (see
        :meth:`PuppetExecutor.run_next`): the test could not release it.

        Args:
            limit_s: real seconds after which a forward that is held raises
                :class:`TimeoutError`, so that a test that forgets to release does not hang.
        """
        with self._bell.lock:
            self._limit_s = limit_s
            if self._gate is None:
                self._gate = threading.Event()

    def release(self) -> None:
        """Let the forward that is held go on, and hold no other. Harmless if not held."""
        self._open_gate(None)

    def step(self) -> None:
        """Let the forward that is held go on, and hold the next one.

        Raises:
            RuntimeError: the model is not held, or no forward has entered it.
        """
        with self._bell.lock:
            if not self._at_gate:
                raise RuntimeError("no forward is held; call hold() and wait_until_entered() first")
        self._open_gate(threading.Event())

    @contextlib.contextmanager
    def held(self, limit_s: float = PATIENCE_S) -> Iterator[None]:
        """Hold the model in a ``with`` block; it is released however the block ends."""
        self.hold(limit_s)
        try:
            yield
        finally:
            self.release()

    def wait_until_entered(self, timeout: float = PATIENCE_S, *, forwards: int = 1) -> None:
        """Block this thread until a forward is held.

        Args:
            timeout: real seconds.
            forwards: how many forwards, each on a thread of its own, to wait for.

        Raises:
            TimeoutError: no forward began in time.
            RuntimeError: the model is not held, so a forward could come and go unseen.
        """
        self._bell.wait(lambda: self._is_entered(forwards), timeout, "no forward began")

    async def entered(self, timeout: float = PATIENCE_S, *, forwards: int = 1) -> None:
        """Wait until a forward is held, without blocking the event loop.

        Arguments and errors are those of :meth:`wait_until_entered`.
        """
        await self._bell.wait_async(lambda: self._is_entered(forwards), timeout, "no forward began")

    # -- failing ------------------------------------------------------------

    def fail_when(
        self,
        predicate: Callable[[TensorDictBase], object] | None,
        error: Callable[[], BaseException] | None = None,
    ) -> None:
        """Make forwards fail from now on.

        For example, fail every batch that holds a negative observation::

            model.fail_when(lambda td: bool((td["observation"] < 0).any()))

        Args:
            predicate: tells of a batch whether its forward fails; ``None`` ends failing.
            error: makes the exception to raise, a new one each time; ``None`` stands for a
                :class:`ValueError`.
        """
        with self._bell.lock:
            self._predicate = predicate
            self._make_error = _told_to_fail if error is None else error

    # -- the policy ---------------------------------------------------------

    def __call__(self, td: TensorDictBase) -> Any:
        """Run one forward."""
        with self._bell.lock:
            self._batches.append(td.clone())
            self._threads.add(threading.get_ident())
            self._inside += 1
            self._most_inside = max(self._most_inside, self._inside)
            gate, limit_s = self._gate, self._limit_s
            if gate is not None:
                self._at_gate += 1
                self._bell.ring()
        try:
            if gate is not None and not gate.wait(limit_s):
                raise TimeoutError(f"held for {limit_s} s; nobody called release()")
            with self._bell.lock:
                predicate, make_error = self._predicate, self._make_error
            if predicate is not None and predicate(td):
                raise make_error()
            return self._function(td)
        finally:
            with self._bell.lock:
                self._inside -= 1

    def _is_entered(self, forwards: int) -> bool:
        if self._gate is None:
            raise RuntimeError("the model is not held; call hold() first")
        return self._at_gate >= forwards

    def _open_gate(self, following: threading.Event | None) -> None:
        with self._bell.lock:
            gate, self._gate = self._gate, following
            self._at_gate = 0
        if gate is not None:
            gate.set()


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
        self._jobs: deque[Batch | _Call] = deque()
        self._taken: list[Batch] = []
        self._free = False
        self._stopped: Future[None] = Future()
        self._stopping = True
        self._bell = _Bell()

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
        job = _Call(function)
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
            calls = [job for job in self._jobs if isinstance(job, _Call)]
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
                if not isinstance(first, _Call):
                    if first is None and self._stopping and not self._stopped.done():
                        self._stopped.set_result(None)
                    return
                self._jobs.popleft()
            first.run()


class _Call:
    """A function to run between batches."""

    def __init__(self, function: Callable[[], Any]) -> None:
        self.future: Future[Any] = Future()
        self._function = function

    def run(self) -> None:
        if not self.future.set_running_or_notify_cancel():
            return
        try:
            self.future.set_result(self._function())
        except BaseException as error:
            self.future.set_exception(error)


class _Bell:
    """Lets threads and coroutines wait for something about the object that owns it."""

    def __init__(self) -> None:
        self.lock = threading.Condition()
        self._sleepers: list[tuple[asyncio.AbstractEventLoop, asyncio.Future[None]]] = []

    def ring(self) -> None:
        """Make everybody look again; the caller holds the lock."""
        self.lock.notify_all()
        sleepers, self._sleepers = self._sleepers, []
        for loop, future in sleepers:
            try:
                loop.call_soon_threadsafe(_wake, future)
            except RuntimeError:
                if not loop.is_closed():
                    raise

    def wait(self, predicate: Callable[[], bool], timeout: float, otherwise: str) -> None:
        with self.lock:
            if not self.lock.wait_for(predicate, timeout):
                raise TimeoutError(f"{otherwise} within {timeout} s")

    async def wait_async(
        self, predicate: Callable[[], bool], timeout: float, otherwise: str
    ) -> None:
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(timeout):
                while True:
                    with self.lock:
                        if predicate():
                            return
                        future: asyncio.Future[None] = loop.create_future()
                        self._sleepers.append((loop, future))
                    await future
        except TimeoutError:
            raise TimeoutError(f"{otherwise} within {timeout} s") from None


def _wake(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)


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


def _double(td: TensorDictBase) -> TensorDictBase:
    return TensorDict({"action": td["observation"] * 2}, batch_size=td.batch_size)


def _told_to_fail() -> BaseException:
    return ValueError("RecordingModel was told to fail on this batch")


def _copy_of(error: BaseException) -> BaseException:
    return type(error)(*error.args)


def _running_loop() -> asyncio.AbstractEventLoop | None:
    try:
        return asyncio.get_running_loop()
    except RuntimeError:
        return None
