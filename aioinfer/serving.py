"""One run of a server: intake -> batcher -> executor -> replies, on one event loop.

Nothing here waits. :meth:`Serving._pump` takes what arrived, asks the batcher what to do,
does it, and hands out what the executor finished. It runs as a callback of the loop when
something it asked for happened: enough arrivals, a finished batch, a timer.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future

from aioinfer.batch import Batch
from aioinfer.batching import ANY_NUMBER, Batcher, Dispatch, Wait
from aioinfer.clock import Clock, TimerHandle
from aioinfer.devices.faults import copy_of
from aioinfer.errors import (
    InferenceError,
    InvalidRequestError,
    ServerClosedError,
    ServerDiedError,
    WeightSyncError,
)
from aioinfer.executor import Executor, Run
from aioinfer.intake import Intake, Notice, loop_closed, running_loop
from aioinfer.replies import Delivery, deliver
from aioinfer.request import GivenUp, Request, State
from aioinfer.signature import Signature
from aioinfer.splitting import split
from aioinfer.stats import BatchTimes, StatsRecorder
from aioinfer.transports.base import InferenceTransport
from aioinfer.weights.receiving import Freshness

_log = logging.getLogger("aioinfer")

_DONE = State.DONE
_HOLD = Wait(None, ANY_NUMBER)


class Serving:
    """Serves from :meth:`open` until :meth:`run` returns.

    Args:
        transports: the links to serve.
        batcher: decides; owned by this run.
        executor: runs the batches.
        run: how to run one.
        recorder: counts.
        clock: the server's clock.
        admit: raises for a signature that the policy cannot serve.
        warm_up: is to be done before anything is accepted, once the executor runs.
        freshness: how old the weights are, where they may be too old to serve.
    """

    def __init__(
        self,
        transports: Sequence[InferenceTransport],
        batcher: Batcher,
        executor: Executor,
        run: Run,
        recorder: StatsRecorder,
        clock: Clock,
        admit: Callable[[Signature], None],
        warm_up: Callable[[], Future[None]] | None = None,
        freshness: Freshness | None = None,
    ) -> None:
        self.loop = asyncio.get_running_loop()
        self._transports = transports
        self._batcher = batcher
        self._executor = executor
        self._run = run
        self._warm_up = warm_up
        self._recorder = recorder
        self._clock = clock
        self._freshness = freshness
        self._intake = Intake(
            self.loop,
            clock,
            wake=self._pump,
            admit=admit,
            refused=recorder.refuse,
            queued_rows=lambda: batcher.rows,
            max_queue_size=batcher.max_queue_size,
        )
        self._running: list[Batch] = []
        self._attached: list[InferenceTransport] = []
        # Batches on their way back: from the executor thread, and then still to be answered.
        self._finished: deque[tuple[Batch, list[Delivery]]] = deque()
        self._freed: deque[Batch] = deque()
        self._done: deque[list[Delivery]] = deque()
        self._timer: TimerHandle | None = None
        self._timer_at = 0.0
        self._drained: asyncio.Future[None] = self.loop.create_future()
        self._fatal: ServerDiedError | None = None
        self._over = False
        # Between the end of a batch and the end of everything, which can come in the midst of
        # either: a run that is thrown away together with its loop ends where garbage is collected.
        self._lock = threading.RLock()

    # -- lifecycle ----------------------------------------------------------

    async def open(self) -> None:
        """Begin to accept requests.

        Raises:
            RuntimeError: a transport already serves another server.
            Exception: what the policy raised while it was warmed up.
        """
        self._executor.start(self._run_batch, self._on_finished, self._on_free)
        try:
            if self._warm_up is not None:
                await asyncio.wrap_future(self._warm_up())
            for transport in self._transports:
                await transport.attach(self._intake)
                self._attached.append(transport)
        except BaseException:
            await self._end(_closed)
            raise

    async def run(self) -> None:
        """Serve until closed and drained. Whatever ends it, everybody is answered."""
        make_error: Callable[[], InferenceError] = _closed
        try:
            await self._drained
        except GeneratorExit:  # thrown away together with its loop
            self.abandon()
            raise
        except asyncio.CancelledError:
            await self._end(_task_cancelled)
            raise
        except Exception as error:
            _log.exception("the server stopped because of an error of its own")
            make_error = _because(error)
        await self._end(make_error)

    def close(self, *, drain: bool) -> None:
        """Accept nothing more; answer what was accepted, or only fail it."""
        self._intake.close(_closing)
        self._batcher.close()
        if not drain and not self._drained.done():
            self._drained.set_result(None)
        self._pump()

    def abandon(self) -> None:
        """The loop was closed under the server: nothing can be awaited any more."""
        self._finish(loop_closed, stop=True)

    def give_up(self) -> None:
        """The loop is stuck in a forward, and cannot end anything; any thread may call this."""
        self._finish(_closed, stop=True)

    @property
    def queue_depth(self) -> int:
        """Rows waiting."""
        return self._batcher.rows + self._intake.pending_rows

    async def _end(self, make_error: Callable[[], InferenceError]) -> None:
        self._finish(make_error)
        if self._timer is not None:
            self._timer.cancel()
        stopped = self._executor.stop()
        try:
            if not self._running:  # else a forward still runs, for nobody, for how long?
                await asyncio.wrap_future(stopped)
        finally:
            for transport in self._attached:
                try:
                    await transport.detach()
                except Exception:
                    _log.exception("a transport could not be detached")

    def _finish(self, make_error: Callable[[], InferenceError], *, stop: bool = False) -> None:
        """Accept nothing more, and answer everybody who was not answered yet."""
        with self._lock:
            if self._over:
                return
            self._over = True
            if stop:  # before a thread is answered, which may start this server and executor again
                self._executor.stop()
        self._intake.close(make_error)
        self._take_finished()
        self._hand_out()
        left = [request for batch in self._running for request in batch.requests]
        left += self._batcher.waiting()
        while self._intake.pending:
            left.append(self._intake.take())
        for request in left:
            if request.state is not State.DONE:
                self._fail(request, make_error())

    # -- the pump -----------------------------------------------------------

    def _pump(self) -> None:
        if self._over:
            return
        try:
            self._take_notices()  # first: who gave up during the forward was not answered
            self._take_finished()
            if self._fatal is not None:
                raise self._fatal
            self._decide()
            # Replies go out after the next batch has: the executor works meanwhile.
            self._hand_out()
        except Exception as error:
            if not self._drained.done():
                self._drained.set_exception(error)

    def _decide(self) -> None:
        while True:
            self._take_notices()
            self._take_requests()
            held = self._freshness is not None and self._is_held(self._freshness)
            action = _HOLD if held else self._batcher.next_action(self._clock())
            self._intake.made_room()
            if isinstance(action, Dispatch):
                self._dispatch(action)
            elif self._intake.sleep_until(action.arrivals):
                self._sleep(action)
                return

    def _is_held(self, freshness: Freshness) -> bool:
        """Whether to serve nothing until there are newer weights; or refuse all that waits."""
        fault = freshness.fault() if self._batcher.rows else None
        if fault is None:
            return False
        if freshness.policy == "wait" and self._intake.closed is None:
            return True
        for request in list(self._batcher.waiting()):
            if request.state is not _DONE:  # a part whose whole was refused is done
                self._batcher.discard(request)
                self._fail(request, WeightSyncError(fault))
        return False

    def weights_changed(self) -> None:
        """There are new weights, and perhaps requests that wait for them. Any thread may call."""
        try:
            self.loop.call_soon_threadsafe(self._pump)
        except RuntimeError:  # closed under a running server
            self.abandon()

    def _take_finished(self) -> None:
        while self._freed:
            self._batcher.executor_free(self._freed.popleft().requests, self._clock())
        while self._finished:
            batch, deliveries = self._finished.popleft()
            self._running.remove(batch)
            self._done.append(deliveries)
            if batch.failed:
                self._count_failures(batch)
                self._fatal = batch.fatal or self._fatal
            self._batcher.forward_ended(batch.requests, batch.answered_at, batch.began_at)
            self._intake.room = self._batcher.room

    def _take_notices(self) -> None:
        notices = self._intake.notices
        while notices:
            notice, about = notices.popleft()
            if isinstance(about, Request):
                self._withdraw(about)
            elif notice is Notice.JOINED:
                self._batcher.join(about)
            else:
                self._batcher.leave(about)

    def _take_requests(self) -> None:
        intake, batcher = self._intake, self._batcher
        batcher.crowded = False
        arrived = len(intake.pending)
        if not arrived:
            return
        # Usually everything fits, and need not be looked at one by one.
        fits = batcher.rows + intake.pending_rows <= batcher.max_queue_size
        take, push, largest = intake.take, batcher.push, batcher.max_batch_size
        for taken in range(arrived):
            request = take()
            if request.state is _DONE:  # withdrawn before it came this far
                continue
            if not fits and not batcher.has_room(request.rows):
                intake.put_back(request)
                batcher.crowded = True
                arrived = taken
                break
            if request.rows <= largest:
                push(request)
            else:
                self._push_in_parts(request)
        self._recorder.requests += arrived

    def _push_in_parts(self, request: Request) -> None:
        try:
            parts = split(request, self._batcher.max_batch_size)
        except Exception as error:  # data that cannot be sliced
            refused = InvalidRequestError(
                f"the request has {request.rows} rows, more than max_batch_size="
                f"{self._batcher.max_batch_size}, and cannot be split: {error}"
            )
            refused.__cause__ = error
            self._fail(request, refused)
            return
        for part in parts:
            self._batcher.push(part)

    def _dispatch(self, action: Dispatch) -> None:
        for request in action.expired:
            self._expire(request)
        if action.requests:
            batch = Batch(action.requests, action.rows, action.reason, self._clock())
            self._running.append(batch)
            self._executor.submit(batch)

    def _sleep(self, action: Wait) -> None:
        if (
            self._intake.closed is not None
            and not self._running
            and not self._batcher.rows
            and not self._intake.pending
            and not self._drained.done()
        ):
            self._drained.set_result(None)
        until = action.until
        # A timer that fires too early only asks again, so one is kept rather than re-armed
        # for every batch.
        if until is not None and (self._timer is None or until < self._timer_at):
            if self._timer is not None:
                self._timer.cancel()
            self._timer_at = until
            self._timer = self._clock.call_at(self.loop, until, self._on_timer)

    def _on_timer(self) -> None:
        self._timer = None
        self._pump()

    # -- replies ------------------------------------------------------------

    def _run_batch(self, batch: Batch) -> Callable[[], None] | None:
        return None if self._over else self._run(batch)

    def _on_free(self, batch: Batch) -> None:
        """The executor can take another batch beside this one. Runs on a thread of its own."""
        self._freed.append(batch)
        with contextlib.suppress(RuntimeError):  # the loop was closed
            self.loop.call_soon_threadsafe(self._pump)

    def _on_finished(self, batch: Batch) -> None:
        """The executor finished a batch. Runs on the thread that ran it."""
        # First the note for the loop, then the answers: a thread that is answered may ask
        # again at once, and the batcher must not see that before it knows of the answer.
        with self._lock:
            if self._over:
                return
            deliveries = batch.by_port()
            self._finished.append((batch, [d for d in deliveries if d[0].on_loop]))
        self._intake.load = batch.rows + self.queue_depth
        # Counted before anybody is answered, who might then look.
        times = BatchTimes(
            [request.submitted_at for request in batch.requests],
            batch.dispatched_at,
            batch.forward_s,
            batch.answered_at,
        )
        self._recorder.batch(batch.rows, batch.reason, times)
        for port, answers in deliveries:
            if not port.on_loop:
                deliver(port, answers)
        try:
            if running_loop() is self.loop:
                # Not before the loop has read what arrived meanwhile.
                self.loop.call_soon(self.loop.call_soon, self._pump)
            else:
                self.loop.call_soon_threadsafe(self._pump)
        except RuntimeError:  # closed under a running server
            self.abandon()

    def _hand_out(self) -> None:
        """Answer those who wait on this loop."""
        while self._done:
            for port, answers in self._done.popleft():
                deliver(port, answers)

    def _withdraw(self, request: Request) -> None:
        """The caller no longer wants an answer."""
        if request.state is State.DONE:
            return
        for part in request.parts or (request,):
            if part.state is not State.RUNNING:  # else the executor still needs it
                part.data = None
            self._batcher.discard(part)
        request.state = State.DONE
        if request.given_up is GivenUp.TIMED_OUT:
            self._recorder.timed_out += 1
        else:
            self._recorder.cancelled += 1

    def _count_failures(self, batch: Batch) -> None:
        for request, outcome in batch.outcomes:
            if isinstance(outcome, BaseException) and request.state is not State.DONE:
                self._recorder.failed += self._is_first_end(request)

    def _fail(self, request: Request, error: Exception) -> None:
        self._recorder.failed += self._is_first_end(request)
        request.state = State.DONE
        deliver(request.port, [(request, error)])

    def _expire(self, request: Request) -> None:
        self._recorder.timed_out += self._is_first_end(request)
        error = TimeoutError(f"no answer within timeout={request.timeout} s of the submission")
        deliver(request.port, [(request, error)])

    def _is_first_end(self, request: Request) -> bool:
        """Whether this is the end of what a caller asked for, to be counted.

        For a part it is if it is the first to end badly; the others are then not worth a
        forward any more.
        """
        whole = request.whole
        if whole is None:
            return True
        if whole.given_up is not None:
            return False
        whole.given_up = GivenUp.CANCELLED
        for part in whole.parts or ():
            if part is not request:
                self._batcher.discard(part)
        whole.parts = None
        return True


def _closing() -> InferenceError:
    return ServerClosedError("the server is closing")


def _closed() -> InferenceError:
    return ServerClosedError("the server was closed before this request was answered")


def _task_cancelled() -> InferenceError:
    return ServerDiedError("the task of the server was cancelled; its event loop ended?")


def _because(cause: BaseException) -> Callable[[], InferenceError]:
    def make() -> InferenceError:
        if isinstance(cause, ServerDiedError):
            return copy_of(cause)
        error = ServerDiedError(f"the server stopped because of an error of its own: {cause!r}")
        error.__cause__ = cause
        return error

    return make
